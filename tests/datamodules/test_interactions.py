"""Interactions: known statistics, and batches that say what leaving one out says."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules import Interactions
from datamodules.interactions import interactions as module
from datamodules.interactions.journey import journey_log, read_journey
from datamodules.interactions.k_core import k_core
from datamodules.text.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pairs of atomic files: 4 books, 3 films; three users who take everything but one item, and one with two items."""
    items = {"books": ["Emma", "Ulysses", "", "Dune"], "films": ["Jaws", "Alien", "Dune"]}
    turn = [("books", 0), ("films", 0), ("books", 1), ("films", 1), ("books", 2), ("films", 2), ("books", 3)]
    for name, titles in items.items():
        rows = [f"{name[0]}{number}\t{title}\n" for number, title in enumerate(titles)]
        (tmp_path / f"{name}.item").write_text("item_id:token\ttitle:token_seq\n" + "".join(rows))
        rows = []
        for user in range(3):
            taken = [step for place, step in enumerate(turn) if place != user]
            rows += [f"u{user}\t{name[0]}{item}\t{time}\n" for time, (kind, item) in enumerate(taken) if kind == name]
        rows += [f"short\t{name[0]}0\t5\n"]
        (tmp_path / f"{name}.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(rows))
    return tmp_path


def small(folder: Path, **arguments: object) -> Interactions:
    return Interactions(**{"source": str(folder), "tokenizer": "byte", "k_core": (1, 1), "batch_size": 2, **arguments})


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 6)), max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_core_is_that_of_the_plain_loop(pairs: list[tuple[int, int]], user_k: int, item_k: int) -> None:
    left = list(enumerate(pairs))
    while True:
        users, items = (Counter(pair[side] for _, pair in left) for side in (0, 1))
        kept = [(place, (user, item)) for place, (user, item) in left if users[user] >= user_k and items[item] >= item_k]
        if kept == left:
            break
        left = kept
    user_N, item_N = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    assert k_core(user_N, item_N, user_k, item_k).tolist() == [place for place, _ in left]


@pytest.mark.parametrize(
    ("last", "users", "items", "interactions", "examples", "active"),
    [
        (None, 943, [165, 350, 194, 361, 279], 99_287, 96_458, [0, 5, 5, 81, 852]),
        (20, 942, [109, 269, 152, 234, 139], 17_851, 15_025, [6, 23, 59, 317, 537]),
    ],
    ids=["all", "sparse"],
)
def test_movielens_has_its_known_statistics(last, users, items, interactions, examples, active) -> None:
    data = Interactions(tokenizer=None, last=last)
    data.prepare_data()
    data.setup("fit")
    log = data.interaction_log
    assert (len(log.user_keys), np.diff(log.domain_offsets).tolist(), len(log.item_N)) == (users, items, interactions)
    assert (len(data.train_dataloader().dataset), log.active_domains) == (examples, active)
    assert int(data.catalogue.counts.sum()) == examples
    test = data.test_dataloader().dataset.dataset
    assert len(test) == users
    tail = test.batch(list(range(users)))["is_tail"]
    assert last is None or int(tail.sum()) == 107
    assert (np.diff(log.time_N)[np.diff(log.user_N) == 0] >= 0).all()


def histories(data: Interactions, split: str, by_domain: bool) -> list[tuple[list[int], int]]:
    """Leaving one out, by the plain loop."""
    log, found = data.interaction_log, []
    for begin, end in zip(log.user_offsets[:-1], log.user_offsets[1:], strict=True):
        items = log.item_N[begin:end].tolist()
        places = {"train": range(1, len(items) - 2), "val": [len(items) - 2], "test": [len(items) - 1]}[split]
        for place in places:
            domain = log.item_domain[items[place]]
            before = [item for item in items[:place] if not by_domain or log.item_domain[item] == domain]
            if before or split != "train":
                found.append((before[-data.max_history :], items[place]))
    return sorted(found) if split == "train" else found


@pytest.mark.parametrize("history", ["mixed", "domain"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches_are_those_of_leaving_one_out(folder: Path, history: str, split: str) -> None:
    data = small(folder, history=history, max_history=3)
    data.prepare_data()
    loader = getattr(data, f"{split}_dataloader")()
    rows = loader.dataset.dataset
    batch = rows.batch(list(range(len(rows))))
    found = [
        ([item for item in row if item >= 0], target)
        for row, target in zip(batch["history"].tolist(), batch["target"].tolist(), strict=True)
    ]
    assert (sorted(found) if split == "train" else found) == histories(data, split, history == "domain")
    tokenizer, catalogue = load_tokenizer("byte"), data.catalogue
    for row, ids, mask in zip(batch["history"], batch["input_ids"], batch["attention_mask"], strict=True):
        text = "".join(f"{catalogue.titles[item] or 'None'}; " for item in row.tolist() if item >= 0)
        assert tokenizer.decode(ids[: int(mask.sum())]) == text
        assert (ids[int(mask.sum()) :] == tokenizer.pad_id).all() and (mask.diff() <= 0).all()
    offsets = catalogue.domain_offsets
    assert ((offsets[batch["domain"]] <= batch["target"]) & (batch["target"] < offsets[batch["domain"] + 1])).all()
    assert batch["index"].tolist() == list(range(len(rows)))
    if split != "train":
        log = data.interaction_log
        for user, seen in enumerate(batch["seen"].tolist()):
            stop = log.user_offsets[user + 1] - (2 if split == "val" else 1)
            assert [item for item in seen if item >= 0] == log.item_N[log.user_offsets[user] : stop].tolist()
        assert rows.blank()["index"].tolist() == [-1]


def test_short_users_are_left_out_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert small(folder).interaction_log.user_keys == ["u0", "u1", "u2"]
    assert "1 users" in caplog.text and "fewer than 3" in caplog.text
    assert small(folder, k_core=(3, 3)).interaction_log.user_keys == ["u0", "u1", "u2"]


def test_catalogue_gives_tokens_of_titles(folder: Path) -> None:
    catalogue = small(folder, max_title_tokens=4).catalogue
    assert catalogue.titles == ["Emma", "Ulysses", "", "Dune", "Jaws", "Alien", "Dune"]
    assert catalogue.domain_offsets.tolist() == [0, 4, 7]
    ids, mask = catalogue.tokens(torch.tensor([2, 5]))
    assert [load_tokenizer("byte").decode(row) for row in ids] == ["None", "Alie"]
    assert (ids.dtype, mask.tolist()) == (torch.int64, [[1] * 4] * 2)
    assert "input_ids" not in small(folder, tokenizer=None).predict_dataloader().dataset.dataset.batch([0])


def test_training_sees_no_other_domain_and_no_cold_item(folder: Path) -> None:
    data = small(folder, train_domains=["films"], eval_domains=["books"])
    rows = data.train_dataloader().dataset.dataset
    batch = rows.batch(list(range(len(rows))))
    assert batch["target"].min() >= 4 and ((batch["history"] < 0) | (batch["history"] >= 4)).all()
    assert (data.test_dataloader().dataset.dataset.batch([0])["domain"] == 0).all()
    cold = small(folder, cold_fraction=0.4)
    log = cold.interaction_log
    limit = np.quantile(log.time_N, 0.6)
    expected = [log.time_N[log.item_N == item].min() > limit for item in range(7)]
    assert cold.catalogue.is_cold.tolist() == expected and 0 < sum(expected) < 7
    assert not cold.catalogue.counts[cold.catalogue.is_cold].any()
    rows = cold.train_dataloader().dataset.dataset
    assert not cold.catalogue.is_cold[rows.batch(list(range(len(rows))))["history"].clamp(min=0)].any()


def test_every_example_comes_once_and_a_pass_resumes(folder: Path) -> None:
    data = small(folder, num_val_users=2, eval_negatives=3)
    assert [batch["index"].tolist() for batch in data.test_dataloader()] == [[0, 1], [2]]
    assert [batch["candidates"].shape for batch in data.val_dataloader()] == [(2, 3)]
    loader = data.train_dataloader()
    passes = iter(loader)
    _ = next(passes)
    state, rest = loader.state_dict(), [batch["index"].tolist() for batch in passes]
    again = small(folder).train_dataloader()
    again.load_state_dict(state)
    assert [batch["index"].tolist() for batch in again] == rest and rest


def test_prediction_takes_whole_histories(folder: Path) -> None:
    data = small(folder)
    rows = data.predict_dataloader().dataset.dataset
    log, batch = data.interaction_log, rows.batch([0, 1, 2])
    assert batch["user"] == ["u0", "u1", "u2"] and batch["domain"].tolist() == [-1] * 3 and "target" not in batch
    assert [item for item in batch["history"][1].tolist() if item >= 0] == log.item_N[
        log.user_offsets[1] : log.user_offsets[2]
    ].tolist()
    single = small(folder, history="domain", eval_domains=["films"]).predict_dataloader().dataset.dataset
    assert single.batch([0, 1])["domain"].tolist() == [1, 1] and len(single) == 3


def test_prediction_takes_the_users_own_histories(folder: Path) -> None:
    path = folder / "mine.jsonl"
    path.write_text('{"user": "me", "history": ["Jaws", "Solaris", "b0"], "domain": "films"}\n{"user": 7, "history": ["f1"]}\n')
    data = small(folder, predict_histories=path)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["history"][:, :3].tolist() == [[4, -1, 0], [5, -1, -1]]
    assert load_tokenizer("byte").decode(batch["input_ids"][0]) == "Jaws; Solaris; Emma; "
    assert (batch["user"], batch["domain"].tolist(), batch["seen"].tolist()) == (["me", "7"], [1, -1], [[4, -1, 0], [5, -1, -1]])
    path.write_text('{"user": "me", "history": []}\n')
    with pytest.raises(ValueError, match='line 1: it has no "history"'):
        small(folder, predict_histories=path).setup("predict")


def test_bad_input_is_refused_in_a_sentence(folder: Path) -> None:
    for arguments, message in [
        ({"train_domains": ["music"]}, "train_domains names 'music'"),
        ({"k_core": (1, 2), "last": 1}, "No interaction of .* remains"),
        ({"k_core": (3, 4)}, "No interaction|has no items"),
        ({"domains": ["music"]}, "has no file music.inter"),
        ({"source": "nowhere"}, "neither one of"),
        ({"max_history": 0}, "max_history=0 must be at least 1"),
        ({"cold_fraction": 1.0}, "cold_fraction=1.0"),
        ({"users_fraction": 0.0}, "users_fraction=0.0"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
            small(folder, **arguments).setup("fit")
        assert len(str(refused.value).replace(str(folder), "folder")) <= 300
    (folder / "books.item").write_text("item_id:token\ttitle:token_seq\n")
    with pytest.raises(ValueError, match=r"domain 'books' of .* has no items"):
        small(folder).setup("fit")
    (folder / "books.inter").write_text("user_id:token\titem_id:token\n")
    with pytest.raises(ValueError, match="lacks the column"):
        small(folder).setup("fit")


def test_fingerprint_and_cache_follow_the_data(folder: Path) -> None:
    one, two, other = small(folder), small(folder), small(folder, last=5)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert all(len(digest) == 64 for digest in one.fingerprint.values())
    before = one.fingerprint["data"]
    (folder / "books.item").write_text((folder / "books.item").read_text().replace("Emma", "Emma &amp; Co"))
    assert small(folder, clean=True).catalogue.titles[0] == "Emma & Co"
    assert small(folder).fingerprint["data"] != before


def test_users_are_sampled_whole() -> None:
    whole, part = (Interactions(tokenizer=None, k_core=(1, 1), users_fraction=share).interaction_log for share in (1.0, 0.1))
    assert 50 < len(part.user_keys) < 150 and set(part.user_keys) < set(whole.user_keys)
    lengths = dict(zip(whole.user_keys, np.diff(whole.user_offsets), strict=True))
    assert [lengths[key] for key in part.user_keys] == np.diff(part.user_offsets).tolist()


def test_journey_is_the_first_purchase_of_a_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    products = {
        "product_id": [30, 10, 20, 40, 50],
        "department": ["GROCERY", "SALAD BAR", "GROCERY", "COSMETICS", "GROCERY"],
        "product_category": ["ICE", "SALAD", "ICE", "PAINT", None],
        "product_type": ["CUBED", "MIXED", "CUBED", "RED", None],
        "brand": ["National", "Private", "National", "National", "National"],
    }
    household, product = np.array([7, 7, 7, 7, 7, 7, 2]), np.array([20, 30, 10, 40, 50, 99, 10])
    raw = journey_log(products, household, product, np.arange(7)[::-1].copy())
    assert raw.titles == ["CUBED, ICE, National", "MIXED, SALAD, Private"]
    rows = sorted(zip(raw.user_N.tolist(), raw.item_N.tolist(), raw.time_N.tolist(), raw.domain_N.tolist(), strict=True))
    assert (raw.user_keys, rows) == (["2", "7"], [(0, 1, 0, 4), (1, 0, 5, 0), (1, 1, 4, 4)])
    monkeypatch.setattr("datamodules.interactions.journey.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-zoo\[recsys\]"):
        read_journey(tmp_path)


def test_exact_repeats_count_once(folder: Path) -> None:
    before = small(folder).interaction_log.digest()
    path = folder / "films.inter"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    assert small(folder).interaction_log.digest() == before
