"""Parameter servers as a strategy of Lightning: workers that do not wait for one another, and whose loss stops nobody."""

import fnmatch
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from strategies.antdt.address import Address
from strategies.antdt.client import Client
from strategies.antdt.inject import Injector, Slowdown
from strategies.antdt.launch import find, find_or_start
from strategies.antdt.loader import Order, SamplerOrder
from strategies.antdt.order import SampleOrder
from strategies.antdt.ps.clock import Consistency
from strategies.antdt.ps.launch import find_or_start_server, find_server
from strategies.antdt.ps.loader import ShardBatch, ShardLoader
from strategies.antdt.ps.partition import Entry, Layout
from strategies.antdt.ps.remote_optimizer import OptimizerSpec, hyperparameters
from strategies.antdt.ps.slices import Gradient, RowUpdate
from strategies.antdt.ps.worker import ParameterClient, flatten, unflatten
from strategies.antdt.solutions import Solution, StaticBSP
from strategies.antdt.wire import ServiceError

__all__ = ["ParameterServerStrategy"]

KEY = "antdt_ps"
TOKEN_VARIABLE = "ANTDT_TOKEN"
RUN_VARIABLE = "ANTDT_RUN"  # for a process that takes the place of another
Mode = Literal["asp", "ssp", "bsp"]


@runtime_checkable
class WeighsBatches(Protocol):
    """A module whose losses are means over something else than samples."""

    def antdt_weight(self, batch: Any) -> int:
        """Over how many tokens, boxes, ... the loss of a batch is a mean."""


class ParameterServerStrategy(DDPStrategy):
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

    #: Tells `RunCheckpoint` that a step's number means something else on each rank.
    asynchronous = True

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
        for argument in ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"):
            if kwargs.get(argument) is not None:
                raise ValueError(f"{name}: {argument} belongs to data parallelism in a process group; leave it out.")
        super().__init__(**kwargs)
        self.servers, self.server, self.tables = servers, server, tables
        self.row_update: RowUpdate = row_update
        self.on_drop, self.solution = on_drop, solution
        self.global_batch_size, self.shard_steps, self.tail_factor, self.seed = global_batch_size, shard_steps, tail_factor, seed
        self.report_every, self.decide_every, self.heartbeat_timeout = report_every, decide_every, heartbeat_timeout
        self.restart_cost = restart_cost
        self.grace, self.save_every, self.injector = grace, save_every, injector
        self.server_cost, self.server_slowdowns, self.frame_limit = server_cost, server_slowdowns or [], frame_limit
        self._trainer: Trainer | None = None
        self._client: ParameterClient | None = None
        self._data: Client | None = None
        self._loader: ShardLoader | None = None
        self._layout: Layout | None = None
        self._names: dict[int, nn.Module] = {}
        self._dense_tables: list[nn.Module] = []
        self._handles: list[Any] = []
        self._seen = {"stop": 0, "save": 0}
        self._heard = {"stop": 0, "save": 0}
        self._present: list[int] = []
        self._divided: list[int] | None = None
        self._error: dict[str, str] | None = None
        self._failed = self._in_step = self._live = False
        self._synced = True
        self._clip: tuple[float, bool] = (0.0, True)
        self._clip_given: float | None = None
        self._lr_factor = 1.0
        self._item: Any = None
        self._budget: int | None = None
        self._max_steps: int | None = None
        self._base = self._scheduled = self._steps = self._pulled_version = 0
        self._restored: dict[str, Any] | None = None
        self._kept: dict[str, Any] | None = None
        self._plan_version = 0
        self._samples: list[list[float]] = []
        self._begun = self._ended = 0.0
        self._last: tuple[float, float] | None = None
        self._agent_seconds = self._waited = 0.0
        self._fresh = self._averages = False
        self._dropped = 0
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
            "version": self._plan_version,
            "restarts": int(os.environ.get("ANTDT_RESTARTS", 0)),
            "generation": self._data.gen if self._data is not None else 0,
            "agent_seconds": self._agent_seconds,
            "present": list(self._present),
            "dropped": self._dropped,
        }
        if self._last is not None:
            bpt, wall = self._last
            state |= {"bpt": [bpt], "wall": wall, "bubble": max(0.0, wall - bpt)}
        return state

    def sample_positions(self, batch_size: int) -> Tensor:
        """Places in the epoch's order of the samples of this worker's batch: int64 ``(batch_size,)``."""
        trainer = self._trainer
        if trainer is not None and trainer.training and self._loader is not None and self._loader.current is not None:
            return self._loader.current.positions[:batch_size]
        ranks = self._present or [self.global_rank]
        return torch.arange(batch_size) * len(ranks) + ranks.index(self.global_rank)

    def agree(self, request: Literal["stop", "save"], wanted: bool) -> bool:
        """Say what this worker wants; true once on each, after the batch in which it heard that any wanted it."""
        if wanted and self._heard[request] <= self._seen[request]:
            self.client.ask(request, self._seen[request])
        granted = self._heard[request] > self._seen[request]
        self._seen[request] = self._heard[request]
        return granted

    # ---- a run begins -------------------------------------------------------------------------------------------------

    def setup_distributed(self) -> None:
        """Find the servers and take part, without a process group (Lightning hook)."""
        reset_seed()
        self.set_world_ranks()
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        self._folder = Path(trainer.default_root_dir) / "antdt"
        self._failed, self._error = False, None
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._check(trainer)
        joins = os.environ.pop(RUN_VARIABLE, "") if fitting else ""
        with self._unless_over(bool(joins)):
            self._client = self._connect(joins)
        self._present = list(range(self.world_size))
        self._divided = None if self.client.late else list(self._present)
        if self.client.late:
            trainer.num_sanity_val_steps = 0  # the others have done with it  # type: ignore[attr-defined]

    @contextmanager
    def _unless_over(self, late: bool) -> Iterator[None]:
        """A worker that comes late finds that the others have done: that is no failure."""
        try:
            yield
        except (ServiceError, ConnectionError) as failure:
            if not late:
                raise
            print(f"worker {self.global_rank} came when the others had done ({failure})", flush=True)
            self._failed = True
            raise SystemExit(0) from failure

    def _connect(self, joins: str) -> ParameterClient:
        if isinstance(self.servers, list):
            token = os.environ.get(TOKEN_VARIABLE, "")
            addresses = [Address.parse(text, token) for text in self.servers]
            resolve = None
        else:
            if self.num_nodes > 1:
                raise ValueError(
                    f"{type(self).__name__}: servers={self.servers} starts parameter servers on this machine, where others do not"
                    " find them: start each (python -m strategies.antdt.ps.server --folder ... --index j --host 0.0.0.0"
                    " --port ...) and give servers=[host:port, ...] and $ANTDT_TOKEN to all."
                )
            slow = {"cost": self.server_cost, "slowdowns": [asdict(each) for each in self.server_slowdowns]}
            options = ["--frame-limit", str(self.frame_limit), "--grace", str(self.grace)]
            options += ["--slow", json.dumps(slow)] if self.server_cost else []

            def resolve(index: int) -> Address:
                # Who is to join a run must not begin another one.
                alone = bool(joins) or (self._client is not None and self._client.late)
                return find_server(self._folder, index) if alone else find_or_start_server(self._folder, index, options=options)

            addresses = [resolve(index) for index in range(self.servers)]
        return ParameterClient(
            addresses, self.global_rank, self.world_size, resolve=resolve, frame_limit=self.frame_limit,
            pulse_every=self.heartbeat_timeout / 6, group=self._group(), joins=joins,
        )  # fmt: skip

    def _group(self) -> str:
        """Names the processes that were started together: when torchrun starts all again, the former ones are dead."""
        if self.num_nodes > 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
            return ""
        return f"{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def _check(self, trainer: Trainer) -> None:
        name, plugin, module = type(self).__name__, self.precision_plugin, trainer.lightning_module
        if not module.automatic_optimization:
            raise ValueError(
                f"{name}: {type(module).__name__} optimizes by itself (automatic_optimization=False), but the servers do."
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"{name}: accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1; use a larger batch_size, or mode"
                " bsp, where a step accumulates over the workers."
            )
        if getattr(plugin, "scaler", None) is not None:
            raise ValueError(
                f"{name}: precision {plugin.precision} scales losses, on each worker by another number: use bf16-mixed."
            )
        if type(plugin) not in (Precision, MixedPrecision, HalfPrecision, DoublePrecision):
            raise ValueError(f"{name} does not go with {type(plugin).__name__}: use precision 32-true, bf16-mixed or bf16-true.")
        if trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None:
            raise ValueError(
                f"{name}: workers have different numbers of batches: validate after epochs (val_check_interval 1.0)."
            )
        if trainer.limit_train_batches not in (1.0, None) and not (trainer.max_epochs == 1 or trainer.max_steps == 1):
            raise ValueError(
                f"{name}: limit_train_batches={trainer.limit_train_batches} would leave samples of the epoch behind: set"
                " max_steps."
            )
        self._averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if self._averages and (self.consistency.kind != "bsp" or self.tables):
            raise ValueError(
                f"{name}: a callback averages weights, of which each worker sees others in mode {self.consistency.kind}, and of"
                " tables only some rows: use mode bsp without tables, or remove the callback."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging) or "SpikeGuard" in [
                kind.__name__ for kind in type(callback).__mro__
            ]:
                raise ValueError(
                    f"{name}: {type(callback).__name__} acts on the optimizer of this process, but the step is made by the"
                    " servers: remove it."
                )
            if isinstance(callback, ModelCheckpoint) and (callback._every_n_train_steps or callback._train_time_interval):
                raise ValueError(
                    f"{name}: ModelCheckpoint(every_n_train_steps or train_time_interval) acts at each worker's own count of"
                    " steps: save after epochs, or use RunCheckpoint."
                )
        overridden = type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
        if self.consistency.kind == "bsp" and self.world_size > 1 and overridden:
            raise ValueError(
                f"{name}: {type(module).__name__}.configure_gradient_clipping would clip the gradient of each worker, not that of"
                " the step, which only the servers know: use gradient_clip_val, or mode asp or ssp."
            )

    def setup(self, trainer: Trainer) -> None:
        """Prepare the module (Lightning hook)."""
        assert self.accelerator is not None and self.model is not None
        self._trainer = trainer
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            if len(self.optimizers) != 1:
                raise ValueError(f"{type(self).__name__} needs one optimizer, configure_optimizers gives {len(self.optimizers)}.")
            OptimizerSpec.of(self.optimizers[0])  # refuse now what servers cannot run
        self.setup_precision_plugin()
        assert self.lightning_module is not None
        metric: Any
        for metric in self.lightning_module.modules():  # torchmetrics would ask a process group
            if hasattr(metric, "dist_sync_fn") and hasattr(metric, "distributed_available_fn"):
                metric.dist_sync_fn = self._gather_for_metric
                metric.distributed_available_fn = self._meets
        self._share(self._everything())

    # ---- data ---------------------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How samples of evaluation are divided among the workers that are there."""
        ranks = self._present or list(range(self.world_size))
        if self.global_rank not in ranks:  # came late, and has not been let in
            ranks = [self.global_rank]
        return {"num_replicas": len(ranks), "rank": ranks.index(self.global_rank)}

    def process_dataloader(self, dataloader: object) -> object:
        """Replace the training loader by one that asks the data-sharding service (Lightning hook)."""
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        if trainer is None or not trainer.training:
            return dataloader
        name = type(self).__name__
        if not isinstance(dataloader, DataLoader):
            raise TypeError(f"{name} needs a torch DataLoader for training, got {type(dataloader).__name__}.")
        dataset: Any = dataloader.dataset
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{name} hands out samples by number, which {type(dataset).__name__} (an IterableDataset) does not have."
            )
        if dataloader.batch_size is None and self.global_batch_size is None:
            raise ValueError(f"{name}: the training DataLoader makes batches in its own way: set global_batch_size.")
        batch = self.global_batch_size or (dataloader.batch_size or 1) * self.world_size
        if batch < self.world_size:
            raise ValueError(f"{name}: global_batch_size={batch} gives not each of {self.world_size} workers a sample.")
        order, identity = self._order_of(dataloader)
        if self._data is None:
            with self._unless_over(self.client.late):
                self._data = self._join_data(identity, batch)
        share = batch // self.world_size + (self.global_rank < batch % self.world_size)
        limit = trainer.limit_train_batches
        if self.on_drop == "requeue" and dataloader.num_workers:
            raise ValueError(f"{name}: on_drop=requeue gives back what workers of the DataLoader are loading: set num_workers=0.")
        self._loader = ShardLoader(
            dataloader, order, self._data, identity["n"], share, batch, seed=self._seed(), shard_steps=self.shard_steps,
            epoch=lambda: trainer.current_epoch, begin=self._begin_epoch, interrupted=self._interrupted,
            waits=lambda: self.client.idle(), limit=limit if isinstance(limit, int) else None,
        )  # fmt: skip
        return self._loader

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _order_of(self, loader: DataLoader[Any]) -> tuple[Order, dict[str, Any]]:
        """The order of samples, and the data set's identity for the service."""
        dataset: Any = loader.dataset
        sampler = loader.sampler
        about = {"name": type(getattr(dataset, "dataset", dataset)).__name__, "shard": 1}
        if hasattr(sampler, "order"):
            count, seed = int(getattr(sampler, "length", len(dataset))), int(getattr(sampler, "seed", self._seed()))
            return SamplerOrder(sampler), {**about, "n": count, "seed": seed, "shuffle": "sampler"}
        fixed = isinstance(sampler, SequentialSampler) or not getattr(sampler, "shuffle", True)
        shuffle: Literal["none", "global"] = "none" if fixed else "global"
        about |= {"n": len(dataset), "seed": self._seed(), "shuffle": shuffle}
        return SampleOrder(len(dataset), self._seed(), shuffle), about

    def _join_data(self, identity: dict[str, Any], batch: int) -> Client:
        if self.server == "auto":
            if self.num_nodes > 1:
                raise ValueError(f"{type(self).__name__}: give server=host:port of a zoo serve-data on several machines.")

            late = self.client.late

            def resolve() -> Address:
                return find(self._folder, timeout=5.0) if late and not self._live else find_or_start(self._folder)

            client = Client(resolve(), self.global_rank, resolve=resolve)
        else:
            client = Client(Address.parse(self.server, os.environ.get(TOKEN_VARIABLE, "")), self.global_rank)
        client.configure(
            dataset={**identity, "epochs": None},
            solution=(self.solution or StaticBSP()).init_config,
            world_size=self.world_size,
            global_batch=batch,
            semantics="at_least_once_batch",
            tail_factor=self.tail_factor,
            controller={"decide_every": self.decide_every, "group_restart": False, "restart_cost": self.restart_cost},
            heartbeat_timeout=self.heartbeat_timeout,
        )
        client.keep_alive(self.heartbeat_timeout / 6)
        return client

    # ---- training begins ----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Fill the servers, or be let in by those who train already (Lightning hook)."""
        trainer, loader, data = self._trainer, self._loader, self._data
        assert trainer is not None and self.lightning_module is not None
        loaders = trainer.fit_loop._combined_loader
        if loader is None or data is None or (loaders is not None and len(loaders.flattened) != 1):
            raise ValueError(f"{type(self).__name__}: train_dataloader must give one DataLoader.")
        self._take_over_loop(trainer)
        self._layout = self._lay_out()
        late = self.client.late
        with self._unless_over(late):
            data.join(self.world_size, barrier=False, device=self._device_name())
        parts = self.world_size if self.consistency.kind != "bsp" else 1
        if not late:
            stored, self._restored = self._restored, None
            version = trainer.global_step * parts if stored is None else int(stored["version"])
            if self.is_global_zero:
                self._fill_servers(version)
                begin = {"epoch": trainer.current_epoch, "todo": [[0, loader.num_samples]]}
                data.restore(begin if stored is None else stored["ledger"])
            self.client.version = version
            self._scheduled = version // parts
            self.barrier()  # no one begins before the servers are filled
        if late:
            with self._unless_over(late):
                self.client.patience, patience = 5.0, self.client.patience
                epoch = self.client.enter(0)
                self.client.patience = patience
            progress: Any = trainer.fit_loop.epoch_progress.current
            progress.ready = progress.started = progress.processed = progress.completed = epoch
            self.client.look()
            self._scheduled = 0
            for _ in range(epoch):
                self._step_schedulers("epoch", trainer.current_epoch + 1)
        self._step_scheduled()
        self._live, self._synced, self._kept = True, not late, None
        self._seen = dict(self.client.requests)
        self._heard = dict(self._seen)
        if self._max_steps is not None:
            self._budget = self._max_steps * parts
        if self.injector is not None:
            self.injector.begin(self.global_rank, restarted=late)

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.root_device) if self.root_device.type == "cuda" else self.root_device.type

    def _take_over_loop(self, trainer: Trainer) -> None:
        """Let the loop run until the data ends, however many batches that are, without asking other ranks."""
        assert self._loader is not None
        self._loader.open = True
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        loop.update_lr_schedulers = self._update_lr_schedulers(loop.update_lr_schedulers)  # type: ignore[method-assign]
        if trainer.max_steps != -1:
            self._max_steps, loop.max_steps = trainer.max_steps, -1  # not each worker by its own count
        if self.consistency.kind == "bsp" and self.world_size > 1 and trainer.gradient_clip_val:
            by_value = "value" in str(trainer.gradient_clip_algorithm or "norm").lower()
            self._clip = float(trainer.gradient_clip_val), not by_value
            self._clip_given = float(trainer.gradient_clip_val)
            trainer.gradient_clip_val = None  # the servers clip the mean
        else:
            self._clip, self._clip_given = (0.0, True), None
        fit.max_batches = float("inf")
        trainer.val_check_batch = float("inf")
        if fit._combined_loader is not None:
            fit._combined_loader.limits = None
        fetcher = fit._data_fetcher
        if fetcher is not None:
            iter(fetcher)  # a fresh pass, which knows no limit

    def _lay_out(self) -> Layout:
        module = self.lightning_module
        assert module is not None
        names = {parameter: name for name, parameter in module.named_parameters()}
        embeddings = {name: each for name, each in module.named_modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)}
        wanted = {name for name, each in embeddings.items() if each.sparse}
        for pattern in self.tables or []:
            found = fnmatch.filter(embeddings, pattern)
            if not found:
                raise ValueError(
                    f"{type(self).__name__}: tables names {pattern!r}, but the embeddings of {type(module).__name__} are"
                    f" {', '.join(embeddings) or 'none'}."
                )
            wanted |= set(found)
        tables = {embeddings[name].weight: (name, embeddings[name]) for name in wanted}
        for name, each in tables.values():
            if each.max_norm is not None or each.scale_grad_by_freq:
                raise ValueError(f"{type(self).__name__}: {name} has max_norm or scale_grad_by_freq, which need the whole table.")
            if sum(other.weight is each.weight for other in embeddings.values()) > 1:
                raise ValueError(f"{type(self).__name__}: the table {name} is shared by several modules; leave it out of tables.")
        entries: list[Entry] = []
        self._names = {}
        for group, content in enumerate(self.optimizers[0].param_groups):
            for parameter in content["params"]:
                table = tables.get(parameter)
                if table is not None:
                    self._names[len(entries)] = table[1]
                entries.append(
                    Entry(
                        names.get(parameter, f"parameter {len(entries)}"), tuple(parameter.shape),
                        str(parameter.dtype).removeprefix("torch."), group, table is not None,
                    )
                )  # fmt: skip
        for number, table_module in self._names.items():
            if not table_module.sparse:
                table_module.sparse = True  # type: ignore[assignment]  # for the time of training: gradients name their rows
                self._dense_tables.append(table_module)
            hook = self._lookup(number)
            self._handles.append(table_module.register_forward_pre_hook(hook))
        count = len(self.servers) if isinstance(self.servers, list) else self.servers
        return Layout(entries, count)

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizers[0].param_groups for parameter in group["params"]]

    def _fill_servers(self, version: int) -> None:
        assert self._layout is not None and self._data is not None
        optimizer = self.optimizers[0]
        states = [dict(optimizer.state.get(parameter, {})) for parameter in self._parameters]
        address = self._data.address
        settings = {
            "mode": self.consistency.kind, "staleness": self.consistency.staleness, "backup": self.consistency.backup,
            "clip": self._clip[0], "clip_norm": self._clip[1], "on_drop": self.on_drop,
            "heartbeat_timeout": self.heartbeat_timeout, "save_every": self.save_every,
            "report_every": max(0.2, min(2.0, self.decide_every / 2)), "data": [address.host, address.port, address.token],
        }  # fmt: skip
        self.client.configure(
            self._layout, OptimizerSpec.of(optimizer), settings, self._parameters,
            [{key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()} for state in states],
            row_update=self.row_update, version=version,
        )  # fmt: skip
        optimizer.state.clear()

    def _begin_epoch(self, epoch: int) -> None:
        if self.client.epoch < epoch:
            self.client.enter(epoch)

    def _interrupted(self) -> Literal["", "wanted", "over"]:
        self.client.look()
        self._hear()
        if self._is_spent:
            return "over"
        return "wanted" if any(self._heard[request] > self._seen[request] for request in self._heard) else ""

    def _hear(self) -> None:
        self._heard = dict(self.client.requests)

    @property
    def _is_spent(self) -> bool:
        return self._budget is not None and self.client.version >= self._budget

    # ---- schedules ----------------------------------------------------------------------------------------------------

    def _update_lr_schedulers(self, original: Callable[..., None]) -> Callable[..., None]:
        def update(interval: str, update_plateau_schedulers: bool) -> None:
            if interval == "step" and not update_plateau_schedulers:
                self._step_scheduled()
            else:
                original(interval, update_plateau_schedulers)

        return update

    def _step_scheduled(self) -> None:
        """Schedules by step follow the servers' clock, which is the same for all workers, also for one that came late."""
        target = self.client.version // (self.world_size if self.consistency.kind != "bsp" else 1)
        while self._scheduled < target:
            self._scheduled += 1
            self._step_schedulers("step", self._scheduled)

    def _step_schedulers(self, interval: str, number: int) -> None:
        assert self._trainer is not None and self.lightning_module is not None
        for config in self.lr_scheduler_configs:
            if config.interval == interval and not config.reduce_on_plateau and number % config.frequency == 0:
                self.lightning_module.lr_scheduler_step(config.scheduler, None)

    # ---- a step -------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch weights, once the step may begin, and run the module (Lightning hook)."""
        self._in_step, self._synced = True, False
        if not self._fresh:
            self._pull()
        self._fresh = False
        self._begun, self._waited = time.perf_counter(), 0.0
        return super().training_step(*args, **kwargs)

    def _pull(self) -> None:
        assert self._layout is not None
        clip = self._clip[0] if self._clip[1] else 0.0
        flat = self.client.pull(self._layout, self.consistency.kind, clip_norm=clip, gate=not self._shadow)
        self._pulled_version = self.client.version
        self._write(unflatten(self._layout, flat))

    @property
    def _batch(self) -> ShardBatch:
        assert self._loader is not None and self._loader.current is not None
        return self._loader.current

    @property
    def _shadow(self) -> bool:
        return self._batch.count == 0

    @torch.no_grad()
    def _write(self, values: Mapping[int, Tensor]) -> None:
        parameters = self._parameters
        for number, value in values.items():
            parameters[number].copy_(value)

    def _lookup(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Fetches the rows that a table is about to look up."""

        def fetch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not self._in_step:
                return
            assert self._layout is not None
            begun = time.perf_counter()
            rows = arguments[0].detach().flatten().unique().cpu()
            values = self.client.rows(self._layout, {number: rows})[number]
            self._waited += time.perf_counter() - begun  # for servers: a slow one must not make this worker look slow
            with torch.no_grad():
                weight = self._parameters[number]
                weight[rows.to(weight.device)] = values.to(weight.device)

        return fetch

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the step's passes here, and the optimizer on the servers (Lightning hook)."""
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether a step came first
        remote: Any = _Remote(optimizer, self._push)
        module: Any = model or self.lightning_module
        return self.precision_plugin.optimizer_step(remote, model=module, closure=closure, **kwargs)

    def _push(self) -> None:
        layout, batch, loader = self._layout, self._batch, self._loader
        assert layout is not None and loader is not None and self._data is not None and self._trainer is not None
        delay = 0.0 if self.injector is None else self.injector.delay(self._steps, batch.count, self.global_rank)
        if delay > 0 and not self._shadow:
            time.sleep(delay)
        if self.root_device.type == "cuda":
            torch.cuda.synchronize(self.root_device)
        if not self._shadow:
            gradient = self._gradient()
            computed = time.perf_counter() - self._begun - self._waited
            outcome = self.client.push(
                layout, gradient, self._hyperparameters(), version=self._pulled_version, items=batch.items,
                gen=self._data.gen,
            )  # fmt: skip
            self._steps += 1
            if outcome.accepted:
                if self.positions_log is not None:
                    self.positions_log.append((loader.epoch, self._pulled_version, batch.positions))
            else:
                self._dropped += 1
                if self.on_drop == "requeue":
                    loader.give_back(batch)
            self._measure(batch, computed)
        for parameter in self._parameters:
            parameter.grad = None
        self._hear()
        self._obey()
        self._in_step = False
        if self._is_spent:
            self._trainer.should_stop = True
        if loader.ended or self._is_spent or loader.peek() == "end":
            loader.ended = True
            self._end_epoch()
        elif self._averages and not self._shadow:
            self._pull()  # the callback that averages wants what this step has made of the weights
            self._fresh = True

    def _hyperparameters(self) -> list[dict[str, Any]]:
        return [{**group, "lr": group["lr"] * self._lr_factor} for group in hyperparameters(self.optimizers[0])]

    def _gradient(self) -> Gradient:
        layout = self._layout
        assert layout is not None
        parameters, rows = self._parameters, {}
        for number in layout.tables:
            grad = parameters[number].grad
            if grad is None:
                continue
            if not grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__}: the table {layout.entries[number].name} is used otherwise than by looking rows up,"
                    " so all of it has a gradient: leave it out of tables."
                )
            grad = grad.coalesce()
            rows[number] = grad.indices()[0].cpu(), grad.values().cpu()
        absent = frozenset(number for number in layout.dense if parameters[number].grad is None)
        grads = [torch.zeros_like(p) if p.grad is None and number not in rows else p.grad for number, p in enumerate(parameters)]
        weight: float = self._batch.count
        if isinstance(self.lightning_module, WeighsBatches):
            weight = float(self.lightning_module.antdt_weight(self._item))
        return Gradient(flatten(layout, grads), absent, rows, weight)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch, of which the module may tell the weight (Lightning hook)."""
        self._item = batch

    def _end_epoch(self) -> None:
        """All is trained: say so to the loop before it asks, and take the servers' weights, which no one changes any more."""
        self._note_end()
        self._meet()

    # ---- the controller -----------------------------------------------------------------------------------------------

    def _measure(self, batch: ShardBatch, computed: float) -> None:
        now = time.perf_counter()
        wall = now - self._ended if self._ended else batch.seconds + computed
        self._ended, self._last = now, (batch.seconds + computed, wall)
        self._samples.append([self._steps, batch.count, batch.seconds, computed, wall])
        if len(self._samples) >= self.report_every:
            assert self._data is not None
            samples, self._samples = self._samples, []
            begun = time.perf_counter()
            answer = self._data.report(self._steps, samples, version=self._plan_version)
            self._agent_seconds += time.perf_counter() - begun
            if "failure" in answer:
                raise RuntimeError(f"AntDT: {answer['failure']}")
            for action in answer["actions"]:
                if action["action"] == "KILL_RESTART":
                    self._plan_version = max(self._plan_version, int(action["version"]))
                    if action["payload"]["node"] == f"worker:{self.global_rank}":
                        self._restart()
                elif action["action"] not in ("ADJUST_BS", "ADJUST_LR"):  # those take effect when the clock says so
                    self._plan_version = max(self._plan_version, int(action["version"]))

    def _obey(self) -> None:
        """Take over the batches that the clock has announced."""
        version, action = self.client.plan
        if int(version) <= self._plan_version or action is None:
            return
        assert self._loader is not None
        self._plan_version = int(version)
        if action["action"] == "ADJUST_BS":
            self._loader.batch = max(1, int(action["batch"][self.global_rank]))
        else:
            self._lr_factor = float(action["factor"])

    def _restart(self) -> None:
        """Begin anew in place, as a fresh process; the others go on."""
        if len(self._present) < 2:
            return  # nobody would be left
        assert self._data is not None
        print(f"worker {self.global_rank} starts again: the controller found it slow", flush=True)
        self._data.leave()
        self.client.leave()
        os.environ[RUN_VARIABLE] = self.client.run
        os.environ["ANTDT_RESTARTS"] = str(int(os.environ.get("ANTDT_RESTARTS", 0)) + 1)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    # ---- together -----------------------------------------------------------------------------------------------------

    def _meets(self) -> bool:
        """Whether there are others to be asked."""
        return self._client is not None and not self._client.late and not self._failed and self.world_size > 1

    def _gather(self, value: Any, what: str) -> dict[int, Any]:
        if not self._meets():
            return {self.global_rank: value}
        if self._in_step and self._live:
            raise RuntimeError(
                f"{type(self).__name__}: {what} was asked for in a training step, while workers are at different steps, and would"
                " never end: do it after the epoch (on_epoch=True), or in validation."
            )
        found = self.client.gather([what, value])
        if len({kind for kind, _ in found.values()}) > 1:
            raise RuntimeError(
                f"{type(self).__name__}: workers are at different places:"
                f" {', '.join(f'{rank} at {kind}' for rank, (kind, _) in found.items())}. Something is done on some of them only."
            )
        return {rank: own for rank, (_, own) in found.items()}

    def _confer(self) -> None:
        """Know alike who is there, what was asked for, and whether the epoch has ended: some may have heard it too late."""
        assert self._trainer is not None and self._loader is not None
        found = list(self._gather([self._divided, self._heard, self._loader.ended], "a synchronisation").values())
        for request in self._heard:
            self._heard[request] = max(heard[request] for _, heard, _ in found)
        self._present = list(self.client.present) or self._present
        if any(divided != self._present for divided, _, _ in found):  # samples of evaluation are divided anew
            self._divided = list(self._present)
            self._trainer.fit_loop.epoch_loop.val_loop._combined_loader = None
        if not self._loader.ended and any(ended for _, _, ended in found) and not self._failed:
            # A worker that saves while it waits for the last samples of others.
            self._loader.ended = True
            self._note_end()
            self._step_schedulers("epoch", self._trainer.current_epoch + 1)

    def _note_end(self) -> None:
        """Tell the loop that the batch in its hands is the last."""
        assert self._trainer is not None
        self.client.look()
        self._trainer.should_stop |= self._is_spent
        loop = self._trainer.fit_loop
        loop.epoch_loop.batch_progress.is_last_batch = True
        if loop._data_fetcher is not None:
            loop._data_fetcher.done = True

    def _meet(self) -> None:
        """Take the servers' weights when all have come, so that all hold the same."""
        if not self._live or self._synced or self._trainer is None:
            return
        layout = self._layout
        assert layout is not None
        self._in_step = False
        self._confer()
        self._share(self._untrained())
        clip = self._clip[0] if self._clip[1] else 0.0
        dense = unflatten(layout, self.client.pull(layout, self.consistency.kind, clip_norm=clip, gate=False))
        tables, _ = self.client.export(layout, states=False)
        self._write(dense | tables)
        self._synced = True

    def _everything(self) -> list[Tensor]:
        assert self.lightning_module is not None
        return [tensor for tensor in [*self.lightning_module.parameters(), *self.lightning_module.buffers()] if tensor.numel()]

    def _untrained(self) -> list[Tensor]:
        trained = {id(parameter) for parameter in self._parameters}
        return [tensor for tensor in self._everything() if id(tensor) not in trained]

    @torch.no_grad()
    def _share(self, kept: Sequence[Tensor]) -> None:
        """Let all workers have the first one's, as in DDP."""
        first = self.global_rank == min(self._present, default=self.global_rank)
        found = self._gather([tensor.detach().cpu() for tensor in kept] if first else None, "a synchronisation")
        values = next((value for value in found.values() if value is not None), None)
        if values is not None and not first:
            for tensor, value in zip(kept, values, strict=True):
                tensor.copy_(value)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all workers that take part (Lightning hook)."""
        self._gather(None, "a barrier")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give an object of one worker to all (Lightning hook)."""
        own = obj if not isinstance(obj, Path) else str(obj)
        found = self._gather(own if self.global_rank == src else None, "a broadcast")
        result = found.get(src, own)  # a worker that is gone has nothing to say
        return Path(result) if isinstance(obj, Path) and isinstance(result, str) else result

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over all workers; in a training step, of which others know nothing, it stays (Lightning hook)."""
        if not isinstance(tensor, Tensor) or not self._meets():
            return tensor
        if self._in_step and self._live:
            rank_zero_warn(
                f"{type(self).__name__}: what a training step logs with sync_dist=True is each worker's own; means of epochs are"
                " of all workers."
            )
            return tensor
        found = self._gather(tensor.detach().cpu(), "a reduction")
        stacked = torch.stack(list(found.values())).to(tensor.device)
        name = str(reduce_op).lower().rsplit(".", 1)[-1] if reduce_op is not None else "sum"
        if name in ("mean", "avg"):
            return (stacked.float() if not stacked.is_floating_point() else stacked).mean(0)
        if name == "sum":
            return stacked.sum(0)
        if name in ("max", "min"):
            return stacked.amax(0) if name == "max" else stacked.amin(0)
        raise ValueError(f"{type(self).__name__}: reduce_op={reduce_op!r} must be mean, sum, max or min.")

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all workers, or any, say yes (Lightning hook)."""
        votes = self._gather(bool(decision), "a decision").values()
        return min(votes) if all else max(votes)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Tensors of all workers, stacked; without gradients (Lightning hook)."""
        found = self._gather(tensor.detach().cpu(), "a gathering of tensors")
        return torch.stack(list(found.values())).to(tensor.device) if len(found) > 1 or self.world_size > 1 else tensor

    def _gather_for_metric(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        found = self._gather(tensor.detach().cpu(), "a metric of all workers")
        return [value.to(tensor.device) for value in found.values()]

    # ---- checkpoints --------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The servers' weights (Lightning hook)."""
        self._meet()
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the servers keep, as one process would have it (Lightning hook)."""
        plain: dict[str, Any] = super().optimizer_state(optimizer)
        if not self._live:
            return plain
        if not self.is_global_zero:
            return {}
        assert self._layout is not None
        _, states = self.client.export(self._layout, states=True)
        return {**plain, "state": {number: state for number, state in enumerate(states) if state}}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add what is left of the epoch, and write on rank 0 (Lightning hook)."""
        if self._live and self.is_global_zero:
            self._kept = self._position()
        if self._kept is not None and "optimizer_states" in checkpoint:
            checkpoint = {**checkpoint, KEY: self._kept}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _position(self) -> dict[str, Any]:
        assert self._data is not None
        return {"version": self.client.version, "ledger": self._data.snapshot()["ledger"]}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of this strategy or another (Lightning hook)."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._restored = checkpoint.pop(KEY, None)
        return checkpoint

    # ---- the end ------------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Leave weights and optimizer states in the module's process (Lightning hook)."""
        self._meet()
        if self.is_global_zero and self._live:
            state = self.optimizer_state(self.optimizers[0])
            self.optimizers[0].load_state_dict(state)
            self._kept = self._position()  # for checkpoints that are saved after the run
        if self._data is not None:
            if self._samples:
                self._data.report(self._steps, self._samples, version=self._plan_version)
                self._samples = []
            self._data.leave()
        self._give_back_loop()
        self._live = False

    def _give_back_loop(self) -> None:
        trainer = self._trainer
        if trainer is None:
            return
        loop = trainer.fit_loop.epoch_loop
        for name in ("_broadcast_sigterm_tensor", "update_lr_schedulers"):
            vars(loop).pop(name, None)
        if self._max_steps is not None:
            loop.max_steps, self._max_steps = self._max_steps, None
        if self._clip_given is not None:
            trainer.gradient_clip_val, self._clip_given = self._clip_given, None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for table in self._dense_tables:
            table.sparse = False  # type: ignore[assignment]
        self._dense_tables = []

    def on_exception(self, exception: BaseException) -> None:
        """Go, without waiting for others (Lightning hook)."""
        super().on_exception(exception)
        self._failed = True
        if not isinstance(exception, SIGTERMException | KeyboardInterrupt):
            self._error = {"type": type(exception).__name__, "message": str(exception)[:500]}

    def teardown(self) -> None:
        """Leave the run, and give everything back (Lightning hook)."""
        self._give_back_loop()
        self._live = self._in_step = False
        if self.injector is not None:
            self.injector.end()
        with suppress(OSError, ServiceError):  # who is gone has nothing to say
            if self._client is not None and not self._failed:
                self.client.patience = 10.0
                self.barrier()  # none leaves while another could take it for lost
        if self._data is not None:
            self._leave_data(self._data)
        if self._client is not None:
            self._leave_servers(self.client)
        self._client = self._data = self._loader = self._layout = None
        self._restored = self._budget = None
        self._steps = self._plan_version = self._dropped = 0
        self._lr_factor, self._ended, self._samples, self._last = 1.0, 0.0, [], None
        self._agent_seconds, self._fresh = 0.0, False
        self._seen, self._heard = {"stop": 0, "save": 0}, {"stop": 0, "save": 0}
        super().teardown()

    def _leave_data(self, data: Client) -> None:
        data.patience = 0.5
        with suppress(OSError, ServiceError):
            if self._failed:
                if self._error is not None:
                    data.report(self._steps, [], version=0, errors=[self._error], node={"alive": False})
                data.leave(graceful=False)
            elif self.server == "auto" and self.is_global_zero:
                data.shutdown()
        data.close()

    def _leave_servers(self, client: ParameterClient) -> None:
        client.patience = 0.0
        with suppress(OSError, ServiceError):
            if not self._failed and not isinstance(self.servers, list) and self.is_global_zero:
                client.shutdown()
                client.close()
            else:
                client.leave(over=not self._failed)


class _Remote:
    """An optimizer whose step is made by the servers.

    Args:
        optimizer: the one of this process, for everything else.
        push: sends the gradients.
    """

    def __init__(self, optimizer: Optimizer, push: Callable[[], None]) -> None:
        self._optimizer, self._push = optimizer, push

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Callable[[], Any]) -> Any:
        """Run the passes, and send what came of them."""
        with torch.enable_grad():
            result = closure()
        self._push()
        return result


StrategyRegistry.register(
    "antdt_ps", ParameterServerStrategy, description="Parameter servers: asynchronous or semi-synchronous workers (AntDT)"
)
