"""The user's own events, as CSV or parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.base.json_lines import OnError
from datamodules.clicks.csv_columns import Columns, open_columns, read_columns
from datamodules.text_histories.event_log import EventLog, normalized

__all__ = ["read_events"]

_TEXTS = ["user_id", "item_id", "text"]


def read_events(path: Path, on_error: OnError, features: Sequence[str] | None = None) -> EventLog:
    """Read a file with a head or, if its name ends in ``.parquet``, of that form. An event is a row.

    ============  ====================================================================================================
    ``user_id``   user
    ``item_id``   what the event is about
    ``time``      number, in any unit
    ``text``      text of the item, or of what the user did
    ``label``     1 for a click, 0 for none; empty, or no such column, where it is not known: no example, but may be scored
    ``feature``   name of the list that the event is a behaviour of; empty for one that is none. Without such a column, events
                  with a label are behaviours, of the list ``clicked`` or ``skipped``
    ============  ====================================================================================================

    Args:
        path: The file.
        on_error: Treatment of malformed rows.
        features: Names of the lists, of which the file may lack some. ``None``: those that are found, by name.

    Raises:
        FileNotFoundError: No such file.
        ModuleNotFoundError: Parquet without the extra ``recsys``.
        ValueError: A column is missing, or rows are malformed and not skipped.
    """
    with open_columns(path) as file:
        head = file.readline().strip().replace('"', "").split(",")
        file.seek(0)
        names = [*_TEXTS, *(["feature"] if "feature" in head else [])]
        columns = read_columns(
            file, str(path), names, ["time"], required=["time"], optional=["label"], check=_unsound, on_error=on_error
        )
    label_E = columns.get("label", np.full(len(columns["time"]), np.nan))
    if "feature" not in columns:
        columns["feature"] = np.where(label_E == 1, "clicked", np.where(label_E == 0, "skipped", ""))
        features = features or ("clicked", "skipped")
    lists = tuple(features or sorted({*columns["feature"].tolist()} - {""}))
    if not lists:
        raise ValueError(f"{path} has no behaviours: name their lists in the column feature.")
    if unknown := sorted({*columns["feature"].tolist()} - {"", *lists}):
        raise ValueError(f"{path} has behaviours of the list {unknown[0]!r}, the data have {', '.join(lists)[:150]}.")
    number = {"": -1, **{name: place for place, name in enumerate(lists)}}
    feature_E = np.array([number[name] for name in columns["feature"].tolist()], dtype=np.int8)
    users, items, texts = (columns[name] for name in _TEXTS)
    return EventLog.of(lists, users, items, texts, columns["time"], label_E, feature_E)


def _unsound(columns: Columns) -> dict[int, str]:
    """Errors of rows, by their place."""
    label_E = columns.get("label", np.zeros(len(columns["time"])))
    wrong: dict[int, str] = {
        int(place): f"label is {label_E[place]:g}, not 0 or 1"
        for place in np.flatnonzero(~np.isnan(label_E) & (label_E != 0) & (label_E != 1))
    }
    for name in _TEXTS:
        blank = {text for text in np.unique(columns[name]).tolist() if not normalized(text)}
        wrong |= {int(place): f"{name} is missing" for place in np.flatnonzero(np.isin(columns[name], list(blank)))}
    return wrong
