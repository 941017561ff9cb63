"""Units: parameters that lie in one flat buffer, are gathered, reduced and updated together."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.paro.grid import RankGrid, Work
from strategies.paro.partition import Granularity, Partition
from strategies.paro.precision import StatePrecision
from strategies.paro.released import released_class

__all__ = ["ROOT", "FlatUnit", "Slot", "UnitPlan", "find_blocks", "plan_units", "shard_range"]

ROOT = "root"
SMALLEST_SHARE = 32


@dataclass(frozen=True)
class Slot:
    """Place of a parameter in the flat buffer of its unit.

    Attributes:
        name: first name of the parameter in the module.
        parameter: the user's own object.
        shape: of it.
        start: offset of its first element.
        stop: offset behind its last one.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    start: int
    stop: int


@dataclass(frozen=True)
class UnitPlan:
    """The parameters of a unit: those of one block, one group of the optimizer, one format [spec: paper section 3.1.2].

    Attributes:
        name: path of the block, or ``root``, the optimizer's group (``frozen`` for parameters that are not trained), the format.
        block: the module whose call needs them; None for the root, which is needed from the begin of a step to its end.
        group: index of the optimizer's group; None: not trained, so there are no gradient and no master.
        parameters: names and parameters.
    """

    name: str
    block: nn.Module | None
    group: int | None
    parameters: tuple[tuple[str, nn.Parameter], ...]


def find_blocks(root: nn.Module, classes: Iterable[str] = ()) -> list[nn.Module]:
    """The parts of a network that are gathered one after the other, in the order in which they were registered.

    Args:
        root: the network.
        classes: names of their classes; default: the entries of the outermost module lists, of those that can be called.

    Raises:
        ValueError: no part of the network has one of the classes.
    """
    wanted = set(classes)
    found: list[nn.Module] = []

    def visit(module: nn.Module, listed: bool) -> None:
        for child in module.children():
            is_block = type(child).__name__ in wanted if wanted else listed and _is_callable(child)
            if is_block:
                found.append(child)
            else:
                visit(child, isinstance(child, nn.ModuleList))

    visit(root, isinstance(root, nn.ModuleList))
    missing = wanted - {type(block).__name__ for block in found}
    if missing:
        raise ValueError(
            f"block_classes: {type(root).__name__} has no parts of class {', '.join(sorted(missing))}; it has"
            f" {', '.join(sorted({type(module).__name__ for module in root.modules()}))}."
        )
    return list(dict.fromkeys(found))


def _is_callable(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is not nn.Module.forward


def plan_units(
    root: nn.Module, blocks: Sequence[nn.Module], groups: Sequence[Sequence[Tensor]], min_unit_params: int = 0
) -> list[UnitPlan]:
    """Every parameter of a network in exactly one unit; those of the root come last.

    A parameter that several blocks share, or that is used outside of its block too (tied weights), belongs to the root, and so
    do blocks of fewer than ``min_unit_params`` parameters. What one group of the optimizer has of a block, such as gains that do
    not decay, belongs to the root as well where it is less than a `SMALLEST_SHARE`-th of the block: a collective of its own would
    take longer than the root's takes with it.

    Args:
        root: the network.
        blocks: its blocks, none inside another.
        groups: parameters of each group of the optimizer.
        min_unit_params: smallest number of parameters of a block of its own.

    Raises:
        ValueError: a block lies outside of the network or inside another one; the optimizer has a parameter that the network
            has not.
    """
    paths = {module: name for name, module in root.named_modules()}
    owner: dict[nn.Module, nn.Module] = {}
    for block in blocks:
        if block not in paths:
            raise ValueError(f"{type(root).__name__} has a block, a {type(block).__name__}, that is not a part of it.")
        for module in block.modules():
            if owner.setdefault(module, block) is not block:
                raise ValueError(
                    f"{paths[module]} of {type(root).__name__} belongs to two blocks, {paths[owner[module]]} and {paths[block]}."
                )
    users: dict[nn.Parameter, set[nn.Module | None]] = {}
    names: dict[nn.Parameter, str] = {}
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            users.setdefault(parameter, set()).add(owner.get(module))
            names.setdefault(parameter, f"{path}.{name}" if path else name)
    # In the order of named_parameters, so that states and names of checkpoints have an order that does not depend on blocks.
    group_of = {id(parameter): index for index, group in enumerate(groups) for parameter in group}
    unknown = len(group_of) - sum(id(parameter) in group_of for parameter in users)
    if unknown:
        raise ValueError(
            f"{unknown} parameters of the optimizer are no parameters of {type(root).__name__}: register them in the module."
        )
    sizes: Counter[Any] = Counter()
    keys: dict[nn.Parameter, tuple[nn.Module | None, int | None, torch.dtype]] = {}
    for parameter, of in users.items():
        group = group_of.get(id(parameter)) if parameter.requires_grad else None
        keys[parameter] = (next(iter(of)) if len(of) == 1 else None, group, parameter.dtype)
        sizes[keys[parameter]] += parameter.numel()
        sizes[keys[parameter][0]] += parameter.numel()
    held: dict[tuple[nn.Module | None, int | None, torch.dtype], list[tuple[str, nn.Parameter]]] = {}
    for parameter, (block_of, group, dtype) in keys.items():
        part, whole = sizes[block_of, group, dtype], sizes[block_of]
        if block_of is not None and (whole < min_unit_params or part * SMALLEST_SHARE < whole):
            block_of = None
        held.setdefault((block_of, group, dtype), []).append((names[parameter], parameter))
    order: list[nn.Module | None] = [*dict.fromkeys(blocks), None]
    return [
        UnitPlan(
            f"{ROOT if block is None else paths[block]}/{'frozen' if group is None else group}/{str(dtype).split('.')[-1]}",
            block,
            group,
            tuple(parameters),
        )
        for place in order
        for (block, group, dtype), parameters in held.items()
        if block is place
    ]


def shard_range(grid: RankGrid, granularity: Granularity, size: int) -> tuple[int, int]:
    """The part of a flat buffer that this rank holds: first element, and the one behind the last.

    Of n equal blocks rank (i, j) holds at N all, at I blocks ``j ng`` to ``(j + 1) ng - 1``, at G block ``j ng + i``.

    Args:
        grid: of the ranks.
        granularity: N, I or G.
        size: of the buffer, a multiple of n.
    """
    block = size // grid.n
    if granularity == "N":
        return 0, size
    if granularity == "I":
        return grid.j * grid.ng * block, (grid.j + 1) * grid.ng * block
    return grid.block * block, (grid.block + 1) * block


class FlatUnit:
    """The buffers of one unit on this rank, and the parameters as views of the full one.

    Making one replaces ``p.data`` of its parameters by views of `full`, with the values of rank 0 (a collective call).

    Args:
        plan: its parameters.
        grid: of the ranks.
        partition: how the states are stored.
        precision: their formats.

    Attributes:
        size: elements of `full`: those of the parameters, and zeros up to a multiple of the number of ranks.
        full: (size,) the parameters as the network uses them; without memory while released.
        shard: what this rank keeps of it, at the granularity of parameters; `full` itself at N.
        master: what the optimizer updates, at its granularity, float32 or wider; a slice of `shard` where the format is the
            same. None if the unit is frozen.
        accumulated: sum of this step's gradients so far, at the granularity of gradients; None: none yet.
    """

    def __init__(self, plan: UnitPlan, grid: RankGrid, partition: Partition, precision: StatePrecision) -> None:
        self.plan, self.grid, self.partition = plan, grid, partition
        first = plan.parameters[0][1]
        device, dtype = first.device, first.dtype
        self.compute = precision.compute(dtype)
        self.wire, self.accumulator = precision.wire(dtype), precision.accumulator(dtype)
        self.slots: list[Slot] = []
        stop = 0
        for name, parameter in plan.parameters:
            start, stop = stop, stop + parameter.numel()
            self.slots.append(Slot(name, parameter, parameter.shape, start, stop))
        self.length = stop
        self.size = -(-stop // grid.n) * grid.n
        flat = torch.zeros(self.size, dtype=dtype, device=device)
        with torch.no_grad():
            for slot in self.slots:
                flat[slot.start : slot.stop].copy_(slot.parameter.detach().reshape(-1))
        self.work: Work | None = None
        self.accumulated: Tensor | None = None
        self.arrived: set[int] = set()
        if grid.n > 1:
            dist.broadcast(flat, src=grid.ranks[0], group=grid.world)
        self.full, self.gathered = flat.to(self.compute), True
        self.shard = self.full if partition.parameters == "N" else self._part(self.full, partition.parameters).clone()
        self.master: nn.Parameter | None = None
        if plan.group is not None:
            width = precision.master(dtype)
            if width == self.compute:
                low, high = self.range("optimizer")
                offset = self.range("parameters")[0]
                own = self.shard[low - offset : high - offset]
            else:
                own = self._part(flat, partition.optimizer).to(width, copy=True)
            self.master = nn.Parameter(own)
        # Made while there is memory behind them.
        self._views = [self.full[slot.start : slot.stop].view(slot.shape) for slot in self.slots]
        kinds = [type(slot.parameter) for slot in self.slots]
        self._kinds = [(released_class(slot.name, kind), kind) for slot, kind in zip(self.slots, kinds, strict=True)]
        self.expose()
        self.release()

    def _part(self, flat: Tensor, granularity: Granularity) -> Tensor:
        low, high = shard_range(self.grid, granularity, self.size)
        return flat[low:high]

    @property
    def trained(self) -> bool:
        """Whether it has gradients and masters."""
        return self.master is not None

    @property
    def master_dtype(self) -> torch.dtype:
        """Format in which its values are exact."""
        return self.compute if self.master is None else self.master.dtype

    @property
    def complete(self) -> bool:
        """Whether all of its gradients of this backward pass are there."""
        return len(self.arrived) == len(self.slots)

    def range(self, state: str) -> tuple[int, int]:
        """Elements of the full buffer whose ``parameters``, ``gradients`` or ``optimizer`` state this rank holds."""
        return shard_range(self.grid, getattr(self.partition, state), self.size)

    def _admit(self, use: bool) -> None:
        """Let the parameters be used, or let their use be an error."""
        for slot, kinds in zip(self.slots, self._kinds, strict=True):
            slot.parameter.__class__ = kinds[use]

    def expose(self) -> None:
        """Let the parameters be views of `full`, which can be used while it is gathered."""
        self._admit(True)
        for slot, view in zip(self.slots, self._views, strict=True):
            slot.parameter.data = view
        self._admit(self.gathered)

    def show(self, flat: Tensor) -> None:
        """Let the parameters have the values of a flat buffer (size,), in memory of their own."""
        self._admit(True)
        for slot in self.slots:
            slot.parameter.data = flat[slot.start : slot.stop].view(slot.shape).clone()

    def blank(self, value: float) -> None:
        """Let the parameters have one value everywhere, and no memory."""
        self._admit(True)
        for slot in self.slots:
            slot.parameter.data = torch.full((), value, dtype=self.compute, device=self.full.device).expand(slot.shape)

    def collect(self) -> Tensor:
        """The values that the parameters have now, (size,), in the format of the masters."""
        flat = torch.zeros(self.size, dtype=self.master_dtype, device=self.full.device)
        for slot in self.slots:
            flat[slot.start : slot.stop].copy_(slot.parameter.detach().reshape(-1))
        return flat

    def allocate(self) -> None:
        """Give `full` its memory."""
        self.full.untyped_storage().resize_(self.size * self.full.element_size())

    def arrive(self) -> None:
        """All values of `full` are there."""
        self.work, self.gathered = None, True
        self._admit(True)

    def release(self) -> None:
        """Take the memory of `full` away; nothing where every rank keeps all parameters."""
        if self.gathered and self.partition.parameters != "N":
            self.full.untyped_storage().resize_(0)
            self.gathered = False
            self._admit(False)

    def take_gradients(self) -> Tensor:
        """The parameters' gradients as one buffer (size,) in the format of the wire, zeros where there is none; they are dropped.

        Raises:
            ValueError: a gradient is sparse.
        """
        flat = torch.zeros(self.size, dtype=self.wire, device=self.full.device)
        for slot in self.slots:
            gradient = slot.parameter.grad
            if gradient is not None:
                if gradient.layout != torch.strided:
                    raise ValueError(f"PaRO: the gradient of {slot.name} is sparse: use dense embeddings (sparse=False).")
                flat[slot.start : slot.stop].copy_(gradient.reshape(-1))
                slot.parameter.grad = None
        return flat

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Take new values from a whole buffer (size,), each rank its part."""
        if self.gathered:
            self.full.copy_(flat)
        if self.shard is not self.full:
            self.shard.copy_(self._part(flat, self.partition.parameters))
        if self.master is not None:
            self.master.copy_(self._part(flat, self.partition.optimizer))

    def overlaps(self, state: str) -> Iterator[tuple[Slot, slice, slice]]:
        """This rank's part of each parameter: slot, elements of the parameter (flat), elements of the shard."""
        low, high = self.range(state)
        for slot in self.slots:
            start, stop = max(slot.start, low), min(slot.stop, high)
            if start < stop:
                yield slot, slice(start - slot.start, stop - slot.start), slice(start - low, stop - low)
