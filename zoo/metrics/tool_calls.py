"""Calls of tools in generated text, and how often they are the right ones."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["CallMatches", "ToolCallMatch", "call_matches", "match_calls", "parse_calls"]

Match = Literal["exact", "name_only", "wrong", "not_parseable"]

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_LIST = re.compile(r"\[\s*[{\]]")


def parse_calls(text: str) -> list[dict[str, Any]]:
    """Read the calls of tools that a text makes.

    Calls are JSON, ``{"name": ..., "arguments": {...}}``, or lists of them: the whole text, or each part between ``<tool_call>``
    and ``</tool_call>``, the last of which may be missing, or, where there is no such part, each line that begins with a brace.
    Around a call there may be ``{"type": "function", "function": ...}``. Arguments may be a string of JSON.

    Args:
        text: Generated text, or references as JSON.

    Returns:
        Name and arguments of each; none for a text without calls.

    Raises:
        ValueError: Something is written as a call, and is none.

    Example:
        >>> parse_calls('Wait. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
        [{'name': 'add', 'arguments': {'a': 1}}]
    """
    whole = text.strip()
    parts = _BLOCK.findall(text)
    if not parts and (_LIST.match(whole) or _is_json(whole)):
        parts = [whole]
    elif not parts:
        parts = [line for line in map(str.strip, text.splitlines()) if line.startswith("{")]
    try:
        return [call for part in parts for call in _calls(json.loads(part))]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The text {text[:80]!r} holds a call that cannot be read ({error}).") from error


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object, of one line or more."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _calls(value: Any) -> list[dict[str, Any]]:
    """The calls in a value of JSON.

    Raises:
        ValueError: There is something else.
    """
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        name, arguments = (function.get("name"), function.get("arguments", {})) if isinstance(function, dict) else (None, None)
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError("no name and arguments")
        calls.append({"name": name, "arguments": arguments})
    return calls


def match_calls(text: str, reference: str) -> Match:
    """Compare the calls of a generated text with the true ones, in any order.

    Args:
        text: Generated text, read by `parse_calls`.
        reference: The true calls in a form that `parse_calls` reads, such as a JSON list.

    Returns:
        ``exact``: the same calls, with arguments that are equal as values of JSON, whatever the order of keys; ``name_only``: the
        same names, with other arguments; ``not_parseable``: the text has a call that cannot be read, or none where one is wanted;
        ``wrong``: all else.

    Raises:
        ValueError: The reference cannot be read.

    Example:
        >>> match_calls('{"arguments": {"b": 2.0, "a": 1}, "name": "add"}', '[{"name": "add", "arguments": {"a": 1, "b": 2}}]')
        'exact'
    """
    wanted = parse_calls(reference)
    try:
        found = parse_calls(text)
    except ValueError:
        return "not_parseable"
    if wanted and not found:
        return "not_parseable"
    if sorted(map(_canonical, found)) == sorted(map(_canonical, wanted)):
        return "exact"
    return "name_only" if sorted(call["name"] for call in found) == sorted(call["name"] for call in wanted) else "wrong"


def _canonical(value: Any) -> str:
    """A text that is the same for values that are equal in JSON, where 1 is 1.0 and not true."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


@dataclass(frozen=True)
class CallMatches:
    """Counts of texts by their calls.

    Attributes:
        total: Texts.
        exact: Texts with the right names and arguments.
        name_only: Texts with the right names and other arguments.
        not_parseable: Texts whose calls cannot be read, or without the calls that they should have.
    """

    total: int
    exact: int
    name_only: int
    not_parseable: int


def call_matches(texts: Sequence[str], references: Sequence[str]) -> CallMatches:
    """Count the texts with the right calls.

    Args:
        texts: Generated texts.
        references: The true calls of each, JSON lists.

    Raises:
        ValueError: A reference cannot be read, or their number is another.

    Example:
        >>> true = '[{"name": "add", "arguments": {"a": 1}}]'
        >>> call_matches(['{"name": "add", "arguments": {"a": 2}}', "{"], [true, true])
        CallMatches(total=2, exact=0, name_only=1, not_parseable=1)
    """
    if len(texts) != len(references):
        raise ValueError(f"call_matches needs a reference for each text, got {len(references)} for {len(texts)} texts.")
    found = [match_calls(text, reference) for text, reference in zip(texts, references, strict=True)]
    return CallMatches(len(found), found.count("exact"), found.count("name_only"), found.count("not_parseable"))


class ToolCallMatch(Metric):
    """`call_matches` as a torchmetrics metric over batches and ranks.

    Example:
        >>> metric = ToolCallMatch()
        >>> metric.update(['{"name": "now"}', "It is noon."], ['[{"name": "now", "arguments": {}}]'] * 2)
        >>> metric.compute()["exact"].item(), metric.counts.not_parseable
        (0.5, 1)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    exact: Tensor
    name_only: Tensor
    not_parseable: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in CallMatches.__dataclass_fields__:
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
        """Add generated texts with their true calls, JSON lists."""
        for name, count in asdict(call_matches(texts, references)).items():
            setattr(self, name, getattr(self, name) + count)

    @property
    def counts(self) -> CallMatches:
        """Counts of this rank so far."""
        return CallMatches(**{name: int(getattr(self, name)) for name in CallMatches.__dataclass_fields__})

    def compute(self) -> dict[str, Tensor]:
        """Shares of all texts: ``exact``, ``name_only`` and ``not_parseable``; NaN if there are none."""
        return {name: getattr(self, name) / self.total for name in ("exact", "name_only", "not_parseable")}
