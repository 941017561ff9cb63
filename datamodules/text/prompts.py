"""Prompts for a language model to continue: read from a file, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base.json_lines import MalformedRow, MalformedRows, OnError, encodable, read_json_lines
from datamodules.text.chat_template import ChatTemplate
from datamodules.text.tokenizer import Tokenizer

__all__ = ["DEFAULT_PROMPTS", "Prompt", "PromptBatch", "Prompts", "encode_prompt", "read_prompt_rows", "read_prompts"]

DEFAULT_PROMPTS = (
    "import os\nimport sys\n\ndef ",
    "def fibonacci(n):\n",
    'class Stack:\n    """',
    "The statement ",
)
"""Prompts of ``predict`` without a file of prompts."""


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: Its text.
        ids: Its ids; at least one, to continue from.
    """

    text: str
    ids: list[int]


class PromptBatch(TypedDict):
    """Batch of ``predict_step``.

    Attributes:
        index: int64 (B,), number of the prompt in the file, from 0; -1 where there is none, see :meth:`Prompts.blank`.
        input_ids: int64 (B, T), padded on the left.
        attention_mask: int64 (B, T), 1 for an id, 0 for padding.
        prompt: B strings.
    """

    index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    prompt: list[str]


class Prompts(Dataset[Any]):
    """Prompts in their order; made into whole batches.

    Args:
        prompts: The prompts.
        pad_id: Fills up on the left.
        width: Places T of a batch, at least as many as the longest prompt has ids. ``None``: those of the batch's longest.
    """

    def __init__(self, prompts: Sequence[Prompt], pad_id: int, width: int | None = None) -> None:
        self.prompts = prompts
        self.pad_id = pad_id
        self.width = width

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def batch(self, indices: list[int]) -> PromptBatch:
        """A whole batch."""
        chosen = [self.prompts[index] for index in indices]
        width = self.width or max(len(prompt.ids) for prompt in chosen)
        ids_BT = torch.full((len(chosen), width), self.pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(chosen):
            ids_BT[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask_BT[row, width - len(prompt.ids) :] = 1
        return {
            "index": torch.tensor(indices),
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "prompt": [prompt.text for prompt in chosen],
        }

    def blank(self) -> PromptBatch:
        """A batch that asks for nothing, for a process that has one batch fewer than others."""
        batch = self.batch([0])
        return {
            "index": torch.full_like(batch["index"], -1),
            "input_ids": batch["input_ids"][:, -1:],
            "attention_mask": batch["attention_mask"][:, -1:],
            "prompt": [""],
        }


def encode_prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    """A text to continue. Marks in it count, since the user wrote them; of an empty one, the eos before a document stays."""
    return Prompt(text, tokenizer.encode(text, special=True) or [tokenizer.eos_id])


def read_prompts(path: Path, tokenizer: Tokenizer, template: ChatTemplate, on_error: OnError) -> list[Prompt]:
    """The prompts of :func:`read_prompt_rows`, without their rows."""
    return [prompt for prompt, _ in read_prompt_rows(path, tokenizer, template, on_error)]


def read_prompt_rows(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate, on_error: OnError
) -> list[tuple[Prompt, dict[str, Any]]]:
    """Read a user's prompts.

    Args:
        path: ``.jsonl`` with ``prompt``, a text to continue, or ``messages`` or ``prompt`` (and ``tools``), the messages of a
            conversation to answer, in each row; any other file has one prompt a line.
        tokenizer: Makes the ids.
        template: Writes conversations.
        on_error: Treatment of malformed rows.

    Returns:
        Each prompt with all columns of its row; a line of text has none.

    Raises:
        FileNotFoundError: No such file.
        ValueError: There is no prompt, or a malformed row, or the file is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The file of prompts {path} does not exist: give a .txt with one a line, or a .jsonl.")

    def parse(row: dict[str, Any]) -> tuple[Prompt, dict[str, Any]]:
        messages = row["messages"] if "messages" in row else row.get("prompt")
        if "messages" in row or isinstance(messages, list):
            ids, text = template.encode_prompt(messages, row.get("tools"))
            return Prompt(text, ids), row
        if not isinstance(row.get("prompt"), str):
            raise MalformedRow("it has neither a prompt that is a string nor messages")
        return encode_prompt(encodable(row["prompt"]), tokenizer), row

    if path.suffix == ".jsonl":
        prompts = list(read_json_lines(path, parse, MalformedRows(on_error)))
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}): save it as plain text.") from error
        if lines[-1] == "":
            lines.pop()  # the end of the last line starts no other
        prompts = [(encode_prompt(line, tokenizer), {}) for line in lines]
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return prompts
