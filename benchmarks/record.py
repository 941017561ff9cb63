"""The birth certificate of a measurement: what ran, where, on what, with which seeds, and what came out."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import BARS, BarError, read_bars
from benchmarks.plots import Plot
from benchmarks.tables import Cell, Row, Table, rich_table, terminal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRIALS = Path("runs") / "benchmarks"
PACKAGES = ("lightning-zoo", "torch", "torchvision", "lightning", "torchmetrics", "transformers", "numpy")


class Record:
    """Collects the rows and bars of one benchmark and writes them with everything needed to repeat it.

    Args:
        name: Name of the result; ``bars.yaml`` lists its bars under this name.
        seeds: The seeds that were run.
        tables: How the rows are shown, here and in the READMEs.
        plots: The pictures, here and in the READMEs.
        smoke: A trial run: its result goes below ``runs/``, never among the results.
        bars: The file of the bars.

    Example:
        >>> record = Record("spike_guard", seeds=[0], tables=[Table("Guard", index="arm", values=["loss"])])
        >>> record.row(arm="clean", seed=0, loss=1.5)
        >>> record.measure("time_inside_guard", 0.004)
    """

    def __init__(
        self,
        name: str,
        *,
        seeds: Sequence[int],
        tables: Sequence[Table] = (),
        plots: Sequence[Plot] = (),
        smoke: bool = False,
        bars: Path = BARS,
    ) -> None:
        self.name, self.seeds, self.tables, self.plots, self.smoke = name, list(seeds), tables, plots, smoke
        self.rows: list[Row] = []
        self._bars = read_bars(bars).get(name, {})
        self._values: dict[str, float | None] = dict.fromkeys(self._bars)
        self._begin = datetime.now(UTC)
        self._commit = commit()  # now: the tree may move on while the benchmark runs

    def row(self, **cells: Cell) -> None:
        """Add one row of the result; a number that is not finite is stored as ``None``, for *not measured*."""
        self.rows.append({key: _finite(value) for key, value in cells.items()})

    @property
    def bars(self) -> tuple[str, ...]:
        """Names of this result's bars."""
        return tuple(self._bars)

    def measure(self, bar: str, value: float | None) -> None:
        """Give the value of a bar of this result.

        Raises:
            BarError: ``bars.yaml`` has no such bar.
        """
        if bar not in self._bars:
            known = ", ".join(self._bars) or "none"
            raise BarError(f"bars.yaml has no bar {bar!r} for the result {self.name!r}; it has: {known}.")
        self._values[bar] = None if value is None else _number(float(value))

    def certificate(self) -> dict[str, Any]:
        """Everything that is written, as plain data."""
        return {
            "name": self.name,
            "command": command(),
            "commit": self._commit,
            "device": device(),
            "versions": versions(),
            "seeds": self.seeds,
            "date": self._begin.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self._begin).total_seconds(), 1),
            "rows": self.rows,
            "tables": [asdict(table) for table in self.tables],
            "plots": [asdict(plot) for plot in self.plots],
            "bars": [
                {"name": bar.name, "value": self._values[bar.name], "target": bar.target, "better": bar.better,
                 "holds": bar.holds(self._values[bar.name])}
                for bar in self._bars.values()
            ],
        }  # fmt: skip

    def save(self, folder: Path | None = None) -> Path:
        """Print tables and bars, write ``<name>.json`` at once or not at all, draw the plots; returns the JSON's path.

        Raises:
            ValueError: A text in the result holds a path of this machine.
        """
        result = self.certificate()
        _check_no_path(result)
        folder = folder or (TRIALS if self.smoke else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        unfinished = path.with_suffix(f".json.{os.getpid()}")
        unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        unfinished.replace(path)
        save_plots(result, folder)
        show(result)
        return path


def save_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the plots of a result beside its JSON, ``<name>.png``, ``<name>_2.png`` and so on; returns their paths."""
    paths = []
    for number, plot in enumerate(result["plots"], start=1):
        paths.append(folder / f"{result['name']}{'' if number == 1 else f'_{number}'}.png")
        Plot(**plot).save(result["rows"], paths[-1])
    return paths


def show(result: dict[str, Any]) -> None:
    """Print the tables and bars of a result."""
    console = terminal()
    for table in result["tables"]:
        console.print(Table(**table).rich(result["rows"]))
    if result["bars"]:
        lines = [
            [bar["name"], f"{'>=' if bar['better'] == 'higher' else '<='} {bar['target']:g}", shown(bar["value"], bar["target"]),
             verdict(bar["value"], bar["holds"])]
            for bar in result["bars"]
        ]  # fmt: skip
        console.print(rich_table(f"Bars of {result['name']}", ["bar", "target", "measured", "verdict"], lines))


def shown(value: float | None, target: float = math.nan) -> str:
    """A bar's value as text, with three digits, or as many as tell it from the target.

    >>> shown(0.31234), shown(None), shown(1.0047, target=1)
    ('0.312', '-', '1.005')
    """
    if value is None or abs(value) >= 1000:
        return "-" if value is None else f"{value:,.0f}"
    texts = [f"{value:.{digits}g}" for digits in range(3, 8)]
    return next((text for text in texts if value == target or float(text) != target), texts[-1])


def verdict(value: float | None, holds: bool) -> str:
    """In words what a bar's value means."""
    return "not measured" if value is None else "holds" if holds else "does not hold"


def command() -> str:
    """The command line of this process, as one would type it, without paths of this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", module, *map(_without_folder, sys.argv[1:])])


def commit() -> dict[str, str | bool | None]:
    """The commit that ran, and whether tracked files other than results were changed; ``None`` outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return {"id": git("rev-parse", "HEAD").strip(), "dirty": bool(changed.strip())}
    except (OSError, subprocess.CalledProcessError):
        return {"id": None, "dirty": None}


def device() -> dict[str, str | int | None]:
    """Processor, usable cores, threads of torch, and the accelerator if there is one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can move a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _without_folder(word: str) -> str:
    """A word of the command line, of which an absolute path, alone or after ``--option=``, keeps its last part only."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(value: Cell) -> Cell:
    return _number(value) if isinstance(value, float) else value


def _check_no_path(value: object, where: str = "result") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_no_path(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_no_path(inner, f"{where}[{number}]")
    elif isinstance(value, str) and any(place in value for place in (str(ROOT), str(Path.home()) + os.sep)):
        raise ValueError(f"{where} holds a path of this machine ({value!r}): a result is published, give a name instead.")
