"""Spelling accuracy: what counts as a word, and the same score whatever the batches and ranks."""

import builtins
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from datamodules import Shakespeare
from zoo.metrics import SpellingAccuracy, TextScores, english_dictionary, spelling_accuracy, text_scores, vocabulary
from zoo.metrics.spelling import words_of

LINES = st.lists(st.text(" _abcd", max_size=12), min_size=1, max_size=12)


def vowel(word: str) -> bool:
    return "a" in word


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["the house"], 1.0),
        (["the hause"], 0.5),
        (["_the_house_is_"], 1.0),
        (["  the   house  "], 1.0),
        (["", "____", "   ", "the"], 1.0),
        (["", "____"], 0.0),
        (["the house of", "xqzt"], 0.75),  # pooled over the lines, no mean of their means
        (["the the the thee thw"], 0.8),  # every occurrence counts
        (["e house an"], 1.0),  # words cut off at the ends count: a single letter passes
        (["use of th"], 2 / 3),
        (["london o london"], 1 / 3),  # a name in lower case
    ],
)
def test_hand_made_lines(lines: list[str], expected: float) -> None:
    assert spelling_accuracy(lines) == pytest.approx(expected)


@given(LINES)
def test_scores_are_the_counts_by_hand(lines: list[str]) -> None:
    words = [word for line in lines for word in line.strip(" _").replace("_", " ").split(" ") if word]
    scores = text_scores(lines, frozenset({"a", "ab"}), vowel)
    assert (scores.num_lines, scores.num_words) == (len(lines), len(words))
    count = max(len(words), 1)
    assert scores.spelling_accuracy == pytest.approx(sum(map(vowel, words)) / count)
    assert scores.vocabulary_accuracy == pytest.approx(sum(word in ("a", "ab") for word in words) / count)
    assert scores.distinct_words == pytest.approx(len(set(words)) / count)
    assert scores.duplicates == pytest.approx(1 - len(set(lines)) / len(lines))


@given(LINES, st.integers(1, 5))
def test_batches_do_not_matter(lines: list[str], size: int) -> None:
    metric = SpellingAccuracy(accepts=vowel)
    for start in range(0, len(lines), size):
        metric.update(lines[start : start + size])
    assert TextScores(**metric.compute()) == text_scores(lines, accepts=vowel)


def _on_rank(texts: list[list[str]]) -> list[TextScores]:
    scores = []
    for lines in texts:
        metric = SpellingAccuracy(frozenset({"to"}))
        metric.update(lines[distributed.get_rank() :: distributed.get_world_size()])
        scores.append(TextScores(**metric.compute()))
    return scores


def test_two_ranks_score_what_one_scores_although_lines_repeat_across_them(pool) -> None:
    repeated = ["to be or not to be", "to be or not to be", "that is", "", "the qestion", "the qestion", ""]
    no_word_on_one = ["to be", "__", "or not", ""]
    expected = [text_scores(lines, frozenset({"to"})) for lines in (repeated, no_word_on_one)]
    assert 0 < expected[0].duplicates < 1 and 0 < expected[0].spelling_accuracy < 1
    assert pool.run(_on_rank, [repeated, no_word_on_one], world_size=2) == [expected] * 2


def test_a_metric_survives_pickling() -> None:
    metric = SpellingAccuracy(frozenset({"the"}))
    metric.update(["the hause"])
    copy = pickle.loads(pickle.dumps(metric))  # noqa: S301
    for each in (metric, copy):
        each.update(["the house"])
    assert copy.compute() == metric.compute() and copy.compute()["spelling_accuracy"] == 0.75


def test_vocabulary_holds_what_occurs_often_enough() -> None:
    text = "to be or not to be that is the question whether tis nobler to"
    assert vocabulary(text) == {"to", "be"}
    assert vocabulary(text, min_count=3) == {"to"}
    assert vocabulary(text, min_count=1) == set(words_of(text))


def test_each_distinct_word_is_looked_up_once() -> None:
    accepts: Any = english_dictionary()
    spelling_accuracy(["unquestionably"])
    before = accepts.cache_info().misses
    assert spelling_accuracy(["unquestionably"] * 50) == 1.0
    assert accepts.cache_info().misses == before


def test_held_out_shakespeare_scores_as_real_text_does() -> None:
    data = Shakespeare(seq_len=256)
    scores = text_scores(data.reference_text(), vocabulary(data.train_text()))
    assert scores.spelling_accuracy == pytest.approx(0.927, abs=0.002)
    assert scores.vocabulary_accuracy is not None and 0.95 < scores.vocabulary_accuracy < 1
    assert scores.duplicates == 0


def test_no_line_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one line"):
        text_scores([], accepts=vowel)


def test_a_dictionary_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.aff").write_text("SET UTF-8\n")
    with pytest.raises(FileNotFoundError, match=r"mine\.dic does not exist"):
        english_dictionary(tmp_path / "mine.aff")
    (tmp_path / "mine.dic").write_text("1\nxqzt\n")
    assert spelling_accuracy(["xqzt house"], english_dictionary(tmp_path / "mine.dic")) == 0.5


def test_missing_spylls_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("spylls"):
            raise ImportError(f"No module named {name!r}")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install spylls \(in a checkout: pip install '\.\[eval\]'\)"):
        english_dictionary.__wrapped__()
    assert math.isclose(spelling_accuracy(["a b"], vowel), 0.5)
