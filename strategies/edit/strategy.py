"""EDiT as a Lightning strategy: replicas that train on their own and meet now and then."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from strategies.edit.blocks import Block, split_blocks
from strategies.edit.consensus import Consensus
from strategies.edit.penalty import ClipScope, DetectorUpdate, Granularity, Outer, Penalty
from strategies.edit.round_clock import RoundClock
from strategies.edit.synchronizer import Synchronizer, SyncReport
from strategies.mesh import axis_group, named_mesh
from strategies.refusals import (
    refuse_averages,
    refuse_ddp_hooks,
    refuse_other_precision,
    refuse_saving_by_step,
    refuse_scaled_losses,
)
from zoo.strategy_contract import StrategyContract

__all__ = ["EDiTStrategy"]

KEY = "edit"
REPLICATE, SHARD = "replicate", "shard"
Request = Literal["stop", "save", "validate"]
_BITS: dict[Request, int] = {"stop": 1, "save": 2, "validate": 4}


class EDiTStrategy(StrategyContract, DDPStrategy):
    """Each process trains a replica of its own; every few steps the replicas meet (EDiT, arXiv 2412.07210).

    The first ``warmup_steps`` are plain data parallelism. Afterwards no gradient is exchanged: after ``sync_interval`` optimizer
    steps (EDiT), or ``sync_seconds`` (A-EDiT), the distance that each replica went is a pseudo-gradient; outliers are left out,
    the others weighed, averaged and clipped, and an outer SGD moves the *anchor*, from which all replicas go on. This happens
    block by block in the forward pass of the next step, each block's communication beside the computation of the one before.
    A block is an entry of an ``nn.ModuleList``, or what the module names in ``sync_blocks() -> list[nn.Module]``.

    Validation, checkpoints and the end of training are preceded by a synchronisation: what is evaluated and saved is the
    anchor, the same on all ranks. The moments of the inner optimizer stay local; a checkpoint holds those of all ranks (and
    schedules, samplers, callbacks, as they may differ too), so that a run with as many processes goes on exactly. Any other
    strategy takes the weights, and the states of rank 0, from the same file.

    In A-EDiT ranks take different numbers of steps. ``max_steps`` is then a budget, so many steps a replica on average, and
    validation happens at the synchronisation after rank 0 wanted it.

    A replica whose weights are not finite at a synchronisation is left out, which is said, and goes on from the anchor.

    Args:
        sync_interval: tau, optimizer steps between two synchronisations; not used with ``sync_seconds``.
        sync_seconds: seconds between two synchronisations (A-EDiT).
        min_total_steps: A-EDiT waits for so many steps of all replicas together.
        warmup_steps: optimizer steps with ordinary averaging of gradients.
        outer_lr: learning rate of the outer SGD.
        outer_momentum: momentum of the outer SGD.
        nesterov: Nesterov momentum in the outer SGD.
        weighted: weigh replicas by ``softmax(-norm / temperature)``; else equally.
        temperature: of that softmax.
        step_weight: share of the weight that goes by the number of local steps (A-EDiT; 0.5 in the authors' library).
        skip_anomaly: leave out a replica whose pseudo-gradient norm is an outlier.
        ewma_alpha: weight of a new norm in the detectors' averages.
        ewma_warmup: synchronisations (not steps) before a detector judges.
        ewma_threshold: standard deviations above the mean that make an outlier.
        clip: largest norm of the averaged pseudo-gradient; null for no limit.
        granularity: what has a norm and a detector of its own: a block, a parameter, or everything.
        detector_update: whether outliers enter the detector's averages.
        clip_scope: clip block by block, or by the norm over all blocks (which leaves nothing to overlap).
        consensus: thin the pseudo-gradients out and let only those of the majority's sign count (`Consensus`); null: the plain
            weighted sum.
        overlap: synchronise block by block during the forward pass; false: all at once before it. Same result. Modules that read
            a block's weights before they call it, as for a penalty on weights, need false.
        cpu_offload: keep anchor and outer momentum in host memory.
        kwargs: of Lightning's DDPStrategy, for the warm-up.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        sync_interval: int = 128,
        sync_seconds: float | None = None,
        min_total_steps: int = 100,
        warmup_steps: int = 1000,
        outer_lr: float = 0.8,
        outer_momentum: float = 0.85,
        nesterov: bool = True,
        weighted: bool = True,
        temperature: float = 1.0,
        step_weight: float = 0.0,
        skip_anomaly: bool = True,
        ewma_alpha: float = 0.02,
        ewma_warmup: int = 120,
        ewma_threshold: float = 3.0,
        clip: float | None = 10.0,
        granularity: Granularity = "block",
        detector_update: DetectorUpdate = "exclude",
        clip_scope: ClipScope = "module",
        consensus: Consensus | None = None,
        overlap: bool = True,
        cpu_offload: bool = False,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if sync_interval < 1 or warmup_steps < 0 or min_total_steps < 1:
            raise ValueError(
                f"{name}: sync_interval={sync_interval} and min_total_steps={min_total_steps} must be at least 1,"
                f" warmup_steps={warmup_steps} not negative."
            )
        if sync_seconds is not None and sync_seconds < 0:
            raise ValueError(f"{name}: sync_seconds={sync_seconds} must not be negative, or null for a number of steps.")
        refuse_ddp_hooks(self, kwargs)
        super().__init__(**kwargs)
        self.sync_interval = sync_interval
        self.sync_seconds = sync_seconds
        self.min_total_steps = min_total_steps
        self.warmup_steps = warmup_steps
        self.overlap = overlap
        self.cpu_offload = cpu_offload
        self.outer = Outer(outer_lr, outer_momentum, nesterov)
        self.penalty = Penalty(
            weighted, temperature, skip_anomaly, ewma_alpha, ewma_warmup, ewma_threshold, clip, granularity, detector_update,
            clip_scope, step_weight, consensus,
        )  # fmt: skip
        #: Seconds that only grow; tests put their own here.
        self.clock: Callable[[], float] = time.monotonic
        self.mesh: DeviceMesh | None = None
        self.synchronizer: Synchronizer | None = None
        self._fit: Trainer | None = None
        self._rounds: RoundClock | None = None
        self._max_steps: int | None = None
        self._restored: dict[str, Any] | None = None
        self._synced_step = 0
        self._seen_step = 0
        self._together = True
        self._asked = 0
        self._agreed = self._coming = 0
        self._is_last_step = self._stops = False

    # What others may ask

    def is_asynchronous(self) -> bool:
        """Whether ranks take different numbers of steps (A-EDiT)."""
        return self.sync_seconds is not None

    @property
    def in_warmup(self) -> bool:
        """Whether gradients are still averaged over all ranks."""
        return self.synchronizer is None

    @property
    def last_sync(self) -> SyncReport | None:
        """Norms, outliers and weights of the last synchronisation; None before the first."""
        return self.synchronizer.report if self.synchronizer is not None else None

    @property
    def local_steps(self) -> int:
        """Optimizer steps of this replica since the last synchronisation."""
        return self._fit.global_step - self._synced_step if self._fit is not None else 0

    def replicas_diverge(self) -> bool:
        """Yes, after the warm-up."""
        return True

    def step_group(self) -> dist.ProcessGroup | None:
        """The ranks that must decide alike on a step, and that share statistics of one: reduce over these only.

        Returns:
            None, all ranks, while gradients are averaged over all of them; then the ranks that hold one replica together (for
            a replica on one device, a group of this rank alone). Ask again at each step.
        """
        if self.in_warmup:
            return None
        assert self.mesh is not None
        return axis_group(self.mesh, SHARD)

    def agrees_without_waiting(self) -> bool:
        """Yes, after the warm-up."""
        return True

    def agree(self, request: Request, wanted: bool) -> bool:
        """Ask all ranks for something without waiting for them.

        In the warm-up the answer is immediate, and a collective call. Afterwards a wish travels with the next synchronisation:
        the answer is true on all ranks at once, in the batch whose forward pass began with it.

        Args:
            request: ``stop``, ``save`` or ``validate``; asked at most once a batch.
            wanted: whether this rank wants it.
        """
        if self.in_warmup:
            return bool(self.reduce_boolean_decision(wanted, all=False))
        self._asked |= _BITS[request] * wanted
        granted = bool(self._agreed & _BITS[request])
        self._agreed &= ~_BITS[request]
        if granted:
            self._asked &= ~_BITS[request]
        self._stops |= granted and request == "stop"
        return granted

    def agree_at_end(self, wanted: bool) -> bool:
        """Whether any rank wants something, where all of them have stopped; a collective call if ranks step at their own paces.

        Args:
            wanted: whether this rank wants it.
        """
        if not self.is_asynchronous() or self.world_size == 1:
            return wanted
        return bool(self.reduce_boolean_decision(wanted, all=False))

    # Set-up

    @override
    def setup_distributed(self) -> None:
        """Join the processes, and arrange them by replica."""
        super().setup_distributed()
        self.mesh = self._make_mesh()

    def _make_mesh(self) -> DeviceMesh:
        return named_mesh(self.root_device.type, **{REPLICATE: -1, SHARD: 1})

    @override
    def setup(self, trainer: Trainer) -> None:
        """Check that the Trainer's options go with replicas that differ, and prepare the network."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._check(trainer)
            if self.synchronizer is not None:
                self.synchronizer.close()
            self.synchronizer = self._rounds = None
            self._fit = trainer
            self._together, self._asked, self._agreed, self._coming = True, 0, 0, 0
            self._is_last_step = self._stops = False
        self._set_up_network(trainer)
        if fitting and self.is_asynchronous():
            loop = trainer.fit_loop.epoch_loop
            self._max_steps, loop.max_steps = trainer.max_steps, -1  # not each rank by its own count
            # Before it trains, Lightning loads validation data, all ranks together, if an epoch is to be validated: of ranks
            # that go on in different ones all do.
            loop._should_check_val_epoch = lambda: trainer.enable_validation  # type: ignore[method-assign]

    def _set_up_network(self, trainer: Trainer) -> None:
        super().setup(trainer)

    def _check(self, trainer: Trainer) -> None:
        name = type(self).__name__
        refuse_scaled_losses(self)
        refuse_other_precision(self)
        if self.is_asynchronous() and (trainer.min_steps is not None or trainer.min_epochs):
            raise ValueError(
                f"{name} with sync_seconds: min_steps={trainer.min_steps} and min_epochs={trainer.min_epochs} would let each rank"
                " end by its own count, and the others wait: leave them out; max_steps is a budget."
            )
        differ = "each replica's own, which differ between synchronisations"
        refuse_averages(self, trainer, differ, "remove it; the anchor, which is validated and saved, is an average already")
        if self.is_asynchronous():
            refuse_saving_by_step(self, trainer, epochs_are_shared=False)
            reloads = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            if trainer.max_epochs not in (None, -1) or trainer.max_steps == -1 or reloads:
                raise ValueError(
                    f"{name} with sync_seconds: ranks end their epochs at different times, so training needs a budget of steps:"
                    f" set max_steps and neither max_epochs (now {trainer.max_epochs}) nor reload_dataloaders_every_n_epochs."
                )

    def _setup_model(self, model: nn.Module) -> Any:
        """The network in DDP, if the run begins with a warm-up; else as it is, with the weights of rank 0."""
        if self.warmup_steps > 0:
            return super()._setup_model(model)
        self._spread_from_first([*model.parameters(), *model.buffers()])
        return model

    @torch.no_grad()
    def _spread_from_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)

    def _register_ddp_hooks(self) -> None:
        """Nothing: DDP averages as it always does."""

    # Training

    @override
    def on_train_start(self) -> None:
        """Begin where the checkpoint, if there is one, left off."""
        assert self._fit is not None
        loop = self._fit.fit_loop.epoch_loop
        # Lightning asks rank 0 for a SIGTERM before each batch, and all ranks would wait for it there.
        loop._broadcast_sigterm_tensor = self._agreed_sigterm(loop._broadcast_sigterm_tensor)  # type: ignore[method-assign]
        if self.is_asynchronous():
            vars(loop).pop("_should_check_val_epoch", None)
            loop._should_check_val_fx = self._agreed_validation(loop._should_check_val_fx)  # type: ignore
        if self._fit.global_step >= self.warmup_steps:
            self._end_warmup()
        elif self._restored is not None:
            if "detectors" in self._restored:
                rank_zero_warn(
                    f"EDiT: the checkpoint is of step {self._fit.global_step}, after its warm-up, but this run's lasts until step"
                    f" {self.warmup_steps}: outer momentum and outlier detectors begin anew then."
                )
            self._restored = None
        spent = self._max_steps is not None and self._fit.global_step >= self._max_steps
        if spent if self._rounds is None else self._rounds.is_spent(self._rounds.taken):
            self._fit.should_stop = True  # a run that has ended before

    def _agreed_sigterm(self, original: Callable[[], None]) -> Callable[[], None]:
        return lambda: original() if self.in_warmup else None

    def _agreed_validation(self, original: Callable[[Any], bool]) -> Callable[[Any], bool]:
        answered = (-1, False)  # batch and answer: a batch may be asked about more than once

        def should_validate(fetcher: Any) -> bool:
            nonlocal answered
            assert self._fit is not None
            if self.in_warmup and self._max_steps is not None and self._fit.global_step >= self._max_steps:
                self._fit.should_stop = True
            wanted = original(fetcher)
            if self.in_warmup:
                return wanted
            # Ranks end in different epochs, and some in the middle of a step: the answer is the same for all of them.
            if self._stops or self._fit.should_stop:
                return self._fit.enable_validation and not self._stops
            batch = self._fit.fit_loop.total_batch_idx
            if answered[0] != batch:
                # Ranks accumulate different numbers of batches for their last step: all validate when it is done.
                answered = batch, not self._is_last_step and self.agree("validate", wanted and self.is_global_zero)
            return answered[1]

        return should_validate

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step, which a synchronisation precedes if it is due."""
        self._before_step()
        assert self._fit is not None
        # What came with a save or a validation, of which some may have asked before it, counts from the next batch on; in the
        # last step some have no next one.
        self._agreed, self._coming = self._agreed | (0 if self._is_last_step else self._coming), 0
        # For the whole batch, since some ask before a save, with which others' steps are counted, and some after it.
        self._is_last_step = self._rounds is not None and self._rounds.is_spent(self._rounds.taken + self._rounds.num_replicas)
        self._stops = False
        if self._is_last_step and not self._fit.fit_loop._should_accumulate():
            self._fit.should_stop = True
        output = super().training_step(*args, **kwargs)
        if self.synchronizer is not None:
            self.synchronizer.finish()
            self._check_logged()
        return output

    def _check_logged(self) -> None:
        """Refuse what would be summed up over ranks at the end of an epoch, where they do not come together."""
        results = self._fit.fit_loop.epoch_loop._results.values() if self._fit is not None and self.is_asynchronous() else ()
        for result in results:
            if result.meta.on_epoch and not result.is_tensor and self.world_size > 1:
                raise RuntimeError(
                    f"{type(self).__name__} with sync_seconds: the metric {result.meta.name} is logged in training with"
                    " on_epoch=True, and ranks would wait for one another at their epochs' ends: log it on_step, or validate it."
                )

    def _before_step(self) -> None:
        assert self._fit is not None
        step = self._fit.global_step
        if self.synchronizer is None:
            if step >= self.warmup_steps:
                self._end_warmup()
            return
        if step == self._seen_step:  # a later micro-batch, or the first step of all
            return
        due = self.local_steps >= self.sync_interval if self._rounds is None else self._is_round_over(step - self._seen_step)
        self._seen_step, self._together = step, due
        if due:
            self._synchronize(finish=not self.overlap)

    def _is_round_over(self, steps: int) -> bool:
        """Ask the clock of A-EDiT; the ranks of one replica go by the answer that its first one got."""
        assert self._rounds is not None and self.mesh is not None
        shard = self.mesh[SHARD]
        over = shard.get_local_rank() == 0 and self._rounds.step(steps)
        if shard.size() > 1:
            answer = torch.tensor(over, device=self.root_device).int()
            dist.broadcast(answer, group=shard.get_group(), group_src=0)
            over = bool(answer)
        return over

    def _end_warmup(self) -> None:
        assert self._fit is not None and self.mesh is not None and self.lightning_module is not None
        if isinstance(self.model, DistributedDataParallel):
            self.model = self.lightning_module  # its hooks do nothing unless its own forward was called
        step = self._fit.global_step
        persistent = set(nn.Module.state_dict(self.lightning_module, keep_vars=True))
        self.synchronizer = Synchronizer(
            self._blocks(self.lightning_module),
            [buffer for name, buffer in self.lightning_module.named_buffers() if name in persistent and buffer.numel()],
            self.penalty,
            self.outer,
            axis_group(self.mesh, REPLICATE),
            axis_group(self.mesh, SHARD) if self.mesh[SHARD].size() > 1 else None,
            self.overlap,
            self.cpu_offload,
            self._settle,
        )
        self._synced_step = self._seen_step = step
        if self._restored is not None:
            self._restore(self._restored)
            self._restored = None
        if self.is_asynchronous():
            budget = None if self._max_steps is None else self._max_steps * self.synchronizer.num_replicas
            name = self.broadcast(f"{KEY}/{time.time_ns()}")
            store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
            decides = self.global_rank == 0
            self._rounds = RoundClock(
                store, self.sync_seconds or 0.0, self.min_total_steps, budget, self.synchronizer.num_replicas, decides, self.clock
            )
            self._rounds.start_round(self._total_steps())

    def _blocks(self, module: LightningModule) -> list[Block]:
        """Units that are synchronised one by one."""
        return split_blocks(module)

    def _total_steps(self) -> int:
        """Optimizer steps of all replicas so far."""
        assert self._fit is not None and self.mesh is not None
        total = torch.tensor(self._fit.global_step, device=self.root_device)
        dist.all_reduce(total, group=axis_group(self.mesh, REPLICATE))
        return int(total)

    def _settle(self) -> None:
        """Nothing: the new weights of a block are used by the stream that wrote them."""

    def _synchronize(self, finish: bool) -> None:
        assert self._fit is not None and self.synchronizer is not None
        self._check_trained()
        report = self.synchronizer.begin(self.local_steps, self._asked)
        if finish:
            self.synchronizer.finish()
        self._synced_step = self._seen_step = self._fit.global_step
        self._asked, self._together = 0, True
        for asked in report.requests:
            self._coming |= asked
        self._heal([not all(map(math.isfinite, norms)) for norms in report.norms])
        if any(weights is None for weights in report.weights):
            rank_zero_warn(
                f"EDiT: at step {self._fit.global_step} all replicas were anomalous in"
                f" {sum(weights is None for weights in report.weights)} of {len(report.weights)} units, which go back to the"
                " anchor; the outer momentum stays as it was."
            )
        if self._rounds is not None:
            taken = self._rounds.taken + sum(report.steps)
            self._rounds.start_round(taken)

    def _heal(self, broken: list[bool]) -> None:
        """Tell of replicas with weights that are not finite, and give a broken one's optimizer moments that are."""
        assert self._fit is not None and self.synchronizer is not None
        if not any(broken):
            return
        rank_zero_warn(
            f"EDiT: at step {self._fit.global_step} weights of replica"
            f" {', '.join(str(replica) for replica, is_broken in enumerate(broken) if is_broken)} (of {len(broken)}) were not"
            " finite: it goes on from the anchor, its optimizer's moments begin anew where they are not finite. SpikeGuard would"
            " leave such a step out."
        )
        if broken[self.synchronizer.index]:
            states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
            for value in (value for state in states for value in state.values() if isinstance(value, Tensor)):
                local = value.to_local() if isinstance(value, DTensor) else value
                if local.is_floating_point() and not bool(local.isfinite().all()):
                    local.zero_()

    def _check_trained(self) -> None:
        assert self.lightning_module is not None and self.synchronizer is not None
        known = set(self.synchronizer.parameters)
        late = [name for name, p in self.lightning_module.named_parameters() if p.requires_grad and p not in known]
        if late:
            raise RuntimeError(
                f"{type(self).__name__}: {', '.join(late[:5])} ({len(late)} in all) were frozen when the warm-up ended and are"
                " trained now, each replica for itself: unfreeze them before, with a longer warmup_steps."
            )

    def _meet(self) -> None:
        """Synchronise now, unless all replicas hold the anchor already; all ranks come here at the same time."""
        if self._fit is None or self.lightning_module is None or self._fit.state.finished:
            return
        if self.synchronizer is None:  # the warm-up: buffers are those of rank 0, as DDP's
            self._spread_from_first(self.lightning_module.buffers())
            return
        self.synchronizer.finish()
        if self.is_asynchronous() or self.local_steps:
            self._synchronize(finish=True)

    @override
    def on_validation_start(self) -> None:
        """Validate the anchor."""
        if self._is_fitting:
            self._meet()

    @override
    def on_train_end(self) -> None:
        """Leave the anchor in the module."""
        self._meet()
        if self.synchronizer is not None:
            self.synchronizer.close()

    @override
    def teardown(self) -> None:
        """Give the loop its own ways back."""
        if self._fit is not None:
            loop = self._fit.fit_loop.epoch_loop
            for name in ("_broadcast_sigterm_tensor", "_should_check_val_epoch", "_should_check_val_fx"):
                vars(loop).pop(name, None)
            if self._max_steps is not None:
                loop.max_steps, self._max_steps = self._max_steps, None
        self._restored = None  # of a checkpoint that was tested, say: nothing for the run after
        super().teardown()

    @property
    def _is_fitting(self) -> bool:
        return self._fit is not None and self._fit.state.fn == TrainerFn.FITTING

    # Collectives that Lightning starts

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over ranks, where all of them are at the same place.

        Raises:
            RuntimeError: A-EDiT, in the middle of a round.
        """
        self._check_together("a reduction, such as of a metric logged with sync_dist=True")
        return super().reduce(tensor, group, reduce_op)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast, where all ranks are at the same place.

        Raises:
            RuntimeError: A-EDiT, in the middle of a round.
        """
        self._check_together("a broadcast")
        return super().broadcast(obj, src)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather, where all ranks are at the same place.

        Raises:
            RuntimeError: A-EDiT, in the middle of a round.
        """
        self._check_together("a gathering of tensors")
        return super().all_gather(tensor, group, sync_grads)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks, where all of them come.

        Raises:
            RuntimeError: A-EDiT, in the middle of a round.
        """
        self._check_together("a barrier")
        super().barrier(*args, **kwargs)

    def _check_together(self, what: str) -> None:
        if self._rounds is not None and not self._together and self._fit is not None and self._fit.training:
            raise RuntimeError(
                f"{type(self).__name__} with sync_seconds: {what} was asked for in training, while ranks are at different steps,"
                " and would never end: do it in validation, or use sync_interval."
            )

    # Checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The anchor."""
        if self._is_fitting:
            self._meet()
        return self._whole_state_dict()

    def _whole_state_dict(self) -> dict[str, Any]:
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add what EDiT keeps, and every rank's own states, and write on rank 0.

        ``checkpoint["edit"]`` holds ``momentum``, ``anchor`` (where it is more precise than the weights), ``detectors``,
        ``syncs`` (how many there were), ``shards`` (ranks a replica) and ``ranks``: of each rank, everything in its checkpoint
        but the weights.
        """
        if "optimizer_states" in checkpoint and self._is_fitting:
            assert self.mesh is not None
            own = {key: value for key, value in checkpoint.items() if key != "state_dict"}
            if self.mesh[SHARD].get_local_rank():  # the first rank of a replica speaks for its optimizer
                own.pop("optimizer_states")
            gathered: list[Any] | None = [None] * self.world_size if self.is_global_zero else None
            dist.gather_object(tree_map_only(Tensor, lambda tensor: tensor.cpu(), own), gathered, dst=0)
            state = {} if self.synchronizer is None else self.synchronizer.state_dict()
            checkpoint = {**checkpoint, KEY: {**state, "shards": self.mesh[SHARD].size(), "ranks": gathered}}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of this strategy or another one, and take this rank's own states."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._restored = checkpoint.pop(KEY, None)
        if self._restored is not None and self.mesh is not None:
            ranks, shards = self._restored.pop("ranks"), self._restored["shards"]
            if not self.is_asynchronous() and len({_position(own) for own in ranks}) > 1:
                rank_zero_warn(
                    f"EDiT: the checkpoint is of A-EDiT, whose ranks had taken {min(own['global_step'] for own in ranks)} to"
                    f" {max(own['global_step'] for own in ranks)} steps: without sync_seconds all go on from where rank 0 was,"
                    " each with its own optimizer's state."
                )
                ranks = [{**ranks[0], **{key: own[key] for key in ("optimizer_states",) if key in own}} for own in ranks]
            if (len(ranks), shards) == (self.world_size, self.mesh[SHARD].size()):
                first = ranks[self.global_rank - self.global_rank % shards]
                checkpoint.update({**ranks[self.global_rank], "optimizer_states": first["optimizer_states"]})
            elif len(ranks) // shards == self.mesh[REPLICATE].size():
                checkpoint.update(ranks[self.mesh[REPLICATE].get_local_rank() * shards])
            else:
                rank_zero_warn(
                    f"EDiT: the checkpoint is of {len(ranks) // shards} replicas, this run has {self.mesh[REPLICATE].size()}: all"
                    " go on with the optimizer's state of the first one."
                )
        return checkpoint

    def _restore(self, state: Mapping[str, Any]) -> None:
        assert self.synchronizer is not None
        if "detectors" in state and not self.synchronizer.load_state_dict(dict(state)):
            rank_zero_warn("EDiT: the checkpoint has other replicas or units, so the outlier detectors begin anew.")


def _position(checkpoint: Mapping[str, Any]) -> str:
    """Progress of a rank's training, as a text."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = [loop.get(name, {}).get("current") for name in ("epoch_progress", "epoch_loop.batch_progress")]
    return f"{checkpoint['global_step']} {progress}"
