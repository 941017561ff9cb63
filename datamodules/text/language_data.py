"""Base of language data: a tokenizer, a way to write conversations, prompts for ``predict``."""

from __future__ import annotations

from abc import ABC
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.base.datamodule import ZooDataModule
from datamodules.base.json_lines import OnError
from datamodules.base.loader import ResumableLoader
from datamodules.text.chat_template import LING_SYSTEM, ChatTemplate, TemplateName, chat_template
from datamodules.text.prompts import DEFAULT_PROMPTS, Prompts, encode_prompt, read_prompts
from datamodules.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["LanguageData"]


class LanguageData(ZooDataModule, ABC):
    """The base of language data: a tokenizer, and prompts for ``predict``.

    Args:
        tokenizer: ``byte``, or a Hugging Face tokenizer: a folder with ``tokenizer.json``, that file, or a name on the hub.
            Nothing but data are read, never code.
        template: Form of conversations: Ling's, or the template of the tokenizer, which must mark the assistant's text.
        system: System message of conversations without one; ``null``: none; ``auto``: that of Ling's examples with Ling's
            template, none with a tokenizer's, which may write its own.
        on_error: Whether malformed rows are an error, or are left out with a warning that counts them.
        predict_prompts: Prompts of ``predict``: a ``.txt`` with one prompt a line, or a ``.jsonl`` with ``prompt`` or
            ``messages`` in each row. ``null``: a few prompts of our own.
        **kwargs: Arguments of `ZooDataModule`.
    """

    def __init__(
        self,
        tokenizer: str = "byte",
        template: TemplateName = "ling",
        system: str | None = "auto",
        on_error: OnError = "raise",
        predict_prompts: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tokenizer_name = tokenizer
        self.template_name = template
        self.system = (LING_SYSTEM if template == "ling" else None) if system == "auto" else system
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

    @override
    def setup(self, stage: str) -> None:
        """Read the prompts, if that is the stage.

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

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        """Batches of prompts."""
        return self.eval_loader(self._prompts or self._read_prompts())

    def sample_text(self, index: int) -> str:
        """A training sample as text, without padding and special tokens, for `SpikeGuard`'s record; of a pair, both answers.

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
