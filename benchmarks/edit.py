"""EDiT against data parallelism when one random process is slow at each step.

``python -m benchmarks.edit`` trains a small `Ling` on the bytes of Python's own library sources, with 2 and with 4 processes
(gloo, one thread each) that all take the same number of steps. At each step one process, drawn anew, sleeps for ``--delay``
seconds. Compared are

* DDP;
* Lightning's post-local-SGD (local steps, then the plain mean of the parameters), as it is, and without the question for a
  SIGTERM that Lightning 2.6 asks rank 0 before each batch, which makes all processes wait for it;
* EDiT, synchronised every 8 steps, and A-EDiT, synchronised by time.

Shown are steps per second after the warm-up, beside closed forms from the seconds t that a step takes when nobody sleeps
(measured for each arm): all wait for the one who sleeps, so DDP takes ``t + d``; processes that never wait sleep every n-th
step, ``t + d/n``. That assumes that the sleepers of a round balance, that a step takes as long on each process, and that a
synchronisation costs nothing. Over tau steps they do not balance: the slowest process of a round sleeps E[max] times, where the
counts are multinomial, so a round takes ``tau t + d E[max]``; this is the second closed form, taken over the very draws.

The loss is the mean over the same held-out windows at the end; its relative difference to DDP's is the bar. It shrinks with the
rounds of the outer optimizer: 400 steps have 44 of them, 1200 have 131. A-EDiT takes as many steps in all; they fall to the
processes as they come.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.utils.data import DataLoader, Dataset

from benchmarks.gloo_processes import run_group
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from strategies import EDiTStrategy
from zoo.ling import Ling, preset

DDP, LOCAL, LOCAL_FREE, EDIT, A_EDIT = "DDP", "post-local-SGD", "post-local-SGD, not asked", "EDiT", "A-EDiT"
ARMS = (DDP, LOCAL, LOCAL_FREE, EDIT, A_EDIT)


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        ranks: Processes.
        steps: Steps of each process.
        warmup: The first of them, with averaged gradients, which are not timed.
        interval: Local steps between synchronisations.
        delay: Seconds that one process sleeps at each step.
        batch: Windows a process and step.
        length: Bytes a window.
        seed: Of weights, windows and sleepers.
    """

    ranks: int
    steps: int
    warmup: int
    interval: int
    delay: float
    batch: int
    length: int
    seed: int


def make_model() -> Ling:
    """A small mixture of experts on bytes."""
    config = preset("ling_tiny").replace(
        hidden_size=64, num_hidden_layers=3, num_experts=8, num_experts_per_tok=2, initializer_range=0.1
    )
    return Ling(config, router_warmup_steps=20, optimizer=functools.partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.95)))


def library_text(num_bytes: int) -> bytes:
    """Sources of Python's library, in the order of their names."""
    folder, text = Path(sysconfig.get_paths()["stdlib"]), bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= num_bytes:
            break
    return bytes(text[:num_bytes])


class Windows(Dataset):
    """Windows of a text at random places, each a pure function of its index."""

    def __init__(self, text: bytes, length: int, count: int, seed: int) -> None:
        self.text, self.length, self.count, self.seed = torch.frombuffer(bytearray(text), dtype=torch.uint8), length, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = random.Random(f"{self.seed}/{index}").randrange(len(self.text) - self.length)
        ids = self.text[start : start + self.length].long()
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def sleepers(setting: Setting) -> list[int]:
    """Who sleeps at each step."""
    draw = random.Random(setting.seed)
    return [draw.randrange(setting.ranks) for _ in range(setting.steps)]


def most_sleeps(setting: Setting) -> float:
    """E[max]/tau: sleeps a step of the process that sleeps most in its round, mean over the rounds that are timed.

    >>> most_sleeps(Setting(1, 16, 0, 8, 0.1, 1, 1, 0))
    1.0
    """
    drawn = sleepers(setting)[setting.warmup :]
    rounds = [drawn[start : start + setting.interval] for start in range(0, len(drawn), setting.interval)]
    return sum(max(map(part.count, range(setting.ranks))) for part in rounds) / len(drawn)


class Straggle(Callback):
    """Lets the process whose turn it is sleep, and takes the time of the steps after the warm-up."""

    def __init__(self, setting: Setting, delay: float, ask: bool) -> None:
        self.setting, self.delay, self.ask = setting, delay, ask
        self.order = itertools.cycle(sleepers(setting))
        self.seconds = 0.0
        self.timed = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the question for a SIGTERM, if asked for (Lightning hook)."""
        if not self.ask:
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock after the warm-up; sleep if it is this process's turn (Lightning hook)."""
        if trainer.global_step == self.setting.warmup:
            dist.barrier()
            self.began = time.perf_counter()
        if next(self.order) == dist.get_rank():
            time.sleep(self.delay)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock (Lightning hook)."""
        self.seconds = time.perf_counter() - self.began
        self.timed = trainer.global_step - self.setting.warmup


class PostLocalSGD(DDPStrategy):
    """Lightning's own; its hook is registered on CPU processes too, which Lightning leaves out."""

    def _register_ddp_hooks(self) -> None:
        assert self.model is not None
        _register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, None)  # type: ignore[arg-type]


def strategy_of(arm: str, setting: Setting, seconds: float) -> DDPStrategy:
    """The strategy of an arm; ``seconds`` is A-EDiT's interval."""
    if arm == DDP:
        return DDPStrategy()
    if arm in (LOCAL, LOCAL_FREE):
        state = PostLocalSGDState(None, None, setting.warmup, post_local_gradient_allreduce=False)
        return PostLocalSGD(ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=setting.interval)
    strategy = EDiTStrategy(
        sync_interval=setting.interval,
        sync_seconds=seconds if arm == A_EDIT else None,
        min_total_steps=setting.interval,
        warmup_steps=setting.warmup,
    )
    return strategy


def train(arm: str, setting: Setting, delay: float, seconds: float, steps: int) -> dict[str, float]:
    """Train on this process as one of the group; returns seconds a step, steps of this process, and the final loss."""
    warnings.filterwarnings("ignore")
    seed_everything(setting.seed, verbose=False)
    text = library_text(2_000_000)
    cut = len(text) * 9 // 10
    number = setting.ranks * setting.batch * steps * 2  # A-EDiT's fast processes may take more than their share
    train_data = Windows(text[:cut], setting.length, number, setting.seed)
    held_out = Windows(text[cut:], setting.length, 64 * setting.ranks, seed=0)
    straggle = Straggle(setting, delay, ask=arm != LOCAL_FREE)
    model = make_model()
    trainer = Trainer(
        accelerator="cpu",
        devices=setting.ranks,
        strategy=strategy_of(arm, setting, seconds),
        max_steps=steps,
        callbacks=[straggle],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, DataLoader(train_data, setting.batch))
    trainer.limit_val_batches = 1.0
    (result,) = trainer.validate(model, DataLoader(held_out, 32), verbose=False)
    return {"seconds": straggle.seconds, "steps": float(straggle.timed), "loss": result["val/loss"]}


def together(outcomes: list[dict[str, float]]) -> tuple[float, float]:
    """Seconds a step, of the group's mean number of steps, and the loss."""
    seconds = max(outcome["seconds"] for outcome in outcomes)
    return seconds / statistics.mean(outcome["steps"] for outcome in outcomes), outcomes[0]["loss"]


def arms_of(folder: str, of: dict[str, Any], probe: int) -> list[dict[str, Any]]:
    """All arms, one after the other, on this process as one of the group."""
    setting = Setting(**of)
    rows: list[dict[str, Any]] = []
    ddp_loss = math.nan

    def run(arm: str, delay: float, seconds: float, steps: int) -> tuple[float, float]:
        outcomes: list[Any] = [None] * setting.ranks
        dist.all_gather_object(outcomes, train(arm, setting, delay, seconds, steps))
        return together(outcomes)

    bare: dict[str, float] = {}
    for arm in ARMS:
        bare[arm], _ = run(arm, 0.0, setting.interval * bare.get(EDIT, 0.0), probe)
        t, n = bare[arm], setting.ranks
        share = {DDP: 1.0, LOCAL: 1.0}.get(arm, 1 / n)
        worst = {DDP: 1.0, LOCAL: 1.0}.get(arm, most_sleeps(setting))
        seconds, loss = run(arm, setting.delay, setting.interval * (t + setting.delay / n), setting.steps)
        ddp_loss = loss if arm == DDP else ddp_loss
        rows.append({
            "arm": f"{n} processes, {arm}", "processes": n, "seed": setting.seed, "steps_per_second": 1 / seconds,
            "closed_form": 1 / (t + share * setting.delay), "closed_form_of_rounds": 1 / (t + worst * setting.delay),
            "without_sleep": 1 / t, "over_ddp": None, "loss": loss, "loss_over_ddp": loss / ddp_loss - 1,
        })  # fmt: skip
        rows[-1]["over_ddp"] = rows[-1]["steps_per_second"] / rows[0]["steps_per_second"]
    return rows


def judge(record: Record) -> None:
    """The bar: the worst median, over the seeds, of EDiT's relative difference to DDP."""
    differences: dict[int, list[float]] = {}
    for row in record.rows:
        if str(row["arm"]).endswith(f", {EDIT}"):
            differences.setdefault(int(row["processes"] or 0), []).append(float(row["loss_over_ddp"] or 0.0))
    record.measure("loss_over_ddp", max(statistics.median(of) for of in differences.values()))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edit", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--interval", type=int, default=8, help="local steps between synchronisations")
    parser.add_argument("--delay", type=float, default=0.1, help="seconds that one process sleeps at each step")
    parser.add_argument("--smoke", action="store_true", help="a few steps of two processes; the result is not kept")
    options = parser.parse_args(arguments)
    processes = [2] if options.smoke else options.processes
    seeds = [0] if options.smoke else list(range(options.seeds))
    steps, warmup, batch, length = (20, 4, 2, 32) if options.smoke else (options.steps, options.steps // 8, 8, 128)
    delay = 0.01 if options.smoke else options.delay
    columns = ["steps_per_second", "over_ddp", "closed_form", "closed_form_of_rounds", "without_sleep", "loss", "loss_over_ddp"]
    title = f"Steps per second when one process sleeps {delay:g} s a step, and loss after {steps} steps"
    table = Table(title, "arm", columns, digits=3)
    plot = Plot("Steps per second by number of processes, one of them asleep", "processes", "steps_per_second", "strategy")
    record = Record("edit", seeds=seeds, tables=[table], plots=[plot], smoke=options.smoke)
    for ranks, seed in itertools.product(processes, seeds):
        setting = Setting(ranks, steps, warmup, options.interval, delay, batch, length, seed)
        for row in run_group(setting.ranks, arms_of, asdict(setting), 8 if options.smoke else 60 + warmup):
            record.row(**row, strategy=str(row["arm"]).partition(", ")[2])
        print(f"{ranks} processes, seed {seed}: done", file=sys.stderr, flush=True)
    judge(record)
    return record.save()


if __name__ == "__main__":
    main()
