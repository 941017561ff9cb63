"""``zoo plan paro``: what each way to divide a model would cost on a cluster, before anyone rents it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from strategies.paro.collectives import Method
from strategies.paro.cost_model import Cluster, Cost, Job, LinkSpeed, rank_partitions
from strategies.paro.units import find_blocks, plan_units
from zoo.base.hyperparameters import build
from zoo.cli.parser import ZooArgumentParser
from zoo.hub import import_methods
from zoo.module import ZooModule

__all__ = ["ClusterPlan", "JobPlan", "ModelPlan", "plan_paro"]

_GIGABIT = 1e9 / 8


@dataclass
class ClusterPlan:
    """The cluster.

    Attributes:
        num_groups: Groups of devices with fast links to one another, such as nodes.
        group_size: Devices of a group.
        inter_gbps: Rate of a network card, Gbit/s.
        intra_gbps: Rate of a device's links inside its group, Gbit/s.
        cards: Whether each device has a network card, or each group.
        inter_latency_us: Microseconds of a message between groups.
        intra_latency_us: Microseconds of a message inside a group.
        memory_gb: Memory of a device, 10^9 bytes; null: without limit.
    """

    num_groups: int
    group_size: int
    inter_gbps: float
    intra_gbps: float
    cards: Literal["device", "group"] = "device"
    inter_latency_us: float = 0.0
    intra_latency_us: float = 0.0
    memory_gb: float | None = None

    def build(self) -> Cluster:
        """The cluster of the cost model."""
        n, m = self.num_groups * self.group_size, self.group_size
        intra = LinkSpeed(self.intra_gbps * _GIGABIT, self.intra_latency_us * 1e-6)
        inter = LinkSpeed(self.inter_gbps * _GIGABIT, self.inter_latency_us * 1e-6)
        memory = None if self.memory_gb is None else self.memory_gb * 1e9
        if self.cards == "group":
            return Cluster.with_one_card_a_group(n, m, intra, inter, memory)
        return Cluster(n, m, intra, inter, memory=memory)


@dataclass
class ModelPlan:
    """The model: numbers, or a module that is built without memory and counted.

    Attributes:
        parameters: Number of parameters.
        trainable: Number of those that are trained; null: all.
        units: Number of units that are gathered one by one, such as blocks.
        root: Parameters outside of all blocks.
        module: ``class_path`` and ``init_args`` of a module of the zoo, instead of the numbers.
    """

    parameters: float | None = None
    trainable: float | None = None
    units: int = 1
    root: float = 0.0
    module: dict[str, Any] | None = None


@dataclass
class JobPlan:
    """The training.

    Attributes:
        micro_batches: Micro-batches of an optimizer step.
        precision: bf16 with masters and optimizer in float32, or all in float32, with Adam.
        reduce_dtype: Gradients on the wire.
        compute_seconds: Forward and backward passes of a step.
        activation_gb: Memory for activations and the like, 10^9 bytes.
        collectives: How collectives over all devices run.
        overlap: Share of communication or computation, the shorter of them, that is hidden behind the other.
    """

    micro_batches: int = 1
    precision: Literal["bf16", "32"] = "bf16"
    reduce_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compute_seconds: float = 0.0
    activation_gb: float = 0.0
    collectives: Method = "overlapped"
    overlap: float = 1.0

    def build(self, model: ModelPlan) -> Job:
        """The job of the cost model.

        Raises:
            ValueError: The model is given as neither numbers nor a module, or as both.
        """
        if (model.parameters is None) == (model.module is None):
            raise ValueError("plan: give either model.parameters, or model.module with its class_path and init_args.")
        counted = _count(model)
        assert counted.parameters is not None
        wire = 4.0 if self.reduce_dtype == "float32" else 2.0
        half = self.precision == "bf16"
        return Job(
            counted.parameters,
            counted.trainable,
            self.micro_batches,
            counted.units,
            counted.root,
            parameter_bytes=2.0 if half else 4.0,
            gradient_bytes=wire,
            accumulator_bytes=wire if half else 4.0,
            state_bytes=12.0 if half else 8.0,
            activation_bytes=self.activation_gb * 1e9,
            compute_seconds=self.compute_seconds,
            overlap=self.overlap,
        )


def plan_paro(argv: Sequence[str]) -> None:
    """``zoo plan paro -c plan.yaml``: memory and time of every partition of a model on a cluster, the best first."""
    about = "Rank the 14 ways to divide parameters, gradients and optimizer state (PaRO) by their predicted time."
    parser = ZooArgumentParser(prog="zoo plan paro", description=about, example="-c plan.yaml")
    parser.add_argument("-c", "--config", action="config", help="a YAML file with cluster, model and job")
    parser.add_class_arguments(ClusterPlan, "cluster")
    parser.add_class_arguments(ModelPlan, "model")
    parser.add_class_arguments(JobPlan, "job")
    parser.add_argument("--plot", type=Path | None, default=None, help="write memory over time of all partitions to this PNG")
    options = parser.instantiate_classes(parser.parse_args(list(argv)))
    cluster = options.cluster.build()
    costs = rank_partitions(cluster, options.job.build(options.model), options.job.collectives)
    Console().print(_table(cluster, costs))
    if not costs[0].fits:
        print(f"None fits into {options.cluster.memory_gb:g} GB: take more devices, or recompute activations.")
    if options.plot is not None:
        _save_plot(costs, options.plot)
        print(f"wrote {options.plot}")


def _count(model: ModelPlan) -> ModelPlan:
    if model.module is None:
        return model
    with torch.device("meta"):
        import_methods()
        module = build(ZooModule, model.module, trusted=True)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    parts = list(module.parameter_groups())
    groups = [list(part["params"]) for part in parts] if parts and isinstance(parts[0], dict) else [trained]
    units = plan_units(module, find_blocks(module), groups)
    sizes = [sum(parameter.numel() for _, parameter in unit.parameters) for unit in units]
    root = sum(size for size, unit in zip(sizes, units, strict=True) if unit.block is None)
    return ModelPlan(sum(sizes), sum(parameter.numel() for parameter in trained), len(units), root)


def _table(cluster: Cluster, costs: Sequence[Cost]) -> Table:
    shown = Table(
        "code", "step", "exchange", "weights", "grads", "update", "memory", "fits",
        title=f"{cluster.world_size} devices in {cluster.num_groups} groups; seconds, GB a device", title_justify="left",
    )  # fmt: skip
    for cost in costs:
        seconds = (
            cost.step_seconds,
            cost.communication_seconds,
            cost.parameter_seconds,
            cost.gradient_seconds,
            cost.update_seconds,
        )
        shown.add_row(
            cost.partition, *(f"{value:.4g}" for value in seconds), f"{cost.memory / 1e9:.2f}", "yes" if cost.fits else "no"
        )
    return shown


def _save_plot(costs: Sequence[Cost], path: Path) -> None:
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for fits, colour, label in ((True, "tab:blue", "fits"), (False, "0.6", "does not fit")):
        chosen = [cost for cost in costs if cost.fits == fits]
        if chosen:
            axes.scatter(
                [cost.step_seconds for cost in chosen], [cost.memory / 1e9 for cost in chosen], color=colour, label=label
            )
    for cost in costs:
        axes.annotate(cost.partition, (cost.step_seconds, cost.memory / 1e9), (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="seconds of a step (predicted)", ylabel="GB a device", yscale="log")
    if min(cost.step_seconds for cost in costs) > 0:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
