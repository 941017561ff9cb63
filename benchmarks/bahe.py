"""BAHE beside a language model that reads all tokens, ids, and popularity: time, memory, and AUC after equal seconds.

``python -m benchmarks.bahe`` predicts which films of MovieLens-100K a user will like, with MiniLM (6 blocks), on the CPU:

- Time of a trained row, and memory: the peak of a process of its own over its 32 rows, by K lower blocks and M behaviours of a
  list. The token-level model trains all blocks on up to 256 tokens a list, or as many as BAHE's operations pay for, at least 3;
  bars compare M = 16 of both.
- AUC on every fifth row of the test split after 90 s in which each run builds its own store; ids stop after 3 epochs, and BAHE
  with ids begins with their weights, whose seconds count.
- Days: rows of a day continue from yesterday's weights and append their texts, and the next day's are scored, also by the model
  of before the first day. Rows a day of 8 devices are predicted.

On a GPU also: the AUC after an epoch; a random decoder on 4 lists of 32 texts of 16 tokens, the largest batch in 16 GiB.

Claim: arXiv 2403.19347, a fifth of the time and of the memory of the model that reads all tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.fabric.utilities import move_data_to_device
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
from zoo.bahe import BAHE, BlockSize, ClickRates
from zoo.cli.command import ZooCLI
from zoo.cli.configs import packaged_configs
from zoo.metrics.grouped_auc import GroupedAUC

TINY, EPOCH, TOKENS, IDS = (f"bahe/movielens{name}" for name in ("_tiny", "", "_tokens", "_ids"))
LARGE = "bahe/qwen2_1b5_efficiency"
CPU, GPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"], ["--trainer.accelerator=gpu"]
MINILM, BLOCKS = BlockSize(384, 1536), 6
T, TEXT = 256, 11  # tokens of a list; the mean of a text's, without special ones
BATCH, DAY, LINK = 32, 86_400, 1.25e9  # rows, seconds, and bytes a second between devices that the prediction assumes
POPULARITY = "popularity and users' means"


class Clock(Callback):
    """Measures training from the setup on, which builds the store; its own tests are left out.

    Args:
        moments: Seconds after which the test split is scored; training stops at the last. None: nothing is.
        every: One of so many rows is scored.
        spent: Seconds that count as spent before the setup.
    """

    def __init__(self, moments: Sequence[float] = (), every: int = 5, spent: float = 0.0) -> None:
        self.moments, self.every, self.spent = [*moments], every, spent
        self.begin, self.before, self.rows = 0.0, 0.0, 0
        self.ticks: list[tuple[float, int]] = []
        self.found: list[dict[str, float]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.begin = time.perf_counter() - self.spent

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = time.perf_counter() - self.begin

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda":
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
        pl_module.eval()
        with torch.no_grad():
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            found = quality(data, self.every, lambda batch: pl_module(move_data_to_device(batch, pl_module.device)).float().cpu())
        pl_module.train()
        self.found.append({"seconds": self.ticks[-1][0], "trained": self.rows, **found})
        self.begin += time.perf_counter() - paused


def quality(data: Any, every: int, score: Callable[[Any], Tensor]) -> dict[str, float]:
    """AUC over all and inside users, of one of so many rows of the test split."""
    rows = data.dataset("test")
    numbers = np.arange(0, len(rows), every)
    batches = [rows.batch(part) for part in np.array_split(numbers, math.ceil(len(numbers) / 64))]
    score_B = torch.cat([score(batch) for batch in batches])
    label_B, user_B = (torch.cat([batch[name] for batch in batches]).long() for name in ("label", "user"))
    gauc = GroupedAUC()
    gauc.update(score_B, label_B, user_B)
    return {"auc": float(binary_auroc(score_B, label_B)), "gauc": float(gauc.compute()["auc"])}


def fit(config: str, folder: Path, options: Sequence[str], clock: Clock, seed: int = 0) -> ZooCLI:
    """A command ``zoo fit``, in this process."""
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_model_summary")]
    quiet += ["--trainer.limit_val_batches=0", f"--seed_everything={seed}"]
    words = zoo("fit", config, folder, *quiet, *options)[3:]
    return ZooCLI(words, trainer_defaults={"callbacks": [clock]})


def cell(config: str, options: Sequence[str], rows: int, batch: int = BATCH) -> dict[str, float]:
    """Milliseconds of a trained row, after a first step; peak of memory of this process, or of its GPU, and over rows."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        steps = f"--trainer.max_steps={1 + math.ceil(rows / batch)}"
        fit(config, Path(folder), [*options, f"--data.batch_size={batch}", steps], clock)
    (first, old), *_, (last, new) = clock.ticks
    if options[: len(GPU)] == GPU:
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:  # getrusage would count the process that started this one
        peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    return {"ms_per_row": 1000 * (last - first) / (new - old), "mib_per_row": peak * 1024 / batch, "peak_gib": peak}


def alone(*arguments: Any) -> dict[str, float]:
    """A cell in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cell, *arguments).result()


def grid(record: Record, folder: Path, rows: int, token_rows: int) -> None:
    """Time and memory of rows, by lower blocks and history."""

    def add(arm: str, history: int, lengths: Sequence[int], blocks: int, *arguments: Any) -> dict[str, float]:
        found = {**alone(*arguments), "gflop": MINILM.flops(lengths, blocks) / 1e9}
        record.row(cell=f"{arm}, M={history}", by_history=arm, history=history, **found)
        return found

    for low, history in ((1, 16), (1, 32), (3, 16), (3, 32), (5, 32), (5, 8), (5, 16)):
        options = [f"--model.n_low={low}", f"--model.store={folder / f'grid_{low}'}", f"--model.max_behaviors={history}"]
        options = [*CPU, *options, f"--data.history={history}"]
        ours = add(f"BAHE, K={low}", history, [history, history, 1], BLOCKS - low, TINY, options, rows)
    paid = [max((t for t in range(3, T) if MINILM.flops([t, t, min(t, TEXT)], BLOCKS) <= MINILM.flops([m, m, 1], BLOCKS - low)),
                default=3) for low, m in ((1, 32), (5, 16))]  # fmt: skip
    for most, history in ((paid[0], 32), (paid[1], 16), (T, 32), (T, 8), (T, 16)):
        options = [*CPU, f"--model.max_tokens={most}", f"--data.history={history}"]
        lengths = [*[min(most, history * TEXT)] * 2, min(most, TEXT)]
        theirs = add(f"tokens, {most} a list", history, lengths, BLOCKS, TOKENS, options, token_rows)
    record.measure("time_ratio", theirs["ms_per_row"] / ours["ms_per_row"])
    record.measure("memory_ratio", theirs["mib_per_row"] / ours["mib_per_row"])
    for history in (16, 32):
        data = TextHistories(history=history)
        record.row(dedup=f"M={history}", atoms=len(data.atoms) - 1, factor=data.dedup_factor)


def arms(record: Record, folder: Path, seeds: Sequence[int], budget: float, every: int) -> Path:
    """AUC after equal seconds; returns a checkpoint of BAHE."""
    data = TextHistories(history=16)
    user_B, item_B, label_B = (data.dataset("train").column(name) for name in ("user_id", "item_id", "label"))
    rates = ClickRates(user_B, item_B, label_B)
    popular = quality(data, every, lambda batch: rates(batch["user_id"], batch["item_id"]))
    record.row(arm=POPULARITY, seed=0, **popular)
    for seconds in (0.0, budget):
        record.row(curve=POPULARITY, seed=0, seconds=seconds, test_auc=popular["auc"])
    moments = [budget * share for share in (1 / 18, 1 / 9, 1 / 3, 2 / 3, 1)]
    # A run ends with its schedule, which a fast machine reaches before the seconds are over.
    plan: dict[str, tuple[str, list[str]]] = {
        "BAHE": (TINY, []),
        "ids": (IDS, []),
        "BAHE with ids": (TINY, ["--model.head.id_dim=32", f"--model.lr_scheduler.init_args.max_lr={[5e-5, 5e-5]}"]),
        "tokens": (TOKENS, [f"--model.max_tokens={T}", "--data.history=16", "--data.batch_size=16"]),
    }
    last: dict[str, list[float]] = {arm: [] for arm in plan}
    spent = 0.0
    for seed, (arm, (config, options)) in itertools.product(seeds, plan.items()):
        if arm == "tokens" and seed != seeds[0]:
            continue
        store = [f"--model.store={folder / f'{arm}_{seed}'}"] if config == TINY else []
        if arm == "BAHE with ids":  # begins with the model on ids, whose seconds count
            options = [*options, f"--model.ids_from={folder / 'ids.ckpt'}"]
        clock = Clock(moments[-1:] if arm == "tokens" else moments, every, spent if arm == "BAHE with ids" else 0.0)
        cli = fit(config, folder / "run", [*CPU, *options, *store], clock, seed)
        if arm == "ids":
            cli.trainer.save_checkpoint(folder / "ids.ckpt")
            spent = clock.ticks[-1][0]
        for found in clock.found:
            record.row(curve=arm, seed=seed, seconds=5 * round(found["seconds"] / 5), test_auc=found["auc"])
        record.row(arm=arm, seed=seed, **found)
        last[arm].append(found["auc"])
        if arm == "BAHE" and seed == seeds[0]:
            cli.trainer.save_checkpoint(folder / "first.ckpt")
            shares(record, cli.model, cli.datamodule, clock)
    median = {arm: statistics.median(values) for arm, values in last.items()}
    record.measure("auc_over_token_level", median["BAHE"] - median["tokens"])
    record.measure("hybrid_over_ids", median["BAHE with ids"] - median["ids"])
    return folder / "first.ckpt"


def shares(record: Record, module: Any, data: Any, clock: Clock, steps: int = 20) -> None:
    """Parts of a run: the lower blocks once, then steps, whose own parts are measured in some more of them."""
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-3)
    spent: dict[str, float] = {}
    mark = time.perf_counter()

    def end(part: str) -> None:
        nonlocal mark
        mark, begin = time.perf_counter(), mark
        spent[part] = spent.get(part, 0.0) + mark - begin

    for batch in itertools.islice(data.train_dataloader(), steps):
        behavior_XM, item_B1 = batch["behaviors"].flatten(0, 1), batch["item"][:, None]
        end("batches")
        both = module.vectors(torch.cat([behavior_XM.flatten(), batch["item"]])).split([behavior_XM.numel(), len(item_B1)])
        end("store, reads")
        user_XD = module.aggregator(both[0].unflatten(0, behavior_XM.shape), behavior_XM > 0)
        made = [user_XD.unflatten(0, (len(item_B1), -1)), module.aggregator(both[1][:, None], item_B1 > 0)]
        end("upper blocks")
        given = [vectors.detach().requires_grad_() for vectors in made]
        binary_cross_entropy_with_logits(module.score(*given, batch), batch["label"]).backward()
        end("head")
        torch.autograd.backward(made, [vectors.grad for vectors in given])
        end("upper blocks")
        optimizer.step()
        optimizer.zero_grad()
        end("optimizer")
    once = clock.before / clock.ticks[-1][0]
    record.row(part="encoder, and store, writes", share=once)
    for part, seconds in spent.items():
        record.row(part=part, share=(1 - once) * seconds / sum(spent.values()))


class KnownTexts(TextHistories):
    """Only texts that rows of training and test read are known as yet; the others are empty."""

    @property
    @override
    def atoms(self) -> list[str]:
        rows = [self.dataset(split) for split in ("train", "test")]
        batches = [each.batch(range(len(each))) for each in rows]
        read = {number for batch in batches for name in ("behaviors", "item") for number in batch[name].unique().tolist()}
        return [text if number in read else "" for number, text in enumerate(super().atoms)]


def days(record: Record, folder: Path, checkpoint: Path, num_days: int) -> None:
    """Daily updates of a model that was trained on the first four fifths of the rows."""
    split = TextHistories()
    begin = float(split.log.time_E[split.dataset("val").event_R[0]])
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = {"accelerator": "cpu", **dict.fromkeys(off, False)}
    store = str(folder / "daily")
    frozen = BAHE.load_from_checkpoint(checkpoint, store=store)
    before = KnownTexts(history=16, train_until=begin, test_until=begin)
    known = len(frozen.fill_store(before.atoms, before.text_fingerprint))
    scores: dict[str, list[Tensor]] = {"label": [], "never updated": [], "updated daily": []}
    seconds_of_rows: list[float] = []
    for day in range(num_days):
        morning, evening, next_evening = (begin + (day + each) * DAY for each in range(3))
        data = KnownTexts(history=16, batch_size=64, train_from=morning, train_until=evening, test_until=next_evening)
        clock, module = Clock(), BAHE.load_from_checkpoint(checkpoint, store=store)
        trainer = Trainer(**quiet, callbacks=[clock], max_epochs=1, gradient_clip_val=1.0)
        trainer.fit(module, datamodule=data)
        checkpoint = folder / f"day_{day}.ckpt"
        trainer.save_checkpoint(checkpoint)
        for name, model in (("never updated", frozen), ("updated daily", module)):
            found: Any = Trainer(**quiet).predict(model, datamodule=data)
            scores[name] += [batch["probability"] for batch in found]
        scores["label"] += [batch["label"] for batch in found]
        texts, seconds = len(module.use_store()), clock.ticks[-1][0] - clock.before
        record.row(day=day + 1, day_rows=clock.rows, new_texts=texts - known, setup_seconds=clock.before, seconds=seconds)
        known, seconds_of_rows = texts, [*seconds_of_rows, seconds / clock.rows]
    label_B = torch.cat(scores.pop("label"))
    for name, parts in scores.items():
        record.row(daily=name, auc=float(binary_auroc(torch.cat(parts), label_B)), rows=len(label_B))
    row = statistics.median(seconds_of_rows)
    exchanged = 4 * sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    record.row(devices="1, measured", million_rows_a_day=DAY / row / 1e6)
    ring = 2 * 7 / 8 * exchanged / LINK / (8 * 64)
    record.row(devices="8 like it, 10 Gbit/s, predicted", million_rows_a_day=DAY / (row / 8 + ring) / 1e6)


def on_a_gpu(record: Record, folder: Path, seeds: Sequence[int]) -> None:
    """AUC at equal rows; rows a second and memory of a large decoder on 2,048 tokens."""
    for seed in seeds:
        for arm, config, more in (("BAHE, K=3, M=32", EPOCH, ["--model.head.id_dim=0"]), ("tokens, T=512", TOKENS, [])):
            clock = Clock([math.inf])
            fit(config, folder / "run", [*GPU, *more], clock, seed)
            record.row(arm=f"{arm}, one epoch on a GPU", seed=seed, equal_rows=clock.found[-1]["auc"], trained=clock.rows)
    texts = [" ".join(words) for words in np.random.default_rng(0).choice(["one", "two", "three", "four"], (64 * 192, 16))]
    lines = ["user_id,item_id,time,text,label,feature"]
    for user, place in np.ndindex(64, 192):  # full lists, then 64 candidates
        event = f"{user},{place},{min(place, 128)},{texts[user * 192 + place]}"
        lines.append(f"{event},,list{place % 4}" if place < 128 else f"{event},{place % 2},")
    (folder / "long.csv").write_text("\n".join([*lines, ""]))
    source = yaml.safe_load(packaged_configs()[LARGE].read_text())["model"]["init_args"]["backbone"]["init_args"]["source"]
    network = {"source": json.dumps(source), "tokenizer": "minilm-l6", "dtype": "bfloat16", "activation_checkpointing": "true"}
    tokens = ["--model.max_tokens=512", "--trainer.precision=bf16-true"]
    tokens += [f"--model.backbone.init_args.{key}={value}" for key, value in network.items()]
    found = []
    for arm, name, more in (("BAHE, K=12", LARGE, [f"--model.store={folder / 'large'}"]), ("tokens", TOKENS, tokens)):
        more = [*GPU, f"--data.source={folder / 'long.csv'}", "--data.history=32", "--data.behavior_template={text}", *more]
        small, double = (alone(name, more, 1, batch)["peak_gib"] for batch in (2, 4))
        batch = max(1, int(2 + 0.95 * 2 * (16 - small) / (double - small)))
        found.append(alone(name, more, 10 * batch, batch))
        record.row(large=arm, batch=batch, **found[-1])
    record.measure("gpu_rows_per_second", found[1]["ms_per_row"] / found[0]["ms_per_row"])
    record.measure("gpu_memory_per_row", found[1]["mib_per_row"] / found[0]["mib_per_row"])


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bahe", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trained arm")
    parser.add_argument("--smoke", action="store_true", help="few rows and seconds; the result is not kept")
    options = parser.parse_args(arguments)
    quick, gpu = options.smoke, torch.cuda.is_available()
    seeds = range(1 if quick else options.seeds)
    costs = ["ms_per_row", "mib_per_row", "peak_gib"]
    record = Record("bahe", seeds=seeds, smoke=quick, tables=[
        Table(f"A trained row of MovieLens-100K, MiniLM, batches of {BATCH}, CPU", "cell", [*costs, "gflop"]),
        Table("Every fifth row of the test split, 90 s", "arm", ["auc", "gauc", "trained", *gpu * ["equal_rows"]], digits=4),
        Table("Shares of the time of BAHE's 90 s", "part", ["share"], digits=3),
        Table("Behaviours over distinct texts", "dedup", ["factor", "atoms"], digits=0),
        Table("Candidates of the next day", "daily", ["auc", "rows"], digits=4),
        Table("Updates", "day", ["day_rows", "new_texts", "setup_seconds", "seconds"]),
        Table("Rows a day, in millions", "devices", ["million_rows_a_day"]),
        *[Table("2,048 tokens, 1.5 B random parameters, the largest batch in 16 GiB", "large", ["batch", *costs])] * gpu,
    ], plots=[
        Plot("AUC over wall clock, building of stores included", "seconds", "test_auc", "curve", reference=POPULARITY),
        Plot("Time of a trained row over behaviours of a list", "history", "ms_per_row", "by_history", log="xy"),
        Plot("Memory of a trained row over behaviours of a list", "history", "mib_per_row", "by_history", log="xy"),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        grid(record, folder, *((BATCH, BATCH) if quick else (300, 2 * BATCH)))
        checkpoint = arms(record, folder, seeds, *((3, 200) if quick else (90, 5)))
        days(record, folder, checkpoint, 2 if quick else 10)
        if gpu:
            on_a_gpu(record, folder, seeds)
    return record.save()


if __name__ == "__main__":
    main()
