"""Prediction writers that keep one line a sample on disk, and give the lines back in the order of the sample ids."""

import json
from abc import ABC
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Trainer

from zoo.callbacks.rank_merge import RankMergingWriter


class LineMergingWriter(RankMergingWriter, ABC):
    """Base of writers for any number of samples: each rank's part holds a line `<sample id> TAB <JSON>` per sample.

    A sample that two ranks predicted, as padding samplers do, is kept once.

    Args:
        filename: Name of the final file.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename)
        self._file: IO[bytes] | None = None

    def open(self, trainer: Trainer) -> None:
        """Begin this rank's part."""
        self._file = self.part(trainer, trainer.global_rank).open("wb")

    def keep(self, index: int, sample: Any) -> None:
        """Append a sample to this rank's part.

        Raises:
            ValueError: If the sample holds what JSON cannot.
        """
        assert self._file is not None
        try:
            line = json.dumps(sample, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{type(self).__name__}: sample {index} cannot be written as JSON: {error}.") from error
        self._file.write(f"{index}\t{line}\n".encode())

    def close(self, trainer: Trainer) -> None:
        """Complete this rank's part."""
        assert self._file is not None
        self._file.close()
        self._file = None

    @staticmethod
    def merged(parts: list[Path]) -> Iterator[tuple[int, bytes]]:
        """The samples of all parts in the order of their ids: the id, and its line of JSON with the line's end."""
        place: dict[int, tuple[int, int]] = {}  # sample id -> (part, offset): the samples themselves stay on disk
        for number, part in enumerate(parts):
            offset = 0
            with part.open("rb") as file:
                for line in file:
                    place.setdefault(int(line.partition(b"\t")[0]), (number, offset))
                    offset += len(line)
        files = [part.open("rb") for part in parts]
        try:
            for index in sorted(place):
                number, offset = place[index]
                files[number].seek(offset)
                yield index, files[number].readline().partition(b"\t")[2]
        finally:
            for file in files:
                file.close()
