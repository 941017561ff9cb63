"""Packed pairs are the padded ones in fewer places: whole answers, in rows of their own batch, in the same order."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from datamodules import Preferences
from datamodules.conversations.preferences import PackedPairs, Pairs

SIDES = ("chosen", "rejected")


def rows_of(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n}" * (n % 4), "chosen": "a" * (n % 7 + 1), "rejected": "b" * (n * 5 % 11 + 1)} for n in range(count)
    ]  # fmt: skip


def preferences(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Preferences:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Preferences(path=path, **{"val_fraction": 0.0, "seq_len": 32, "seed": 0, **options})


def unpacked(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each answer, by its number."""
    found = []
    for number in range(2 * len(batch["index"])):
        here = (batch["packed_answer_ids"] == number) & batch["packed_attention_mask"].bool()
        assert len(set(here.nonzero()[:, 0].tolist())) == 1, "an answer lies in one row"
        assert batch["packed_position_ids"][here].tolist() == list(range(int(here.sum())))
        found.append((batch["packed_input_ids"][here].tolist(), batch["packed_labels"][here].tolist()))
    return found


def padded(batch: Any) -> list[tuple[list[int], list[int]]]:
    answers = []
    for side in SIDES:
        for ids, labels, mask in zip(*(batch[f"{side}_{n}"] for n in ("input_ids", "labels", "attention_mask")), strict=True):
            answers.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
    return answers


def places(batch: Any) -> int:
    return sum(value.numel() for name, value in batch.items() if name.endswith("input_ids"))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12))
def test_rows_hold_each_answer_once_and_whole(tmp_path_factory: Any, sizes: list[tuple[int, int, int]]) -> None:
    rows = [{"prompt": "p" * p, "chosen": "c" * c, "rejected": "r" * r} for p, c, r in sizes]
    pairs = preferences(tmp_path_factory.mktemp("pairs"), rows).splits[0]
    indices = list(range(len(pairs)))
    batch: Any = PackedPairs(pairs, 258, seq_len=32).batch(indices)
    assert unpacked(batch) == padded(Pairs(pairs, 258).batch(indices))
    num_rows, width = batch["packed_input_ids"].shape
    assert width <= 32 and num_rows <= 2 * len(pairs)
    filled = batch["packed_attention_mask"].sum(1)
    assert filled.max() == width, "no wider than the fullest row"
    assert (filled <= 16).sum() <= 1, "no two rows that would fit into one"
    padding = batch["packed_attention_mask"] == 0
    assert (batch["packed_input_ids"][padding] == 258).all() and (batch["packed_labels"][padding] == -100).all()
    assert batch["index"].tolist() == indices


def test_epochs_hold_the_same_pairs_in_less_room(tmp_path: Path) -> None:
    rows = rows_of(40)
    epochs = [list(preferences(tmp_path, rows, batch_size=8, packed=packed).train_dataloader()) for packed in (False, True)]
    assert len(epochs[0]) == len(epochs[1]) == 5
    for plain, packed in zip(*epochs, strict=True):
        assert torch.equal(plain["index"], packed["index"]) and plain["retried"].shape == packed["retried"].shape == (8,)
        assert unpacked(packed) == padded(plain)
        assert next(iter(packed)) == "index", "what counts samples looks at the first entry"
    assert sum(map(places, epochs[1])) < 0.75 * sum(map(places, epochs[0]))


def test_a_single_pair_is_a_batch_of_one_and_references_are_handed_on(tmp_path: Path) -> None:
    rows = [row | {"reference_chosen_logps": -n, "reference_rejected_logps": -1.5} for n, row in enumerate(rows_of(6))]
    data = preferences(tmp_path, rows, batch_size=3, packed=True)
    one: Any = PackedPairs(data.splits[0], 258, 32)[4]
    assert one["index"].tolist() == [4] and one["packed_answer_ids"].unique().tolist() == [0, 1]
    for batch in data.train_dataloader():
        assert torch.equal(batch["reference_chosen_logps"], -batch["index"].float())
        assert batch["reference_rejected_logps"].tolist() == [-1.5] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_training_resumes_with_the_batches_that_were_left(tmp_path: Path, workers: int) -> None:
    def loader(num_workers: int) -> Any:
        return preferences(tmp_path, rows_of(40), batch_size=4, packed=True, num_workers=num_workers).train_dataloader()

    def plain(batch: dict[str, Tensor]) -> dict[str, Any]:
        return {name: value.tolist() for name, value in batch.items()}

    whole = [plain(batch) for batch in loader(0)]
    cut = loader(0)
    first = [plain(batch) for _, batch in zip(range(3), cut, strict=False)]
    resumed = loader(workers)
    resumed.load_state_dict(cut.state_dict())
    assert first + [plain(batch) for batch in resumed] == whole


def test_validation_is_packed_too(tmp_path: Path) -> None:
    data = preferences(tmp_path, rows_of(60), batch_size=4, packed=True, val_fraction=0.3)
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    batches = list(loader)
    assert sorted(index for batch in batches for index in batch["index"].tolist()) == list(range(len(data.splits[1])))
    assert all("packed_input_ids" in batch for batch in batches)
