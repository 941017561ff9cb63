"""Text as characters: what is held out, which windows an epoch has, and what is refused."""

import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import CharacterText, Shakespeare, Text8
from datamodules.text.characters import TextSplits, Windows, _hold_out
from datamodules.text.letters import ALPHABET, decode, encode

PROSE = st.text(ALPHABET, min_size=1)


class Tale(CharacterText):
    """A short text of random letters."""

    def read(self) -> TextSplits:
        ids = torch.randint(0, 27, (500,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return TextSplits(*ids.split([400, 60, 40]))


@pytest.fixture(scope="module")
def shakespeare() -> Shakespeare:
    data = Shakespeare(seq_len=256, batch_size=64)
    data.prepare_data()
    data.setup("fit")
    return data


# Characters and ids


@given(PROSE)
def test_ids_are_the_places_in_the_alphabet(text: str) -> None:
    ids = encode(text)
    assert ids.dtype == torch.uint8
    assert ids.tolist() == [" abcdefghijklmnopqrstuvwxyz".index(character) for character in text]
    assert decode(ids) == decode(ids.long()) == text


@given(PROSE, st.characters(exclude_characters=ALPHABET, exclude_categories=["Cs"]), PROSE)
def test_a_foreign_character_is_named_with_its_place(before: str, foreign: str, after: str) -> None:
    with pytest.raises(ValueError, match="neither a to z nor space") as error:
        encode(before + foreign + after, "tale.txt")
    assert f"tale.txt holds the character {foreign!r} at position {len(before)} " in str(error.value)


# Shakespeare


def test_shakespeare_has_the_size_that_was_counted(shakespeare: Shakespeare) -> None:
    text = "".join(map(decode, shakespeare.splits))
    assert len(text) == 4_748_133
    assert len(set(text.split())) == 23_994
    assert "  " not in text
    assert text.count("by william shakespeare") == 42
    assert [len(part) / len(text) for part in shakespeare.splits] == pytest.approx([0.9, 0.05, 0.05], abs=1e-4)


def test_held_out_shakespeare_was_not_trained_on_and_is_the_same_for_every_seed(shakespeare: Shakespeare) -> None:
    train, held_out = shakespeare.train_text(), "".join(shakespeare.reference_text())
    passages = {held_out[place : place + 40] for place in range(0, len(held_out) - 39, 20)}
    # Oaths, refrains and letters that are read aloud twice.
    assert sum(passage in train for passage in random.Random(0).sample(sorted(passages), 500)) <= 2
    again = Shakespeare(seq_len=128, seed=7)
    assert all(map(torch.equal, again.splits, shakespeare.splits))


@given(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=60), st.floats(0, 1, exclude_max=True))
def test_the_passage_put_back_makes_the_work_whole(words: list[str], place: float) -> None:
    work = "".join(word + " " for word in words)
    rest, val, test = _hold_out(work, place)
    passage = val + test
    assert any(rest[:cut] + passage + rest[cut:] == work for cut in range(len(rest) + 1))
    longest = max(map(len, words)) + 1
    assert abs(len(passage) - 0.1 * len(work)) <= longest and abs(len(val) - len(test)) <= 2 * longest
    assert Counter((rest + passage).split()) == Counter(words), "words are whole"


def test_reference_text_is_the_held_out_text_in_lines(shakespeare: Shakespeare) -> None:
    lines = shakespeare.reference_text()
    assert {len(line) for line in lines} == {256}
    val, test = (decode(part) for part in shakespeare.splits[1:])
    assert "".join(lines[: len(val) // 256]) == val[: len(val) // 256 * 256]
    assert "".join(lines[len(val) // 256 :]) == test[: len(test) // 256 * 256]


# Windows


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 1000))
def test_windows_of_an_epoch_cover_the_text_once_from_an_offset(seq_len: int, extra: int, seed: int) -> None:
    text = torch.arange(2 * seq_len + extra, dtype=torch.uint8)
    windows = Windows(text, seq_len, shift_seed=seed)
    offsets = set()
    for epoch in range(100):
        windows.set_epoch(epoch)
        seen = windows.batch(list(range(len(windows))))["input_ids"].flatten()
        first = int(seen[0])
        assert 0 <= first < seq_len
        assert torch.equal(seen, torch.arange(first, first + len(seen)))
        assert len(text) - len(seen) < 2 * seq_len
        offsets.add(first)
    assert offsets == set(range(seq_len)), "over the epochs, a window starts at every character"
    windows.set_epoch(3)
    again = Windows(text, seq_len, shift_seed=seed)
    again.set_epoch(3)
    assert torch.equal(again[0]["input_ids"], windows[0]["input_ids"])


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_windows_of_evaluation_are_all_that_fit(length: int, seq_len: int, stride: int) -> None:
    windows = Windows(torch.arange(length, dtype=torch.uint8), seq_len, stride)
    starts = [int(windows[index]["input_ids"][0]) for index in range(len(windows))]
    assert starts == [start for start in range(0, length, stride) if start + seq_len <= length]


def test_batches_are_shaped_as_transformers_gives_them() -> None:
    data = Tale(seq_len=16, batch_size=3)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}
        assert all(value.dtype == torch.int64 for value in batch.values())
        assert batch["input_ids"].shape[1] == 16
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert bool((batch["attention_mask"] == 1).all())
        one = loader.dataset[1]
        assert {name: value.shape for name, value in one.items()} == dict.fromkeys(batch, torch.Size([16]))
    assert torch.equal(data.val_dataloader().dataset[2]["input_ids"], data.splits.val[32:48].long())
    data.eval_stride = 4
    assert torch.equal(data.val_dataloader().dataset[2]["input_ids"], data.splits.val[8:24].long())


def texts(loader: Any) -> list[list[str]]:
    return [[decode(ids) for ids in batch["input_ids"]] for batch in loader]


def epoch_of(loader: Any, epoch: int) -> list[list[str]]:
    loader.sampler.set_epoch(epoch)
    return texts(loader)


def test_training_text_differs_between_epochs_and_seeds_and_repeats_for_equal_ones() -> None:
    first = epoch_of(Tale(seq_len=16, batch_size=4, seed=1).train_dataloader(), 0)
    assert first == epoch_of(Tale(seq_len=16, batch_size=4, seed=1).train_dataloader(), 0)
    for seed, epoch in ((1, 1), (2, 0)):
        other = epoch_of(Tale(seq_len=16, batch_size=4, seed=seed).train_dataloader(), epoch)
        assert not {line for batch in first for line in batch} & {line for batch in other for line in batch}


@pytest.mark.parametrize("workers", [0, 1])
def test_training_resumes_in_the_middle_of_an_epoch_with_the_windows_that_were_left(workers: int) -> None:
    expected = epoch_of(Tale(seq_len=16, batch_size=4, seed=1).train_dataloader(), 5)
    cut = Tale(seq_len=16, batch_size=4, seed=1).train_dataloader()
    cut.sampler.set_epoch(5)
    passes = iter(cut)
    seen = [[decode(ids) for ids in next(passes)["input_ids"]] for _ in range(2)]
    resumed = Tale(seq_len=16, batch_size=4, seed=1, num_workers=workers).train_dataloader()
    resumed.load_state_dict(cut.state_dict())
    assert seen + texts(resumed) == expected
    assert len(expected) == 6


def test_two_processes_share_the_windows_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = epoch_of(Tale(seq_len=16, batch_size=4, seed=1).train_dataloader(), 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(Tale, "_share", lambda self, rank=rank: (2, rank))
        ranks.append(epoch_of(Tale(seq_len=16, batch_size=2, seed=1).train_dataloader(), 2))
    assert [[line for pair in zip(*batches, strict=True) for line in pair] for batches in zip(*ranks, strict=True)] == expected


def test_arguments_and_texts_that_do_not_fit_are_refused() -> None:
    for name in ("seq_len", "eval_stride", "predict_samples"):
        with pytest.raises(ValueError, match=f"{name} is 0, and must be at least 1"):
            Tale(**{name: 0})
    for mark in ("a", " ", "??", "", "\t"):
        with pytest.raises(ValueError, match="unknown is "):
            Tale(unknown=mark)
    with pytest.raises(ValueError, match="test text has 40 characters, fewer than two windows of seq_len=21"):
        Tale(seq_len=21).setup("fit")


# Text8


class Mini8(Text8):
    """Text8 with a thousandth of a thousandth of its characters."""

    num_characters = (90, 5, 5)


def mini8(root: Path) -> list[list[int]]:
    return [part.tolist() for part in Mini8(root=root, seq_len=2).splits]


@pytest.fixture
def raw() -> bytes:
    return bytes(np.random.default_rng(0).choice(list(ALPHABET.encode()), 100).tolist())


def test_the_official_file_its_archive_and_the_converted_ids_are_one_text(tmp_path: Path, raw: bytes) -> None:
    folders = {name: tmp_path / name for name in ("plain", "zip", "converted")}
    for folder in folders.values():
        folder.mkdir()
    (folders["plain"] / "text8").write_bytes(raw)
    with zipfile.ZipFile(folders["zip"] / "text8.zip", "w") as archive:
        archive.writestr("text8", raw)
    ids = np.array([ALPHABET.encode().index(byte) for byte in raw], dtype="<u2")
    for name, part in zip(("train", "val", "test"), np.split(ids, [90, 95]), strict=True):
        part.tofile(folders["converted"] / f"{name}.bin")
    (folders["converted"] / "meta.pkl").write_bytes(b"cos\nabort\n(tR.")  # would end the process, were it loaded
    expected = [ids[:90].tolist(), ids[90:95].tolist(), ids[95:].tolist()]
    assert [mini8(folder) for folder in folders.values()] == [expected] * 3
    assert Mini8(root=folders["zip"], seq_len=2).train_text() == raw[:90].decode()


def test_text8_takes_the_real_sizes() -> None:
    assert Text8.num_characters == (90_000_000, 5_000_000, 5_000_000)


def test_damaged_files_of_text8_are_named(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither text8 nor text8\.zip: download http.*text8\.zip and put it"):
        mini8(tmp_path)
    np.zeros(90, dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(FileNotFoundError, match=r"it lacks val\.bin, test\.bin"):
        mini8(tmp_path)
    for name in ("val", "test"):
        np.array([0, 1, 27, 2, 99], dtype="<u2").tofile(tmp_path / f"{name}.bin")
    with pytest.raises(ValueError, match=r"val\.bin holds the id 27 at position 2 "):
        mini8(tmp_path)
    (tmp_path / "val.bin").write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match=r"val\.bin holds 9 bytes, .* 5 ids of 2 bytes"):
        mini8(tmp_path)
    (tmp_path / "text8.zip").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"text8\.zip is not the official text8\.zip"):
        mini8(tmp_path)
    with zipfile.ZipFile(tmp_path / "text8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", raw * 1000)
    whole = (tmp_path / "text8.zip").read_bytes()
    (tmp_path / "text8.zip").write_bytes(whole[:50] + b"\xff" * 50 + whole[100:])
    with pytest.raises(ValueError, match=r"text8\.zip is not the official text8\.zip .*: download it again"):
        mini8(tmp_path)
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("enwik8", raw)
    with pytest.raises(ValueError, match="no item named 'text8'"):
        mini8(tmp_path)
    (tmp_path / "text8").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="holds 99 characters, and text8 has 100: the download may have been cut off"):
        mini8(tmp_path)
    (tmp_path / "text8").write_bytes(raw[:42] + b"7" + raw[43:])
    with pytest.raises(ValueError, match=r"text8 holds the character '7' at position 42 .* 1 bytes in all"):
        mini8(tmp_path)


# Predict


def predict_batch(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    data = Tale(seq_len=8, predict_text=path, **options)
    data.setup("predict")
    (batch,) = list(data.predict_dataloader())
    return batch


def test_samples_are_numbered_when_there_is_no_text() -> None:
    data = Tale(predict_samples=5, batch_size=2)
    data.setup("predict")
    assert [{name: value.tolist() for name, value in batch.items()} for batch in data.predict_dataloader()] == [
        {"index": [0, 1]},
        {"index": [2, 3]},
        {"index": [4]},
    ]


@given(st.lists(st.text(ALPHABET + "?", max_size=8), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_lines_with_gaps_give_what_is_known(tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str) -> None:
    path = tmp_path_factory.mktemp("lines") / "mine.txt"
    path.write_bytes("".join(line + end for line in lines).encode())
    batch = predict_batch(path)
    assert batch["index"].tolist() == list(range(len(lines)))
    assert batch["input_ids"].dtype == torch.int64 and batch["known"].dtype == torch.bool
    for line, ids, known in zip(lines, batch["input_ids"], batch["known"], strict=True):
        full = line.ljust(8, "?")
        assert known.tolist() == [character != "?" for character in full]
        assert decode(ids) == full.replace("?", " ")


def test_another_mark_and_a_missing_last_line_end_are_possible(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a#c")
    batch = predict_batch(tmp_path / "mine.txt", unknown="#")
    assert batch["known"].tolist() == [[True, False, True] + [False] * 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\nhe said\nabCd?\n", "mine.txt, line 3, column 3 holds 'C': write 'c' instead"),
        (b"abc\nwhy!\n", "mine.txt, line 2, column 4 holds '!': only a to z, space, and '?'"),
        ("né".encode(), "mine.txt, line 1, column 2 holds 'é'"),
        (b"ab\tc", r"line 1, column 3 holds '\\t'"),
        (b"abcdefgh\nabcdefghi\n", "mine.txt, line 2 has 9 characters, more than seq_len=8"),
        (b"", "mine.txt is empty"),
        (b"ab\xff", "mine.txt is not UTF-8"),
    ],
)
def test_text_that_cannot_be_filled_in_is_refused_before_sampling(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tale(seq_len=8, predict_text=tmp_path / "mine.txt").setup("predict")


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt, does not exist"):
        Tale(predict_text=tmp_path / "none.txt").setup("predict")
