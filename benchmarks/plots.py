"""Plots of a result: medians over the seeds as lines, least to most as a band; names on the horizontal axis have no line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.tables import Row


@dataclass(frozen=True)
class Plot:
    """How rows become a picture.

    Attributes:
        title: Heading.
        x: Column on the horizontal axis, numbers; or names, which are points beside one another.
        y: Column on the vertical axis, numbers; the median over rows of the same ``x`` is drawn.
        series: Column whose values become the lines.
        log: Axes that are logarithmic: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        reference: Series drawn as a dashed grey line (a floor, a baseline without ``x``), if any.
    """

    title: str
    x: str
    y: str
    series: str
    log: Literal["", "x", "y", "xy"] = ""
    reference: str | None = None

    def save(self, rows: Sequence[Row], path: Path) -> None:
        """Draw the rows that have all three columns and write a PNG."""
        figure = Figure(figsize=(7.6, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        named = [row for row in rows if row.get(self.series) is not None]
        kinds = ((self.x, int | float | str), (self.y, int | float))
        shown = [row for row in named if all(isinstance(row.get(key), kind) for key, kind in kinds)]
        names = list(dict.fromkeys(row[self.x] for row in shown if isinstance(row[self.x], str)))
        shown = [{**row, self.x: names.index(row[self.x])} if names else row for row in shown]
        if len({row[self.series] for row in shown}) > 10:  # more than the usual cycle has colours
            axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
        ticks = sorted({float(row[self.x]) for row in shown})  # type: ignore[arg-type]
        for name in dict.fromkeys(row[self.series] for row in shown):
            points = {
                x: [float(row[self.y]) for row in shown if row[self.series] == name and row[self.x] == x]  # type: ignore[arg-type]
                for x in ticks
            }
            xs = [x for x in ticks if points[x]]
            style = {"color": "0.5", "linestyle": "--"} if name == self.reference else {"marker": "o", "markersize": "4"}
            if names:
                style |= {"linestyle": "none"}
            (line,) = axes.plot(xs, [statistics.median(points[x]) for x in xs], label=str(name), **style)  # type: ignore[arg-type]
            least, most = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
            if names:
                axes.vlines(xs, least, most, color=line.get_color(), alpha=0.5)
            else:
                axes.fill_between(xs, least, most, color=line.get_color(), alpha=0.15, linewidth=0)
        if "x" in self.log:
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if names:
            axes.set_xticks(range(len(names)), [str(name) for name in names])
        if "y" in self.log:
            axes.set_yscale("log")
        axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(path, dpi=120)
