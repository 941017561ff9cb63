"""Placement over several ranks: groups of each role, division of work, exchange and weight sync."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_
from typing_extensions import override

from strategies.placement.exchange import owners_of_rows, receive, send, share, waiting
from strategies.placement.plan import PlacementPlan
from strategies.placement.sync import copy_weights, trained_weights
from strategies.placement.timeline import Timeline
from strategies.whole_state import divided_like, whole
from zoo.role_placement import Fields, FieldSpec, Pending, Placement, Role

if TYPE_CHECKING:
    from strategies.placement.paro_role import PaRORole

__all__ = ["RankPlacement"]


class RankPlacement(Placement):
    """A plan at work; every rank of the job makes one, with the same plan.

    Args:
        plan: The places.
        roles: Models of the module, on every rank; their weights are the same everywhere.
        device: Of this rank.
        timeout: Longest wait for another rank; None: torch's.

    Raises:
        ValueError: If the plan does not fit the run.
    """

    def __init__(
        self, plan: PlacementPlan, roles: dict[str, Role], device: torch.device, timeout: timedelta | None = None
    ) -> None:
        world = dist.get_world_size()
        plan.validate(world, list(roles))
        super().__init__(roles)
        self.plan, self.world, self.me, self.device = plan, world, dist.get_rank(), device
        self.chunks, self.max_lag = plan.chunks, plan.max_lag
        self.inferring, self.training = plan.inferring(world), plan.training(world)
        self.infers, self.trains = self.me in self.inferring, self.me in self.training
        self.timeline = Timeline()
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._wrapped: dict[str, nn.Module] = {}
        self._copies: dict[str, nn.Module] = {}
        #: Roles that PaRO divides, and that this rank holds; the strategy sets them once optimizers are there.
        self.paro: dict[str, PaRORole] = {}
        self._form_groups(timeout)

    def _form_groups(self, timeout: timedelta | None) -> None:
        """Make each group once, on all ranks in the same order."""
        sets = [self.inferring, *(self.plan.members(name, self.world) for name in sorted(self.roles))]
        if self.plan.separates:
            sets += [self._targets(name) for name in sorted(self.roles) if self.roles[name].trained]
        for ranks in sets:
            if tuple(ranks) not in self._groups:
                group = dist.group.WORLD if len(ranks) == self.world else dist.new_group(ranks, timeout)
                self._groups[tuple(ranks)] = group  # type: ignore[assignment]

    def _group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        return self._groups[tuple(ranks)]

    def _targets(self, role: str) -> list[int]:
        """The ranks that get a copy of a role's weights."""
        return self.plan.members(f"rollout_{role}", self.world)

    @override
    def holds(self, role: str) -> bool:
        return self.me in self.plan.members(role, self.world)

    def keeps(self, role: str) -> bool:
        """Whether this rank needs a role's weights, as the original or as a copy that generates."""
        return self.holds(role) or self.holds(f"rollout_{role}")

    def wrap(self) -> None:
        """Give each trained role the back end of its plan; before optimizers are made."""
        for name, role in self.roles.items():
            if not role.trained or not self.holds(name):
                continue
            ranks, backend = self.plan.members(name, self.world), self.plan.roles[name].backend
            divides = backend in ("fsdp2", "paro")
            if divides and name == "actor" and self.plan.gather == "resident" and not self.plan.separates:
                self._copies[name] = copy.deepcopy(role.network).requires_grad_(False)
            if backend == "fsdp2":
                self._divide(role, DeviceMesh.from_group(self._group(ranks), self.device.type))
                self._wrapped[name] = role.network
            elif backend == "ddp":
                self._wrapped[name] = DistributedDataParallel(
                    role.network, process_group=self._group(ranks), broadcast_buffers=False
                )

    @staticmethod
    def _divide(role: Role, mesh: DeviceMesh) -> None:
        for block in role.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(role.network, mesh=mesh)
        # A pass of any function counts as one of the root, which is the root from the first on.
        register_fsdp_forward_method(role.network, "run")
        role.network.run(_nothing)  # type: ignore[operator]
        role.network.reshard()  # type: ignore[operator]  # the root stays whole after a pass; optimizers must see its parts

    @override
    def network(self, role: str) -> nn.Module:
        return self._wrapped.get(role, self.roles[role].network)

    @override
    def inference(self, role: str) -> nn.Module:
        return self._copies.get(role, self.roles[role].network)

    @override
    def check(self, rows: int, unit: int, minibatches: int) -> None:
        super().check(rows, unit, minibatches)
        units = rows // minibatches // unit
        for name, role in self.roles.items():
            ranks = len(self.plan.members(name, self.world))
            if role.trained and units % ranks:
                raise ValueError(
                    f"A minibatch of {units} units of {unit} samples does not divide over the {ranks} ranks of {name}: choose a"
                    " larger batch_size, a smaller unit, or other ranks."
                )

    # Weights

    def finish_sends(self) -> None:
        """Wait until chunks have left."""
        for work, _ in self._sent:
            with self.timeline("wait", "chunk"), waiting("the end of a send", self.training):
                work.wait()
        self._sent.clear()

    @override
    def begin(self) -> None:
        self.finish_sends()
        for name, resident in self._copies.items():
            gathered = self.paro[name].whole() if name in self.paro else nullcontext()
            with self.timeline(name, "gather"), torch.no_grad(), gathered:
                for to, weight in zip(resident.parameters(), self.roles[name].network.parameters(), strict=True):
                    to.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        if not self.plan.separates:
            return
        for name, role in self.roles.items():
            if role.trained and self.keeps(name):
                source, targets = self.plan.members(name, self.world)[0], self._targets(name)
                weights, group = trained_weights(role.network), self._group(targets)
                gathered = self.paro[name].whole() if name in self.paro else nullcontext()
                with self.timeline(name, "sync"), gathered:
                    copy_weights(weights, source, targets, group, self.plan.bucket_mb, f"{name}, weight sync")

    @override
    @contextmanager
    def gathered(self, role: str) -> Iterator[None]:
        network, paro = self.inference(role), self._paro(role)
        parts = [part for part in network.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            with nullcontext() if paro is None else paro.whole():
                yield
        finally:
            for part in parts:
                part.set_reshard_after_forward(part is not network, recurse=False)
                part.reshard()

    @override
    @contextmanager
    def decoding(self, role: str, model: Any) -> Iterator[Any]:
        if self.plan.gather == "per_token" and self._gathers(role):
            yield PassByPass(model, self._paro(role) or self.inference(role))
            return
        with self.gathered(role):
            yield model

    @override
    def agreement(self, role: str) -> Callable[[bool], bool] | None:
        if self.plan.gather != "per_token" or not self._gathers(role):
            return None
        group = self._group(self.plan.members(role, self.world))

        def agree(here: bool) -> bool:
            found = torch.tensor(int(here), device=self.device)
            with waiting(f"{role}, generation", dist.get_process_group_ranks(group)):
                dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
            return bool(found)

        return agree

    # Generation and scoring

    @override
    def compute(
        self, role: str, rows: int, unit: int, function: Callable[[list[int]], Fields], spec: FieldSpec, whole: bool = False
    ) -> Pending:
        generators = self.plan.members("rollout_actor", self.world)
        owned = owners_of_rows(rows, unit, self.plan.members(role, self.world), generators)
        mine = owned.get(self.me, [])
        # Ranks that gather weights together make equally many passes, some of them with rows that count for nothing.
        most = max(map(len, owned.values())) if self.me in owned and self._gathers(role) else len(mine)
        taken, size = mine + [rows - 1] * (most - len(mine)), most if whole else unit
        parts = []
        for begin in range(0, most, max(size, 1)):
            chosen = taken[begin : begin + size]
            paro = None if whole else self._paro(role)
            with self.timeline(role, "generate" if whole else "score"):
                parts.append(function(chosen) if paro is None else paro.run(function, chosen))
        own = {name: torch.cat([part[name] for part in parts])[: len(mine)] for name in spec if parts}
        what = f"{role}, {'tokens' if whole else 'scores'}"
        arrived = share(own, spec, owned, self._group(self.inferring), self.device, what)
        return Pending(own, mine, lambda: self._timed("exchange", arrived))

    def _gathers(self, role: str) -> bool:
        """Whether a pass of a role without gradients gathers divided weights."""
        original = role.removeprefix("rollout_")
        divided = original in self.roles and isinstance(self.inference(original), FSDPModule)
        return divided or self._paro(role) is not None

    def _paro(self, role: str) -> "PaRORole | None":
        """PaRO of the weights that a role's passes without gradients use."""
        original = role.removeprefix("rollout_")
        return None if original in self._copies else self.paro.get(original)

    @override
    def stream(self, chunks: Sequence[int], collect: Callable[[int], Fields], spec: FieldSpec, rows: int) -> Iterator[Fields]:
        if not self.plan.separates:
            return (collect(chunk) for chunk in chunks)
        if self.trains:
            source = self.inferring[self.training.index(self.me) % len(self.inferring)]
            expected = [receive(spec, rows, source, self.device, "a chunk of the rollout") for _ in chunks]
            return (self._timed("chunk", arrived) for arrived in expected)
        return self._give(chunks, collect, spec, rows)

    def _timed(self, what: str, arrived: Callable[[], Fields]) -> Fields:
        with self.timeline("wait", what):
            return arrived()

    def _give(self, chunks: Sequence[int], collect: Callable[[int], Fields], spec: FieldSpec, rows: int) -> Iterator[Fields]:
        place = self.inferring.index(self.me)
        targets = [rank for number, rank in enumerate(self.training) if number % len(self.inferring) == place]
        for chunk in chunks:
            self._sent += send(collect(chunk), spec, rows, targets)
        yield from ()

    @override
    def to_all(self, values: Tensor, infers: bool = False) -> Tensor:
        if self.world > 1:
            source = self.inferring[0] if infers else 0
            with self.timeline("wait", "metrics"), waiting("metrics", [source]):
                dist.broadcast(values, source)
        return values

    # Training

    @override
    def learning(self) -> AbstractContextManager[Any]:
        return self.timeline("learner", "train")

    @override
    def share(self, role: str, units: Sequence[int]) -> list[int]:
        ranks = self.plan.members(role, self.world)
        if self.me not in ranks:
            return []
        part, place = len(units) // len(ranks), ranks.index(self.me)
        return list(units[place * part : (place + 1) * part])

    @override
    def replicas(self, role: str) -> int:
        return len(self.plan.members(role, self.world)) if role in self._wrapped or role in self.paro else 1

    @override
    @contextmanager
    def accumulate(self, role: str, last: bool) -> Iterator[None]:
        network = self.network(role)
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        context: AbstractContextManager[Any] = nullcontext() if role in self._wrapped else super().accumulate(role, last)
        if isinstance(network, DistributedDataParallel) and not last:
            context = network.no_sync()
        if role in self.paro:
            context = self.paro[role].pass_of_training(last)
        with self.timeline(role, "train"), waiting(f"{role}, gradients", self.plan.members(role, self.world)), context:
            yield

    @override
    def clip(self, role: str, parameters: Sequence[Tensor], max_norm: float) -> None:
        if role not in self.paro:
            super().clip(role, parameters, max_norm)
            return
        norm = self.paro[role].engine.gradient_norm()
        clip_grads_with_norm_([each for each in parameters if each.grad is not None], max_norm, norm)

    @override
    def _add_up(self, role: str, total: Tensor) -> None:
        ranks = self.plan.members(role, self.world)
        if len(ranks) > 1:
            dist.all_reduce(total, group=self._group(ranks))

    @override
    def total(self, role: str, values: Tensor) -> Tensor:
        ranks = self.plan.members(role, self.world)
        if self.me in ranks and len(ranks) > 1:
            with self.timeline("wait", "total"), waiting(f"{role}, sums", ranks):
                dist.all_reduce(values, group=self._group(ranks))
        return values

    # Checkpoints

    @contextmanager
    def whole_weights(self, writeback: bool = False) -> Iterator[None]:
        """Inside, the weights that PaRO divides are whole; a collective call of their ranks.

        Args:
            writeback: Whether values that they get inside are taken.
        """
        with ExitStack() as stack:
            for each in self.paro.values():
                stack.enter_context(each.engine.full_parameters(writeback))
            yield

    @override
    def whole(self, value: Tensor) -> Tensor:
        return whole(value)

    @override
    def part(self, value: Tensor, like: Tensor) -> Tensor:
        return divided_like(value.to(like.dtype), like) if isinstance(like, DTensor) else super().part(value, like)


def _nothing() -> None:
    pass


class PassByPass:
    """A model of generation whose weights are gathered for each pass and freed after it.

    Args:
        model: Decodes with the divided network.
        network: Its ``run`` calls a function with gathered weights.
    """

    def __init__(self, model: Any, network: Any) -> None:
        self.model, self.network = model, network
        self.config, self.encodes_prompts = model.config, model.encodes_prompts

    @contextmanager
    def decoder(self, *args: Any, **kwargs: Any) -> Iterator["PassByPass"]:
        """The passes over one batch."""
        with self.model.decoder(*args, **kwargs) as self.passes:
            yield self

    def begin(self, *args: Any) -> Tensor:
        """Scores after the prompts."""
        return self.network.run(self.passes.begin, *args)

    def step(self, token_B: Tensor) -> Tensor:
        """Scores after the newest tokens."""
        return self.network.run(self.passes.step, token_B)

    def run_along(self) -> None:
        """A pass for other ranks."""
        self.network.run(self.passes.run_along)
