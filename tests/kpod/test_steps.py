"""Steps of rationales: they are the text again, and each token belongs to the step of its first visible character."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.conversations.steps import StepSplitter
from datamodules.text.tokenizer import ByteTokenizer

RULES = ["period", "line", "=", r"(?<=,)"]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("It costs $1.50. He has 2.", ["It costs $1.50. ", "He has 2."]),
        ("Mr. Ho and Dr. Li buy 3.5 kg, e.g. rice. Done!", ["Mr. Ho and Dr. Li buy 3.5 kg, e.g. rice. ", "Done!"]),
        ('He said "Yes!" So (a.) 2 vs. 3? Right', ['He said "Yes!" ', "So (a.) ", "2 vs. 3? ", "Right"]),
        ("3 + 4 = 7\n\n7 * 2 = 14\n", ["3 + 4 = 7\n\n", "7 * 2 = 14\n"]),
        ("\n First... then .5 more. ", ["\n First... ", "then .5 more. "]),
        ("Mother. Mums.", ["Mother. ", "Mums."]),
        (" \n", []),
    ],
)
def test_sentences_and_lines_are_steps(text, steps):
    assert StepSplitter().split(text) == steps


def test_lines_or_matches_of_an_expression_are_steps():
    assert StepSplitter("line").split("One. Two.\nThree") == ["One. Two.\n", "Three"]
    assert StepSplitter("; ").split("a = 1; b = 2") == ["a = 1; ", "b = 2"]
    with pytest.raises(ValueError, match=r"step_split='\(' is neither period, nor line, nor a regular expression"):
        StepSplitter("(")


@given(st.text("ab.1 \n=,!é", max_size=40), st.sampled_from(RULES))
def test_joined_steps_are_the_text_and_each_has_something_visible(text, rule):
    steps = StepSplitter(rule).split(text)
    assert "".join(steps) == (text if text.strip() else "")
    assert all(step.strip() for step in steps)


@given(st.data(), st.text("ab.1 \n=,!é", max_size=40), st.sampled_from(RULES))
def test_tokens_are_of_the_step_of_their_first_visible_character(data, text, rule):
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)))) | {0, len(text)})
    spans = list(pairwise(cuts)) if text else []
    splitter = StepSplitter(rule)
    step_of = [number for number, step in enumerate(splitter.split(text)) for _ in step]
    expected: list[int] = []
    for start, end in spans:
        visible = [place for place in range(start, end) if not text[place].isspace()]
        expected.append(step_of[visible[0]] if visible else expected[-1] if expected else 0)
    found = splitter.step_ids(text, np.array(spans))
    # Of a step whose characters all lie inside tokens of others, no number is left.
    assert found.tolist() == [sorted(set(expected)).index(step) for step in expected]


def test_a_space_in_front_of_a_word_goes_with_it_and_one_alone_with_the_step_before():
    text = " He has 2. He eats 1."
    whole_words = np.array([[0, 3], [3, 7], [7, 10], [10, 13], [13, 21]])
    assert StepSplitter().step_ids(text, whole_words).tolist() == [0, 0, 0, 1, 1]
    _, spans = ByteTokenizer().encode_with_spans(text)
    step_ids = StepSplitter().step_ids(text, spans)
    assert "".join(np.array(list(text))[step_ids == 0]) == " He has 2. "


def test_ids_that_are_parts_of_one_character_are_of_one_step():
    text = "é. ü."
    ids, spans = ByteTokenizer().encode_with_spans(text)
    assert len(ids) == 7 and StepSplitter().step_ids(text, spans).tolist() == [0, 0, 0, 0, 1, 1, 1]
