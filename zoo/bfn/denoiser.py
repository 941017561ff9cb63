"""The denoiser: what a sampler sees of a model."""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.bfn.flow import Flow
from zoo.bfn.heads import Head, Statistic

__all__ = ["Denoiser", "Guide", "InPainting"]

#: Corrects an estimate: (estimate, state, t) -> estimate. The solver writes the next state over this one: copy what is kept.
Guide = Callable[[Tensor, Tensor, float], Tensor]


class Denoiser:
    """Estimates the data from a state, and counts how often the network is called.

    Args:
        network: maps (network input (B, ...), t (B,)) to the output that ``head`` reads.
        flow: of the data.
        head: of the network.
        guide: corrects each estimate before the sampler uses it: guidance, constraints, in-painting.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], flow: Flow, head: Head, guide: Guide | None = None) -> None:
        self.network = network
        self.flow = flow
        self.head = head
        self.guide = guide
        #: Number of network calls so far.
        self.nfe = 0

    def __call__(self, state: Tensor, t: float, statistic: Statistic, random: SampleRandom) -> Tensor:
        """Estimate the data.

        Args:
            state: (B, ...).
            t: time of the state.
            statistic: what to take of the predicted distribution.
            random: the batch's random numbers, for ``sample``.
        """
        output = self.network(self.flow.network_input(state), state.new_full((len(state),), t))
        if self.nfe == 0:
            self.head.check_output(output, state, self.flow)
        self.nfe += 1
        prediction = self.head(output, state, t, self.flow)
        return self.correct(prediction.take(statistic, random, f"output {t}"), state, t)

    def correct(self, estimate: Tensor, state: Tensor, t: float) -> Tensor:
        """Apply the guide."""
        return estimate if self.guide is None else self.guide(estimate, state, t)


class InPainting:
    """Guide that keeps known elements: their estimate is the truth, the sampler fills in the others.

    Args:
        known: the truth as an estimate (B, ...); unknown elements may hold anything.
        mask: bool, true where it is known; broadcastable to ``known``, or, for classes, to the data's shape, which is that of
            ``known`` without its last axis.

    Raises:
        ValueError: the mask has neither shape, or could be meant in both ways.
    """

    def __init__(self, known: Tensor, mask: Tensor) -> None:
        of_estimate = mask.dim() <= known.dim() and _fits(mask, known)
        of_data = mask.dim() < known.dim() and _fits(mask[..., None], known)
        if of_estimate == of_data:
            reason = "could be meant for the data or for the estimate" if of_data else "fits neither data nor estimate"
            raise ValueError(
                f"InPainting: a mask of shape {tuple(mask.shape)} {reason} of shape {tuple(known.shape)}:"
                f" give it {known.dim()} axes, the last of length 1 where all classes or channels are known together."
            )
        self.known = known
        self.mask = mask[..., None] if of_data else mask

    def __call__(self, estimate: Tensor, state: Tensor, t: float) -> Tensor:
        """Put the truth into the estimate."""
        return torch.where(self.mask, self.known, estimate)


def _fits(mask: Tensor, known: Tensor) -> bool:
    """Whether the mask can be broadcast to the estimate's shape."""
    sizes = zip(mask.shape[::-1], known.shape[::-1], strict=False)
    return all(size in (1, length) for size, length in sizes)
