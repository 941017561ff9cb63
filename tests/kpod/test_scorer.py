"""Verdicts: numbers are compared as numbers, misses are wrong; MCC-KD's scorer as it is; Wilson's interval by its equation."""

import math
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.kpod.scorer import CONNECTOR, Verdict, score, wilson_interval


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" 4 * 308.50 = $1,234.00.", "1234"),
        (" $1,234,567 in all", "1234567.0"),
        (": 3.50", "3.5"),
        (" -$5.", "-5"),
        (" $-5.", "-5"),
        (" \u22125", "-5"),
        (" .5 of it", "0.50"),
        (" 1/2", "0.5"),
        (" 7 of 12 apples", "7"),
        ("\n18\nQ: 5 more? Therefore, the answer is 99.", "18"),
        (" x = 9 (as = means)", "9"),
        (" 1,2 and 3", "1"),
        (" 10/4", "2.5"),
        (f" 1{'0' * 5000}.0", f"1{'0' * 5000}"),
    ],
)
def test_number_behind_the_connector_is_compared_as_a_number(answer: str, label: str) -> None:
    assert score(f"1 + 1 = 2. {CONNECTOR}{answer}", label).correct
    assert not score(f"1 + 1 = 2. {CONNECTOR}{answer}", f"{label}1").correct


@given(st.decimals(-(10**7), 10**7, places=2), st.sampled_from(["{:,.2f}", "{:.2f}", "{:,.3f}", "${:,.2f}."]))
def test_every_way_to_write_a_number_is_the_number(number, way: str) -> None:  # type: ignore[no-untyped-def]
    assert score(f"{CONNECTOR} {way.format(number)}", str(number)).correct


@pytest.mark.parametrize("output", ["", "The answer is 5.", f"5. {CONNECTOR} five.", f"5. {CONNECTOR}", f"{CONNECTOR}\n\n"])
def test_a_miss_is_wrong_and_counted(output: str) -> None:
    assert score(output, "5") == Verdict(None, False, counted=True)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [(" (B).", "B"), (" B. A dog", "B"), (": C", "C"), (" a dog.", None), ("", None), (" Zebra", None)],
)
def test_choice_is_the_first_letter_behind_the_connector(answer: str, letter: str | None) -> None:
    verdict = score(f"A or D. therefore, the answer is{answer}", "(B)", "choice")
    assert verdict == Verdict(letter, letter == "B", counted=True)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("Therefore 8 were eaten, so 5 are left", "5"),  # both conclusions count, the last number wins
        ("so 5 are left. Therefore 8 were eaten", "8"),  # "so" reaches to the end of the line
        ("He also has 3 of 7 in 9", "9"),
        ("3 are red. Some 4 are not. 9", "9"),  # "Some" begins with "So"
        ("10, 11 so it is; 12 therefore", "12"),  # no number behind either: the whole line
        ("Therefore, the answer is 5.\nIt took 2 days.", "2"),  # a later line overrides the conclusion
        ("Therefore, the answer is 5.\nThat is all.", "5"),
        ("1,234,567", "567"),
        ("1,234.00", "1234"),
        ("It takes Twelve.", "12"),
        ("twofold", None),
        ("3.50", "3.50"),
    ],
)
def test_mcc_kd_reads_numbers_with_its_quirks(output: str, answer: str | None) -> None:
    assert score(output, answer or "1", "mcc_kd") == Verdict(answer, answer is not None, counted=answer is not None)


def test_mcc_kd_compares_text_and_reads_articles_as_choices() -> None:
    assert not score("It is 3.50", "3.5", "mcc_kd").correct
    assert score("It is 1234", "1,234.00", "mcc_kd").correct
    assert score("Therefore, the answer is (B). A dog", "B", "mcc_kd") == Verdict("A", False)
    assert score("(B) is it, not Z", "B", "mcc_kd") == Verdict("B", True)
    assert score("nothing", "B", "mcc_kd") == Verdict(None, False, counted=False)


def test_dropped_misses_raise_the_accuracy() -> None:
    outputs = [f"{CONNECTOR} 5."] * 3 + ["no number"]
    for scorer, accuracy in (("strict", 3 / 4), ("mcc_kd", 3 / 3)):
        verdicts = [score(output, "5", scorer) for output in outputs]  # type: ignore[arg-type]
        assert sum(verdict.correct for verdict in verdicts) / sum(verdict.counted for verdict in verdicts) == accuracy


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ends_of_the_interval_solve_the_score_equation(trials: tuple[int, int]) -> None:
    correct, count = trials
    z, share = NormalDist().inv_cdf(0.975), correct / count
    for end in wilson_interval(correct, count):
        assert 0 <= end <= 1 and math.isclose((share - end) ** 2, z * z * end * (1 - end) / count, rel_tol=1e-6, abs_tol=1e-12)
    low, high = wilson_interval(correct, count)
    assert low <= share <= high
    other = wilson_interval(count - correct, count)
    assert math.isclose(low, 1 - other[1], abs_tol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("5", "five"), "label 'five' has no number: give choices scorer=choice"),
        (("5", "12", "choice"), "label '12' has no letter A to N: give numbers scorer=strict"),
        (("5", "5", "lenient"), "scorer='lenient' must be one of strict, choice, mcc_kd"),
    ],
)
def test_labels_that_no_output_could_equal_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(*arguments)  # type: ignore[arg-type]


def test_interval_without_trials_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
