"""Histories as lists of texts: known statistics, and nothing that a candidate's time does not know."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import TextHistories
from datamodules.assets.fetch import list_assets
from datamodules.text_histories.journey_exposures import exposures


def events_file(folder: Path, count: int = 60) -> Path:
    """Events of 4 users in 12 seconds, so that many share a second; some are behaviours, some candidates, some both."""
    draw = random.Random(0)
    lines = ["user_id,item_id,time,text,label,feature"]
    for _ in range(count):
        user, item, time = draw.randrange(4), draw.randrange(8), draw.randrange(12)
        lines.append(
            f"u{user},i{item},{time},{'tea ' * (item + 1)},{draw.choice(['', 0, 1])},{draw.choice(['', 'bought', 'seen'])}"
        )
    path = folder / "events.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.text_histories.text_histories.cache_folder", lambda: tmp_path / "cache")


def small(folder: Path, **arguments: object) -> TextHistories:
    return TextHistories(**{"source": str(events_file(folder)), "history": 3, "batch_size": 4, **arguments})


def whole(rows) -> dict[str, torch.Tensor]:
    return rows.batch(list(range(len(rows))))


def test_movielens_has_its_known_statistics() -> None:
    data = TextHistories()
    log = data.log
    assert round(float((log.label_E == 1).mean()), 3) == 0.554 and len(log.label_E) == 100_000
    assert len(data.atoms) == 1 + 4722 and data.features == ("liked", "disliked")
    assert "liked Toy Story (1995), Animation Children's Comedy" in data.atoms and (data.num_users, data.num_items) == (943, 1682)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [80_000, 10_000, 10_000]
    user_E = log.user_E
    tested, before = set(user_E[90_000:].tolist()), set(user_E[:90_000].tolist())
    assert (len(tested), len(tested - before)) == (166, 76)
    of_order, counts = 0, [Counter() for _ in range(943)]
    for user, feature in zip(user_E.tolist(), log.feature_E.tolist(), strict=True):
        of_order += sum(min(32, count) for count in counts[user].values())
        counts[user][feature] += 1
    # The 4,482,038 of the method's notes count what comes before in the order of time and item, in the same second too.
    assert of_order == 4_482_038 and round(of_order / 4722) == 949
    assert data._rows(0, np.arange(100_000)).num_slots == 4_437_005 and round(data.dedup_factor) == 940


def plain_histories(data: TextHistories) -> dict[tuple[float, int, int], list[list[str]]]:
    """Lists of each candidate by the plain loop: of its user, earlier than it, the last ones."""
    log = data.log
    events = list(
        zip(*(array.tolist() for array in (log.time_E, log.user_E, log.item_E, log.text_E, log.feature_E)), strict=True)
    )
    return {
        (time, user, item): [
            [f"{name} {log.texts[text]}" for when, who, _, text, own in events if (who, own) == (user, place) and when < time][
                -3:
            ]
            for place, name in enumerate(data.features)
        ]
        for time, user, item, *_ in events
    }


@pytest.mark.parametrize("split_by", ["time", "user"])
def test_histories_hold_events_of_an_earlier_time_only(tmp_path: Path, split_by: str) -> None:
    data = small(tmp_path, split_by=split_by, split=(0.5, 0.25, 0.25))
    expected, log, seen = plain_histories(data), data.log, []
    users = {}
    for split in ("train", "val", "test"):
        rows = data.dataset(split)
        batch = whole(rows)
        seen += rows.event_R.tolist()
        users[split] = set(log.user_E[rows.event_R].tolist())
        assert batch["behaviors"].shape == (len(rows), 2, 3) and batch["index"].tolist() == list(range(len(rows)))
        for place, event in enumerate(rows.event_R.tolist()):
            found = [[data.atoms[atom] for atom in own if atom] for own in batch["behaviors"][place].tolist()]
            key = (float(log.time_E[event]), int(log.user_E[event]), int(log.item_E[event]))
            assert found == expected[key]
            assert data.atoms[int(batch["item"][place])] == log.texts[log.text_E[event]]
            assert int(batch["label"][place]) == log.label_E[event] >= 0
        assert ((batch["behaviors"] > 0).int().diff() <= 0).all()  # padding is on the right
    assert sorted(seen) == np.flatnonzero(log.label_E >= 0).tolist() and any(any(lists) for lists in expected.values())
    if split_by == "user":
        assert not users["train"] & (users["val"] | users["test"]) and users["test"]
        assert not whole(data.dataset("test"))["user_id"].any() and whole(data.dataset("train"))["user_id"].all()
    assert data.dataset("val").blank()["index"].tolist() == [-1]
    assert sorted(number for batch in data.test_dataloader() for number in batch["index"].tolist()) == list(range(len(rows)))


def test_days_divide_by_time_and_keep_the_numbers_of_users_and_items(tmp_path: Path) -> None:
    one = small(tmp_path, train_until=6.0, test_until=8.0)
    two = small(tmp_path, train_from=6.0, train_until=8.0, test_until=10.0)
    times = {(name, split): data.log.time_E[data.dataset(split).event_R] for name, data in (("one", one), ("two", two))
             for split in ("train", "test")}  # fmt: skip
    assert times["one", "train"].max() < 6 <= times["one", "test"].min() and times["one", "test"].max() < 8
    assert times["one", "test"].tolist() == times["two", "train"].tolist() and times["two", "test"].min() >= 8
    assert one.val_dataloader() == []
    ids, later = whole(one.dataset("test")), whole(two.dataset("train"))
    for name in ("user_id", "item_id"):
        known = ids[name] > 0
        assert known.any() and (ids[name][known] == later[name][known]).all() and (later[name] > 0).all()
    with pytest.raises(ValueError, match="left to test"):
        small(tmp_path, train_until=100.0).setup("test")


def test_the_users_file_is_scored_with_its_own_behaviours(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "user_id,item_id,time,text,feature\nu1,i1,1,green tea,bought\nu1,i0,2,tea,\nnew,i9,1,milk,\nu1,i2,3,cake,seen\n"
    )
    data = small(tmp_path, predict_file=path)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    lists = [[[data.atoms[atom] for atom in own if atom] for own in row] for row in batch["behaviors"].tolist()]
    assert [data.atoms[atom] for atom in batch["item"].tolist()] == ["milk", "tea"] and "label" not in batch
    assert lists == [[[], []], [["bought green tea"], []]]
    assert batch["user_id"][0] == batch["item_id"][0] == 0 and batch["user_id"][1] == data.log.user_keys.index("u1") + 1
    assert data.atoms[: len(small(tmp_path).atoms)] == small(tmp_path).atoms  # those of the file come behind
    path.write_text("user_id,item_id,time,text,feature\nu1,i1,1,green tea,sold\n")
    with pytest.raises(ValueError, match="behaviours of the list 'sold', the data have bought, seen"):
        small(tmp_path, predict_file=path).setup("predict")


def test_without_lists_behaviours_are_clicks_and_what_was_skipped(tmp_path: Path) -> None:
    path = tmp_path / "plain.csv"
    path.write_text(
        "user_id,item_id,time,text,label\nu,a,1,Cafe\u0301  au lait,1\nu,b,2,milk,0\nu,b,2,milk,NA\n", encoding="utf-8"
    )
    data = small(tmp_path, source=str(path), behavior_template="{feature}: {text}")
    assert data.atoms == ["", "clicked: Café au lait", "skipped: milk", "Café au lait", "milk"]
    assert data.features == ("clicked", "skipped") and len(data.dataset("train")) == 2


def test_the_fingerprint_is_of_templates_not_of_events(tmp_path: Path) -> None:
    prints = [small(tmp_path, **arguments).text_fingerprint for arguments in (
        {}, {"history": 5}, {"behavior_template": "{text}"}, {"item_template": "film: {text}"},
    )]  # fmt: skip
    assert prints[0] == prints[1] == TextHistories().text_fingerprint and len(set(prints)) == 3


def test_bad_input_is_refused_in_a_sentence(tmp_path: Path) -> None:
    head = "user_id,item_id,time,text,label\n"
    rows = {"nothing": "", "blank": "u,a,1, \t,1\n", "label": "u,a,1,tea,2\n", "time": "u,a,NA,tea,1\n", "user": ",a,1,tea,1\n"}
    for name, row in rows.items():
        (tmp_path / f"{name}.csv").write_text(head + "u,a,1,tea,1\n" * bool(row) + row)
    (tmp_path / "columns.csv").write_text("user_id,item_id,time\n")
    (tmp_path / "events.parquet").write_bytes(b"")
    for arguments, message in [
        ({"history": 0}, "history=0 and negatives=4 must be at least 1"),
        ({"negatives": 0}, "negatives=0 must be at least 1"),
        ({"split": (0.5, 0.1, 0.1)}, "three shares"),
        ({"split_by": "item"}, "split_by='item' must be one of"),
        ({"split_by": "user", "train_until": 3.0}, "set split_by to time"),
        ({"item_template": "title"}, r"item_template='title' must hold \{text\}"),
        ({"source": "nowhere"}, "neither movielens-100k nor journey nor a file"),
        ({"source": "nothing.csv"}, "No candidate of .* is left to fit"),
        ({"source": "blank.csv"}, r"1 of 2 rows .*line 3: text is missing"),
        ({"source": "label.csv"}, "line 3: label is 2, not 0 or 1"),
        ({"source": "time.csv"}, "line 3: time is missing"),
        ({"source": "user.csv"}, "line 3: user_id is missing"),
        ({"source": "columns.csv"}, r"lacks the column\(s\) text"),
        ({"predict_file": tmp_path / "none.csv"}, "none.csv does not exist"),
    ]:
        if arguments.get("source", "").endswith(".csv"):
            arguments["source"] = str(tmp_path / arguments["source"])
        with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
            small(tmp_path, **arguments).setup("fit")
        assert len(str(refused.value).replace(str(tmp_path), "folder")) <= 300
    data = small(tmp_path, source=str(tmp_path / "label.csv"), on_error="skip")
    with pytest.warns(UserWarning, match="1 of 2 rows .* are left out"):
        assert len(data.log.label_E) == 1


def test_parquet_needs_the_extra_and_is_read_as_csv_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = tmp_path / "events.parquet"
    parquet.write_bytes(b"")
    with monkeypatch.context() as patched, pytest.raises(ModuleNotFoundError, match=r"lightning-zoo\[recsys\]"):
        patched.setattr("datamodules.clicks.csv_columns.find_spec", lambda name: None)
        _ = small(tmp_path, source=str(parquet)).log
    pyarrow = pytest.importorskip("pyarrow", reason="not measured: pyarrow is not installed")
    from pyarrow.csv import read_csv
    from pyarrow.parquet import write_table

    table = read_csv(events_file(tmp_path))
    write_table(table.append_column("more", pyarrow.array([1] * len(table))), parquet)
    one, two = small(tmp_path), small(tmp_path, source=str(parquet))
    assert one.atoms == two.atoms and (whole(one.dataset("train"))["behaviors"] == whole(two.dataset("train"))["behaviors"]).all()
    write_table(table.set_column(2, "time", pyarrow.nulls(len(table), pyarrow.float64())), parquet)
    with pytest.raises(ValueError, match=r"60 of 60 rows .*line 2: time is missing"):
        _ = small(tmp_path, source=str(parquet)).log


def test_exposures_are_promoted_products_of_visits_and_undo_their_sampling() -> None:
    random = np.random.default_rng(0)
    promoted = np.array([(store, week, product) for store in (1, 2) for week in (1, 2) for product in range(store + 3)])
    promotions = [np.repeat(column, 2) for column in promoted.T]  # displayed and in the mailer: once
    purchases = [random.integers(high, size=80) for high in (6, 4, 4, 9)]  # household, store, week, product
    purchases.append(np.arange(80)[::-1].copy())
    pairs, visits, bought = {tuple(row) for row in promoted.tolist()}, {}, set()
    for household, store, week, product, time in zip(*(column.tolist() for column in purchases), strict=True):
        visits[household, store, week] = min(time, visits.get((household, store, week), time))
        if (store, week, product) in pairs:
            bought.add((household, store, week, product))
    expected = Counter((household, visits[household, store, week], product) for household, store, week, product in bought)
    household, product, time, label, rate = exposures(promotions, purchases, 500, seed=1)
    rows = list(zip(household.tolist(), time.tolist(), product.tolist(), strict=True))
    assert Counter(row for row, is_bought in zip(rows, label.tolist(), strict=True) if is_bought) == expected
    times = {time: key for key, time in visits.items()}
    unseen, number = Counter(row for row, is_bought in zip(rows, label.tolist(), strict=True) if not is_bought), 0
    for row, own in zip(rows, rate.tolist(), strict=True):
        _, store, week = times[row[1]]
        size = sum(pair[:2] == (store, week) for pair in pairs)
        assert own == 500 / size and (store, week, row[2]) in pairs
        if row in unseen:
            number += 1
            assert (*times[row[1]], row[2]) not in bought and abs(unseen[row] - own) < 5 * own**0.5
    assert number == sum(unseen.values()) > 1000
    assert exposures(promotions, purchases, 500, seed=1)[1].tolist() == product.tolist()


@pytest.mark.slow
def test_journey_has_its_known_statistics() -> None:
    pytest.importorskip("pyarrow", reason="not measured: pyarrow is not installed")
    from pyarrow.parquet import read_table

    asset = next(asset for asset in list_assets() if asset.name == "journey")
    if asset.state == "missing":
        pytest.skip("not measured: the asset journey is not there")
    data = TextHistories("journey", history=128, negatives=4)
    log, clicks = data.log, data.log.label_E == 1
    assert int((log.feature_E >= 0).sum()) == 1_469_307 and data.num_features == 6
    # Of 317,901 in the method's notes, 634 are promotions that the files list twice.
    assert (int(clicks.sum()), len(np.unique(log.user_E[clicks])), len(np.unique(log.item_E[clicks]))) == (317_267, 2420, 16_797)
    assert not log.log_odds_E[log.feature_E >= 0].any() and (log.log_odds_E[log.label_E >= 0] < 0).any()
    tables = [read_table(asset.path / f"{name}.parquet") for name in ("promotions", "transactions")]
    promoted, visited = ((each["store_id"].to_numpy() * 100 + each["week"].to_numpy()).astype(np.int64) for each in tables)
    places, counts = np.unique(promoted, return_counts=True)
    visits = np.unique(tables[1]["household_id"].to_numpy().astype(np.int64) * 10**7 + visited) % 10**7
    at = np.searchsorted(places, visits).clip(max=len(places) - 1)
    assert int(counts[at][places[at] == visits].sum()) == 319_201_883
