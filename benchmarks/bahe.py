"""BAHE beside a language model that reads all tokens, ids, and popularity: time, memory, and AUC after equal seconds.

``python -m benchmarks.bahe`` predicts which films of MovieLens-100K a user will like, with MiniLM (6 blocks), on a CPU:

- Time of training and peak memory of a row, for K lower blocks and histories of M behaviours a list, each in a process of its own
  with batches of 32 rows, by which its whole peak of resident memory is divided. The token-level model trains all blocks on at most
  256 tokens a list, or on as many as need BAHE's operations, 3 at least.
- AUC on every fifth row of the test split after 90 s, the building of the store counted, a new one in each run. Ids stop
  after 3 epochs, if those are earlier, as their configuration does; the token-level model has batches of 16 rows.
- Days as deployed: the store lacks texts of later days; each day's rows continue from yesterday's weights, new texts are appended,
  and candidates of the next day are scored, also by the model that was never updated. Rows a day of 8 devices are predicted.

On a GPU also: one epoch each, the AUC at equal rows; a random decoder of 1.3 B parameters on 2,048 tokens, 4 lists of 32 texts
of 16 tokens, in the largest batch that fits 16 GiB.

Claim: arXiv 2403.19347, a fifth of the time and of the memory of the model that reads all tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc
from typing_extensions import override

from benchmarks.commands import zoo
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import TextHistories
from zoo import BAHE
from zoo.__main__ import main as zoo_main
from zoo.bahe import BlockSize, ClickRates
from zoo.cli.command import ZooCLI
from zoo.cli.configs import packaged_configs
from zoo.lm.loading import read_hf_config
from zoo.lm.sources import find_source
from zoo.metrics.grouped_auc import GroupedAUC

TINY, EPOCH, TOKENS, IDS, LARGE = (
    f"bahe/{name}" for name in ("movielens_tiny", "movielens", "movielens_tokens", "movielens_ids", "qwen2_1b5_efficiency")
)
FULL = {"CPU": ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"], "GPU": ["--trainer.accelerator", "gpu"]}
T, BLOCKS, TITLE = 256, 6, 12
"""Tokens of a list, blocks of MiniLM, tokens of a candidate."""
EVERY = 5
DAY = 86_400
LINK = 1.25e9
"""Bytes a second between devices that the prediction assumes."""
GIB = 2**30


class Clock(Callback):
    """Time of training from the setup on, which builds the store; tests at some moments, out of its time, and stops at the last.

    Args:
        moments: Seconds; none: nothing is tested, and nothing stopped.
    """

    def __init__(self, moments: Sequence[float] = ()) -> None:
        self.moments = [*moments]
        self.stops = bool(moments)
        self.begin, self.rows = 0.0, 0
        self.before = 0.0
        self.ticks: list[tuple[float, int]] = []
        self.found: list[dict[str, float]] = []

    @property
    def seconds_per_row(self) -> float:
        """Without the first step."""
        (first, old), *_, (last, new) = self.ticks
        return (last - first) / (new - old)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.begin = time.perf_counter()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = time.perf_counter() - self.begin

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begin
        self.rows += len(batch["label"])
        self.ticks.append((seconds, self.rows))
        if self.moments and seconds >= self.moments[0]:
            self.moments = [moment for moment in self.moments if moment > seconds]
            self._test(trainer, pl_module)
            trainer.should_stop = not self.moments

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.moments:
            self._test(trainer, pl_module)

    def _test(self, trainer: Trainer, pl_module: LightningModule) -> None:
        paused = time.perf_counter()
        seconds = self.ticks[-1][0]
        rows = trainer.datamodule.dataset("test")  # type: ignore[attr-defined]
        numbers = np.arange(0, len(rows), EVERY)
        scores = []
        pl_module.eval()
        with torch.no_grad():
            for part in np.array_split(numbers, math.ceil(len(numbers) / 64)):
                scores.append(pl_module(pl_module.transfer_batch_to_device(rows.batch(part), pl_module.device, 0)).float().cpu())
        pl_module.train()
        self.found.append({"seconds": seconds, "trained": self.rows, **quality(torch.cat(scores), rows, numbers)})
        self.begin += time.perf_counter() - paused


def quality(score_B: Tensor, rows: Any, numbers: np.ndarray) -> dict[str, float]:
    """Metrics of logits of some rows."""
    label_B, user_B = (rows.column(name)[numbers] for name in ("label", "user"))
    gauc = GroupedAUC()
    gauc.update(score_B, label_B.long(), user_B)
    log_loss = binary_cross_entropy_with_logits(score_B, label_B)
    return {"auc": float(binary_auroc(score_B, label_B.long())), "log_loss": float(log_loss), "gauc": float(gauc.compute()["auc"])}


def fit(config: str, folder: Path, options: Sequence[str], clock: Clock, seed: int = 0) -> ZooCLI:
    """A command ``zoo fit`` in this process, for as long as the clock says."""
    quiet = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.limit_val_batches", "0"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        words = zoo("fit", config, folder, "--seed_everything", str(seed), *quiet, *options)[3:]
        return ZooCLI(words, trainer_defaults={"callbacks": [clock]})


def cell(config: str, options: Sequence[str], rows: int, batch: int) -> dict[str, float]:
    """Milliseconds and MiB of a trained row, the peak of memory in GiB, rows a second."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    steps = ["--data.batch_size", str(batch), "--trainer.max_steps", str(1 + math.ceil(rows / batch))]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        fit(config, Path(folder), [*options, *steps], clock)
    if "gpu" in options:
        peak = torch.cuda.max_memory_allocated() / GIB
    else:  # not that of getrusage, which a process inherits from the one that started it
        status = Path("/proc/self/status")
        peak = int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20 if status.is_file() else math.nan
    milliseconds = 1000 * clock.seconds_per_row
    return {"ms_per_row": milliseconds, "mib_per_row": peak * 1024 / batch, "peak_gib": peak, "rows_per_s": 1000 / milliseconds}


def cell_alone(*arguments: Any) -> dict[str, float]:
    """A cell in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cell, *arguments).result()


def grid(record: Record, folder: Path, rows: int, token_rows: int) -> None:
    """Time and memory of rows, for lower blocks and histories."""
    config = read_hf_config(find_source("minilm-l6"))
    size = BlockSize.of(config)

    def add(name: str, arm: str, history: int, flops: int, found: Mapping[str, float]) -> Mapping[str, float]:
        record.row(cell=f"{name}, M={history}", by_history=arm, history=history, gflop=flops / 1e9, **found)
        return found

    def tokens(most: int, history: int) -> dict[str, float]:
        options = ["--model.max_tokens", str(most), "--data.history", str(history)]
        return cell_alone(TOKENS, [*FULL["CPU"], *options], token_rows, 32)

    ours: dict[tuple[int, int], Mapping[str, float]] = {}
    for low in (1, 3, 5):
        store = ["--model.n_low", str(low), "--model.store", str(folder / f"grid_{low}")]
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if zoo_main(["store", "build", "-c", TINY, *store]):
                raise SystemExit(f"zoo store build -c {TINY} {' '.join(store)} failed.")
        record.row(store=f"K={low}", build_seconds=time.perf_counter() - begin)
        for history in (16, 32) if low < 5 else (8, 16, 32):
            flops = size.flops([history, history, 1], BLOCKS - low)
            lengths = ["--model.max_behaviors", str(history), "--data.history", str(history)]
            found = cell_alone(TINY, [*FULL["CPU"], *store, *lengths], rows, 32)
            ours[low, history] = add(f"BAHE, K={low}", f"BAHE, K={low}", history, flops, found)
            if (low, history) in ((1, 32), (5, 16)):
                few = max((t for t in range(3, T) if size.flops([t, t, min(t, TITLE)], BLOCKS) <= flops), default=3)
                matched = size.flops([few, few, min(few, TITLE)], BLOCKS)
                add(f"tokens, T={few}, BAHE's FLOPs at K={low}", "tokens, truncated", history, matched, tokens(few, history))
    for history in (8, 16, 32):
        found = tokens(T, history)
        long = min(T, history * (TITLE - 1))
        add(f"tokens, T={T}", f"tokens, T={T}", history, size.flops([long, long, TITLE], BLOCKS), found)
    record.measure("time_ratio", found["ms_per_row"] / ours[5, 16]["ms_per_row"])
    record.measure("memory_ratio", found["mib_per_row"] / ours[5, 16]["mib_per_row"])
    for history in (16, 32):
        data = TextHistories(history=history)
        record.row(dedup=f"M={history}", atoms=len(data.atoms) - 1, factor=data.dedup_factor)


def add_arm(record: Record, arm: str, seed: int, clock: Clock) -> float:
    """Rows of an arm; returns its last AUC."""
    for found in clock.found:
        record.row(curve=arm, seed=seed, seconds=found["seconds"], test_auc=found["auc"])
    record.row(arm=arm, seed=seed, **clock.found[-1])
    return clock.found[-1]["auc"]


def arms(record: Record, folder: Path, seeds: Sequence[int], budget: float) -> Path:
    """AUC after equal seconds; returns a checkpoint of BAHE."""
    data = TextHistories(history=16)
    train, test = data.dataset("train"), data.dataset("test")
    numbers = np.arange(0, len(test), EVERY)
    rates = ClickRates(*(train.column(name) for name in ("user_id", "item_id", "label")))
    popular = quality(rates(*(test.column(name)[numbers] for name in ("user_id", "item_id"))), test, numbers)
    record.row(arm="popularity and users' means", seed=0, **popular)
    for seconds in (0.0, budget):
        record.row(curve="popularity and users' means", seed=0, seconds=seconds, test_auc=popular["auc"])
    moments = [budget * share for share in (1 / 18, 1 / 9, 1 / 3, 2 / 3, 1)]
    last: dict[str, list[float]] = {}
    one_epoch = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]
    for seed in seeds:
        for arm, config, more in (
            ("ids", IDS, []),
            ("BAHE", TINY, one_epoch),
            ("BAHE with ids", TINY, [*one_epoch, "--model.head.id_dim", "32"]),
            ("tokens", TOKENS, ["--model.max_tokens", str(T), "--data.batch_size", "16"]),
        ):
            if arm == "tokens" and seed != seeds[0]:
                continue
            store = ["--model.store", str(folder / f"{arm}_{seed}")] if config == TINY else []
            clock = Clock(moments[-1:] if arm == "tokens" else moments)
            cli = fit(config, folder / "run", [*FULL["CPU"], *more, *store], clock, seed)
            last.setdefault(arm, []).append(add_arm(record, arm, seed, clock))
            if arm == "BAHE" and seed == seeds[0]:
                cli.trainer.save_checkpoint(folder / "first.ckpt")
                shares(record, cli.model, cli.datamodule, clock)
    ours, hybrid, ids = (statistics.median(last[arm]) for arm in ("BAHE", "BAHE with ids", "ids"))
    record.measure("auc_over_token_level", ours - last["tokens"][0])
    record.measure("hybrid_over_ids", hybrid - ids)
    return folder / "first.ckpt"


def shares(record: Record, module: Any, data: Any, clock: Clock, steps: int = 20) -> None:
    """Parts of the time of a run: the lower blocks once, then steps whose parts are timed one by one."""
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-3)
    spent = dict.fromkeys(("batches", "store: rows read", "upper blocks", "head", "optimizer"), 0.0)
    mark = time.perf_counter()

    def end(part: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        spent[part] += now - mark
        mark = now

    for batch in islice(data.train_dataloader(), steps):
        behavior_BNM, item_B1 = batch["behaviors"], batch["item"][:, None]
        end("batches")
        both = module.vectors(torch.cat([behavior_BNM.flatten(), batch["item"]]))
        end("store: rows read")
        user_XD = module.aggregator(both[: -len(item_B1)].unflatten(0, (-1, data.history)), behavior_BNM.flatten(0, 1) > 0)
        passed = [user_XD.unflatten(0, behavior_BNM.shape[:2]), module.aggregator(both[-len(item_B1) :, None], item_B1 > 0)]
        end("upper blocks")
        given = [vectors.detach().requires_grad_() for vectors in passed]
        logit_B = module.score(*given, batch, module.network.draw(module._random(batch)))
        binary_cross_entropy_with_logits(logit_B, batch["label"]).backward()
        end("head")
        torch.autograd.backward(passed, [vectors.grad for vectors in given])
        end("upper blocks")
        optimizer.step()
        optimizer.zero_grad()
        end("optimizer")
    run = clock.ticks[-1][0]
    record.row(part="encoder: lower blocks, once, and rows written", share=clock.before / run)
    for part, seconds in spent.items():
        record.row(part=part, share=(1 - clock.before / run) * seconds / sum(spent.values()))


class KnownTexts(TextHistories):
    """Those texts alone that rows of training and test read; the others are empty as yet."""

    @property
    @override
    def atoms(self) -> list[str]:
        read: set[int] = set()
        for split in ("train", "test"):
            rows = self.dataset(split)  # type: ignore[arg-type]
            batch = rows.batch(np.arange(len(rows)))
            read |= {*batch["behaviors"].unique().tolist(), *batch["item"].tolist()}
        return [text if number in read else "" for number, text in enumerate(super().atoms)]


def days(record: Record, folder: Path, checkpoint: Path, num_days: int) -> None:
    """Daily updates of a model that was trained on the first four fifths of the rows."""
    split = TextHistories()
    begin = float(split.log.time_E[split.dataset("val").event_R[0]])
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                               "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}  # fmt: skip
    store = str(folder / "daily")
    before = KnownTexts(history=16, train_until=begin, test_until=begin)
    frozen = BAHE.load_from_checkpoint(checkpoint, store=store)
    texts = len(frozen.fill_store(before.atoms, before.text_fingerprint))
    scores: dict[str, list[Tensor]] = {"never updated": [], "updated daily": [], "label": []}
    rates = []
    for day in range(num_days):
        times = dict(zip(("train_from", "train_until", "test_until"), (begin + (day + each) * DAY for each in range(3)), strict=True))
        data = KnownTexts(history=16, batch_size=32, **times)
        clock = Clock()
        module = BAHE.load_from_checkpoint(checkpoint, store=store)
        trainer = Trainer(**options, callbacks=[clock], gradient_clip_val=1.0)
        trainer.fit(module, datamodule=data)
        checkpoint = folder / f"day_{day}.ckpt"
        trainer.save_checkpoint(checkpoint)
        known = len(module.fill_store([], data.text_fingerprint))
        for name, model in (("never updated", frozen), ("updated daily", module)):
            found: Any = Trainer(**options).predict(model, datamodule=data)
            scores[name] += [batch["probability"] for batch in found]
        scores["label"] += [batch["label"] for batch in found]
        rates.append(clock.rows / (clock.ticks[-1][0] - clock.before))
        record.row(day=day + 1, rows=clock.rows, new_texts=known - texts, setup_seconds=clock.before,
                   seconds=clock.ticks[-1][0] - clock.before)  # fmt: skip
        texts = known
    label_B = torch.cat(scores.pop("label"))
    for name, parts in scores.items():
        record.row(daily=name, auc=float(binary_auroc(torch.cat(parts), label_B)), rows=len(label_B))
    rate = statistics.median(rates)
    size = 4 * sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    step = 64 / rate + 2 * 7 / 8 * size / LINK
    record.row(devices="1, measured", rows_a_day=DAY * rate / 1e6)
    record.row(devices="8 like it, 10 Gbit/s, predicted", rows_a_day=DAY * 8 * 64 / step / 1e6)


def long_texts(path: Path) -> None:
    """Write events of 64 users with 4 lists of 32 texts of 16 tokens each, and a candidate each."""
    from transformers import AutoTokenizer

    folder = find_source("minilm-l6").folder
    words = [word for word in sorted(AutoTokenizer.from_pretrained(folder).get_vocab()) if word.isascii() and word.isalpha()]
    random = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "item_id", "time", "text", "label", "feature"])
        for user in range(64):
            for place in range(128):
                rows.writerow([user, random.integers(1000), place, " ".join(random.choice(words, 16)), "", f"list{place % 4}"])
            rows.writerows([user, 0, 200 + copy, " ".join(random.choice(words, 16)), copy % 2, ""] for copy in range(64))


def on_a_gpu(record: Record, folder: Path, seeds: Sequence[int]) -> None:
    """AUC at equal rows; rows a second and memory of a large decoder on 2,048 tokens."""
    for seed in seeds:
        for arm, config, more in (("BAHE, K=3, M=32, GPU", EPOCH, ["--model.head.id_dim", "0"]), ("tokens, T=512, GPU", TOKENS, [])):
            clock = Clock([math.inf])
            fit(config, folder / "run", [*FULL["GPU"], *more], clock, seed)
            record.row(arm=arm, seed=seed, equal_rows=clock.found[-1]["auc"], trained=clock.rows)
    long_texts(folder / "long.csv")
    whole = yaml.safe_load(packaged_configs()[LARGE].read_text())
    model = whole["model"]["init_args"]
    model |= {"max_tokens": 512, "backbone": {**model["backbone"]}}
    model["backbone"]["init_args"] |= {"activation_checkpointing": True}
    kept = {key: value for key, value in model.items() if key not in ("n_low", "atom_pooling", "max_behaviors")}
    (folder / "tokens.yaml").write_text(yaml.safe_dump(whole | {"model": {"class_path": "TokenCTR", "init_args": kept}}))
    data = ["--data.source", str(folder / "long.csv"), "--data.history", "32", "--data.behavior_template", "{text}"]
    found = {}
    for arm, config, more in (("BAHE, K=12", LARGE, ["--model.store", str(folder / "large")]), ("tokens", str(folder / "tokens.yaml"), [])):
        few, more_rows = (cell_alone(config, [*FULL["GPU"][:2], *data, *more], 1, batch)["peak_gib"] for batch in (2, 4))
        batch = max(1, int((16 - few) / (more_rows - few) * 2 * 0.95) + 2)
        found[arm] = cell_alone(config, [*FULL["GPU"][:2], *data, *more], 10 * batch, batch)
        record.row(large=arm, batch=batch, **found[arm])
    ours, tokens = found.values()
    record.measure("gpu_rows_per_second", ours["rows_per_s"] / tokens["rows_per_s"])
    record.measure("gpu_memory_per_row", tokens["mib_per_row"] / ours["mib_per_row"])


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bahe", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trained arm")
    parser.add_argument("--smoke", action="store_true", help="few rows and seconds; the result is not kept")
    options = parser.parse_args(arguments)
    seeds = range(1 if options.smoke else options.seeds)
    quick = options.smoke
    costs = ["ms_per_row", "mib_per_row", "peak_gib"]
    gpu = torch.cuda.is_available()
    record = Record("bahe", seeds=seeds, smoke=quick, tables=[
        Table("A trained row of MovieLens-100K, MiniLM, batches of 32", "cell", [*costs, "gflop"]),
        Table("Every fifth row of the test split, after 90 s", "arm",
              ["auc", "gauc", "log_loss", "trained", *(["equal_rows"] if gpu else [])], digits=4),
        Table("Shares of the time of BAHE's 90 s", "part", ["share"], digits=3),
        Table("Stores", "store", ["build_seconds"]),
        Table("Behaviours over distinct texts", "dedup", ["factor", "atoms"], digits=0),
        Table("Candidates of the next day", "daily", ["auc", "rows"], digits=4),
        Table("Days", "day", ["rows", "new_texts", "setup_seconds", "seconds"]),
        Table("Million rows a day", "devices", ["rows_a_day"]),
        *([Table("2,048 tokens, largest batch in 16 GiB", "large", ["batch", "rows_per_s", *costs])] if gpu else []),
    ], plots=[
        Plot("AUC over wall clock, the store's building counted", "seconds", "test_auc", "curve",
             reference="popularity and users' means"),
        Plot("Time of a trained row over history length", "history", "ms_per_row", "by_history", log="xy"),
        Plot("Memory of a trained row over history length, process / 32", "history", "mib_per_row", "by_history", log="xy"),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        grid(record, folder, *((32, 32) if quick else (300, 96)))
        days(record, folder, arms(record, folder, seeds, 3 if quick else 90), 2 if quick else 10)
        if gpu:
            on_a_gpu(record, folder, seeds)
    return record.save()


if __name__ == "__main__":
    main()
