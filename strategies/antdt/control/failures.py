"""Errors that a restart could cure (section 2.10)."""

from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["Curable", "classify", "describe"]

Curable = Literal["memory", "retryable", "unretryable"]

#: They say that the program is wrong, not the machine: the next attempt would end the same way.
UNRETRYABLE = (
    "AssertionError", "AttributeError", "ImportError", "IndentationError", "ModuleNotFoundError", "NameError",
    "NotImplementedError", "SyntaxError", "TypeError",
)  # fmt: skip


def describe(error: Any) -> str:
    """An error as a line, however it was reported: text, or ``{"kind" or "type", "message", ...}``."""
    if isinstance(error, Mapping):
        return ": ".join(str(error[key]) for key in ("kind", "type", "message") if error.get(key))
    return str(error)


def classify(error: Any) -> Curable:
    """Remedy for an error.

    Args:
        error: As it was reported.

    Returns:
        ``memory``: smaller micro-batches; ``retryable``: another attempt; ``unretryable``: nothing but a change of the program.

    Example:
        >>> classify("torch.OutOfMemoryError: CUDA out of memory.")
        'memory'
        >>> classify({"kind": "ConnectionResetError", "message": "by peer"}), classify("builtins.AssertionError: no")
        ('retryable', 'unretryable')
    """
    text = describe(error)
    if "outofmemory" in text.lower() or "out of memory" in text.lower():
        return "memory"
    name = text.partition(":")[0].strip().rpartition(".")[2]
    return "unretryable" if name in UNRETRYABLE else "retryable"
