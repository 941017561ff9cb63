"""Text as the data of a flow."""

import math
from typing import Any

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.base.samples import Samples, TextSamples
from zoo.bfn.codecs.codec import Codec

__all__ = ["TextCodec"]


class TextCodec(Codec):
    """Texts of L characters, each a class of its own: batches ``{"input_ids": int64 (B, L)}``.

    Args:
        length: characters of a sample, L.
        alphabet: the characters, in the order of their ids.

    Raises:
        ValueError: an empty length, or a character that occurs twice in the alphabet.
    """

    def __init__(self, length: int = 256, alphabet: str = " abcdefghijklmnopqrstuvwxyz") -> None:
        if length < 1:
            raise ValueError(f"TextCodec: length={length} must be at least 1.")
        if len(set(alphabet)) != len(alphabet) or len(alphabet) < 2:
            raise ValueError(f"TextCodec: alphabet={alphabet!r} must hold at least 2 characters, each once.")
        self.alphabet = alphabet
        self.data_shape = (length,)

    def units(self) -> dict[str, float]:
        """Bits per character."""
        return {"bits_per_char": 1 / math.log(2)}

    def check(self, num_levels: int) -> None:
        """See `Codec`."""
        if num_levels != len(self.alphabet):
            raise ValueError(
                f"TextCodec: the alphabet {self.alphabet!r} has {len(self.alphabet)} characters, but head and flow are made"
                f" for {num_levels} classes: set model.flow.num_classes to {len(self.alphabet)}."
            )

    def encode(self, batch: Any, num_levels: int, random: SampleRandom) -> Tensor:
        """The ids themselves; see `Codec`."""
        return self._checked(batch["input_ids"])

    def known(self, batch: Any, num_levels: int) -> tuple[Tensor, Tensor] | None:
        """``input_ids`` where ``known`` is true, both (B, L); see `Codec`."""
        if "input_ids" not in batch:
            return None
        ids, known = self._checked(batch["input_ids"]), batch.get("known")
        if known is None or known.dtype != torch.bool or known.shape != ids.shape:
            given = "none" if known is None else f"{known.dtype} {tuple(known.shape)}"
            raise ValueError(
                f'In-painting needs "known" beside "input_ids", bool {tuple(ids.shape)}, true where a character is known;'
                f" it is {given}."
            )
        return ids, known

    def samples(self, levels: Tensor, nfe: int, trajectory: Tensor | None, num_levels: int) -> TextSamples:
        """Characters; see `Codec`."""
        return TextSamples(self._texts(levels), nfe, None if trajectory is None else [self._texts(way) for way in trajectory])

    def prediction(self, samples: Samples | TextSamples, batch: dict[str, Any]) -> dict[str, Any]:
        """``text``, and ``trajectory``, the texts on the way for each sample, if it was recorded; see `Codec`."""
        assert isinstance(samples, TextSamples)
        return {"text": samples.texts} | ({} if samples.trajectory is None else {"trajectory": samples.trajectory})

    def _checked(self, ids: Tensor) -> Tensor:
        if tuple(ids.shape[1:]) != self.data_shape:
            raise ValueError(
                f"BFN was built for texts of {self.data_shape[0]} characters, but the data has {tuple(ids.shape[1:])}:"
                " set model.codec.length (and the network's) to the data's seq_len."
            )
        wrong = (ids < 0) | (ids >= len(self.alphabet))
        if wrong.any():
            raise ValueError(
                f"The text holds the id {int(ids[wrong][0])}, but the alphabet {self.alphabet!r} ends with id"
                f" {len(self.alphabet) - 1}: the data's alphabet must be the model's."
            )
        return ids.long()

    def _texts(self, ids: Tensor) -> list[str]:
        # Where a character is undecided between ids, as continuous flows can leave it, the nearest id is taken.
        rows = ids.round().clamp(0, len(self.alphabet) - 1).long() if ids.is_floating_point() else ids
        return ["".join(self.alphabet[i] for i in row) for row in rows.tolist()]
