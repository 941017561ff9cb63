"""Rankings of several answers to a prompt, best first.

Shape suffixes: B prompts, K answers of each, T places in a row.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["RankedBatch", "Ranking", "Rankings"]


class Ranking(NamedTuple):
    """A prompt with answers.

    Attributes:
        key: Decides whether it is for training or validation: the prompt.
        prompt_length: Ids of the prompt.
        answers: Ids of the prompt and each answer, the best one first.
    """

    key: str
    prompt_length: int
    answers: list[list[int]]

    @property
    def longest(self) -> int:
        """Ids of the longest answer with its prompt."""
        return max(map(len, self.answers))

    @property
    def differs(self) -> bool:
        """Whether each answer has ids, and no two are the same."""
        return min(map(len, self.answers)) > self.prompt_length and len({*map(tuple, self.answers)}) == len(self.answers)

    def cut(self, length: int) -> Ranking:
        """The ranking with no more than so many ids of each answer with its prompt."""
        return self._replace(answers=[ids[:length] for ids in self.answers])


class RankedBatch(TypedDict, total=False):
    """A batch of rankings; all answers are padded, on the right, to the longest.

    Attributes:
        ranked_input_ids: int64 (B, K, T), the best answer of each prompt first.
        ranked_attention_mask: int64 (B, K, T).
        index: int64 (B,), as that of `PairBatch`.
        retried: bool (B,), whether the ranking had been put back; in training.
    """

    ranked_input_ids: Tensor
    ranked_attention_mask: Tensor
    index: Tensor
    retried: Tensor


class Rankings(Dataset[RankedBatch]):
    """Rankings as batches; all answers of a prompt are in one.

    Args:
        rankings: The rankings, of equally many answers each.
        pad_id: Fills up on the right.
    """

    def __init__(self, rankings: list[Ranking], pad_id: int) -> None:
        self.rankings = rankings
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.rankings)

    def __getitem__(self, index: int) -> RankedBatch:
        return cast(RankedBatch, {name: value[0] for name, value in cast(dict[str, Tensor], self.batch([index])).items()})

    def batch(self, indices: list[int]) -> RankedBatch:
        """A whole batch of rankings."""
        rankings = [self.rankings[index] for index in indices]
        shape = len(rankings), len(rankings[0].answers), max(ranking.longest for ranking in rankings)
        ids_BKT, mask_BKT = torch.full(shape, self.pad_id), torch.zeros(shape, dtype=torch.int64)
        for row, ranking in enumerate(rankings):
            for place, ids in enumerate(ranking.answers):
                ids_BKT[row, place, : len(ids)], mask_BKT[row, place, : len(ids)] = torch.tensor(ids), 1
        return {"ranked_input_ids": ids_BKT, "ranked_attention_mask": mask_BKT, "index": torch.tensor(indices)}

    def blank(self) -> RankedBatch:
        """A batch in which nothing counts."""
        return {**self.batch([0]), "index": torch.tensor([-1])}
