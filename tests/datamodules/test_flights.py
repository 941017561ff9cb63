"""Flights: which rows, which split, what is known before departure, and the user's own flights."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import Flights
from datamodules.clicks.flights import FlightEncoder, _features, _join_weather, _read_asset

HEAD = ["year", "month", "day", "sched_dep_time", "sched_arr_time", "carrier", "flight", "tailnum", "origin", "dest", "distance",
        "time_hour"]  # fmt: skip


@pytest.fixture(scope="module")
def flights() -> Flights:
    data = Flights(batch_size=512)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def raw() -> dict[str, np.ndarray]:
    return _read_asset("flights")


def test_rows_and_rates_are_those_that_were_counted(flights: Flights, raw: dict[str, np.ndarray]) -> None:
    sizes = {split: len(table) for split, table in flights.tables.items()}
    assert len(raw["index"]) == 336_776
    assert sum(sizes.values()) == 327_346 and sizes["test"] == 64_197
    late = sum(int(table.label.sum()) for table in flights.tables.values())
    assert late / 327_346 == pytest.approx(0.2371, abs=5e-5)


@pytest.mark.slow
def test_all_days_may_be_trained_on() -> None:
    none_held_out = Flights(val_days=[])
    none_held_out.setup("fit")
    assert len(none_held_out.dataset("train")) == 263_149 and none_held_out.val_dataloader() == []


def test_splits_are_days_and_share_none(flights: Flights, raw: dict[str, np.ndarray]) -> None:
    arrived = ~np.isnan(raw["arr_delay"])
    day, late = raw["day"][arrived].astype(int), raw["arr_delay"][arrived] > 15
    for split, of_split in (("test", day % 5 == 0), ("val", np.isin(day, [9, 19, 29])),
                            ("train", (day % 5 != 0) & ~np.isin(day, [9, 19, 29]))):  # fmt: skip
        assert np.array_equal(flights.tables[split].label, late[of_split])


def test_no_input_knows_how_the_flight_went(raw: dict[str, np.ndarray]) -> None:
    """Rows with the outcome scrambled have the same inputs; the outcome's columns are not read but for the label."""
    assert {"dep_time", "dep_delay", "arr_time", "air_time"}.isdisjoint(raw)
    few = {name: column[:500].copy() for name, column in raw.items()}
    _join_weather(few)
    encoder = FlightEncoder.of(few)
    before = encoder.encode(few)
    few["arr_delay"] = few["arr_delay"][::-1] + 100
    after = encoder.encode(few)
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_weather_is_that_of_the_airport_and_hour(raw: dict[str, np.ndarray]) -> None:
    weather = _read_asset("weather")
    few = {name: column[100_000:100_050].copy() for name, column in raw.items()}
    _join_weather(few)
    for place in range(50):
        found = np.flatnonzero((weather["origin"] == few["origin"][place]) & (weather["time_hour"] == few["time_hour"][place]))
        assert len(found) == 1 and np.array_equal(weather["temp"][found[0]], few["temp"][place])
    _, numbers = _features(few)
    assert np.isfinite(numbers["temp"]).all()


def test_ids_lie_in_their_fields_and_unseen_ones_are_none(flights: Flights) -> None:
    assert len(flights.field_dims) == flights.columns.fields.index("visib") + 1 and flights.num_dense == 11
    for table in flights.tables.values():
        assert (table.sparse.min(axis=0) >= 0).all() and (table.sparse.max(axis=0) < flights.field_dims).all()
    train = flights.tables["train"].sparse
    for name in ("carrier", "origin", "month", "weekday", "hour"):
        assert train[:, flights.columns.fields.index(name)].min() == 1
    aircraft = flights.columns.fields.index("tailnum")
    counts = np.bincount(train[:, aircraft])
    assert counts[1:].min() >= 10 and counts[0] > 0


@pytest.mark.slow
def test_the_same_table_is_made_again(flights: Flights, tmp_path: Path) -> None:
    flights.write(tmp_path)
    for path in flights.folder().iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def write_csv(path: Path, head: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def test_flights_of_a_file_are_encoded_as_those_of_the_table(
    flights: Flights, raw: dict[str, np.ndarray], tmp_path: Path
) -> None:
    chosen = np.flatnonzero((raw["day"] == 5) & ~np.isnan(raw["arr_delay"]))[:20]
    whole = {"year", "month", "day", "sched_dep_time", "sched_arr_time", "distance"}
    rows = [[int(raw[name][row]) if name in whole else raw[name][row] for name in HEAD] for row in chosen]
    path = write_csv(tmp_path / "flights.csv", HEAD, rows)
    data = Flights(predict_file=path, batch_size=7)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(20))
    expected = flights.tables["test"].batch(list(range(20)))  # the first test day
    assert torch.equal(torch.cat([batch["sparse"] for batch in batches]), expected["sparse"])
    assert torch.equal(torch.cat([batch["dense"] for batch in batches]), expected["dense"])
    assert "label" not in batches[0]
    labelled = write_csv(tmp_path / "known.csv", [*HEAD, "arr_delay"], [[*row, 16] for row in rows])
    assert flights.read_file(labelled).batch([0])["label"].tolist() == [1]


ROW: list[object] = [2013, 5, 5, 900, 1100, "UA", 1, "N1", "EWR", "ORD", 700, "2013-05-05T13:00:00Z"]


@pytest.mark.parametrize(
    ("head", "row", "message"),
    [
        (HEAD[1:], ROW[1:], "lacks the column.s. year; it has month"),
        (HEAD, ROW[:-1], r"1 of 2 rows of .*line 3: it has 11 columns, not 12"),
        (HEAD, [2013, 13, *ROW[2:]], r"line 3: its date does not exist"),
        (HEAD, ["soon", *ROW[1:]], r"line 3: year is 'soon', and no number"),
        (HEAD, [*ROW[:3], "NA", *ROW[4:]], r"line 3: sched_dep_time is missing"),
    ],
)
def test_malformed_flights_are_counted_or_left_out(flights: Flights, head, row, message: str, tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "flights.csv",
        head,
        [ROW[len(ROW) - len(head) :], row, ROW[len(ROW) - len(head) :]][: 3 if head == HEAD else 1],
    )
    if head == HEAD:
        skipping = Flights(on_error="skip")
        with pytest.warns(UserWarning, match="left out"):
            assert skipping.read_file(path).batch([0, 1])["index"].tolist() == [0, 2]
        message = message.replace("1 of 2", "1 of 3")
    with pytest.raises(ValueError, match=message):
        flights.read_file(path)


def test_missing_and_empty_files_are_named(flights: Flights, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        flights.read_file(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="holds no flights"):
        flights.read_file(write_csv(tmp_path / "empty.csv", HEAD, []))
    with pytest.raises(ValueError, match="none divisible by 5"):
        Flights(val_days=[10])
