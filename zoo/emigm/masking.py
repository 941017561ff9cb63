"""Training masks: how many tokens are hidden, and which.

Sources: You et al., arXiv 2503.07197, section 3 and table 1, and its published code; MAR for the truncated normal law.
Shape suffixes: B samples, N tokens, M masked tokens, V visible tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.emigm.mask_schedule import ScheduleName, check_schedule, gamma

__all__ = ["MaskDraw", "Masking", "MaskingLaw"]

MaskingLaw = Literal["bernoulli", "fixed_count", "mar_truncnorm"]
Truncation = Literal["clamp", "resample"]
TimeSharing = Literal["batch", "sample"]

_FLOOR = 1e-3  # times are drawn from [1e-3, 1]
_FEWEST = 2  # masked tokens, as in the published code
_MAR_MEAN, _MAR_STD, _MAR_LOW = 1.0, 0.25, 0.7


@dataclass
class MaskDraw:
    """Masked tokens of a batch.

    Attributes:
        time: the times p, float64: (1,) if the batch shares one, else (B,).
        mask: bool (B, N), true where masked.
        order: int64 (B, N), a permutation of the positions for each sample, the masked ones first; None if the samples differ
            in their number of masked tokens.
        num_masked: number of masked tokens of each sample; None if they differ.
    """

    time: Tensor
    mask: Tensor
    order: Tensor | None = None
    num_masked: int | None = None


@dataclass
class Masking:
    """The masking distribution q(x_t | x_0) of table 1.

    Args:
        schedule: mask probability as a function of time.
        law: ``bernoulli`` masks each position with probability gamma(t) (MDM, eMIGM); ``fixed_count`` masks
            ceil(N gamma(t)) positions (MaskGIT); ``mar_truncnorm`` masks ceil(N m) with m of a normal distribution of mean 1
            and deviation 0.25, truncated to [0.7, 1] (MAR).
        t_min: least time, in [0, 1).
        truncation: ``clamp``, as published, raises earlier times to ``t_min``, so that it is drawn with probability ``t_min``;
            ``resample`` draws uniformly from [t_min, 1].
        time: ``batch``, as published, draws one time and one number of masked tokens for a process's batch, so that the
            encoder can leave masked tokens out; ``sample`` draws them for each sample, for the single encoder.
        stratified: spread the times of consecutive samples evenly over the interval.

    Raises:
        ValueError: an argument out of range.
    """

    schedule: ScheduleName = "exp"
    law: MaskingLaw = "bernoulli"
    t_min: float = 0.2
    truncation: Truncation = "clamp"
    time: TimeSharing = "batch"
    stratified: bool = False

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        for name, kinds in (("law", MaskingLaw), ("truncation", Truncation), ("time", TimeSharing)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"Masking: {name}={getattr(self, name)!r} must be one of {', '.join(get_args(kinds))}.")
        if not 0 <= self.t_min < 1:
            raise ValueError(f"Masking: t_min={self.t_min} must lie in [0, 1); published is 0.2.")
        if self.time == "sample" and self.law != "bernoulli":
            raise ValueError(f"Masking: time='sample' masks each position on its own; law={self.law!r} needs time='batch'.")

    def times(self, uniform: Tensor) -> Tensor:
        """Times p in [1e-3, 1] from uniform draws in [0, 1), truncated."""
        raised = self.truncation == "clamp"
        t = uniform.clamp(min=self.t_min) if raised else self.t_min + (1 - self.t_min) * uniform
        return (1 - _FLOOR) * t + _FLOOR

    def draw(self, random: SampleRandom, num_tokens: int, time: float | None = None) -> MaskDraw:
        """Draw the masks of a batch.

        What the batch shares is drawn from a stream of the batch, so that each process has a time of its own, as in the
        published code, and a resumed run the same as an uninterrupted one.

        Args:
            random: the batch's random numbers.
            num_tokens: number of tokens N.
            time: mask at this time instead of a drawn one, in (0, 1]; where the batch shares a number of masked tokens, it is the
                one expected at this time, rounded, whatever the batch.
        """
        if self.time == "sample":
            draw_times = random.stratified if self.stratified else random.uniform
            p_B = self.times(draw_times("mask time", dtype=torch.float64)) if time is None else _constant(time, random)
            uniform_BN = random.uniform("mask", (num_tokens,), torch.float64)
            return MaskDraw(p_B, uniform_BN < gamma(self.schedule, p_B)[:, None])
        p, num_masked = self._shared_count(_of_batch(random), num_tokens, time)
        order_BN = random.uniform("mask order", (num_tokens,), torch.float64).argsort(dim=1)
        mask_BN = torch.zeros_like(order_BN, dtype=torch.bool).scatter_(1, order_BN[:, :num_masked], True)
        return MaskDraw(p.to(order_BN.device), mask_BN, order_BN, num_masked)

    def _shared_count(self, stream: SampleRandom, num_tokens: int, time: float | None) -> tuple[Tensor, int]:
        """Time (1,) and number of masked tokens of the batch; at a given time, the number that is expected there."""
        fewest, attempt = min(_FEWEST, num_tokens), 0
        if time is not None:
            p = _constant(time, stream)
            return p, max(fewest, round(num_tokens * gamma(self.schedule, p).item()))
        while True:
            suffix = f" {attempt}"
            draw_times = stream.stratified if self.stratified else stream.uniform
            p = self.times(draw_times("mask time" + suffix, dtype=torch.float64))
            if self.law == "mar_truncnorm":
                return p, max(fewest, math.ceil(num_tokens * _truncated_normal(stream)))
            ratio = gamma(self.schedule, p)
            if self.law == "fixed_count":
                return p, max(1, math.ceil(num_tokens * ratio.item()))
            row = stream.uniform("mask row" + suffix, (num_tokens,), torch.float64) < ratio
            if (num_masked := int(row.sum())) >= fewest:
                return p, num_masked
            attempt += 1


def _of_batch(random: SampleRandom) -> SampleRandom:
    """One stream for the batch of a process, on the CPU, where numbers of tokens are needed.

    Its index counts the batches of all processes, so that stratified times of consecutive ones lie far apart. Samples of a
    batch lie W apart where there are W processes.
    """
    index = random.index_B[:2].cpu()
    apart = int(index[1] - index[0]) if len(index) > 1 else 1
    first, span = int(index[0]), max(1, len(random) * apart)
    number = first // span * apart + first % apart if apart > 0 else first
    return SampleRandom(random.seed, torch.tensor([number]), random.epoch)


def _constant(time: float, random: SampleRandom) -> Tensor:
    return torch.full((len(random),), time, dtype=torch.float64, device=random.index_B.device)


def _truncated_normal(stream: SampleRandom) -> float:
    """MAR's mask ratio: a normal draw of mean 1, deviation 0.25, truncated to [0.7, 1], by its inverse distribution."""
    low = torch.special.ndtr(torch.tensor((_MAR_LOW - _MAR_MEAN) / _MAR_STD, dtype=torch.float64))
    uniform = stream.uniform("mask ratio", (), torch.float64)
    return float(_MAR_MEAN + _MAR_STD * torch.special.ndtri(low + (0.5 - low) * uniform))
