"""A CSV log that a resumed run continues."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

__all__ = ["ResumableCSVLogger"]


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, which keeps the file of the interrupted run (Lightning's own deletes it).

    Rows from the resumed step on are dropped, since these steps are trained again, and a validation that is run again after
    resuming is not listed twice. Each row is on disk as soon as it is
    logged, so a killed process loses none.

    Args:
        save_dir: folder of ``metrics.csv``.
        resume_step: number of optimizer steps of the checkpoint that is continued; None keeps all rows.
    """

    def __init__(self, save_dir: str | Path, resume_step: int | None = None) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)
        self.resume_step = resume_step

    @property
    @rank_zero_experiment
    def experiment(self) -> "_ContinuedWriter":
        """The writer of the file."""
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _ContinuedWriter(self.log_dir, self.resume_step)
        return self._experiment  # type: ignore[return-value]


class _ContinuedWriter(ExperimentWriter):
    def __init__(self, log_dir: str, resume_step: int | None) -> None:
        super().__init__(log_dir)
        self._known: set[tuple[tuple[str, str], ...]] = set()
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if resume_step is None or int(row["step"] or 0) < resume_step]
            self._known = {_row_key(row) for row in rows if resume_step is not None and int(row["step"] or 0) == resume_step - 1}
            self.metrics_keys = list(reader.fieldnames or [])
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Record a row, unless it is one that the interrupted run has written already."""
        super().log_metrics(metrics_dict, step)
        if self._known and _row_key(self.metrics[-1]) in self._known:
            self.metrics.pop()

    def _check_log_dir_exists(self) -> None:
        """The folder exists and holds the run that is continued."""


def _row_key(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, str(value)) for name, value in row.items() if value not in ("", None)))
