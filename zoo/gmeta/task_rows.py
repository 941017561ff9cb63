"""Rows of tables that each task reads, numbered inside of the task.

Shape suffixes: T tasks, S samples of support, Q of query, F fields of categories, L = (S + Q) F, R most distinct rows of a task.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TaskRows", "task_rows"]


class TaskRows(NamedTuple):
    """The rows of each task, each once, and where its samples find them.

    Support and query share the numbering: a row that support adapts is the row that query reads.

    Attributes:
        numbers_TR: Rows of the tables; a task with fewer repeats its first.
        support_TSF: Places in the task's rows.
        query_TQF: Likewise.
    """

    numbers_TR: Tensor
    support_TSF: Tensor
    query_TQF: Tensor


def task_rows(support_TSF: Tensor, query_TQF: Tensor, support_TS: Tensor, query_TQ: Tensor) -> TaskRows:
    """Number the rows of each task.

    Args:
        support_TSF: Rows of the tables that the samples read, int64.
        query_TQF: Likewise.
        support_TS: Which samples there are, bool; the others read no rows of their own.
        query_TQ: Likewise.

    Example:
        >>> both = torch.ones(1, 2, dtype=torch.bool)
        >>> rows = task_rows(torch.tensor([[[7], [4]]]), torch.tensor([[[4], [9]]]), both, both)
        >>> rows.numbers_TR.tolist(), rows.query_TQF.flatten().tolist()
        ([[4, 7, 9]], [0, 2])
    """
    both_TL = torch.cat([support_TSF, query_TQF], dim=1).flatten(1)
    there_TL = torch.cat([support_TS, query_TQ], dim=1).repeat_interleave(support_TSF.shape[2], dim=1)
    first_T = there_TL.int().argmax(dim=1, keepdim=True)
    sorted_TL, order_TL = both_TL.where(there_TL, both_TL.gather(1, first_T)).sort(dim=1)
    place_TL = torch.zeros_like(sorted_TL)
    place_TL[:, 1:] = (sorted_TL[:, 1:] != sorted_TL[:, :-1]).cumsum(1)
    most = int(place_TL.max()) + 1 if place_TL.numel() else 0
    numbers_TR = sorted_TL[:, :1].repeat(1, most).scatter(1, place_TL, sorted_TL)
    place_TL = torch.empty_like(place_TL).scatter(1, order_TL, place_TL)
    support_TL, query_TL = place_TL.split([support_TSF[0].numel(), query_TQF[0].numel()], dim=1)
    return TaskRows(numbers_TR, support_TL.view_as(support_TSF), query_TL.view_as(query_TQF))
