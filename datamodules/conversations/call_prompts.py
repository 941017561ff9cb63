"""Prompts whose answers are calls of tools, with the true calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typing_extensions import override

from datamodules.text.chat_template import ChatTemplate
from datamodules.text.prompts import Prompt, PromptBatch, Prompts
from datamodules.text.tool_text import as_json, plain_call

__all__ = ["CallPromptBatch", "CallPrompts", "call_prompts"]


class CallPromptBatch(PromptBatch):
    """Batch of prompts with the calls that answer them.

    Attributes:
        calls: B strings, each a JSON list of ``{"name": ..., "arguments": {...}}``; an empty list where there is no prompt.
    """

    calls: list[str]


class CallPrompts(Prompts):
    """Prompts in their order, with the calls that answer them.

    Args:
        prompts: The prompts.
        calls: JSON list of the calls for each.
        pad_id: Fills up on the left.
    """

    def __init__(self, prompts: list[Prompt], calls: list[str], pad_id: int) -> None:
        super().__init__(prompts, pad_id)
        self.calls = calls

    @override
    def batch(self, indices: list[int]) -> CallPromptBatch:
        return {**super().batch(indices), "calls": [self.calls[index] for index in indices]}

    @override
    def blank(self) -> CallPromptBatch:
        return {**super().blank(), "calls": ["[]"]}


def call_prompts(
    conversations: Iterable[tuple[list[dict[str, Any]], list[Any]]], template: ChatTemplate, pad_id: int, limit: int
) -> CallPrompts:
    """Prompts of the first messages with calls in some conversations, each after the true messages before it.

    Args:
        conversations: Messages and tools of each.
        template: Writes the prompts.
        pad_id: Fills batches up.
        limit: Most prompts.
    """
    prompts: list[Prompt] = []
    references: list[str] = []
    for messages, tools in conversations:
        for number, message in enumerate(messages):
            if not message.get("tool_calls") or number == 0 or messages[number - 1]["role"] == "assistant":
                continue
            if len(prompts) == limit:
                return CallPrompts(prompts, references, pad_id)
            ids, text = template.encode_prompt(messages[:number], tools)
            prompts.append(Prompt(text, ids))
            references.append(as_json([plain_call(call) for call in message["tool_calls"]]))
    return CallPrompts(prompts, references, pad_id)
