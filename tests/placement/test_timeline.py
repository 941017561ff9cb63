"""Timelines: spans that do not overlap, idle shares, and traces."""

import json
from pathlib import Path

import pytest

from strategies.placement import Span, Timeline, chrome_trace, idle_share


def test_a_wait_interrupts_the_work_that_it_is_a_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 5.0, 6.0, 8.0, 9.0])
    monkeypatch.setattr("time.time", lambda: next(clock))
    timeline = Timeline()
    with timeline("reward", "score"), timeline("wait", "exchange"):
        pass
    with pytest.raises(KeyError), timeline("actor", "train"):
        raise KeyError
    assert list(timeline.spans) == [
        Span("reward", "score", 1, 2), Span("wait", "exchange", 2, 5), Span("reward", "score", 5, 6), Span("actor", "train", 8, 9)
    ]  # fmt: skip
    assert idle_share(timeline.spans) == pytest.approx(5 / 8)  # waits, and 6 to 8, of 1 to 9
    assert idle_share([]) == 1


def test_a_trace_has_the_spans_of_all_ranks_in_microseconds(tmp_path: Path) -> None:
    chrome_trace([[Span("actor", "train", 1.0, 1.5)], [Span("wait", "sync", 2.0, 2.25)]], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(event["name"], event["tid"], event["ts"], event["dur"]) for event in events] == [
        ("actor: train", 0, 1e6, 5e5), ("wait: sync", 1, 2e6, 2.5e5)
    ]  # fmt: skip
