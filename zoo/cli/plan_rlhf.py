"""``zoo plan rlhf``: what each placement of the models of RLHF would cost on a cluster, before anyone rents it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from strategies.placement.cost_model import Prediction, RoleCost, Workload
from strategies.placement.planner import explain, name_of, rank_plans
from strategies.placement.profile import measure_roles
from strategies.placement.strategy import write_plan
from zoo.base.hyperparameters import build
from zoo.cli.configs import find_config
from zoo.cli.parser import ZooArgumentParser
from zoo.cli.plan_paro import ClusterPlan
from zoo.hub import import_methods
from zoo.module import ZooModule
from zoo.role_placement import HasRoles

__all__ = ["plan_rlhf"]


def plan_rlhf(argv: Sequence[str]) -> None:
    """``zoo plan rlhf -c rlhf/plan_llama_7b``: time and memory of every placement, the best first.

    Raises:
        ValueError: Options that do not go together.
    """
    parser = ZooArgumentParser(
        prog="zoo plan rlhf",
        description="Rank the placements of actor, critic, reference and reward model by their predicted time.",
        example="-c rlhf/plan_llama_7b",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file, or the name of a packaged one")
    parser.add_class_arguments(ClusterPlan, "cluster")
    parser.add_class_arguments(Workload, "workload")
    parser.add_argument("--roles", type=dict[str, RoleCost], default={}, help="sizes and times of the models")
    parser.add_argument("--module", type=dict[str, Any] | None, default=None, help="class_path and init_args, to measure instead")
    parser.add_argument("--max_lag", type=int, default=0, help="most rollouts by which generation may be ahead of training")
    parser.add_argument("--show", type=int, default=20, help="rows of the table")
    parser.add_argument("--out", type=Path | None, default=None, help="folder for the best plan, the times of roles and a plot")
    words = list(argv)
    for place, word in enumerate(words[:-1]):
        if word in ("-c", "--config"):
            words[place + 1] = str(find_config(words[place + 1]))
    options = parser.instantiate_classes(parser.parse_args(words))
    if bool(options.roles) == (options.module is not None):
        raise ValueError("zoo plan rlhf: give either roles, with sizes and times, or module, of which they are measured.")
    cluster, job = options.cluster.build(), options.workload
    roles = options.roles or _measured(options.module, job, cluster.world_size)
    ranked = rank_plans(cluster, job, roles, options.max_lag)
    console = Console()
    console.width = max(console.width, 120)  # ten columns, also where nobody looks
    console.print(_table(ranked[: options.show], job, cluster.world_size))
    if not ranked[0].fits:
        print(f"None fits into 90 % of {options.cluster.memory_gb:g} GB: take more devices, or train adapters.")
    else:
        print(explain(ranked, cluster.world_size))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_plan(ranked[0].plan, options.out / "plan.yaml")
        measured = {"roles": {name: asdict(role) for name, role in roles.items()}}
        (options.out / "roles.json").write_text(json.dumps(measured, indent=1))
        _save_plot(ranked, cluster.world_size, options.out / "plans.png")
        print(f"wrote plan.yaml (--trainer.strategy.plan), roles.json (-c) and plans.png to {options.out}")


def _measured(entry: dict[str, Any], job: Workload, ranks: int) -> dict[str, RoleCost]:
    """Sizes and times of a module's roles; a reference that is copied when a run begins has the actor's."""
    import_methods()
    module = build(ZooModule, entry, trusted=True)
    if not isinstance(module, HasRoles):
        raise ValueError(f"zoo plan rlhf: {type(module).__name__} has no roles to place: take a module such as RLHF.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    roles = measure_roles(module.roles(), job, device, ranks)
    return {"reference": replace(roles["actor"], trained=0.0), **roles}


def _table(ranked: Sequence[Prediction], job: Workload, world: int) -> Table:
    shown = Table(
        "strategy", "back end", "gather", "chunks", "lag", "step", "samples/s", "memory", "idle", "fits",
        title=f"PREDICTED: {world} devices; seconds of a rollout with its training, GB a device", title_justify="left",
    )  # fmt: skip
    for each in ranked:
        plan = each.plan
        backend = plan.roles["actor"].backend
        gather = plan.gather if backend == "fsdp2" and not plan.separates else "-"
        shown.add_row(
            name_of(plan, world), backend, gather, str(plan.chunks), str(plan.max_lag), f"{each.seconds:.4g}",
            f"{job.samples / each.seconds:.4g}", f"{each.memory / 1e9:.2f}", f"{each.idle:.0%}", "yes" if each.fits else "no",
        )  # fmt: skip
    return shown


def _save_plot(ranked: Sequence[Prediction], world: int, path: Path) -> None:
    best: dict[str, Prediction] = {}
    for each in ranked:
        backend = each.plan.roles["actor"].backend
        gather = f", gather {each.plan.gather}" if backend == "fsdp2" and not each.plan.separates else ""
        lag = f", lag {each.plan.max_lag}" if each.plan.separates else ""
        best.setdefault(f"{name_of(each.plan, world).split()[0]} {backend}{gather}{lag}", each)
    kinds = sorted({term for each in best.values() for term in each.terms})
    figure = Figure(figsize=(8.0, 1.0 + 0.35 * len(best)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names, left = list(best), [0.0] * len(best)
    for kind in kinds:
        values = [best[name].terms.get(kind, 0.0) for name in names]
        axes.barh(names, values, left=left, label=kind)
        left = [begin + value for begin, value in zip(left, values, strict=True)]
    axes.plot([best[name].seconds for name in names], names, "k|", markersize=14, label="step")
    axes.invert_yaxis()
    axes.set(xlabel="seconds (predicted); bars: work of the slowest rank of each side")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
