"""Tokens travel to the ranks that hold their experts, are computed there, and their results travel back.

Shape suffixes: N tokens of this rank, k experts of a token, M = N k assignments sorted by expert, R rows received, D width,
E experts, P ranks of the group, G = E / P experts of a rank.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.nn.sorted_rows import ExpertOrder, permute_rows, sort_by_expert

__all__ = ["Dispatcher", "ExpertLayer", "SortedExpertLayer"]

_IDLE, _DONE = -1, -2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AUTOCAST, _GRADIENTS = 4, 8


class ExpertLayer(Protocol):
    """A layer of routed experts, as expert parallelism takes it: everything of an expert lies at its index along dim 0.

    Attributes:
        num_experts: E.
        gate_up_proj: (E, 2 I, D).
        down_proj: (E, D, I).
    """

    num_experts: int
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(self, x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """``sum_j weights[n, j] expert_{ids[n, j]}(x[n])``, (N, D); any k, and weights of float32 or more."""


@runtime_checkable
class SortedExpertLayer(Protocol):
    """A layer of experts that need not sort rows whose order is known."""

    def forward_sorted(self, x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor, order: ExpertOrder | None) -> Tensor:
        """`ExpertLayer.forward`, with the order of the assignments by expert, then token."""
        ...


class _Plan(NamedTuple):
    """Counts that the ranks of a group have exchanged.

    Attributes:
        sent: rows that this rank sends to each rank.
        received: rows that it gets from each.
        count_PG: rows that it gets from each rank for each of its experts, int64.
        states: the layer that each rank computes, or that it does not.
        modes: in which type, see `_mode`.
    """

    sent: list[int]
    received: list[int]
    count_PG: Tensor
    states: list[int]
    modes: list[int]


class Dispatcher:
    """Computes layers of experts that are divided among the ranks of a group: rank p holds experts p G to (p + 1) G - 1.

    While it is installed, ``layer.forward`` takes tokens of this rank with ids of all experts, as before. All ranks of the
    group must run the same layers in the same order; without gradients, ranks that have nothing to compute can `serve`
    the others instead.

    Copies of a layer made meanwhile take part too, with their own weights, if all ranks make them in the same order.

    Each forward pass moves ``k N D`` numbers twice, backward as many, of which the share (P - 1) / P leaves the rank if
    experts are used evenly, and ``P (G + 2)`` integers that announce them.

    Args:
        layers: they hold this rank's experts only, and their ``num_experts`` is G.
        group: the ranks.
    """

    def __init__(self, layers: Sequence[ExpertLayer], group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self._layers: list[ExpertLayer] = []
        self._given = list(layers)
        self._most_experts = max(layer.num_experts for layer in layers)

    def install(self) -> None:
        """Take the place of the layers' ``forward``."""
        for layer in self._given:
            layer.forward = _Forward(self, layer)  # type: ignore[method-assign]

    def remove(self) -> list[ExpertLayer]:
        """Give the layers, and their copies, their own ``forward`` back; a collective of the group.

        Returns:
            All of them; without copies, and these left as they are, where ranks made unequally many.
        """
        device = self._given[0].gate_up_proj.device
        counts = torch.tensor([len(self._layers), -len(self._layers)], device=device)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=self.group)
        layers = list(self._layers) if counts.sum() == 0 else self._given
        self._layers.clear()
        for layer in layers:
            del layer.forward
        return layers

    def add(self, layer: ExpertLayer) -> int:
        """Take a layer in; its number, by which ranks tell which one they compute."""
        self._layers.append(layer)
        return len(self._layers) - 1

    def forward(self, number: int, x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """Output (N, D) of the layer of all experts for the tokens of this rank.

        Args:
            number: of the layer.
            x_ND: tokens.
            ids_Nk: their experts, 0 to E - 1.
            weights_Nk: weights of the sum, which is taken here, in float32 or more and in a fixed order.

        Raises:
            RuntimeError: ranks compute different layers or types, or some only `serve` while gradients are wanted.
        """
        device, dtype = x_ND.device.type, x_ND.dtype
        autocast = torch.is_autocast_enabled(device)
        if autocast:
            dtype = torch.get_autocast_dtype(device)
        (N, k), D = ids_Nk.shape, x_ND.shape[-1]
        order_M, inverse_M, offset_E = sort_by_expert(ids_Nk, self.size * self._layers[number].num_experts)
        count_E = offset_E.long().diff(prepend=offset_E.new_zeros(1))
        mode = _mode(dtype, autocast)
        plan = self._announce(count_E, number, mode)
        self._check(plan, number, mode)
        x_MD = permute_rows(x_ND.to(dtype)[:, None].expand(N, k, D).reshape(N * k, D), order_M, inverse_M)
        y_MD = self._there_and_back(number, x_MD, plan)
        y_NkD = permute_rows(y_MD, inverse_M, order_M).view(N, k, D)
        with torch.autocast(device, enabled=False):
            return (y_NkD.to(torch.promote_types(dtype, torch.float32)) * weights_Nk[..., None]).sum(1).to(dtype)

    @torch.no_grad()
    def serve(self, done: bool) -> None:
        """Compute for the other ranks' tokens.

        Args:
            done: whether until no rank has anything left; otherwise until no rank computes, so that ranks which do so
                between two collectives of all ranks leave together.
        """
        state = _DONE if done else _IDLE
        while True:
            zero_E = torch.zeros((), dtype=torch.int64, device=self._layers[0].gate_up_proj.device)
            plan = self._announce(zero_E.expand(self.size * self._layers[0].num_experts), state, 0)
            number = max(plan.states)
            if number < 0:
                if number == _DONE or not done:
                    return
                continue
            mode = plan.modes[plan.states.index(number)]
            self._check(plan, number, mode)
            dtype, autocast = _dtype(mode), bool(mode & _AUTOCAST)
            weight = self._layers[number].gate_up_proj
            with torch.autocast(weight.device.type, dtype=dtype if autocast else None, enabled=autocast):
                self._there_and_back(number, weight.new_empty(0, weight.shape[-1], dtype=dtype), plan)

    def _announce(self, count_E: Tensor, state: int, mode: int) -> _Plan:
        """Tell every rank how many rows it gets for each of its experts, and what this rank is doing."""
        count_PG = count_E.view(self.size, -1)
        G = count_PG.shape[1]
        given_PH = count_PG.new_empty(self.size, self._most_experts + 2)
        given_PH[:, :G] = count_PG
        given_PH[:, G:-2] = 0
        given_PH[:, -2] = state
        given_PH[:, -1] = mode
        got_PH = torch.empty_like(given_PH)
        dist.all_to_all_single(got_PH, given_PH, group=self.group)
        # The host must know the sizes of what follows: this is where it waits for the device.
        rows_P4 = torch.stack([given_PH[:, :-2].sum(1), got_PH[:, :-2].sum(1), got_PH[:, -2], got_PH[:, -1]])
        sent, received, states, modes = rows_P4.tolist()
        return _Plan(sent, received, got_PH[:, :-2], states, modes)

    def _check(self, plan: _Plan, number: int, mode: int) -> None:
        for rank, (state, other_mode) in enumerate(zip(plan.states, plan.modes, strict=True)):
            if state >= 0 and (state, other_mode) != (number, mode):
                raise RuntimeError(
                    f"Rank {rank} of the expert-parallel group computes layer {state} in {_described(other_mode)}, another rank"
                    f" layer {number} in {_described(mode)}: all must run the same layers in the same order."
                )
        if min(plan.states) < 0 and mode & _GRADIENTS:
            raise RuntimeError(
                f"Rank {plan.states.index(min(plan.states))} of the expert-parallel group runs no forward pass, but others do"
                " with gradients: all ranks need equally many training batches."
            )

    def _there_and_back(self, number: int, x_MD: Tensor, plan: _Plan) -> Tensor:
        """Rows that are sorted by expert, each put through its expert, (M, D); and others' rows through this rank's."""
        layer = self._layers[number]
        x_RD = _Exchange.apply(x_MD, plan.sent, plan.received, self.group)
        R = len(x_RD)
        if R:
            expert_PG = torch.arange(self._most_experts, device=x_RD.device).repeat(self.size)
            ids_R = expert_PG.repeat_interleave(plan.count_PG.reshape(-1), output_size=R)
            ones_R1 = torch.ones(R, 1, dtype=torch.promote_types(x_RD.dtype, torch.float32), device=x_RD.device)
            if isinstance(layer, SortedExpertLayer):
                order = _merged(plan.count_PG, layer.num_experts, R)
                y_RD = layer.forward_sorted(x_RD, ids_R[:, None], ones_R1, order).to(x_RD.dtype)
            else:
                y_RD = type(layer).forward(layer, x_RD, ids_R[:, None], ones_R1).to(x_RD.dtype)
        else:
            y_RD = _NoRows.apply(x_RD, layer.gate_up_proj, layer.down_proj)
        result: Tensor = _Exchange.apply(y_RD, plan.received, plan.sent, self.group)
        return result


class _Forward:
    """Stands in for a layer's ``forward``. Not compiled: sizes differ from call to call, and the host must know them."""

    def __init__(self, dispatcher: Dispatcher, layer: ExpertLayer) -> None:
        self.dispatcher = dispatcher
        self.layer = layer
        self.number = dispatcher.add(layer)

    @torch.compiler.disable
    def __call__(self, x_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        return self.dispatcher.forward(self.number, x_ND, ids_Nk, weights_Nk)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        return _Forward(self.dispatcher, copy.deepcopy(self.layer, memo))


def _mode(dtype: torch.dtype, autocast: bool) -> int:
    """Way of computing rows, as a number: their type, autocast, gradients."""
    if dtype not in _DTYPES:
        raise ValueError(f"Expert parallelism knows tokens of {', '.join(map(str, _DTYPES))}, not of {dtype}.")
    return _DTYPES.index(dtype) + _AUTOCAST * autocast + _GRADIENTS * torch.is_grad_enabled()


def _dtype(mode: int) -> torch.dtype:
    return _DTYPES[mode % _AUTOCAST]


def _described(mode: int) -> str:
    return f"{_dtype(mode)}{' by autocast' if mode & _AUTOCAST else ''} with{'' if mode & _GRADIENTS else 'out'} gradients"


def _merged(count_PG: Tensor, num_experts: int, num_rows: int) -> ExpertOrder:
    """Order by expert, then rank, of rows that came from each rank sorted by expert.

    Args:
        count_PG: rows of each rank and expert; 0 for experts that the layer has not.
        num_experts: of the layer.
        num_rows: R.
    """
    count_GP = count_PG.t().reshape(-1)
    first_GP = (count_PG.reshape(-1).cumsum(0).view_as(count_PG) - count_PG).t().reshape(-1)
    end_GP = count_GP.cumsum(0)
    place_R = torch.arange(num_rows, device=count_PG.device)
    order_R = place_R + (first_GP - end_GP + count_GP).repeat_interleave(count_GP, output_size=num_rows)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, place_R)
    return ExpertOrder(order_R, inverse_R, end_GP.view(-1, len(count_PG))[:num_experts, -1].int())


class _Exchange(torch.autograd.Function):
    """Rows for each rank, one after another, against those of each rank for this one; its gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = (received, sent, group)
        y = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grads[0], *ctx.way_back), None, None, None


class _NoRows(torch.autograd.Function):
    """The result for no rows. Its backward still reaches the exchange, where others wait, and gives the weights a gradient, 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return grads[0], *(torch.zeros_like(weight) if need else None for weight, need in needed)
