"""The controller on measurements with a known cause: what it must do, and what it must leave (section 6, item 9)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.antdt.control.actions import Action, AdjustBatch, AdjustLR, BackupWorkers, KillRestart, NoAction, Versioned
from strategies.antdt.control.cluster_view import ClusterView
from strategies.antdt.control.controller import Controller, Sample
from strategies.antdt.control.monitor import Monitor, Windows
from strategies.antdt.control.solutions import LBBSP, AntDTDD, AntDTND, BackupWorkersSolution, Oracle, Solution, StaticBSP
from strategies.antdt.control.solvers import balance_micro

Cost = Callable[[int, float], float]


class Cluster:
    """W workers in lockstep, whose seconds a sample are a function of rank and time; it obeys at once."""

    def __init__(
        self, controller: Controller, cost: Cost, fixed: float = 0.0, device: Callable[[int], str] = lambda rank: "cpu"
    ) -> None:
        self.controller, self.cost, self.fixed = controller, cost, fixed
        self.now, self.step = 0.0, 0
        self.decisions: list[Versioned] = []
        for rank in range(controller.world_size):
            controller.join(f"worker:{rank}", 0.0, device=device(rank))

    def run(self, steps: int, remaining: int = 10**9, obey: bool = True) -> list[Versioned]:
        begun = len(self.decisions)
        for _ in range(steps):
            batch, cap = self.controller.plan["batch"], self.controller.plan["cap"]
            micros = [1 if limit is None else -(-n // limit) for n, limit in zip(batch, cap, strict=True)]
            taken = [self.fixed * c + self.cost(i, self.now) * n for i, (n, c) in enumerate(zip(batch, micros, strict=True))]
            wall = max(taken)
            self.now += wall
            for rank, seconds in enumerate(taken):
                self.controller.report(f"worker:{rank}", [Sample(self.step, batch[rank], 0.0, seconds, wall)], self.now)
            self.step += 1
            self.controller.progress(remaining, self.step)
            made = self.controller.tick(self.now)
            self.decisions += made
            for decision in made if obey else ():
                if isinstance(decision.action, KillRestart):
                    self.now += 30.0
                    for rank in range(self.controller.world_size):
                        self.controller.join(f"worker:{rank}", self.now)
                else:
                    self.controller.applied(decision.version, self.step, self.now)
        return self.decisions[begun:]


def nd(workers: int = 8, batch: int = 80, decide_every: float = 10.0, **options: Any) -> Controller:
    return Controller(AntDTND(**options), world_size=workers, global_batch=batch, decide_every=decide_every)


def kinds(decisions: list[Versioned]) -> list[str]:
    return [decision.kind for decision in decisions]


def test_noise_moves_nothing() -> None:
    drawn = random.Random(0)
    cluster = Cluster(
        nd(window_transient=5, window_persistent=30, unit="steps", decide_every=1.0), lambda i, t: drawn.uniform(0.9, 1.1)
    )
    assert cluster.run(1000) == []


def test_a_slow_worker_gets_less_at_once_and_its_share_back_when_it_is_quick_again() -> None:
    solution = AntDTND(window_transient=5, window_persistent=100, unit="steps", min_steps=1, skip_steps=0)
    controller = Controller(solution, world_size=4, global_batch=64, decide_every=5)
    cluster = Cluster(controller, lambda i, t: 0.004 if i == 3 and t < 3.0 else 0.001)
    (first,) = cluster.run(12)
    assert first.action == AdjustBatch((20, 20, 20, 4), (None,) * 4)
    cluster.now = 3.0
    cluster.run(30)
    assert cluster.decisions[-1].action == AdjustBatch((16, 16, 16, 16), (None,) * 4)


@pytest.mark.parametrize("start", [0.0, 3.3, 9.9, 47.0])
def test_slowness_shorter_than_the_share_asked_for_restarts_nobody(start: float) -> None:
    begin, end = 400.0 + start, 400.0 + start + 0.8 * 300 - 1.1
    cluster = Cluster(nd(cost_gate=False), lambda i, t: (5.0 if i == 2 and begin <= t < end else 1.0) / 10)
    decisions = cluster.run(900)
    assert cluster.now > end + 300
    assert AdjustBatch.kind in kinds(decisions) and KillRestart.kind not in kinds(decisions)


@pytest.mark.parametrize("onset", [0.0, 403.7])
def test_persistent_slowness_is_found_within_the_window_and_a_decision(onset: float) -> None:
    controller = nd(cost_gate=False)
    cluster = Cluster(controller, lambda i, t: (4.0 if i == 2 and t >= onset else 1.0) / 10)
    while not (kills := [d for d in cluster.decisions if d.kind == KillRestart.kind]):
        cluster.run(1, obey=True)
        assert cluster.now < onset + 300 + 10 + 2 * 4.0, "not found in time"
    assert kills[0].node == "worker:2" and cluster.now >= onset + 0.8 * 300


def test_restarts_that_do_not_help_end_soon() -> None:
    controller = nd(window_transient=10, window_persistent=60, min_steps=1, cost_gate=False)
    cluster = Cluster(controller, lambda i, t: (4.0 if i == 2 else 1.0) / 10)  # it lands on the same machine each time
    cluster.run(3000)
    assert kinds(cluster.decisions).count(KillRestart.kind) == 2  # two useless ones, then it is left alone
    assert controller.view(cluster.now).restart_success == 0.5


def test_a_node_is_never_restarted_more_often_than_allowed() -> None:
    controller = nd(window_transient=10, window_persistent=60, min_steps=1, cost_gate=False)
    cured_until = [0.0]

    def cost(rank: int, time: float) -> float:
        return (4.0 if rank == 2 and time > cured_until[0] else 1.0) / 10

    cluster = Cluster(controller, cost)
    for _ in range(6000):
        if any(decision.kind == KillRestart.kind for decision in cluster.run(1)):
            cured_until[0] = cluster.now + 400.0  # each restart helps, for a while
    assert kinds(cluster.decisions).count(KillRestart.kind) == 3


def test_only_as_many_restart_at_once_as_allowed_and_the_worst_first() -> None:
    controller = nd(workers=40, batch=400, cost_gate=False)
    cluster = Cluster(controller, lambda i, t: (1.0 if i < 35 else 2.0 + i / 10) / 10)
    while not (kills := [d for d in cluster.run(1) if d.kind == KillRestart.kind]):
        pass
    assert [kill.node for kill in kills] == ["worker:39", "worker:38"]  # 5 % of 40


@pytest.mark.parametrize(("remaining", "restarts"), [(80 * 20, 0), (80 * 100_000, 1)])
def test_the_gate_compares_what_is_left_with_what_a_restart_takes(remaining: int, restarts: int) -> None:
    cluster = Cluster(nd(), lambda i, t: (4.0 if i == 2 else 1.0) / 10)
    decisions = cluster.run(600, remaining)
    assert min(kinds(decisions).count(KillRestart.kind), 1) == restarts
    assert AdjustBatch.kind in kinds(decisions)


def test_a_node_is_restarted_when_it_has_cost_what_a_restart_takes() -> None:
    cluster = Cluster(nd(), lambda i, t: (4.0 if i == 2 else 1.0) / 10)
    cluster.controller.progress(10**9, 0)
    while not (kills := [d for d in cluster.run(1) if d.kind == KillRestart.kind]):
        pass
    share = 1 - 7.25 / 8  # of a balanced step, for a worker of a quarter of the speed
    assert kills[0].node == "worker:2" and 60 / share <= cluster.now < 60 / share + 50  # a decision, and steps of 4 s before it


def test_a_device_that_is_slow_for_all_is_balanced_and_not_restarted() -> None:
    controller = nd(cost_gate=False)
    cluster = Cluster(controller, lambda i, t: (4.0 if i < 3 else 1.0) / 10, device=lambda i: "old" if i < 3 else "new")
    assert kinds(cluster.run(900)) == ["ADJUST_BS"] and cluster.now > 600


def test_nobody_is_restarted_while_new_nodes_are_hard_to_get() -> None:
    controller = nd()
    controller.busy = True
    cluster = Cluster(controller, lambda i, t: (4.0 if i == 2 else 1.0) / 10)
    assert KillRestart.kind not in kinds(cluster.run(600))


def test_a_slow_server_is_restarted_and_never_balanced() -> None:
    controller = nd(workers=2, batch=20)
    now = 0.0
    kills: list[Versioned] = []
    for step in range(500):
        now += 1.0
        for rank in range(2):
            controller.report(f"worker:{rank}", [Sample(step, 10, 0.0, 0.5, 1.0)], now)
        for server in range(4):
            controller.report(f"server:{server}", [Sample(step, 1, 0.0, 0.4 if server == 1 else 0.1, 1.0)], now)
        controller.progress(10**6, step)
        kills += controller.tick(now)
    assert [kill.node for kill in kills] == ["server:1"]


# ---- arbitration and versions -----------------------------------------------------------------------------------------


class Scripted(Solution):
    """Wants what it is told to want."""

    def __init__(self, wishes: list[Action] | None = None) -> None:
        self.wishes = wishes or []

    def cooldowns(self) -> dict[str, float]:
        return {AdjustBatch.kind: 50.0, KillRestart.kind: 100.0}

    def decide(self, view: ClusterView, now: float) -> list[Action]:
        return list(self.wishes)


def scripted(*wishes: Action, workers: int = 4) -> Controller:
    controller = Controller(Scripted(list(wishes)), world_size=workers, global_batch=4 * workers, decide_every=10.0)
    for rank in range(workers):
        controller.join(f"worker:{rank}", 0.0)
    return controller


def test_one_action_for_all_is_under_way_at_a_time_and_node_actions_wait_for_it() -> None:
    controller = scripted(AdjustBatch((5, 5, 3, 3), (None,) * 4), AdjustLR(0.5))
    assert kinds(controller.tick(0.0)) == ["ADJUST_BS"]
    controller.solution.wishes += [KillRestart("worker:1"), KillRestart("worker:2")]  # type: ignore[attr-defined]
    assert controller.tick(5.0) == []  # not time yet
    assert controller.tick(10.0) == []  # the first is under way
    controller.applied(1, 3, 11.0)
    both = controller.tick(20.0)  # these batches are in force; of four nodes one may restart at a time
    assert [(each.kind, each.node) for each in both] == [("KILL_RESTART", "worker:1"), ("ADJUST_LR", None)]
    controller.applied(3, 4, 31.0)
    assert kinds(controller.tick(40.0)) == ["ADJUST_LR"]
    assert [event["version"] for event in controller.events] == [1, 2, 3, 4]


def test_restarts_are_not_crowded_out_by_batches_that_change_at_each_decision() -> None:
    drawn = random.Random(0)
    controller = nd(window_transient=10, min_steps=1, min_gain=0.0, lambda_transient=1.0)
    cluster = Cluster(controller, lambda i, t: (4.0 if i == 2 else drawn.uniform(0.7, 1.4)) / 10)
    found = kinds(cluster.run(500))
    assert found.count("ADJUST_BS") > 30 and "KILL_RESTART" in found


def test_actions_cool_down() -> None:
    controller = scripted(AdjustBatch((5, 5, 3, 3), (None,) * 4))
    controller.tick(0.0)
    controller.applied(1, 1, 1.0)
    controller.solution.wishes = [AdjustBatch((6, 6, 2, 2), (None,) * 4)]  # type: ignore[attr-defined]
    assert [len(controller.tick(now)) for now in (10.0, 30.0, 50.0, 51.0, 61.0)] == [0, 0, 0, 0, 1]


def test_nodes_hear_what_they_have_not_put_into_force() -> None:
    controller = scripted(AdjustBatch((5, 5, 3, 3), (None,) * 4))
    (first,) = controller.tick(0.0)
    assert controller.actions_after(0, "worker:0") == [first] and controller.actions_after(1, "worker:0") == []
    controller.applied(1, 1, 1.0)
    controller.solution.wishes = [KillRestart("worker:1")]  # type: ignore[attr-defined]
    (kill,) = controller.tick(100.0)
    assert controller.actions_after(1, "worker:1") == [kill] and controller.actions_after(1, "worker:0") == []
    assert controller.actions_after(0, "worker:2") == [first]  # one that comes later still learns of the plan
    controller.join("worker:1", 110.0)
    assert controller.actions_after(1, "worker:1") == []


def test_a_new_group_takes_the_plan_over() -> None:
    controller = scripted(AdjustBatch((5, 5, 3, 3), (None,) * 4))
    controller.tick(0.0)
    for rank in range(4):
        assert controller.tick(10.0 * (rank + 1)) == [] and controller.view(10.0 * (rank + 1)).ready == frozenset()
        controller.join(f"worker:{rank}", 10.0 * (rank + 1))
    assert controller.plan == {"version": 1, "batch": [5, 5, 3, 3], "cap": [None] * 4}
    assert AdjustLR.kind in controller.view(50.0).ready  # nothing is under way any more


@pytest.mark.parametrize("batch", [(4, 4, 4), (4, 4, 4, 5)])
def test_batches_must_be_for_all_and_sum_to_the_global_batch(batch: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be for 4 with 16"):
        scripted(AdjustBatch(batch, (None,) * len(batch))).tick(0.0)


def test_reasons_for_doing_nothing_are_logged_once() -> None:
    controller = scripted(NoAction("too early"))
    for now in range(0, 100, 10):
        assert controller.tick(float(now)) == []
    assert [(event["action"], event["reason"]) for event in controller.events] == [("NONE", "too early")]


def test_the_log_is_json() -> None:
    controller = scripted(AdjustBatch((5, 5, 3, 3), (None, None, 2, 2)))
    controller.tick(0.0)
    (event,) = json.loads(json.dumps(controller.events, allow_nan=False))
    assert set(event) == {"t", "step", "version", "action", "payload", "reason", "metrics"}
    assert Versioned.from_json(event) == Versioned(1, AdjustBatch((5, 5, 3, 3), (None, None, 2, 2)))


@pytest.mark.parametrize(
    "action", [NoAction(), AdjustBatch((1, 2), (None, 3)), AdjustLR(0.5), BackupWorkers(2), KillRestart("server:1")]
)
def test_decisions_survive_the_wire(action: Action) -> None:
    decision = Versioned(7, action, "because")
    assert Versioned.from_json(json.loads(json.dumps(decision.to_json()))) == decision


@pytest.mark.parametrize("data", [{}, {"version": 1, "action": "DANCE", "payload": {}, "reason": ""},
                                  {"version": 1, "action": "ADJUST_LR", "payload": {"speed": 1}, "reason": ""}])  # fmt: skip
def test_what_is_no_decision_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no decision of a controller"):
        Versioned.from_json(data)


# ---- failures ---------------------------------------------------------------------------------------------------------


def test_lack_of_memory_lowers_the_cap_by_a_fifth_and_batches_are_solved_anew() -> None:
    controller = nd(workers=4, batch=80, min_steps=1, skip_steps=0)
    cluster = Cluster(controller, lambda i, t: 0.1)
    cluster.run(3)
    controller.report("worker:1", [], cluster.now, errors=["torch.OutOfMemoryError: CUDA out of memory"])
    (decision,) = controller.tick(cluster.now)  # at once
    assert isinstance(decision.action, AdjustBatch)
    assert decision.action.cap == (None, 16, None, None) and decision.action.batch[1] == 16 and sum(decision.action.batch) == 80
    controller.report("worker:1", [], cluster.now, errors=[{"kind": "OutOfMemoryError", "message": "again"}])
    (decision,) = controller.tick(cluster.now)  # although the first is under way
    assert isinstance(decision.action, AdjustBatch) and decision.action.cap[1] == 12


def test_a_lowered_cap_without_balancing_gives_micro_batches() -> None:
    controller = Controller(StaticBSP(), world_size=2, global_batch=20)
    controller.report("worker:0", [], 1.0, errors=["OutOfMemoryError: no"])
    (decision,) = controller.tick(1.0)
    assert decision.action == AdjustBatch((10, 10), (8, None))


def test_caps_that_hold_too_little_give_way_to_micro_batches() -> None:
    controller = Controller(AntDTND(min_steps=1, skip_steps=0), world_size=2, global_batch=40, caps=8, decide_every=1.0)
    cluster = Cluster(controller, lambda i, t: 0.1 if i else 0.3)
    (decision, *_) = cluster.run(5)
    assert decision.action == AdjustBatch((10, 30), (8, 8))


def test_errors_that_would_come_again_end_the_job_and_burn_no_restarts() -> None:
    controller = nd()
    assert controller.failure is None
    controller.report("worker:1", [], 1.0, errors=["ConnectionResetError: by peer"])
    assert controller.failure is None
    controller.report("worker:1", [], 1.0, errors=["AssertionError: labels"])
    assert controller.failure is not None and "worker:1: AssertionError: labels" in controller.failure
    assert controller.tick(100.0) == []
    with_one = Controller(StaticBSP(), world_size=2, global_batch=2)
    with_one.report("worker:0", [], 1.0, errors=["OutOfMemoryError: no"])
    assert with_one.failure is not None and "with one sample" in with_one.failure


# ---- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: AntDTND(window_transient=10, window_persistent=60, min_steps=1),
        lambda: AntDTDD(warmup_steps=5, skip_steps=1, classes="cluster"),
        lambda: LBBSP(),
        lambda: BackupWorkersSolution(2),
        lambda: Oracle([0.1] * 7 + [0.4]),
    ],
)
def test_a_controller_that_was_replaced_goes_on_as_if_it_had_not_been(make: Callable[[], Solution]) -> None:
    drawn = random.Random(1)
    cost = [[drawn.uniform(0.05, 0.4) for _ in range(8)] for _ in range(60)]

    def build() -> Controller:
        return Controller(make(), world_size=8, global_batch=80, decide_every=5.0)

    def play(replace_at: int | None) -> list[Versioned]:
        controller = build()
        cluster = Cluster(controller, lambda i, t: cost[int(t / 20) % 60][i])
        for step in range(200):
            if step == replace_at:
                state = json.loads(json.dumps(controller.state_dict(), allow_nan=False))
                controller = cluster.controller = build()
                controller.load_state_dict(state)
            cluster.run(1)
        return cluster.decisions

    undisturbed = play(None)
    assert undisturbed
    for replace_at in (1, 57, 110):
        assert play(replace_at) == undisturbed


def test_a_controller_that_knows_more_than_a_checkpoint_keeps_it() -> None:
    controller = scripted(AdjustBatch((5, 5, 3, 3), (None,) * 4))
    early = controller.state_dict()
    controller.tick(0.0)
    controller.load_state_dict(early)
    assert controller.plan["version"] == 1


def test_of_another_world_only_the_seconds_of_a_restart_are_kept() -> None:
    one, other = scripted(), scripted(workers=2)
    one.restart_seconds = 12.5
    other.load_state_dict(one.state_dict())
    assert other.restart_seconds == 12.5 and other.plan["batch"] == [4, 4]


def test_seconds_of_a_restart_are_learned() -> None:
    controller = nd(window_transient=10, window_persistent=60, min_steps=1, cost_gate=False)
    cluster = Cluster(controller, lambda i, t: (4.0 if i == 2 and t < 100 else 1.0) / 10)
    cluster.run(200)
    assert kinds(cluster.decisions).count(KillRestart.kind) == 1
    assert controller.restart_seconds == pytest.approx(60 + 0.3 * (30 - 60))


def test_a_clock_that_begins_anew_does_not_turn_time_back() -> None:
    controller = scripted(AdjustBatch((5, 5, 3, 3), (None,) * 4))
    controller.tick(1000.0)
    controller.applied(1, 1, 1000.0)
    other = scripted(AdjustBatch((6, 6, 2, 2), (None,) * 4))
    other.load_state_dict(controller.state_dict())
    assert other.tick(3.0) == []  # the machine was started anew: 3 seconds after its birth are no second after the decision
    assert len(other.tick(3.0 + 50.0)) == 1


def test_settings_of_a_job_build_its_controller() -> None:
    settings = {
        "solution": {"class_path": "strategies.antdt.control.solutions.AntDTND", "init_args": {"lambda_transient": 1.3}},
        "world_size": 4, "global_batch": 64, "caps": [8, 8, None, None], "controller": {"decide_every": 2.0},
    }  # fmt: skip
    controller = Controller.from_settings(settings)
    assert isinstance(controller.solution, AntDTND) and controller.solution.lambda_transient == 1.3
    assert controller.plan == {"version": 0, "batch": [16] * 4, "cap": [8, 8, None, None]} and controller.decide_every == 2.0
    assert Controller.from_settings({**settings, "solution": controller.solution.init_config}).solution.init_config == (
        controller.solution.init_config
    )
    with pytest.raises(ImportError, match=r"no solution no_such\.Thing"):
        Controller.from_settings({**settings, "solution": {"class_path": "no_such.Thing"}})
    with pytest.raises(TypeError, match="derive it from that class"):
        Controller.from_settings({**settings, "solution": {"class_path": "json.JSONDecoder"}})


@pytest.mark.parametrize("options", [{"world_size": 0}, {"decide_every": 0.0}, {"caps": [1, 2]}, {"caps": 0}])
def test_impossible_jobs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Controller: "):
        Controller(StaticBSP(), **{"world_size": 4, "global_batch": 8, **options})


@pytest.mark.parametrize("name", ["worker:4", "worker:x", "rank 3"])
def test_unknown_nodes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="worker"):
        scripted().join(name, 0.0)


# ---- monitor ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_steps_of_all_at_once_are_steps_one_by_one(seed: int) -> None:
    drawn = random.Random(seed)
    windows = Windows(10, 60, "seconds", min_steps=2, skip_steps=1)
    one, all_at_once = Monitor(3, windows), Monitor(3, windows)
    now, counts = 0.0, [4, 4, 4]
    for step in range(40):
        if drawn.random() < 0.2:
            counts = [drawn.choice([0, 2, 4, 9]) for _ in range(3)]
        micros = [max(1, -(-n // 4)) for n in counts]
        taken = [n * drawn.uniform(0.5, 1.5) for n in counts]
        wall = max(taken) + 0.1
        now += wall
        for node in range(3):
            one.add(node, [Sample(step, counts[node], 0.0, taken[node], wall)], 4, now)
        all_at_once.add_step(counts, micros, taken, wall, now)
        for monitor in (one, all_at_once):
            monitor.advance(now)
    first, second = one.statistics(now), all_at_once.statistics(now)
    for name in ("cost", "fixed", "seconds", "steps", "persistence", "wall", "rate"):
        assert getattr(first, name) == pytest.approx(getattr(second, name)), name
    for left, right in zip(one.columns(), all_at_once.columns(), strict=True):
        assert left == pytest.approx(right)


def test_fixed_costs_are_found_when_batches_change_and_kept_when_they_do_not() -> None:
    solution = AntDTND(window_transient=10, window_persistent=100, unit="steps", min_steps=1, skip_steps=0)
    controller = Controller(solution, world_size=4, global_batch=64, decide_every=5)
    cluster = Cluster(controller, lambda i, t: 0.004 if i == 3 else 0.001, fixed=0.02)
    cluster.run(400)
    view = controller.view(cluster.now)
    assert [worker.fixed for worker in view.workers] == pytest.approx([0.02] * 4, rel=0.02)
    assert [worker.cost for worker in view.workers] == pytest.approx([0.001] * 3 + [0.004], rel=0.05)
    times = [0.02 + (0.004 if i == 3 else 0.001) * n for i, n in enumerate(controller.plan["batch"])]
    assert max(times) - min(times) <= 0.004


def test_a_node_that_slows_down_as_its_batch_changes_is_outvoted() -> None:
    """Its two clouds of points lie on a line without residual, whatever that means: 0.64 s fixed."""
    monitor = Monitor(12, Windows(10, 60, "steps", min_steps=1, skip_steps=0))
    for step in range(40):
        batch, factor = ([10] * 12, 1) if step < 20 else ([12] * 11 + [4], 2)
        for node in range(12):
            seconds = 0.1 * batch[node] * (factor if node == 11 else 1)
            monitor.add(node, [Sample(step, batch[node], 0.0, seconds, 1.0)], None, 0.0)
    found = monitor.statistics(39.0)
    assert found.fixed == pytest.approx([0.0] * 12, abs=1e-9) and found.cost == pytest.approx([0.1] * 11 + [0.2])


def test_batches_that_follow_speed_do_not_look_like_fixed_costs() -> None:
    """In balance all take as long, whatever their batches: a line through a node's steps would have no slope."""
    drawn = random.Random(3)
    episodes = [[drawn.choice([1.0, 1.0, 1.0, 3.0]) for _ in range(8)] for _ in range(100)]
    controller = nd(window_transient=5, window_persistent=100, unit="steps", min_steps=1, kill_restart=False, decide_every=5.0)
    cluster = Cluster(controller, lambda i, t: episodes[int(t / 40) % 100][i] / 10)
    cluster.run(600)
    assert kinds(cluster.decisions).count("ADJUST_BS") > 20
    assert max(worker.fixed for worker in controller.view(cluster.now).workers) < 0.02


def test_a_silent_worker_gets_the_median() -> None:
    controller = nd(workers=3, batch=30, min_steps=1, skip_steps=0)
    for rank, seconds in ((0, 1.0), (1, 3.0)):
        controller.report(f"worker:{rank}", [Sample(0, 10, 0.0, seconds, 3.0)], 3.0)
    assert controller.view(3.0).costs() == ([0.0] * 3, pytest.approx([0.1, 0.3, 0.2]))


# ---- solutions --------------------------------------------------------------------------------------------------------


def mixed(i: int, t: float) -> float:
    return 0.0025 if i < 4 else 0.0075


@pytest.mark.parametrize("classes", ["device_name", "cluster"])
def test_mixed_devices_are_solved_after_the_warm_up_and_then_left_alone(classes: Any) -> None:
    """The known answer of section 2.6 but for the fixed cost, which is 10 ms for all here."""
    solution = AntDTDD(warmup_steps=20, skip_steps=5, classes=classes, caps={"old": 96, "new": 128})
    controller = Controller(solution, world_size=8, global_batch=768, decide_every=1.0)
    cluster = Cluster(controller, mixed, fixed=0.01, device=lambda i: "new" if i < 4 else "old")
    assert cluster.run(24) == []
    cluster.run(400)
    assert 1 <= len(cluster.decisions) <= 2
    best, _ = balance_micro([0.01] * 8, [mixed(i, 0) for i in range(8)], [128] * 4 + [96] * 4, 768, [1] * 8)
    assert controller.plan["batch"] == pytest.approx(best, abs=1)
    assert controller.plan["cap"] == [128] * 4 + [96] * 4
    fixed, cost = ([line[k] for line in solution.state_dict()["lines"]] for k in (0, 1))
    assert fixed == pytest.approx([0.01] * 8, rel=0.05) and cost == pytest.approx([mixed(i, 0) for i in range(8)], rel=0.02)


def test_a_class_that_drifts_is_solved_anew() -> None:
    solution = AntDTDD(warmup_steps=10, skip_steps=0, drift=0.1)
    controller = Controller(solution, world_size=4, global_batch=80, decide_every=1.0)
    slow = [2.0]
    cluster = Cluster(controller, lambda i, t: 0.01 * (slow[0] if i == 3 else 1.0), device=lambda i: f"gpu{i // 3}")
    cluster.run(100)
    assert controller.plan["batch"][3] == pytest.approx(80 / 7, abs=1)
    before = len(cluster.decisions)
    slow[0] = 2.05
    assert cluster.run(60) == []
    slow[0] = 4.0
    cluster.run(200)
    assert len(cluster.decisions) > before and controller.plan["batch"][3] == pytest.approx(80 / 13, abs=1)


def test_caps_of_devices_are_kept_from_the_start_of_the_plan() -> None:
    solution = AntDTDD(warmup_steps=2, skip_steps=0, caps={"small": 4})
    controller = Controller(solution, world_size=2, global_batch=20, decide_every=0.01)
    cluster = Cluster(controller, lambda i, t: 0.1, device=lambda i: ("small", "large")[i])
    cluster.run(10)
    assert controller.plan["cap"] == [4, None]


def test_backup_workers_are_announced_once_with_their_learning_rate() -> None:
    controller = Controller(BackupWorkersSolution(2, "linear"), world_size=8, global_batch=80, decide_every=1.0)
    cluster = Cluster(controller, lambda i, t: 0.1)
    assert [each.action for each in cluster.run(20)] == [BackupWorkers(2), AdjustLR(0.75)]
    with pytest.raises(ValueError, match="less than the 2 workers"):
        Controller(BackupWorkersSolution(2), world_size=2, global_batch=4).tick(0.0)


def test_lb_bsp_follows_speed_at_every_decision() -> None:
    controller = Controller(LBBSP(window=1.0, skip_steps=0), world_size=4, global_batch=52, decide_every=0.1)
    Cluster(controller, lambda i, t: 0.04 if i == 3 else 0.01).run(200)
    assert controller.plan["batch"] == [16, 16, 16, 4]


def test_oracle_knows() -> None:
    controller = Controller(Oracle([1.0, 1.0, 1.0, 4.0]), world_size=4, global_batch=52)
    (decision,) = controller.tick(0.0)
    assert decision.action == AdjustBatch((16, 16, 16, 4), (None,) * 4)
    with pytest.raises(ValueError, match="for 2 workers, there are 4"):
        Controller(Oracle([1.0, 1.0]), world_size=4, global_batch=52).tick(0.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: AntDTND(lambda_transient=0.9),
        lambda: AntDTND(window_transient=400.0),
        lambda: AntDTND(lambda_persistent=1.0),
        lambda: AntDTDD(warmup_steps=0),
        lambda: AntDTDD(caps={"gpu": 0}),
        lambda: LBBSP(smoothing=0.0),
        lambda: BackupWorkersSolution(-1),
        lambda: AdjustLR(0.0),
        lambda: AdjustBatch((1,), (None, None)),
        lambda: AdjustBatch((-1,), (None,)),
    ],
)
def test_impossible_settings_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        build()
