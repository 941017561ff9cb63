"""Choice of the next token: the likeliest, or a draw by temperature, top-k and top-p, with a penalty on repetition.

Shape suffixes: B sequences, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenChoice", "draw", "keep_top_k", "keep_top_p", "penalize"]


_TINY = 1e-6


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide the positive scores of tokens that occurred by ``penalty``, multiply the negative ones by it.

    Source: Keskar et al., "CTRL", arXiv 1909.05858, in the form in which the transformers library has it.

    Args:
        logits_BV: scores.
        seen_BV: bool, tokens of the prompt and of what was generated.
        penalty: above 1 discourages repetition.
    """
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` largest scores, and what equals the least of them; the others become -inf."""
    least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -math.inf)


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens whose probabilities sum to ``top_p`` or more; the scores of the others become -inf."""
    ascending_BV, order_BV = logits_BV.sort(dim=-1)
    dropped_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped_BV[:, -1] = False
    return logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -math.inf)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token of each row by the inverse of its cumulative distribution, int64 (B,); never one of probability 0.

    Args:
        logits_BV: scores, -inf where a token is excluded.
        uniform_B: float64 in [0, 1).
    """
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    # Below 1 by more than rounding can give back, so that some token always lies beyond.
    share_B1 = uniform_B.clamp(max=1 - 2**-52)[:, None]
    return torch.searchsorted(cumulative_BV, share_B1 * cumulative_BV[:, -1:], right=True).squeeze(1)


@dataclass(frozen=True)
class TokenChoice:
    """Choice of the next token from its scores.

    In this order, as in the transformers library: penalty on repetition, temperature, top-k, top-p, draw.

    Attributes:
        temperature: scores are divided by it; 0: the likeliest token, whatever ``top_k`` and ``top_p``.
        top_k: draw from this many likeliest tokens; 0: from all.
        top_p: draw from the fewest likeliest tokens that hold this much probability, in (0, 1].
        repetition_penalty: see `penalize`; 1: none.

    Raises:
        ValueError: a number out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (the likeliest token) or positive.")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k={self.top_k} must be 0 (all tokens) or a positive whole number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1].")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 means none.")

    @property
    def is_random(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    @property
    def needs_seen(self) -> bool:
        """Whether it matters which tokens occurred."""
        return self.repetition_penalty != 1

    def scores(self, logits_BV: Tensor, seen_BV: Tensor | None = None) -> Tensor:
        """Scores after penalty, temperature, top-k and top-p; -inf for tokens that cannot be drawn.

        Args:
            logits_BV: floating point.
            seen_BV: bool, tokens that occurred; needed with a penalty.
        """
        if self.needs_seen:
            assert seen_BV is not None
            logits_BV = penalize(logits_BV, seen_BV, self.repetition_penalty)
        if not self.is_random:
            return logits_BV
        if self.temperature < _TINY:  # by which the largest score would become infinite
            logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
        if self.temperature != 1:
            logits_BV = logits_BV / max(self.temperature, torch.finfo(logits_BV.dtype).tiny)
        if self.top_k:
            logits_BV = keep_top_k(logits_BV, self.top_k)
        return keep_top_p(logits_BV, self.top_p) if self.top_p < 1 else logits_BV

    def choose(self, logits_BV: Tensor, seen_BV: Tensor | None = None, uniform_B: Tensor | None = None) -> Tensor:
        """The next tokens, int64 (B,).

        Args:
            logits_BV: floating point.
            seen_BV: bool, tokens that occurred; needed with a penalty.
            uniform_B: float64 in [0, 1), one for each draw; needed where tokens are drawn.
        """
        scores_BV = self.scores(logits_BV, seen_BV)
        if not self.is_random:
            return scores_BV.max(-1).indices  # a CPU takes a fourth of the time that argmax needs
        assert uniform_B is not None
        return draw(scores_BV, uniform_B)
