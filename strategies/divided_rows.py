"""Rows of parameters divided among the ranks of a group: experts of a layer, rows of an embedding table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

__all__ = ["DividedRows", "Layout"]

Layout = Literal["block", "mod"]
_IGNORED = "_ddp_params_and_buffers_to_ignore"


class DividedRows:
    """Parameters of a module of which each rank of a group keeps some rows (indices of dim 0).

    Of n rows, rank p of P keeps ``ceil((n - p) / P)``: consecutive ones (``block``), or p, p + P, p + 2 P, ... (``mod``).

    In memory are parts; on disk everything is whole, and so a checkpoint continues under any number of ranks and any strategy:
    `whole_weights` and `whole_state` make it so, `part_of_weights` and `part_of_state` take this rank's part.

    Args:
        module: Has the parameters.
        parameters: Those to divide.
        group: The ranks.
        device: Where tensors must lie to be communicated.
        layout: Which rows a rank keeps.

    Raises:
        ValueError: A parameter has fewer rows than the group has ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        device: torch.device,
        layout: Layout = "block",
    ) -> None:
        self.group = group
        self.device = device
        self.layout = layout
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.parameters = list({id(parameter): parameter for parameter in parameters}.values())
        self._num_rows = {id(parameter): len(parameter) for parameter in self.parameters}
        self._num_rows_of = {
            name: self._num_rows[id(parameter)]
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if self.holds(parameter)
        }
        for name, num_rows in self._num_rows_of.items():
            if num_rows < self.size:
                raise ValueError(f"{name} has {num_rows} rows, which cannot be divided among {self.size} ranks: keep it whole.")

    @property
    def names(self) -> list[str]:
        """Names of the parameters that are divided."""
        return list(self._num_rows_of)

    def holds(self, parameter: Tensor) -> bool:
        """Whether a parameter is divided."""
        return id(parameter) in self._num_rows

    def rows(self, num_rows: int, rank: int) -> slice:
        """Rows that a rank of the group keeps."""
        if self.layout == "mod":
            return slice(rank, num_rows, self.size)
        few, more = divmod(num_rows, self.size)
        start = rank * few + min(rank, more)
        return slice(start, start + few + (rank < more))

    def places(self, rows_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Where rows are: the ranks that keep them, and their places there, both int64 (N,).

        Args:
            rows_N: Rows, int64.
            num_rows: Of the parameter.
        """
        if self.layout == "mod":
            return rows_N % self.size, rows_N // self.size
        few, more = divmod(num_rows, self.size)
        longer = more * (few + 1)  # rows of the ranks that keep one more
        owner_N = torch.where(rows_N < longer, rows_N // (few + 1), (rows_N - longer) // few + more)
        return owner_N, rows_N - owner_N * few - owner_N.clamp(max=more)

    # Parameters

    @torch.no_grad()
    def divide(self) -> None:
        """Keep this rank's rows of the parameters as the first of all ranks has them; a collective call of all ranks."""
        for parameter in self.parameters:
            whole = parameter.detach().to(self.device).contiguous()
            dist.broadcast(whole, src=0)
            parameter.grad = None
            parameter.data = self._part(whole).to(parameter.device)

    @torch.no_grad()
    def unite(self) -> None:
        """Give every rank all rows again; a collective call of the group."""
        for parameter in self.parameters:
            self.unite_parameter(parameter, self._num_rows[id(parameter)])

    def unite_parameter(self, parameter: nn.Parameter, num_rows: int) -> None:
        """Give every rank all rows of a parameter, which may be a copy of a divided one; nothing to do if it is whole."""
        if len(parameter) == num_rows:
            return
        part = self._padded(parameter.detach().to(self.device), num_rows)
        gathered = part.new_empty(self.size * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part, group=self.group)
        if self.layout == "mod" or len(gathered) > num_rows:
            gathered = self._joined(gathered.chunk(self.size), num_rows)
        parameter.grad = None
        parameter.data = gathered.to(parameter.device)

    def hide_from_ddp(self, module: nn.Module) -> None:
        """Keep ``DistributedDataParallel`` and Lightning from reducing and broadcasting the divided parameters."""
        setattr(module, _IGNORED, self.names)

    def show_to_ddp(self, module: nn.Module) -> None:
        """Undo `hide_from_ddp`."""
        vars(module).pop(_IGNORED, None)

    # Gradients

    def gradient_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """2-norm of the gradients of parameters, divided and others together, 0-dim; a collective call of the group."""
        divided: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is not None:
                (divided if self.holds(parameter) else others).append(_numbers(parameter))
        square, square_of_divided = (
            norm.to(self.device, torch.promote_types(norm.dtype, torch.float32)).square()
            for norm in (get_total_norm(others), get_total_norm(divided))
        )
        dist.all_reduce(square_of_divided, group=self.group)
        return (square + square_of_divided).sqrt()

    @torch.no_grad()
    def clip_gradients(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """Clip the gradients of parameters, divided and others, by their one norm; a collective call of the group."""
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        factor = (max_norm / (self.gradient_norm(trained) + 1e-6)).clamp(max=1.0)
        for numbers in map(_numbers, trained):
            numbers.mul_(factor.to(numbers.device))

    # Checkpoints

    def part_of_weights(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint with this rank's rows, wherever it has weights by name, of the module or a part of it."""
        return self._map_weights(checkpoint, self._part_of)

    def check_weights(self, weights: Mapping[str, Any], source: object) -> None:
        """Refuse the weights of a module, whole, that have other numbers of rows.

        Raises:
            ValueError: One has, its name and both numbers are given.
        """
        for name, num_rows in self._num_rows_of.items():
            if name in weights and len(weights[name]) != num_rows:
                raise ValueError(
                    f"{source} has {len(weights[name])} rows of {name}, the module {num_rows}: build the module with the"
                    " sizes of the checkpoint."
                )

    def whole_weights(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint with all rows in the group's first rank (the others keep theirs); a collective call of the group."""
        return self._map_weights(checkpoint, self._whole_of)

    def _map_weights(self, checkpoint: Mapping[str, Any], convert: Callable[[Any, int], Any]) -> dict[str, Any]:
        # Averages and references are stored beside the weights, some by a part of the module with names of its own.
        ends = {name[start:]: num_rows for name, num_rows in self._num_rows_of.items() for start in _starts(name)}
        return {
            key: {name: convert(x, ends[name]) if name in ends else x for name, x in value.items()}
            if isinstance(value, dict) and ends.keys() & value.keys()
            else value
            for key, value in checkpoint.items()
        }

    def part_of_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """State of an optimizer, with this rank's rows of what belongs to divided parameters."""
        return self._map_state(optimizer, state, self._part_of)

    def whole_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """State of an optimizer, whole in the group's first rank (the others keep theirs); a collective call of the group."""
        return self._map_state(optimizer, state, self._whole_of)

    def _map_state(self, optimizer: Optimizer, state: Mapping[str, Any], convert: Callable[[Any, int], Any]) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        of_parameter = dict(state["state"])
        for number, parameter in enumerate(parameters):
            if self.holds(parameter) and number in of_parameter:
                num_rows = self._num_rows[id(parameter)]
                of_parameter[number] = {key: convert(value, num_rows) for key, value in of_parameter[number].items()}
        return {**state, "state": of_parameter}

    # Tensors

    def _part_of(self, value: Any, num_rows: int) -> Any:
        return self._part(value) if isinstance(value, Tensor) and value.dim() and len(value) == num_rows else value

    def _whole_of(self, value: Any, num_rows: int) -> Any:
        rows = self.rows(num_rows, self.rank)
        is_part = isinstance(value, Tensor) and value.dim() and len(value) == len(range(num_rows)[rows])
        return self._whole(value, num_rows) if is_part else value

    def _part(self, whole: Tensor) -> Tensor:
        return whole[self.rows(len(whole), self.rank)].clone()

    def _whole(self, part: Tensor, num_rows: int) -> Tensor:
        local = self._padded(part.detach().to(self.device), num_rows)
        parts = [torch.empty_like(local) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(local, parts, group=self.group, group_dst=0)
        return part if parts is None else self._joined([each.cpu() for each in parts], num_rows)

    def _padded(self, part: Tensor, num_rows: int) -> Tensor:
        """As many rows as the first rank has: what is gathered has the same shape on all ranks."""
        most = -(-num_rows // self.size)
        return part.contiguous() if len(part) == most else torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])

    def _joined(self, parts: Sequence[Tensor], num_rows: int) -> Tensor:
        whole = parts[0].new_empty(num_rows, *parts[0].shape[1:])
        for rank, part in enumerate(parts):
            rows = self.rows(num_rows, rank)
            whole[rows] = part[: len(range(num_rows)[rows])]
        return whole


def _starts(name: str) -> list[int]:
    """Possible starts of a parameter's name for a part of the module: each module above it."""
    starts = [0, *(i + 1 for i, char in enumerate(name) if char == ".")]
    return starts[:-1] or starts


def _numbers(parameter: Tensor) -> Tensor:
    """The numbers of a parameter's gradient, in place; of a sparse one those that are stored, each row once."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad._values()
