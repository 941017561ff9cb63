"""The benchmark of the store counts rows that are lost, doubled or broken, and leaves open what is not installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks import atom_store
from benchmarks.record import Record
from zoo.bahe.atom_store import AtomStore


def test_a_trial_measures_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(atom_store, "LONGEST", 0.1)
    bars = {bar["name"]: bar["value"] for bar in json.loads(atom_store.main(["--smoke"]).read_text())["bars"]}
    assert (bars["read_over_lmdb"] is None) == (find_spec("lmdb") is None)
    assert bars["size_over_rows"] == 1 and bars["kills"] == 2
    assert bars["rows_lost"] == bars["rows_doubled"] == bars["rows_broken"] == 0


def test_a_store_that_names_rows_before_they_are_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AtomStore._write_rows
    monkeypatch.setattr(atom_store, "LONGEST", 0.5)
    monkeypatch.setattr(
        AtomStore, "_write_rows", lambda store, row, x_ND: honest(store, row, np.concatenate([x_ND[:-9], x_ND[:9]]))
    )
    record = Record("atom_store", seeds=[0])
    atom_store.kills(record, tmp_path, 2, seed=0)
    broken = {bar["name"]: bar["value"] for bar in record.certificate()["bars"]}["rows_broken"]
    assert broken and broken % 9 == 0
