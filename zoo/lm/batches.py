"""Batches of token ids: the labels that count, the tokens that are no padding, and what is refused.

Shape suffixes: B sequences, T tokens of a sequence, N = B T.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.lm.cross_entropy import IGNORED

__all__ = ["Batch", "check_vocabulary", "counted_labels", "drop_mask", "valid_tokens"]

Batch = Mapping[str, Tensor]
"""Entries as of `zoo.lm.language_module.LanguageModule`."""


def counted_labels(batch: Batch) -> Tensor:
    """Labels (B, T), -100 where none counts: those given, else the ids but for padding and each document's first token."""
    if "labels" in batch:
        return batch["labels"]
    labels = batch["input_ids"]
    valid = batch.get("valid_mask", batch.get("attention_mask"))
    if valid is not None:
        labels = labels.masked_fill(valid == 0, IGNORED)
        labels[:, 1:].masked_fill_(valid[:, :-1] == 0, IGNORED)  # no token precedes the first one after padding
    if "position_ids" in batch:
        labels = labels.masked_fill(batch["position_ids"] == 0, IGNORED)
    return labels


def valid_tokens(batch: Batch) -> Tensor | None:
    """Tokens that are no padding, bool (N,); None if all are."""
    mask = batch.get("valid_mask", batch.get("attention_mask"))
    return None if mask is None else mask.reshape(-1).bool()


def drop_mask(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without a mask that attention does not need.

    Padding on the right needs no mask in causal attention, only in the losses (``valid_mask``); without padding none is needed.
    """
    mask = batch.pop("attention_mask", None)
    if mask is None or bool(mask.all()):
        return batch
    right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all())
    return {**batch, "valid_mask" if right_padded else "attention_mask": mask}


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Refuse ids outside of the vocabulary.

    Raises:
        ValueError: If there is one.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"The batch holds id {int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())}, but the vocabulary has"
            f" {vocab_size} entries: take the tokenizer that belongs to the model, or a larger vocab_size."
        )
