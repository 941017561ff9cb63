"""The benchmark of packed pairs compares equal losses, on lengths that spread as they are told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dpo_packing


def test_lengths_spread_and_fit() -> None:
    for spread in dpo_packing.SPREADS:
        rows = dpo_packing.rows_of(200, spread)
        lengths = sorted(len(row["chosen"]) for row in rows)
        assert lengths[100] == pytest.approx(96, rel=0.25) and (lengths[0] == lengths[-1]) == (spread == 0)
        assert all(len(row["prompt"]) + len(row[side]) < dpo_packing.SEQ_LEN for row in rows for side in ("chosen", "rejected"))


def test_padding_is_counted_in_both_layouts(tmp_path: Path) -> None:
    rows = [{"prompt": "", "chosen": "a" * 8, "rejected": "b" * 3}, {"prompt": "", "chosen": "c" * 3, "rejected": "d" * 8}]
    padded, packed = (dpo_packing.batches_of(tmp_path, rows, layout, pairs=2) for layout in (False, True))
    assert dpo_packing.padding_of(padded) == pytest.approx(1 - 30 / 40)  # with eos before and behind: 10, 5, 5, 10
    assert dpo_packing.padding_of(packed) == 0


@pytest.mark.slow
@pytest.mark.slow
def test_smoke_run_compares_both_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = dpo_packing.main(["--smoke"])
    assert path == Path("runs/benchmarks/dpo_packing.json")
    rows = json.loads(path.read_text())["rows"]
    assert sum("padded_over_packed" in row for row in rows) == 2
    assert {row["layout"] for row in rows if "layout" in row} == {"padded", "packed"}


def test_different_losses_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    batches_of = dpo_packing.batches_of

    def others(folder: Path, rows: Any, packed: bool, pairs: int) -> Any:
        return batches_of(folder, [{**row, "chosen": "z" * 9} for row in rows] if packed else rows, packed, pairs)

    monkeypatch.setattr(dpo_packing, "batches_of", others)
    with pytest.raises(RuntimeError, match=r"The losses are .*: nothing is compared"):
        dpo_packing.main(["--smoke"])
