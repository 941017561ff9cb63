"""Every way to shard data-parallel training, and the baselines, over slow links: time, traffic, memory and loss.

``python -m benchmarks.paro`` makes 2 groups of 2 processes on this machine, connected at 200 Mbit/s (:mod:`benchmarks.slow_link`;
needs root), and trains a byte-level dense transformer (Ling's, without experts) on Python's standard library through Lightning's
Trainer with gradients accumulated over 4 micro-batches, float32, AdamW:

* `PaROStrategy` with each of the 14 codes;
* the same with ``GGG`` over one flat ring of all processes, which is how ZeRO-3 communicates;
* Lightning's DDP; FSDP2 through its ModelParallelStrategy, sharded over all processes, and on a 2-D mesh (HSDP), where gradients
  are all-reduced between groups at the last micro-batch only.

All arms run in the same processes, several rounds in turns; the first step of a round is not counted. Then the same at 1 Gbit/s
and with 4 groups of 2. Time of a step: that of the slowest process; egress: bytes that a group's network card sent in a step,
beside the closed formula; state: parameters, gradients and optimizer state that rest on a rank. (DeepSpeed's ZeRO is not in the
table: Lightning's strategy for it runs on CUDA only.)

The advisor is judged by pairs of codes whose times differ by more than their spread (least to most over the steps): the share of
which it orders as measured. It is given the bandwidth and latency that its probe measures in the same processes, and the time of
forward and backward passes without communication.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.slow_link import SlowLinks, sent_bytes, unavailable
from benchmarks.tables import Table
from datamodules import Text
from strategies.paro import CODES, PaROStrategy, Partition, RankGrid
from strategies.paro.cost_model import Cluster, Job, LinkSpeed, predict
from strategies.paro.probe import measure_cluster
from strategies.paro.volume import volume
from zoo.ling import Ling, LingConfig

FLAT, DDP, FSDP, HSDP = "GGG, flat ring", "DDP", "FSDP2, 1-D", "FSDP2, HSDP"
ARMS = (*CODES, FLAT, DDP, FSDP, HSDP)
MICRO_BATCHES = 4
SCENES = ((2, 2, 200.0), (2, 2, 1000.0), (4, 2, 200.0))
CONFIG = LingConfig(
    vocab_size=264, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, num_experts=1,
    num_experts_per_tok=1, num_shared_experts=0, moe_intermediate_size=8, intermediate_size=1008, first_k_dense_replace=4,
    rope_theta=10000.0, max_position_embeddings=512, initializer_range=0.05, pad_token_id=258, eos_token_id=257,
)  # fmt: skip
SMOKE = CONFIG.replace(hidden_size=32, num_hidden_layers=2, first_k_dense_replace=2, intermediate_size=64)


class Sharded(Ling):
    """Ling, sharded by FSDP2 as it is usually done: each block, then the rest.

    Args:
        replicas: copies, each shared by as many ranks.
        config: the architecture.
    """

    def __init__(self, replicas: int, config: LingConfig) -> None:
        super().__init__(config, **options())
        self.replicas = replicas

    def configure_model(self) -> None:
        """Shard (Lightning hook)."""
        ranks = dist.get_world_size() // self.replicas
        if self.replicas == 1:
            self.mesh = init_device_mesh("cpu", (ranks,))
        else:
            self.mesh = init_device_mesh("cpu", (self.replicas, ranks), mesh_dim_names=("replicate", "shard"))
        for block in self.network.model.layers:
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.network, mesh=self.mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As `Ling`; replicas are summed at the last micro-batch only (Lightning hook)."""
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_all_reduce((batch_idx + 1) % MICRO_BATCHES == 0)
        return super().training_step(batch, batch_idx)


def options() -> dict[str, Any]:
    """Arguments of `Ling` beside the architecture."""
    return {"router_warmup_steps": 0, "optimizer": partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)}


class Watch(Callback):
    """Times steps, counts what leaves the group, and notes losses and states.

    Args:
        skipped: first steps of a run that are not counted.
    """

    def __init__(self, skipped: int) -> None:
        self.skipped = skipped
        self.seconds: list[float] = []
        self.egress: list[int] = []
        self.losses: list[float] = []
        self.state_bytes = 0
        self.formula: dict[str, int] | None = None
        self._ce: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin (Lightning hook)."""
        dist.barrier()
        self._mark()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure states when all are there, but for those that the first step makes (Lightning hook)."""
        if trainer.global_step:
            self.state_bytes = state_bytes(trainer, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note a micro-batch, and a step where it is the last of one (Lightning hook)."""
        self._ce.append(float(pl_module.last_losses["ce"]))
        if (batch_idx + 1) % MICRO_BATCHES:
            return
        sent, begin = self._sent, self._begin
        seconds = torch.tensor([time.perf_counter() - begin, statistics.fmean(self._ce)], dtype=torch.float64)
        dist.barrier()
        egress = sent_bytes()["inter"] - sent
        slowest = seconds[:1].clone()
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        dist.all_reduce(seconds)
        self.losses.append(seconds[1].item() / dist.get_world_size())
        if trainer.global_step > self.skipped:
            self.seconds.append(slowest.item())
            self.egress.append(egress)
        self._ce = []
        strategy: Any = trainer.strategy
        if isinstance(strategy, PaROStrategy) and strategy.collectives != "flat":
            self.formula = formula_of(strategy)
        dist.barrier()
        self._mark()

    def _mark(self) -> None:
        self._sent, self._begin = sent_bytes()["inter"], time.perf_counter()


def state_bytes(trainer: Trainer, optimizer: Any) -> int:
    """Bytes of parameters, gradients and optimizer state that this rank keeps."""
    strategy: Any = trainer.strategy
    if isinstance(strategy, PaROStrategy):
        return sum(strategy.memory_report().values())
    kept: list[Tensor] = []
    for parameter in trainer.lightning_module.parameters():
        kept += [parameter, *([] if parameter.grad is None else [parameter.grad])]
    for state in optimizer.state.values():
        kept += [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in kept]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def formula_of(strategy: PaROStrategy) -> dict[str, int]:
    """Bytes that a rank sends in a step, by the closed formula."""
    engine, grid = strategy.engine, strategy.grid
    assert engine is not None and grid is not None
    sizes = [(unit.size, unit.plan.block is None) for unit in engine.units]
    return asdict(volume(
        engine.partition, n=grid.n, m=grid.m, s=MICRO_BATCHES, psi=sum(size for size, _ in sizes),
        psi_root=sum(size for size, root in sizes if root),
    ))  # fmt: skip


def arm_of(name: str, group_size: int, config: LingConfig) -> tuple[LightningModule, Strategy]:
    """Model and strategy of an arm."""
    n = dist.get_world_size()
    if name in (FSDP, HSDP):
        model = Sharded(1 if name == FSDP else n // group_size, config)
        return model, ModelParallelStrategy(data_parallel_size=n, tensor_parallel_size=1)
    model = Ling(config, **options())
    if name == DDP:
        return model, DDPStrategy()
    code, flat = name[:3], name == FLAT
    return model, PaROStrategy(code, group_size, collectives="flat" if flat else "overlapped")


def run(name: str, group_size: int, config: LingConfig, steps: int, skipped: int) -> dict[str, Any]:
    """Train an arm; what was measured."""
    seed_everything(0, verbose=False)
    model, strategy = arm_of(name, group_size, config)
    data = Text(seq_len=65, batch_size=2, num_workers=0)
    watch = Watch(skipped)
    world_size = dist.get_world_size()
    trainer = Trainer(
        accelerator="cpu", devices=group_size, num_nodes=world_size // group_size, strategy=strategy, max_steps=steps,
        accumulate_grad_batches=MICRO_BATCHES, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[watch], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, data)
    if isinstance(model, Sharded) and isinstance(strategy, ModelParallelStrategy):
        # Process groups that are left, and their threads, would slow down the arms that follow.
        for group in {*strategy.device_mesh.get_all_groups(), *model.mesh.get_all_groups()} - {dist.group.WORLD}:
            dist.destroy_process_group(group)
    states = torch.tensor([watch.state_bytes])
    dist.all_reduce(states, op=dist.ReduceOp.MAX)
    return {"arm": name, "seconds": watch.seconds, "egress": watch.egress, "losses": watch.losses,
            "state_bytes": int(states), "formula": watch.formula}  # fmt: skip


def compute_seconds(config: LingConfig, repetitions: int = 5) -> float:
    """Forward and backward passes of a step without communication, of the slowest rank."""
    model = Ling(config, **options())
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[assignment, method-assign]
    ids = torch.randint(0, 256, (2, 65), generator=torch.Generator().manual_seed(0))
    taken = []
    for _ in range(repetitions):
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            model.training_step({"input_ids": ids}, 0).backward()
        taken.append(time.perf_counter() - begin)
    slowest = torch.tensor([statistics.median(taken)], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def as_rank(group_size: int, rounds: int, steps: int, smoke: bool, arms: Sequence[str]) -> None:
    """Body of a rank: rank 0 prints what was measured as JSON."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    config = SMOKE if smoke else CONFIG
    found: dict[str, Any] = {"runs": []}
    grid = RankGrid(group_size)
    sizes = (1 << 12, 1 << 16) if smoke else (1 << 14, 1 << 22)
    found["cluster"] = asdict(measure_cluster(grid, sizes))
    found["compute_seconds"] = compute_seconds(config)
    for number in range(rounds):
        for turn in range(len(arms)):
            name = arms[(turn + number) % len(arms)]
            found["runs"].append(run(name, group_size, config, steps, skipped=1))
    if grid.rank == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def job_of(compute: float, smoke: bool) -> Job:
    """What is trained, for the advisor."""
    from strategies.paro.units import find_blocks, plan_units

    with torch.device("meta"):
        model = Ling(SMOKE if smoke else CONFIG, **options())
    groups = [list(group["params"]) for group in model.parameter_groups()]
    plans = plan_units(model, find_blocks(model), groups)
    sizes = [sum(parameter.numel() for _, parameter in plan.parameters) for plan in plans]
    root = sum(size for size, plan in zip(sizes, plans, strict=True) if plan.block is None)
    return Job(
        sum(sizes), None, MICRO_BATCHES, len(plans), root, 4, 4, 4, 8, compute_seconds=compute, overlap=0.0
    )  # fmt: skip


def cluster_of(stored: dict[str, Any]) -> Cluster:
    """The cluster that the probe found."""
    links = {name: None if stored[name] is None else LinkSpeed(**stored[name]) for name in ("intra", "inter", "flat")}
    return Cluster(stored["world_size"], stored["group_size"], **links)  # type: ignore[arg-type]


def pairs_right(seconds: dict[str, list[float]], predicted: dict[str, float]) -> tuple[int, int]:
    """Of the pairs of codes whose times do not overlap: how many the advisor orders as measured, and how many there are."""
    right = total = 0
    for one, other in itertools.combinations(predicted, 2):
        fast, slow = sorted((one, other), key=lambda code: statistics.median(seconds[code]))
        apart = statistics.median(seconds[slow]) - statistics.median(seconds[fast])
        if apart > max(_spread(seconds[one]), _spread(seconds[other])):
            total += 1
            right += predicted[fast] < predicted[slow]
    return right, total


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def measure(
    record: Record, scene: tuple[int, int, float], rounds: int, steps: int, smoke: bool, arms: Sequence[str]
) -> Iterator[tuple[str, float]]:
    """Add the rows of a scene; names and values of what bars need."""
    num_groups, group_size, megabits = scene
    title = f"{num_groups}x{group_size}, {megabits:g} Mbit/s"
    words = ["benchmarks.paro", "--as-rank", str(group_size), "--rounds", str(rounds), "--steps", str(steps), "--arms", *arms]
    with SlowLinks(num_groups, megabits) as links:
        output = links.run([*words, "--smoke"] if smoke else words, group_size, timeout=3000)
    found = json.loads(output.splitlines()[-1])
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    states: dict[str, int] = {}
    apart = [0.0]
    for one in found["runs"]:
        arm = one["arm"]
        seconds.setdefault(arm, []).extend(one["seconds"])
        losses[arm], states[arm] = one["losses"], one["state_bytes"]
        expected = None if one["formula"] is None else one["formula"]["inter"] * group_size
        for taken, egress in zip(one["seconds"], one["egress"], strict=True):
            record.row(scene=title, step_of=arm, milliseconds=1000 * taken)
            record.row(**{f"arm, {title}": arm, "milliseconds": 1000 * taken, "egress_mib": egress / 2**20,
                          "formula_mib": None if expected is None else expected / 2**20,
                          "state_mib": one["state_bytes"] / 2**20, "final_loss": one["losses"][-1]})  # fmt: skip
            if expected:
                apart.append(abs(egress / expected - 1))
    cluster, job = cluster_of(found["cluster"]), job_of(found["compute_seconds"], smoke)
    predicted = {code: predict(Partition.of(code), cluster, job).step_seconds for code in CODES if code in seconds}
    for code, value in predicted.items():
        record.row(code=code, advised_scene=title, predicted_milliseconds=1000 * value)
    right, total = pairs_right(seconds, predicted)
    record.row(advised=title, pairs_apart=total, ordered_right=right, share=right / total if total else None,
               intra_gbit=cluster.intra.bandwidth * 8e-9, inter_mbit_a_rank=cluster.inter.bandwidth * 8e-6,
               compute_ms=1000 * job.compute_seconds)  # fmt: skip
    middle = {arm: statistics.median(values) for arm, values in seconds.items()}
    print(f"{title}: " + ", ".join(f"{arm} {1000 * value:.0f} ms" for arm, value in middle.items()), flush=True)
    reference = losses[DDP]
    yield "loss", max(abs(a - b) for values in losses.values() for a, b in zip(values, reference, strict=True))
    yield "bytes", max(apart)
    yield "pairs", right / total if total else float("nan")
    yield "zero_3", middle[FLAT] / middle["IIG"]
    yield "hsdp", middle[HSDP] / middle["IIG"]
    yield "state", states["IIG"] / states[HSDP]
    yield "III", middle["III"] / middle["IIG"]


def tables_of(scenes: Sequence[tuple[int, int, float]]) -> tuple[list[Table], list[Plot]]:
    """Tables and plots of the result."""
    titles = [f"{num_groups}x{group_size}, {megabits:g} Mbit/s" for num_groups, group_size, megabits in scenes]
    columns = ["milliseconds", "egress_mib", "formula_mib", "state_mib", "final_loss"]
    return [
        *(Table(f"A step: {title}", f"arm, {title}", columns, digits=2) for title in titles),
        Table("The advisor's milliseconds", "code", ["predicted_milliseconds"], columns="advised_scene", digits=0),
        Table("Pairs of codes that the advisor orders as measured", "advised",
              ["share", "ordered_right", "pairs_apart", "intra_gbit", "inter_mbit_a_rank", "compute_ms"]),
    ], [Plot(f"Time and memory of a step, {titles[0]}", "state_mib", "milliseconds", f"arm, {titles[0]}", log="y")]  # fmt: skip


def scene_name(num_groups: int, group_size: int, megabits: float) -> str:
    """Name of a scene on the command line and in files.

    >>> scene_name(4, 2, 200.0)
    '4x2_200'
    """
    return f"{num_groups}x{group_size}_{megabits:g}"


def judge(record: Record, found: Sequence[dict[str, float]]) -> Path:
    """Give the bars their values, from the figures of each scene so far, and write the result; returns its path."""
    values = {
        "bytes_off_the_formula": max(figures["bytes"] for figures in found),
        "iig_over_zero_3": found[0]["zero_3"],
        "iig_over_hsdp": found[0]["hsdp"],
        "state_bytes_iig_over_hsdp": found[0]["state"],
        "loss_difference": max(figures["loss"] for figures in found),
        "advisor_pairs_right": min(figures["pairs"] for figures in found),
    }
    for bar in record.bars:  # of a scene alone, fewer
        record.measure(bar, values[bar])
    return record.save()


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paro", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each arm")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn, of which the first is not counted")
    parser.add_argument("--scenes", type=int, default=len(SCENES), help="how many of the scenes, the first one has the bars")
    parser.add_argument("--scene", choices=[scene_name(*scene) for scene in SCENES], help="one alone, with a result of its own")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, one scene, few arms; the result is not kept")
    parser.add_argument("--as-rank", type=int, metavar="GROUP_SIZE", help=argparse.SUPPRESS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.as_rank:
        as_rank(options.as_rank, options.rounds, options.steps, options.smoke, options.arms)
        return Path()
    scenes = SCENES[: 1 if options.smoke else options.scenes]
    if options.scene:
        scenes = tuple(scene for scene in SCENES if scene_name(*scene) == options.scene)
    tables, plots = tables_of(scenes)
    name = f"paro_{options.scene}" if options.scene else "paro"
    record = Record(name, seeds=[0], smoke=options.smoke, tables=tables, plots=plots)
    if reason := unavailable():
        print(f"Not measured: {reason}.", flush=True)
        record.row(not_measured=reason)
        return record.save()
    Text().prepare_data()  # once, not by each process
    arms = ("IIG", "III", FLAT, DDP, HSDP) if options.smoke else options.arms
    rounds, steps = (1, 3) if options.smoke else (options.rounds, options.steps)
    path, found = Path(), []
    for scene in scenes:  # what is measured is kept, should a later scene be interrupted
        found.append(dict(measure(record, scene, rounds, steps, options.smoke, arms)))
        path = judge(record, found)
    print(f"III takes {found[0]['III']:.2f} times as long as IIG: they send the same bytes, and tie in time.")
    return path


if __name__ == "__main__":
    main()
