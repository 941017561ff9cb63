"""Predictions as JSON lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from zoo.callbacks.line_merge import LineMergingWriter
from zoo.callbacks.rank_merge import per_sample

_LEFT_OUT = ("images", "trajectory")


class JSONLWriter(LineMergingWriter):
    """Writes one JSON object per sample to `predictions/<filename>`, in the order of the sample ids.

    Each object holds what `predict_step` returned for that sample, tensors as lists. Pictures and trajectories (`images`,
    `trajectory`) are left to `ImageGridWriter`, `TrajectoryWriter` and `TextWriter`. A sample that two ranks predicted, as
    padding samplers do, is written once.

    Args:
        filename: Name of the file.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(filename)

    def add(self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[str, Any]) -> None:
        """Append the samples of a batch to this rank's part.

        Raises:
            ValueError: If an entry does not hold one value per sample, or holds what JSON cannot.
        """
        count = len(prediction["index"])
        columns = {name: per_sample(value, count, name) for name, value in prediction.items() if name not in _LEFT_OUT}
        for row in zip(*columns.values(), strict=True):
            sample = dict(zip(columns, row, strict=True))
            self.keep(sample["index"], sample)

    def merge(self, trainer: Trainer, parts: list[Path]) -> list[Path]:
        """Write the lines of all parts in the order of the sample ids."""
        path = self.folder(trainer) / self.filename
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(line for _, line in self.merged(parts))
        temporary.replace(path)
        return [path]
