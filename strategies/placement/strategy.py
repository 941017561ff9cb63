"""Placement of several models as a strategy of Lightning."""

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from strategies.paro.cost_model import Cluster, LinkSpeed
from strategies.paro.grid import RankGrid
from strategies.paro.optimizer_state import load_optimizer_state, optimizer_state
from strategies.paro.partition import Partition
from strategies.paro.probe import measure_cluster
from strategies.placement.paro_role import PaRORole
from strategies.placement.plan import BackEnd, Gather, PlacementPlan
from strategies.placement.planner import explain, name_of, rank_plans
from strategies.placement.profile import measure_roles, workload_of
from strategies.placement.roles import RankPlacement
from strategies.placement.timeline import chrome_trace
from strategies.refusals import refuse_ddp_hooks, refuse_scaled_losses
from strategies.whole_state import divided_like, divided_state, whole
from zoo.role_placement import HasRoles, Role
from zoo.strategy_contract import StrategyContract

__all__ = ["FlatteningStrategy", "InterleavingStrategy", "PlacementStrategy", "SeparationStrategy", "read_plan", "write_plan"]


def read_plan(path: str | Path) -> PlacementPlan:
    """Read a plan from YAML.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        found = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
    return PlacementPlan.from_dict(found, path)


def write_plan(plan: PlacementPlan, path: str | Path) -> None:
    """Write a plan as YAML."""
    Path(path).write_text(yaml.safe_dump(asdict(plan), sort_keys=False))


class PlacementStrategy(StrategyContract, DDPStrategy):
    """Puts each model of a module on the ranks of a plan; the weights are the same under every plan (lag 0).

    All ranks read the same batches and divide their samples. Ranks without a model free it. Checkpoints hold whole models
    and optimizers, and continue under any plan and number of ranks. Validation and prediction outside of ``fit`` place nothing.
    Source: Xiao et al., arXiv 2312.11819.

    Args:
        plan: The plan, a file with one, or ``auto``: that with the least predicted time, of models and links as measured when
            the run begins.
        timeout_minutes: Longest wait for another rank.
        trace: File for the timeline of all ranks, as a trace for Perfetto; None: none is written.
        auto_lag: Most rollouts by which ``auto`` may let generation be ahead of training.
        trial_steps: Rollouts on which ``auto`` tries each of the three plans with the least predicted time, by a copy of the
            module that is thrown away, to take the fastest; 0: the prediction decides.
        **kwargs: As for Lightning's ``DDPStrategy``.

    Raises:
        ValueError: If the plan does not fit the run, or the module has no roles.
    """

    def __init__(
        self,
        plan: PlacementPlan | str,
        timeout_minutes: float = 30.0,
        trace: str | None = None,
        auto_lag: int = 0,
        trial_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        refuse_ddp_hooks(self, kwargs)
        if auto_lag and plan != "auto":
            raise ValueError(f"{type(self).__name__}: auto_lag={auto_lag} is for plan=auto: set max_lag of the plan instead.")
        if trial_steps < 0 or (trial_steps and plan != "auto"):
            raise ValueError(f"{type(self).__name__}: trial_steps={trial_steps} must be 0, or with plan=auto 1 or more.")
        super().__init__(timeout=timedelta(minutes=timeout_minutes), **kwargs)
        self._auto_lag, self._trial_steps = auto_lag, trial_steps
        self._given: PlacementPlan | None = None
        if plan != "auto":
            self._given = read_plan(plan) if isinstance(plan, str) else plan
        self._placement: RankPlacement | None = None
        self.trace = trace

    def plan(self, world: int) -> PlacementPlan:
        """The plan for a number of ranks; that of ``auto`` once the run has begun."""
        assert self._given is not None
        return self._given

    def places_roles(self) -> bool:
        """Whether models are placed in this run."""
        module = self.lightning_module
        return module is not None and module._trainer is not None and module.trainer.state.fn == TrainerFn.FITTING

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """In training every rank reads all samples."""
        return {"num_replicas": 1, "rank": 0} if self.places_roles() else super().distributed_sampler_kwargs

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded by the ranks that keep them."""
        return True

    # A run begins

    @override
    def setup_environment(self) -> None:
        """Check module and plan as soon as the ranks know each other."""
        super().setup_environment()
        module = self.lightning_module
        if not isinstance(module, HasRoles):
            raise ValueError(
                f"{type(self).__name__} places the models of a module with roles, such as RLHF, which {type(module).__name__} has"
                " not: take ddp."
            )
        if self.places_roles() and self._given is not None:
            plan = self.plan(self.world_size)
            plan.validate(self.world_size, [])
            for role in plan.roles.values():
                Partition.of(role.partition)
            if any(role.backend == "paro" for role in plan.roles.values()) and getattr(module, "ema_decay", 0.0):
                raise ValueError(
                    "PlacementStrategy: backend=paro keeps no average of the actor: set ema_decay to 0, or take fsdp2."
                )

    @override
    def model_to_device(self) -> None:
        """Give all ranks the weights of rank 0, free what the plan puts elsewhere, and move the rest."""
        module = self.lightning_module
        assert isinstance(module, HasRoles) and module is not None
        refuse_scaled_losses(self)
        self._placement = None
        if not self.places_roles():
            super().model_to_device()
            return
        roles = module.roles()
        for role in roles.values():
            _sync_module_states(role.network)
        if self._given is None:
            self._given = self._choose_plan(roles)
        self._placement = placement = RankPlacement(self.plan(self.world_size), roles, self.root_device, self._timeout)
        for name in list(roles):
            if placement.keeps(name):
                roles[name].network.to(self.root_device)
            else:
                roles[name].network = torch.nn.Module()
                roles[name].blocks = []
                module.drop_role(name)
        module.use_placement(placement)
        super().model_to_device()

    def _choose_plan(self, roles: dict[str, Role]) -> PlacementPlan:
        """The plan with the least predicted time; all ranks measure at the same time, as they work, and take rank 0's choice."""
        module = self.lightning_module
        job = workload_of(module, module.trainer.datamodule)  # type: ignore[union-attr]
        on_gpu = self.root_device.type == "cuda"
        memory = float(torch.cuda.get_device_properties(self.root_device).total_memory) if on_gpu else None
        cluster = Cluster(1, 1, LinkSpeed(1e12), LinkSpeed(1e12), memory=memory)
        if self.world_size > 1:
            cluster = measure_cluster(RankGrid(self.num_processes, self.root_device.type), memory=memory)
        ranked = rank_plans(cluster, job, measure_roles(roles, job, self.root_device, self.world_size), self._auto_lag)
        rank_zero_info(f"PlacementStrategy: {explain(ranked, self.world_size)}")
        if not ranked[0].fits:
            raise ValueError(
                f"plan=auto: no plan fits; the least memory is {min(each.memory for each in ranked) / 1e9:.3g} GB a device: take"
                " more devices, or train adapters (tuning)."
            )
        plans = self.broadcast([each.plan for each in ranked if each.fits][:3])
        if self._trial_steps and len(plans) > 1:
            seconds = [self._try(plan) for plan in plans]
            said = "; ".join(
                f"{name_of(plan, self.world_size)} ({each.seconds:.3g} s predicted) took {taken:.3g} s"
                for plan, each, taken in zip(plans, ranked, seconds, strict=False)
            )
            rank_zero_info(f"PlacementStrategy: {said}.")
            return plans[self.broadcast(seconds.index(min(seconds)))]
        return plans[0]

    def _try(self, plan: PlacementPlan) -> float:
        """Median seconds of a rollout under a plan, of a copy of the module; the run does not change."""
        module = self.lightning_module
        assert module is not None
        outer, watch = module.trainer, _RolloutTimes()
        data = copy.copy(outer.datamodule)  # type: ignore[attr-defined]
        data.trainer = None
        skipped = 1 + plan.max_lag
        with torch.random.fork_rng():
            trainer = Trainer(
                accelerator=self.root_device.type, devices=outer.num_devices, num_nodes=outer.num_nodes,
                precision=outer.precision, strategy=PlacementStrategy(plan), max_epochs=1,
                limit_train_batches=skipped + self._trial_steps, limit_val_batches=0, num_sanity_val_steps=0, callbacks=[watch],
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                use_distributed_sampler=False,
            )  # fmt: skip
            trainer.fit(copy.deepcopy(module), datamodule=data)
        if len(watch.seconds) <= skipped:
            raise ValueError(f"trial_steps: an epoch of {len(watch.seconds)} rollouts is too short for a trial: set it to 0.")
        return float(median(watch.seconds[skipped:]))

    @override
    def configure_ddp(self) -> None:
        """Give each role its back end; the module as a whole has none."""
        assert self._placement is not None
        self._placement.wrap()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizers, and let PaRO divide the states of its roles."""
        super().setup_optimizers(trainer)
        if self._placement is not None:
            for name, optimizer in zip(self._of_roles().values(), self.optimizers, strict=True):
                if self._placement.plan.roles[name].backend == "paro":
                    self._divide_states(name, optimizer)

    def _divide_states(self, name: str, optimizer: Optimizer) -> None:
        """Let PaRO divide the states of a role; a collective call of all ranks."""
        placement = self._placement
        assert placement is not None
        made = torch.zeros((), dtype=torch.int64, device=self.root_device)
        if placement.holds(name):
            ranks = placement.plan.members(name, placement.world)
            plan, role = placement.plan.roles[name], placement.roles[name]
            placement.paro[name] = PaRORole(role, plan, optimizer, ranks, self.root_device, self._timeout)
            made += placement.paro[name].grid.num_process_groups
        # torch names groups by the number that were made before, which must stay the same on all ranks.
        most = made.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        for _ in range(int(most - made)):
            dist.new_group([self.global_rank], self._timeout, use_local_synchronization=True)

    @override
    def teardown(self) -> None:
        """Leave whole weights in the module where PaRO divided them."""
        if self._placement is not None and self._placement.paro:
            trainer = self.lightning_module.trainer  # type: ignore[union-attr]
            for each in self._placement.paro.values():
                each.close(restore=trainer.state.status != TrainerStatus.INTERRUPTED)
            self._placement.paro.clear()
        super().teardown()

    @property
    def placement(self) -> RankPlacement | None:
        """The plan at work; None outside of training."""
        return self._placement

    @override
    def shards_parameters(self) -> bool:
        """Whether a rank holds only a part of the parameters."""
        return True

    @override
    def forwards_are_collective(self) -> bool:
        return self.places_roles()

    @override
    def on_train_end(self) -> None:
        """Let chunks arrive before this process may end, and write the trace."""
        super().on_train_end()
        if self._placement is None:
            return
        self._placement.finish_sends()
        if self.trace is not None:
            ranks: list[Any] = [None] * self.world_size
            dist.all_gather_object(ranks, list(self._placement.timeline.spans))
            if self.is_global_zero:
                chrome_trace(ranks, self.trace)

    # Checkpoints

    def _of_roles(self) -> dict[str, str]:
        """Roles that are trained, by the prefix of their weights, in the order of their optimizers."""
        assert self._placement is not None
        return {role.prefix: name for name, role in self._placement.roles.items() if role.trained}

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights of all trained roles on rank 0; a collective call."""
        if self._placement is None:
            return super().lightning_module_state_dict()
        placement = self._placement
        with placement.whole_weights():
            state = super().lightning_module_state_dict()
        found = {name: value for name, value in state.items() if not name.startswith(tuple(self._of_roles()))}
        for prefix, role in self._of_roles().items():
            part: dict[str, Any] = {}
            if placement.holds(role):
                part = {name: whole(value) for name, value in state.items() if name.startswith(prefix)}
            ranks = placement.plan.members(role, placement.world)
            found |= part if 0 in ranks else _from_rank(part, ranks[0])
        return found

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what this rank keeps."""
        if self._placement is None:
            super().load_model_state_dict(checkpoint, strict)
            return
        assert self.lightning_module is not None
        absent = tuple(prefix for prefix, role in self._of_roles().items() if not self._placement.keeps(role))
        with self._placement.whole_weights(writeback=True):
            own = self.lightning_module.state_dict()
            state = {
                name: divided_like(value, own.get(name))
                for name, value in checkpoint["state_dict"].items()
                if not (absent and name.startswith(absent))
            }
            self.lightning_module.load_state_dict(state, strict=strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole state of an optimizer on rank 0; a collective call."""
        if self._placement is None:
            return super().optimizer_state(optimizer)
        place = next(number for number, each in enumerate(self.optimizers) if each is getattr(optimizer, "optimizer", optimizer))
        role = list(self._of_roles().values())[place]
        ranks = self._placement.plan.members(role, self._placement.world)
        if role in self._placement.paro:
            state = optimizer_state(self._placement.paro[role].engine)
        else:
            state = super().optimizer_state(optimizer)
            state = whole(state) if self._placement.holds(role) else state
        return state if 0 in ranks else _from_rank(state, ranks[0])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of the roles that this rank trains."""
        if self._placement is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        for role, optimizer, state in zip(
            self._of_roles().values(), self.optimizers, checkpoint["optimizer_states"], strict=True
        ):
            if role in self._placement.paro:
                load_optimizer_state(self._placement.paro[role].engine, state)
            elif self._placement.holds(role):
                optimizer.load_state_dict(divided_state(state, optimizer))

    def gradient_norm(self) -> None:
        """Each role clips by itself."""
        return


def _from_rank(state: Any, rank: int) -> Any:
    """A whole state that one rank has, on all ranks; a collective call."""
    held = [state]
    dist.broadcast_object_list(held, rank)
    return held[0]


class _RolloutTimes(Callback):
    """Seconds of each training step, from the time at which all ranks begin to that at which the last one ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        dist.barrier()
        self._begin = time.perf_counter()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        dist.barrier()
        self.seconds.append(time.perf_counter() - self._begin)


class FlatteningStrategy(PlacementStrategy):
    """All models on all ranks, each of which generates, scores and trains its part of the samples.

    Args:
        backend: Back end of actor and critic.
        gather: Whole weights of a divided actor for generation, see `PlacementPlan`.
        **kwargs: As of `PlacementStrategy`.
    """

    def __init__(self, backend: BackEnd = "replicate", gather: Gather = "once", **kwargs: Any) -> None:
        super().__init__(PlacementPlan.flattening(backend, gather), **kwargs)


class InterleavingStrategy(PlacementStrategy):
    """The reference on the first half of the ranks and the reward model on the second, which work at the same time.

    Args:
        backend: Back end of actor and critic, which are on all ranks.
        gather: Whole weights of a divided actor for generation, see `PlacementPlan`.
        **kwargs: As of `PlacementStrategy`.
    """

    def __init__(self, backend: BackEnd = "replicate", gather: Gather = "once", **kwargs: Any) -> None:
        super().__init__(PlacementPlan(), **kwargs)
        self.backend: BackEnd = backend
        self.gather: Gather = gather

    @override
    def plan(self, world: int) -> PlacementPlan:
        return PlacementPlan.interleaving(world, self.backend, self.gather)


class SeparationStrategy(PlacementStrategy):
    """The first ranks train, the others generate and score with copies of actor and critic.

    Args:
        train_ranks: Number of ranks that train; 0: half of them.
        chunks: Parts of a rollout; training begins with the first.
        max_lag: Rollouts by which generation may be ahead; 0: the weights are those of any other placement.
        backend: Back end of actor and critic where they are trained.
        **kwargs: As of `PlacementStrategy`.
    """

    def __init__(
        self, train_ranks: int = 0, chunks: int = 1, max_lag: int = 0, backend: BackEnd = "replicate", **kwargs: Any
    ) -> None:
        super().__init__(PlacementPlan(), **kwargs)
        self.train_ranks, self.chunks, self.max_lag = train_ranks, chunks, max_lag
        self.backend: BackEnd = backend

    @override
    def plan(self, world: int) -> PlacementPlan:
        if world < 2:
            raise ValueError("SeparationStrategy needs at least 2 ranks: start torchrun with --nproc-per-node 2 or more.")
        return PlacementPlan.separation(world, self.train_ranks or world // 2, self.chunks, self.max_lag, self.backend)


for name, strategy in (
    ("flattening", FlatteningStrategy),
    ("interleaving", InterleavingStrategy),
    ("separation", SeparationStrategy),
):
    StrategyRegistry.register(name, strategy, description=f"Placement of several models: {name}")
