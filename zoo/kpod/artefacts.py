"""Weights of rationales in a file: safetensors with ``offsets`` int64 (n + 1,) and ``values`` float32.

Row i holds the weights of the rationale's tokens of training example i, in their order; an example without weights has an empty
row. Fingerprints of tokenizer and data stand in the metadata.

Shape suffixes: B examples, S places of a row.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["TokenWeights"]


@dataclass(frozen=True)
class TokenWeights:
    """Weights of the rationales of a training set.

    Args:
        offsets: Begin of each example's row in ``values``, and the end of the last, int64 (n + 1,).
        values: Weights, float32.
        metadata: Fingerprints ``tokenizer`` and ``data``, and the options of the weights, as text.
    """

    offsets: Tensor
    values: Tensor
    metadata: Mapping[str, str]

    @classmethod
    def of_rows(cls, rows: Mapping[int, Sequence[float]], metadata: Mapping[str, str]) -> "TokenWeights":
        """Weights by the number of the example.

        Raises:
            ValueError: If there are none.
        """
        if not rows:
            raise ValueError("No rationale has weights: predict the training examples, with fold among the folds.")
        sizes = torch.tensor([0] + [len(rows.get(index, ())) for index in range(max(rows) + 1)])
        values = torch.tensor([weight for index in sorted(rows) for weight in rows[index]], dtype=torch.float32)
        return cls(sizes.cumsum(0), values, dict(metadata))

    @classmethod
    def read(cls, paths: Path | Sequence[Path], tokenizer: str, data: str) -> "TokenWeights":
        """Read a file, or those of the folds of a cross-fit.

        Args:
            paths: The files.
            tokenizer: Fingerprint of the tokenizer that is used.
            data: Fingerprint of the training examples.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, has weights for another tokenizer or other data, or two files have the same example.
        """
        files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        parts = [read_weights(path) for path in files]
        for path, part in zip(files, parts, strict=True):
            for name, other, wanted in (("tokenizer", "another tokenizer", tokenizer), ("data", "other data", data)):
                if part.metadata.get(name) != wanted:
                    raise ValueError(
                        f"{path.name} has weights of {other} (fingerprint {part.metadata.get(name, 'none')[:12]}, here"
                        f" {wanted[:12]}): write them again with zoo predict of the TokenWeighter and the same options of data."
                    )
        if len(parts) == 1:
            return parts[0]
        rows: dict[int, list[float]] = {}
        for path, part in zip(files, parts, strict=True):
            bounds = part.offsets.tolist()
            new = {i: part.values[a:b].tolist() for i, (a, b) in enumerate(itertools.pairwise(bounds)) if b > a}
            if twice := rows.keys() & new.keys():
                raise ValueError(f"{path.name} has weights of example {min(twice)}, as a file before it: give each fold once.")
            rows |= new
        return cls.of_rows(rows, parts[0].metadata)

    def save(self, path: Path) -> None:
        """Write the file, at once or not at all."""
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({"offsets": self.offsets, "values": self.values}, unfinished, dict(self.metadata))
        unfinished.replace(path)

    def lookup(self, index_B: Tensor, step_BS: Tensor) -> Tensor:
        """Weights of a batch, (B, S) float32, 0 outside of the rationales.

        Args:
            index_B: Numbers of the examples.
            step_BS: At least 0 on tokens of the rationale, else -1.

        Raises:
            ValueError: If an example has no weights, or weights for another number of tokens.
        """
        of_rationale_BS, index_B = (step_BS >= 0).cpu(), index_B.cpu()
        known_B = (index_B >= 0) & (index_B < len(self.offsets) - 1)
        row_B = index_B.where(known_B, 0)
        size_B = (self.offsets[row_B + 1] - self.offsets[row_B]).where(known_B, 0)
        if bool((wrong_B := size_B != of_rationale_BS.sum(1)).any()):
            first = int(wrong_B.nonzero()[0, 0])
            raise ValueError(
                f"Example {int(index_B[first])} has {int(of_rationale_BS[first].sum())} tokens in its rationale and"
                f" {int(size_B[first])} weights: write weights for these data, of all folds (zoo predict of the TokenWeighter)."
            )
        place_BS = self.offsets[row_B][:, None] + of_rationale_BS.long().cumsum(1) - 1
        found_BS = torch.zeros(step_BS.shape)
        found_BS[of_rationale_BS] = self.values[place_BS[of_rationale_BS]]
        return found_BS.to(step_BS.device)


def read_weights(path: Path) -> TokenWeights:
    if not path.is_file():
        raise FileNotFoundError(f"There are no token weights at {path}: write them with zoo predict of a TokenWeighter.")
    try:
        with safe_open(path, framework="pt") as file:
            weights = TokenWeights(file.get_tensor("offsets"), file.get_tensor("values"), file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no file of token weights: {str(error)[:100]}. Write it again.") from error
    offsets = weights.offsets
    if offsets.dim() != 1 or int(offsets[-1]) != len(weights.values) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{path.name} is damaged: its offsets do not fit its {len(weights.values)} weights. Write it again.")
    return weights
