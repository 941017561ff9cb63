"""The verb ``zoo simulate``: what straggler mitigation would do on a cluster of thousands of workers, before anyone rents it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from strategies.antdt.control.solutions import Solution
from strategies.antdt.simulation.simulator import ClusterSim, Mode, SimCluster, SimResult
from strategies.antdt.simulation.slowness import SlownessModel
from zoo.base.hyperparameters import build
from zoo.cli.configs import find_config
from zoo.cli.parser import ZooArgumentParser

__all__ = ["Arm", "run_arms", "simulate"]


@dataclass(frozen=True)
class Arm:
    """One way to run the job.

    Attributes:
        solution: What to do about stragglers.
        mode: ``bsp``: in lockstep; ``asp``: each worker at its own pace, data as it asks; ``asp_static``: data divided equally.
        group_restart: Whether the restart of a worker stops all (torchrun), or only that one (parameter servers).
        decide_every: Seconds between decisions.
    """

    solution: Solution
    mode: Mode = "bsp"
    group_restart: bool = False
    decide_every: float = 10.0

    def make(self) -> Solution:
        """A new solution, which remembers nothing of earlier runs."""
        return build(Solution, self.solution.init_config)  # type: ignore[type-abstract]


def run_arms(
    arms: Mapping[str, Arm],
    cluster: SimCluster,
    slowness: SlownessModel | str,
    servers: SlownessModel | str | None,
    seeds: Sequence[int],
) -> dict[str, list[SimResult]]:
    """Simulate all arms: the same nodes are slow at the same times in all arms of a seed."""
    return {
        name: [
            ClusterSim(
                cluster,
                arm.make(),
                slowness,
                seed,
                mode=arm.mode,
                server_slowness=servers,
                group_restart=arm.group_restart,
                decide_every=arm.decide_every,
            ).run()
            for seed in seeds
        ]
        for name, arm in arms.items()
    }


def simulate(argv: Sequence[str]) -> None:
    """``zoo simulate -c antdt/simulate_1000``: completion times of a job on a simulated cluster, for several solutions.

    Raises:
        ValueError: Options that do not go together.
    """
    parser = ZooArgumentParser(
        prog="zoo simulate",
        example="-c antdt/simulate_1000",
        description="Simulate a data-parallel job with stragglers, driven by the real controller and ledger of AntDT."
        " Only time is modelled; all of the result is simulated.",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file, or the name of a packaged one")
    parser.add_class_arguments(SimCluster, "cluster")
    parser.add_class_arguments(SlownessModel, "slowness")
    parser.add_argument("--servers", type=SlownessModel | None, default=None, help="slowness of parameter servers (the workers')")
    parser.add_argument(
        "--trace", type=Path | None, default=None, help="recorded slowness (JSON lines or CSV) instead of drawn one"
    )
    parser.add_argument("--arms", type=dict[str, Arm], help="name: {solution: {class_path, init_args}, mode, ...}")
    parser.add_argument("--seeds", type=list[int], default=[0], help="of what is drawn")
    parser.add_argument("--out", type=Path | None, default=None, help="folder for plots and for the decisions (JSON lines)")
    options = parser.instantiate_classes(parser.parse_args(_with_packaged(argv)))
    if not options.arms:
        raise ValueError("zoo simulate: there is nothing to compare: give arms, as in configs/antdt/simulate_1000.yaml")
    slowness: SlownessModel | str = options.slowness if options.trace is None else str(options.trace)
    servers = options.servers if options.trace is None else None
    results = run_arms(options.arms, options.cluster, slowness, servers, options.seeds)
    console = Console()
    console.width = max(console.width, 120)  # eleven columns, also where nobody looks
    console.print(_table(options.cluster, results))
    if options.out is not None:
        _save(results, options.out)
        print(f"wrote {options.out}/completion.png, {options.out}/timeline.png and the decisions of each arm (simulated)")


def _with_packaged(argv: Sequence[str]) -> list[str]:
    """Options with packaged configurations in place of their names."""
    words = list(argv)
    for place, word in enumerate(words[:-1]):
        if word in ("-c", "--config"):
            words[place + 1] = str(find_config(words[place + 1]))
    return words


def _table(cluster: SimCluster, results: Mapping[str, Sequence[SimResult]]) -> Table:
    first = next(iter(results))
    base = _median([result.seconds for result in results[first]])
    title = (
        f"SIMULATED: {cluster.workers} workers, {cluster.servers} servers, {cluster.steps} steps of {cluster.global_batch}"
        f" samples; medians of {len(results[first])} seeds"
    )
    heads = ("seconds", f"over {first}", "steps", "restarts", "of use", "dropped", "repeated", "waiting", "decisions")
    shown = Table(Column("arm", no_wrap=True), *heads, title=title, title_justify="left")
    total = cluster.steps * cluster.global_batch
    for name, runs in results.items():
        seconds = _median([run.seconds for run in runs])
        counts = [_median([getattr(run, key) for run in runs]) for key in ("steps", "restarts", "helpful")]
        shares = [_median([getattr(run, key) / total for run in runs]) for key in ("dropped", "repeated")]
        shown.add_row(
            name,
            f"{seconds:,.0f}",
            f"{base / seconds:.2f}x",
            *(f"{count:,.0f}" for count in counts),
            *(f"{share:.1%}" for share in shares),
            f"{_median([run.bubble for run in runs]):.0%}",
            f"{_median([run.decisions for run in runs]):,.0f}",
        )
    return shown


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _save(results: Mapping[str, Sequence[SimResult]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, runs in results.items():
        (folder / f"{_file_name(name)}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in runs[0].events))
    figure = Figure(figsize=(7.6, 0.6 + 0.45 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(results)
    seconds = [_median([run.seconds for run in results[name]]) for name in names]
    bars = axes.barh(names, seconds, color="tab:blue")
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="seconds to completion (simulated)", xlim=(0, 1.15 * max(seconds)))
    figure.savefig(folder / "completion.png", dpi=120)

    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, runs in results.items():
        begun = [(0.0, 0), *runs[0].timeline]
        (line,) = axes.plot([time for time, _ in begun], [samples / 1e6 for _, samples in begun], label=name)
        kills = sorted({event["t"] for event in runs[0].events if event["action"] == "KILL_RESTART"})
        done = [next((samples for time, samples in reversed(begun) if time <= at), 0) / 1e6 for at in kills]
        axes.plot(kills, done, "x", color=line.get_color())
    axes.set(xlabel="seconds (simulated; crosses: restarts)", ylabel="million samples")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(folder / "timeline.png", dpi=120)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")
