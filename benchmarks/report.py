"""Tables and plots of the READMEs from the results, and the check of every bar.

``python -m benchmarks.report`` writes, between ``<!-- results:NAME -->`` and ``<!-- /results -->`` in README.md, the
method cards and the guides, the tables of ``results/NAME.json`` (``NAME`` = ``bars``: the table of all bars), and
redraws the plots. ``--check`` changes nothing: it compares ``bars.yaml`` with the results and fails on contradictions
and on tables that are stale; with ``--strict`` also on a bar that does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, BarError, read_bars, read_commands
from benchmarks.record import ROOT, save_plots, shown, verdict
from benchmarks.tables import Table, markdown_table, rich_table, terminal

CERTIFICATE = ("command", "commit", "device", "versions", "seeds", "date", "rows", "tables", "plots", "bars")
PAGES = ("README.md", "zoo/*/README.md", "strategies/*/README.md", "docs/**/*.md")
MARKED = re.compile(r"<!-- results:(?P<name>\w+) -->\n(?P<body>.*?)<!-- /results -->", re.DOTALL)
MARKER = re.compile(r"<!-- (?:results:\w+|/results) -->")


class Report:
    """The results of a checkout beside its bars.

    Args:
        root: Root of the checkout; holds ``benchmarks/bars.yaml``, ``benchmarks/results`` and the pages.

    Raises:
        BarError: ``bars.yaml`` is malformed.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.folder = root / "benchmarks" / "results"
        self.bars = read_bars(root / "benchmarks" / "bars.yaml")
        self.commands = read_commands(root / "benchmarks" / "bars.yaml")
        self.results: dict[str, dict[str, Any]] = {
            path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))
        }

    def value(self, result: str, bar: str) -> float | None:
        """The measured value of a bar; ``None`` if it was not measured."""
        for measured in self.results.get(result, {}).get("bars", []):
            if measured["name"] == bar:
                return measured["value"]
        return None

    def contradictions(self) -> list[str]:
        """What is wrong between ``bars.yaml`` and the results, a sentence each."""
        found = []
        for name, result in self.results.items():
            if missing := [key for key in CERTIFICATE if key not in result]:
                found.append(f"results/{name}.json: the birth certificate lacks {', '.join(missing)}; run it again.")
                continue
            for measured in result["bars"]:
                where = f"results/{name}.json, bar {measured['name']}"
                bar = self.bars.get(name, {}).get(measured["name"])
                if bar is None:
                    found.append(f"{where}: unknown to bars.yaml.")
                elif (measured["target"], measured["better"]) != (bar.target, bar.better):
                    found.append(
                        f"{where}: measured against {measured['better']} {measured['target']:g}, but bars.yaml says "
                        f"{bar.better} {bar.target:g}."
                    )
                elif measured["holds"] != bar.holds(measured["value"]):
                    found.append(f"{where}: says holds = {measured['holds']}, which {measured['value']} does not bear out.")
        return found

    def verdicts(self) -> list[tuple[str, Bar, float | None, str]]:
        """Every bar with its result, value, and ``holds``, ``does not hold`` or ``not measured``."""
        return [
            (result, bar, value, verdict(value, bar.holds(value)))
            for result, bars in self.bars.items()
            for bar in bars.values()
            for value in [self.value(result, bar.name)]
        ]

    def pages(self) -> dict[Path, str]:
        """Every page that has markers, as it ought to read.

        Raises:
            BarError: A marker is not closed, or names no result, benchmark or entry of ``bars.yaml``.
        """
        found = {}
        for path in sorted({path for pattern in PAGES for path in self.root.glob(pattern)}):
            text = path.read_text()
            if not MARKER.search(text):
                continue
            if MARKER.search(MARKED.sub("", text)):
                raise BarError(f"{path.relative_to(self.root)}: a results marker is not opened or not closed.")
            parts, end = [], 0
            for match in MARKED.finditer(text):
                parts += [text[end : match.start("body")], self.section(match["name"], path), "\n"]
                end = match.end("body")
            found[path] = "".join([*parts, text[end:]])
        return found

    def stale(self) -> list[Path]:
        """The pages that do not read as the results say, and the plots that are missing."""
        pages = [path for path, text in self.pages().items() if path.read_text() != text]
        plots = [path for name in self.results for path in self._plots(name) if not path.exists()]
        return pages + plots

    def write(self) -> list[Path]:
        """Write the pages and draw the plots; returns the pages that changed."""
        for result in self.results.values():
            save_plots(result, self.folder)
        changed = self.stale()
        for path, text in self.pages().items():
            path.write_text(text)
        return changed

    def section(self, name: str, page: Path) -> str:
        """What stands between the markers for a result, or for ``bars``, in Markdown.

        Raises:
            BarError: There is no result, benchmark or entry of ``bars.yaml`` of this name.
        """
        if name == "bars":
            return self._bars_table([(result, bar) for result, bars in self.bars.items() for bar in bars.values()])
        if name not in self.results:
            command = self.commands.get(name)
            if command is None and (self.root / "benchmarks" / f"{name}.py").exists():
                command = f"python -m benchmarks.{name}"
            if command is None:
                raise BarError(f"{page.relative_to(self.root)}: no result, benchmark or entry of bars.yaml is named {name!r}.")
            return f"*Not measured:* `{command}`."
        result = self.results[name]
        parts = [Table(**table).markdown(result["rows"]) for table in result["tables"]]
        for path in self._plots(name):
            parts.append(f"![{name}]({Path(os.path.relpath(path, page.parent)).as_posix()})")
        if self.bars.get(name):
            parts.append(self._bars_table([(name, bar) for bar in self.bars[name].values()]))
        return "\n\n".join([*parts, certificate_line(result)])

    def _bars_table(self, bars: Sequence[tuple[str, Bar]]) -> str:
        lines = []
        for result, bar in bars:
            value = self.value(result, bar.name)
            target = f"{'≥' if bar.better == 'higher' else '≤'} {bar.target:g}"
            lines.append([f"{bar.statement} (`{result}`)", target, shown(value, bar.target), verdict(value, bar.holds(value))])
        return markdown_table(["bar", "target", "measured", "verdict"], lines)

    def _plots(self, name: str) -> list[Path]:
        count = len(self.results[name].get("plots", []))
        return [self.folder / f"{name}{'' if number == 1 else f'_{number}'}.png" for number in range(1, count + 1)]


def certificate_line(result: dict[str, Any]) -> str:
    """Where the numbers of a result come from, in one line of Markdown."""
    device, commit, versions = result["device"], result["commit"], result["versions"]
    where = device["accelerator"] or f"{device['processor']}, {device['cores']} cores"
    what = f"{(commit['id'] or 'none')[:10]}{' with local changes' if commit['dirty'] else ''}"
    return (
        f"`{result['command']}`, {result['date'][:10]}, commit {what}, {where}, "
        f"torch {versions['torch']}, Python {versions['python']}, seeds {', '.join(map(str, result['seeds']))}; "
        "median (least to most)."
    )


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail on contradictions and stale tables")
    parser.add_argument("--strict", action="store_true", help="fail also if a bar does not hold or is not measured")
    options = parser.parse_args(arguments)
    console = terminal()
    try:
        report = Report(root)
        problems = report.contradictions()
        if not problems and not options.check:
            for path in report.write():
                console.print(f"wrote {path.relative_to(root)}")
        if not problems:
            problems = [f"{path.relative_to(root)} is stale: run python -m benchmarks.report." for path in report.stale()]
    except BarError as error:
        print(error, file=sys.stderr)
        return 1
    verdicts = report.verdicts()
    console.print(
        rich_table(
            "Bars",
            ["result", "bar", "target", "measured", "verdict"],
            [
                [result, bar.name, f"{'>=' if bar.better == 'higher' else '<='} {bar.target:g}", shown(value, bar.target), words]
                for result, bar, value, words in verdicts
            ],
        )
    )
    counts = {words: sum(w == words for *_, w in verdicts) for words in ("holds", "does not hold", "not measured")}
    console.print(", ".join(f"{count} {words}" for words, count in counts.items()))
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems) or (options.strict and counts["holds"] < len(verdicts)))


if __name__ == "__main__":
    sys.exit(main())
