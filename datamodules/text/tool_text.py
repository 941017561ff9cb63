"""Tools and their calls as text, for chat templates that know none.

Where a template writes neither ``tools`` nor ``tool_calls`` (that of SmolLM2 does not), messages are changed before it sees them:

* the system message, an empty one if there was none, ends with the schemas of the tools, a JSON object a line between ``<tools>``
  and ``</tools>``, and how a call is written;
* each call is ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, a line of its own behind the assistant's content;
* results of tools in succession are one message of the user's, each between ``<tool_response>`` and ``</tool_response>``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["as_json", "plain_call", "tools_as_text"]

_HOW = 'Write a call of a tool as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.'


def tools_as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages without tools, their calls and the role ``tool``.

    Example:
        >>> called = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
        >>> for message in tools_as_text([called, {"role": "tool", "content": "2"}], []):
        ...     print(message["role"], message["content"])
        assistant <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>
        user <tool_response>2</tool_response>
    """
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    written: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role, lines = message["role"], [message["content"]] if message["content"] else []
        if role == "system" and tools:
            lines += ["<tools>", *map(as_json, tools), "</tools>", _HOW]
        lines += [f"<tool_call>{as_json(plain_call(call))}</tool_call>" for call in message.get("tool_calls", ())]
        if role == "tool":
            role, lines = "user", [f"<tool_response>{message['content']}</tool_response>"]
            if number and messages[number - 1]["role"] == "tool":
                lines.insert(0, written.pop()["content"])
        written.append({"role": role, "content": "\n".join(lines)})
    return written


def plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Name and arguments of a call, whose arguments may be a string of JSON, as OpenAI writes them."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    return {"name": function["name"], "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def as_json(value: Any) -> str:
    """A value as JSON in one line, with letters as they are."""
    return json.dumps(value, ensure_ascii=False)
