"""Parameter servers as a strategy of Lightning: workers that do not wait for one another, and whose loss stops nobody."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from strategies.antdt.control.solutions import Solution, StaticBSP
from strategies.antdt.ps.agent import Agent
from strategies.antdt.ps.agreement import Agreement
from strategies.antdt.ps.clock import Consistency
from strategies.antdt.ps.collectives import Collectives
from strategies.antdt.ps.loader import ShardLoader
from strategies.antdt.ps.open_loop import Clip, OpenLoop, check_trainer
from strategies.antdt.ps.remote_optimizer import OptimizerSpec, RemoteOptimizer
from strategies.antdt.ps.remote_parameters import RemoteParameters
from strategies.antdt.ps.rendezvous import Rendezvous, leave, num_restarts, run_to_join, unless_over
from strategies.antdt.ps.schedules import Schedules
from strategies.antdt.ps.slices import RowUpdate
from strategies.antdt.ps.training import Training
from strategies.antdt.ps.training_data import TrainingData
from strategies.antdt.ps.worker import ParameterClient
from strategies.antdt.service.address import Address
from strategies.antdt.service.client import Client
from strategies.antdt.simulation.inject import Injector, Slowdown
from strategies.refusals import (
    refuse_accumulation,
    refuse_averages,
    refuse_ddp_hooks,
    refuse_manual_optimization,
    refuse_other_precision,
    refuse_saving_by_step,
    refuse_scaled_losses,
    refuse_several_optimizers,
)
from zoo.strategy_contract import Request, StrategyContract, changes_gradients, loss_denominator

__all__ = ["ParameterServerStrategy"]

KEY = "antdt_ps"
Mode = Literal["asp", "ssp", "bsp"]


class ParameterServerStrategy(StrategyContract, DDPStrategy):
    """Workers fetch weights from parameter servers and send gradients to them; they share no process group (AntDT, PS mode).

    Parameters and optimizer are divided over the servers, which apply gradients as they come (``asp``), let no worker be more
    than ``staleness`` gradients ahead of the slowest (``ssp``), or make a step of one gradient of each worker (``bsp``), of which
    the last ``backup`` ones of each step are dropped. ``bsp`` without backup is the training of one process with the union of the
    batches. Samples are handed out by the data-sharding service in all modes, so that fast workers train more of them.

    A worker that is killed stops nobody: its samples are given to others, and a new process with its rank (started by whoever
    watches over single workers; torchrun starts the whole group again) is let in while the others train. A server that is killed
    is started again by the workers, from the file that it writes every ``save_every`` seconds; what it had learned since is lost
    and said so in its log. With one server, a gradient and the word that its samples are trained arrive in one message, so that a
    killed worker leaves both or nothing; with several, the samples of a message that reached some of them only come again.

    Batches are those of the DataLoader's data set and collate function, ``batch_size`` samples a worker. Each worker's loop has
    as many as it gets; ``max_steps`` and schedules by step count steps as one process with all workers' batches would: in ``asp``
    and ``ssp``, W gradients are one. Validation and checkpoints are done by all workers together, with the servers' weights,
    between epochs; `RunCheckpoint` also saves in between. Gradients are clipped as in one process (``bsp``), or each on its own.

    Args:
        mode: see above.
        staleness: of ``ssp``.
        backup: of ``bsp``: gradients of a step that are not waited for.
        servers: how many to start, on this machine; or where they are, ``[host:port, ...]``, with their token in $ANTDT_TOKEN.
        tables: names (or patterns, ``*.table``) of ``nn.Embedding`` and ``nn.EmbeddingBag`` modules of which only the rows that a
            batch looks up are fetched and sent; null: those made with ``sparse=True``.
        row_update: ``exact``: as in one process, where weight decay and momentum also move rows that no sample touched; ``lazy``:
            they do not, which spares the servers much work on large tables.
        on_drop: what becomes of the samples of a dropped gradient: ``lose``: they count as trained; ``requeue``: others get them.
        solution: what decides on batches, backups and restarts; null: nothing is decided.
        server: the data-sharding service: ``auto``: a process of its own; or ``host:port``, its token in $ANTDT_TOKEN.
        global_batch_size: samples of a step of all workers; null: the DataLoader's batch size times their number.
        shard_steps: so many batches' samples are handed out at once.
        tail_factor: a worker gets at most its share of the rest of the epoch over this.
        seed: of the order of samples; null: that of ``seed_everything``.
        report_every: batches between two reports to the controller.
        decide_every: seconds between two decisions.
        restart_cost: seconds that the restart of one process is thought to take, until one was seen.
        heartbeat_timeout: seconds after which a silent worker is held for lost.
        grace: seconds for which a worker whose connection has closed may come back.
        save_every: seconds between two copies of a server's part on disk.
        injector: makes workers slow on purpose, for tests and benchmarks.
        server_cost: seconds that a server takes longer for each gradient, for tests and benchmarks, and
        server_slowdowns: when it takes a multiple of that; ``rank`` is the server's number.
        frame_limit: largest message, in bytes.
        kwargs: of Lightning's ``DDPStrategy``.

    Raises:
        ValueError: numbers out of range, or options that do not go together.
    """

    def __init__(
        self,
        mode: Mode = "asp",
        staleness: int = 0,
        backup: int = 0,
        servers: int | list[str] = 1,
        tables: list[str] | None = None,
        row_update: RowUpdate = "exact",
        on_drop: Literal["lose", "requeue"] = "lose",
        solution: Solution | None = None,
        server: str = "auto",
        global_batch_size: int | None = None,
        shard_steps: int = 20,
        tail_factor: float = 2.0,
        seed: int | None = None,
        report_every: int = 10,
        decide_every: float = 10.0,
        restart_cost: float = 10.0,
        heartbeat_timeout: float = 60.0,
        grace: float = 5.0,
        save_every: float = 30.0,
        injector: Injector | None = None,
        server_cost: float = 0.0,
        server_slowdowns: list[Slowdown] | None = None,
        frame_limit: int = 2**32,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        try:
            self.consistency = Consistency(mode, staleness, backup)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        least = {"servers": 1, "shard_steps": 1, "tail_factor": 1, "report_every": 1, "global_batch_size": 1, "decide_every": 0,
                 "restart_cost": 0,
                 "heartbeat_timeout": 1, "grace": 0, "save_every": 0, "server_cost": 0, "frame_limit": 2**16}  # fmt: skip
        given = {key: value for key, value in locals().items() if key in least}
        given["servers"] = len(servers) if isinstance(servers, list) else servers
        for key, value in given.items():
            if value is not None and value < least[key]:
                raise ValueError(f"{name}: {key}={value} must be at least {least[key]}.")
        if row_update not in ("exact", "lazy") or on_drop not in ("lose", "requeue"):
            raise ValueError(f"{name}: row_update={row_update!r} must be exact or lazy, on_drop={on_drop!r} lose or requeue.")
        refuse_ddp_hooks(self, kwargs)
        super().__init__(**kwargs)
        self.servers, self.server, self.tables, self.row_update = servers, server, tables, row_update
        self.on_drop, self.solution = on_drop, solution
        self.global_batch_size, self.shard_steps, self.tail_factor, self.seed = global_batch_size, shard_steps, tail_factor, seed
        self.report_every, self.decide_every, self.heartbeat_timeout = report_every, decide_every, heartbeat_timeout
        self.restart_cost, self.grace, self.save_every, self.injector = restart_cost, grace, save_every, injector
        self.server_cost, self.server_slowdowns, self.frame_limit = server_cost, server_slowdowns or [], frame_limit
        self._trainer: Trainer | None = None
        self._collectives = Collectives()
        self._client: ParameterClient | None = None
        self._agreement: Agreement | None = None
        self._data: Client | None = None
        self._loader: ShardLoader | None = None
        self._agent: Agent | None = None
        self._training: Training | None = None
        """From the first step to the last."""
        self._borrowed = ExitStack()
        """Gives back what belongs to the trainer and the module."""
        self._error: dict[str, str] | None = None
        self._averages = False
        self._batch: Any = None
        self._restored: dict[str, Any] | None = None
        self._kept: dict[str, Any] | None = None
        self.positions_log: list[tuple[int, int, Tensor]] | None = None
        """For tests: a list here gets ``(epoch, version, positions)`` of each gradient that counts."""

    # ---- what others may ask ------------------------------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """Whether samples of evaluation are divided (Lightning asks)."""
        return True

    @property
    def client(self) -> ParameterClient:
        """Calls of this worker to the parameter servers."""
        assert self._client is not None
        return self._client

    def antdt_state(self) -> dict[str, Any]:
        """Where this worker stands, for monitors; of batches and times it knows its own only.

        ``step`` (of the servers' clock), ``batch``, ``version``, ``restarts``, ``generation``, ``agent_seconds`` (of reports),
        ``present`` (ranks), ``dropped`` (gradients); once a batch was trained, ``bpt`` (seconds for it, waiting not included),
        ``wall`` (seconds since the one before) and ``bubble`` (the difference).
        """
        state: dict[str, Any] = {
            "step": self._client.version if self._client is not None else 0,
            "batch": [self._loader.batch] if self._loader is not None else [],
            "version": 0,
            "restarts": num_restarts(),
            "generation": self._data.gen if self._data is not None else 0,
            "agent_seconds": 0.0,
            "present": list(self._collectives.present),
            "dropped": 0,
        }
        return state if self._agent is None else state | self._agent.state()

    def sample_positions(self, batch_size: int) -> Tensor:
        """Places in the epoch's order of the samples of this worker's batch: int64 ``(batch_size,)``."""
        trainer = self._trainer
        if trainer is not None and trainer.training and self._loader is not None and self._loader.current is not None:
            return self._loader.current.positions[:batch_size]
        ranks = self._collectives.present or [self.global_rank]
        return torch.arange(batch_size) * len(ranks) + ranks.index(self.global_rank)

    def is_asynchronous(self) -> bool:
        """Yes: a step's number is another one on each worker."""
        return True

    def weighs_batches(self) -> bool:
        """Yes, by the module's `loss_denominator`."""
        return True

    def agrees_without_waiting(self) -> bool:
        """Yes: the servers pass requests on."""
        return True

    def agree(self, request: Request, wanted: bool) -> bool:
        """Say what this worker wants; true once on each, after the batch in which it heard that any wanted it."""
        assert self._agreement is not None
        return self._agreement.grant(request, wanted)

    # ---- a run begins -------------------------------------------------------------------------------------------------

    @override
    def setup_distributed(self) -> None:
        """Find the servers and take part, without a process group."""
        reset_seed()
        self.set_world_ranks()
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        self._rendezvous = Rendezvous(
            Path(trainer.default_root_dir) / "antdt", self.global_rank, self.world_size, self.num_nodes, self.heartbeat_timeout
        )
        self._collectives, self._error = Collectives(self.global_rank, self.world_size), None
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._check(trainer)
        joins = run_to_join() if fitting else ""
        with unless_over(self._collectives, bool(joins)):
            self._client = self._rendezvous.connect(
                self.servers, joins, self.frame_limit, self.grace, self.server_cost, self.server_slowdowns
            )
        self._collectives.client, self._collectives.present = self._client, list(range(self.world_size))
        self._agreement = Agreement(self.client)
        if self.client.late:
            trainer.num_sanity_val_steps = 0  # the others have done with it  # type: ignore[attr-defined]

    def _check(self, trainer: Trainer) -> None:
        """See that what a trainer is to do can be done here.

        Raises:
            ValueError: it cannot; the message names what does not go.
        """
        name, module = type(self).__name__, trainer.lightning_module
        refuse_manual_optimization(self, "the servers make its steps", "use automatic optimization, or ddp")
        refuse_accumulation(self, trainer, "use a larger batch_size, or mode bsp, where a step accumulates over the workers")
        refuse_saving_by_step(self, trainer, epochs_are_shared=True)
        refuse_scaled_losses(self)
        refuse_other_precision(self)
        check_trainer(trainer)
        self._averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        tables = self.tables or any(getattr(each, "sparse", False) for each in module.modules())
        if self.consistency.kind != "bsp" or tables:
            seen = f"of which each worker sees others in mode {self.consistency.kind}, and of tables only some rows"
            refuse_averages(self, trainer, seen, "use mode bsp without tables, or remove it")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging) or changes_gradients(callback):
                raise ValueError(
                    f"{name}: {type(callback).__name__} acts on the optimizer of this process, but the step is made by the"
                    " servers: remove it."
                )
        overridden = type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
        if self.consistency.kind == "bsp" and self.world_size > 1 and overridden:
            raise ValueError(
                f"{name}: {type(module).__name__}.configure_gradient_clipping would clip the gradient of each worker, not that of"
                " the step, which only the servers know: use gradient_clip_val, or mode asp or ssp."
            )

    @override
    def setup(self, trainer: Trainer) -> None:
        """Prepare the module."""
        assert self.accelerator is not None and self.model is not None
        self._trainer = trainer
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            refuse_several_optimizers(self, self.optimizers, "of which the servers run one")
            if not self.optimizers:
                raise ValueError(f"{type(self).__name__}: configure_optimizers gives none: give one.")
            OptimizerSpec.of(self.optimizers[0])  # refuse now what servers cannot run
        self.setup_precision_plugin()
        assert self.lightning_module is not None
        self._collectives.serve_metrics(self.lightning_module)
        self._collectives.share(self.lightning_module)

    # ---- data ---------------------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How samples of evaluation are divided among the workers that are there."""
        ranks = self._collectives.present or list(range(self.world_size))
        if self.global_rank not in ranks:  # came late, and has not been let in
            ranks = [self.global_rank]
        return {"num_replicas": len(ranks), "rank": ranks.index(self.global_rank)}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Replace the training loader by one that asks the data-sharding service."""
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        if trainer is None or not trainer.training:
            return dataloader
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        samples = TrainingData(dataloader, seed, self.global_batch_size, self.world_size, self.on_drop)
        if self._data is None:
            self._data = self._come_to_data(samples)
        client, limit = self.client, trainer.limit_train_batches
        assert self._agreement is not None

        def begin(epoch: int) -> None:
            if client.epoch < epoch:
                client.enter(epoch)

        self._loader = ShardLoader(
            samples.loader, samples.order, self._data, samples.identity["n"], samples.share(self.global_rank),
            samples.global_batch, seed=seed, shard_steps=self.shard_steps, epoch=lambda: trainer.current_epoch, begin=begin,
            interrupted=self._agreement.interrupted, waits=client.idle, limit=limit if isinstance(limit, int) else None,
        )  # fmt: skip
        if self._training is not None:  # loaders are made again
            self._training.loader = self._loader
        return self._loader

    def _come_to_data(self, samples: TrainingData) -> Client:
        late = self.client.late
        job = {
            "dataset": {**samples.identity, "epochs": None},
            "solution": (self.solution or StaticBSP()).init_config,
            "global_batch": samples.global_batch,
            "semantics": "at_least_once_batch",
            "tail_factor": self.tail_factor,
            "controller": {"decide_every": self.decide_every, "group_restart": False, "restart_cost": self.restart_cost},
        }
        with unless_over(self._collectives, late):
            return self._rendezvous.come_to_data(self.server, lambda: not late or self._training is not None, job)

    # ---- training begins ----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        """Fill the servers, or be let in by those who train already."""
        trainer, module, loader, data = self._trainer, self.lightning_module, self._loader, self._data
        assert trainer is not None and module is not None and self._agreement is not None
        loaders = trainer.fit_loop._combined_loader
        if loader is None or data is None or (loaders is not None and len(loaders.flattened) != 1):
            raise ValueError(f"{type(self).__name__}: train_dataloader must give one DataLoader.")
        client, late, synchronous = self.client, self.client.late, self.consistency.kind == "bsp"
        parts = 1 if synchronous else self.world_size  # gradients that are one step of one process
        loader.open = True
        schedules = Schedules(
            self.lr_scheduler_configs, lambda each: module.lr_scheduler_step(each, None), lambda: client.version // parts
        )
        loop = OpenLoop(trainer, schedules.follow, servers_clip=synchronous and self.world_size > 1)
        self._borrowed.callback(loop.give_back)
        parameters = RemoteParameters(
            client, module, self.optimizers[0], len(self.servers) if isinstance(self.servers, list) else self.servers,
            self.tables or [], self.consistency.kind, looks_up=lambda: self._collectives.in_step,
        )  # fmt: skip
        self._borrowed.callback(parameters.release)
        self._agent = Agent(data, self.global_rank, self.report_every)
        training = Training(
            module, client, data, loader, parameters, loop, schedules, self._agent, self._agreement, self._collectives,
            requeue=self.on_drop == "requeue", averages=self._averages,
            divided=None if late else list(self._collectives.present), log=self.positions_log, synced=not late,
        )  # fmt: skip
        device = torch.cuda.get_device_name(self.root_device) if self.root_device.type == "cuda" else self.root_device.type
        with unless_over(self._collectives, late):
            data.join(self.world_size, barrier=False, device=device)
        if late:
            with unless_over(self._collectives, late):
                epoch = training.enter_late()
            training.catch_up(epoch)
        else:
            stored, self._restored = self._restored, None
            client.version = trainer.global_step * parts if stored is None else int(stored["version"])
            if self.is_global_zero:
                parameters.fill(self._settings(loop.clip, data.address), self.row_update, client.version)
                begin = {"epoch": trainer.current_epoch, "todo": [[0, loader.num_samples]]}
                data.restore(begin if stored is None else stored["ledger"])
            schedules.skip()
            self.barrier()  # no one begins before the servers are filled
        schedules.follow()
        self._training, self._kept = training, None
        self._agreement.begin(None if loop.max_steps is None else loop.max_steps * parts)
        if self.injector is not None:
            self.injector.begin(self.global_rank, restarted=late)

    def _settings(self, clip: Clip, data: Address) -> dict[str, Any]:
        """What the servers are told to do."""
        return {
            "mode": self.consistency.kind, "staleness": self.consistency.staleness, "backup": self.consistency.backup,
            "clip": clip.limit, "clip_norm": clip.by_norm, "on_drop": self.on_drop,
            "heartbeat_timeout": self.heartbeat_timeout, "save_every": self.save_every,
            "report_every": max(0.2, min(2.0, self.decide_every / 2)), "data": [data.host, data.port, data.token],
        }  # fmt: skip

    # ---- a step -------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch weights, once the step may begin, and run the module."""
        assert self._training is not None
        self._training.begin_step()
        return super().training_step(*args, **kwargs)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch, of which the module may tell the weight."""
        self._batch = batch

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the step's passes here, and the optimizer on the servers."""
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedules ask whether a step came first
        remote: Any = RemoteOptimizer(optimizer, self._push)
        module: Any = model or self.lightning_module
        return self.precision_plugin.optimizer_step(remote, model=module, closure=closure, **kwargs)

    def _push(self) -> None:
        training, agent = self._training, self._agent
        assert training is not None and agent is not None
        count = training.batch.count
        delay = 0.0 if self.injector is None else self.injector.delay(agent.steps, count, self.global_rank)
        if delay > 0 and count:
            time.sleep(delay)
        if self.root_device.type == "cuda":
            torch.cuda.synchronize(self.root_device)
        module = self.lightning_module
        training.push(loss_denominator(module, self._batch, count) if count and module is not None else count)

    # ---- together -----------------------------------------------------------------------------------------------------

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all workers that take part."""
        self._collectives.gather(None, "a barrier")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give an object of one worker to all."""
        result = self._collectives.broadcast(str(obj) if isinstance(obj, Path) else obj, src)
        return Path(result) if isinstance(obj, Path) and isinstance(result, str) else result

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over all workers; in a training step, of which others know nothing, it stays."""
        if not isinstance(tensor, Tensor) or not self._collectives.meets():
            return tensor
        if self._collectives.in_step:
            rank_zero_warn(
                f"{type(self).__name__}: what a training step logs with sync_dist=True is each worker's own; means of epochs are"
                " of all workers."
            )
            return tensor
        return self._collectives.reduce(tensor, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all workers, or any, say yes."""
        return self._collectives.decide(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Tensors of all workers, stacked; without gradients."""
        return self._collectives.stack(tensor)

    # ---- checkpoints --------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The servers' weights."""
        if self._training is not None:
            self._training.meet()
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the servers keep, as one process would have it."""
        plain: dict[str, Any] = super().optimizer_state(optimizer)
        if self._training is None:
            return plain
        return {**plain, "state": self._training.parameters.states()} if self.is_global_zero else {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add what is left of the epoch, and write on rank 0."""
        if self._training is not None and self.is_global_zero:
            self._kept = self._training.position()
        if self._kept is not None and "optimizer_states" in checkpoint:
            checkpoint = {**checkpoint, KEY: self._kept}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of this strategy or another."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._restored = checkpoint.pop(KEY, None)
        return checkpoint

    # ---- the end ------------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self) -> None:
        """Leave weights and optimizer states in the module's process."""
        training = self._training
        assert training is not None
        training.meet()
        if self.is_global_zero:
            self.optimizers[0].load_state_dict(self.optimizer_state(self.optimizers[0]))
            self._kept = training.position()  # for checkpoints that are saved after the run
        training.leave_data()
        self._borrowed.close()
        self._training = None

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Go, without waiting for others."""
        super().on_exception(exception)
        self._collectives.parted = True
        if not isinstance(exception, SIGTERMException | KeyboardInterrupt):
            self._error = {"type": type(exception).__name__, "message": str(exception)[:500]}

    @override
    def teardown(self) -> None:
        """Leave the run, and give everything back."""
        self._borrowed.close()
        self._training, self._collectives.in_step = None, False
        if self.injector is not None:
            self.injector.end()
        if self._client is not None:
            first, step = self.is_global_zero, 0 if self._agent is None else self._agent.steps
            leave(
                self._collectives, self._client, self._data, error=self._error, step=step,
                ends_servers=first and not isinstance(self.servers, list), ends_data=first and self.server == "auto",
            )  # fmt: skip
        self._client = self._agreement = self._data = self._loader = self._agent = self._collectives.client = None
        self._restored = None
        super().teardown()


StrategyRegistry.register(
    "antdt_ps", ParameterServerStrategy, description="Parameter servers: asynchronous or semi-synchronous workers (AntDT)"
)
