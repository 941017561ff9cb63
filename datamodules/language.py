"""Text to learn a language from: a weighted mixture of sources, in windows of ids."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.chat_template import LING_SYSTEM, ChatTemplate, TemplateName, chat_template
from datamodules.corpus import Corpus, read_corpora
from datamodules.datamodule import ZooDataModule
from datamodules.deduplication import Dedup
from datamodules.json_lines import OnError
from datamodules.loader import ResumableLoader
from datamodules.prompts import DEFAULT_PROMPTS, Prompts, encode_prompt, read_prompts
from datamodules.token_windows import TokenWindows
from datamodules.tokenizer import Tokenizer, load_tokenizer

__all__ = ["LanguageData", "Text"]


class LanguageData(ZooDataModule, ABC):
    """The base of language data: a tokenizer, and prompts for ``predict``.

    Args:
        tokenizer: ``byte``, or a Hugging Face tokenizer: a folder with ``tokenizer.json``, that file, or a name on the hub.
            Nothing but data are read, never code.
        template: How conversations are written: as Ling does, or by the template that the tokenizer brings, which must mark
            what the assistant writes.
        system: System message of conversations without one; ``null``: none.
        on_error: Whether malformed rows are an error, or are left out with a warning that counts them.
        predict_prompts: What ``predict`` continues: a ``.txt`` with one prompt a line, or a ``.jsonl`` with ``prompt`` or
            ``messages`` in each row. ``null``: a few prompts of our own.
        **kwargs: Arguments of `ZooDataModule`.
    """

    def __init__(
        self,
        tokenizer: str = "byte",
        template: TemplateName = "ling",
        system: str | None = LING_SYSTEM,
        on_error: OnError = "raise",
        predict_prompts: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tokenizer_name = tokenizer
        self.template_name = template
        self.system = system
        self.on_error = on_error
        self.predict_prompts = None if predict_prompts is None else Path(predict_prompts)
        self._prompts: Dataset[Any] | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def template(self) -> ChatTemplate:
        """Writes conversations."""
        return chat_template(self.template_name, self.tokenizer, self.system)

    def setup(self, stage: str) -> None:
        """Read the prompts, if that is the stage (Lightning hook).

        Raises:
            FileNotFoundError: The file of prompts is missing.
            ValueError: It holds none, or malformed rows.
        """
        if stage == "predict":
            self._prompts = self._read_prompts()

    def _read_prompts(self) -> Prompts:
        if self.predict_prompts is None:
            prompts = [encode_prompt(text, self.tokenizer) for text in DEFAULT_PROMPTS]
        else:
            prompts = read_prompts(self.predict_prompts, self.tokenizer, self.template, self.on_error)
        return Prompts(prompts, self.tokenizer.pad_id)

    def predict_dataloader(self) -> ResumableLoader[Any]:
        """Batches of prompts (Lightning hook)."""
        return self.eval_loader(self._prompts or self._read_prompts())

    def sample_text(self, index: int) -> str:
        """A sample of the training set as text, without padding and marks, for `SpikeGuard`'s record; of a pair, both answers.

        Args:
            index: Its number, as batches have it under ``index``.

        Raises:
            RuntimeError: Nothing is being trained.
        """
        loader = None if self.trainer is None else self.trainer.train_dataloader
        if loader is None:
            raise RuntimeError("There is no training set before training has begun.")
        row = loader.dataset[index]
        return "\n\n".join(self.tokenizer.decode(ids.flatten()) for name, ids in row.items() if name.endswith("input_ids"))


class Text(LanguageData):
    """Text as windows of ids, from one source or a weighted mixture.

    The default is real text that every Python brings: its standard library, 11 to 13 million bytes of code, as bytes. The
    versions differ; sizes and SHA-256 are logged.

    Tokenised sources lie in the cache and are memory-mapped. A window begins with the id that the one before ended with, so
    that every id, and every byte of the text, is predicted exactly once in a pass; the last one of a source is padded.

    Args:
        sources: Weight of each source; weights need not sum to 1. A source is ``python-stdlib``, ``python-topics`` (English
            reference prose, 0.5 MB), ``shakespeare``, ``kjv``, or a path: a text file, a folder, a pattern such as
            ``texts/**/*.txt``, a ``.jsonl`` with a ``text`` in each row, or a ``.bin`` of ids (:mod:`datamodules.token_files`).
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
        dedup: Which documents are left out: those that were seen before in this source or an earlier one (``exact``: equal but
            for white space; ``minhash``: also those that overlap by an estimated 80 %).
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

    def prepare_data(self) -> None:
        """Fetch and tokenise the sources, once (Lightning hook)."""
        if self.trainer is None or not self.trainer.predicting:
            _ = self.corpora

    def setup(self, stage: str) -> None:
        """Open the sources, or read the prompts (Lightning hook)."""
        super().setup(stage)
        if stage != "predict":
            _ = self.corpora

    def train_dataloader(self) -> ResumableLoader[Any]:
        """Training batches (Lightning hook)."""
        mixture = (list(self.sources), list(self.sources.values()), self.windows_per_epoch)
        files = [corpus.train for corpus in self.corpora]
        windows = TokenWindows(files, self.tokenizer, self.seq_len, self.packing, self.document_mask, mixture)
        return self.train_loader(windows, mark_retries=True)

    def val_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        """Validation batches (Lightning hook)."""
        if not self.val_fraction:
            return []
        if self.validate_per_source:
            return [self.eval_loader(self._held_out([corpus])) for corpus in self.corpora]
        return self.eval_loader(self._held_out(self.corpora))

    def test_dataloader(self) -> ResumableLoader[Any] | list[ResumableLoader[Any]]:
        """The validation batches; no third part is held out (Lightning hook).

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
