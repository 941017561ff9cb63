"""Sign consensus of replicas: of each number, only those replicas count that move it the way that most want.

An option of EDiT's authors' library, there called GTA (generalised task arithmetic), off in its recipes. Before the weighted sum
each replica may drop a part of its pseudo-gradient; then each number takes the sign of the majority, and the mean over those
that agree. What the replicas hand in can be summed in a single collective, so that it overlaps with computation as the plain
sum does.

Shape suffixes: R rows of a ballot, M numbers.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from zoo.base.random import SampleRandom

__all__ = ["Consensus", "ballot", "elect", "kept_at_random", "magnitude_limit"]

Sparsify = Literal["magnitude", "random"]
Sign = Literal["sum", "count"]


@dataclass(frozen=True)
class Consensus:
    """Thinning of the replicas' pseudo-gradients, and election of one sign, before clipping.

    With the weighted numbers ``d_i = w_i Delta_i`` of the replicas (0 where dropped or left out as anomalous), the majority of a
    number is the sign of ``sum_i d_i`` (``sum``) or of ``sum_i sign(d_i)`` (``count``), and the result

        sum of d_i over those of that sign, divided by the sum of their w_i if ``renormalize``.

    Without a majority (a tie) the number stays where it is. (The authors' library takes a tie for positive, which moves weights
    one way whenever two replicas disagree.) Norms, outliers and weights are those of the whole pseudo-gradients.

    Attributes:
        sparsify: keep of each parameter's numbers the largest (``magnitude``; those that tie with the smallest kept one too), or
            each with probability ``density`` (``random``); None: all. What is kept is not scaled up.
        density: share of the numbers that is kept, in (0, 1].
        sign: how the majority is found; None: no consensus, the weighted sum of what was kept.
        renormalize: divide by the weights of those that agree, so that a number whose sign is disputed moves as far as others.
        seed: of the random choice, which is a pure function of it, the number of the synchronisation, the parameter's name and
            the replica; the same however a replica is sharded.

    Raises:
        ValueError: a number or word out of range, or nothing that it would do.
    """

    sparsify: Sparsify | None = None
    density: float = 1.0
    sign: Sign | None = "sum"
    renormalize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in (("sparsify", Sparsify), ("sign", Sign)):
            if getattr(self, name) not in (None, *get_args(words)):
                raise ValueError(f"EDiT: consensus {name}={getattr(self, name)!r} must be null, {' or '.join(get_args(words))}.")
        if not 0 < self.density <= 1:
            raise ValueError(f"EDiT: consensus density={self.density} must lie in (0, 1].")
        if self.sparsify is None and self.density != 1:
            raise ValueError(f"EDiT: consensus density={self.density} needs sparsify=magnitude or sparsify=random.")
        if self.sign is None and self.density == 1:
            raise ValueError("EDiT: consensus with neither a sign nor a density below 1 does nothing; set consensus to null.")

    @property
    def num_rows(self) -> int:
        """R, numbers that a replica hands in for each of its pseudo-gradient."""
        return 1 if self.sign is None else 2 + 2 * self.renormalize + (self.sign == "count")


def magnitude_limit(size: Tensor, density: float) -> Tensor:
    """The smallest of the largest ``density`` share of magnitudes (of at least one of them), 0-dim."""
    kept = max(1, round(density * size.numel()))
    return size.flatten().kthvalue(size.numel() - kept + 1).values


def kept_at_random(
    shape: torch.Size, consensus: Consensus, sync: int, name: str, replica: int, device: torch.device | None = None
) -> Tensor:
    """Mask, bool, of the numbers of a whole parameter that a replica keeps, each with probability ``density``.

    A pure function of the seed, the number of the synchronisation, the parameter's name and the replica.
    """
    draws = SampleRandom(consensus.seed, torch.tensor([replica], device=device), epoch=sync)
    return draws.uniform(f"edit consensus/{name}", tuple(shape))[0] < consensus.density


def ballot(part: Tensor, weight: float, consensus: Consensus) -> Tensor:
    """A replica's term in the sum.

    Args:
        part: ``w Delta`` of a replica, thinned out, of any shape.
        weight: w.
        consensus: the settings.

    Returns:
        (R, M): upward and downward numbers, then, as the settings want, the weights behind each, and the signs.
    """
    part_M = part.flatten()
    if consensus.sign is None:
        return part_M[None]
    rows = [part_M.clamp(min=0), (-part_M).clamp(min=0)]
    if consensus.renormalize:
        rows += [weight * (row > 0).to(part.dtype) for row in rows]
    if consensus.sign == "count":
        rows.append(part_M.sign())
    return torch.stack(rows)


def elect(total_RM: Tensor, consensus: Consensus) -> Tensor:
    """The pseudo-gradient (M,) that a sum of ballots (R, M) gives."""
    if consensus.sign is None:
        return total_RM[0]
    up_M, down_M = total_RM[:2]
    majority_M = total_RM[-1] if consensus.sign == "count" else up_M - down_M
    result_M = torch.where(majority_M > 0, up_M, -down_M)
    if consensus.renormalize:
        result_M = result_M / torch.where(majority_M > 0, total_RM[2], total_RM[3])
    return result_M.where(majority_M != 0, 0)
