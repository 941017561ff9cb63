"""Which samples each process trained in which step, from files that outlive the processes, however these end.

`SampleTrace` is a callback: before each step, and so before its gradients leave the process, it appends a line with the indices
of the step's samples. `final_trajectory` cuts these lines where the training that led to the final model left them: whenever a
group (re)starts at step s, what earlier groups did in the steps from s on is undone.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Audit", "SampleTrace", "audit", "final_trajectory", "read_traces"]


class SampleTrace(Callback):
    """Writes ``rank<r>-<pid>.jsonl``: a line when training (re)starts, and one for each step.

    Args:
        folder: of the files; made if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._file = -1
        self._pid = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where this process starts (Lightning hook)."""
        self._write(trainer, "start", pid=os.getpid())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say what is about to be trained (Lightning hook)."""
        shadow = trainer.strategy._step.is_shadow  # type: ignore[attr-defined]
        self._write(trainer, "step", index=[] if shadow else batch["index"].tolist())

    def _write(self, trainer: Trainer, kind: str, **fields: Any) -> None:
        if self._pid != os.getpid():  # a process that has split off another one's writes to a file of its own
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"rank{trainer.global_rank}-{os.getpid()}.jsonl"
            self._file, self._pid = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), os.getpid()
        generation = trainer.strategy.antdt_state()["generation"]  # type: ignore[attr-defined]
        line = {
            "kind": kind, "t": time.time(), "rank": trainer.global_rank, "gen": generation,
            "epoch": trainer.current_epoch, "step": trainer.global_step, **fields,
        }  # fmt: skip
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """All lines of all processes, in the order of their times; a line that a kill has cut short is left out."""
    lines = []
    for path in folder.glob("*.jsonl"):
        content = path.read_bytes()
        lines += [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    return sorted(lines, key=lambda line: line["t"])


def final_trajectory(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The steps that led to the final model: of each generation, those before the steps at which later ones started.

    Example:
        >>> def line(kind, gen, step): return {"kind": kind, "gen": gen, "step": step}
        >>> lines = [line("start", 1, 0), *(line("step", 1, s) for s in range(9)), line("start", 2, 5), line("step", 2, 5)]
        >>> [(row["gen"], row["step"]) for row in final_trajectory(lines)]
        [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 5)]
    """
    lines = list(lines)
    starts = {line["gen"]: line["step"] for line in lines if line["kind"] == "start"}
    end = {gen: min((step for later, step in starts.items() if later > gen), default=None) for gen in starts}
    for line in lines:
        limit = end[line["gen"]]
        if line["kind"] == "step" and (limit is None or line["step"] < limit):
            yield line


@dataclass(frozen=True)
class Audit:
    """What the final trajectory used.

    Attributes:
        steps: optimizer steps.
        duplicates: samples that an epoch used again, over all epochs.
        missing: samples that an epoch did not use, over all epochs.
        redone: optimizer steps that were begun and undone.
    """

    steps: int
    duplicates: int
    missing: int
    redone: int


def audit(lines: list[dict[str, Any]], num_samples: int, epochs: int) -> Audit:
    """Count the samples of the final trajectory.

    Args:
        lines: of `read_traces`.
        num_samples: of an epoch.
        epochs: that were trained.
    """
    kept = list(final_trajectory(lines))
    used = {epoch: Counter[int]() for epoch in range(epochs)}
    for line in kept:
        used[line["epoch"]].update(line["index"])
    steps = {line["step"] for line in kept}
    begun = {(line["gen"], line["step"]) for line in lines if line["kind"] == "step"}
    return Audit(
        steps=len(steps),
        duplicates=sum(sum(counts.values()) - len(counts) for counts in used.values()),
        missing=sum(num_samples - len(counts) for counts in used.values()),
        redone=len(begun) - len(steps),
    )
