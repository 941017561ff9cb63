"""A picture of what AntDT did in a run: batches of all processes, times of the steps, decisions and restarts.

``python -m benchmarks.antdt_timeline runs/flights_nd/antdt/events.jsonl [--beside runs/flights_static/antdt/events.jsonl]
[--out timeline.png]`` reads the log of a run, and of another one to compare it with.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It holds no step, or a line that is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no log: AntDTStrategy writes one as antdt/events.jsonl below the run's folder.")
    events = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON.") from error
    if not any(event.get("kind") == "step" for event in events):
        raise ValueError(f"{path} holds no step.")
    return events


def steps_of(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps in their order; of one that was done again after a restart, the last."""
    found = {event["step"]: event for event in events if event.get("kind") == "step"}
    return [found[number] for number in sorted(found)]


def decisions_of(events: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """First step of each plan, with its batches in words."""
    steps = steps_of(events)
    changed = [now for before, now in itertools.pairwise(steps) if now["batch"] != before["batch"]]
    return [(step["step"], "/".join(map(str, step["batch"]))) for step in changed]


def restarts_of(events: Sequence[dict[str, Any]]) -> list[int]:
    """Steps from which the group went on after a restart."""
    steps = [event["step"] for event in events if event.get("kind") == "step"]
    return [after for before, after in itertools.pairwise(steps) if after <= before]


def draw(events: Sequence[dict[str, Any]], path: Path, beside: Sequence[dict[str, Any]] = (), title: str = "") -> Path:
    """Draw the picture.

    Args:
        events: Of the run.
        path: The PNG file to write.
        beside: Of a run to compare it with.
        title: Heading.
    """
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
    steps = steps_of(events)
    numbers = [step["step"] for step in steps]
    for rank in range(len(steps[0]["batch"])):
        top.step(numbers, [step["batch"][rank] for step in steps], where="post", label=f"process {rank}")
    top.set_ylabel("samples of a step")
    top.set_ylim(bottom=0)
    top.legend(ncols=4, fontsize="small")
    top.set_title(title or "Batches and times of the steps")
    if beside:
        _times(bottom, steps_of(beside), "equal batches", "0.6")
    _times(bottom, steps, "AntDT", "tab:blue")
    for axes in (top, bottom):
        for number, _ in decisions_of(events):
            axes.axvline(number, color="0.7", linestyle=":", linewidth=0.8)
        for number in restarts_of(events):
            axes.axvline(number, color="tab:red", linewidth=1.0)
    bottom.set_xlabel("optimizer step (dotted: other batches; red: the group was started again)")
    bottom.set_ylabel("milliseconds of a step")
    bottom.set_ylim(bottom=0)
    bottom.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _times(axes: Axes, steps: Sequence[dict[str, Any]], label: str, color: str) -> None:
    axes.plot([step["step"] for step in steps], [1e3 * step["wall"] for step in steps], label=label, color=color, linewidth=1.2)


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.antdt_timeline", description=__doc__)
    parser.add_argument("events", type=Path, help="events.jsonl of a run")
    parser.add_argument("--beside", type=Path, help="events.jsonl of a run to compare it with")
    parser.add_argument("--out", type=Path, default=Path("timeline.png"))
    options = parser.parse_args(arguments)
    path = draw(read_events(options.events), options.out, read_events(options.beside) if options.beside else ())
    print(path)
    return path


if __name__ == "__main__":
    main()
