"""Losses of masked tokens under the diffusion head, summed to losses of samples.

Shape suffixes: B samples, N tokens, M masked tokens of a sample, C channels of a token, D width, R rows: masked tokens of all
samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.emigm.masking import MaskDraw
from zoo.emigm.network import MaskedTransformer

__all__ = ["TokenRows", "sample_losses", "token_rows"]


class TokenRows(NamedTuple):
    """Masked tokens as the head is trained on them; each with several diffusion times.

    Attributes:
        target_RC: The tokens.
        z_RD: What the transformer predicts of them.
        step: Diffusion times (R, times).
        noise: Standard normal (R, times, C).
    """

    target_RC: Tensor
    z_RD: Tensor
    step: Tensor
    noise: Tensor


def token_rows(
    network: MaskedTransformer, x_BNC: Tensor, class_BD: Tensor, draw: MaskDraw, random: SampleRandom, times: int
) -> TokenRows:
    """Run the transformer; only masked tokens go to the head, which changes nothing but the time it takes.

    Args:
        network: Transformer and head.
        x_BNC: Tokens.
        class_BD: Embedded classes.
        draw: The masked tokens.
        random: Random numbers of the batch: diffusion times and noise.
        times: Diffusion times of a token.
    """
    num_tokens, channels = x_BNC.shape[1:]
    if draw.order is None:
        z_BND = network(x_BNC, class_BD, mask_BN=draw.mask)
        step = random.integers("diffusion step", 1000, (num_tokens, times))[draw.mask]
        noise = random.normal("diffusion noise", (num_tokens, times, channels), network.data_dtype)[draw.mask]
        return TokenRows(x_BNC[draw.mask], z_BND[draw.mask], step, noise)
    masked_BM, visible_BV = draw.order[:, : draw.num_masked], draw.order[:, draw.num_masked :]
    z_BND = network(x_BNC, class_BD, visible_BV, draw.mask)
    z_BMD = z_BND.gather(1, masked_BM[..., None].expand(-1, -1, z_BND.shape[-1]))
    target_BMC = x_BNC.gather(1, masked_BM[..., None].expand(-1, -1, channels))
    step = random.integers("diffusion step", 1000, (masked_BM.shape[1], times))
    noise = random.normal("diffusion noise", (masked_BM.shape[1], times, channels), network.data_dtype)
    return TokenRows(target_BMC.flatten(0, 1), z_BMD.flatten(0, 1), step.flatten(0, 1), noise.flatten(0, 1))


def sample_losses(
    network: MaskedTransformer, rows: TokenRows, draw: MaskDraw, weight_B: Tensor, per_masked: bool, of_batch: bool
) -> dict[str, Tensor]:
    """The head's losses by name, (B,) each: weighted sums over a sample's tokens, divided by a number of tokens.

    Args:
        network: Transformer and head.
        rows: The masked tokens of all samples, in order.
        draw: The masked tokens.
        weight_B: Weight of each sample's tokens (B,), or of all (1,).
        per_masked: Divide by the number of masked tokens, otherwise by that of all.
        of_batch: Divide by the batch's mean number of masked tokens; an evaluation, which must not depend on batches, divides by
            each sample's own.
    """
    batch, num_tokens = draw.mask.shape
    if draw.order is None:
        sample_R: Tensor | None = draw.mask.nonzero()[:, 0]
        weight_R = weight_B[:, None].expand(-1, num_tokens)[draw.mask]
    else:
        sample_R = None
        weight_R = weight_B.expand(batch)[:, None].expand(-1, len(rows.target_RC) // batch).flatten()
    count_B = torch.full((batch,), float(num_tokens), device=rows.z_RD.device)
    if per_masked:
        count_B = torch.full_like(count_B, len(rows.target_RC) / batch) if of_batch else draw.mask.sum(1)
    reduced = {}
    for name, rows_RD in network.diffloss.loss(rows.target_RC, rows.z_RD, rows.step, rows.noise).items():
        row_R = rows_RD.mean(1) * weight_R
        if sample_R is None:
            sum_B = row_R.view(batch, -1).sum(1)
        else:
            sum_B = torch.zeros(batch, dtype=row_R.dtype, device=row_R.device).index_add(0, sample_R, row_R)
        reduced[name] = sum_B / count_B.to(sum_B).clamp(min=1 / batch)
    return reduced
