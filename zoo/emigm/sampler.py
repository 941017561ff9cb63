"""Sampling: K mask-prediction steps, each of which reveals some tokens of every image.

Source: You et al., arXiv 2503.07197, section 5, and the published code; MAR's order: its published code.
The positions that a step reveals are uniform among the masked ones, so one random permutation of the positions for each image
says them all: step k takes the next n_k of it. No image is looped over.
Shape suffixes: B samples, N tokens, V visible tokens, P picked tokens, C channels of a token, D width.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.emigm.guidance import Guidance, nfe_of
from zoo.emigm.head import HeadSampler, check_head_steps
from zoo.emigm.mask_schedule import ScheduleName, check_schedule, reveal_probabilities, step_times
from zoo.emigm.network import MaskedTransformer

__all__ = ["Drawn", "MaskSampler", "reveal_counts", "sample_tokens"]

CountLaw = Literal["binomial", "mar"]


@dataclass
class MaskSampler:
    """Options of the sampler.

    Args:
        num_iter: mask-prediction steps K.
        schedule: mask schedule of sampling, whatever the model was trained with.
        count_law: ``binomial``: each step reveals Binomial(masked, 1 - gamma(s)/gamma(t)) tokens, at least one; ``mar``:
            MAR's fixed cosine counts, whatever ``schedule`` says.
        head: ``dpm-solver`` or ``ddpm``.
        head_steps: network calls of the head for each token; published: 8 (K = 16) and 14 for DPM-Solver, 100 for DDPM.
        temperature: scales the noise of the DDPM head.
        head_clip: confine the DDPM head's data estimates to +-this; published: None. An under-trained DDPM head diverges
            without.
        guidance: classifier-free guidance.
        eps: last time of the grid.
        count_block: samples with the same number // ``count_block`` share the random numbers of revealed tokens, and so the
            shapes that a batch needs; which samples those are does not depend on the batch.

    Raises:
        ValueError: an argument out of range.
    """

    num_iter: int = 16
    schedule: ScheduleName = "exp"
    count_law: CountLaw = "binomial"
    head: HeadSampler = "dpm-solver"
    head_steps: int = 8
    temperature: float = 1.0
    head_clip: float | None = None
    guidance: Guidance = field(default_factory=Guidance)
    eps: float = 1e-5
    count_block: int = 256

    def __post_init__(self) -> None:
        if self.num_iter < 1 or self.count_block < 1:
            raise ValueError(f"MaskSampler: num_iter={self.num_iter} and count_block={self.count_block} must be at least 1.")
        check_schedule(self.schedule)
        check_head_steps(self.head, self.head_steps)
        if self.count_law not in get_args(CountLaw):
            raise ValueError(f"MaskSampler: count_law={self.count_law!r} must be one of {', '.join(get_args(CountLaw))}.")
        if self.temperature < 0 or not 0 < self.eps < 1 / self.num_iter or (self.head_clip is not None and self.head_clip <= 0):
            raise ValueError(
                f"MaskSampler: temperature={self.temperature} must not be negative, eps={self.eps} must lie in (0, 1/num_iter),"
                f" head_clip={self.head_clip} must be positive or null."
            )

    @property
    def nfe(self) -> int:
        """Transformer evaluations per image, where no step finds everything revealed already."""
        return nfe_of(self.num_iter, self.guidance, self.eps)


class Reveal(NamedTuple):
    """One step: tokens revealed before and after it, whether it is guided, and its number."""

    before: int
    after: int
    guided: bool
    number: int


def reveal_counts(sampler: MaskSampler, num_masked: int, num_known: int, random: SampleRandom) -> list[Reveal]:
    """The steps of one sampling run, those that reveal nothing left out.

    Args:
        sampler: how images are drawn.
        num_masked: masked tokens at the start.
        num_known: tokens that are visible already.
        random: one stream, from which the numbers are drawn.
    """
    K = sampler.num_iter
    ends = step_times(K, sampler.eps)[1:].tolist()
    probabilities = reveal_probabilities(sampler.schedule, K, sampler.eps)
    uniform_KN = random.uniform("reveal counts", (K, max(num_masked, 1)), torch.float64)[0] if num_masked else torch.zeros(K, 1)
    steps, left = [], num_masked
    for k in range(K):
        if left == 0:
            break
        if k == K - 1:
            revealed = left
        elif sampler.count_law == "mar":
            kept = math.floor(num_masked * math.cos(math.pi / 2 * (k + 1) / K))
            revealed = left - max(1, min(left - 1, kept)) if left > 1 else 0
        else:
            revealed = max(1, int((uniform_KN[k, :left] < probabilities[k]).sum()))
        if not revealed:
            continue
        guided = sampler.guidance.guides(ends[k])
        done = num_known + num_masked - left
        steps.append(Reveal(done, done + revealed, guided, k))
        left -= revealed
    return steps


@dataclass
class Drawn:
    """Result of `sample_tokens`.

    Attributes:
        tokens: (B, N, C).
        nfe: transformer evaluations of each image.
        trajectory: (B, T, N, C), the tokens after each step, masked ones 0; None if not kept.
    """

    tokens: Tensor
    nfe: int
    trajectory: Tensor | None = None


@torch.no_grad()
def sample_tokens(
    network: MaskedTransformer,
    sampler: MaskSampler,
    random: SampleRandom,
    counts: SampleRandom,
    label_B: Tensor | None = None,
    *,
    known_BNC: Tensor | None = None,
    known_BN: Tensor | None = None,
    record: bool = False,
) -> Drawn:
    """Draw the tokens of a batch whose images all know equally many tokens.

    Args:
        network: in evaluation mode.
        sampler: how.
        random: the samples' streams: order of the positions and noise of the head.
        counts: one stream, for the numbers of revealed tokens.
        label_B: classes; None: without class.
        known_BNC: tokens that are known, for in-painting; others may hold anything.
        known_BN: true where known, equally often in each row. The schedule starts with the rest masked.
        record: keep the tokens after each step.

    Raises:
        ValueError: rows that know differently many tokens.
    """
    batch, device = len(random), network.fake_latent.device
    dtype = network.diffloss.dtype
    order_key_BN = random.uniform("order", (network.num_tokens,), torch.float64)
    num_known = 0
    x_BNC = torch.zeros(batch, network.num_tokens, network.token_channels, dtype=dtype, device=device)
    if known_BN is not None:
        num_known = int(known_BN[0].sum())
        if known_BNC is None or bool((known_BN.sum(1) != num_known).any()):
            raise ValueError("sample_tokens: known_BNC and known_BN belong together, with equally many known tokens in each row.")
        order_key_BN = order_key_BN.masked_fill(known_BN, -1.0)  # the known ones come first
        x_BNC = torch.where(known_BN[..., None], known_BNC.to(dtype), x_BNC)
    order_BN = order_key_BN.argsort(dim=1)
    steps = reveal_counts(sampler, network.num_tokens - num_known, num_known, counts)
    class_BD = network.class_embedding(label_B, batch)
    guide = label_B is not None  # without a class there is nothing to guide to
    if guide:
        class_BD = torch.cat([network.class_embedding(None, batch), class_BD])

    def evaluate(step: Reveal, x_BNC: Tensor, picked_BP: Tensor) -> tuple[Tensor | None, Tensor]:
        guided = guide and step.guided
        classes = class_BD if guided or not guide else class_BD[batch:]
        repeat: Callable[[Tensor], Tensor] = (lambda t: t.repeat(2, *[1] * (t.dim() - 1))) if guided else (lambda t: t)
        mask_BN = None
        if not network.use_mae:
            mask_BN = torch.ones_like(order_BN, dtype=torch.bool).scatter_(1, order_BN[:, : step.before], False)
            mask_BN = repeat(mask_BN)
        z = network(repeat(x_BNC), classes, repeat(order_BN[:, : step.before]), mask_BN, repeat(picked_BP))
        without, z = z.chunk(2) if guided else (None, z)
        return (None if without is None else without.flatten(0, 1)), z.flatten(0, 1)

    trajectory = []
    for step in steps:
        picked_BP = order_BN[:, step.before : step.after]
        z_uncond, z = evaluate(step, x_BNC, picked_BP)
        tokens = network.diffloss.sample(
            z,
            _row_noise(random, step, network.token_channels, dtype),
            z_uncond=z_uncond,
            scale=sampler.guidance.scale_at(step.after / network.num_tokens) if z_uncond is not None else 1.0,
            algorithm=sampler.head,
            steps=sampler.head_steps,
            temperature=sampler.temperature,
            clip=sampler.head_clip,
        )
        where_BPC = picked_BP[..., None].expand(-1, -1, network.token_channels)
        x_BNC = x_BNC.scatter(1, where_BPC, tokens.view(batch, -1, network.token_channels))
        if record:
            trajectory.append(x_BNC)
    nfe = len(steps) + sum(guide and step.guided for step in steps)
    return Drawn(x_BNC, nfe, torch.stack(trajectory, dim=1) if trajectory else None)


def _row_noise(random: SampleRandom, step: Reveal, channels: int, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """The head's noise for the tokens of a step: each sample draws its own."""
    float_type = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (step.after - step.before, channels)
    return lambda name: random.normal(f"head {step.number} {name}", shape, float_type).flatten(0, 1)


def equal_groups(known_BN: Tensor | None, block_B: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows of a batch that can be drawn together: of one block, with equally many known tokens.

    Args:
        known_BN: true where known, or None.
        block_B: block number of each sample.

    Yields:
        Row numbers and their block.
    """
    known_B = torch.zeros_like(block_B) if known_BN is None else known_BN.sum(1).to(block_B)
    for block, known in torch.stack([block_B, known_B], dim=1).unique(dim=0).tolist():
        yield ((block_B == block) & (known_B == known)).nonzero().squeeze(1), block
