"""A journal that is cut at any byte, as a kill would, replays to the ledger of the changes that are whole in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategies.antdt.sharding.journal import Journal, JournalError, OtherDataset, RecordedLedger
from strategies.antdt.sharding.ledger import StaleGeneration

SETTINGS: dict[str, Any] = {
    "dataset": {"n": 60, "name": "clicks", "seed": 0, "shuffle": "global", "shard": 1, "epochs": 3},
    "semantics": "at_least_once",
    "tail_factor": 2.0,
}


def act(recorded: RecordedLedger, choices: list[int]) -> list[dict[str, Any]]:
    """Drive a ledger by numbers; the state after each change that was written."""
    recorded.configure(SETTINGS)
    states = [state(recorded)]
    epoch = 0

    def note() -> None:
        if states[-1] != state(recorded):
            states.append(state(recorded))

    gens = dict.fromkeys((0, 1), recorded.begin({0: ("a", 1), 1: ("b", 1)}))
    note()
    for seq, choice in enumerate(choices, 2):
        worker, what = choice % 2, choice // 2 % 7
        held = [(sid, g) for sid, g in recorded.ledger._grants.items() if g.worker == worker]
        if what <= 1:
            if "end" in recorded.fetch(worker, gens[worker], "ab"[worker], seq, epoch, [4, 8], 5):
                epoch += 1
        elif what == 2 and held:
            recorded.commit(worker, gens[worker], [[held[0][0], held[0][1].committed + 1]])
        elif what == 3 and held:
            recorded.release(worker, gens[worker], held[-1][0], held[-1][1].committed)
        elif what == 4:
            gens[worker] = recorded.join(worker, "ab"[worker], seq)
        elif what == 5:
            recorded.restore(recorded.ledger.snapshot())
            epoch = recorded.ledger.epoch
        elif what == 6:
            recorded.keep_controller({"windows": [choice]})
        note()
    return states


def state(recorded: RecordedLedger) -> dict[str, Any]:
    return json.loads(  # type: ignore[no-any-return]
        json.dumps([recorded.settings, recorded.ledger.state_dict(), sorted(recorded.answers.items()), recorded.controller])
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=st.lists(st.integers(0, 10**6), max_size=40), compact_every=st.sampled_from([1, 2, 7, 10_000]))
def test_replay_gives_the_identical_ledger(tmp_path_factory: Any, choices: list[int], compact_every: int) -> None:
    folder = tmp_path_factory.mktemp("journal")
    recorded = RecordedLedger(Journal(folder, compact_every))
    states = act(recorded, choices)
    recorded._journal.close()  # type: ignore[union-attr]  # as a kill does: nothing more is written
    again = RecordedLedger(Journal(folder))
    assert state(again) == states[-1]
    again.ledger.check()


@settings(max_examples=15, deadline=None)
@given(choices=st.lists(st.integers(0, 10**6), min_size=5, max_size=25), data=st.data())
def test_journal_cut_at_any_byte_is_the_ledger_of_some_moment(
    tmp_path_factory: Any, choices: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    recorded = RecordedLedger(Journal(folder))
    states = act(recorded, choices)
    recorded._journal.close()  # type: ignore[union-attr]
    lines = folder / "journal.jsonl"
    content = lines.read_bytes()
    first = content.index(b"\n") + 1  # before the first line the ledger is about nothing
    lines.write_bytes(content[: data.draw(st.integers(first, len(content)))])
    again = RecordedLedger(Journal(folder))
    assert state(again) in states
    again.ledger.check()
    again.fail(0)  # and it can be written on
    again._journal.close()  # type: ignore[union-attr]
    assert state(RecordedLedger(Journal(folder))) == state(again)


def test_kill_between_the_two_renames_of_a_compaction_loses_and_repeats_nothing(tmp_path: Path) -> None:
    recorded = RecordedLedger(Journal(tmp_path))
    states = act(recorded, [0, 1, 4, 5, 2, 0, 1])
    before = (tmp_path / "journal.jsonl").read_bytes()
    recorded.compact()
    assert (tmp_path / "journal.jsonl").read_bytes() == b""
    recorded._journal.close()  # type: ignore[union-attr]
    (tmp_path / "journal.jsonl").write_bytes(before)  # the state is there already, the old lines too
    assert state(RecordedLedger(Journal(tmp_path))) == states[-1]


def test_two_servers_cannot_write_one_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalError, match="another server writes the journal"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_journal_of_another_data_set_is_refused_with_both_named(tmp_path: Path) -> None:
    recorded = RecordedLedger(Journal(tmp_path))
    recorded.configure(SETTINGS)
    recorded.close()
    again = RecordedLedger(Journal(tmp_path))
    again.configure(SETTINGS)
    with pytest.raises(OtherDataset, match=r"(?s)clicks.*flights.*another folder"):
        again.configure(SETTINGS | {"dataset": SETTINGS["dataset"] | {"name": "flights"}})
    with pytest.raises(OtherDataset):
        again.configure(SETTINGS | {"dataset": SETTINGS["dataset"] | {"seed": 1}})  # another order is another ledger
    again.configure(SETTINGS | {"dataset": SETTINGS["dataset"] | {"epochs": 9}})  # more of the same is not
    assert again.ledger.remaining == 540


def test_damage_that_no_kill_causes_is_reported(tmp_path: Path) -> None:
    recorded = RecordedLedger(Journal(tmp_path))
    act(recorded, [0, 1, 0, 1])
    recorded._journal.close()  # type: ignore[union-attr]
    lines = tmp_path / "journal.jsonl"
    content = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join([*content[:2], "{broken\n", *content[3:]]))
    with pytest.raises(JournalError, match=r"journal.jsonl, line 3 is damaged"):
        Journal(tmp_path)
    lines.write_text("".join([content[0], content[2]]))  # a fetch by workers that have never joined
    with pytest.raises(JournalError, match="cannot be repeated"):
        RecordedLedger(Journal(tmp_path))
    (tmp_path / "journal.lock").unlink()
    (tmp_path / "ledger.json").write_text('{"format": 99}')
    with pytest.raises(JournalError, match="format"):
        Journal(tmp_path)


def test_end_of_the_job_leaves_nothing_to_replay(tmp_path: Path) -> None:
    recorded = RecordedLedger(Journal(tmp_path))
    act(recorded, [0, 1])
    recorded.close(job_is_over=True)
    assert not RecordedLedger(Journal(tmp_path)).configured


def test_generations_of_the_next_job_are_none_of_the_former(tmp_path: Path) -> None:
    """A process that is left of it is refused, though it is still a member by its number of worker."""
    first = RecordedLedger(Journal(tmp_path))
    first.configure(SETTINGS)
    assert [first.begin({0: ("a", seq)}) for seq in (1, 2)] == [1, 2]
    first.close(job_is_over=True)
    second = RecordedLedger(Journal(tmp_path))
    second.configure(SETTINGS)
    assert second.begin({0: ("b", 1)}) == 3
    with pytest.raises(StaleGeneration, match="asks as a member of generation 2"):
        second.fetch(0, 2, "a", 3, 0, [4, 8], 5)
    expected = state(second)
    second._journal.close()  # type: ignore[union-attr]  # killed
    third = RecordedLedger(Journal(tmp_path))
    assert state(third) == expected
    third.close(job_is_over=True)
    RecordedLedger(Journal(tmp_path)).close(job_is_over=True)  # nobody came
    fourth = RecordedLedger(Journal(tmp_path))
    fourth.configure(SETTINGS)
    assert fourth.begin({0: ("c", 1)}) == 4


def test_kill_while_the_end_of_the_job_is_written_leaves_the_job(tmp_path: Path) -> None:
    recorded = RecordedLedger(Journal(tmp_path))
    expected = act(recorded, [0, 4, 1])[-1]
    recorded._journal.close()  # type: ignore[union-attr]
    (tmp_path / "generation").write_text("7")
    assert state(RecordedLedger(Journal(tmp_path))) == expected
