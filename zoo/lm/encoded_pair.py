"""A context and what follows it as ids, the pairs that language models score."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Encodes", "Ids", "encode_pair"]

Ids = Sequence[int]


class Encodes(Protocol):
    """A tokenizer, as far as it is needed here."""

    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with no special tokens added."""


def encode_pair(tokenizer: Encodes, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it.

    Space at the end of the context counts as the continuation's, so that all continuations of a context are scored after the
    same ids. The two are encoded as one text and cut where the context ends; where a token would reach over the cut, they are
    encoded apart. An empty context, or one of space alone, is the end of a document before.

    Args:
        tokenizer: makes ids of text.
        context: Text before; may be empty.
        continuation: Text to score.

    Raises:
        ValueError: the continuation has no tokens.
    """
    if not continuation:
        raise ValueError(f"The continuation of {context[-40:]!r} is empty: there is nothing to score.")
    given = context.rstrip()
    continuation = context[len(given) :] + continuation
    if not given:
        return [tokenizer.eos_id], tokenizer.encode(continuation)
    ids, whole = tokenizer.encode(given), tokenizer.encode(given + continuation)
    if whole[: len(ids)] == ids and len(whole) > len(ids):
        return ids, whole[len(ids) :]
    return ids, tokenizer.encode(continuation)
