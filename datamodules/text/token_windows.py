"""Windows of ids: how documents become the rows of a batch.

The documents of a source, each with its eos, make one stream, before which stands an eos as well. A window holds ``seq_len``
ids of it, and begins with the id that the one before ended with: as a model is not asked for the first id of a row, each id
of the stream is asked for exactly once in a pass, and the bytes of all windows are the bytes of the text. The last window of
a source is filled up with padding.

Packed, windows run over the ends of documents. Unpacked, a window holds one document or a part of it, after the eos that
stands before the document.

Shape suffixes: B rows, T places in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base.mixture import Mixture
from datamodules.text.token_files import TokenFile
from datamodules.text.tokenizer import Tokenizer

__all__ = ["LanguageBatch", "TokenWindows", "blank_batch", "segment_positions"]


class LanguageBatch(TypedDict, total=False):
    """A batch of language data; without the axis B, one row.

    Attributes:
        input_ids: int64 (B, T).
        labels: int64 (B, T), the id that the ids before this place are asked for, or -100 for nothing: the id at the same place
            (the model shifts), but for an eos that is learned and not written (:mod:`datamodules.text.chat_template`).
        attention_mask: int64 (B, T), 1 for an id, 0 for padding.
        position_ids: int64 (B, T), from 0 in each document; only where documents do not see one another.
        index: int64 (B,), number of the row in its data set; -1 where nothing counts, see :func:`blank_batch`.
        num_bytes: int64 (B,), bytes of text that the labels stand for that a model is asked for: not the first of a row.
        source: int64 (B,), number of the source, for `Text`.
        retried: bool (B,), whether the row had been put back; in training.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    index: Tensor
    num_bytes: Tensor
    source: Tensor
    retried: Tensor


class TokenWindows(Dataset[LanguageBatch]):
    """The windows of some sources.

    Args:
        files: The documents of each source.
        tokenizer: Whose ids they are.
        seq_len: Places T of a row.
        packing: Whether windows run over the ends of documents. If not, a row holds (a part of) one document, and a batch is
            as wide as its longest row.
        document_mask: Whether documents of a row are hidden from one another: ``position_ids`` start at 0 in each, and no label
            is the beginning of the next document.
        mixture: Order of training, as names of the sources, weights, and windows of an epoch (:class:`Mixture`). ``None``:
            evaluation, every window once, in an order that is shuffled once and for all, so that any number of first batches is
            a fair sample.
        first_source: Number of the first source, where there are others that these windows do not have.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        tokenizer: Tokenizer,
        seq_len: int,
        packing: bool = True,
        document_mask: bool = False,
        mixture: tuple[Sequence[str], Sequence[float], int | None] | None = None,
        first_source: int = 0,
    ) -> None:
        self.files = files
        self.seq_len = seq_len
        self.packing = packing
        self.document_mask = document_mask
        self.first_source = first_source
        self.eos_id, self.pad_id = tokenizer.eos_id, tokenizer.pad_id
        self.token_bytes = tokenizer.token_bytes.numpy()
        spans = [_spans(file, seq_len - 1, packing) for file in files]
        self.starts = [start for start, _ in spans]
        self.stops = [stop for _, stop in spans]
        sizes = [len(start) for start in self.starts]
        self.firsts = np.cumsum([0, *sizes])
        if mixture is None:
            self.order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).numpy()
        else:
            names, weights, length = mixture
            self.mixture = Mixture(names, sizes, weights, length)
            self.epoch_length = self.mixture.epoch_length
            self.epoch_order = self.mixture.epoch_order

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> LanguageBatch:
        return cast(LanguageBatch, {name: value[0] for name, value in cast(dict[str, Tensor], self.batch([index])).items()})

    def batch(self, indices: list[int]) -> LanguageBatch:
        """A whole batch of windows."""
        window_B = np.asarray(indices, dtype=np.int64)
        if hasattr(self, "order"):
            window_B = self.order[window_B]
        source_B = np.searchsorted(self.firsts, window_B, side="right") - 1
        place_B = window_B - self.firsts[source_B]
        start_B, stop_B = np.empty_like(window_B), np.empty_like(window_B)
        for source in np.unique(source_B):
            rows = source_B == source
            start_B[rows], stop_B[rows] = self.starts[source][place_B[rows]], self.stops[source][place_B[rows]]
        width = self.seq_len if self.packing else int((stop_B - start_B).max()) + 1
        at_BT = start_B[:, None] - 1 + np.arange(width)  # -1: the eos before the stream
        real_BT = at_BT < stop_B[:, None]
        ids_BT = np.full(at_BT.shape, self.pad_id, dtype=np.int64)
        document_BT = np.zeros_like(ids_BT)
        for source in np.unique(source_B):
            rows, file = source_B == source, self.files[source]
            at = np.minimum(at_BT[rows], len(file) - 1)
            ids_BT[rows] = np.where(real_BT[rows], np.where(at < 0, self.eos_id, file.tokens[at]), self.pad_id)
            if self.document_mask:
                last = stop_B[rows, None] - 1  # padding continues the last document, so that it sees something
                document_BT[rows] = np.where(at < 0, -1, np.searchsorted(file.ends, np.minimum(at, last), side="right"))
        counted_BT = real_BT
        batch: LanguageBatch = {}
        if self.document_mask:
            begins_BT = np.diff(document_BT, axis=1, prepend=document_BT[:, :1]) != 0
            batch["position_ids"] = torch.from_numpy(segment_positions(begins_BT))
            counted_BT = real_BT & ~begins_BT
        asked_BT = counted_BT[:, 1:]
        return {
            "input_ids": torch.from_numpy(ids_BT),
            "labels": torch.from_numpy(np.where(counted_BT, ids_BT, -100)),
            "attention_mask": torch.from_numpy(real_BT.astype(np.int64)),
            "index": torch.from_numpy(window_B),
            "num_bytes": torch.from_numpy((self.token_bytes[ids_BT[:, 1:]] * asked_BT).sum(axis=1)),
            "source": torch.from_numpy(source_B + self.first_source),
            **batch,
        }

    def blank(self) -> LanguageBatch:
        """A batch in which nothing counts."""
        return blank_batch(self.batch([0]))


def blank_batch(batch: LanguageBatch) -> LanguageBatch:
    """A batch like this one in which nothing counts, for a process that has one batch fewer than others."""
    labels, index, num_bytes = batch["labels"], batch["index"], batch["num_bytes"]
    return {
        **batch,
        "labels": torch.full_like(labels, -100),
        "index": torch.full_like(index, -1),
        "num_bytes": torch.zeros_like(num_bytes),
    }


def segment_positions(begins_BT: np.ndarray) -> np.ndarray:
    """Positions within segments of a row.

    Args:
        begins_BT: bool (B, T), where a segment begins; the first place of a row does anyway.

    Returns:
        int64 (B, T), 0 where a segment begins.

    Example:
        >>> segment_positions(np.array([[False, False, True, False]])).tolist()
        [[0, 1, 0, 1]]
    """
    place_T = np.arange(begins_BT.shape[1])
    return place_T - np.maximum.accumulate(np.where(begins_BT, place_T, 0), axis=1)


def _spans(file: TokenFile, length: int, packing: bool) -> tuple[np.ndarray, np.ndarray]:
    """Beginnings and ends of the ids of each window, cut out of the stream or out of each document."""
    ends = np.asarray([len(file)]) if packing else file.ends
    ends = ends[ends > 0]
    begins = np.concatenate([np.zeros(min(len(ends), 1), dtype=np.int64), ends[:-1]])
    counts = -(-(ends - begins) // length)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + number * length
    return starts, np.minimum(starts + length, np.repeat(ends, counts))
