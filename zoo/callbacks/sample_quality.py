"""Feature distance of generated images for every sampler and number of network evaluations, beside the floor."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

import zoo
from zoo.callbacks.sampling import check_cadence, check_sampling, draw_samples, is_due
from zoo.metrics.agreement import classifier_agreement
from zoo.metrics.extractors import OWN_CLASSIFIER, SHIPPED_EXTRACTORS, check_extractor
from zoo.metrics.feature_distance import NUM_SAMPLES, FeatureDistances, feature_distances, real_data_floor
from zoo.sampling import as_sampled

RESULT_FILE = "sample_quality.json"


class SampleQuality(Callback):
    """Draws samples and measures their distance from the training images, at test and if wanted during training.

    At the end of `test`, and of the validation in every n-th epoch of `fit`, each pair of sampler and NFE draws the
    same sample ids; the distances are logged, as `test/frechet_distance/<sampler>/nfe<n>` and so on. `test` also prints
    them as a table, beside the real-data floor, writes `sample_quality.json` to `trainer.default_root_dir`, and keeps
    them in the attribute `result`; its figures go to the loggers only, not into Lightning's own table of results. With
    one of our classifiers as the extractor, the table also says how sure it is of the samples and how many classes it
    sees.

    The real images are given the levels that samples have (four grey levels, say), if the module can (`quantize`).
    The samples are drawn with the weights that are in the module at that time: the averaged ones where EMA is on.

    Args:
        samplers: Samplers to compare, out of the module's `sampler_names`.
        nfes: Numbers of network function evaluations to compare.
        num_samples: Samples for each pair. Distances fall with this number, so compare only at the same one.
        batch_size: Samples per pass on each rank.
        every_n_epochs: Measure during training too, in the validation of every n-th epoch; None for test only.
        extractor: Feature extractor; None for the DataModule's `feature_extractor`.
        weights_path: Inception's weights file, or the folder of your own classifier.
        kid_subset_size: Images per random subset of the kernel distance.
        seed: Seed of the samples.

    Raises:
        ValueError: If a list is empty or a number is too small. What depends on module and data (names of samplers, the
            extractor and its weights, reference images) is checked in `setup`, before the run starts.
    """

    def __init__(
        self,
        samplers: Sequence[str],
        nfes: Sequence[int],
        num_samples: int = NUM_SAMPLES,
        batch_size: int = 500,
        every_n_epochs: int | None = None,
        extractor: str | None = None,
        weights_path: Path | None = None,
        kid_subset_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not samplers or not nfes:
            raise ValueError(f"SampleQuality wants at least one sampler and one NFE, got {samplers} and {nfes}.")
        if batch_size < 1 or (every_n_epochs is not None and every_n_epochs < 1):
            raise ValueError(
                f"SampleQuality: batch_size and every_n_epochs must be at least 1, got {batch_size} and {every_n_epochs}."
            )
        if kid_subset_size < 2 or num_samples < kid_subset_size:
            raise ValueError(
                f"SampleQuality: num_samples={num_samples} must hold a subset of the kernel distance, "
                f"kid_subset_size={kid_subset_size} (at least 2)."
            )
        self.samplers = list(samplers)
        self.nfes = list(nfes)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.extractor = extractor
        self.weights_path = weights_path
        self.kid_subset_size = kid_subset_size
        self.seed = seed
        self.result: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check samplers, NFEs, reference images, extractor and weights (Lightning hook).

        Raises:
            TypeError: If the module offers no samples, or the DataModule no reference images.
            ValueError: If a sampler, NFE, extractor or its weights are wrong.
        """
        if stage not in ("fit", "test"):
            return
        check_sampling(pl_module, self.samplers, self.nfes, "SampleQuality")
        data = getattr(trainer, "datamodule", None)
        if not hasattr(data, "reference_images"):
            found = "has no DataModule" if data is None else f"has the DataModule {type(data).__name__} without them"
            raise TypeError(
                f"SampleQuality compares with real images, and this run {found}: "
                "use a DataModule with `reference_images()`, uint8 (N, C, H, W)."
            )
        if self.extractor is None and not hasattr(data, "feature_extractor"):
            raise TypeError(
                f"SampleQuality: {type(data).__name__} names no `feature_extractor`, so pass `extractor` "
                f"(one of {', '.join(SHIPPED_EXTRACTORS)}, ...)."
            )
        if trainer.is_global_zero:
            check_extractor(self._extractor(trainer), self.weights_path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there is a validation to act in (Lightning hook)."""
        check_cadence(trainer, self.every_n_epochs, "SampleQuality")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log in the validation of every n-th epoch of `fit` (Lightning hook)."""
        if is_due(trainer, self.every_n_epochs):
            for name, value in _scalars("val", self.measure(trainer, pl_module)).items():
                pl_module.log(name, value)  # all ranks log the same

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log, print and write (Lightning hook)."""
        self.result = result = self.measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(_scalars("test", result), step=trainer.global_step)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / RESULT_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(result, indent=2) + "\n")
            temporary.replace(path)
            console = Console()
            console.print(_table(result))
            print(f"SampleQuality: {path}")

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Draw and measure every pair of sampler and NFE.

        Returns:
            On every rank: `rows` and `floor` with the fields of `FeatureDistances` and, with one of our classifiers,
            `mean_max_probability` and `classes`; rows also name `sampler`, `nfe` (what each sample really cost) and
            `requested_nfe`.
        """
        extractor = self._extractor(trainer)
        rows: list[dict[str, Any]] = []
        reference = None
        if trainer.is_global_zero:
            reference = as_sampled(pl_module, trainer.datamodule.reference_images())  # type: ignore[attr-defined]
        for sampler in self.samplers:
            for nfe in self.nfes:
                images, spent = draw_samples(
                    trainer,
                    pl_module,
                    self.num_samples,
                    batch_size=self.batch_size,
                    seed=self.seed,
                    sampler=sampler,
                    nfe=nfe,
                )
                if reference is not None:
                    distances = feature_distances(images, reference, extractor, **self._options())
                    name = {"sampler": sampler, "nfe": spent, "requested_nfe": nfe}
                    rows.append({**name, **_row(distances), **self._agreement(images, extractor)})
        result: dict[str, Any] = {}
        if reference is not None:
            floor = real_data_floor(reference.to(pl_module.device), extractor, self.num_samples, **self._options())
            result = {
                "model": type(pl_module).__name__,
                "data": type(trainer.datamodule).__name__,  # type: ignore[attr-defined]
                "extractor": extractor,
                "num_samples": self.num_samples,
                "num_reference": len(reference),
                "seed": self.seed,
                "epoch": trainer.current_epoch,
                "global_step": trainer.global_step,
                "zoo_version": zoo.__version__,
                "rows": rows,
                "floor": {
                    "num_samples": floor.num_samples,
                    "num_reference": floor.num_reference,
                    **_row(floor),
                    **self._agreement(reference, extractor),
                },
            }
        return trainer.strategy.broadcast(result)

    def _extractor(self, trainer: Trainer) -> str:
        return self.extractor or trainer.datamodule.feature_extractor  # type: ignore[attr-defined]

    def _options(self) -> dict[str, Any]:
        return {"weights_path": self.weights_path, "kid_subset_size": self.kid_subset_size}

    def _agreement(self, images: Any, extractor: str) -> dict[str, Any]:
        if extractor not in (*SHIPPED_EXTRACTORS, OWN_CLASSIFIER):
            return {}
        agreement = classifier_agreement(images, self.weights_path or extractor)
        return {"mean_max_probability": agreement.mean_max_probability, "classes": list(agreement.classes)}


def _row(distances: FeatureDistances) -> dict[str, float]:
    """The figures themselves, without what they were computed with."""
    fields = dataclasses.asdict(distances)
    return {name: fields[name] for name in fields if name not in ("extractor", "num_samples", "num_reference")}


def _scalars(stage: str, result: dict[str, Any]) -> dict[str, float]:
    """The figures by the names under which they are logged."""
    rows = {f"{row['sampler']}/nfe{row['requested_nfe']}": row for row in result["rows"]} | {"floor": result["floor"]}
    names = ("frechet_distance", "kernel_distance", "inception_score", "mean_max_probability")
    return {f"{stage}/{name}/{place}": row[name] for place, row in rows.items() for name in names if name in row}


def _table(result: dict[str, Any]) -> Table:
    """The figures as a table for people."""
    judged = "classes" in result["floor"]
    table = Table(
        title=f"{result['model']} on {result['data']}: {result['num_samples']} samples against "
        f"{result['num_reference']} real images, features of {result['extractor']}"
    )
    table.add_column("sampler")
    for column in ("NFE", "Fréchet distance", "kernel distance", "inception score"):
        table.add_column(column, justify="right")
    if judged:
        table.add_column("mean max probability", justify="right")
        table.add_column("classes seen", justify="right")
    floor = {"sampler": "floor (real)", "nfe": "", **result["floor"]}
    for row in [*result["rows"], floor]:
        cells = [
            row["sampler"],
            str(row["nfe"]),
            f"{row['frechet_distance']:.3f}",
            f"{row['kernel_distance']:.4f}",
            f"{row['inception_score']:.2f}",
        ]
        if judged:
            cells += [f"{row['mean_max_probability']:.3f}", str(len(row["classes"]))]
        table.add_row(*cells, style="bold" if row is floor else None)
    return table
