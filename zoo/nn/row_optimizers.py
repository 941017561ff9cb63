"""Optimizers of tables, in which the update of a row depends on that row alone, so that rows may lie on any rank.

Shape suffixes: V rows of a table, U rows that have a gradient, D size of a row.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from typing_extensions import override

__all__ = ["RowAdagrad", "RowsAndRest", "row_groups", "row_optimizer", "takes_sparse", "updates_by_row"]

# Those of torch whose update of a number depends on that number's gradients alone, besides counts of steps.
_BY_NUMBER = (
    optim.ASGD, optim.SGD, optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam,
    optim.RMSprop, optim.Rprop, optim.SparseAdam,
)  # fmt: skip


class RowAdagrad(Optimizer):
    """Adagrad with one step size a row: ``s_r += mean_d g_rd^2``, ``row_r -= lr g_r / (sqrt(s_r) + eps)``.

    Keeps one number a row. Rows without gradient stay as they are, bit for bit. Dense gradients and sparse ones give the same.
    Of tensors of one dimension each number is a row.
    Source: row-wise Adagrad of DLRM's training (github.com/facebookresearch/dlrm).

    Args:
        params: Tables, or groups of them.
        lr: Learning rate.
        eps: Added to the root.

    Raises:
        ValueError: A number is not positive.

    Example:
        >>> table = nn.Parameter(torch.zeros(2, 4))
        >>> table.grad = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
        >>> RowAdagrad([table], lr=0.5).step()
        >>> table.tolist()
        [[-0.5, -0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01, eps: float = 1e-8) -> None:
        if lr <= 0 or eps <= 0:
            raise ValueError(f"RowAdagrad: lr={lr} and eps={eps} must be positive.")
        super().__init__(params, {"lr": lr, "eps": eps})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all rows that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, group["lr"], group["eps"])
        return loss

    def _update(self, table: Tensor, lr: float, eps: float) -> None:
        state, gradient = self.state[table], table.grad
        assert gradient is not None
        if not state:
            state["sum"] = table.new_zeros(len(table))
        sum_V = state["sum"]
        if not gradient.is_sparse:
            sum_V.add_(_mean_square(gradient))
            table.sub_(lr * gradient / _broadcast(sum_V.sqrt().add_(eps), table))
            return
        gradient = gradient.coalesce()
        ids_U, values_UD = gradient._indices()[0], gradient._values()
        sum_U = sum_V[ids_U].add_(_mean_square(values_UD))
        sum_V[ids_U] = sum_U
        table[ids_U] = table[ids_U].sub_(lr * values_UD / _broadcast(sum_U.sqrt_().add_(eps), table))


def _mean_square(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(1) if values.dim() > 1 else values.square()


def _broadcast(numbers: Tensor, table: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (table.dim() - 1))


class RowsAndRest(Optimizer):
    """Two optimizers as one: one of the groups that are marked ``rows``, one of all others; see `row_groups`.

    Schedules change the rates of both, and a checkpoint holds the state of both.

    Args:
        params: Groups, some of which have the entry ``"rows": True``.
        rows: Makes the optimizer of tables.
        rest: Makes the other.

    Raises:
        ValueError: There are no marked groups, or no others.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rows: Callable[[Iterable[Any]], Optimizer] = RowAdagrad,
        rest: Callable[[Iterable[Any]], Optimizer] = optim.Adam,
    ) -> None:
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        marked, others = ([group for group in groups if bool(group.get("rows")) is mark] for mark in (True, False))
        if not marked or not others:
            raise ValueError(
                "RowsAndRest needs parameter groups with rows=True and others, as zoo.nn.row_optimizers.row_groups gives them"
                " for a module with tables and other parameters."
            )
        self.parts = [rows(marked), rest(others)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the two work on this one's groups and state."""
        start = 0
        for part in self.parts:
            part.state = self.state
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            start += len(part.param_groups)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))
        self._share()

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def row_groups(tables: Iterable[nn.Parameter], parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for `RowsAndRest`: tables, marked, then the others; groups that would be empty are left out.

    Args:
        tables: Those of a module.
        parameters: All that are trained, tables among them.
    """
    of_tables, trained = {id(table) for table in tables}, list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in of_tables], "rows": True},
        {"params": [p for p in trained if id(p) not in of_tables]},
    ]
    return [group for group in groups if group["params"]]


def row_optimizer(optimizer: Optimizer, table: Tensor) -> Optimizer | None:
    """The optimizer, or that part of it, which updates a table; None: none does."""
    for part in optimizer.parts if isinstance(optimizer, RowsAndRest) else [optimizer]:
        if any(p is table for group in part.param_groups for p in group["params"]):
            return part
    return None


def updates_by_row(optimizer: Optimizer) -> bool:
    """Whether the update of a row depends on that row alone; of classes of one's own if they say ``updates_by_row = True``."""
    return isinstance(optimizer, (RowAdagrad, *_BY_NUMBER)) or getattr(optimizer, "updates_by_row", False) is True


def takes_sparse(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes sparse gradients and leaves rows without one as they are."""
    plain = not any(group.get("momentum") or group.get("weight_decay") for group in optimizer.param_groups)
    return isinstance(optimizer, RowAdagrad | optim.SparseAdam) or (isinstance(optimizer, optim.SGD | optim.Adagrad) and plain)
