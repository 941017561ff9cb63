"""The audit of the final trajectory: what it counts, and that it does not take what was undone for trained."""

from typing import Any

from benchmarks.antdt_faults import SERVER, Outcome, Setting, planned_kills, row
from benchmarks.sample_trace import audit


def step(gen: int, number: int, rank: int, index: list[int], t: float = 0.0, epoch: int = 0) -> dict[str, Any]:
    return {"kind": "step", "gen": gen, "step": number, "rank": rank, "index": index, "epoch": epoch, "t": t}


def start(gen: int, number: int, rank: int) -> dict[str, Any]:
    return {"kind": "start", "gen": gen, "step": number, "rank": rank, "epoch": 0, "t": 0.0, "pid": 1}


TWO_RANKS = [
    start(1, 0, 0), start(1, 0, 1), step(1, 0, 0, [0, 1]), step(1, 0, 1, [2]), step(1, 1, 0, [3, 4]), step(1, 1, 1, [5]),
    start(2, 1, 0), start(2, 1, 1), step(2, 1, 0, [4]), step(2, 1, 1, [5, 3]),
]  # fmt: skip


def test_undone_steps_do_not_count() -> None:
    found = audit(TWO_RANKS, num_samples=6, epochs=1)
    assert (found.steps, found.duplicates, found.missing, found.redone) == (2, 0, 0, 1)


def test_what_is_repeated_or_left_out_is_found() -> None:
    repeated = audit([*TWO_RANKS[:-1], step(2, 1, 1, [5, 4])], num_samples=6, epochs=1)
    assert (repeated.duplicates, repeated.missing) == (1, 1)
    kept = audit([*TWO_RANKS[:6], *({**line, "step": 2} for line in TWO_RANKS[6:])], num_samples=6, epochs=1)
    assert (kept.duplicates, kept.missing) == (3, 0)
    assert audit(TWO_RANKS, num_samples=6, epochs=2).missing == 6


def test_recovery_ends_with_the_first_step_of_a_new_group() -> None:
    lines = [
        start(1, 0, 0), step(1, 0, 0, [0], t=1.0), step(1, 1, 0, [1], t=2.5),
        start(2, 1, 0), step(2, 1, 0, [1], t=4.0), step(2, 2, 0, [2], t=5.0),
    ]  # fmt: skip
    outcome = Outcome([(SERVER, 1.5), (0, 2.0)], lines, seconds=9.0, servers=[1.75])
    assert outcome.recoveries(server=False) == [2.0] and outcome.recoveries(server=True) == [0.25]
    setting = Setting(ranks=1, rows=3, batch=1, epochs=1, every=1, kills=2, seed=0)
    cells = row("group restart", setting, outcome)
    assert (cells["kills"], cells["of_ranks"], cells["of_server"], cells["steps_redone"]) == (2, 1, 1, 1)
    assert (cells["duplicates"], cells["missing"]) == (0, 0)


def test_kills_are_drawn_by_the_seed() -> None:
    def kills(seed: int) -> list[Any]:
        return planned_kills(Setting(ranks=3, rows=1000, batch=10, epochs=3, every=5, kills=20, seed=seed))

    assert kills(0) == kills(0) != kills(1)
    assert {kill.target for kill in kills(0)} == {SERVER, 0, 1, 2}
    assert [kill.step for kill in kills(0)] == sorted({kill.step for kill in kills(0)})
