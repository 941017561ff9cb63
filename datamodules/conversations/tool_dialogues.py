"""Conversations that call tools, generated from a knowledge graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, get_args

import torch
from typing_extensions import override

from datamodules.assets.fetch import fetch
from datamodules.conversations.call_prompts import call_prompts
from datamodules.conversations.dialogue_patterns import Draws, Pattern, Question, Subgraphs
from datamodules.conversations.film_graph import film_graph
from datamodules.conversations.graph_tools import calls_of, run_call, tool_schemas
from datamodules.conversations.knowledge_graph import KnowledgeGraph, Value, read_triples
from datamodules.conversations.sft import Conversation, ConversationData
from datamodules.text.prompts import Prompts
from datamodules.text.text import check_val_fraction
from zoo.base.random import SampleRandom

__all__ = ["ToolDialogue", "ToolDialogues", "generate_dialogues"]

_ATTEMPTS = 1000
"""Draws after which a pattern counts as one that the graph does not have."""


class ToolDialogue(TypedDict):
    """A conversation, a row of a ``.jsonl`` that `SFT` reads.

    Attributes:
        messages: System, user; the assistant's calls and the tools' results, round by round; the assistant's answer.
        tools: JSON schemas of the tools.
        pattern: Kind of subgraph that is asked for.
        logical_form: The question as a logical form.
        answer: What its execution gives, sorted.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    pattern: Pattern
    logical_form: str
    answer: list[Value]


def generate_dialogues(
    graph: KnowledgeGraph, count: int, patterns: Sequence[Pattern] | None = None, max_answers: int = 5, seed: int = 0
) -> list[ToolDialogue]:
    """Generate conversations; each is a function of the graph, the seed and its number.

    Args:
        graph: Facts to ask for.
        count: Number of conversations.
        patterns: Patterns, taken in turn; ``None``: all that the graph can have.
        max_answers: Most values that an answer has.
        seed: Seed of the draws.

    Raises:
        ValueError: The graph has no subgraph of a pattern, or none is found with so few answers.
    """
    subgraphs = Subgraphs(graph, max_answers)
    possible = subgraphs.possible()
    chosen = possible if patterns is None else list(patterns)
    if lacking := [pattern for pattern in chosen if pattern not in possible]:
        raise ValueError(
            f"The triples have nothing for the pattern(s) {', '.join(lacking)}: leave them out of patterns, or give more triples."
        )
    schemas = tool_schemas(graph)
    return [_dialogue(subgraphs, chosen[number % len(chosen)], number, seed, schemas) for number in range(count)]


def _dialogue(subgraphs: Subgraphs, pattern: Pattern, number: int, seed: int, schemas: list[dict[str, Any]]) -> ToolDialogue:
    random = SampleRandom(seed, torch.tensor([number]))
    for attempt in range(_ATTEMPTS):
        question = subgraphs.question(pattern, Draws(random, attempt))
        if question is not None:
            return _written(question, subgraphs.graph, schemas)
    raise ValueError(
        f"No subgraph of the pattern {pattern} with at most {subgraphs.max_answers} answers was found: raise max_answers, or"
        " leave it out of patterns."
    )


def _written(question: Question, graph: KnowledgeGraph, schemas: list[dict[str, Any]]) -> ToolDialogue:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": f"You answer questions on {graph.nouns}. Look facts up with the tools."},
        {"role": "user", "content": question.text},
    ]
    for calls in calls_of(question.form, graph):
        functions = [{"type": "function", "function": call._asdict()} for call in calls]
        messages.append({"role": "assistant", "content": "", "tool_calls": functions})
        for call in calls:
            result = json.dumps(run_call(call, graph), ensure_ascii=False)
            messages.append({"role": "tool", "name": call.name, "content": result})
    messages.append({"role": "assistant", "content": question.answer})
    answer = sorted(question.form.execute(graph), key=str)
    return ToolDialogue(
        messages=messages, tools=schemas, pattern=question.pattern, logical_form=str(question.form), answer=answer
    )


class ToolDialogues(ConversationData):
    """Function-calling conversations that are generated from a knowledge graph, as the Ling report trains on.

    A part of the graph with one of several patterns becomes a logical form, and this a question in plain English, calls of
    tools with their results, and an answer; source: "Every FLOP Counts" (arXiv 2503.05139). The default graph has films:
    MovieLens' titles with genres and years, and 91,631 triples of Freebase, whose entities are ids (2 MB, fetched once; for
    research, not to be passed on).

    Heads of triples are on one side, training or validation, with all their facts, and the tools of a side know that side
    alone: no film of one is in the other. ``predict`` without prompts of yours asks for the calls of the held-out conversations.

    Args:
        triples: Table with the columns ``head``, ``relation`` and ``tail`` (`datamodules.conversations.knowledge_graph`):
            commas in a ``.csv``, else tabs. Relations read best as nouns. ``null``: films.
        num_train: Conversations for training.
        num_val: Conversations for validation and test.
        val_fraction: Share of the heads that are for validation.
        patterns: Patterns of subgraphs, taken in turn (`datamodules.conversations.dialogue_patterns`). ``null``: all that the
            triples allow.
        max_answers: Most values that an answer, or a result of a tool on the way to it, has.
        dialogue_seed: Seed of the conversations; that of their order is ``seed``.
        **kwargs: Arguments of `ConversationData`, `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: A number out of range, or an unknown pattern.
    """

    def __init__(
        self,
        triples: Path | None = None,
        num_train: int = 2000,
        num_val: int = 200,
        val_fraction: float = 0.1,
        patterns: list[Pattern] | None = None,
        max_answers: int = 5,
        dialogue_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_val_fraction(val_fraction)
        if num_train < 1 or num_val < 0 or max_answers < 1:
            raise ValueError(
                f"ToolDialogues: num_train={num_train} and max_answers={max_answers} must be at least 1, num_val={num_val} at"
                " least 0."
            )
        if num_val and not val_fraction:
            raise ValueError(f"ToolDialogues: num_val={num_val} needs a val_fraction above 0: raise it, or set num_val to 0.")
        if patterns is not None and (not patterns or not set(patterns) <= set(get_args(Pattern))):
            raise ValueError(f"ToolDialogues: patterns={patterns} must be some of {', '.join(get_args(Pattern))}.")
        self.triples = None if triples is None else Path(triples)
        self.num_train = num_train
        self.num_val = num_val
        self.val_fraction = val_fraction
        self.patterns = patterns
        self.max_answers = max_answers
        self.dialogue_seed = dialogue_seed

    @override
    def prepare_data(self) -> None:
        """Fetch the films, if these are asked for."""
        if self.triples is None:
            fetch("movielens-100k")

    @cached_property
    def dialogues(self) -> tuple[list[ToolDialogue], list[ToolDialogue]]:
        """The conversations for training and for validation."""
        if self.triples is None:
            graph = film_graph(fetch("movielens-100k"))
        else:
            graph = KnowledgeGraph(read_triples(self.triples, self.on_error))
        train, val = graph.split(self.val_fraction)

        def generate(part: KnowledgeGraph, count: int) -> list[ToolDialogue]:
            return generate_dialogues(part, count, self.patterns, self.max_answers, self.dialogue_seed) if count else []

        return generate(train, self.num_train), generate(val, self.num_val)

    @override
    def _read_prompts(self) -> Prompts:
        if self.predict_prompts is not None or not self.num_val:
            return super()._read_prompts()
        held_out = ((dialogue["messages"], dialogue["tools"]) for dialogue in self.dialogues[1])
        return call_prompts(held_out, self.template, self.tokenizer.pad_id, self.num_val)

    @property
    @override
    def source(self) -> str:
        """The table of triples."""
        return "the films of movielens-100k" if self.triples is None else str(self.triples)

    @cached_property
    @override
    def splits(self) -> tuple[list[Conversation], list[Conversation]]:
        """The conversations for training and for validation, as ids."""
        train, val = (self.fitting(map(self.conversation, rows), self.source) if rows else [] for rows in self.dialogues)
        self.report(train, val)
        return train, val
