"""Losses of two towers: the vector of a user against those of the item that she took next and of others.

Sources: arXiv 2310.14304 and its official code (softmax over the target and 10 items of its domain); the correction by ``log q``
of negatives that are drawn as often as they are taken: Bengio and Senecal, IEEE Transactions on Neural Networks 19, 2008.

Shape suffixes: B examples, N negatives, C candidates, D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.base.random import SampleRandom

__all__ = ["Similarity", "draw_negatives", "in_batch_loss", "score", "softmax_loss"]

Similarity = Literal["dot", "cosine"]


def draw_negatives(random: SampleRandom, first_B: Tensor, size_B: Tensor, count: int) -> Tensor:
    """Items of the target's domain, drawn uniformly without replacement, the target among them; int64 (B, N).

    Floyd's algorithm: a step for each negative, whatever the size of the domain. A domain of fewer items gives all that it
    has, and -1 for the rest.

    Args:
        random: Draws of the examples.
        first_B: Number of the first item of each domain, whose items are numbered one after the other.
        size_B: Number of its items.
        count: N.

    Example:
        >>> random = SampleRandom(0, torch.tensor([0]))
        >>> draw_negatives(random, torch.tensor([7]), torch.tensor([3]), 4).sort().values
        tensor([[-1,  7,  8,  9]])
    """
    chosen_BN = torch.full((len(first_B), count), -1, device=first_B.device)
    u_BN = random.uniform("negatives", (count,), torch.float64)
    for place in range(count):
        last_B = size_B - count + place  # of the items among which this step draws, the last is new
        drawn_B = (u_BN[:, place] * (last_B + 1)).long()
        is_known_B = (chosen_BN == drawn_B[:, None]).any(1)
        chosen_BN[:, place] = torch.where(is_known_B, last_B, drawn_B).where(last_B >= 0, -1)
    return torch.where(chosen_BN >= 0, chosen_BN + first_B[:, None], -1)


def score(user: Tensor, item: Tensor, similarity: Similarity = "dot", temperature: float = 1.0) -> Tensor:
    """Scores ``user @ item`` over the last axis but for that of the candidates, in float32 or wider, also under autocast.

    Args:
        user: (B, D).
        item: (C, D), the same for all users, or (B, C, D).
        similarity: Product, or that of vectors of length 1.
        temperature: Divides the scores.

    Returns:
        (B, C).
    """
    with torch.autocast(user.device.type, enabled=False):
        user, item = (each.float() if each.dtype.itemsize < 4 else each for each in (user, item))
        if similarity == "cosine":
            user, item = F.normalize(user, dim=-1), F.normalize(item, dim=-1)
        product = user @ item.T if item.dim() == 2 else torch.einsum("bd,bcd->bc", user, item)
        return product / temperature


def softmax_loss(score_BC: Tensor, candidate_BC: Tensor, target_B: Tensor) -> Tensor:
    """Mean cross-entropy of the targets, in nats; repeats of a target and places without an item do not count.

    Args:
        score_BC: Scores; the target's is the first.
        candidate_BC: The items, the first the target; -1: none.
        target_B: The targets.
    """
    left_out_BC = (candidate_BC == target_B[:, None]) | (candidate_BC < 0)
    left_out_BC[:, 0] = False
    score_BC = score_BC.masked_fill(left_out_BC, -torch.inf)
    return F.cross_entropy(score_BC, torch.zeros_like(target_B))


def in_batch_loss(
    score_BC: Tensor,
    target_B: Tensor,
    domain_B: Tensor,
    candidate_C: Tensor,
    domain_C: Tensor,
    log_q_C: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the targets against other examples' targets of the same domain, each item once.

    Args:
        score_BC: Scores of distinct candidates, the targets among them.
        target_B: The targets.
        domain_B: Their domains.
        candidate_C: The items, each once.
        domain_C: Their domains.
        log_q_C: Logarithms of the shares of targets that the items are, to be taken off their scores; None: nothing is.
    """
    if log_q_C is not None:
        score_BC = score_BC - log_q_C
    score_BC = score_BC.masked_fill(domain_B[:, None] != domain_C, -torch.inf)
    return F.cross_entropy(score_BC, (candidate_C == target_B[:, None]).int().argmax(1))
