"""Cross-entropy of a head over the vocabulary, whole or in chunks.

Shape suffixes: N tokens, D width, V vocabulary, C tokens of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORED", "cross_entropy"]

IGNORED = -100
"""Label of a token of which nothing is learned."""


def cross_entropy(x_ND: Tensor, weight_VD: Tensor, label_N: Tensor, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of ``softmax(W x)`` over the labels that are not -100, in nats, and that of each token.

    Args:
        x_ND: inputs of the head.
        weight_VD: its effective weight.
        label_N: int64.
        chunk: tokens whose logits are in memory at a time; their gradients are computed at once. 0: all, by autograd.

    Returns:
        The mean (0 if no label counts), and (N,) without gradient, 0 where the label does not count.
    """
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
    count = (label_N != IGNORED).sum().clamp(min=1)
    with torch.autocast(x_ND.device.type, enabled=False):
        if chunk > 0:
            mean, each_N = _Chunked.apply(x_ND, weight_VD, label_N, count, chunk)
            return mean, each_N
        logits_NV = F.linear(x_ND, weight_VD)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        each_N = F.cross_entropy(logits_NV, label_N, ignore_index=IGNORED, reduction="none")
        return each_N.sum() / count, each_N.detach()


class _Chunked(torch.autograd.Function):
    """Loss and gradients chunk by chunk, so that no more than (C, V) logits exist; each chunk is computed once.

    Gradients are those of the sum until they leave: divided by the number of labels, most probabilities would be too small for
    float16.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, label_N: Tensor, count: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        accurate = torch.promote_types(x_ND.dtype, torch.float32)
        each_N = torch.zeros(len(x_ND), dtype=accurate, device=x_ND.device)
        needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x_ND) if needs_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=accurate) if needs_weight else None
        for start in range(0, len(x_ND), chunk):
            part = slice(start, start + chunk)
            x_CD, label_C = x_ND[part], label_N[part]
            logits_CV = F.linear(x_CD, weight_VD).to(accurate)
            valid_C = label_C != IGNORED
            target_C1 = label_C.where(valid_C, 0)[:, None]
            lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
            each_N[part] = torch.where(valid_C, (lse_C1 - logits_CV.gather(1, target_C1)).squeeze(1), 0.0)
            if not (needs_x or needs_weight):
                continue
            grad_CV = logits_CV.sub_(lse_C1).exp_()
            grad_CV.scatter_add_(1, target_C1, torch.full_like(lse_C1, -1.0))
            out = grad_CV if accurate == x_ND.dtype else x_ND.new_empty(grad_CV.shape)
            grad_CV = torch.mul(grad_CV, valid_C[:, None], out=out)
            if grad_x is not None:
                torch.mm(grad_CV, weight_VD, out=grad_x[part])
            if grad_weight is not None:
                if x_ND.dtype == torch.bfloat16:
                    grad_weight += grad_CV.t() @ x_CD
                else:  # the sum of a chunk may be too large for float16
                    grad_weight.addmm_(grad_CV.t().to(accurate), x_CD.to(accurate))
        ctx.save_for_backward(grad_x, grad_weight, count)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(each_N)
        return each_N.sum() / count, each_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, count = ctx.saved_tensors
        scale_1 = (grads[0] / count).view(1)  # of one dimension, for a product in its own type
        if grad_x is not None:
            grad_x = (grad_x * scale_1).to(grad_x.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale_1).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None
