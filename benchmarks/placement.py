"""Placements of the four models of PPO: times of their steps, idle shares, bytes, and that the weights are the same.

``python -m benchmarks.placement`` trains on two processes of one core each, through Lightning's Trainer: flattening,
interleaving, and separation (one rank trains, one generates) with lag 0 and 1. Flattening runs twice, with gradients that are
added in float64 (``replicate``, as in the other arms) and by DDP; lag 1 is compared with the faster one. A step is one rollout:
32 prompts of 16 tokens, 48 new ones, 4 minibatches; actor, critic, reference and reward are dense Ling networks of 1.4M random
weights, float32. All arms run in the same processes, several rounds in turns; the first steps of a turn are not counted. Ratios
are those of the medians of one round, and the median over the rounds is judged. The picture shows what each rank did in one step
of each arm.

``python -m benchmarks.placement --scene 2x2_200`` makes 2 groups of 2 processes, connected at 200 Mbit/s
(`benchmarks.slow_link`; needs root), with rollouts of 16 prompts: flattening with actor and critic divided over all ranks
(FSDP2), whose weights are gathered for each token as ZeRO-3 does, or once for a rollout; the same with whole copies and summed
gradients; and separation with lag 0, where they are divided inside the first group, and the second generates. Separation is
compared with a closed formula: the time of its passes as measured, and the bytes that have to cross the link, over its rate.

Times that the planner predicts, from passes and links as measured before each turn, stand beside those that are measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.gloo_processes import run_group
from benchmarks.record import RESULTS, TRIALS, Record
from benchmarks.slow_link import SlowLinks, sent_bytes, unavailable
from benchmarks.tables import Table
from strategies import FlatteningStrategy, InterleavingStrategy, PlacementStrategy, SeparationStrategy
from strategies.paro import RankGrid
from strategies.paro.probe import measure_cluster
from strategies.placement import Span, idle_share
from strategies.placement.cost_model import Workload, predict
from strategies.placement.profile import measure_roles
from strategies.traffic import Traffic, Transfer
from zoo.ling import LingBackbone, LingConfig
from zoo.rlhf import RLHF, Reward, Rollout
from zoo.rlhf.reward_loss import last_values

FLAT, INTER, SEP, LAG, DDP = "flattening", "interleaving", "separation, lag 0", "separation, lag 1", "flattening, ddp"
TOKEN, ONCE, WHOLE = "flattening, gather per token", "flattening, gather once", "flattening, whole copies"
ARMS = {
    FLAT: FlatteningStrategy, DDP: partial(FlatteningStrategy, "ddp"), INTER: InterleavingStrategy, SEP: SeparationStrategy,
    LAG: partial(SeparationStrategy, max_lag=1),
}  # fmt: skip
SLOW_ARMS = {
    TOKEN: partial(FlatteningStrategy, "fsdp2", "per_token"), ONCE: partial(FlatteningStrategy, "fsdp2", "once"),
    WHOLE: partial(FlatteningStrategy, "ddp"), SEP: partial(SeparationStrategy, backend="fsdp2"),
}  # fmt: skip
SCENE = (2, 2, 200.0)
CONFIG = LingConfig(
    vocab_size=2048, hidden_size=128, num_hidden_layers=4, first_k_dense_replace=4, num_attention_heads=4, num_key_value_heads=4,
    intermediate_size=384, max_position_embeddings=256, rope_theta=10000.0, initializer_range=0.05, pad_token_id=0,
    eos_token_id=2,
)  # fmt: skip
SMOKE = CONFIG.replace(vocab_size=64, hidden_size=16, num_hidden_layers=2, first_k_dense_replace=2, intermediate_size=24)
PROMPT, NEW, MINIBATCHES, SKIPPED = 16, 48, 4, 2
COLORS = {"generate": "tab:blue", "score": "tab:orange", "train": "tab:green", "sync": "tab:red", "gather": "tab:red"}


class Prompts(LightningDataModule):
    """Random prompts, and a tokenizer of no words.

    Args:
        rows: Prompts of a rollout.
        config: Of the models.
    """

    def __init__(self, rows: int, config: LingConfig) -> None:
        super().__init__()
        self.rows, self.vocab_size = rows, config.vocab_size
        self.pad_id, self.eos_id, self.tokenizer = config.pad_token_id, config.eos_token_id, self

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text."""
        return " ".join(map(str, ids))

    def train_dataloader(self) -> Any:
        """Endless enough."""
        ids = torch.randint(3, self.vocab_size, (1000 * self.rows, PROMPT), generator=torch.Generator().manual_seed(0))
        return DataLoader(ids, batch_size=self.rows, collate_fn=self._batch)  # type: ignore[arg-type]

    @staticmethod
    def _batch(rows: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(rows)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Judge(Reward, nn.Module):
    """A reward model of random weights."""

    def __init__(self, config: LingConfig) -> None:
        super().__init__()
        self.backbone = LingBackbone(config, scalar_head=True).requires_grad_(False)

    def score(self, ids_RS: Tensor, mask_RS: Tensor, *_: Any) -> Tensor:
        """As `Reward`."""
        return last_values(self.backbone.values(ids_RS, mask_RS), mask_RS)


class Watch(Callback):
    """Times steps; counts bytes in the first one, and keeps the spans of the others."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begins: list[float] = []
        self.egress: list[int] = []
        self.transfers: list[Transfer] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin when all do."""
        self._traffic = Traffic()
        if not batch_idx:
            self._traffic.__enter__()
        dist.barrier()
        self.begins.append(time.time())
        self._sent = sent_bytes()["inter"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The time of the slowest."""
        taken = torch.tensor([time.time() - self.begins[-1]], dtype=torch.float64)
        if not batch_idx:
            self._traffic.__exit__(None, None, None)
            self.transfers = self._traffic.transfers
        dist.barrier()
        self.egress.append(sent_bytes()["inter"] - self._sent)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        self.seconds.append(taken.item())


def rollout_of(config: LingConfig, rows: int, world_size: int) -> Rollout:
    """A rollout whose units divide over all ranks."""
    minibatches = min(MINIBATCHES, rows // world_size)
    return Rollout(max_new_tokens=new_tokens(config), minibatches=minibatches, unit=rows // minibatches // world_size)


def module_of(config: LingConfig, rollout: Rollout) -> RLHF:
    """Actor, critic and reward model; the reference is a copy of the actor."""
    return RLHF(LingBackbone(config), Judge(config), LingBackbone(config, scalar_head=True), rollout=rollout)


def predicted(arms: dict[str, Any], config: LingConfig, rows: int, group_size: int) -> dict[str, float]:
    """Seconds of a step that the planner predicts for each arm, from passes and links that all ranks measure at the same time."""
    world_size = dist.get_world_size()
    options = rollout_of(config, rows, world_size)
    job = Workload(rows, PROMPT, options.max_new_tokens, options.minibatches, options.epochs, options.unit)
    costs = measure_roles(module_of(config, options).roles(), job, torch.device("cpu"), world_size)
    costs = {"reference": replace(costs["actor"], trained=0.0), **costs}
    grid = RankGrid(group_size, "cpu")
    cluster = measure_cluster(grid)
    grid.close()
    return {arm: predict(make().plan(world_size), cluster, job, costs).seconds for arm, make in arms.items()}


def run(arm: str, strategy: PlacementStrategy, config: LingConfig, rows: int, steps: int, group_size: int) -> dict[str, Any]:
    """Train an arm; what all ranks measured, on rank 0."""
    seed_everything(0, verbose=False)
    world_size = dist.get_world_size()
    module = module_of(config, rollout_of(config, rows, world_size))
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu", devices=group_size, num_nodes=world_size // group_size, strategy=strategy, max_epochs=1,
        limit_train_batches=SKIPPED + steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[watch], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, Prompts(rows, config))
    state = strategy.lightning_module_state_dict()
    assert strategy.placement is not None
    frozen = [weight for network in (*module._reference, *module._scorers) for weight in network.parameters()]
    spans = [span for span in strategy.placement.timeline.spans if span.begin >= watch.begins[SKIPPED]]
    own = {
        "spans": [asdict(span) for span in spans], "begins": watch.begins[SKIPPED:], "egress": watch.egress[SKIPPED:],
        "frozen_bytes": sum(weight.numel() * weight.element_size() for weight in frozen),
        **{name: sum(each.num_bytes for each in watch.transfers if each.operation == name) for name in ("all_to_all", "send")},
        # Of weights, not of the numbers that are logged.
        "broadcast": sum(each.num_bytes for each in watch.transfers if each.operation == "broadcast" and each.num_bytes > 4096),
    }  # fmt: skip
    ranks: list[Any] = [None] * world_size
    dist.all_gather_object(ranks, own)
    trained = {name: value for name, value in state.items() if name.startswith(("actor.", "critic."))}
    return {"arm": arm, "seconds": watch.seconds[SKIPPED:], "ranks": ranks, "weights": trained}


def body(folder: str, slow: bool, smoke: bool, rows: int, rounds: int, steps: int, group_size: int) -> dict[str, Any]:
    """All rounds on this rank; what was measured, and the differences of the weights from the first arm's, on rank 0."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    arms: dict[str, Any] = SLOW_ARMS if slow else ARMS
    found: list[dict[str, Any]] = []
    weights: dict[str, dict[str, Tensor]] = {}
    config = SMOKE if smoke else CONFIG
    said: list[dict[str, float]] = []
    for number, turn in itertools.product(range(rounds), range(len(arms))):
        arm = list(arms)[(turn + number) % len(arms)]
        # Passes and links are measured before each turn, since the machine's speed changes.
        said.append(predicted(arms, config, rows, group_size))
        one = run(arm, arms[arm](), config, rows, steps, group_size)
        weights[arm] = one.pop("weights")
        found.append(one | {"round": number})
    if dist.get_rank():
        return {}
    first = weights[next(iter(arms))]
    apart = {arm: max(float((value - first[name]).abs().max()) for name, value in held.items()) for arm, held in weights.items()}
    trained = sum(value.numel() * value.element_size() for value in first.values())
    return {
        "runs": found,
        "apart": apart,
        "trained_bytes": trained,
        "predicted": {arm: statistics.median(each[arm] for each in said) for arm in arms},
    }


def as_rank(smoke: bool, rows: int, rounds: int, steps: int) -> None:
    """Body of a rank behind a slow link: rank 0 prints what was measured as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = body("", True, smoke, rows, rounds, steps, SCENE[1])
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def of_stages(ranks: Sequence[dict[str, Any]], stages: Sequence[str], steps: int) -> float:
    """Seconds of some stages in a step, on the rank where they take longest."""
    return max(
        sum(span["end"] - span["begin"] for span in rank["spans"] if span["role"] != "wait" and span["stage"] in stages)
        for rank in ranks
    ) / steps  # fmt: skip


def extent(ranks: Sequence[dict[str, Any]], stages: Sequence[str]) -> float:
    """Seconds from the begin of the first of some stages to the end of the last, median over the steps, longest rank."""
    found = []
    for rank in ranks:
        spans = [span for span in rank["spans"] if span["role"] != "wait" and span["stage"] in stages]
        bounds = [*rank["begins"], float("inf")]
        steps = [[span for span in spans if begin <= span["begin"] < end] for begin, end in itertools.pairwise(bounds)]
        found.append(statistics.median(step[-1]["end"] - step[0]["begin"] if step else 0.0 for step in steps))
    return max(found)


def closed_formula(one: dict[str, Any], link_bytes: float) -> tuple[float, float]:
    """Seconds of a step of separation with lag 0, and those of its two sides, as measured, in it.

    The sides follow one another; before them trained weights cross the link once, between them the rollout does, once for each
    rank that trains.
    """
    compute = extent(one["ranks"], ("generate", "score")) + extent(one["ranks"], ("train",))
    return compute + 8 * link_bytes / (SCENE[2] * 1e6), compute


def new_tokens(config: LingConfig) -> int:
    """Tokens of an answer."""
    return NEW if config is CONFIG else 4


def row_bytes(config: LingConfig) -> int:
    """Bytes of a sample: its tokens, three numbers of each, and a score."""
    return new_tokens(config) * (8 + 3 * 4) + 4


def expected_bytes(rows: int, config: LingConfig, trained_bytes: float) -> dict[str, float]:
    """Bytes that all ranks of separation hand in for a rollout, halves of four ranks: shared scores, chunks, weights."""
    weights = trained_bytes - 4 * config.vocab_size * config.hidden_size  # without the critic's output head, which is not trained
    chunks = rows * row_bytes(config)
    # A broadcast is counted on both ranks of the group.
    return {"all_to_all": chunks * (2 - 1), "send": chunks * 2 + weights, "broadcast": 2 * weights}


def pairs_right(seconds: dict[str, list[float]], said: dict[str, float]) -> float:
    """Share of the pairs of arms that are predicted in the order measured, of those that differ by more than their spread."""
    right = []
    for pair in itertools.combinations(said, 2):
        fast, slow = sorted(pair, key=lambda arm: statistics.median(seconds[arm]))
        apart = statistics.median(seconds[slow]) - statistics.median(seconds[fast])
        if apart > max(max(seconds[arm]) - min(seconds[arm]) for arm in pair):
            right.append(said[fast] < said[slow])
    return statistics.fmean(right) if right else float("nan")


def ratio(medians: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of how much faster one arm is than another."""
    return statistics.median(one / other for one, other in zip(medians[slow], medians[fast], strict=True))


def draw(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw what each rank did in the last step of each arm.

    Args:
        runs: Of one round.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(8.6, 1.0 + 1.1 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    longest = max(one["seconds"][-1] for one in runs)
    for axes, one in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs, strict=True):
        for number, rank in enumerate(one["ranks"]):
            begin = rank["begins"][-1]
            for span in (Span(**each) for each in rank["spans"] if each["begin"] >= begin and each["role"] != "wait"):
                axes.barh(number, span.end - span.begin, left=span.begin - begin, color=COLORS.get(span.stage, "0.5"), height=0.8)
        axes.set(xlim=(0, 1.02 * longest), yticks=range(len(one["ranks"])), ylabel="rank")
        axes.invert_yaxis()
        axes.set_title(one["arm"], fontsize="medium", loc="left")
    axes.set_xlabel("seconds of a step; white: waiting")
    stages = {name: color for name, color in COLORS.items() if name != "gather"}
    handles = [axes.barh(0, 0, color=color, label=name) for name, color in stages.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(stages), fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def judge(record: Record, found: dict[str, Any], slow: bool, rows: int, config: LingConfig) -> None:
    """Add the rows of what was measured, and the values of the bars."""
    seconds: dict[str, list[float]] = {}
    medians: dict[str, list[float]] = {}
    formulas, computes, frozen, off_bytes = [], [], {}, [0.0]
    expected = expected_bytes(rows, config, found["trained_bytes"])
    for one in found["runs"]:
        arm, steps = one["arm"], len(one["seconds"])
        seconds.setdefault(arm, []).extend(one["seconds"])
        medians.setdefault(arm, []).append(statistics.median(one["seconds"]))
        frozen[arm] = max(rank["frozen_bytes"] for rank in one["ranks"])
        for taken in one["seconds"]:
            record.row(arm=arm, step_ms=1000 * taken, samples_per_second=rows / taken, frozen_mib=frozen[arm] / 2**20)
        for number, rank in enumerate(one["ranks"]):
            record.row(idle_of=arm, rank=f"rank {number}", idle_share=idle_share(Span(**span) for span in rank["spans"]))
        for stage in ("generate", "score", "train", "sync"):
            record.row(stage_of=arm, stage=stage, stage_ms=1000 * of_stages(one["ranks"], (stage,), steps))
        if slow and arm == SEP:
            formula, compute = closed_formula(one, expected["send"])
            formulas.append(formula)
            computes.append(compute)
            sent = {name: sum(rank[name] for rank in one["ranks"]) for name in expected}
            off_bytes += [abs(sent[name] / expected[name] - 1) for name in expected]
    for arm, apart in found["apart"].items():
        record.row(compared=arm, largest_difference=apart)
    said: dict[str, float] = found["predicted"]
    for arm, value in said.items():
        record.row(predicted_of=arm, predicted_ms=1000 * value, measured_ms=1000 * statistics.median(seconds[arm]))
    values: dict[str, float] = {"pairs_right": pairs_right(seconds, said)}
    if said:
        values["prediction_error"] = max(abs(value / statistics.median(seconds[arm]) - 1) for arm, value in said.items())
    if slow:
        formula, measured = statistics.median(formulas), statistics.median(seconds[SEP])
        record.row(
            formula_ms=1000 * formula, formula_of=SEP, compute_ms=1000 * statistics.median(computes), measured_ms=1000 * measured
        )
        values |= {
            "separation_over_per_token": ratio(medians, TOKEN, SEP), "separation_over_once": ratio(medians, ONCE, SEP),
            "off_the_closed_formula": abs(measured / formula - 1), "bytes_off_the_formula": max(off_bytes),
        }  # fmt: skip
    else:
        values |= {
            "lag_1_over_flattening": min(ratio(medians, one, LAG) for one in (FLAT, DDP)),
            "interleaving_difference": found["apart"][INTER],
            "separation_difference": found["apart"][SEP], "frozen_bytes_interleaving": frozen[INTER] / frozen[FLAT],
        }  # fmt: skip
    for bar in record.bars:
        record.measure(bar, values.get(bar))


def tables_of(slow: bool) -> list[Table]:
    """Tables of the result."""
    tables = [
        Table("A step, one rollout with its training", "arm", ["step_ms", "samples_per_second", "frozen_mib"]),
        Table("Share of the time in which a rank waits", "idle_of", ["idle_share"], columns="rank"),
        Table("Milliseconds of a step by stage, longest rank", "stage_of", ["stage_ms"], columns="stage"),
        Table("Largest difference of the weights from the first arm's", "compared", ["largest_difference"], digits=9),
        Table("Predicted by the planner", "predicted_of", ["predicted_ms", "measured_ms"]),
    ]
    if slow:
        tables.append(
            Table("Closed formula at the measured compute time", "formula_of", ["formula_ms", "compute_ms", "measured_ms"])
        )
    return tables


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each arm")
    parser.add_argument("--steps", type=int, default=4, help=f"steps of a turn that are counted, after {SKIPPED} others")
    parser.add_argument("--scene", choices=["2x2_200"], help="four processes in two groups behind a slow link")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, few steps; the result is not kept")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    slow, smoke = options.scene is not None, options.smoke
    rows, rounds, steps = 16 if slow else 32, options.rounds, options.steps
    if smoke:
        rows, rounds, steps = 8, 1, 2
    if options.as_rank:
        as_rank(smoke, rows, rounds, steps)
        return Path()
    name = f"placement_{options.scene}" if slow else "placement"
    record = Record(name, seeds=[0], smoke=smoke, tables=tables_of(slow))
    if slow and (reason := unavailable()):
        print(f"Not measured: {reason}.", flush=True)
        record.row(not_measured=reason)
        return record.save()
    if slow:
        words = ["benchmarks.placement", "--as-rank", "--scene", options.scene, "--rounds", str(rounds), "--steps", str(steps)]
        with SlowLinks(SCENE[0], SCENE[2]) as links:
            output = links.run([*words, "--smoke"] if smoke else words, SCENE[1], timeout=3000)
        found = json.loads(output.splitlines()[-1])
    else:
        found = run_group(2, body, False, smoke, rows, rounds, steps, 2)
    judge(record, found, slow, rows, SMOKE if smoke else CONFIG)
    path = record.save()
    arms = SLOW_ARMS if slow else ARMS
    last = {one["arm"]: one for one in found["runs"]}
    draw([last[arm] for arm in arms], (TRIALS if smoke else RESULTS) / f"{name}_timeline.png")
    return path


if __name__ == "__main__":
    main()
