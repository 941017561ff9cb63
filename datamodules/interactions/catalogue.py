"""The items of all domains: titles, their tokens, and where each domain begins.

Shape suffixes: I items, D domains, V tokens of all titles, M items asked for, L tokens, R rows, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.text.tokenizer import Tokenizer

__all__ = ["Catalogue", "encode_titles", "padded", "write_tokens"]

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Catalogue:
    """The items, numbered from 0; those of a domain are one range of numbers.

    Attributes:
        titles: Titles, empty where there is none.
        keys: Original ids.
        domains: Names of the domains.
        domain_offsets: Where each domain begins, and the last ends, int64 (D + 1,).
        counts: How often each item is a training target, int64 (I,).
        is_cold: Whether training never sees the item because it is cold by time, bool (I,).
        token_values: Tokens of ``title; `` of all items, one after another, int32 (V,); none without a tokenizer.
        token_offsets: Where those of each item begin, and the last end, int64 (I + 1,).
        pad_id: Fills up rows of tokens.
    """

    titles: list[str]
    keys: list[str]
    domains: list[str]
    domain_offsets: Tensor
    counts: Tensor
    is_cold: Tensor
    token_values: Tensor
    token_offsets: Tensor
    pad_id: int

    def __len__(self) -> int:
        return len(self.keys)

    def tokens(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of some items' titles, without special tokens, padded on the right.

        Args:
            items: Numbers of items, int64 (M,).

        Returns:
            Ids, int64 (M, L), and their mask, int64 (M, L).
        """
        number_M, offset_I = items.cpu().numpy(), self.token_offsets.numpy()
        ids_ML, mask_ML = padded(self.token_values.numpy(), offset_I[number_M], offset_I[number_M + 1], self.pad_id)
        return torch.from_numpy(ids_ML), torch.from_numpy(mask_ML.astype(np.int64))


def padded(
    values: np.ndarray, begin_R: np.ndarray, end_R: np.ndarray, fill: int, width: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of an array as rows, padded on the right.

    Args:
        values: Integers (V,).
        begin_R: Where each stretch begins, int64 (R,).
        end_R: Where it ends, int64 (R,).
        fill: Padding.
        width: Least width of the rows; at least one place is there in any case.

    Returns:
        int64 (R, W), and bool (R, W), false for padding.

    Example:
        >>> padded(np.array([5, 6, 7]), np.array([0, 2]), np.array([2, 2]), -1)[0].tolist()
        [[5, 6], [-1, -1]]
    """
    place_W = np.arange(max(1, width, int((end_R - begin_R).max(initial=0))))
    mask_RW = place_W < (end_R - begin_R)[:, None]
    rows_RW = np.full(mask_RW.shape, fill, dtype=np.int64)
    rows_RW[mask_RW] = values[(begin_R[:, None] + place_W)[mask_RW]]
    return rows_RW, mask_RW


def encode_titles(titles: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode titles as the method does: ``title; ``, where ``None`` stands for a missing one.

    Args:
        titles: Titles of M items.
        tokenizer: Any tokenizer.
        max_tokens: Tokens of a title; more are cut off.

    Returns:
        Ids one after another, int32 (V,), and where those of each title begin and the last end, int64 (M + 1,).
    """
    parts: list[np.ndarray] = []
    for start in range(0, len(titles), _CHUNK):
        ids = tokenizer.encode_many([f"{title or 'None'}; " for title in titles[start : start + _CHUNK]])
        parts += [each[:max_tokens].astype(np.int32) for each in ids]
    offsets = np.append(0, np.cumsum([len(part) for part in parts])).astype(np.int64)
    return np.concatenate([np.zeros(0, dtype=np.int32), *parts]), offsets


def write_tokens(folder: Path, titles: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> None:
    """Write the result of :func:`encode_titles` as ``values.npy`` and ``offsets.npy``."""
    values, offsets = encode_titles(titles, tokenizer, max_tokens)
    np.save(folder / "values.npy", values)
    np.save(folder / "offsets.npy", offsets)
