"""Answers of a rollout with their scores and log-probabilities, and the tokens among them that count.

Shape suffixes: R samples, P prompt ids, N answer tokens.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Experience", "Rows", "answer_mask"]


def answer_mask(tokens_RN: Tensor, eos_ids: Collection[int]) -> tuple[Tensor, Tensor]:
    """Tokens up to and including the first end-of-sequence token, bool (R, N), and whether there is one, bool (R,).

    Args:
        tokens_RN: Generated tokens, int64; those after the end do not matter.
        eos_ids: Tokens that end a sequence; none: all tokens count.

    Example:
        >>> answer_mask(torch.tensor([[5, 6, 2, 2], [5, 6, 7, 8]]), [2])
        (tensor([[ True,  True,  True, False],
                [ True,  True,  True,  True]]), tensor([ True, False]))
    """
    ends_RN = torch.isin(tokens_RN, torch.tensor(list(eos_ids), dtype=tokens_RN.dtype, device=tokens_RN.device))
    before_RN = ends_RN.cumsum(1) - ends_RN.long()
    return before_RN == 0, ends_RN.any(1)


class Rows:
    """Base of dataclasses whose tensors and lists have a row for each sample."""

    def select(self, rows: Tensor | slice | list[int]) -> Self:
        """Some of the samples, by numbers of rows, a mask or a slice of them; where there are lists, by a list of numbers."""
        parts: dict[str, Any] = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        parts |= {name: [x[row] for row in rows] for name, x in vars(self).items() if isinstance(x, list)}  # type: ignore[union-attr]
        return dataclasses.replace(self, **parts)  # type: ignore[type-var]

    def joined(self, others: Sequence[Self]) -> Self:
        """These samples, and those that follow."""
        names = [name for name, x in vars(self).items() if isinstance(x, Tensor)]
        return dataclasses.replace(self, **{name: torch.cat([getattr(each, name) for each in (self, *others)]) for name in names})  # type: ignore[type-var]


@dataclass
class Experience(Rows):
    """Samples of a rollout; all tensors are on one device. Log-probabilities are in nats.

    Attributes:
        prompt_ids: (R, P) int64, padded on the left.
        prompt_mask: (R, P), 0 at the padding.
        tokens: (R, N) int64, the answers.
        mask: (R, N) bool, tokens up to and including the first end-of-sequence token, see `answer_mask`.
        index: (R,) int64, number of the sample in its rollout; divided by the samples per prompt, that of its prompt.
        logp: (R, N) log-probability of each token under the policy at the start of the rollout's training, by the forward
            pass of training.
        score: (R,) reward of the whole answer.
        ended: (R,) bool, whether the answer has an end-of-sequence token.
        behaviour_logp: (R, N) the same as ``logp`` under the weights that generated, where these may be older.
        reference_logp: (R, N) the same under the frozen reference.
        value: (R, N) critic's value of the state before each token. The convention ``trl`` needs that of the state after the
            last token too: leave it unmasked.
        version: Number of the weights that generated.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    index: Tensor
    logp: Tensor
    score: Tensor
    ended: Tensor
    behaviour_logp: Tensor | None = None
    reference_logp: Tensor | None = None
    value: Tensor | None = None
    version: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.tokens)

    @property
    def length(self) -> Tensor:
        """Tokens of each answer that count, int64 (R,)."""
        return self.mask.sum(1)

    def ids_and_mask(self) -> tuple[Tensor, Tensor]:
        """Prompts with their answers, int64 (R, P+N), and the attention mask of both, int64; the end token is attended to."""
        ids_RS = torch.cat((self.prompt_ids, self.tokens), 1)
        return ids_RS, torch.cat((self.prompt_mask.long(), self.mask.long()), 1)
