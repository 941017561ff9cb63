"""Predicted texts as a text file, and the way from noise to text."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from zoo.callbacks.line_merge import LineMergingWriter
from zoo.callbacks.rank_merge import per_sample

_TRAJECTORY_FILE = "trajectory.txt"


class TextWriter(LineMergingWriter):
    """Writes the predictions' `text` to `predictions/<filename>`, one line a sample in the order of the sample ids.

    Args:
        filename: Name of the file.
        num_samples: How many samples to write, those with the lowest ids; None for all.
        trajectory: Also write `predictions/trajectory.txt`: for each sample a block of its intermediate texts, the
            number of the step before each.

    Raises:
        ValueError: If `num_samples` is less than 1, or the two files would be one.
    """

    def __init__(self, filename: str = "samples.txt", num_samples: int | None = None, trajectory: bool = False) -> None:
        super().__init__(filename)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"TextWriter: num_samples must be at least 1, or none for all, got {num_samples}.")
        if trajectory and filename == _TRAJECTORY_FILE:
            raise ValueError(f"TextWriter: filename={filename!r} is the trajectories' file: choose another name for the texts.")
        self.num_samples = num_samples
        self.trajectory = trajectory

    def add(self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[str, Any]) -> None:
        """Append the texts of a batch to this rank's part.

        Raises:
            ValueError: If the prediction does not hold what is to be written, one for each sample id; or if a text has a
                line break, so that lines would not be samples.
        """
        entries = ["text", "trajectory"] if self.trajectory else ["text"]
        if missing := [entry for entry in entries if entry not in prediction]:
            raise ValueError(
                f'TextWriter wants predict_step of {type(pl_module).__name__} to return "{missing[0]}", one for each sample '
                f"id, got {sorted(prediction)}: "
                + (
                    "switch it on in the module (an option such as --model.record_trajectory true), or in this writer off."
                    if missing[0] == "trajectory"
                    else "drop this writer."
                )
            )
        index = prediction["index"].tolist()
        columns = [per_sample(prediction[entry], len(index), entry) for entry in entries]
        for sample in zip(index, *columns, strict=True):
            if any(text and text.splitlines() != [text] for text in [sample[1], *(sample[2] if self.trajectory else [])]):
                raise ValueError(
                    f"TextWriter writes one line a sample, and sample {sample[0]} has a line break: use JSONLWriter."
                )
            self.keep(sample[0], sample[1:])

    def merge(self, trainer: Trainer, parts: list[Path]) -> list[Path]:
        """Write the texts of all parts in the order of the sample ids, and the trajectories."""
        paths = [self.folder(trainer) / self.filename]
        if self.trajectory:
            paths.append(self.folder(trainer) / _TRAJECTORY_FILE)
        temporary = [path.with_name(path.name + ".tmp") for path in paths]
        files = [path.open("w", encoding="utf-8") for path in temporary]
        for index, line in itertools.islice(self.merged(parts), self.num_samples):
            text, *trajectory = json.loads(line)
            files[0].write(text + "\n")
            if trajectory:
                width = len(str(len(trajectory[0])))
                steps = [f"{step:{width}} {text}\n" for step, text in enumerate(trajectory[0], start=1)]
                files[1].writelines([f"sample {index}\n", *steps, "\n"])
        for file, source, path in zip(files, temporary, paths, strict=True):
            file.close()
            source.replace(path)
        return paths
