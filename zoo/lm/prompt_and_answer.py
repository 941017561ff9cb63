"""Rows of conversations and texts, divided for encoder-decoder models.

Shape suffixes: B rows, T tokens of a row, S tokens of the longest prompt, U tokens of the longest answer and 1.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.lm.batches import Batch, counted_labels, valid_tokens
from zoo.lm.cross_entropy import IGNORED

__all__ = ["prompt_and_answer"]


def prompt_and_answer(batch: Batch, start_id: int, pad_id: int) -> dict[str, Any]:
    """Divide rows at their first label.

    Args:
        batch: ``input_ids`` (B, T), and ``labels`` and a mask if there are any; a row whose second token is a label already is
            divided in its middle.
        start_id: Token that answers begin with.
        pad_id: Fills up on the right.

    Returns:
        The batch with ``input_ids`` and ``attention_mask`` (B, S) of the prompts, ``decoder_input_ids`` and ``labels`` (B, U) of
        the answers, whose first position is the start and no label.

    Example:
        >>> rows = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, -100, 7, 8]])}
        >>> divided = prompt_and_answer(rows, start_id=0, pad_id=0)
        >>> divided["input_ids"].tolist(), divided["decoder_input_ids"].tolist(), divided["labels"].tolist()
        ([[5, 6]], [[0, 7, 8]], [[-100, 7, 8]])
    """
    ids_BT, label_BT = batch["input_ids"], counted_labels(batch)
    valid_N = valid_tokens(batch)
    length_B = torch.full((len(ids_BT),), ids_BT.shape[1]) if valid_N is None else valid_N.view(ids_BT.shape).sum(1)
    prompts, answers, labels = [], [], []
    for ids_T, label_T, length in zip(ids_BT, label_BT, length_B.tolist(), strict=True):
        counted = (label_T != IGNORED).nonzero()[:, 0].tolist()
        at = counted[0] if counted else length
        at = max(1, length // 2) if at < 2 else at
        prompts.append(ids_T[:at])
        answers.append(torch.cat([ids_T.new_tensor([start_id]), ids_T[at:length]]))
        labels.append(torch.cat([ids_T.new_tensor([IGNORED]), label_T[at:length]]))
    kept = {name: value for name, value in batch.items() if name not in ("attention_mask", "valid_mask")}
    return {
        **kept,
        "input_ids": _filled(prompts, pad_id),
        "attention_mask": _filled([torch.ones_like(ids) for ids in prompts], 0),
        "decoder_input_ids": _filled(answers, pad_id),
        "labels": _filled(labels, IGNORED),
    }


def _filled(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
