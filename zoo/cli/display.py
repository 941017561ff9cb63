"""The progress, the summary and the results that a run prints, without what a user cannot act on."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback, ModelSummary, ProgressBar, RichModelSummary, RichProgressBar
from rich import get_console
from rich.table import Table
from typing_extensions import override

__all__ = ["display_callbacks", "print_results", "silence"]

#: Beginnings of warnings about calls inside of libraries, or about what the zoo does on purpose.
SILENT = (
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "You have overridden `on_before_batch_transfer`",  # a module that checks batches before they move
    "The `srun` command is available",
    ".*does not have many workers",
)


def silence() -> None:
    """Hide warnings that concern the insides of libraries, and Lightning's advertisements."""
    for message in SILENT:
        warnings.filterwarnings("ignore", message=message)
    for package in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{package}.utilities.rank_zero").addFilter(_no_advertisement)


def display_callbacks(config: Mapping[str, Any]) -> list[Callback]:
    """Progress bar and model summary for a trainer, but for those that its options turn off or replace.

    Args:
        config: Options of the trainer.
    """
    given = config.get("callbacks") or []
    ours = (("enable_progress_bar", ProgressBar, RunProgressBar), ("enable_model_summary", ModelSummary, ParameterSummary))
    return [
        callback()
        for option, kind, callback in ours
        if config.get(option) is not False and not any(isinstance(other, kind) for other in given)
    ]


def print_results(results: Sequence[Mapping[str, float]], stage: str) -> None:
    """Print the metrics of an evaluation, with their whole names."""
    table = Table(f"{stage} metric".capitalize(), *(f"value {n}" if len(results) > 1 else "value" for n in range(len(results))))
    table.columns[0].overflow = "fold"  # on a narrow terminal
    for name in sorted({name for result in results for name in result}):
        table.add_row(name, *(f"{result[name]:.6g}" if name in result else "" for result in results))
    if table.row_count:
        get_console().print(table)


class RunProgressBar(RichProgressBar):
    """Progress bar that counts epochs without an end where the run ends by steps."""

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        endless = self.trainer.max_epochs == -1
        return f"Epoch {current_epoch} " if endless else super()._get_train_description(current_epoch)


class ParameterSummary(RichModelSummary):
    """Summary of a model's parts and parameters; FLOPs only where they were counted."""

    @staticmethod
    @override
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the table."""
        shown = [(name, cells) for name, cells in summary_data if name != "FLOPs" or total_flops]
        table = Table(*(name.strip() for name, _ in shown), header_style="bold magenta")
        for row in zip(*(cells for _, cells in shown), strict=True):
            table.add_row(*row)
        get_console().print(table)
        get_console().print(
            f"{trainable_parameters:,} of {total_parameters:,} parameters are trained; they take {model_size:,.1f} MB."
        )


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()
