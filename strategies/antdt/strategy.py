"""AntDT for data-parallel training, as a strategy of Lightning."""

import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from strategies.antdt.control.actions import AdjustLR
from strategies.antdt.control.solutions import AntDTND, BackupWorkersSolution, Solution
from strategies.antdt.rank.agent import Agent
from strategies.antdt.rank.exchange import RESTART, SAVE, STOP, Exchange
from strategies.antdt.rank.loader import StepBatch, StepLoader
from strategies.antdt.rank.peer_watch import PeerWatch, own_address
from strategies.antdt.rank.planner import Allocation, StepPlanner
from strategies.antdt.rank.shard_source import ShardSource
from strategies.antdt.rank.step_log import StepLog
from strategies.antdt.rank.step_timer import StepTimer
from strategies.antdt.rank.train_order import Shuffle, train_order
from strategies.antdt.rank.weighting import GradientReduction, Weighting, loss_scale, reduce_gradients
from strategies.antdt.restart.hot_restart import HotRestart, newest
from strategies.antdt.restart.rank_keeper import RankKeeper
from strategies.antdt.service.connection import Connection
from strategies.antdt.simulation.inject import Injector
from strategies.refusals import refuse_accumulation, refuse_manual_optimization
from zoo.base.torchrun import has_agent_store, is_restarted, restart_count, restarts_left
from zoo.strategy_contract import HasLossDenominator, Request, StrategyContract, loss_denominator

__all__ = ["AntDTStrategy"]

KEY = "antdt"
RESTART_EXIT_CODE = 75  # of sysexits.h: try again
"""Exit code of processes that the launcher is to start again."""


class AntDTStrategy(StrategyContract, DDPStrategy):
    """Data parallelism in which slow processes get smaller batches, and no sample is lost or repeated (AntDT).

    A service hands out ranges of the epoch's order of samples, a controller in it watches how long each process takes for a
    sample, and moves samples from slow processes to fast ones (arXiv 2404.09679). The global batch stays as it is, gradients
    are weighted by what each process has contributed, and so the result is that of one process, or of DDP, but for the order of
    sums. Each sample is used exactly once an epoch, also if processes are killed and the group is started again from its last
    checkpoint: the checkpoint holds what is left of the epoch.

    One batch of the loop is one optimizer step of all ranks. A rank whose part of the batch does not fit into its memory runs it
    in micro-batches (``max_micro_batch``, or as the solution finds), and ``accumulate_grad_batches`` must stay 1. Batches are
    those of the training DataLoader's data set and collate function; its batch size times the number of processes is the global
    batch, unless ``global_batch_size`` says otherwise, which it must if the number of processes may change. All samples of an
    epoch are used: the last step weighs what there is. Callbacks and hooks see the first micro-batch of a step.

    A model with BatchNorm computes its statistics on what the rank has of the batch; SyncBatchNorm weighs them by samples.
    Metrics logged with ``on_epoch=True, sync_dist=True`` are weighted by samples; those of a step, with ``sync_dist``, are not.

    A controller that finds a process slow for long has the group started again, if torchrun may do that (``--max-restarts``) and
    checkpoints are saved: all ranks save after the same step and exit with code 75. Use ``--ckpt_path last``.

    With ``restart=hot`` (gloo on Linux, under torchrun) a process that was killed, or that the controller finds slow for long,
    is replaced while the others live on: each process that torchrun has started splits off the one that trains, and another when
    that is lost. The others drop the interrupted step, hand the state after the last one over, and repeat it. When the spares
    are used up, or a process ends by an error of its own, the group is started again as above. What is called before ``fit``
    must start no threads and not touch the GPU. Means over an epoch are, in an epoch with a loss, over what follows it.

    Args:
        solution: what decides; null: `AntDTND`.
        global_batch_size: B, samples of an optimizer step on all processes; null: the DataLoader's batch size times their number.
        server: where the service is: ``auto`` (a process of its own under torchrun, else in that of rank 0), ``inprocess`` (in
            that of rank 0), or ``host:port`` of one that was started with ``zoo serve-data``, its token in $ANTDT_TOKEN.
        shard_steps: M, so many steps' samples are handed out at once. With 1 the global batches are those of one process, sample
            for sample.
        tail_factor: a process gets at most its share of the rest of the epoch over this.
        shuffle: the order of samples: ``auto``: that of the DataLoader's sampler if it is a function of the epoch, as those of
            the zoo's DataModules, none if it does not shuffle, else ``global``; ``global``: at random; ``shard``: blocks at
            random, for sequential reading; ``none``.
        seed: of that order; null: that of ``seed_everything``.
        drop_last: leave out the last samples of an epoch that do not fill a global batch.
        weighting: weigh the losses, or the gradients in DDP's communication hook.
        prefetch: steps planned ahead, at least 1; a new plan takes effect after so many steps.
        report_every: steps between two reports to the controller.
        decide_every: seconds between two decisions.
        heartbeat_timeout: seconds after which a silent process is held for lost.
        max_micro_batch: most samples of a micro-batch, of all ranks or of each; null: no limit.
        restart_cost: seconds that a restart of the group takes, as long as none was seen.
        max_restarts_per_node: how often the controller may have a process started again; 0: never.
        restart: what becomes of the others when a process is lost: ``group``: all end, and torchrun starts them again from the
            last checkpoint; ``hot``: they live on, and a new process takes the place of the lost one.
        spares: with ``restart=hot``, how often each process may be replaced before the group is started again.
        injector: makes processes slow on purpose, for tests and benchmarks.
        kwargs: of Lightning's ``DDPStrategy``.

    Raises:
        ValueError: numbers out of range, or what belongs to another way of reducing gradients.
    """

    def __init__(
        self,
        solution: Solution | None = None,
        global_batch_size: int | None = None,
        server: str = "auto",
        shard_steps: int = 20,
        tail_factor: float = 2.0,
        shuffle: Shuffle = "auto",
        seed: int | None = None,
        drop_last: bool = False,
        weighting: Weighting = "loss",
        prefetch: int = 2,
        report_every: int = 10,
        decide_every: float = 10.0,
        heartbeat_timeout: float = 60.0,
        max_micro_batch: int | list[int] | None = None,
        restart_cost: float = 60.0,
        max_restarts_per_node: int = 3,
        restart: Literal["group", "hot"] = "group",
        spares: int = 3,
        injector: Injector | None = None,
        **kwargs: Any,
    ) -> None:
        for argument, value, least in (
            ("global_batch_size", global_batch_size, 1), ("shard_steps", shard_steps, 1), ("tail_factor", tail_factor, 1),
            ("prefetch", prefetch, 1), ("report_every", report_every, 1), ("decide_every", decide_every, 1e-3),
            ("heartbeat_timeout", heartbeat_timeout, 1), ("restart_cost", restart_cost, 0),
            ("max_restarts_per_node", max_restarts_per_node, 0), ("spares", spares, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"AntDTStrategy: {argument}={value} must be at least {least}.")
        caps = max_micro_batch if isinstance(max_micro_batch, list) else [max_micro_batch]
        if any(cap is not None and cap < 1 for cap in caps):
            raise ValueError(f"AntDTStrategy: max_micro_batch={max_micro_batch} must be at least 1, or null for no limit.")
        if shuffle not in ("auto", "global", "shard", "none") or weighting not in ("loss", "hook"):
            raise ValueError(
                f"AntDTStrategy: shuffle={shuffle!r} must be auto, global, shard or none, weighting={weighting!r} loss or hook."
            )
        if restart not in ("group", "hot") or (restart == "hot" and server == "inprocess"):
            raise ValueError(
                f"AntDTStrategy: restart={restart!r} must be group or hot, and with hot the server must outlive all ranks: not"
                " server=inprocess."
            )
        if kwargs.get("model_averaging_period") is not None:
            raise ValueError("AntDTStrategy: model_averaging_period belongs to another way of averaging replicas; leave it out.")
        if weighting == "hook" and (kwargs.get("ddp_comm_hook") is not None or kwargs.get("ddp_comm_wrapper") is not None):
            raise ValueError(
                "AntDTStrategy: weighting=hook weighs in a communication hook of its own: use weighting=loss with yours."
            )
        if isinstance(solution, BackupWorkersSolution):
            raise ValueError("AntDTStrategy: an all-reduce needs all gradients; backup workers need ParameterServerStrategy.")
        super().__init__(**kwargs)
        self.solution = solution or AntDTND()
        self.global_batch_size = global_batch_size
        self.server, self.shard_steps, self.tail_factor = server, shard_steps, tail_factor
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.weighting: Weighting = weighting
        self.prefetch, self.report_every, self.decide_every = prefetch, report_every, decide_every
        self.heartbeat_timeout, self.max_micro_batch, self.injector = heartbeat_timeout, max_micro_batch, injector
        self.restart_cost, self.max_restarts_per_node = restart_cost, max_restarts_per_node
        self.restart, self.spares = restart, spares
        self._hot: HotRestart | None = None
        self._trainer: Trainer | None = None
        self._control: dist.ProcessGroup | None = None
        self._connection: Connection | None = None
        self._agent: Agent | None = None
        self._loader: StepLoader | None = None
        self._timer: StepTimer | None = None
        self._log: StepLog | None = None
        self._reduction = GradientReduction(weighting)
        self._restored: dict[str, Any] | None = None
        self._handles: list[Any] = []
        self._former_handler: Any = None
        self._micro = 0
        self._rest: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._weights: tuple[list[float], Callable[[], float]] | None = None
        self._asked = 0
        self._told_to_stop = self._restarting = self._stop_unheard = False
        self._lr_factor = 1.0
        self._last_snapshot: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "AntDTStrategy":
        """A copy that shares connections and groups: who copies a module, as averages of weights do, copies its trainer too."""
        memo[id(self)] = shared = copy.copy(self)
        return shared

    # A run begins

    @override
    def _configure_launcher(self) -> None:
        """Split off the process that trains, for a hot restart."""
        super()._configure_launcher()
        if self.restart == "group":
            return
        if not has_agent_store() or not sys.platform.startswith("linux"):
            raise ValueError("AntDTStrategy: restart=hot needs Linux, and torchrun to start the processes.")
        if self.world_size < 2:
            raise ValueError("AntDTStrategy: restart=hot needs one that survives: start at least two processes.")
        if self._get_process_group_backend() != "gloo":
            raise ValueError(
                "AntDTStrategy: restart=hot needs collective calls that fail when a rank is lost, which those of NCCL do not: set"
                " process_group_backend to gloo, or restart to group."
            )
        assert self._launcher is not None
        keeper = RankKeeper(self.spares, f"rank {os.environ.get('RANK', '0')}")
        self._launcher = self._hot = HotRestart(self, keeper, self._launcher.launch)  # type: ignore[assignment]

    @property
    def _rejoins(self) -> bool:
        return self._hot is not None and self._hot.rejoins

    @override
    def setup_distributed(self) -> None:
        """Find the service, join the generation and the other ranks."""
        self.set_world_ranks()
        trainer = self._trainer_of()
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if fitting:
            assert trainer is not None
            self._check_trainer(trainer)
            self._last_snapshot = None
            self._folder = Path(trainer.default_root_dir) / KEY
            if self._hot is None and (dist.is_initialized() or not has_agent_store()):
                self._make_groups(fitting)
                self._connect_together()
                return
            self._connect()
            if self._rejoins:
                return  # each rank prepares by itself, until load_checkpoint
            if not dist.is_initialized():
                self._join_processes()
        self._make_groups(fitting)

    def _connect(self) -> None:
        self._connection = Connection(self.server, self._folder, self.global_rank, self.world_size, self.num_nodes)
        self._connection.connect()

    def _connect_together(self) -> None:
        """Find the service when the ranks know one another: without torchrun nobody ends those that wait for one that failed."""
        failure: Exception | None = None
        try:
            self._connect()
        except Exception as error:
            failure = error
        said: list[str | None] = [None] * self.world_size
        if self.world_size > 1:
            told = None if failure is None else f"{type(failure).__name__}: {failure}"
            dist.all_gather_object(said, told, self._control)
        if failure is not None:
            raise failure
        for rank, words in enumerate(said):
            if words is not None:
                raise RuntimeError(f"AntDTStrategy: rank {rank} could not connect to the service, so all end. {words}")

    def _make_groups(self, fitting: bool) -> None:
        with nullcontext() if self._hot is None else self._hot.links.remembered():
            super().setup_distributed()
            if fitting and self.world_size > 1:
                self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    def _join_processes(self) -> None:
        """Make the group under a name of its own: torch elastic keeps the store, with addresses of a group that is gone."""
        assert self._connection is not None and self.cluster_environment is not None
        survived = None if self._hot is None or self._hot.snapshot is None else self._hot.snapshot.told()
        generation = None
        if self._connection.kind != "thread":
            generation = self._connection.try_join(self._device_name(), survived)
        attempt = f"gen{generation}" if generation is not None else f"start{restart_count()}"
        address, port = self.cluster_environment.main_address, self.cluster_environment.main_port
        store = dist.TCPStore(address, port, is_master=False)
        device: dict[str, Any] = {"device_id": self.root_device} if self.root_device.type != "cpu" else {}
        with nullcontext() if self._hot is None else self._hot.links.remembered():
            dist.init_process_group(
                self._get_process_group_backend(), store=dist.PrefixStore(f"antdt/{attempt}", store), rank=self.global_rank,
                world_size=self.world_size, timeout=self._timeout, **device,
            )  # fmt: skip

    def _rejoin(self) -> dict[str, Any]:
        """Join the next group, and take over the newest state of its members."""
        assert self._hot is not None
        self._join_processes()
        self._hot.joined()
        self._make_groups(fitting=True)
        assert self._control is not None
        self._hot.snapshot = newest(self._hot.snapshot, self._control)
        trainer = self._trainer_of()
        assert trainer is not None
        self._hot.loads(trainer)
        checkpoint = self._hot.snapshot.checkpoint()
        extra = checkpoint.pop(f"{KEY}_hot")
        self._lr_factor, trainer.should_stop = extra["lr_factor"], extra["should_stop"]
        return checkpoint

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.root_device) if self.root_device.type == "cuda" else self.root_device.type

    def _trainer_of(self) -> Trainer | None:
        module = self.lightning_module
        return None if module is None else module._trainer

    def _check_trainer(self, trainer: Trainer) -> None:
        refuse_accumulation(self, trainer, "set global_batch_size, and max_micro_batch to what fits into memory")
        refuse_manual_optimization(self, "this strategy weighs and divides its batches", "use automatic optimization, or ddp")
        if isinstance(self.max_micro_batch, list) and len(self.max_micro_batch) != self.world_size:
            raise ValueError(
                f"AntDTStrategy: max_micro_batch={self.max_micro_batch} names {len(self.max_micro_batch)} ranks, there are"
                f" {self.world_size}."
            )

    @override
    def setup(self, trainer: Trainer) -> None:
        """Prepare the module."""
        self._trainer = trainer
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module = self.lightning_module
        assert module is not None
        # DDP has sent buffers, and so waited for rank 0, when it calls the module.
        self._handles = [module.register_forward_pre_hook(lambda *_: self._timer.forward_begins())]  # type: ignore[union-attr]

    def _register_ddp_hooks(self) -> None:
        """Reduce gradients by our hook, on any device."""
        assert isinstance(self.model, DistributedDataParallel)
        inner = self._ddp_comm_hook
        if inner is not None and self._ddp_comm_wrapper is not None:
            inner = self._ddp_comm_wrapper(inner)
        self._reduction = GradientReduction(self.weighting, inner=None if inner is None else (inner, self._ddp_comm_state))
        self._timer = StepTimer(self.root_device)
        self._reduction.handed_over = self._timer.handed_over
        self.model.register_comm_hook(self._reduction, reduce_gradients)

    # Data

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Replace the training loader by one that asks the service."""
        trainer = self._trainer_of()
        if trainer is None or not trainer.training:
            return dataloader
        if not isinstance(dataloader, DataLoader):
            raise TypeError(
                f"AntDTStrategy needs a torch DataLoader for training, got {type(dataloader).__name__}: its data set and collate"
                " function are used."
            )
        shard = max(1, (dataloader.batch_size or 1) * self.shard_steps)
        order, identity = train_order("AntDTStrategy", dataloader, self._seed(), self.shuffle, shard)
        batch = self.global_batch_size
        if batch is None:
            if dataloader.batch_size is None:
                raise ValueError(
                    "AntDTStrategy: the training DataLoader makes batches in its own way (batch_size is None): set"
                    " global_batch_size, and let the data set give samples."
                )
            batch = dataloader.batch_size * self.world_size
        length = identity["n"]
        samples = length // batch * batch if self.drop_last else length
        if samples == 0:
            raise ValueError(f"AntDTStrategy: drop_last, and the {length} samples fill no global batch of {batch}.")
        identity["n"] = samples
        if self._loader is not None:  # reloaded between epochs
            if self._loader.planner.num_samples != samples:
                raise ValueError("AntDTStrategy: a reloaded training set must have as many samples as the first.")
            planner = self._loader.planner
        else:
            planner = self._take_part(trainer, identity, batch)
        former, self._loader = self._loader, StepLoader(
            dataloader, planner, order, seed=self._seed(), length=length, prefetch=self.prefetch,
            epoch=lambda: trainer.current_epoch, rewind=self._rewind, waited=self._waited,
        )  # fmt: skip
        if former is not None:
            self._loader.load_state_dict(former.state_dict())
        return self._loader

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _take_part(self, trainer: Trainer, identity: dict[str, Any], batch: int) -> StepPlanner:
        connection, world = self._connection, self.world_size
        assert connection is not None and self._timer is not None
        self._check_resumed(batch)
        caps = self.max_micro_batch if isinstance(self.max_micro_batch, list) else [self.max_micro_batch] * world
        may_restart = self._hot is not None or (restarts_left() > 0 and trainer.checkpoint_callback is not None)
        controller = {
            "decide_every": self.decide_every,
            "restart_cost": self.restart_cost,
            "max_restarts_per_node": self.max_restarts_per_node if may_restart else 0,
            "group_restart": self._hot is None,
        }
        self._log = StepLog(self._folder / "events.jsonl") if self.is_global_zero else None
        connection.host(self._log.write if self._log else lambda line: None, self.broadcast)
        joined = connection.take_part(
            {
                "dataset": {**identity, "epochs": None},
                "solution": self.solution.init_config,
                "world_size": world,
                "global_batch": batch,
                "tail_factor": self.tail_factor,
                "controller": controller,
                "caps": caps,
                "heartbeat_timeout": self.heartbeat_timeout,
            },
            self._device_name(),
            self._wait_for_all,
            lambda said: bool(self.reduce_boolean_decision(said, all=False)),
        )
        client = connection.client
        client.keep_alive(self.heartbeat_timeout / 6)  # sanity checks and validation may be long
        source = ShardSource(client.call, batch, self.shard_steps)
        self._agent = Agent(
            client.call, self.global_rank, source, Exchange(self._control), self._timer,
            version=joined["plan"]["version"], report_every=self.report_every,
        )  # fmt: skip
        return StepPlanner(
            source, self._agent.announce, self._agent.decisions, self.global_rank, identity["n"], _allocation(joined["plan"])
        )

    def _check_resumed(self, batch: int) -> None:
        stored = self._restored
        if stored is None:
            return
        inside = 0 < stored["ledger"]["consumed"] < stored["ledger"]["n"]
        if stored["global_batch"] != batch and inside:
            raise ValueError(
                f"AntDTStrategy: the checkpoint stopped inside an epoch with global batches of {stored['global_batch']} samples,"
                f" on {stored['world_size']} processes; this run has {self.world_size} processes and batches of {batch}:"
                f" set global_batch_size to {stored['global_batch']}."
            )

    def _waited(self) -> float:
        return 0.0 if self._agent is None else self._agent.waited

    def _wait_for_all(self) -> None:
        if self._control is not None:
            dist.barrier(group=self._control)

    # Training begins and ends

    @override
    def on_train_start(self) -> None:
        """Put the service to where this run begins."""
        trainer, loader, agent = self._trainer, self._loader, self._agent
        assert trainer is not None
        loaders = trainer.fit_loop._combined_loader
        if loader is None or agent is None or (loaders is not None and len(loaders.flattened) != 1):
            raise ValueError("AntDTStrategy: train_dataloader must give one DataLoader; several cannot share a global batch.")
        states = trainer.fit_loop._combined_loader_states_to_load
        if states and trainer.fit_loop.restarting:  # Lightning forgets them if a schedule has asked for the number of steps
            loader.load_state_dict(states[0])
        at = loader.resume()
        if self._rejoins:
            self._check_rejoined(at["epoch"], at["samples"])
        else:
            self._restore(at["epoch"], at["samples"], self._restored)
        if self._hot is not None:
            self._hot.begins(trainer, self.world_size)
            agent.on_restart = self._to_be_restarted
        addresses: list[Any] = [own_address()] * self.world_size
        if self._control is not None:
            dist.all_gather_object(addresses, own_address(), group=self._control)
        agent.peers = PeerWatch(addresses, self.global_rank, self.heartbeat_timeout)
        agent.start()
        if self.injector is not None:
            anew = is_restarted()
            self.injector.begin(self.global_rank, restarted=anew or (self._hot is not None and self._hot.keeper.number > 0))
        if self.world_size > 1 and threading.current_thread() is threading.main_thread():
            self._former_handler = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _restore(self, epoch: int, consumed: int, stored: Mapping[str, Any] | None = None) -> None:
        """Put ledger, controller and plan to a position of the data; a collective call."""
        assert self._connection is not None and self._loader is not None and self._connection.joined is not None
        planner, client = self._loader.planner, self._connection.client
        planner.source.begin(epoch)
        self._wait_for_all()  # no request for data of before may come after
        plan: dict[str, Any] = {}
        if self.is_global_zero:
            ledger: dict[str, Any] = {"epoch": epoch, "todo": [[consumed, planner.num_samples]][: consumed < planner.num_samples]}
            controller = None
            if stored is not None:
                if (stored["ledger"]["epoch"], stored["ledger"]["consumed"]) == (epoch, consumed):
                    ledger = stored["ledger"]
                controller = stored["controller"]  # of which the service takes what it does not know better
            client.restore(ledger, controller)
            plan = client.status()["plan"]
        plan = self.broadcast(plan)
        assert self._agent is not None
        if plan["version"] > planner.allocation.version:
            planner.allocation = _allocation(plan)
            self._agent.begin(plan["version"])

    def _rewind(self, epoch: int) -> None:
        """To the beginning of an epoch: the one before was left before its end."""
        self._restore(epoch, 0)
        if self._hot is not None:
            self._hot.trained = [0] * self.world_size

    # Another rank is lost, and this one lives on; see `HotRestart`

    def somebody_is_gone(self) -> bool:
        """Whether the service misses a member of this rank's group."""
        if self._connection is None or self._connection.joined is None:
            return False
        return not PeerWatch([("", 0)] * self.world_size, self.global_rank, 0.0).all_there(self._connection.client.status())

    @property
    def told_to_stop(self) -> bool:
        """Whether a SIGTERM has come."""
        return self._told_to_stop

    def end_at_sigterm(self) -> None:
        """Let SIGTERM end this process at once, and leave it so when training is torn down.

        To block the signal meanwhile would not do: the kernel would give it to another thread.
        """
        trainer = self._trainer_of()
        assert trainer is not None
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._former_handler = trainer._signal_connector._original_handlers[signal.SIGTERM] = signal.SIG_DFL

    def position(self) -> tuple[int, int]:
        """Epoch, and steps of it, that are trained."""
        assert self._loader is not None
        at, planner = self._loader.state_dict(), self._loader.planner
        return at["epoch"], planner.num_steps - -(-(planner.num_samples - at["samples"]) // planner.global_batch)

    def extra_state(self) -> dict[str, Any]:
        """State that the next group needs and a checkpoint does not hold."""
        assert self._trainer is not None
        return {f"{KEY}_hot": {"lr_factor": self._lr_factor, "should_stop": self._trainer.should_stop}}

    def _check_rejoined(self, epoch: int, consumed: int) -> None:
        """Ledger and model are at the same place."""
        assert self._connection is not None and self._connection.joined is not None and self._loader is not None
        whole = self._loader.planner.num_samples
        ledger = self._connection.joined["epoch"], self._connection.joined["consumed"]
        if _without_end(*ledger, whole) != _without_end(epoch, consumed, whole):
            raise ValueError(
                f"AntDT: after ranks were lost, the ledger has {ledger[1]} samples of epoch {ledger[0]}, training has {consumed}"
                f" of epoch {epoch}. torchrun starts all ranks again from the last checkpoint, if --max-restarts allows it."
            )

    def _to_be_restarted(self) -> None:
        """The controller wants this rank to be started again."""
        assert self._hot is not None and self._agent is not None and self._trainer is not None
        if self._hot.keeper.left > 0:
            self._hot.replace_me = True
        elif restarts_left() > 0 and self._trainer.checkpoint_callback is not None:
            self._agent.wish(RESTART)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Stop after a step on which all agree; at once if a peer is gone, for which this rank would wait forever."""
        self._told_to_stop = True
        if self._agent is not None:
            self._agent.told_to_end(True)
        if callable(self._former_handler) and not isinstance(self._former_handler, _HandlersCompose):
            self._former_handler(number, frame)  # not Lightning's, which speaks to peers from wherever it interrupts this one

    @override
    def on_train_end(self) -> None:
        """Commit what is done, and leave."""
        assert self._agent is not None and self._connection is not None
        self._agent.stop()
        self._agent.report()
        self._last_snapshot = self._snapshot()  # for checkpoints that are saved after the run
        self._wait_for_all()  # none leaves while another could take it for lost
        self._connection.leave()
        self._wait_for_all()
        self._close(job_is_over=True)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the service; let the launcher start again what was stopped for that."""
        super().on_exception(exception)
        stopped = isinstance(exception, SIGTERMException)
        if self._restarting and isinstance(exception, SystemExit):
            exception.code = RESTART_EXIT_CODE
        step = 0
        if self._agent is not None:
            self._agent.stop()
            step = self._agent.step
        if self._connection is not None and not stopped:
            self._connection.fail([_described(exception)], step)
        self._close(job_is_over=restarts_left() == 0)

    @override
    def teardown(self) -> None:
        """Give everything back."""
        if self._agent is not None:
            self._agent.stop()
        self._close(job_is_over=False)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)
            self._former_handler = None
        self._restored = None
        self._loader = self._agent = self._timer = None
        self._told_to_stop = self._restarting = self._stop_unheard = False
        self._asked, self._lr_factor = 0, 1.0
        super().teardown()

    def _close(self, job_is_over: bool) -> None:
        if self.injector is not None:
            self.injector.end()
        if self._connection is not None:
            self._connection.close(job_is_over)
            self._connection = None
        if self._log is not None:
            self._log.close()

    @override
    def on_validation_start(self) -> None:
        """A validation begins."""
        super().on_validation_start()
        if self._hot is not None:
            self._hot.validates(self._trainer)

    # A step

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Take up the step's plan.

        Raises:
            SIGTERMException: all ranks have agreed to stop, and no callback has seen to it.
            ValueError: a callback accumulates gradients.
        """
        trainer, agent, timer, step = self._trainer, self._agent, self._timer, self._step
        assert trainer is not None and agent is not None and timer is not None
        if self._stop_unheard:
            raise SIGTERMException()
        self._stop_unheard = bool(step.reading.flags & (STOP | RESTART))
        if self._stop_unheard:
            self._restarting = bool(step.reading.flags & RESTART)
            agent.told_to_end(False)  # others may leave before this one now
        elif self._told_to_stop:
            self._wish(STOP)
        if trainer.accumulate_grad_batches != 1:
            raise ValueError("AntDTStrategy: a callback accumulates gradients over batches; set global_batch_size instead.")
        if self._hot is not None:
            self._hot.step_begins(trainer)
        agent.in_force(step.plan.decisions)
        for decision in step.plan.decisions:
            if isinstance(decision.action, AdjustLR):
                self._adjust_lr(decision.action.factor)
        timer.begin(trainer.global_step, step.plan.count, step.seconds, step.begun)
        samples = timer.finished()
        agent.measured(samples)
        if self._log is not None:
            self._log.step(trainer.global_step, step, samples)
        self._weights = self._exchange_weights(batch)

    @property
    def _step(self) -> StepBatch:
        assert self._loader is not None and self._loader.current is not None
        return self._loader.current

    def _exchange_weights(self, batch: Any) -> tuple[list[float], Callable[[], float]]:
        """Weights of the micro-batches, and what tells that of all ranks' together."""
        step, module = self._step, self.lightning_module
        if not isinstance(module, HasLossDenominator):
            return [float(count) for count in step.counts], lambda: float(step.reading.total)
        micros = [batch, *step.micros[1:]]
        own = [0.0 if step.is_shadow else loss_denominator(module, micro, 0) for micro in micros]
        if self._control is None:
            return own, lambda: sum(own)
        total = torch.tensor(sum(own), dtype=torch.float64)
        work = dist.all_reduce(total, group=self._control, async_op=True)
        timer = self._timer
        assert work is not None and timer is not None

        def wait() -> float:
            begun = timer.clock()
            work.wait()
            timer.waited(timer.clock() - begun)
            return float(total)

        return own, wait

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of the first micro-batch."""
        self._rest = (args[1:], kwargs)
        with self._unsynchronized(last=len(self._step.micros) == 1):
            return self._forward(0, args[0])

    def _forward(self, micro: int, batch: Any) -> Any:
        step, trainer = self._step, self._trainer
        assert trainer is not None
        self._micro = micro
        with self._logged_as(step.counts[micro], batch):
            output = super().training_step(batch, *self._rest[0], **self._rest[1])
        if self.injector is not None:
            time.sleep(self.injector.delay(trainer.global_step, step.counts[micro], self.global_rank))
        return output

    def _unsynchronized(self, last: bool) -> Any:
        assert isinstance(self.model, DistributedDataParallel)
        return nullcontext() if last else self.model.no_sync()

    @contextmanager
    def _logged_as(self, count: int, batch: Any) -> Iterator[None]:
        """Weight the module's logged values by the samples that count; those of a shadow weigh nothing."""
        assert self._trainer is not None
        results: Any = self._trainer.fit_loop.epoch_loop._results
        results.batch, results.batch_size = batch, count
        if count == 0:
            update = results.update_metrics
            results.update_metrics = lambda key, value, batch_size: update(key, value, 0)
        try:
            yield
        finally:
            vars(results).pop("update_metrics", None)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Weigh and go back; then the other micro-batches, the last of which is followed by the reduction."""
        step = self._step
        assert self._weights is not None
        weights, all_weights = self._weights
        own, total = sum(weights), all_weights()
        self._reduction.share = own / total if total else 0.0
        loss = closure_loss
        for micro in range(len(step.micros)):
            if micro:
                loss = self._later_forward(micro)
            scale = loss_scale(weights[micro], own, total, self.world_size, self.weighting)
            with self._unsynchronized(last=micro == len(step.micros) - 1):
                result = super().backward(loss * scale, optimizer, *args, **kwargs)
        return result

    def _later_forward(self, micro: int) -> Tensor:
        """Forward pass of a micro-batch that the loop does not see."""
        module, step = self.lightning_module, self._step
        assert module is not None
        batch = self.precision_plugin.convert_input(step.micros[micro])
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = self.batch_to_device(batch, dataloader_idx=0)
        hook, module._current_fx_name = module._current_fx_name, "training_step"
        try:
            with self._unsynchronized(last=micro == len(step.micros) - 1):
                output = self._forward(micro, batch)
        finally:
            module._current_fx_name = hook
        loss = ClosureResult.from_training_step_output(output).closure_loss
        if loss is None:
            raise RuntimeError("AntDTStrategy: training_step returned None, which would leave out a part of the global batch.")
        return loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """A step; its samples are done then."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self._loader is not None and self._agent is not None and self._timer is not None and self._trainer is not None
        self._loader.trained()
        self._agent.trained(self._step.plan, self._trainer.global_step + 1)
        if self._hot is not None:
            self._hot.step_done(self._step.reading.counts)
        return output

    def _adjust_lr(self, factor: float) -> None:
        """Let learning rates be ``factor`` times what their schedules say."""
        ratio, self._lr_factor = factor / self._lr_factor, factor
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for name in ("lr", "initial_lr"):
                    if name in group:
                        group[name] = group[name] * ratio
        for config in self.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [lr * ratio for lr in config.scheduler.base_lrs]

    # What others may ask

    def weighs_batches(self) -> bool:
        """Yes, by the module's `loss_denominator`."""
        return True

    def agrees_without_waiting(self) -> bool:
        """Yes: a request travels with the step's exchange."""
        return True

    def agree(self, request: Request, wanted: bool) -> bool:
        """Ask all ranks for something, without waiting for them: true, on all after the same step, some steps later.

        Args:
            request: what.
            wanted: whether this rank wants it.
        """
        flag = STOP if request == "stop" else SAVE
        if wanted:
            self._wish(flag)
        flags = self._step.reading.flags
        self._asked &= ~(flags & flag)
        if request == "save":
            return bool(flags & SAVE)
        self._stop_unheard = False
        return bool(flags & (STOP | RESTART))

    def _wish(self, flag: int) -> None:
        assert self._agent is not None
        if not self._asked & flag:
            self._asked |= flag
            self._agent.wish(flag)

    def sample_positions(self, batch_size: int) -> Tensor | None:
        """Positions of the present micro-batch's samples in the epoch's order, int64 (batch_size,); None outside of training.

        Raises:
            ValueError: the micro-batch has fewer samples.
        """
        if self._trainer is None or not self._trainer.training or self._loader is None or self._loader.current is None:
            return None
        positions = self._step.positions[self._micro]
        if batch_size > len(positions):
            raise ValueError(f"{batch_size} positions are asked for, the micro-batch has {len(positions)} samples.")
        return positions[:batch_size]

    def antdt_state(self) -> dict[str, Any]:
        """Status: ``step, batch, bpt, wall, bubble, version, restarts, generation, agent_seconds``."""
        state: dict[str, Any] = {} if self._log is None else dict(self._log.latest)
        if self._loader is not None and self._agent is not None:
            allocation = self._loader.planner.allocation
            state |= {
                "batch": list(allocation.batch),
                "version": allocation.version,
                "restarts": restart_count() + (self._hot.restarts if self._hot else 0),
                "agent_seconds": self._agent.seconds + self._loader.planning,
            }
            if self._connection is not None and self._connection.joined is not None:
                state["generation"] = self._connection.joined["gen"]
        return state

    # Checkpoints

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add what is left of the epoch, and the controller's state, and write on rank 0.

        ``checkpoint["antdt"]`` holds ``ledger`` (see `DataShardingService.snapshot`), ``controller``, ``world_size``,
        ``global_batch`` and ``lr_factor``.
        """
        if "optimizer_states" in checkpoint:
            snapshot = self._snapshot() if self._connection is not None else self._last_snapshot
            if snapshot is not None:
                todo, at = snapshot["ledger"]["todo"], snapshot["ledger"]["consumed"]
                for state in checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", []):
                    if todo not in ([], [[at, snapshot["ledger"]["n"]]]):
                        # What is left is no rest of the order: other strategies' loaders cannot go on with it, and will say so.
                        state["todo"] = todo
                checkpoint = {**checkpoint, KEY: snapshot}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _snapshot(self) -> dict[str, Any] | None:
        """State of the data and the controller for a checkpoint, on rank 0; a collective call."""
        if self._agent is None or self._loader is None or self._connection is None:
            return None
        self._agent.flush()
        self._wait_for_all()
        if not self.is_global_zero:
            return None
        snapshot, at = self._connection.client.snapshot(), self._loader.state_dict()
        ledger = snapshot["ledger"]
        if (ledger["epoch"], ledger["consumed"]) != (at["epoch"], at["samples"]):
            raise RuntimeError(
                f"AntDT: the ledger has {ledger['consumed']} samples of epoch {ledger['epoch']}, training has {at['samples']} of"
                f" epoch {at['epoch']}."
            )
        batch = self._loader.planner.global_batch
        return {**snapshot, "world_size": self.world_size, "global_batch": batch, "lr_factor": self._lr_factor}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of this strategy or another one, or another rank's memory."""
        if self._rejoins:
            return self._rejoin()
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._restored = checkpoint.pop(KEY, None)
        self._lr_factor = self._restored["lr_factor"] if self._restored is not None else 1.0
        return checkpoint


def _described(exception: BaseException) -> dict[str, Any]:
    """An error as the controller wants to know it."""
    return {"type": type(exception).__name__, "message": str(exception)[:500]}


def _without_end(epoch: int, consumed: int, whole: int) -> tuple[int, int]:
    """A position, the end of an epoch taken for the beginning of the next."""
    return (epoch + 1, 0) if consumed == whole else (epoch, consumed)


def _allocation(plan: Mapping[str, Any]) -> Allocation:
    return Allocation(tuple(plan["batch"]), tuple(plan["cap"]), int(plan["version"]))


StrategyRegistry.register(
    "antdt", AntDTStrategy, description="Data parallelism balanced over slow and fast processes, every sample once (AntDT)"
)
