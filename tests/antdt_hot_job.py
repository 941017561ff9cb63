"""A job with hot restarts for tests: real processes as torchrun starts them, killed where a test wants it."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from antdt_job import Noisy, RowsData, weights_of
from fork_server import start_fork_server
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.sample_trace import SampleTrace
from strategies import AntDTStrategy
from strategies.antdt.control.solutions import StaticBSP
from zoo.callbacks import RunCheckpoint


@dataclass(frozen=True)
class Death:
    """A process that ends itself by SIGKILL.

    Attributes:
        rank: of it.
        step: number of optimizer steps that are done.
        where: name of a hook.
        life: number of the process, of those of this rank.
    """

    rank: int
    step: int
    where: str
    life: int = 0


class Die(Callback):
    """Ends processes where they are told to."""

    def __init__(self, deaths: tuple[Death, ...]) -> None:
        self.deaths = deaths

    def at(self, trainer: Trainer, where: str) -> None:
        life = trainer.strategy._hot.keeper.number  # type: ignore[attr-defined]
        if Death(trainer.global_rank, trainer.global_step, where, life) in self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.at(trainer, "batch_end")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self.at(trainer, "epoch_start")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.at(trainer, "epoch_end")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.at(trainer, "validation")

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self.at(trainer, "saving")

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.at(trainer, "train_end")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.at(trainer, "setup")


class Mortal(Noisy):
    """Has a buffer that counts forward passes in training, and may end in the midst of one."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: Tensor
        self.register_buffer("passes", torch.tensor(0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.passes += 1
        loss = super().training_step(batch, batch_idx)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        next(callback for callback in callbacks if isinstance(callback, Die)).at(self.trainer, "forward")
        return loss


class Slow(Callback):
    """Makes steps long enough to be hit from outside."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(self.seconds)


class EndedWhileItLeaves(Callback):
    """Its rank is told to end while it leaves a broken group, of which the one that trains hears by its keeper."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        threading.Event().wait(20)  # it has ended by then


@dataclass
class Job:
    """What to train.

    Attributes:
        folder: of the run, and of what processes tell.
        deaths: on the way.
        ranks: processes.
        spares: of each rank.
        options: of the strategy.
        trainer: options of the trainer.
        callbacks: further ones.
        slow: seconds that each step takes longer.
        save_every: steps between checkpoints.
        rows: samples of an epoch.
        workers: that load data, for each rank.
        resume: whether to go on from the last checkpoint.
    """

    folder: Path
    deaths: tuple[Death, ...] = ()
    ranks: int = 2
    spares: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callback, ...] = ()
    slow: float = 0.0
    save_every: int = 4
    rows: int = 45
    workers: int = 0
    resume: bool = False

    def train(self, rank: int, port: int) -> None:
        """Body of a process that torchrun would start."""
        os.setsid()
        log = os.open(self.folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        size = str(self.ranks)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, GROUP_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="tests", TORCHELASTIC_RESTART_COUNT="0",
            TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        multiprocessing.set_start_method("fork", force=True)  # as everywhere but in processes of a fork server
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        seed_everything(3, verbose=False)
        module = Mortal()
        strategy = AntDTStrategy(
            restart="hot", spares=self.spares,
            **{
                "solution": StaticBSP(), "report_every": 3, "global_batch_size": 8, "shard_steps": 1, "shuffle": "global",
                **self.options,
            },
        )  # fmt: skip
        trainer = Trainer(
            accelerator="cpu", devices=self.ranks, strategy=strategy, logger=False, precision="64-true",
            default_root_dir=self.folder, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[
                RunCheckpoint(every_n_steps=self.save_every, minutes=None), SampleTrace(self.folder / "trace"), Die(self.deaths),
                Slow(self.slow), *self.callbacks,
            ],
            **{"max_epochs": 2, "limit_val_batches": 0, **self.trainer},
        )  # fmt: skip
        trainer.fit(
            module,
            RowsData(rows=self.rows, num_workers=self.workers),
            ckpt_path=self.folder / "checkpoints" / "last.ckpt" if self.resume else None,
        )
        torch.save(weights_of(module), self.folder / f"weights{rank}.pt")
        loop = trainer.fit_loop.epoch_loop
        end = {
            "step": trainer.global_step, "epoch": trainer.current_epoch, "logged_step": loop._batches_that_stepped,
            "batches": loop.batch_progress.state_dict(), "rate": trainer.optimizers[0].param_groups[0]["lr"],
        }  # fmt: skip
        (self.folder / f"end{rank}.json").write_text(json.dumps(end))
        sys.stdout.flush()
        os._exit(0)


class Torchrun:
    """Starts the processes of jobs as torchrun does, quickly: a process that has imported all splits them off."""

    def __init__(self) -> None:
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def run(self, job: Job, meanwhile: Callable[[], None] = lambda: None, seconds: float = 60.0) -> list[int]:
        """Exit codes; once a process has ended badly, or time is over, the others are told to end.

        Args:
            job: to run.
            meanwhile: called while it runs.
            seconds: until it is ended.
        """
        job.folder.mkdir(parents=True, exist_ok=True)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent hosts it
        self._connection.send((job, store.port, seconds))
        meanwhile()
        codes: list[int] = self._connection.recv()
        return codes

    def close(self) -> None:
        """End it."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            job, port, seconds = connection.recv()
            connection.send(_watch([_split_off(job, rank, port) for rank in range(job.ranks)], time.monotonic() + seconds))


def _split_off(job: Job, rank: int, port: int) -> int:
    process = os.fork()
    if process == 0:
        try:
            job.train(rank, port)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(1)
    return process


def _watch(processes: list[int], end: float) -> list[int]:
    codes: dict[int, int] = {}
    told = False
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    codes[process] = os.waitstatus_to_exitcode(status)
        if (any(codes.values()) or time.monotonic() > end) and not told:
            told = True
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGTERM)
        if time.monotonic() > end + 10:
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[process] for process in processes]


def logs(job: Job) -> str:
    """What the processes wrote."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(job.folder.glob("log*.txt")))
