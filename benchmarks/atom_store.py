"""The store of atoms: random reads beside LMDB and Arrow, size, appends, and kills at random moments of an append.

``python -m benchmarks.atom_store`` reads batches of random rows, each back end in its turn, with one thread and from files that
the system has in memory. LMDB and Arrow are measured where they are installed (``pip install lmdb pyarrow``).

Claim: section 5 of the method's notes, that raw memory-mapped rows are read faster than rows of an embedded database.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.bahe.atom_store import AtomStore

DIM = 384
BLOCK = 1000
LONGEST = 0.5
"""Most seconds from the begin of a child to its kill."""

Read = Callable[[np.ndarray], object]


def block(number: int) -> tuple[list[str], np.ndarray]:
    """Texts and vectors of atoms ``BLOCK * number`` and following."""
    texts = [f"liked film {atom}, of some genre" for atom in range(number * BLOCK, (number + 1) * BLOCK)]
    return texts, np.random.default_rng(number).standard_normal((BLOCK, DIM)).astype(np.float16)


def filled(folder: Path, num_rows: int, at_once: int = 50) -> AtomStore:
    """A store with so many rows, a multiple of `BLOCK`."""
    store = AtomStore.create(folder, DIM, {"benchmark": "atom_store"})
    for start in range(0, num_rows // BLOCK, at_once):
        parts = [block(number) for number in range(start, min(start + at_once, num_rows // BLOCK))]
        store.append([text for texts, _ in parts for text in texts], np.concatenate([vectors for _, vectors in parts]))
    return store


def open_lmdb(folder: Path, store: AtomStore, stack: ExitStack) -> tuple[Read, int]:
    """The rows in LMDB by 8-byte number, in one transaction for reading; joined, as a network needs them."""
    import lmdb

    environment = stack.enter_context(lmdb.open(str(folder), map_size=1 << 34))
    with environment.begin(write=True) as transaction:
        for row in range(len(store) + 1):
            transaction.put(row.to_bytes(8, "big"), store.read(np.array([row])).numpy().tobytes(), append=True)
    reading = stack.enter_context(environment.begin(buffers=True))

    def read(row_N: np.ndarray) -> np.ndarray:
        keys = row_N.astype(">u8").tobytes()
        return np.frombuffer(b"".join([reading.get(keys[at : at + 8]) for at in range(0, len(keys), 8)]), "<f2")

    return read, (folder / "data.mdb").stat().st_blocks * 512


def open_arrow(path: Path, store: AtomStore, stack: ExitStack) -> tuple[Read, int]:
    """The rows in an Arrow file, memory-mapped, by its ``take``."""
    import pyarrow

    values = store.read(np.arange(len(store) + 1)).numpy().tobytes()
    column = pyarrow.FixedSizeBinaryArray.from_buffers(pyarrow.binary(2 * DIM), len(store) + 1, [None, pyarrow.py_buffer(values)])
    table = pyarrow.table({"vector": column})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    mapped = stack.enter_context(pyarrow.memory_map(str(path)))
    rows = pyarrow.ipc.open_file(mapped).read_all().column("vector").combine_chunks()
    return lambda row_N: np.frombuffer(rows.take(pyarrow.array(row_N)).buffers()[1], "<f2"), path.stat().st_size


def reads(record: Record, folder: Path, num_rows: int, batch: int, repeats: int) -> None:
    """Time of random batches, with each back end, and its size."""
    store = filled(folder / "read", num_rows)
    out = torch.empty(batch, DIM, dtype=torch.float16)
    exact = (num_rows + 1) * 2 * DIM
    with ExitStack() as stack:
        backends: dict[str, tuple[Read, int]] = {
            "AtomStore": (lambda row_N: store.read(row_N, out), store.stats()["vector_bytes"])
        }
        if find_spec("lmdb"):
            backends["LMDB"] = open_lmdb(folder / "lmdb", store, stack)
        if find_spec("pyarrow"):
            backends["Arrow"] = open_arrow(folder / "rows.arrow", store, stack)
        times: dict[str, list[float]] = {name: [] for name in backends}
        for repeat in range(repeats + 2):  # the first two bring the files into memory
            row_N = np.random.default_rng(repeat).integers(num_rows, size=batch) + 1
            expected = store.read(row_N).numpy().tobytes()
            for name, (read, _) in backends.items():
                begin = time.perf_counter()
                found = read(row_N)
                seconds = time.perf_counter() - begin
                if np.asarray(found).tobytes() != expected:
                    raise SystemExit(f"{name} reads other rows than the store.")
                if repeat >= 2:
                    times[name].append(seconds)
                    record.row(backend=name, batch=repeat - 2, milliseconds=seconds * 1000, size=backends[name][1] / exact)
    for package in ("lmdb", "pyarrow"):
        if find_spec(package):
            record.row(package=package, version=metadata.version(package))
    median = {name: statistics.median(values) for name, values in times.items()}
    record.measure("read_over_lmdb", median["AtomStore"] / median["LMDB"] if "LMDB" in median else None)
    record.measure("read_over_arrow", median["AtomStore"] / median["Arrow"] if "Arrow" in median else None)
    record.measure("size_over_rows", store.stats()["vector_bytes"] / exact)


def appends(record: Record, folder: Path, num_rows: int, repeats: int) -> None:
    """Seconds that 1,000 new texts take, beside their encoding, and a look for them among those that are there."""
    store = filled(folder / "append", num_rows)
    found = []
    for repeat in range(repeats):
        texts, vectors = block(num_rows // BLOCK + repeat)
        begin = time.perf_counter()
        store.append(store.missing([*texts, *block(0)[0]]), vectors)
        found.append(time.perf_counter() - begin)
        record.row(append="1,000 texts", rows=num_rows, repeat=repeat, seconds=found[-1])
    sizes = store.stats()
    record.row(append="index, bytes a text", rows=num_rows, index_bytes=sizes["index_bytes"] / sizes["texts"])
    record.measure("append_seconds", statistics.median(found))


def append_until_killed(folder: Path, done: Connection) -> None:
    """Append block after block, and tell after each."""
    store = AtomStore.open(folder)
    done.send(len(store))
    while True:
        store.append(*block(len(store) // BLOCK))
        done.send(len(store))


def kills(record: Record, folder: Path, number: int, seed: int) -> None:
    """Kill a process that appends, at random moments; count rows that are lost, doubled, or not what was written."""
    path = folder / "killed"
    AtomStore.create(path, DIM, {"benchmark": "atom_store"}, shard_rows=7 * BLOCK + 1)
    draw, context = random.Random(seed), multiprocessing.get_context("fork")
    lost = doubled = broken = cut = 0
    for kill in range(number):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=append_until_killed, args=(path, theirs))
        child.start()
        told = ours.recv()
        time.sleep(draw.uniform(0, LONGEST))
        child.kill()
        child.join()
        while ours.poll():
            told = ours.recv()
        store = AtomStore.open(path)
        count = store.verify()
        parts = [block(each) for each in range(-(-max(count, told) // BLOCK))]
        texts = [text for part, _ in parts for text in part]
        missing = store.missing(texts)
        there = [text for text in texts if text not in set(missing)]
        expected = np.concatenate([np.zeros((0, DIM), np.float16), *(vectors for _, vectors in parts)])[: len(there)]
        lost += max(0, told - len(there))
        doubled += count - len(there)
        broken += int((store.read(store.rows(there)).numpy() != expected).any(axis=1).sum()) + count % BLOCK
        behind = store.stats()["vector_bytes"] - (count + 1) * 2 * DIM
        cut += behind > 0
        record.row(kill=kill, texts=count, told=told, bytes_behind=behind)
    for name, value in (("kills", number), ("rows_lost", lost), ("rows_doubled", doubled), ("rows_broken", broken)):
        record.measure(name, value)
    record.row(kills=number, after_rows_before_index=cut, texts=count)


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atom_store", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--smoke", action="store_true", help="small stores and few kills; the result is not kept")
    options = parser.parse_args(arguments)
    small = options.smoke
    torch.set_num_threads(1)
    record = Record("atom_store", seeds=[options.seed], smoke=small, tables=[
        Table("Random batches of rows of 384 numbers, and size over rows x bytes", "backend", ["milliseconds", "size"]),
        Table("Appends, seconds beside encoding; bytes of the index", "append", ["rows", "seconds", "index_bytes"], digits=3),
        Table("Kills at random moments, and those between rows and index", "kills", ["after_rows_before_index", "texts"]),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reads(record, folder, 2 * BLOCK if small else 200 * BLOCK, 500 if small else 12_800, 2 if small else 30)
        appends(record, folder, 2 * BLOCK if small else 1000 * BLOCK, 2 if small else 7)
        kills(record, folder, 2 if small else 20, options.seed)
    return record.save()


if __name__ == "__main__":
    main()
