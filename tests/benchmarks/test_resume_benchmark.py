"""The comparison of a killed run with an undisturbed one sees what resuming could get wrong."""

import sys

import pytest

from benchmarks import resume


def test_a_step_that_was_logged_twice_is_no_exact_resume():
    whole = [(step, 1.0 / (step + 1)) for step in range(4)]
    assert resume.compare(whole, whole, 4) == 0
    assert resume.compare(whole, [*whole[:3], (3, 0.5)], 4) == 0.25
    for log in (whole[:3], [*whole[:2], *whole[1:]], [*whole, (3, 0.25)]):
        with pytest.raises(SystemExit, match="the resumed run did not log each of 4 steps once"):
            resume.compare(whole, log, 4)


def test_a_run_that_ends_before_it_is_killed_shows_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "command", lambda folder, steps: [sys.executable, "-c", ""])
    with pytest.raises(SystemExit, match="after 0 of 2 kills"):
        resume.run(tmp_path, 4, [1, 2])
