"""The benchmark of the spike guard: its batches, its corruption, and a run from end to end."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import spike_guard as bench
from benchmarks.spike_guard import FULL, SMOKE, Windows, corrupted, main, split


def test_the_planted_batches_are_those_of_the_specification() -> None:
    assert (FULL.width, FULL.layers, FULL.batch, FULL.length, FULL.steps) == (64, 2, 16, 128, 240)
    assert list(FULL.planted) == list(range(120, 132))


def test_corruption_is_random_bytes_or_another_order() -> None:
    ids_BT = torch.arange(64).repeat(3, 1)
    generator = torch.Generator().manual_seed(0)
    shuffled = corrupted(ids_BT, 1, generator)
    assert torch.equal(shuffled.sort(1).values, ids_BT) and not torch.equal(shuffled, ids_BT)
    assert not torch.equal(shuffled[0], shuffled[1])
    assert corrupted(ids_BT, 0, generator).max() > 200


def test_files_are_held_out_whole_and_always_the_same() -> None:
    sources = {f"{number}.py": f"<{number}>".encode() for number in range(400)}
    train, val = (bytes(part.tolist()) for part in split(sources))
    assert 5 <= val.count(b"<") <= 40 and train.count(b"<") + val.count(b"<") == 400
    assert split(dict(reversed(sources.items())))[1].sort().values.equal(split(sources)[1].sort().values)


def test_planted_batches_differ_from_the_clean_ones_only_there_and_queued_windows_come_once() -> None:
    text = torch.arange(5000).remainder(251).to(torch.uint8)
    clean, planted = (list(Windows(text, SMOKE, 3, steps)) for steps in ((), SMOKE.planted))
    differ = [not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(clean, planted, strict=True)]
    assert [step for step, differs in enumerate(differ) if differs] == list(SMOKE.planted)
    loader, later = Windows(text, SMOKE, 3, ()), []
    for number, batch in enumerate(loader):
        if number == 5:
            first = sorted(batch["index"].tolist())
            loader.requeue(first, 6, 5)
        if number > 5:
            later.append(batch["index"].tolist())
    assert all(sum(ids.count(sample) for ids in later[:6]) == 1 for sample in first)


@pytest.mark.slow
def test_smoke_run_measures_all_bars_and_keeps_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = main(["--smoke"])
    assert path == Path("runs/benchmarks/spike_guard.json") and path.with_suffix(".png").exists()
    result = json.loads(path.read_text())
    rows = {row["arm"]: row for row in result["rows"] if "arm" in row}
    assert rows[bench.CLEAN]["bits_per_byte"] == rows[bench.CLEAN_GUARDED]["bits_per_byte"] < rows[bench.PLANTED]["bits_per_byte"]
    assert rows[bench.PLANTED_GUARDED]["skipped"] > 0
    assert [bar["name"] for bar in result["bars"] if bar["value"] is None] == []
