"""The character n-gram model: a distribution after every context, with the values of Witten and Bell's formula."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.character_ngram import CharacterNgram


def witten_bell(text: str, alphabet: str, context: str, character: str) -> float:
    """The formula, by counting substrings one by one."""
    after = Counter(text[i + len(context)] for i in range(len(text) - len(context)) if text[i : i + len(context)] == context)
    shorter = witten_bell(text, alphabet, context[1:], character) if context else 1 / len(alphabet)
    seen = sum(after.values())
    return (after[character] + len(after) * shorter) / (seen + len(after)) if seen else shorter


@settings(max_examples=50, deadline=None)
@given(st.text("abc", min_size=1, max_size=30), st.text("abc", max_size=5), st.integers(1, 4))
def test_probabilities_are_the_formula_and_sum_to_one(text: str, context: str, order: int) -> None:
    model = CharacterNgram(text, "abc", order)
    found = model.probabilities(context)
    used = context[-(order - 1) :] if order > 1 else ""
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found == pytest.approx([witten_bell(text, "abc", used, character) for character in "abc"], rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.text("abc", min_size=1, max_size=30), st.lists(st.text("abc", max_size=8), min_size=1, max_size=4))
def test_bits_are_those_of_the_probabilities_one_after_another(text: str, lines: list[str]) -> None:
    model = CharacterNgram(text, "abc", 3)
    if not any(lines):
        with pytest.raises(ValueError, match="no character to predict"):
            model.bits_per_character(lines)
        return
    steps = [(line[:place], "abc".index(line[place])) for line in lines for place in range(len(line))]
    expected = -sum(math.log2(model.probabilities(context)[character]) for context, character in steps) / len(steps)
    assert model.bits_per_character(lines) == pytest.approx(expected, rel=1e-12)


def test_known_entropies() -> None:
    # A fair coin with and without memory; the text is long enough for the smoothing to vanish.
    coin = "".join(np.random.default_rng(0).choice(["a", "b"], 200_000))
    assert CharacterNgram(coin, "ab", 4).bits_per_character([coin]) == pytest.approx(1, abs=1e-3)
    # "a" is followed by "b" always; "b" by either: a Markov chain with 2/3 of its characters after "b", 1 bit each.
    chain = coin.replace("a", "ab")
    assert CharacterNgram(chain, "ab", 1).bits_per_character([chain]) == pytest.approx(
        -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)), abs=5e-3
    )
    assert CharacterNgram(chain, "ab", 2).bits_per_character([chain]) == pytest.approx(2 / 3, abs=5e-3)


def test_samples_follow_the_model_and_the_seed() -> None:
    text = "".join(np.random.default_rng(1).choice(list("abc"), 500, p=[0.7, 0.2, 0.1]))
    model = CharacterNgram(text, "abc", 3)
    lines = model.sample(20_000, 4, seed=5)
    assert lines == model.sample(20_000, 4, seed=5)
    assert lines != model.sample(20_000, 4, seed=6)
    assert {len(line) for line in lines} == {4}
    for context in ("", "a", "ab", "bab"):
        after = Counter(line[len(context)] for line in lines if line.startswith(context))
        share = np.array([after[character] for character in "abc"]) / sum(after.values())
        tolerance = 4 * math.sqrt(0.25 / sum(after.values()))  # four standard errors
        assert np.abs(share - model.probabilities(context)).max() < tolerance


def test_more_context_predicts_text_better() -> None:
    text = "the quick brown fox jumps over the lazy dog and the dog barks at the fox " * 20
    bits = [CharacterNgram(text, order=order).bits_per_character([text]) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"order is 9.* 27\^order"):
        CharacterNgram("abc", order=9)
    with pytest.raises(ValueError, match="is empty"):
        CharacterNgram("")
    with pytest.raises(ValueError, match="holds the character 'É'"):
        CharacterNgram("abc É")
    with pytest.raises(ValueError, match=r"holds the character '\.'"):
        CharacterNgram("abc").bits_per_character(["a."])
