"""Routed experts: every token visits its k experts, none is dropped; the sum over them is deterministic.

Shape suffixes: N tokens, k experts of a token, M = N k assignments sorted by expert, D width, I width of an expert, E experts.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.nn.sorted_rows import ExpertOrder, permute_rows, sort_by_expert

__all__ = ["Backend", "Experts", "choose_backend"]

Backend = Literal["auto", "grouped", "loop", "batched"]

_grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm
_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEW_ASSIGNMENTS = 16
FEW_COMPILED = 256
_BLOCK_BYTES = 1 << 20
"""Inner activations of a block of experts on a CPU: about half of a core's second cache."""
_LARGE_BYTES = 8 << 20
"""Inner activations of all experts above which blocks pay."""


def _fits_grouped(hidden_size: int, width: int, dtype: torch.dtype) -> bool:
    """Whether grouped products take the type, and rows of these sizes: whole multiples of 16 bytes."""
    return dtype in _GROUPED_TYPES and not (hidden_size * dtype.itemsize % 16 or width * dtype.itemsize % 16)


def choose_backend(num_assignments: int, hidden_size: int, width: int, dtype: torch.dtype, device_type: str = "cuda") -> Backend:
    """The backend of ``auto``: ``batched`` for a few assignments on a GPU, ``grouped`` where its rules allow, else ``loop``.

    On a CPU gathered weights cost more than any number of small products. To a compiler grouped products are opaque but for
    bfloat16, and a loop over experts would have to know how many tokens each has: then ``batched`` for up to `FEW_COMPILED`
    assignments.

    Args:
        num_assignments: M.
        hidden_size: D.
        width: I.
        dtype: of the products.
        device_type: type of their device.
    """
    fits = _fits_grouped(hidden_size, width, dtype)
    if torch.compiler.is_compiling() and num_assignments <= FEW_COMPILED and not (fits and dtype == torch.bfloat16):
        return "batched"
    if not fits:
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
        if backend == "grouped" and not _fits_grouped(hidden_size, width, torch.float32):
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

        Raises:
            ValueError: ``grouped`` with a type or sizes that it cannot take.
        """
        return self.forward_sorted(x_ND, ids_Nk, weights_Nk, None)

    def forward_sorted(self, x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor, order: ExpertOrder | None) -> Tensor:
        """`forward` of assignments whose order by expert is known: nothing is sorted again.

        Args:
            x_ND: as for `forward`.
            ids_Nk: as for `forward`.
            weights_Nk: as for `forward`.
            order: that of `sort_by_expert`; None: unknown.
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
            order_M, inverse_M, offset_E = order or sort_by_expert(ids_Nk, self.num_experts)
            if backend == "loop":
                return _loop(x_ND, weights_Nk, order_M, inverse_M, offset_E, gate_up, down)
            large = order_M.numel() * gate_up.shape[1] * dtype.itemsize > _LARGE_BYTES
            blocked = large and x_ND.device.type == "cpu" and not torch.compiler.is_compiling()
            if not (blocked or torch.compiler.is_compiling() or _fits_grouped(x_ND.shape[-1], down.shape[-1], dtype)):
                raise ValueError(
                    f"experts='grouped' takes float32, bfloat16 or float16 and rows of whole 16 bytes, not {dtype} with"
                    f" hidden_size={x_ND.shape[-1]} and moe_intermediate_size={down.shape[-1]}: choose experts='auto'."
                )
            function = _Blocked if blocked else _Grouped
            result: Tensor = function.apply(x_ND, weights_Nk, order_M, inverse_M, offset_E, gate_up, down)
            return result


def _loop(
    x_ND: Tensor, weights_Nk: Tensor, order_M: Tensor, inverse_M: Tensor, offset_E: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    N, k = weights_Nk.shape
    x_MD = permute_rows(x_ND[:, None].expand(N, k, -1).flatten(0, 1), order_M, inverse_M)
    parts = []
    # `unbind` and no `weight[e]`, each of which would make a gradient of the size of all experts.
    for x_mD, w13, w2 in zip(x_MD.split(_counts(offset_E)), gate_up.unbind(0), down.unbind(0), strict=True):
        if len(x_mD) or not len(x_MD):  # without any token all take part, and have gradients of zero
            gate, up = F.linear(x_mD, w13).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, w2))
    y_NkD = permute_rows(torch.cat(parts), inverse_M, order_M).view(N, k, x_ND.shape[1])
    accurate = torch.promote_types(x_ND.dtype, torch.float32)
    return (y_NkD.to(accurate) * weights_Nk[..., None]).sum(1).to(x_ND.dtype)


def _batched(x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    N, k = ids_Nk.shape
    flat_M = ids_Nk.reshape(-1)
    x_MD1 = x_ND[:, None].expand(N, k, -1).flatten(0, 1).unsqueeze(-1)
    gate, up = torch.bmm(gate_up[flat_M], x_MD1).chunk(2, dim=1)
    y_NkD = torch.bmm(down[flat_M], F.silu(gate) * up).view(N, k, x_ND.shape[1])
    accurate = torch.promote_types(x_ND.dtype, torch.float32)
    return (y_NkD.to(accurate) * weights_Nk[..., None]).sum(1).to(x_ND.dtype)


class _Grouped(torch.autograd.Function):
    """All experts in one product each way, with a gradient of its own.

    What it saves: the gradient of the routing weights is an inner product over I instead of D; the sorted copy of the tokens,
    k times as large as they are, is made again on a GPU and not kept; rows are put back, weighted and summed in one pass; nothing
    needs atomic sums in either direction.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_Nk: Tensor,
        order_M: Tensor,
        inverse_M: Tensor,
        offset_E: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        token_M = order_M // weights_Nk.shape[1]
        x_MD = x_ND.index_select(0, token_M)
        h_MJ = _product(x_MD, gate_up.transpose(-2, -1), offset_E)
        gate_MI, up_MI = h_MJ.chunk(2, dim=-1)
        y_MD = _product(F.silu(gate_MI).mul_(up_MI), down.transpose(-2, -1), offset_E)
        kept = x_MD if x_ND.device.type == "cpu" else None  # there is memory enough, and little time
        ctx.save_for_backward(x_ND, kept, weights_Nk, order_M, inverse_M, token_M, offset_E, h_MJ, gate_up, down)
        return _sum_of_slots(y_MD, inverse_M, weights_Nk.shape[1], weights_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, x_MD, weights_Nk, order_M, inverse_M, token_M, offset_E, h_MJ, gate_up, down = ctx.saved_tensors
        gate_MI, up_MI = h_MJ.chunk(2, dim=-1)
        weight_M1 = weights_Nk.reshape(-1, 1).index_select(0, order_M)
        dy_MD = grads[0].to(x_ND.dtype).index_select(0, token_M)  # contiguous, as grouped products need
        grad_weights = grad_gate_up = grad_down = grad_x = None
        dinner_MI = _product(dy_MD, down, offset_E)
        silu_MI = F.silu(gate_MI)
        inner_MI = silu_MI * up_MI
        if ctx.needs_input_grad[1]:
            dots_M = (dinner_MI * inner_MI).sum(-1, dtype=weights_Nk.dtype)
            grad_weights = dots_M.index_select(0, inverse_M).view_as(weights_Nk)
        if ctx.needs_input_grad[6]:
            grad_down = _product(dy_MD.t(), inner_MI.mul_(weight_M1), offset_E)
        del dy_MD, inner_MI
        dh_MJ = _gradient_of_swiglu(dinner_MI.mul_(weight_M1), silu_MI, h_MJ)
        if ctx.needs_input_grad[0]:
            grad_x = _sum_of_slots(_product(dh_MJ, gate_up, offset_E), inverse_M, weights_Nk.shape[1])
        if ctx.needs_input_grad[5]:
            grad_gate_up = _product(dh_MJ.t(), x_ND.index_select(0, token_M) if x_MD is None else x_MD, offset_E)
        return grad_x, grad_weights, None, None, None, grad_gate_up, grad_down


class _Blocked(torch.autograd.Function):
    """The same for a CPU: experts a few at a time, so that what is between two products stays in the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_Nk: Tensor,
        order_M: Tensor,
        inverse_M: Tensor,
        offset_E: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        M, D, width = len(order_M), x_ND.shape[1], down.shape[2]
        token_M = order_M // weights_Nk.shape[1]
        counts = _counts(offset_E)
        blocks = _blocks(counts, _BLOCK_BYTES // (2 * width * x_ND.element_size()))
        most = max(stop - start for _, _, start, stop in blocks)
        x_RD, inner_RI = x_ND.new_empty(most, D), x_ND.new_empty(most, width)  # R rows of a block
        h_MJ, y_MD = x_ND.new_empty(M, 2 * width), x_ND.new_empty(M, D)
        for first, last, start, stop in blocks:
            experts, rows, count = slice(first, last), slice(start, stop), counts[first:last]
            gate_RI, up_RI = h_MJ[rows].chunk(2, dim=-1)
            x_mD, inner_mI = x_RD[: stop - start], inner_RI[: stop - start]
            torch.index_select(x_ND, 0, token_M[rows], out=x_mD)
            _products(x_mD, gate_up[experts].transpose(-2, -1), count, h_MJ[rows])
            torch.ops.aten.silu.out(gate_RI, out=inner_mI).mul_(up_RI)
            _products(inner_mI, down[experts].transpose(-2, -1), count, y_MD[rows])
        ctx.save_for_backward(x_ND, weights_Nk, order_M, inverse_M, token_M, h_MJ, gate_up, down)
        ctx.counts, ctx.blocks, ctx.most = counts, blocks, most
        return _sum_of_slots(y_MD, inverse_M, weights_Nk.shape[1], weights_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_Nk, order_M, inverse_M, token_M, h_MJ, gate_up, down = ctx.saved_tensors
        k, width = weights_Nk.shape[1], down.shape[2]
        for_x, for_weights, *_, for_gate_up, for_down = ctx.needs_input_grad
        dout_ND = grads[0].to(x_ND.dtype).contiguous()
        weight_M1 = weights_Nk.reshape(-1, 1).index_select(0, order_M)
        dots_M = weights_Nk.new_empty(len(order_M))
        dx_MD = x_ND.new_empty(len(order_M), x_ND.shape[1]) if for_x else None
        grad_gate_up = torch.empty_like(gate_up) if for_gate_up else None
        grad_down = torch.empty_like(down) if for_down else None
        x_RD, dh_RJ = x_ND.new_empty(ctx.most, x_ND.shape[1]), x_ND.new_empty(ctx.most, 2 * width)
        work_3RI = x_ND.new_empty(3, ctx.most, width)
        for first, last, start, stop in ctx.blocks:
            experts, rows, count = slice(first, last), slice(start, stop), ctx.counts[first:last]
            gate_mI, up_mI = h_MJ[rows].chunk(2, dim=-1)
            x_mD, dh_mJ, weight_m1 = x_RD[: stop - start], dh_RJ[: stop - start], weight_M1[rows]
            silu_mI, inner_mI, dinner_mI = work_3RI[:, : stop - start].unbind(0)
            dgate_mI, dup_mI = dh_mJ.chunk(2, dim=-1)
            torch.index_select(dout_ND, 0, token_M[rows], out=x_mD)
            _products(x_mD, down[experts], count, dinner_mI)
            torch.ops.aten.silu.out(gate_mI, out=silu_mI)
            torch.mul(silu_mI, up_mI, out=inner_mI)
            if for_weights:
                torch.sum(torch.mul(dinner_mI, inner_mI, out=dup_mI), -1, dtype=dots_M.dtype, out=dots_M[rows])
            if grad_down is not None:
                _outer_products(x_mD, inner_mI.mul_(weight_m1), count, grad_down[experts])
            torch.mul(dinner_mI.mul_(weight_m1), silu_mI, out=dup_mI)
            torch.ops.aten.silu_backward.grad_input(dinner_mI.mul_(up_mI), gate_mI, grad_input=dgate_mI)
            if dx_MD is not None:
                _products(dh_mJ, gate_up[experts], count, dx_MD[rows])
            if grad_gate_up is not None:
                torch.index_select(x_ND, 0, token_M[rows], out=x_mD)
                _outer_products(dh_mJ, x_mD, count, grad_gate_up[experts])
        grad_weights = dots_M.index_select(0, inverse_M).view_as(weights_Nk) if for_weights else None
        grad_x = _sum_of_slots(dx_MD, inverse_M, k) if dx_MD is not None else None
        return grad_x, grad_weights, None, None, None, grad_gate_up, grad_down


def _counts(offset_E: Tensor) -> list[int]:
    """Number of assignments of each expert, on the host."""
    offsets = offset_E.tolist()
    return [end - begin for begin, end in zip([0, *offsets], offsets, strict=False)]


def _blocks(counts: list[int], most: int) -> list[tuple[int, int, int, int]]:
    """Neighbouring experts with no more than ``most`` rows together (or one expert with more): first and last + 1 of the
    experts, first and last + 1 of their rows."""
    blocks = []
    first = start = stop = 0
    for expert, count in enumerate(counts):
        if stop > start and stop + count - start > most:
            blocks.append((first, expert, start, stop))
            first, start = expert, stop
        stop += count
    return [*blocks, (first, len(counts), start, stop)]


def _products(x_MA: Tensor, weight_EAB: Tensor, counts: list[int], out_MB: Tensor) -> None:
    """Rows of each expert times its matrix."""
    for x_mA, weight_AB, out_mB in zip(x_MA.split(counts), weight_EAB.unbind(0), out_MB.split(counts), strict=True):
        if len(x_mA):
            torch.mm(x_mA, weight_AB, out=out_mB)


def _outer_products(x_MA: Tensor, y_MB: Tensor, counts: list[int], out_EAB: Tensor) -> None:
    """For each expert the sum of outer products of its rows; 0 where it has none."""
    for x_Am, y_mB, out_AB in zip(x_MA.t().split(counts, 1), y_MB.split(counts), out_EAB.unbind(0), strict=True):
        if len(y_mB):
            torch.mm(x_Am, y_mB, out=out_AB)
        else:
            out_AB.zero_()


def _product(a: Tensor, b: Tensor, offset_E: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm`, in a compiled graph too where that knows the type only outside of one."""
    if torch.compiler.is_compiling() and (a.device.type == "cpu" or a.dtype != torch.bfloat16):
        return _opaque_product(a, b, offset_E)
    return _grouped_mm(a, b, offs=offset_E)


@torch.library.custom_op("zoo::expert_product", mutates_args=())
def _opaque_product(a: Tensor, b: Tensor, offset_E: Tensor) -> Tensor:
    if a.device.type != "cpu":
        return _grouped_mm(a, b, offs=offset_E)
    counts = _counts(offset_E)
    out = a.new_empty(*([len(counts), len(a)] if b.dim() == 2 else [len(a)]), b.shape[-1])
    if b.dim() == 2:
        _outer_products(a.t(), b, counts, out)
    else:
        _products(a, b, counts, out)
    return out


@_opaque_product.register_fake
def _(a: Tensor, b: Tensor, offset_E: Tensor) -> Tensor:
    return a.new_empty(*([len(offset_E), len(a)] if b.dim() == 2 else [len(a)]), b.shape[-1])


def _gradient_of_swiglu(dinner_MI: Tensor, silu_MI: Tensor, h_MJ: Tensor) -> Tensor:
    """Gradient of gate and up, side by side; overwrites ``dinner_MI``."""
    gate_MI, up_MI = h_MJ.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # which fuses it, but cannot write to half of a tensor
        return torch.cat([torch.ops.aten.silu_backward(dinner_MI * up_MI, gate_MI), dinner_MI * silu_MI], dim=-1)
    dh_MJ = torch.empty_like(h_MJ)
    dgate_MI, dup_MI = dh_MJ.chunk(2, dim=-1)
    torch.mul(dinner_MI, silu_MI, out=dup_MI)
    torch.ops.aten.silu_backward.grad_input(dinner_MI.mul_(up_MI), gate_MI, grad_input=dgate_MI)
    return dh_MJ


def _sum_of_slots(y_MD: Tensor, inverse_M: Tensor, k: int, weights_Nk: Tensor | None = None) -> Tensor:
    """Back in the order of the tokens, the k rows of each weighted and summed: (N, D)."""
    if not torch.compiler.is_compiling():  # gathers and sums in one pass, in float32
        row_Nk = inverse_M.view(-1, k)
        if weights_Nk is None:
            return F.embedding_bag(row_Nk, y_MD, mode="sum")
        exact_Nk = weights_Nk.detach()  # with a gradient, it would prepare for one
        weights = exact_Nk.to(y_MD.dtype)
        if (
            y_MD.dtype.itemsize < 4
        ):  # weights must have the type of the rows: in half precision each comes as two that add up to it
            weights = torch.stack([weights, (exact_Nk - weights).to(y_MD.dtype)], dim=-1).flatten(1)
            row_Nk = row_Nk.repeat_interleave(2, dim=1)
        return F.embedding_bag(row_Nk, y_MD, mode="sum", per_sample_weights=weights)
    y_NkD = y_MD[inverse_M].view(-1, k, y_MD.shape[-1]).to(torch.promote_types(y_MD.dtype, torch.float32))
    if weights_Nk is not None:
        y_NkD = y_NkD * weights_Nk[..., None]
    return y_NkD.sum(1).to(y_MD.dtype)
