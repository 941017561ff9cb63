"""Synchronises replicas block by block: norms once, then a block's weighted sum while the block before it computes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle

from strategies.edit.blocks import Block
from strategies.edit.consensus import Consensus, ballot, elect, kept_at_random, magnitude_limit
from strategies.edit.penalty import Detectors, Outer, Penalty, clip_factor, replica_weights

__all__ = ["SyncReport", "Synchronizer"]

_BITS = 8  # of requests
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SyncReport:
    """Record of one synchronisation; the same on all ranks.

    Attributes:
        steps: local steps of each replica since the one before (n).
        requests: what each replica asked the others for, as a number of bits (n).
        norms: G, replica by replica (n x U).
        anomalous: whose pseudo-gradients were left out (n x U).
        weights: w, unit by unit (U x n); None where all replicas were anomalous, and the unit went back to its anchor.
    """

    steps: list[int]
    requests: list[int]
    norms: list[list[float]] = field(default_factory=list)
    anomalous: list[list[bool]] = field(default_factory=list)
    weights: list[list[float] | None] = field(default_factory=list)


class _Slot:
    """A parameter: what this rank holds of it, and the anchor and outer momentum of that."""

    def __init__(self, name: str, parameter: nn.Parameter, unit: int, outer: Outer, device: torch.device | None) -> None:
        self.name, self.parameter, self.unit = name, parameter, unit
        local = self.local
        dtype = torch.float32 if local.dtype in _HALF else local.dtype
        self.anchor = local.detach().to(device=device or local.device, dtype=dtype, copy=True)
        self.momentum = torch.zeros_like(self.anchor) if outer.momentum else None

    @property
    def local(self) -> Tensor:
        """The values that this rank holds, sharing their memory (call it without gradients)."""
        return self.parameter.to_local() if isinstance(self.parameter, DTensor) else self.parameter.detach()

    def delta(self) -> Tensor:
        """Delta: where the replica began minus where it is, in the anchor's precision and on the parameter's device."""
        local = self.local
        start = self.anchor.to(local.device)
        # In half precision the replica began at the rounded anchor; the rounding is no progress of its own.
        start = start.to(local.dtype).to(start.dtype) if local.dtype in _HALF else start
        return start - local

    def thinned_out(self, delta: Tensor, consensus: Consensus, sync: int, replica: int) -> Tensor:
        """A pseudo-gradient with zeros for what is dropped; collective where magnitudes of a sharded parameter are compared."""
        if consensus.density == 1:
            return delta
        if consensus.sparsify == "magnitude":
            size = delta.abs()
            return delta.where(size >= magnitude_limit(self.whole(size), consensus.density), 0)
        kept = kept_at_random(self.parameter.shape, consensus, sync, self.name, replica, delta.device)
        return delta.where(self.part(kept), 0)

    def step(self, outer: Outer, delta: Tensor) -> None:
        outer.step(self.anchor, self.momentum, delta.to(self.anchor.device))

    def restart(self) -> None:
        """Put the replica back to the anchor."""
        self.local.copy_(self.anchor)

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which this rank holds a part as of the parameter; collective where the parameter is sharded."""
        if not isinstance(self.parameter, DTensor):
            return tensor.detach()
        p = self.parameter
        part = DTensor.from_local(tensor.to(p.device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        return part.full_tensor()

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        if not isinstance(self.parameter, DTensor):
            return tensor
        p = self.parameter
        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()


class Synchronizer:
    """Holds the anchor, the outer momentum and the detectors, and brings the replicas together.

    A synchronisation exchanges one list of norms (a few numbers), then sums the weighted pseudo-gradients, one collective a
    block: as many bytes as the parameters have, once, or with a `Consensus` ``num_rows`` times. With ``overlap`` the sum of
    block l+1 is on its way while block l computes, and block l takes its new weights when it is called. All ranks start the
    collectives in the same order, whatever they call, and do the same arithmetic without overlap: the result is the same, bit
    for bit.

    Anchor and momentum of half-precision parameters are kept, and summed, in float32.

    Args:
        blocks: of `split_blocks`; the network must hold the anchor now, the same on all replicas.
        buffers: floating-point buffers to be averaged, and others, which become those of the first replica; replicas whose
            pseudo-gradient is not finite have no part in either.
        penalty: what is done to pseudo-gradients.
        outer: the outer optimizer.
        replicas: this rank's group across replicas.
        shards: this rank's group within its replica; None if it holds all of it.
        overlap: communicate while computing.
        cpu_offload: keep anchor and momentum in host memory, and do the outer step there.
        settle: called after a block has new weights in the middle of a forward pass.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        buffers: Sequence[Tensor],
        penalty: Penalty,
        outer: Outer,
        replicas: ProcessGroup,
        shards: ProcessGroup | None = None,
        overlap: bool = True,
        cpu_offload: bool = False,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.blocks, self.buffers, self.penalty, self.outer = list(blocks), list(buffers), penalty, outer
        self.replicas, self.shards, self.overlap, self.settle = replicas, shards, overlap, settle
        self.num_replicas, self.index = dist.get_world_size(replicas), dist.get_rank(replicas)
        units = {"block": lambda b, p: b, "parameter": lambda b, p: p, "global": lambda b, p: 0}[penalty.granularity]
        device = torch.device("cpu") if cpu_offload else None
        self._slots: list[list[_Slot]] = []
        number = 0
        with torch.no_grad():
            for position, block in enumerate(self.blocks):
                self._slots.append([])
                for name, parameter in block.parameters:
                    self._slots[-1].append(_Slot(name, parameter, units(position, number), outer, device))
                    number += 1
        if not number:
            raise ValueError("EDiT: no parameter is trained, so there is nothing to synchronise.")
        self.num_units = 1 + max(slot.unit for slots in self._slots for slot in slots)
        self.detectors = Detectors(penalty, self.num_replicas, self.num_units)
        self.report: SyncReport | None = None
        self._num_syncs = 0
        self._pending: dict[int, tuple[Tensor, Work | None]] = {}
        self._next_launch = 0
        self._left: set[int] = set()  # blocks that wait for their new weights
        self._called: set[int] = set()  # blocks that were called since the last synchronisation
        self._handles: list[RemovableHandle] = []
        if overlap and penalty.clip_scope == "module":
            self._register_hooks()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that are synchronised."""
        return [slot.parameter for slots in self._slots for slot in slots]

    def close(self) -> None:
        """Take the hooks off the network."""
        while self._handles:
            self._handles.pop().remove()

    # One synchronisation

    @torch.no_grad()
    def begin(self, steps: int, requests: int = 0) -> SyncReport:
        """Start a synchronisation; a collective call of all ranks, of the same order of calls everywhere.

        Afterwards the parameters that must be there before a forward pass have their new values; the others get them when
        their block is called, at the latest in `finish`.

        Args:
            steps: local steps of this replica since the synchronisation before.
            requests: up to 8 bits that the others shall know.

        Returns:
            What all replicas reported. If none of them took a step, nothing else has happened.
        """
        norms = self._norms()
        if self.shards is not None:  # a replica asks for what any of its ranks asks for
            bits = torch.tensor([requests >> bit & 1 for bit in range(_BITS)], device=norms.device)
            dist.all_reduce(bits, dist.ReduceOp.MAX, group=self.shards)
            requests = sum(wanted << bit for bit, wanted in enumerate(bits.tolist()))
        head = torch.tensor([steps, requests], dtype=torch.float64, device=norms.device)
        sent = torch.cat([head, norms])
        seen = [torch.empty_like(sent) for _ in range(self.num_replicas)]
        dist.all_gather(seen, sent, group=self.replicas)
        rows = torch.stack(seen).tolist()
        taken, asked = [int(row[0]) for row in rows], [int(row[1]) for row in rows]
        if not sum(taken):
            return SyncReport(taken, asked)
        G = [row[2:] for row in rows]
        anomalous = self.detectors.judge(G)
        weights = [
            replica_weights([row[unit] for row in G], [row[unit] for row in anomalous], taken, self.penalty)
            for unit in range(self.num_units)
        ]
        self.report = SyncReport(taken, asked, G, anomalous, weights)
        self._num_syncs += 1
        self._average_buffers([all(map(math.isfinite, row)) for row in G])
        self._next_launch = 0
        self._left.update(range(len(self.blocks)))
        if self.penalty.clip_scope == "global" and self.penalty.clip is not None:
            self._apply_together()
            return self.report
        # Only a block that was called since the last time has a hook that can be waited for.
        for position in sorted(self._left - self._called):
            self._apply(position)
        self._called.clear()
        return self.report

    @torch.no_grad()
    def finish(self) -> None:
        """Bring what is left of a synchronisation to its end: blocks that this forward pass did not call."""
        for position in sorted(self._left):
            self._apply(position)

    def synchronize(self, steps: int, requests: int = 0) -> SyncReport:
        """`begin` and `finish` at once: a synchronisation that nothing overlaps."""
        report = self.begin(steps, requests)
        self.finish()
        return report

    def _norms(self) -> Tensor:
        """G of all units (U), float64."""
        squares: list[list[Tensor]] = [[] for _ in range(self.num_units)]
        for slots in self._slots:
            for slot in slots:
                squares[slot.unit].append(slot.delta().square().sum())
        device = self._slots[0][0].local.device
        total = torch.stack([torch.stack([s.to(device) for s in unit]).sum() for unit in squares]).double()
        if self.shards is not None:
            dist.all_reduce(total, group=self.shards)
        return total.sqrt()

    def _launch(self, position: int) -> None:
        """Start the sums of the blocks up to this one, in order."""
        assert self.report is not None
        while self._next_launch <= position:
            flat = torch.cat([self._handed_in(slot) for slot in self._slots[self._next_launch]], -1)
            travels = self.num_replicas > 1 and flat.numel()
            work = dist.all_reduce(flat, group=self.replicas, async_op=True) if travels else None
            self._pending[self._next_launch] = (flat, work)
            self._next_launch += 1

    def _handed_in(self, slot: _Slot) -> Tensor:
        """This replica's term in the sum for a parameter: (M,), with a consensus (R, M)."""
        assert self.report is not None
        weights, consensus = self.report.weights[slot.unit], self.penalty.consensus
        weight = 0.0 if weights is None else weights[self.index]
        # Not a product with zero: what is left out may be infinite.
        part = slot.delta() if weight else torch.zeros_like(slot.local, dtype=slot.anchor.dtype)
        if consensus is None:
            return part.mul_(weight).flatten()
        if weight:
            part = slot.thinned_out(part, consensus, self._num_syncs, self.index)
        return ballot(part * weight, weight, consensus)

    def _summed(self, position: int) -> list[Tensor]:
        """The averaged pseudo-gradients of a block."""
        self._launch(position)
        flat, work = self._pending.pop(position)
        if work is not None:
            work.wait()
        if self.penalty.consensus is not None:
            flat = elect(flat, self.penalty.consensus)
        sizes = [slot.local.numel() for slot in self._slots[position]]
        return [part.view_as(slot.local) for part, slot in zip(flat.split(sizes), self._slots[position], strict=True)]

    def _apply(self, position: int) -> None:
        """Give a block its new weights."""
        deltas = self._summed(position)
        if self.penalty.clip is not None and self.penalty.clip_scope == "module":
            factor = clip_factor(self._norm_of(deltas), self.penalty.clip)
            deltas = [delta * factor for delta in deltas]
        self._step(position, deltas)

    def _apply_together(self) -> None:
        """Give all blocks their new weights, clipped by the norm over all of them."""
        assert self.penalty.clip is not None
        self._launch(len(self.blocks) - 1)
        summed = [self._summed(position) for position in range(len(self.blocks))]
        factor = clip_factor(self._norm_of([delta for deltas in summed for delta in deltas]), self.penalty.clip)
        for position, deltas in enumerate(summed):
            self._step(position, [delta * factor for delta in deltas])

    def _step(self, position: int, deltas: list[Tensor]) -> None:
        assert self.report is not None
        for slot, delta in zip(self._slots[position], deltas, strict=True):
            if self.report.weights[slot.unit] is not None:
                slot.step(self.outer, delta)
            slot.restart()
        self._left.remove(position)

    def _norm_of(self, tensors: list[Tensor]) -> Tensor:
        square = torch.stack([tensor.square().sum() for tensor in tensors]).sum()
        if self.shards is not None:
            dist.all_reduce(square, group=self.shards)
        return square.sqrt()

    @torch.no_grad()
    def _average_buffers(self, sound: list[bool]) -> None:
        """Average over the replicas whose pseudo-gradients are finite: the others' buffers need not be. If none is, over all."""
        first, count = (sound.index(True), sum(sound)) if any(sound) else (0, self.num_replicas)
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.buffers:
            kinds.setdefault(buffer.dtype, []).append(buffer)
        for dtype, buffers in kinds.items():
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            if dtype.is_floating_point:
                if any(sound) and not sound[self.index]:
                    flat.zero_()
                dist.all_reduce(flat, group=self.replicas)
                flat /= count
                if self.shards is not None:
                    dist.all_reduce(flat, group=self.shards)
                    flat /= dist.get_world_size(self.shards)
            else:
                dist.broadcast(flat, group=self.replicas, group_src=first)
                if self.shards is not None:
                    dist.broadcast(flat, group=self.shards, group_src=0)
            for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    # Hooks

    def _register_hooks(self) -> None:
        for position, block in enumerate(self.blocks):
            if block.module is not None and not block.compiled:
                hook = self._hook_of(position)
                self._handles.append(block.module.register_forward_pre_hook(hook, prepend=True))

    def _hook_of(self, position: int) -> Callable[[nn.Module, Any], None]:
        @torch.no_grad()
        def before_forward(module: nn.Module, inputs: Any) -> None:
            if not module.training:
                return
            self._called.add(position)
            if position in self._left:
                self._launch(min(position + 1, len(self.blocks) - 1))
                self._apply(position)
                self.settle()

        return before_forward

    # State

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Outer momentum, detectors, number of synchronisations, and the anchor where it is more precise than the weights.

        Tensors are whole, on the CPU. A collective call where parameters are sharded; outside of a synchronisation the weights
        are the anchor.
        """
        slots = [slot for slots in self._slots for slot in slots]
        precise = [slot for slot in slots if slot.anchor.dtype != slot.parameter.dtype]
        return {
            "momentum": {slot.name: slot.whole(slot.momentum).cpu() for slot in slots if slot.momentum is not None},
            "anchor": {slot.name: slot.whole(slot.anchor).cpu() for slot in precise},
            "detectors": self.detectors.state_dict(),
            "syncs": self._num_syncs,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Continue from what `state_dict` gave; the network must hold the weights saved with it.

        Returns:
            Whether the detectors went on too; they begin anew if the number of replicas or units is another one.

        Raises:
            ValueError: the state is of other parameters.
        """
        slots = [slot for slots in self._slots for slot in slots]
        names = {slot.name for slot in slots}
        if state["momentum"] and self.outer.momentum and set(state["momentum"]) != names:
            other = ", ".join(sorted(names ^ set(state["momentum"]))[:5])
            raise ValueError(f"EDiT: the checkpoint's outer momentum is of other parameters than those trained here: {other}.")
        for slot in slots:
            if slot.momentum is not None and slot.name in state["momentum"]:
                slot.momentum.copy_(slot.part(state["momentum"][slot.name]))
            if slot.name in state["anchor"]:
                slot.anchor.copy_(slot.part(state["anchor"][slot.name]))
        self._num_syncs = state["syncs"]
        stored = state["detectors"]
        if (len(stored), len(stored[0])) != (self.num_replicas, self.num_units):
            return False
        self.detectors.load_state_dict(stored)
        return True
