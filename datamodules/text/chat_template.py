"""Conversations as ids, and which of them an assistant has to learn.

A conversation is a list of messages as Hugging Face writes them, ``{"role": ..., "content": ...}``:

* ``system``, first if at all; ``user`` (or ``human``); ``assistant``; ``tool`` (or ``observation``), what a tool answered;
* an assistant's message may have ``tool_calls``, a list of ``{"name": ..., "arguments": {...}}`` or of ``{"function": {...}}``
  around these, with or instead of ``content``;
* beside the messages, ``tools`` is a list of descriptions of the tools, JSON objects.

Ling writes ``<role>NAME</role>`` and the content for each message, with NAME = ``HUMAN`` for the user, else the role in capitals
(``SYSTEM``, ``ASSISTANT``, ``OBSERVATION``), nothing between messages and nothing before them. An assistant learns to end each of
its messages with the eos id, which is written behind the last message only: behind an earlier one, it is the label at the first
place of the next message. How tools are written is not published; here, it is JSON, one object a line: in the system message,
after an empty line and ``Tools:``; and for calls, in the assistant's message, after its content.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from datamodules.base.json_lines import MalformedRow, encodable
from datamodules.text.tokenizer import HuggingFaceTokenizer, Tokenizer
from datamodules.text.tool_text import as_json, plain_call, tools_as_text

__all__ = ["LING_SYSTEM", "ChatTemplate", "LingTemplate", "TemplateName", "TokenizerTemplate", "chat_template"]

TemplateName = Literal["ling", "tokenizer"]

LING_SYSTEM = "You are Ling, an assistant created by inclusionAI"
"""The system message of Ling's examples."""

_NOT_LEARNED = -100
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "tool": "tool", "observation": "tool"}


class ChatTemplate(ABC):
    """Writes conversations.

    Args:
        tokenizer: Makes the ids.
        system: System message of conversations that have none of their own; ``None``: they stay without.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None) -> None:
        self.tokenizer = tokenizer
        self.system = system

    def encode(self, messages: Any, tools: Any = None) -> tuple[list[int], list[int]]:
        """A conversation, and what of it is to be learned.

        Args:
            messages: The messages, see above.
            tools: Descriptions of tools, or ``None``.

        Returns:
            Its ids, and their labels: at each place the id that is to be learned there, given the ids before it, or -100. These
            are the assistant's ids, and an eos behind each of its messages.

        Raises:
            MalformedRow: The messages are not what is described above, or none is the assistant's.
        """
        checked = _checked(messages, self.system)
        if not any(message["role"] == "assistant" for message in checked):
            raise MalformedRow("no message is the assistant's")
        return self._encode(checked, _checked_tools(tools))

    def encode_prompt(self, messages: Any, tools: Any = None) -> tuple[list[int], str]:
        """A conversation up to where the assistant's next message begins.

        Args:
            messages: The messages, see above; the last one is not the assistant's.
            tools: Descriptions of tools, or ``None``.

        Returns:
            Its ids, and how it is written.

        Raises:
            MalformedRow: The messages are not what is described above, or end with the assistant's.
        """
        checked = _checked(messages, self.system)
        if checked[-1]["role"] == "assistant":
            raise MalformedRow("the last message is the assistant's, so that there is nothing to answer")
        return self._encode_prompt(checked, _checked_tools(tools))

    def encode_answer(self, messages: Any, tools: Any = None) -> tuple[str, np.ndarray]:
        """Text of the last message, which is the assistant's, and the characters of it behind each of its ids.

        Args:
            messages: The messages, see above.
            tools: Descriptions of tools, or ``None``.

        Returns:
            The text, and int64 (N, 2) for the ids of :meth:`encode` behind those of :meth:`encode_prompt`: the first character
            of each and the one after its last; none for an eos that is not written.

        Raises:
            MalformedRow: The messages are not what is described above, or the last one is not the assistant's, or the prompt is
                written differently with an answer behind it.
            ValueError: The tokenizer cannot tell (:meth:`~datamodules.text.tokenizer.Tokenizer.encode_with_spans`).
        """
        checked = _checked(messages, self.system)
        if checked[-1]["role"] != "assistant":
            raise MalformedRow("the last message is not the assistant's")
        return self._encode_answer(checked, _checked_tools(tools))

    @abstractmethod
    def _encode(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[int], list[int]]: ...

    @abstractmethod
    def _encode_prompt(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[int], str]: ...

    @abstractmethod
    def _encode_answer(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[str, np.ndarray]: ...


class LingTemplate(ChatTemplate):
    """The format of Ling's released chat models. Content is encoded as text, whatever special tokens it happens to contain."""

    def _encode(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        end = _NOT_LEARNED  # what is to be learned at the first place behind a message
        for role, content in _contents(messages, tools):
            head = self.tokenizer.encode(f"<role>{role}</role>", special=True)
            body = self.tokenizer.encode(content)
            ids += head + body
            labels += [end] + [_NOT_LEARNED] * (len(head) - 1)
            labels += body if role == "ASSISTANT" else [_NOT_LEARNED] * len(body)
            end = self.tokenizer.eos_id if role == "ASSISTANT" else _NOT_LEARNED
        if end != _NOT_LEARNED:
            ids.append(end)
            labels.append(end)
        return ids, labels

    def _encode_prompt(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[int], str]:
        text = "".join(f"<role>{role}</role>{content}" for role, content in _contents(messages, tools))
        ids, _ = self._encode(messages, tools)
        return ids + self.tokenizer.encode("<role>ASSISTANT</role>", special=True), text + "<role>ASSISTANT</role>"

    def _encode_answer(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[str, np.ndarray]:
        _, content = _contents(messages, tools)[-1]
        _, spans_N2 = self.tokenizer.encode_with_spans(content)
        return content, np.concatenate([spans_N2, [[len(content)] * 2]])  # the eos


class TokenizerTemplate(ChatTemplate):
    """The chat template that a Hugging Face tokenizer brings.

    What is to be learned is what it marks with ``{% generation %}``. Without these marks, it is what the template adds for a
    message of the assistant's to the conversation before it, up to the last character that is no space.

    Tools that the template does not write become text before (:mod:`datamodules.text.tool_text`).

    Raises:
        ValueError: The tokenizer brings no template.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None) -> None:
        super().__init__(tokenizer, system)
        if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.transformers.chat_template:
            raise ValueError("The tokenizer brings no chat template: use template: ling.")
        self.transformers = tokenizer.transformers
        source = str(self.transformers.chat_template)
        self.marks_learned = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self.writes_tools = "tool_calls" in source

    def _encode(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[int], list[int]]:
        messages, tools = self._known(messages, tools)
        if self.marks_learned:
            self.transformers.backend_tokenizer.encode_special_tokens = False
            encoding = self.transformers.apply_chat_template(
                messages, tools=tools or None, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, learned = list(encoding["input_ids"]), encoding["assistant_masks"]
        else:
            whole = self._text(messages, tools)
            ids, spans_N2 = self.tokenizer.encode_with_spans(whole, special=True)
            learned_C = np.zeros(len(whole) + 1, dtype=bool)
            for number, message in enumerate(messages):
                if message["role"] == "assistant":
                    begin, end = self._answer(messages[: number + 1], tools, whole)
                    learned_C[begin:end] = True
            learned = learned_C[spans_N2[:, 0]]
        return ids, [number if learn else _NOT_LEARNED for number, learn in zip(ids, learned, strict=True)]

    def _answer(self, messages: list[dict[str, Any]], tools: list[Any], whole: str) -> tuple[int, int]:
        """First character of the last of some messages in the conversation that they begin, and the one after its last."""
        if len(messages) == 1:
            raise MalformedRow("it begins with the assistant, and the template does not mark what is learned")
        prompt, answered = self._text(messages[:-1], tools, add_generation_prompt=True), self._text(messages, tools)
        if not answered.startswith(prompt) or not whole.startswith(answered):
            raise MalformedRow("the template writes it differently with more messages behind, and does not mark what is learned")
        return len(prompt), len(answered.rstrip())

    def _encode_prompt(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[int], str]:
        text = self._text(*self._known(messages, tools), add_generation_prompt=True)
        return self.tokenizer.encode(text, special=True), text

    def _encode_answer(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[str, np.ndarray]:
        whole = self._text(*self._known(messages, tools))
        prompt_ids, prompt = self._encode_prompt(messages[:-1], tools)
        if not whole.startswith(prompt):
            raise MalformedRow("the template writes the prompt differently with an answer behind it")
        _, spans_N2 = self.tokenizer.encode_with_spans(whole, special=True)
        return whole[len(prompt) :], spans_N2[len(prompt_ids) :] - len(prompt)

    def _known(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages and tools as the template can write them."""
        return (messages, tools) if self.writes_tools else (tools_as_text(messages, tools), [])

    def _text(self, messages: list[dict[str, Any]], tools: list[Any], add_generation_prompt: bool = False) -> str:
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(self.transformers.apply_chat_template(messages, tools=tools or None, **options))


def chat_template(name: TemplateName, tokenizer: Tokenizer, system: str | None) -> ChatTemplate:
    """The template of a name: Ling's, or the one that the tokenizer brings."""
    return {"ling": LingTemplate, "tokenizer": TokenizerTemplate}[name](tokenizer, system)


def _contents(messages: Sequence[Mapping[str, Any]], tools: list[Any]) -> list[tuple[str, str]]:
    """The role and content of each message as Ling writes them, tools and calls as JSON."""
    contents = []
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    for message in messages:
        role = {"user": "HUMAN", "tool": "OBSERVATION"}.get(message["role"], message["role"].upper())
        lines = [message["content"]] if message["content"] else []
        if role == "SYSTEM" and tools:
            lines += ["", "Tools:"] if lines else ["Tools:"]
            lines += [as_json(tool) for tool in tools]
        lines += [as_json(plain_call(call)) for call in message.get("tool_calls", ())]
        contents.append((role, "\n".join(lines)))
    return contents


def _checked(messages: Any, system: str | None) -> list[dict[str, Any]]:
    """The messages with their roles by one name each, and the default system message."""
    if not isinstance(messages, list) or not messages:
        raise MalformedRow("it has no list of messages")
    checked: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        named = message.get("role") if isinstance(message, Mapping) else message
        if not isinstance(message, Mapping) or not isinstance(named, str) or named not in _ROLES:
            raise MalformedRow(f"message {number} has the role {named!r}, which is none of {', '.join(_ROLES)}")
        role, calls = _ROLES[named], message.get("tool_calls") or []
        content = message.get("content")
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise MalformedRow(f"the content of message {number} is no string")
        if role == "system" and number:
            raise MalformedRow(f"message {number} is the system's, which comes first if at all")
        if calls and role != "assistant":
            raise MalformedRow(f"message {number} calls tools, and is not the assistant's")
        if not content and not calls:
            raise MalformedRow(f"message {number} is empty")
        checked.append({"role": role, "content": encodable(content)})
        if calls:
            try:
                encodable("".join(as_json(plain_call(call)) for call in calls))
            except MalformedRow:
                raise
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise MalformedRow(f"the tool calls of message {number} are no list of names and arguments") from error
            checked[-1]["tool_calls"] = list(calls)
    if system is not None and checked[0]["role"] != "system":
        checked.insert(0, {"role": "system", "content": system})
    return checked


def _checked_tools(tools: Any) -> list[Any]:
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise MalformedRow("its tools are no list of JSON objects")
    encodable(as_json(tools))
    return tools
