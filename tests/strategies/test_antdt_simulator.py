"""The simulator in its limits (section 6, item 10), and that what it says of restarts is accounted for."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import sweep_tuples

from strategies.antdt.control.actions import KillRestart
from strategies.antdt.control.solutions import LBBSP, AntDTND, BackupWorkersSolution, Oracle, Solution, StaticBSP
from strategies.antdt.simulation.simulator import ClusterSim, SimCluster, SimResult
from strategies.antdt.simulation.slowness import NodeSlowness, SlownessModel, read_slowness

CALM = SlownessModel(transient_rate=0.0, persistent_share=0.0)
SMALL = SimCluster(workers=20, local_batch=10, steps=150, cost=0.1, communication=0.05)
QUICK: dict[str, Any] = {"window_transient": 10.0, "min_steps": 1}


def simulate(solution: Solution, slowness: SlownessModel | str = CALM, cluster: SimCluster = SMALL, **options: Any) -> SimResult:
    result = ClusterSim(cluster, solution, slowness, **options).run()
    assert result.ledger == {
        "todo": 0,
        "doing": 0,
        "done": result.timeline[-1][1],
        "lost": 0,
        "repeated": result.ledger["repeated"],
    }
    return result


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 200), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.25]))
@settings(max_examples=30, deadline=None)
def test_without_slowness_a_job_takes_its_closed_form(workers: int, batch: int, samples: int, fixed: float, comm: float) -> None:
    cluster = SimCluster(workers=workers, local_batch=batch, cost=0.125, fixed=fixed, communication=comm)
    result = simulate(StaticBSP(), cluster=cluster, samples=samples)
    steps = math.ceil(samples / (workers * batch))
    last = min(batch, samples - (steps - 1) * workers * batch)  # whoever comes first gets a whole batch, if there is one left
    assert result.steps == steps
    assert result.seconds == pytest.approx((steps - 1) * (fixed + 0.125 * batch + comm) + fixed + 0.125 * last + comm)


def test_with_equal_devices_all_solutions_are_the_same() -> None:
    times = {
        type(solution).__name__: simulate(solution).seconds
        for solution in (StaticBSP(), LBBSP(), AntDTND(**QUICK), BackupWorkersSolution(0), Oracle([0.1] * 20))
    }
    assert times == pytest.approx(dict.fromkeys(times, 150 * (0.1 * 10 + 0.05)))


def test_slow_devices_give_the_closed_forms_of_static_and_oracle() -> None:
    slow = SlownessModel(transient_rate=0.0, persistent_share=0.0, slow_devices=0.25, device_factor=4.0)
    cluster = SimCluster(workers=20, local_batch=13, steps=100, cost=0.1)
    static, oracle, balanced = (
        simulate(s, slow, cluster) for s in (StaticBSP(), Oracle([0.1] * 20), AntDTND(**QUICK, kill_restart=False))
    )
    assert static.seconds == pytest.approx(100 * 0.1 * 13 * 4)
    # Decisions come after steps: the first step is that of equal batches.
    assert oracle.seconds == pytest.approx(0.1 * 13 * 4 + 99 * 0.1 * 16)
    assert static.bubble == pytest.approx(1 - (0.75 + 0.25 * 4) / 4) and oracle.bubble < 0.02
    assert oracle.seconds <= balanced.seconds < 0.5 * static.seconds


def test_no_backup_workers_are_bsp_and_some_drop_what_they_leave() -> None:
    slowness = SlownessModel(persistent_share=0.1)
    static, none, two = (simulate(s, slowness) for s in (StaticBSP(), BackupWorkersSolution(0), BackupWorkersSolution(2)))
    assert none.seconds == static.seconds and none.dropped == 0
    assert two.seconds < static.seconds and two.dropped == 2 * 10 * 149  # from the second step on


def test_without_lockstep_leaders_take_what_stragglers_leave() -> None:
    slowness = SlownessModel(transient_rate=0.0, persistent_share=0.1)
    cluster = SimCluster(workers=20, local_batch=10, steps=400, cost=0.1)
    free, static = (simulate(StaticBSP(), slowness, cluster, mode=mode) for mode in ("asp", "asp_static"))
    nodes = slowness.draw("worker", 20, 0)
    whole = cluster.steps * cluster.global_batch * cluster.cost
    shard = cluster.shard_steps * cluster.local_batch * cluster.cost
    assert static.seconds == pytest.approx(whole / 20 * max(node.factor for node in nodes))
    ideal = whole / sum(1 / node.factor for node in nodes)
    assert ideal <= free.seconds <= ideal + shard * max(node.factor for node in nodes)
    assert free.seconds < static.seconds / 2


@pytest.mark.parametrize("mode", ["bsp", "asp"])
def test_the_same_seed_is_the_same_run_and_another_is_not(mode: Any) -> None:
    model = SlownessModel(transient_rate=1 / 100)
    one, same, other = (simulate(AntDTND(**QUICK), model, mode=mode, seed=seed) for seed in (0, 0, 1))
    assert one == same and one.seconds != other.seconds


PLANTED = SlownessModel(transient_rate=0.0, persistent_share=0.1, persistent_onset=100.0)


@pytest.mark.parametrize(("mode", "group"), sweep_tuples([("bsp", True), ("bsp", False), ("asp", False)]))
def test_planted_stragglers_are_found_and_only_they(mode: Any, group: bool) -> None:
    cluster = SimCluster(workers=20, local_batch=10, steps=2500, cost=0.1, restart_seconds=20.0)
    model = PLANTED
    found = simulate(AntDTND(**QUICK), model, cluster, mode=mode, group_restart=group)
    left = simulate(AntDTND(**QUICK, kill_restart=False), model, cluster, mode=mode, group_restart=group)
    assert found.restarts == found.helpful == 2
    assert found.seconds < left.seconds
    kills = [event for event in found.events if event["action"] == KillRestart.kind]
    # Both are slow from second 100 at the latest; one is restarted at a time (5 % of 20), and the next a window later. If all
    # have to wait for the restart, it comes when the node has cost as much: after 20 s / (1 / 20 of the speed).
    assert kills[0]["t"] < 100 + (600 if group else 300) + 10 * 10
    assert kills[1]["t"] < kills[0]["t"] + 300 + 10 * 10 + 20


def test_the_gate_spares_a_job_that_is_nearly_done() -> None:
    cluster = SimCluster(workers=20, local_batch=10, steps=400, cost=0.1, restart_seconds=200.0)
    gated, ungated = (simulate(AntDTND(**QUICK, cost_gate=gate), PLANTED, cluster, group_restart=True) for gate in (True, False))
    assert gated.restarts == 0 and ungated.restarts > 0 and gated.seconds < ungated.seconds


def test_slow_servers_hold_everybody_until_they_are_restarted() -> None:
    servers = SlownessModel(transient_rate=0.0, persistent_share=0.25)
    cluster = SimCluster(workers=8, local_batch=10, steps=1500, cost=0.1, servers=4, server_seconds=0.2, restart_seconds=20.0)
    static, found = (simulate(s, CALM, cluster, server_slowness=servers) for s in (StaticBSP(), AntDTND(**QUICK)))
    factor = max(node.factor for node in servers.draw("server", 4, 0))
    assert static.seconds == pytest.approx(1500 * (1.0 + 0.2 * factor))
    assert found.restarts == found.helpful == 1
    (kill,) = [event for event in found.events if event["action"] == KillRestart.kind]
    assert found.seconds == pytest.approx(kill["t"] + 20.0 + (1500 - kill["step"]) * 1.2, rel=1e-3)


def test_a_restarted_worker_is_absent_and_its_samples_are_trained_by_others() -> None:
    cluster = SimCluster(workers=20, local_batch=10, steps=2500, cost=0.1, restart_seconds=50.0)
    result = simulate(AntDTND(**QUICK), PLANTED, cluster)
    assert result.timeline[-1][1] == 2500 * 200 and result.steps > 2500
    assert result.repeated == result.dropped == 0


@pytest.mark.slow
def test_a_thousand_workers_are_simulated_with_the_real_controller() -> None:
    cluster = SimCluster(workers=1000, local_batch=100, steps=40)
    model = SlownessModel()
    static, balanced = (simulate(solution, model, cluster) for solution in (StaticBSP(), AntDTND(**QUICK)))
    assert balanced.seconds < static.seconds / 2


# ---- slowness ---------------------------------------------------------------------------------------------------------


def test_transient_slowness_has_its_share_of_time() -> None:
    model = SlownessModel(transient_rate=1 / 100, transient_seconds=25.0, transient_factor=(2.0, 2.0), persistent_share=0.0)
    nodes = model.draw("worker", 200, 0)
    slow = [node.advance(time) == 2.0 for time in range(50, 5000, 50) for node in nodes]
    assert sum(slow) / len(slow) == pytest.approx(25 / 125, rel=0.1)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.sampled_from([0.5, 1.0, 2.0, 4.0])), max_size=6), st.floats(0, 20), st.floats(0.1, 60)
)
@settings(max_examples=50, deadline=None)
def test_work_is_done_when_its_integral_is(changes: list[tuple[float, float]], begin: float, work: float) -> None:
    changes = sorted(changes)
    end = NodeSlowness(changes).finish(begin, work)
    bounds = sorted({begin, end, *(time for time, _ in changes if begin < time < end)})
    done = 0.0
    for lo, hi in itertools.pairwise(bounds):
        factor = next((factor for time, factor in reversed(changes) if time <= lo), 1.0)
        done += (hi - lo) / factor
    assert done == pytest.approx(work)


def test_a_restart_elsewhere_ends_what_has_begun() -> None:
    node = NodeSlowness([(5.0, 2.0)], base=3.0, persistent=(10.0, 4.0))
    assert [node.advance(time) for time in (0.0, 5.0, 10.0)] == [3.0, 6.0, 24.0]
    assert node.move(11.0) and node.factor == 3.0 and not node.move(12.0)
    later = NodeSlowness([(5.0, 2.0), (8.0, 1.0), (20.0, 3.0)], persistent=(30.0, 4.0))
    later.advance(6.0)
    assert not later.move(7.0) and later.factor == 1.0  # neither has begun where it is now
    assert [later.advance(time) for time in (19.0, 20.0, 30.0)] == [1.0, 3.0, 12.0]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_recorded_slowness_is_replayed(tmp_path: Path, suffix: str) -> None:
    rows = [(20.0, "worker:1", 1.0), (5.0, "worker:1", 4.0), (0.0, "server:0", 2.0)]
    path = tmp_path / f"trace.{suffix}"
    if suffix == "csv":
        path.write_text("time,node,slowdown\n" + "".join(f"{time},{node},{factor}\n" for time, node, factor in rows))
    else:
        path.write_text("".join(json.dumps({"time": t, "node": n, "slowdown": f}) + "\n" for t, n, f in rows))
    nodes = read_slowness(path, "worker", 2)
    assert [nodes[1].advance(time) for time in (0.0, 5.0, 19.9, 20.0)] == [1.0, 4.0, 4.0, 1.0]
    assert nodes[0].advance(100.0) == 1.0 and read_slowness(path, "server", 1)[0].factor == 2.0
    cluster = SimCluster(workers=2, local_batch=10, steps=30, cost=0.1)
    # 5 steps of a second, then of 4 seconds until second 20 (the step that begins at 17 is one of them), then of one again.
    assert simulate(StaticBSP(), str(path), cluster).seconds == 5 + 4 * 4 + 21
    with pytest.raises(ValueError, match=r"worker:1 is not among worker:0 to worker:0"):
        read_slowness(path, "worker", 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SimCluster(workers=0),
        lambda: SimCluster(noise=-1.0),
        lambda: SlownessModel(persistent_share=2.0),
        lambda: SlownessModel(transient_seconds=0.0),
        lambda: ClusterSim(SMALL, StaticBSP(), CALM, mode="fast"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        build()


@pytest.mark.parametrize(("lag", "even"), [(0, 1), (1, 2), (3, 4)])
def test_decisions_come_into_force_after_their_lag(lag: int, even: int) -> None:
    """Equal batches take 3 * 4 s a step, the oracle's 6 and 2 samples take 6 s."""
    slow = SlownessModel(transient_rate=0.0, persistent_share=0.0, slow_devices=0.5, device_factor=3.0)
    cluster = SimCluster(workers=2, local_batch=4, steps=10, cost=1.0, lag=lag)
    result = ClusterSim(cluster, Oracle([1.0, 1.0]), slow, decide_every=1e-9).run()
    assert result.seconds == pytest.approx(12 * even + 6 * (10 - even))
    assert result.ledger["done"] == 80
