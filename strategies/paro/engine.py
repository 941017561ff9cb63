"""The training step of all codes: when parameters are gathered, gradients reduced, masters updated and spread again."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from strategies.paro.collectives import Collectives
from strategies.paro.grid import Work
from strategies.paro.optimizer_state import load_optimizer_state
from strategies.paro.partition import Partition
from strategies.paro.precision import StatePrecision
from strategies.paro.units import FlatUnit, find_blocks, plan_units

__all__ = ["ELEMENTWISE", "PaROEngine", "check_optimizer"]

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop")
"""Optimizers of torch that treat every element of a parameter alike and by itself, so that they are exact on flat shards."""


def check_optimizer(optimizer: Optimizer, trusted: Iterable[str] = ()) -> None:
    """Refuse optimizers that need the shape of a parameter, or parameters as a whole [paper section 3.1.1; spec 2.6].

    Args:
        optimizer: to be looked at.
        trusted: names of further classes that are known to work element by element, such as ``Lion``.

    Raises:
        ValueError: its class is neither one of `ELEMENTWISE` of torch nor trusted.
    """
    kind = type(optimizer)
    if kind.__name__ in trusted or (kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE):
        return
    raise ValueError(
        f"PaRO updates flat shards, on which only optimizers that work element by element are exact; {kind.__name__} is not known"
        f" to. Use one of {', '.join(ELEMENTWISE)}, or, if it does, name it in elementwise_optimizers."
    )


class _Block:
    """A module whose parameters are gathered around its call."""

    def __init__(self, module: nn.Module | None, units: list[FlatUnit]) -> None:
        self.module = module
        self.units = units
        self.in_backward = False
        self.pending_inputs = 0


class _Hook:
    """A hook of a module that copies of the module do not have."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook(_nothing)


def _nothing(*args: Any) -> None:
    pass


class PaROEngine:
    """Holds the states of a network partitioned, and moves them when they are needed [paper section 3.1; spec 2.5].

    A step of s micro-batches:

        for each micro-batch:
            engine.last = (it is the last one)
            engine.begin_forward()
            loss = ...                      # divided by s
            loss.backward()
            engine.finish_backward()
        clip by engine.gradient_norm()
        optimizer.step()                    # on the masters, which are in its groups now
        engine.sync_parameters()
        optimizer.zero_grad()

    The network's parameters stay the objects they are; their data are views of flat buffers that are there only around the
    calls of their block, and their ``grad`` is None after each backward pass: gradients are means over the ranks in
    ``master.grad``. All ranks call the same blocks in the same order. A parameter that takes no part in a loss has a gradient of
    zeros. Blocks under activation checkpointing must use the non-reentrant kind.

    Args:
        module: the network, the same on all ranks but for values, which become those of rank 0.
        optimizer: its groups' parameters are replaced by masters; None: nothing is trained.
        partition: how the states are stored.
        comm: moves them.
        blocks: parts of the network that are gathered one after the other; default: `find_blocks`.
        precision: formats of the states.
        prefetch: blocks that are gathered ahead, in the order of the first step; 0: none.
        overlap: let communication run beside computation; the results are the same.
        min_unit_params: blocks with fewer parameters belong to the root.
        trusted: see `check_optimizer`.

    Attributes:
        units: all units, the root's last.
        last: whether the current micro-batch is the last of its step.

    Raises:
        ValueError: an optimizer that is not element-wise, parameters of it that are not the module's, blocks that overlap, or
            compiled blocks whose parameters are not whole on each rank.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        partition: Partition,
        comm: Collectives,
        blocks: Sequence[nn.Module] | None = None,
        precision: StatePrecision | None = None,
        prefetch: int = 1,
        overlap: bool = True,
        min_unit_params: int = 0,
        trusted: Iterable[str] = (),
    ) -> None:
        self.module, self.optimizer, self.partition, self.comm = module, optimizer, partition, comm
        self.grid = comm.grid
        self.prefetch, self.overlap = prefetch, overlap
        if optimizer is not None:
            check_optimizer(optimizer, trusted)
        groups = [] if optimizer is None else [list(group["params"]) for group in optimizer.param_groups]
        #: Parameters of each group of the optimizer as the user gave them, which checkpoints number.
        self.groups: list[list[nn.Parameter]] = groups
        blocks = find_blocks(module) if blocks is None else blocks
        if partition.parameters != "N":
            _refuse_compiled(module)
        plans = plan_units(module, blocks, groups, min_unit_params)
        self.units = [FlatUnit(plan, self.grid, partition, precision or StatePrecision()) for plan in plans]
        for buffer in module.buffers() if self.grid.n > 1 else ():
            dist.broadcast(buffer, src=self.grid.ranks[0], group=self.grid.world)
        if optimizer is not None:
            early = optimizer.state_dict()
            for index, group in enumerate(optimizer.param_groups):
                group["params"] = [unit.master for unit in self.units if unit.plan.group == index]
            if early["state"]:  # some, such as Adagrad, make their state at once
                optimizer.state.clear()
                load_optimizer_state(self, early)
        self.last = True
        self._held = False
        self._handles: list[RemovableHandle] = []
        modules = list(dict.fromkeys(unit.plan.block for unit in self.units))
        self._blocks = [_Block(each, [unit for unit in self.units if unit.plan.block is each]) for each in modules]
        self._block_of = {id(unit): block for block in self._blocks for unit in block.units}
        # What is reduced when: the same on all ranks, at first blocks from the last to the first.
        trained = [unit for unit in self.units if unit.trained]
        self._order = [unit for unit in reversed(trained) if unit.plan.block] + [u for u in trained if not u.plan.block]
        self._arrivals: list[FlatUnit] | None = []
        self._launched = 0
        self._in_flight: deque[tuple[Work | None, Generator[Work | None, None, None]]] = deque()
        # Which block was needed when, in the first step.
        self._recorded: list[_Block] = []
        self._recording = True
        self._training = False
        self._position = 0
        self._install()

    # Hooks

    def _install(self) -> None:
        for block in self._blocks:
            if block.module is not None and self.partition.parameters != "N":
                before, after = _Hook(partial(self._before_forward, block)), _Hook(partial(self._after_forward, block))
                self._handles.append(block.module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(block.module.register_forward_hook(after))
        trained = set()
        for unit in self.units:
            if unit.trained:
                for index, slot in enumerate(unit.slots):
                    trained.add(id(slot.parameter))
                    hook = partial(self._on_gradient, unit, index)
                    self._handles.append(slot.parameter.register_post_accumulate_grad_hook(hook))
        for parameter in self.module.parameters():
            if parameter.requires_grad and id(parameter) not in trained and self.optimizer is not None:
                self._handles.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))

    def _before_forward(self, block: _Block, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._need(block)
        if torch.is_grad_enabled() and not block.in_backward:
            inputs = [tensor for tensor in _tensors((args, kwargs)) if tensor.grad_fn is not None]
            if inputs:
                block.pending_inputs += 1
                register_multi_grad_hook(inputs, lambda gradients: self._inputs_done(block), mode="all")

    def _after_forward(self, block: _Block, module: nn.Module, args: Any, output: Any) -> None:
        if block.in_backward:  # activations are computed again
            return
        if torch.is_grad_enabled():
            outputs = [tensor for tensor in _tensors(output) if tensor.grad_fn is not None]
            if outputs:
                register_multi_grad_hook(outputs, lambda gradient: self._before_backward(block), mode="any")
        self._release(block)

    def _before_backward(self, block: _Block) -> None:
        block.in_backward = True
        self._need(block)

    def _inputs_done(self, block: _Block) -> None:
        block.pending_inputs -= 1
        self._release_if_done(block)

    def _release_if_done(self, block: _Block) -> None:
        if block.module is None or not block.in_backward or block.pending_inputs > 0:
            return
        if all(unit.complete for unit in block.units if unit.trained):
            block.in_backward = False
            self._release(block)

    def _on_gradient(self, unit: FlatUnit, index: int, parameter: Tensor) -> None:
        if index in unit.arrived:  # another backward pass of the same micro-batch
            self._flush()
        unit.arrived.add(index)
        if unit.complete:
            if self._arrivals is not None:
                self._arrivals.append(unit)
            self._release_if_done(self._block_of[id(unit)])
            self._launch()

    # Parameters

    def _need(self, block: _Block) -> None:
        """Gather a block now, and begin to gather those that were needed next in the first step."""
        ahead: list[_Block] = []
        if not self._training:
            pass
        elif self._recording:
            self._recorded.append(block)
        elif self._position < len(self._recorded) and self._recorded[self._position] is block:
            self._position += 1
            ahead = self._recorded[self._position : self._position + self.prefetch] if self.overlap else []
        else:
            self._position = len(self._recorded)  # not the way of the first step: nothing is gathered ahead any more
        for unit in block.units:
            self._begin_gather(unit, async_op=False)
        for unit in block.units:
            self._end_gather(unit)
        for other in ahead:
            for unit in other.units:
                self._begin_gather(unit, async_op=True)

    @torch.no_grad()
    def _begin_gather(self, unit: FlatUnit, async_op: bool) -> None:
        if unit.gathered or unit.work is not None:
            return
        unit.allocate()
        unit.work = self.comm.all_gather(unit.full, unit.shard, self.partition.parameters, "N", async_op=async_op)
        if unit.work is None:
            unit.arrive()

    def _end_gather(self, unit: FlatUnit) -> None:
        if unit.work is not None:
            unit.work.wait()
            unit.arrive()

    def _release(self, block: _Block) -> None:
        if not self._held:
            for unit in block.units:
                self._end_gather(unit)
                unit.release()

    def begin_forward(self) -> None:
        """Before the network is used: gather the parameters outside of all blocks."""
        self._position, self._training = 0, torch.is_grad_enabled()
        for block in self._blocks:
            if block.module is None:
                for unit in block.units:
                    self._begin_gather(unit, async_op=False)

    def release_all(self) -> None:
        """Give back the memory of all gathered parameters, those that `gather_all` holds too."""
        self._held = False
        for block in self._blocks:
            block.in_backward, block.pending_inputs = False, 0
            self._release(block)

    @torch.inference_mode(False)
    def gather_all(self) -> None:
        """Gather everything until `release_all`, so that each rank may run the network as often as it likes."""
        for unit in self.units:
            self._begin_gather(unit, async_op=False)
            self._end_gather(unit)
        self._held = True

    @property
    def held(self) -> bool:
        """Whether `gather_all` holds all parameters."""
        return self._held

    # Gradients

    def _launch(self) -> None:
        while self._launched < len(self._order) and self._order[self._launched].complete:
            self._start_reduction(self._order[self._launched])

    @torch.no_grad()
    def _start_reduction(self, unit: FlatUnit) -> None:
        self._launched += 1
        # Each reduction in flight goes one stage on: that of the last unit through the group, of the one before between them.
        for _ in range(len(self._in_flight)):
            self._advance(*self._in_flight.popleft())
        self._advance(None, self._reduction(unit, unit.take_gradients(), self.last))
        if not self.overlap:
            self._drain()

    def _advance(self, work: Work | None, stages: Generator[Work | None, None, None]) -> None:
        if work is not None:
            work.wait()
        for following in stages:
            if following is not None:
                self._in_flight.append((following, stages))
                return

    @torch.no_grad()
    def _drain(self) -> None:
        while self._in_flight:
            self._advance(*self._in_flight.popleft())

    def _reduction(self, unit: FlatUnit, flat: Tensor, last: bool) -> Generator[Work | None, None, None]:
        """From one micro-batch's whole gradient (size,) on this rank to the accumulator, after the last one to the master."""
        g, os = self.partition.gradients, self.partition.optimizer
        if g == "N":
            part = flat.to(unit.accumulator)
        else:
            low, high = unit.range("gradients")
            part = torch.empty(high - low, dtype=unit.accumulator, device=flat.device)
            yield self.comm.reduce_scatter(part, flat, "N", g, async_op=self.overlap)
        unit.accumulated = part if unit.accumulated is None else unit.accumulated.add_(part)
        if not last:
            return
        assert unit.master is not None
        total, unit.accumulated = unit.accumulated, None
        if g != os:
            summed = torch.empty(unit.master.numel(), dtype=unit.master.dtype, device=flat.device)
            yield self.comm.reduce_scatter(summed, total.to(unit.wire), g, os, async_op=self.overlap)
            total = summed
        if os != "G":
            total = total.to(unit.wire)
            yield self.comm.all_reduce(total, os, async_op=self.overlap)
        gradient = total.to(unit.master.dtype).div_(self.grid.n)
        if unit.master.grad is None:
            unit.master.grad = gradient
        else:
            unit.master.grad += gradient

    def _flush(self) -> None:
        """Reduce what is left, zeros for parameters without a gradient, so that all ranks do the same."""
        while self._launched < len(self._order):
            self._start_reduction(self._order[self._launched])
        for unit in self._order:
            unit.arrived.clear()
        self._launched = 0

    def finish_backward(self) -> None:
        """After a backward pass: finish all reductions, and after the last micro-batch the gradients of the masters."""
        self._flush()
        self._drain()
        self._recording = self._recording and not self._recorded
        self._training = False
        if self._arrivals is not None:
            self._agree_on_order()
        if not self._held:
            self.release_all()
        for block in self._blocks:
            block.in_backward, block.pending_inputs = False, 0

    @torch.no_grad()
    def finish_step(self) -> None:
        """Finish a step whose last micro-batch had no backward pass; nothing otherwise. A collective call in that case."""
        if any(unit.accumulated is not None for unit in self.units):
            self.last = True
            self._flush()
            self._drain()

    def _agree_on_order(self) -> None:
        """From now on reduce in the order in which gradients came on rank 0."""
        assert self._arrivals is not None
        seen = list(dict.fromkeys(self._arrivals))
        order = seen + [unit for unit in self._order if unit not in seen]
        if self.grid.n > 1 and self._order:
            place = {id(unit): index for index, unit in enumerate(self._order)}
            numbers = torch.tensor([place[id(unit)] for unit in order], device=self.units[0].full.device)
            dist.broadcast(numbers, src=self.grid.ranks[0], group=self.grid.world)
            order = [self._order[number] for number in numbers.tolist()]
        self._order, self._arrivals = order, None

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole mean gradient, 0-dim, the same on all ranks [spec 2.6].

        The squares of this rank's shard, summed over all ranks at G, over the group only at I (each group has a whole copy).
        """
        gradients = [unit.master.grad for unit in self.units if unit.master is not None and unit.master.grad is not None]
        device = self.units[0].full.device
        square = torch.zeros((), dtype=gradients[0].dtype if gradients else torch.float32, device=device)
        if gradients:
            square = torch.nn.utils.get_total_norm(gradients).square()
        if self.partition.optimizer == "G" and self.grid.n > 1:
            dist.all_reduce(square, group=self.grid.world)
        elif self.partition.optimizer == "I" and self.grid.m > 1:
            dist.all_reduce(square, group=self.grid.intra_reduce)
        return square.sqrt()

    # Update

    @torch.no_grad()
    def sync_parameters(self) -> None:
        """Spread updated masters to where the parameters are kept; gathered ones that are held are gathered anew."""
        p, os = self.partition.parameters, self.partition.optimizer
        works: list[Work] = []
        for unit in self.units:
            if unit.master is None:
                continue
            own = unit.master.detach()
            if p == os:
                if own.data_ptr() != unit.shard.data_ptr():
                    unit.shard.copy_(own)
            else:
                work = self.comm.all_gather(unit.shard, own.to(unit.compute), os, p, async_op=self.overlap)
                works += [] if work is None else [work]
        for work in works:
            work.wait()
        if self._held and p != "N":
            for unit in self.units:
                self.comm.all_gather(unit.full, unit.shard, p, "N")

    # Whole values

    @torch.no_grad()
    def read(self, unit: FlatUnit) -> Tensor:
        """All values of a unit in the format of its masters, (size,); a collective call. Not to be written to."""
        if unit.master is None:
            own, source = unit.shard, self.partition.parameters
        else:
            own, source = unit.master.detach(), self.partition.optimizer
        return self.whole(own, source, unit.size)

    @torch.no_grad()
    def whole(self, own: Tensor, source: Any, size: int) -> Tensor:
        """The whole flat buffer, (size,), from the parts of all ranks; a collective call."""
        if source == "N":
            return own
        full = own.new_empty(size)
        self.comm.all_gather(full, own, source, "N")
        return full

    @contextmanager
    def full_parameters(self, writeback: bool = False, device: torch.device | None = None, keep: bool = True) -> Iterator[None]:
        """Inside, the module's parameters are whole, in the format of the masters; entering is a collective call.

        What is computed from them may be part of a loss: values that its gradient needs are kept until then.

        Args:
            writeback: take the values that they have in the end, on each rank its part.
            device: where they lie; default: where the units do.
            keep: False: only take part in gathering; parameters are then zeros, without memory.
        """
        for unit in self.units:
            flat = self.read(unit)
            if keep:
                unit.show(flat.to(device))
            else:
                unit.blank(0)
        try:
            with saved_tensors_hooks(Tensor.detach, _unchanged):
                yield
            if writeback:
                for unit in self.units:
                    unit.write(unit.collect())
        finally:
            for unit in self.units:
                unit.expose()

    def close(self, restore: bool) -> None:
        """End: remove all hooks; leave whole parameters in the module, on the CPU, and the optimizer with these.

        The optimizer's state is dropped.

        Args:
            restore: gather them, a collective call; otherwise, when ranks may not be together, parameters that are not whole on
                this rank become NaN.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for unit in self.units:
            if restore:
                unit.show(self.read(unit).to("cpu", unit.compute))
            elif self.partition.parameters != "N":
                unit.blank(float("nan") if unit.compute.is_floating_point else 0)
        if self.optimizer is not None:
            self.optimizer.state.clear()
            for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
                group["params"] = list(parameters)

    def memory(self) -> dict[str, int]:
        """Bytes that this rank keeps: ``parameters``, ``gathered``, ``gradients``, ``masters``, ``optimizer`` [spec 2.7].

        ``masters`` are 0 where they are slices of the parameters, ``gathered`` is what is there beside the parameters now,
        ``gradients`` counts accumulators and gradients of masters.
        """
        report = dict.fromkeys(("parameters", "gathered", "gradients", "masters", "optimizer"), 0)
        for unit in self.units:
            report["parameters"] += unit.shard.numel() * unit.shard.element_size()
            if unit.shard is not unit.full:
                report["gathered"] += unit.full.untyped_storage().nbytes()
            gradient = None if unit.master is None else unit.master.grad
            for held in (unit.accumulated, gradient):
                report["gradients"] += 0 if held is None else held.numel() * held.element_size()
            if unit.master is not None:
                if unit.master.untyped_storage().data_ptr() != unit.shard.untyped_storage().data_ptr():
                    report["masters"] += unit.master.numel() * unit.master.element_size()
                state = {} if self.optimizer is None else self.optimizer.state.get(unit.master, {})
                held_state = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
                report["optimizer"] += sum(value.numel() * value.element_size() for value in held_state)
        return report


def _refuse_compiled(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if part._compiled_call_impl is not None:
            raise ValueError(
                f"PaRO: {name or type(module).__name__} is compiled, and compiled code cannot wait for parameters that are"
                " gathered: compile=False, or a partition with whole parameters (NNN NNI NII NNG NIG NGG)."
            )


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
