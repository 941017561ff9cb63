"""Predictions as JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningModule, Trainer

from zoo.callbacks.rank_merge import RankMergingWriter, per_sample

_PICTURES = ("images", "trajectory")


class JSONLWriter(RankMergingWriter):
    """Writes one JSON object per sample to `predictions/<filename>`, in the order of the sample ids.

    Each object holds what `predict_step` returned for that sample, tensors as lists. Pictures (`images`,
    `trajectory`) are left to `ImageGridWriter` and `TrajectoryWriter`. A sample that two ranks predicted, as padding
    samplers do, is written once.

    Args:
        filename: Name of the file.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(filename)
        self._file: IO[bytes] | None = None

    def open(self, trainer: Trainer) -> None:
        """Begin this rank's part: a line `<sample id> TAB <JSON>` per sample, in the order of prediction."""
        self._file = self.part(trainer, trainer.global_rank).open("wb")

    def add(self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[str, Any]) -> None:
        """Append the samples of a batch to this rank's part.

        Raises:
            ValueError: If an entry does not hold one value per sample, or holds what JSON cannot.
        """
        assert self._file is not None
        count = len(prediction["index"])
        columns = {name: per_sample(value, count, name) for name, value in prediction.items() if name not in _PICTURES}
        for row in zip(*columns.values(), strict=True):
            sample = dict(zip(columns, row, strict=True))
            try:
                line = json.dumps(sample, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"JSONLWriter: sample {sample['index']} cannot be written as JSON: {error}.") from error
            self._file.write(f"{sample['index']}\t{line}\n".encode())

    def close(self, trainer: Trainer) -> None:
        """Complete this rank's part."""
        assert self._file is not None
        self._file.close()
        self._file = None

    def merge(self, trainer: Trainer, parts: list[Path]) -> list[Path]:
        """Write the lines of all parts in the order of the sample ids."""
        place: dict[int, tuple[int, int]] = {}  # sample id -> (part, offset): the texts themselves stay on disk
        for number, part in enumerate(parts):
            offset = 0
            with part.open("rb") as file:
                for line in file:
                    place.setdefault(int(line.partition(b"\t")[0]), (number, offset))
                    offset += len(line)
        path = self.folder(trainer) / self.filename
        temporary = path.with_name(path.name + ".tmp")
        files = [part.open("rb") for part in parts]
        with temporary.open("wb") as merged:
            for index in sorted(place):
                number, offset = place[index]
                files[number].seek(offset)
                merged.write(files[number].readline().partition(b"\t")[2])
        for file in files:
            file.close()
        temporary.replace(path)
        return [path]
