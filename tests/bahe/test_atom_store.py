"""The store of atoms: rows are those that were written, whatever happens while they are written."""

import json
import os
import resource
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.bahe import atom_store as module
from zoo.bahe.atom_store import AtomStore

DIM = 4
FINGERPRINT = {"encoder": "tiny", "sha256_low": "a" * 64, "n_low": 3, "pooling": "mean"}


def vectors(texts: list[str]) -> np.ndarray:
    """Numbers that tell texts apart."""
    return np.array([[len(text), sum(map(ord, text)) % 997, ord(text[0]), 1] for text in texts], dtype=np.float32).reshape(
        -1, DIM
    )


@pytest.fixture
def store(tmp_path: Path) -> AtomStore:
    return AtomStore.create(tmp_path / "store", DIM, FINGERPRINT, shard_rows=3)


def contents(folder: Path) -> dict[str, list[float]]:
    """Vectors by text, of a store that holds what `vectors` says and nothing else."""
    store = AtomStore.open(folder)
    assert store.verify() == len(store)
    with closing(sqlite3.connect(folder / "index.sqlite")) as index:
        texts = [text for (text,) in index.execute("SELECT text FROM atoms ORDER BY row")]
    assert store.rows(texts).tolist() == list(range(1, len(texts) + 1)) and len(set(texts)) == len(texts)
    assert (store.read(store.rows(texts)).numpy() == vectors(texts)).all() and not store.read(np.zeros(1, dtype=int)).any()
    return dict(zip(texts, store.read(store.rows(texts)).tolist(), strict=True))


@settings(max_examples=20)
@given(st.lists(st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=3), max_size=5), max_size=4))
def test_appends_in_any_order_give_one_row_a_text(tmp_path_factory: pytest.TempPathFactory, appends: list[list[str]]) -> None:
    store = AtomStore.create(tmp_path_factory.mktemp("any") / "store", DIM, FINGERPRINT, shard_rows=3)
    for texts in appends:
        distinct = list(dict.fromkeys(texts))
        assert store.missing([*texts, ""]) == [text for text in distinct if text not in contents(store.folder)]
        assert store.append(texts, vectors(texts)).tolist() == store.rows(texts).tolist()
        assert not store.missing(texts)
    assert list(contents(store.folder)) == list(dict.fromkeys(text for texts in appends for text in texts))
    assert store.stats()["shards"] == 1 + len(store) // 3


def test_rows_are_read_in_any_shape_and_into_a_given_buffer(store: AtomStore) -> None:
    texts = list("abcdefgh")
    store.append(texts, torch.from_numpy(vectors(texts)))
    expected = np.concatenate([np.zeros((1, DIM)), vectors(texts)])
    rows, out = torch.tensor([[8, 0], [3, 3], [2, 5]]), torch.ones(3, 2, DIM, dtype=torch.float16)
    assert store.read(rows, out) is out and (out.numpy() == expected[rows]).all()
    assert store.read(np.zeros((0, 2), dtype=int)).shape == (0, 2, DIM)
    other = AtomStore.open(store.folder)
    store.append(["i"], vectors(["i"]))
    assert other.read(np.array([9])).tolist() == vectors(["i"]).tolist()  # appended by another after it was opened
    for row in (-1, 10):
        with pytest.raises(IndexError, match=f"rows 0 to 9, not {row}"):
            other.read(np.array([row]))
    with pytest.raises(KeyError, match="no row for 'zz'"):
        store.rows(["a", "zz"])


def test_float16_keeps_vectors_to_half_of_its_last_digit(tmp_path: Path) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    store = AtomStore.create(tmp_path / "store", 64, {})
    back = store.read(store.append([str(number) for number in range(50)], x)).float()
    assert ((back - x).norm() / x.norm()) < 3e-4


NEW = [f"new {number}" for number in range(7)]


def append_and_die(folder: Path, lines: int) -> bool:
    """Append in a child that is killed before the given line of the store's own code; whether it lived on."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        store, done = AtomStore.open(folder), 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal done
            if frame.f_code.co_filename != module.__file__:
                return None
            done += event == "line"
            if done == lines:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        store.append(NEW, vectors(NEW))
    finally:
        os._exit(0)


def test_a_kill_at_any_line_of_an_append_leaves_the_rows_of_before_or_those_of_after(store: AtomStore) -> None:
    store.append(["old", "older"], vectors(["old", "older"]))
    before, killed = contents(store.folder), []
    undisturbed = store.folder.with_name("undisturbed")
    shutil.copytree(store.folder, undisturbed)
    AtomStore.open(undisturbed).append(NEW, vectors(NEW))
    after = contents(undisturbed)
    while True:
        folder = store.folder.with_name(f"store-{len(killed)}")
        shutil.copytree(store.folder, folder)
        if append_and_die(folder, 4 * len(killed) + 1):
            break
        killed.append(contents(folder))
        AtomStore.open(folder).append(NEW, vectors(NEW))
        for path in undisturbed.glob("*.f16"):
            assert path.read_bytes() == (folder / path.name).read_bytes()
        shutil.rmtree(folder)
    first = killed.index(after)
    assert first > 8 and killed == [before] * first + [after] * (len(killed) - first)


def test_a_full_disk_leaves_the_store_as_it_was(store: AtomStore) -> None:
    store.append(["old"], vectors(["old"]))
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    texts = [f"{number} " * 50 for number in range(200)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (20, (store.folder / "index.sqlite").stat().st_size + 10):  # for some of the rows; for them, not for the index
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError, match=r"could not be written .* the store is as it was") as refused:
                store.append(texts, vectors(texts))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(str(refused.value).replace(str(store.folder), "store")) <= 300
        assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before
    store.append(texts, vectors(texts))
    assert len(contents(store.folder)) == 201


def test_a_second_writer_is_refused_and_readers_are_not(store: AtomStore) -> None:
    store.append(["old"], vectors(["old"]))
    with closing(sqlite3.connect(store.folder / "index.sqlite", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(BlockingIOError, match="another process appends"):
            store.append(["new"], vectors(["new"]))
        assert AtomStore.open(store.folder).rows(["old"]).tolist() == [1]
    assert store.append(["new"], vectors(["new"])).tolist() == [2]


def test_what_is_damaged_or_another_store_is_refused_in_a_sentence(store: AtomStore, tmp_path: Path) -> None:
    store.append(list("abcde"), vectors(list("abcde")))
    folder = store.folder

    def refused(error: type[Exception], message: str, **arguments: Any) -> None:
        with pytest.raises(error, match=message) as raised:
            AtomStore.open(folder, **arguments).verify()
        assert len(str(raised.value).replace(str(folder), "store")) <= 300

    assert AtomStore.open(folder, dict(FINGERPRINT)).dim == DIM
    other = {**FINGERPRINT, "n_low": 5, "sha256_low": "b" * 64}
    message = r"holds vectors of sha256_low=a{24}, n_low=3, and those of sha256_low=b{24}, n_low=5 are needed"
    refused(ValueError, message, fingerprint=other)
    for name, damage, message in [
        ("vectors-00001.f16", b"12", "vectors-00001.f16 has 2 bytes, its rows 24"),
        ("vectors-00000.f16", np.full(3 * DIM, np.nan, "<f2").tobytes(), "row 0 is not"),
        ("index.sqlite", b"nothing" * 1000, "index.sqlite: file is not a database"),
        ("manifest.json", b"{", "manifest.json is damaged"),
        (
            "manifest.json",
            b'{"format": 2, "dim": 4, "dtype": "float16", "shard_rows": 3, "fingerprint": {}}',
            "its format is not 1",
        ),
    ]:
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(damage)
        refused(ValueError, message)
        (folder / name).write_bytes(kept)
    with closing(sqlite3.connect(folder / "index.sqlite")) as index, index:
        index.execute("UPDATE atoms SET text = 'z' WHERE row = 3")
    refused(ValueError, "row 3 of the index")
    for path in folder.glob("*.f16"):
        path.unlink()
    refused(ValueError, "vectors-00000.f16 has 0 bytes")
    (folder / "index.sqlite").unlink()
    refused(ValueError, "index.sqlite: unable to open")
    with pytest.raises(FileExistsError, match="is not empty"):
        AtomStore.create(folder, DIM, FINGERPRINT)
    (folder / "manifest.json").unlink()
    refused(FileNotFoundError, "zoo store build")
    assert not list(tmp_path.glob(".*"))


def test_texts_and_vectors_that_cannot_be_stored_are_refused(store: AtomStore) -> None:
    for texts, x, message in [
        (["a", " \t\n"], np.zeros((2, DIM)), "1 of 2 texts are only white space .*number 1"),
        (["a"], np.zeros((1, DIM + 1)), r"shape \(1, 4\); given are some of shape \(1, 5\)"),
        (["a"], np.full((1, DIM), 1e6), "4 values that are not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.append(texts, x)
    assert json.loads((store.folder / "manifest.json").read_text())["fingerprint"] == FINGERPRINT and len(store) == 0
