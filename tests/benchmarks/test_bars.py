"""Bars, records and reports: what is not measured never holds, and no table outlives its result."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bars import BARS, Bar, BarError, read_bars, read_commands
from benchmarks.plots import Plot
from benchmarks.record import ROOT, Record, command
from benchmarks.report import CERTIFICATE, Report, main
from benchmarks.tables import Table

YAML = """\
guard:
  command: python -m benchmarks.guard
  bars:
    - {name: share, issues: [2], target: 0.6, better: higher, statement: "share undone"}
    - {name: cost, issues: [2], target: 0.01, better: lower, statement: "time inside"}
"""
PAGE = "# Title\n\n<!-- results:guard -->\n<!-- /results -->\n\nbetween\n\n<!-- results:bars -->\n<!-- /results -->\nend\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small checkout: bars, no result yet, one page with markers."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "bars.yaml").write_text(YAML)
    (tmp_path / "README.md").write_text(PAGE)
    return tmp_path


def measure(root: Path, share: float | None = 0.7, cost: float | None = 0.005) -> Path:
    record = Record(
        "guard",
        seeds=[0, 1, 2],
        tables=[Table("Loss by arm", index="arm", values=["loss"], columns="nfe", digits=1)],
        plots=[Plot("Loss", x="nfe", y="loss", series="arm", log="xy", reference="floor")],
        bars=root / "benchmarks" / "bars.yaml",
    )
    for seed, loss in enumerate([3.0, 1.0, 2.0]):
        for nfe in (5, 10):
            record.row(seed=seed, arm="ours", nfe=nfe, loss=loss * nfe)
            record.row(seed=seed, arm="floor", nfe=nfe, loss=0.5)
            record.row(seed=seed, other_arm="of another table", nfe=nfe, loss=0.1)
    if share is not None:
        record.measure("share", share)
    if cost is not None:
        record.measure("cost", cost)
    return record.save(root / "benchmarks" / "results")


@given(
    target=st.floats(-1e6, 1e6),
    value=st.floats(allow_nan=True) | st.none(),
    better=st.sampled_from(["higher", "lower"]),
)
def test_only_a_measured_value_on_the_right_side_holds(target: float, value: float | None, better: str) -> None:
    holds = Bar("bar", (1,), target, better, "").holds(value)  # type: ignore[arg-type]
    if value is None or math.isnan(value):
        assert not holds
    elif value == target:
        assert holds
    else:
        assert holds == ((value > target) == (better == "higher"))


def test_the_bars_of_all_open_issues_are_listed_and_well_formed() -> None:
    bars = read_bars()
    assert {2, 3, 4, 5, 6, 7} <= {issue for group in bars.values() for bar in group.values() for issue in bar.issues}
    assert all(words.startswith("python -m benchmarks.") for words in read_commands().values())
    assert bars["bfn_solvers_digits"]["ode2m_over_ancestral_at_10_nfe"].target == 0.4


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: a, issues: [2], target: 1, better: more, statement: s}", "better is 'higher' or 'lower', not 'more'"),
        ("{name: a, issues: [2], target: 1e-4, better: lower, statement: s}", "write 1.0e-4"),
        ("{name: a, issues: [2], better: lower, statement: s}", "exactly the fields name, issues, target"),
    ],
)
def test_malformed_bar_is_refused_by_place(tmp_path: Path, entry: str, message: str) -> None:
    path = tmp_path / "bars.yaml"
    path.write_text(f"guard:\n  command: c\n  bars:\n    - {entry}\n")
    with pytest.raises(BarError, match=rf"bars\.yaml, guard, a: .*{message}"):
        read_bars(path)


def test_certificate_is_whole_and_names_no_path(root: Path) -> None:
    text = measure(root).read_text()
    result = json.loads(text)
    assert set(CERTIFICATE) <= set(result)
    assert result["seeds"] == [0, 1, 2]
    assert result["device"]["cores"] >= 1
    assert result["versions"]["torch"]
    assert str(Path.home()) + "/" not in text
    assert str(root) not in text
    assert [(bar["name"], bar["holds"]) for bar in result["bars"]] == [("share", True), ("cost", True)]
    assert sorted(path.name for path in (root / "benchmarks" / "results").iterdir()) == ["guard.json", "guard.png"]


def test_a_path_of_this_machine_is_not_written(root: Path) -> None:
    record = Record("guard", seeds=[0], bars=root / "benchmarks" / "bars.yaml")
    record.row(file=str(ROOT / "x.png"))
    with pytest.raises(ValueError, match=r"result\.rows\[0\]\.file holds a path of this machine"):
        record.save(root / "benchmarks" / "results")
    assert not list((root / "benchmarks" / "results").iterdir())


def test_command_line_shows_names_of_absolute_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["x", "--weights", "/somewhere/private/weights.pt", "--data", "digits", "--into=/private/a=b", "--seed=1"]
    )
    assert command().endswith(" --weights weights.pt --data digits --into=a=b --seed=1")


def test_unknown_bar_name_is_refused_with_the_known_ones(root: Path) -> None:
    record = Record("guard", seeds=[0], bars=root / "benchmarks" / "bars.yaml")
    with pytest.raises(BarError, match=r"no bar 'speed' for the result 'guard'; it has: share, cost"):
        record.measure("speed", 1.0)


def test_smoke_run_never_lands_among_the_results(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    record = Record("guard", seeds=[0], smoke=True, bars=root / "benchmarks" / "bars.yaml")
    assert record.save() == Path("runs/benchmarks/guard.json")
    assert not list((root / "benchmarks" / "results").iterdir())


def test_not_measured_never_holds(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(root, share=None, cost=math.nan)
    assert main([], root) == 0
    assert main(["--check"], root) == 0
    assert "0 holds, 0 does not hold, 2 not measured" in capsys.readouterr().out
    assert main(["--check", "--strict"], root) == 1


def test_strict_fails_on_a_bar_that_does_not_hold_and_only_then(root: Path) -> None:
    measure(root)
    assert main(["--strict"], root) == 0
    measure(root, share=0.5)
    assert main([], root) == 0
    assert main(["--check"], root) == 0
    assert main(["--check", "--strict"], root) == 1


def test_stale_page_is_detected_and_mended(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], root) == 1
    assert main([], root) == 0
    assert "*Not measured:* `python -m benchmarks.guard`" in (root / "README.md").read_text()
    measure(root)
    assert main(["--check"], root) == 1
    assert "README.md is stale: run python -m benchmarks.report." in capsys.readouterr().err
    assert main([], root) == 0
    assert main(["--check"], root) == 0
    text = (root / "README.md").read_text()
    assert "| ours | 10.0 (5.0 to 15.0) | 20.0 (10.0 to 30.0) |" in text
    assert "| share undone (`guard`) | ≥ 0.6 | 0.7 | holds |" in text
    assert "![guard](benchmarks/results/guard.png)" in text
    assert text.startswith("# Title\n") and "\n\nbetween\n\n" in text and text.endswith("<!-- /results -->\nend\n")
    (root / "benchmarks" / "results" / "guard.png").unlink()
    assert main(["--check"], root) == 1


def test_benchmark_without_bars_may_stand_in_a_page_before_it_is_run(root: Path) -> None:
    (root / "benchmarks" / "speed.py").touch()
    (root / "README.md").write_text("<!-- results:speed -->\n<!-- /results -->\n")
    assert main([], root) == 0
    assert "*Not measured:* `python -m benchmarks.speed`." in (root / "README.md").read_text()


def test_card_in_a_folder_points_to_the_plot_from_there(root: Path) -> None:
    measure(root)
    card = root / "zoo" / "guard" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("<!-- results:guard -->\nold numbers\n<!-- /results -->\n")
    main([], root)
    assert "![guard](../../benchmarks/results/guard.png)" in card.read_text()
    assert "old numbers" not in card.read_text()


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- results:nothing -->\n<!-- /results -->\n", "no result, benchmark or entry of bars.yaml is named 'nothing'"),
        ("<!-- results:guard -->\n", "not opened or not closed"),
    ],
)
def test_wrong_marker_is_an_error(root: Path, capsys: pytest.CaptureFixture[str], page: str, message: str) -> None:
    (root / "README.md").write_text(page)
    assert main(["--check"], root) == 1
    assert f"README.md: {'a results marker is ' * message.startswith('not')}{message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 0.5}, "measured against higher 0.5, but bars.yaml says higher 0.6"),
        ({"better": "lower"}, "measured against lower 0.6, but bars.yaml says higher 0.6"),
        ({"name": "renamed"}, "bar renamed: unknown to bars.yaml"),
        ({"value": 0.1}, "says holds = True, which 0.1 does not bear out"),
    ],
)
def test_result_that_contradicts_the_bars_is_an_error(
    root: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    path = measure(root)
    result = json.loads(path.read_text())
    result["bars"][0] |= change
    path.write_text(json.dumps(result))
    main([], root)
    assert main(["--check"], root) == 1
    assert message in capsys.readouterr().err


def test_incomplete_certificate_is_an_error(root: Path) -> None:
    path = measure(root)
    result = json.loads(path.read_text())
    del result["seeds"]
    path.write_text(json.dumps(result))
    assert Report(root).contradictions() == ["results/guard.json: the birth certificate lacks seeds; run it again."]


def test_this_checkout_bears_its_own_report() -> None:
    report = Report()
    assert BARS.exists()
    assert report.contradictions() == []
    assert report.stale() == []
