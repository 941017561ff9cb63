"""AntDT against data parallelism and other ways of balancing, with one process or more slowed down.

``python -m benchmarks.antdt`` trains a small `XDeepFM` on real flights with four processes (gloo, one thread each). Each sample
costs ``--cost`` seconds in addition to what the model takes, by sleep, and on slow processes several times as much: **an
emulation**, in which four processes on fewer cores behave like four machines. Scenarios:

* ``transient``: one process takes 4 times as long for a while, at least ten decision intervals, and recovers;
* ``persistent``: one process takes 4 times as long from some step on;
* ``deterministic``: two processes of an older kind take 3 times as long from the first step; a micro-batch costs something
  whatever its size, and each process holds a limited number of samples at once, so that the fast ones can take more only in
  several micro-batches.

Arms: DDP; bulk-synchronous steps with the data-sharding service but equal batches (what the service costs); LB-BSP; AntDT-ND;
AntDT-DD; and an oracle, which knows the costs while the slowdown lasts and solves for the best batches in the first step. All see
the same samples. Shown is the *steady* time of a step, its median over the second half of the slowdown; JCT, the seconds of the
whole run; the AUC on held-out flights; and the time inside the agent: planning, exchange and reports on the training thread, on
the process where it is largest, over the time of the run.

The closed form of the speed-up over equal batches is ``c_max sum(1/c_i) / W``, if a step costs nothing but its samples.
Bars are medians over seeds, and the worst arm or scenario counts; the AUC is compared over all runs. Time inside the agent is
taken by the clock, so that it also holds what else ran on the cores meanwhile: the table has it for each run.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.antdt_timeline import draw
from benchmarks.gloo_processes import run_group
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Flights
from strategies import AntDTStrategy
from strategies.antdt import LBBSP, AntDTDD, AntDTND, Solution, StaticBSP
from strategies.antdt.control.actions import AdjustBatch
from strategies.antdt.control.monitor import Windows
from strategies.antdt.control.solvers import balance, balance_micro
from strategies.antdt.simulation.inject import SleepInjector, Slowdown
from zoo.ctr import XDeepFM

DDP, STATIC, LB, ND, DD, ORACLE = "DDP", "BSP with DDS", "LB-BSP", "AntDT-ND", "AntDT-DD", "oracle"
ARMS = (DDP, STATIC, LB, ND, DD, ORACLE)
OURS = {"transient": ND, "persistent": ND, "deterministic": DD}
RANKS = 4


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        scenario: Its name.
        seed: Of weights and order.
        steps: Optimizer steps.
        batch: Samples of a step on all processes.
        cost: Seconds of a sample on a process that is not slow.
        cost_per_batch: Seconds of a micro-batch in addition.
        cap: Most samples of a micro-batch, if limited.
        slow: Processes that are slow.
        factor: By how much.
        start: First step of it.
        stop: First step after it; None: none.
        interval: Steps between two decisions.
    """

    scenario: str
    seed: int
    steps: int
    batch: int
    cost: float
    cost_per_batch: float
    cap: int | None
    slow: tuple[int, ...]
    factor: float
    start: int
    stop: int | None
    interval: int

    @property
    def factors(self) -> list[float]:
        """Slowness of each process while it lasts."""
        return [self.factor if rank in self.slow else 1.0 for rank in range(RANKS)]

    @property
    def injector(self) -> SleepInjector:
        """What slows processes down."""
        slowdowns = [Slowdown(rank, self.factor, self.start, self.stop) for rank in self.slow]
        return SleepInjector(self.cost, slowdowns, self.cost_per_batch)

    @property
    def closed_form(self) -> float:
        """Speed-up of the best batches over equal ones, if a step costs nothing but its samples.

        >>> setting("persistent", 0, 80, 256, 0.0005, 4).closed_form
        3.25
        """
        return max(self.factors) * sum(1 / factor for factor in self.factors) / RANKS

    @property
    def steady(self) -> range:
        """Steps over which the time of a step is taken: the second half of the slowdown."""
        stop = self.steps if self.stop is None else self.stop
        return range(self.start + (stop - self.start) // 2, stop)


def setting(scenario: str, seed: int, steps: int, batch: int, cost: float, interval: int) -> Setting:
    """A scenario."""
    start, stop = steps // 8, None
    if scenario == "deterministic":
        return Setting(scenario, seed, steps, batch, cost, 8 * cost, batch // RANKS, (2, 3), 3.0, 0, None, interval)
    if scenario == "transient":
        stop = steps * 7 // 8
    return Setting(scenario, seed, steps, batch, cost, 0.0, None, (3,), 4.0, start, stop, interval)


class TrueCosts(Solution):
    """The best batches for true costs, from the first decision on.

    Args:
        cost: Seconds of a sample on each process.
        fixed: Seconds of a micro-batch on each process, in addition.
        cap: Most samples of a micro-batch, if limited.
    """

    windows = Windows(transient=4, persistent=30, unit="steps", min_steps=1, skip_steps=0)

    def __init__(self, cost: list[float], fixed: list[float], cap: int | None) -> None:
        self.cost, self.fixed, self.cap = cost, fixed, cap

    def cooldowns(self) -> dict[str, float]:
        """None: there is but one decision."""
        return {}

    def decide(self, view: Any, now: float) -> list[Any]:
        """The best batches, once."""
        total, count = view.global_batch, len(self.cost)
        if AdjustBatch.kind not in view.ready:
            return []
        if self.cap is None:
            batch = balance(self.fixed, self.cost, total, [1] * count, [total] * count)
        else:
            batch, _ = balance_micro(self.fixed, self.cost, [self.cap] * count, total, [1] * count)
        return [] if tuple(batch) == view.batch else [AdjustBatch(tuple(batch), view.cap, "from the true costs")]


def solution_of(arm: str, of: Setting) -> Solution:
    """The solution of an arm."""
    if arm == STATIC:
        return StaticBSP()
    if arm == LB:
        return LBBSP(window=8, unit="steps")
    if arm == ND:
        return AntDTND(window_transient=8, window_persistent=64, unit="steps", min_steps=6, kill_restart=False)
    if arm == DD:
        return AntDTDD(warmup_steps=6, skip_steps=2, classes="cluster")
    return TrueCosts([of.cost * each for each in of.factors], [of.cost_per_batch * each for each in of.factors], of.cap)


class Steps(Callback):
    """Takes the time of each step; slows processes down where no strategy does."""

    def __init__(self, injector: SleepInjector | None, samples: int) -> None:
        self.injector, self.samples = injector, samples
        self.began: list[float] = []
        self.inside = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins (Lightning hook)."""
        self.began.append(time.perf_counter())
        if self.injector is not None:
            time.sleep(self.injector.delay(trainer.global_step, self.samples, trainer.global_rank))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is over (Lightning hook)."""
        self.began.append(time.perf_counter())
        if isinstance(trainer.strategy, AntDTStrategy):
            self.inside = trainer.strategy.antdt_state()["agent_seconds"]


def data_and_model(seed: int, batch: int, steps: int) -> tuple[Flights, XDeepFM]:
    """As many real flights as the steps of one epoch take, and a small model of them; the seed is of both."""
    seed_everything(seed, verbose=False)
    data = Flights(batch_size=batch // RANKS, train_rows=batch * steps, seed=seed)
    data.prepare_data()
    data.setup("fit")
    optimizer = functools.partial(torch.optim.Adam, lr=5e-3)
    return data, XDeepFM(list(data.field_dims), data.num_dense, embed_dim=4, cin=(8,), dnn=(32,), optimizer=optimizer)


def train(arm: str, of: Setting, folder: str, rows: int) -> dict[str, Any]:
    """Train on this process as one of the group."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data, model = data_and_model(of.seed, of.batch, of.steps)
    if arm == DDP:
        strategy: DDPStrategy = DDPStrategy()
    else:
        strategy = AntDTStrategy(
            solution_of(arm, of), server="inprocess", decide_every=of.interval, report_every=2,
            max_micro_batch=of.cap, injector=of.injector, shard_steps=4,
        )  # fmt: skip
    steps = Steps(of.injector if arm == DDP else None, of.batch // RANKS)
    root = Path(folder) / f"{of.scenario}-{of.seed}-{arm.replace(' ', '-')}"
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy, max_epochs=1, callbacks=[steps], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        default_root_dir=root,
    )  # fmt: skip
    dist.barrier()
    begin = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - begin
    trainer.limit_val_batches = rows // of.batch
    (result,) = trainer.validate(model, datamodule=data, verbose=False)
    walls = [after - before for before, after in zip(steps.began, steps.began[1:], strict=False)]
    log = root / "antdt" / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if arm != DDP and dist.get_rank() == 0 else []
    batches = [line["batch"] for line in lines if line.get("kind") == "step"]
    return {
        "seconds": seconds,
        "walls": walls,
        "auc": result["val/auc"],
        "inside": steps.inside,
        "batches": batches,
        "log": lines,
    }


def arms_of(folder: str, settings: Sequence[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """All arms of all settings, one after the other, on this process as one of the group."""
    results: list[dict[str, Any]] = []
    for of in [Setting(**each) for each in settings]:
        for arm in ARMS:
            outcomes: list[Any] = [None] * RANKS
            dist.all_gather_object(outcomes, train(arm, of, folder, rows))
            first = outcomes[0]
            walls = first["walls"]
            if len(walls) != of.steps:
                raise RuntimeError(f"{arm} took {len(walls)} steps instead of {of.steps}.")
            results.append({
                "scenario": of.scenario, "arm": arm, "seed": of.seed, "walls": walls,
                "batches": first["batches"], "log": first["log"],
                "steady": statistics.median(walls[step] for step in of.steady), "seconds": max(o["seconds"] for o in outcomes),
                "auc": first["auc"], "inside": max(o["inside"] / o["seconds"] for o in outcomes), "closed_form": of.closed_form,
            })  # fmt: skip
            if dist.get_rank() == 0:
                print(f"{of.scenario}, seed {of.seed}, {arm}: {results[-1]['steady'] * 1e3:.1f} ms", file=sys.stderr, flush=True)
    return results


def judge(record: Record, results: Sequence[dict[str, Any]]) -> None:
    """Rows and bars of the results."""
    found = {(each["scenario"], each["seed"], each["arm"]): each for each in results}
    ratios: dict[str, list[float]] = {scenario: [] for scenario in OURS}
    speeds: dict[str, list[float]] = {scenario: [] for scenario in OURS}
    differences = []
    for (scenario, seed, arm), each in found.items():
        ddp, oracle = found[scenario, seed, DDP], found[scenario, seed, ORACLE]
        over_ddp, over_oracle = ddp["steady"] / each["steady"], each["steady"] / oracle["steady"]
        record.row(
            case=f"{scenario}, {arm}", seed=seed, steady_ms=1e3 * each["steady"], over_ddp=over_ddp, over_oracle=over_oracle,
            closed_form=each["closed_form"], jct_s=each["seconds"], jct_over_ddp=ddp["seconds"] / each["seconds"],
            auc=each["auc"], auc_difference=each["auc"] - ddp["auc"], percent_in_agent=100 * each["inside"],
            last_batches="/".join(map(str, each["batches"][-1])) if each["batches"] else None,
        )  # fmt: skip
        if arm == OURS[scenario]:
            ratios[scenario].append(over_oracle)
            speeds[scenario].append(over_ddp)
        if arm != DDP:
            differences.append(abs(each["auc"] - ddp["auc"]))
    for (scenario, seed, arm), each in found.items():
        if scenario == "transient" and seed == min(record.seeds):
            for step, wall in enumerate(each["walls"]):
                record.row(step=step, arm=arm, milliseconds=1e3 * wall)
    for scenario, values in ratios.items():
        record.measure(f"step_over_oracle_{scenario}", statistics.median(values) if values else None)
    single = [statistics.median(speeds[scenario]) for scenario in ("transient", "persistent") if speeds[scenario]]
    record.measure("speed_over_ddp", min(single) if single else None)
    record.measure("auc_difference", max(differences))
    inside: dict[tuple[str, str], list[float]] = {}
    for (scenario, _, arm), each in found.items():
        inside.setdefault((scenario, arm), []).append(each["inside"])
    record.measure("time_inside_agent", max(statistics.median(shares) for shares in inside.values()))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.antdt", description=__doc__)
    parser.add_argument("--scenarios", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--batch", type=int, default=256, help="samples of a step on all processes")
    parser.add_argument("--cost", type=float, default=0.5e-3, help="seconds of a sample")
    parser.add_argument("--interval", type=int, default=4, help="steps between two decisions")
    parser.add_argument("--smoke", action="store_true", help="a few steps of one scenario; the result is not kept")
    options = parser.parse_args(arguments)
    scenarios = ["persistent"] if options.smoke else options.scenarios
    seeds = [0] if options.smoke else list(range(options.seeds))
    steps, batch, rows = (16, 64, 256) if options.smoke else (options.steps, options.batch, 16384)
    record = Record(
        "antdt", seeds=seeds, smoke=options.smoke,
        tables=[
            Table(
                f"Emulated stragglers, four processes, global batch {batch}", "case",
                ["steady_ms", "over_ddp", "closed_form", "over_oracle", "jct_s", "jct_over_ddp", "auc_difference",
                 "percent_in_agent"], digits=3,
            )
        ],
        plots=[Plot("Time of a step while one process of four is 4 times slower for a while", "step", "milliseconds", "arm")],
    )  # fmt: skip
    settings = [setting(scenario, seed, steps, batch, options.cost, options.interval) for scenario in scenarios for seed in seeds]
    results = run_group(RANKS, arms_of, [asdict(each) for each in settings], rows)
    judge(record, results)
    path = record.save()
    log = {each["arm"]: each["log"] for each in results if each["scenario"] == scenarios[0] and each["seed"] == 0}
    draw(
        log[ND], path.with_name("antdt_timeline.png"), log[STATIC], f"AntDT-ND, {scenarios[0]} straggler (emulated), 4 processes"
    )
    return path


if __name__ == "__main__":
    main()
