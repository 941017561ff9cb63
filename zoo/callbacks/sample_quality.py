"""Feature distance of generated images for every sampler and number of network evaluations, beside the floor."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.table import Table
from torch import Tensor

from zoo.callbacks.sampler_comparison import SamplerComparison
from zoo.callbacks.sampling import draw_images
from zoo.metrics.agreement import classifier_agreement
from zoo.metrics.extractors import OWN_CLASSIFIER, SHIPPED_EXTRACTORS, check_extractor
from zoo.metrics.feature_distance import NUM_SAMPLES, FeatureDistances, feature_distances, real_data_floor
from zoo.sampling import Samples, as_sampled


class SampleQuality(SamplerComparison):
    """Draws images and measures their distance from the training images, at test and if wanted during training.

    What `SamplerComparison` says holds; the figures are the fields of `FeatureDistances`, the real data's are the
    floor, and the file is `sample_quality.json`. With one of our classifiers as the extractor, the figures also say how
    sure it is of the samples and which classes it sees. The real images are given the levels that samples have (four
    grey levels, say), if the module can (`quantize`).

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

    kind = Samples
    result_file = "sample_quality.json"
    figures = ("frechet_distance", "kernel_distance", "inception_score", "mean_max_probability")
    real = "floor"

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
        super().__init__(samplers, nfes, num_samples, batch_size, every_n_epochs, seed)
        if kid_subset_size < 2 or num_samples < kid_subset_size:
            raise ValueError(
                f"SampleQuality: num_samples={num_samples} must hold a subset of the kernel distance, "
                f"kid_subset_size={kid_subset_size} (at least 2)."
            )
        self.extractor = extractor
        self.weights_path = weights_path
        self.kid_subset_size = kid_subset_size

    def check(self, trainer: Trainer) -> None:
        """Check reference images, extractor and weights.

        Raises:
            TypeError: If the DataModule offers no reference images, or names no extractor and none was given.
            ValueError: If the extractor or its weights are wrong.
        """
        self.require(trainer, "reference_images", "real images", "uint8 (N, C, H, W)")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.extractor is None and not hasattr(data, "feature_extractor"):
            raise TypeError(
                f"SampleQuality: {type(data).__name__} names no `feature_extractor`, so pass `extractor` "
                f"(one of {', '.join(SHIPPED_EXTRACTORS)}, ...)."
            )
        if trainer.is_global_zero:
            check_extractor(self._extractor(trainer), self.weights_path)

    def draw(self, trainer: Trainer, pl_module: LightningModule, num_samples: int, **options: Any) -> tuple[Tensor, int]:
        """Draw images uint8 (N, C, H, W)."""
        return draw_images(trainer, pl_module, num_samples, **options)

    def reference(self, trainer: Trainer) -> Tensor:
        """The DataModule's reference images, uint8 (M, C, H, W)."""
        return as_sampled(trainer.lightning_module, trainer.datamodule.reference_images())  # type: ignore[attr-defined]

    def score(self, trainer: Trainer, samples: Tensor, reference: Tensor) -> dict[str, Any]:
        """Distances of samples from the reference images, and what our classifier makes of them."""
        extractor = self._extractor(trainer)
        distances = feature_distances(samples, reference, extractor, **self._options())
        return {**_row(distances), **self._agreement(samples, extractor)}

    def score_real(self, trainer: Trainer, reference: Tensor) -> dict[str, Any]:
        """The floor: distances of real images from real images."""
        extractor = self._extractor(trainer)
        floor = real_data_floor(reference.to(trainer.strategy.root_device), extractor, self.num_samples, **self._options())
        sizes = {"num_samples": floor.num_samples, "num_reference": floor.num_reference}
        return {**sizes, **_row(floor), **self._agreement(reference, extractor)}

    def conditions(self, trainer: Trainer, reference: Tensor) -> dict[str, Any]:
        """The extractor and the number of reference images."""
        return {"extractor": self._extractor(trainer), "num_reference": len(reference)}

    def table(self, result: dict[str, Any]) -> Table:
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
