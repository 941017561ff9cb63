"""Calls of tools are equal as values of JSON, and every text is counted once whatever the batches and ranks."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from datamodules.text.tool_text import tools_as_text
from zoo.metrics.tool_calls import CallMatches, ToolCallMatch, call_matches, match_calls, parse_calls

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["find", "count"]), "arguments": st.dictionaries(st.text(max_size=3), VALUES)}
    ),
    min_size=1,
    max_size=3,
)
FIND = {"name": "find", "arguments": {"a": 1, "b": [1, 2]}}


def turned(value):
    """The same value with keys in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(inner) for key, inner in reversed(value.items())}
    return [turned(inner) for inner in value] if isinstance(value, list) else value


@settings(max_examples=25)
@given(CALLS)
def test_all_ways_to_write_calls_are_read_alike(calls):
    wanted = json.dumps(calls)
    quoted = [{"type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}} for call in calls]
    (message,) = tools_as_text([{"role": "assistant", "content": "So.", "tool_calls": quoted}], [])
    lines = "\n".join(json.dumps(turned(call)) for call in reversed(calls))
    for text in (wanted, json.dumps(quoted), message["content"], lines, f"First:\n{lines}", wanted.replace("[", "[\n", 1)):
        assert parse_calls(text) and match_calls(text, wanted) == "exact"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "find", "arguments": {"b": [1, 2], "a": 1.0}}', "exact"),
        ('<tool_call>{"name": "find", "arguments": {"b": [1, 2], "a": 1}}', "exact"),  # the end may be the stop text
        ('{"name": "find", "arguments": {"b": [2, 1], "a": 1}}', "name_only"),
        ('{"name": "find", "arguments": {"b": [1, 2], "a": true}}', "name_only"),
        ('{"name": "find", "arguments": {"b": [1, 2], "a": "1"}}', "name_only"),
        ('{"name": "find"}', "name_only"),
        ('{"name": "count", "arguments": {"a": 1, "b": [1, 2]}}', "wrong"),
        (json.dumps([FIND, FIND]), "wrong"),
        ("", "not_parseable"),
        ("It is 5.", "not_parseable"),
        ('{"name": "find", "arguments": {"a": 1', "not_parseable"),
        ('{"name": "find", "arguments": [1]}', "not_parseable"),
        ('{"name": 5, "arguments": {}}', "not_parseable"),
        ('<tool_call>{"name": "find", "arguments": "{"}</tool_call>', "not_parseable"),
        ("<tool_call></tool_call>", "not_parseable"),
        ("[" * 100_000, "not_parseable"),
        ("{" + '"a":[' * 100_000, "not_parseable"),
        ("[1, 2]", "not_parseable"),
    ],
)  # fmt: skip
def test_one_text_is_judged(text, expected):
    assert match_calls(text, json.dumps([FIND])) == expected


def test_a_text_without_calls_is_right_where_none_is_wanted():
    assert match_calls("It is 5.", "[]") == "exact"
    assert match_calls(json.dumps(FIND), "[]") == "wrong"


def test_references_that_cannot_be_read_are_errors():
    with pytest.raises(ValueError, match="holds a call that cannot be read"):
        call_matches(["x"], ['[{"name": 1}]'])
    with pytest.raises(ValueError, match="got 1 for 2 texts"):
        call_matches(["x", "y"], ["[]"])


TEXTS = [json.dumps(FIND), '{"name": "find"}', "{", json.dumps(FIND), '{"name": "x"}', "no", json.dumps(FIND)]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_do_not_matter(size):
    metric = ToolCallMatch()
    for start in range(0, len(TEXTS), size):
        part = TEXTS[start : start + size]
        metric.update(part, [json.dumps([FIND])] * len(part))
    assert metric.counts == CallMatches(7, 3, 1, 2) == call_matches(TEXTS, [json.dumps([FIND])] * 7)
    assert metric.compute() == {
        name: torch.tensor(count / 7) for name, count in (("exact", 3), ("name_only", 1), ("not_parseable", 2))
    }
    metric.reset()
    assert metric.counts.total == 0


def _on_rank() -> dict[str, float]:
    metric = ToolCallMatch()
    mine = TEXTS[distributed.get_rank() :: 2]
    metric.update(mine, [json.dumps([FIND])] * len(mine))
    return {name: share.item() for name, share in metric.compute().items()}


def test_two_ranks_count_what_one_counts(pool):
    one, other = pool.run(_on_rank, world_size=2)
    assert one == other == pytest.approx({"exact": 3 / 7, "name_only": 1 / 7, "not_parseable": 2 / 7})
