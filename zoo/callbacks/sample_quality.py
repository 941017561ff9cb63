"""Feature distance of generated images for every sampler and number of network evaluations, beside the floor."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.table import Table
from torch import Tensor

from zoo.base.samples import Samples, as_sampled, labels_of_samples
from zoo.callbacks.sampler_comparison import SamplerComparison
from zoo.callbacks.sampling import draw_features, draw_images
from zoo.metrics.agreement import ClassifierAgreement, classifier_agreement, logits_agreement
from zoo.metrics.extractors import OWN_CLASSIFIER, SHIPPED_EXTRACTORS, check_extractor
from zoo.metrics.feature_distance import NUM_SAMPLES, FeatureDistances, feature_distances, real_data_floor
from zoo.metrics.feature_statistics import FeatureStatistics, FeatureStream, read_statistics
from zoo.metrics.streamed_distance import streamed_distances

_NOT_MEASURED = "–"


class SampleQuality(SamplerComparison):
    """Draws images and measures their distance from the training images, at test and if wanted during training.

    What `SamplerComparison` says holds; the figures are the fields of `FeatureDistances`, the real data's are the
    floor, and the file is `sample_quality.json`. With one of our classifiers as the extractor, the figures also say how
    sure it is of the samples and which classes it sees. The real images are given the levels that samples have (four
    grey levels, say), if the module can (`quantize`).

    If the module's samples are meant to show classes (`zoo.base.samples.LabelsSamples`), one of our classifiers also says in how
    many of them it sees the class meant: `class_accuracy`.

    With `statistics` of the real images in a file, these are not needed. The samples are then measured as they are drawn, and
    not kept, so that fifty thousand are no more burden than a few; the kernel distance and the floor are not measured.

    Args:
        samplers: Samplers to compare, out of the module's `sampler_names`.
        nfes: Numbers of network function evaluations to compare.
        num_samples: Samples for each pair. Distances fall with this number, so compare only at the same one.
        extractor: Feature extractor; None for the DataModule's `feature_extractor`.
        weights_path: Inception's weights file, or the folder of your own classifier.
        kid_subset_size: Images per random subset of the kernel distance; without meaning beside `statistics`.
        statistics: Statistics of the real images, an `.npz` file as `zoo.metrics.read_statistics` wants it (ADM's of ImageNet,
            or one of ours); None to compare with the DataModule's reference images.
        **kwargs: Arguments of `SamplerComparison`.

    Raises:
        ValueError: If a list is empty or a number is too small. What depends on module and data (names of samplers, the
            extractor and its weights, reference images or statistics) is checked in `setup`, before the run starts.
    """

    kind = Samples
    result_file = "sample_quality.json"
    figures = ("frechet_distance", "kernel_distance", "inception_score", "mean_max_probability", "class_accuracy")
    real = "floor"

    def __init__(
        self,
        samplers: Sequence[str],
        nfes: Sequence[int],
        num_samples: int = NUM_SAMPLES,
        extractor: str | None = None,
        weights_path: Path | None = None,
        kid_subset_size: int = 500,
        statistics: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(samplers, nfes, num_samples, **kwargs)
        if statistics is not None and num_samples < 2:
            raise ValueError(f"SampleQuality: a covariance wants at least 2 samples, got num_samples={num_samples}.")
        if statistics is None and (kid_subset_size < 2 or num_samples < kid_subset_size):
            raise ValueError(
                f"SampleQuality: num_samples={num_samples} must hold a subset of the kernel distance, "
                f"kid_subset_size={kid_subset_size} (at least 2)."
            )
        self.extractor = extractor
        self.weights_path = weights_path
        self.kid_subset_size = kid_subset_size
        self.statistics = statistics

    def check(self, trainer: Trainer) -> None:
        """Check reference images or statistics, extractor and weights.

        Raises:
            TypeError: If the DataModule offers no reference images and no statistics were given, or it names no extractor and
                none was given.
            ValueError: If the extractor, its weights or the statistics are wrong, or do not go together.
            FileNotFoundError: If there is no file of statistics.
        """
        if self.statistics is None:
            self.require(trainer, "reference_images", "real images", "uint8 (N, C, H, W)")
        data = getattr(trainer, "datamodule", None)
        if self.extractor is None and not hasattr(data, "feature_extractor"):
            found = "this run has no DataModule" if data is None else f"{type(data).__name__} names no `feature_extractor`"
            raise TypeError(f"SampleQuality: {found}, so pass `extractor` (one of {', '.join(SHIPPED_EXTRACTORS)}, ...).")
        if trainer.is_global_zero:
            width = check_extractor(self._extractor(trainer), self.weights_path)
            if self.statistics is not None:
                real = read_statistics(self.statistics)
                real.check(self._extractor(trainer), width, f"SampleQuality: the statistics in {self.statistics}")

    def draw(
        self, trainer: Trainer, pl_module: LightningModule, num_samples: int, **options: Any
    ) -> tuple[Tensor | FeatureStream, int]:
        """Draw images uint8 (N, C, H, W); beside statistics their features alone, on rank 0."""
        if self.statistics is None:
            return draw_images(trainer, pl_module, num_samples, **options)
        stream = FeatureStream(self._extractor(trainer), self.weights_path, pl_module.device)
        return stream, draw_features(trainer, pl_module, num_samples, stream, **options)

    def reference(self, trainer: Trainer) -> Tensor | FeatureStatistics:
        """The DataModule's reference images, uint8 (M, C, H, W), or the statistics."""
        if self.statistics is not None:
            return read_statistics(self.statistics)
        return as_sampled(trainer.lightning_module, trainer.datamodule.reference_images())  # type: ignore[attr-defined]

    def score(self, trainer: Trainer, samples: Tensor | FeatureStream, reference: Tensor | FeatureStatistics) -> dict[str, Any]:
        """Distances of samples from the real images, and what our classifier makes of them."""
        extractor = self._extractor(trainer)
        module = trainer.lightning_module
        labels = labels_of_samples(module, torch.arange(self.num_samples, device=module.device)) if _judges(extractor) else None
        if isinstance(samples, FeatureStream):
            assert isinstance(reference, FeatureStatistics)
            row = _row(streamed_distances(samples, reference))
            if not _judges(extractor) or samples.logits is None:
                return row
            return {**row, **_view(logits_agreement(samples.logits, labels))}
        assert isinstance(reference, Tensor)
        distances = feature_distances(samples, reference, extractor, **self._options())
        return {**_row(distances), **self._agreement(samples, extractor, labels)}

    def score_real(self, trainer: Trainer, reference: Tensor | FeatureStatistics) -> dict[str, Any] | None:
        """The floor: distances of real images from real images; None beside statistics."""
        if not isinstance(reference, Tensor):
            return None
        extractor = self._extractor(trainer)
        floor = real_data_floor(reference.to(trainer.strategy.root_device), extractor, self.num_samples, **self._options())
        sizes = {"num_samples": floor.num_samples, "num_reference": floor.num_reference}
        return {**sizes, **_row(floor), **self._agreement(reference, extractor)}

    def conditions(self, trainer: Trainer, reference: Tensor | FeatureStatistics) -> dict[str, Any]:
        """The extractor, the number of real images, and the file of statistics if there is one."""
        extractor = self._extractor(trainer)
        if isinstance(reference, FeatureStatistics):
            return {"extractor": extractor, "num_reference": reference.num_images, "statistics": str(self.statistics)}
        return {"extractor": extractor, "num_reference": len(reference)}

    def table(self, result: dict[str, Any]) -> Table:
        """The figures as a table for people."""
        rows = result["rows"]
        judged = any("classes" in row for row in rows)
        labelled = any("class_accuracy" in row for row in rows)
        number = result["num_reference"]
        real = f"{number} real images" if number is not None else "real images"
        if "statistics" in result:
            real = f"the statistics of {real} in {Path(result['statistics']).name}"
        model = result["model"] if result["data"] is None else f"{result['model']} on {result['data']}"
        table = Table(title=f"{model}: {result['num_samples']} samples against {real}, features of {result['extractor']}")
        table.add_column("sampler", min_width=max(len(row["sampler"]) for row in rows))
        for column in ("NFE", "Fréchet distance", "kernel distance", "inception score"):
            table.add_column(column, justify="right")
        if labelled:  # a terminal has no room for the classes seen, which the accuracy makes up for
            table.add_column("mean max prob.", justify="right")
            table.add_column("class accuracy", justify="right")
        elif judged:
            table.add_column("mean max probability", justify="right")
            table.add_column("classes seen", justify="right")
        floor = {"sampler": "floor (real)", "nfe": "", **(result["floor"] or {})}
        for row in [*rows, floor]:
            cells = [
                row["sampler"],
                str(row["nfe"]),
                _figure(row, "frechet_distance", 3),
                _figure(row, "kernel_distance", 4),
                _figure(row, "inception_score", 2),
            ]
            if judged:
                cells.append(_figure(row, "mean_max_probability", 3))
            if labelled:
                cells.append(_figure(row, "class_accuracy", 3))
            elif judged:
                cells.append(str(len(row["classes"])) if "classes" in row else _NOT_MEASURED)
            if _NOT_MEASURED in cells:
                table.caption = f"{_NOT_MEASURED} not measured"
            table.add_row(*cells, style="bold" if row is floor else None)
        return table

    def _extractor(self, trainer: Trainer) -> str:
        return self.extractor or trainer.datamodule.feature_extractor  # type: ignore[attr-defined]

    def _options(self) -> dict[str, Any]:
        return {"weights_path": self.weights_path, "kid_subset_size": self.kid_subset_size}

    def _agreement(self, images: Any, extractor: str, labels: Tensor | None = None) -> dict[str, Any]:
        if not _judges(extractor):
            return {}
        return _view(classifier_agreement(images, self.weights_path or extractor, labels))


def _judges(extractor: str) -> bool:
    """Whether the extractor is one of our classifiers."""
    return extractor in (*SHIPPED_EXTRACTORS, OWN_CLASSIFIER)


def _view(agreement: ClassifierAgreement) -> dict[str, Any]:
    """Stored outputs of a classifier for images."""
    view = {"mean_max_probability": agreement.mean_max_probability, "classes": list(agreement.classes)}
    return view if agreement.accuracy is None else {**view, "class_accuracy": agreement.accuracy}


def _figure(row: dict[str, Any], name: str, digits: int) -> str:
    """A figure for people, or the mark that there is none."""
    return _NOT_MEASURED if row.get(name) is None else f"{row[name]:.{digits}f}"


def _row(distances: FeatureDistances) -> dict[str, Any]:
    """The figures themselves, without what they were computed with."""
    fields = dataclasses.asdict(distances)
    return {name: fields[name] for name in fields if name not in ("extractor", "num_samples", "num_reference")}
