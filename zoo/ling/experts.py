"""Routed experts: every token visits its k experts, none is dropped; the sum over them is deterministic.

Shape suffixes: N tokens, k experts of a token, M = N k assignments sorted by expert, D width, I width of an expert, E experts.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["Backend", "Experts", "choose_backend", "sort_by_expert"]

Backend = Literal["auto", "grouped", "loop", "batched"]

_grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm
_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEW_ASSIGNMENTS = 16
FEW_COMPILED = 256


def sort_by_expert(ids_Nk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort assignments by expert, those of one expert by token.

    Args:
        ids_Nk: the experts of each token.
        num_experts: E.

    Returns:
        The order (M,) (assignment ``order[i] = token * k + slot`` comes to place i), its inverse (M,), and how many
        assignments each expert has (E,), int64.
    """
    flat_M = ids_Nk.reshape(-1)
    order_M = flat_M.argsort(stable=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_M.device)
    return order_M, inverse_M, count_E.scatter_add_(0, flat_M, torch.ones_like(flat_M))


def choose_backend(num_assignments: int, hidden_size: int, width: int, dtype: torch.dtype, device_type: str = "cuda") -> Backend:
    """What ``auto`` takes: ``batched`` for a few assignments on a GPU, ``grouped`` where its rules allow, else ``loop``.

    On a CPU gathered weights cost more than any number of small products. While a compiler looks on, grouped products are there
    for bfloat16 alone, and a loop over experts would have to know how many tokens each has: then ``batched`` for up to
    `FEW_COMPILED` assignments.

    Args:
        num_assignments: M.
        hidden_size: D.
        width: I.
        dtype: of the products.
        device_type: where they are computed.
    """
    odd = (hidden_size * dtype.itemsize) % 16 or (width * dtype.itemsize) % 16
    if torch.compiler.is_compiling() and num_assignments <= FEW_COMPILED and (odd or dtype != torch.bfloat16):
        return "batched"
    if dtype not in _GROUPED_TYPES or odd:
        return "loop"
    return "batched" if num_assignments <= _FEW_ASSIGNMENTS and device_type != "cpu" else "grouped"


class Experts(nn.Module):
    """E SwiGLU networks ``down(silu(gate x) * (up x))`` in two tensors, without biases.

    Args:
        num_experts: E.
        hidden_size: D.
        width: I.
        backend: ``grouped`` takes one product over all experts (needs float32, bfloat16 or float16, and rows of whole 16
            bytes); ``loop`` one per expert (any type and size); ``batched`` gathers each assignment's weights (for a few
            tokens); ``auto`` chooses for each call.

    Raises:
        ValueError: an unknown backend, or ``grouped`` with sizes that it cannot take.
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int, backend: Backend = "auto") -> None:
        super().__init__()
        if backend not in get_args(Backend):
            raise ValueError(f"experts={backend!r} must be one of {', '.join(get_args(Backend))}.")
        if backend == "grouped" and choose_backend(1 << 20, hidden_size, width, torch.float32) == "loop":
            raise ValueError(
                f"experts='grouped' needs hidden_size={hidden_size} and moe_intermediate_size={width} to be multiples of 4"
                " (8 in half precision): choose such sizes, or experts='auto'."
            )
        self.num_experts = num_experts
        self.backend: Backend = backend
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        E, D, width = self.down_proj.shape
        return f"num_experts={E}, hidden_size={D}, width={width}, backend={self.backend!r}"

    def forward(self, x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """``sum_j weights[n, j] expert_{ids[n, j]}(x[n])``, (N, D) in the type of ``x`` (autocast's, where it is on).

        Args:
            x_ND: tokens.
            ids_Nk: their experts.
            weights_Nk: weights of the sum, floating point.
        """
        dtype = x_ND.dtype
        if torch.is_autocast_enabled(x_ND.device.type):
            dtype = torch.get_autocast_dtype(x_ND.device.type)  # grouped products know no autocast
        x_ND, gate_up, down = x_ND.to(dtype), self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        backend = self.backend
        if backend == "auto":
            backend = choose_backend(ids_Nk.numel(), x_ND.shape[-1], down.shape[-1], dtype, x_ND.device.type)
        with torch.autocast(x_ND.device.type, enabled=False):
            if backend == "batched":
                return _batched(x_ND, ids_Nk, weights_Nk, gate_up, down)
            order_M, inverse_M, count_E = sort_by_expert(ids_Nk, self.num_experts)
            if backend == "loop":
                return _loop(x_ND, weights_Nk, order_M, inverse_M, count_E, gate_up, down)
            offset_E = count_E.cumsum(0).to(torch.int32)
            result: Tensor = _Grouped.apply(x_ND, weights_Nk, order_M, inverse_M, offset_E, gate_up, down)
            return result


class _Permute(torch.autograd.Function):
    """Rows in another order; its gradient is the inverse permutation, which unlike that of indexing needs no atomic sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grads[0], inverse, order), None, None


def _loop(
    x_ND: Tensor, weights_Nk: Tensor, order_M: Tensor, inverse_M: Tensor, count_E: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    N, k = weights_Nk.shape
    x_MD = _Permute.apply(x_ND[:, None].expand(N, k, -1).reshape(N * k, -1), order_M, inverse_M)
    parts = []
    # `unbind` and no `weight[e]`, each of which would make a gradient of the size of all experts.
    for x_mD, w13, w2 in zip(x_MD.split(count_E.tolist()), gate_up.unbind(0), down.unbind(0), strict=True):
        if len(x_mD):
            gate, up = F.linear(x_mD, w13).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, w2))
    y_MD = torch.cat(parts) if parts else x_MD * 1
    y_NkD = _Permute.apply(y_MD, inverse_M, order_M).view(N, k, -1)
    accurate = torch.promote_types(x_ND.dtype, torch.float32)
    return (y_NkD.to(accurate) * weights_Nk[..., None]).sum(1).to(x_ND.dtype)


def _batched(x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    N, k = ids_Nk.shape
    flat_M = ids_Nk.reshape(-1)
    x_MD1 = x_ND[:, None, :].expand(N, k, -1).reshape(N * k, -1, 1)
    gate, up = torch.bmm(gate_up[flat_M], x_MD1).chunk(2, dim=1)
    y_NkD = torch.bmm(down[flat_M], F.silu(gate) * up).view(N, k, -1)
    accurate = torch.promote_types(x_ND.dtype, torch.float32)
    return (y_NkD.to(accurate) * weights_Nk[..., None]).sum(1).to(x_ND.dtype)


class _Grouped(torch.autograd.Function):
    """All experts in one product each way, with a gradient of its own.

    What it saves: the routing weights scale the I-wide inner activation and not the D-wide output, so that their gradient is
    an inner product over I; the sorted copy of the tokens, k times as large as they are, is made again and not kept; indexing
    needs no atomic sums in either direction.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_ND: Tensor,
        weights_Nk: Tensor,
        order_M: Tensor,
        inverse_M: Tensor,
        offset_E: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        k = weights_Nk.shape[1]
        weight_M1 = weights_Nk.reshape(-1)[order_M].unsqueeze(1).to(x_ND.dtype)
        h_MJ = _grouped_mm(x_ND[order_M // k], gate_up.transpose(-2, -1), offs=offset_E)
        gate_MI, up_MI = h_MJ.chunk(2, dim=-1)
        y_MD = _grouped_mm(F.silu(gate_MI).mul_(up_MI).mul_(weight_M1), down.transpose(-2, -1), offs=offset_E)
        ctx.save_for_backward(x_ND, weights_Nk, weight_M1, order_M, inverse_M, offset_E, h_MJ, gate_up, down)
        return _sum_of_slots(y_MD, inverse_M, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_Nk, weight_M1, order_M, inverse_M, offset_E, h_MJ, gate_up, down = ctx.saved_tensors
        k = weights_Nk.shape[1]
        token_M = order_M // k
        gate_MI, up_MI = h_MJ.chunk(2, dim=-1)
        silu_MI = F.silu(gate_MI)
        dy_MD = grads[0].to(x_ND.dtype)[token_M]  # indexing makes it contiguous, as grouped products need
        grad_weights = grad_gate_up = grad_down = grad_x = None
        dscaled_MI = _grouped_mm(dy_MD, down, offs=offset_E)
        inner_MI = silu_MI * up_MI
        if ctx.needs_input_grad[1]:
            grad_weights = (dscaled_MI * inner_MI).sum(-1, dtype=weights_Nk.dtype)[inverse_M].view_as(weights_Nk)
        if ctx.needs_input_grad[6]:
            grad_down = _grouped_mm(dy_MD.t(), inner_MI.mul_(weight_M1), offs=offset_E)
        del dy_MD, inner_MI
        dinner_MI = dscaled_MI.mul_(weight_M1)
        dh_MJ = torch.empty_like(h_MJ)
        dgate_MI, dup_MI = dh_MJ.chunk(2, dim=-1)
        torch.mul(dinner_MI, silu_MI, out=dup_MI)
        dgate_MI.copy_(torch.ops.aten.silu_backward(dinner_MI.mul_(up_MI), gate_MI))
        if ctx.needs_input_grad[0]:
            grad_x = _sum_of_slots(_grouped_mm(dh_MJ, gate_up, offs=offset_E), inverse_M, k)
        if ctx.needs_input_grad[5]:
            grad_gate_up = _grouped_mm(dh_MJ.t(), x_ND[token_M], offs=offset_E)
        return grad_x, grad_weights, None, None, None, grad_gate_up, grad_down


def _sum_of_slots(y_MD: Tensor, inverse_M: Tensor, k: int) -> Tensor:
    """Back in the order of the tokens, the k rows of each summed in float32: (N, D)."""
    if k == 1:
        return y_MD[inverse_M]
    y_NkD = y_MD[inverse_M].view(-1, k, y_MD.shape[-1])
    return y_NkD.sum(1, dtype=torch.float32).to(y_MD.dtype)
