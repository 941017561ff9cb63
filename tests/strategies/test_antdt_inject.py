"""Stragglers on purpose."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from strategies.antdt.simulation.inject import DutyCycleInjector, SleepInjector, Slowdown, TraceInjector, read_trace


def test_slowdowns_of_a_rank_multiply_while_they_last() -> None:
    injector = SleepInjector(0.01, [Slowdown(1, 4.0, start=10), Slowdown(1, 3.0, start=12, stop=14)], cost_per_batch=0.1)
    delays = [injector.delay(step, 5, rank=1) / 0.15 for step in (9, 10, 12, 13, 14)]
    assert delays == pytest.approx([1, 4, 12, 12, 4])
    assert injector.delay(12, 5, rank=0) == pytest.approx(0.15)


def test_what_is_bound_to_a_process_ends_with_it() -> None:
    injector = SleepInjector(1.0, [Slowdown(0, 5.0, pid_bound=True), Slowdown(0, 2.0)])
    injector.begin(0)
    assert injector.delay(0, 1, 0) == 10
    injector.begin(0, restarted=True)
    assert injector.delay(0, 1, 0) == 2


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_trace_is_replayed_by_time(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    rows = [(0.0, "worker:0", 1.0), (5.0, "worker:0", 3.0), (2.0, "worker:1", 2.0), (9.0, "worker:0", 1.5)]
    if suffix == ".csv":
        path.write_text("time,node,slowdown\n" + "".join(f"{t},{node},{s}\n" for t, node, s in rows))
    else:
        path.write_text("".join(f'{{"time": {t}, "node": "{node}", "slowdown": {s}}}\n' for t, node, s in rows))
    injector = TraceInjector(str(path), cost_per_sample=0.1)
    now = [100.0]
    injector.clock = lambda: now[0]
    seen = []
    for moment in (100.0, 104.9, 105.0, 108.0, 109.5):
        now[0] = moment
        seen.append(injector.delay(0, 10, rank=0))
    assert seen == pytest.approx([1, 1, 3, 3, 1.5])
    now[0] = 101.0
    assert injector.delay(0, 10, rank=1) == pytest.approx(1)  # before its first row
    assert injector.delay(0, 10, rank=7) == pytest.approx(1)  # no row at all


def test_a_bad_trace_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time": 0, "node": "worker:0", "slowdown": 1}\n{"time": 1, "node": "worker:0"}\n')
    with pytest.raises(ValueError, match="row 2"):
        read_trace(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Slowdown(0, 0.0),
        lambda: Slowdown(0, 2.0, start=5, stop=4),
        lambda: SleepInjector(-1.0),
        lambda: DutyCycleInjector(1.0),
        lambda: DutyCycleInjector(0.5, period=0.0),
    ],
)
def test_impossible_numbers_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"must|positive"):
        make()  # type: ignore[operator]


STOPPED = """
import sys, time
from strategies.antdt.simulation.inject import DutyCycleInjector
injector = DutyCycleInjector(0.6, 0.02, ranks=[1], start=1, stop=2)
injector.begin(1)
injector.delay(0, 1, 1)
def gaps(until):  # wall time that passes between two looks at the clock while this process wants to run
    lost, last = 0.0, time.monotonic()
    while last < until:
        now = time.monotonic()
        lost += now - last if now - last > 0.005 else 0.0
        last = now
    return lost
injector.delay(1, 1, 1)
during = gaps(time.monotonic() + 0.6)
injector.delay(2, 1, 1)
assert injector._throttle is None
print(during)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")
def test_a_process_is_stopped_part_of_the_time() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STOPPED], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.15, f"in {time.monotonic() - begun:.1f} s"
