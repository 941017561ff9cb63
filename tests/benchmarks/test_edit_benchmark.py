"""The benchmark of EDiT: its closed forms, its bar, and that it runs from end to end."""

import json
from pathlib import Path

import pytest

from benchmarks import edit
from benchmarks.record import Record

SETTING = edit.Setting(ranks=4, steps=4000, warmup=0, interval=8, delay=0.1, batch=2, length=16, seed=3)


def test_sleepers_are_as_many_as_the_closed_forms_say() -> None:
    drawn = edit.sleepers(SETTING)
    assert len(drawn) == 4000 and all(0.22 < drawn.count(rank) / 4000 < 0.28 for rank in range(4))
    # Of eight sleeps among four processes, the most that one has is 3.73 on average: multinomial.
    assert edit.most_sleeps(SETTING) == pytest.approx(3.73 / 8, rel=0.05)
    every_step = edit.Setting(**{**vars(SETTING), "interval": 1})
    assert edit.most_sleeps(every_step) == 1.0  # synchronised at each step: DDP's t + d
    whole = edit.Setting(**{**vars(SETTING), "interval": 4000})
    assert edit.most_sleeps(whole) == pytest.approx(0.25, rel=0.1)  # never synchronised: t + d/n


def test_windows_are_a_function_of_their_index() -> None:
    text = edit.library_text(100_000)
    assert len(text) == 100_000 and b"import" in text
    one, other = (edit.Windows(text, 16, 10, seed) for seed in (0, 0))
    assert one[3]["input_ids"].tolist() == other[3]["input_ids"].tolist() != one[4]["input_ids"].tolist()


def test_bar_is_the_worst_median_of_edit_against_ddp(tmp_path: Path) -> None:
    record = Record("edit", seeds=[0, 1, 2])
    for processes, differences in ((2, [0.01, 0.5, -0.2]), (4, [0.03, 0.02, 0.0])):
        for difference in differences:
            record.row(arm=f"{processes} processes, EDiT", processes=processes, loss_over_ddp=difference)
            record.row(arm=f"{processes} processes, A-EDiT", processes=processes, loss_over_ddp=9.0)
    edit.judge(record)
    (bar,) = record.certificate()["bars"]
    assert bar["value"] == 0.02 and bar["holds"]


@pytest.mark.slow
def test_smoke_run_measures_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = json.loads(edit.main(["--smoke"]).read_text())
    assert [row["strategy"] for row in result["rows"]] == list(edit.ARMS)
    for row in result["rows"]:
        assert row["steps_per_second"] > 0 and row["closed_form"] >= row["closed_form_of_rounds"] and 3 < row["loss"] < 8
    assert result["bars"][0]["value"] is not None
