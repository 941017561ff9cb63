"""Patterns of subgraphs: each draws a part of a knowledge graph, and makes a question and its answer of it in plain English."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar, get_args

import torch

from datamodules.conversations.knowledge_graph import Condition, KnowledgeGraph, Triple
from datamodules.conversations.logical_form import Count, Extreme, Form, Having, Other, Sharing, Tails
from zoo.base.random import SampleRandom

__all__ = ["Draws", "Pattern", "Question", "Subgraphs"]

T = TypeVar("T")

Pattern = Literal["one_hop", "inverse_hop", "two_hops", "there_and_back", "intersection", "count", "comparison"]

_DRAWS = 16
"""More choices than any pattern makes."""

_QUESTIONS: dict[Pattern, tuple[str, ...]] = {
    "one_hop": (
        "What is the {relation} of {head}?",
        "Please look up the {relation} of {head}.",
        "What is listed as {relation} of {head}?",
        "Tell me the {relation} of {head}, please.",
        "{head}: what do you know about its {relation}?",
    ),
    "inverse_hop": (
        "Which {nouns} have {value} as {relation}?",
        "Find all {nouns} whose {relation} is {value}.",
        "I am looking for {nouns} with {relation} {value}.",
        "{value} is the {relation} of which {nouns}?",
    ),
    "two_hops": (
        "What is the {second} of the {relation} of {head}?",
        "Look at the {relation} of {head}: what is its {second}?",
        "Find the {relation} of {head}, and tell me the {second} of it.",
    ),
    "there_and_back": (
        "Which other {nouns} have the same {relation} as {head}?",
        "Find {nouns} that share a {relation} with {head}.",
        "{head} has a {relation}; which {nouns} have it, too?",
    ),
    "intersection": (
        "Which {nouns} have {conditions}?",
        "Find all {nouns} with {conditions}.",
        "List the {nouns} that have {conditions}.",
        "I want {nouns} with {conditions}. Which are there?",
    ),
    "count": (
        "How many {nouns} have {conditions}?",
        "Count the {nouns} with {conditions}.",
        "What is the number of {nouns} that have {conditions}?",
    ),
    "comparison": (
        "Which has the {which} {relation}, {one} or {other}?",
        "Compare {one} and {other}: which one has the {which} {relation}?",
        "Of {one} and {other}, which is the one with the {which} {relation}?",
    ),
}
_ANSWERS: dict[Pattern, tuple[str, ...]] = {
    "one_hop": ("The {relation} of {head}: {answer}.", "{head} has the {relation} {answer}.", "It is {answer}."),
    "inverse_hop": ("With the {relation} {value}: {answer}.", "I found {answer}."),
    "two_hops": ("The {second} is {answer}.", "It is {answer}."),
    "there_and_back": ("They share a {relation}: {answer}.", "I found {answer}."),
    "intersection": ("I found {answer}.", "These {nouns} match: {answer}."),
    "count": ("There are {answer}.", "The number is {answer}."),
    "comparison": ("{answer} has the {which} {relation}.", "It is {answer}."),
}


class Question(NamedTuple):
    """A question in words and as a logical form.

    Attributes:
        pattern: Kind of its subgraph.
        form: Logical form.
        text: The question.
        answer: The answer, in words.
    """

    pattern: Pattern
    form: Form
    text: str
    answer: str


class Draws:
    """Choices of one attempt, a pure function of seed, sample and attempt."""

    def __init__(self, random: SampleRandom, attempt: int) -> None:
        self._uniform = iter(random.uniform(f"attempt {attempt}", (_DRAWS,), torch.float64)[0].tolist())

    def choose(self, options: Sequence[T]) -> T:
        """One of some options, each equally likely."""
        return options[int(next(self._uniform) * len(options))]


class _Drawn(NamedTuple):
    """A question that a pattern has drawn: its logical form, and the words for its templates."""

    form: Form
    words: dict[str, str]


class Subgraphs:
    """Subgraphs of a knowledge graph by their patterns, and questions on them.

    * ``one_hop``: from an entity to its tails; ``inverse_hop``: from a tail to the entities that have it;
    * ``two_hops``: from an entity to one that it is linked to, and on to the tails of that;
    * ``there_and_back``: from an entity to its tails, and back to other entities that have one of them;
    * ``intersection``: entities that meet two conditions; ``count``: number of those that meet one or two;
    * ``comparison``: which of two entities has the larger or smaller number.

    Where relations are numeric, conditions of ``intersection`` and ``count`` compare as well.

    Args:
        graph: The graph.
        max_answers: Most values that a call may return.
    """

    def __init__(self, graph: KnowledgeGraph, max_answers: int) -> None:
        self.graph = graph
        self.max_answers = max_answers
        self._patterns: dict[Pattern, Callable[[Draws], _Drawn | None]] = {
            "one_hop": self._one_hop,
            "inverse_hop": self._inverse_hop,
            "two_hops": self._two_hops,
            "there_and_back": self._there_and_back,
            "intersection": self._intersection,
            "count": self._count,
            "comparison": self._comparison,
        }

    def possible(self) -> list[Pattern]:
        """The patterns that the graph can have: two hops need links between heads, comparisons need two different numbers."""
        needs: dict[Pattern, bool] = {"two_hops": bool(self._links), "comparison": bool(self._compared)}
        return [pattern for pattern in get_args(Pattern) if needs.get(pattern, bool(self.graph.triples))]

    def question(self, pattern: Pattern, draws: Draws) -> Question | None:
        """A question of a pattern, or ``None`` if what was drawn has no answer, or more than ``max_answers``."""
        drawn = self._patterns[pattern](draws)
        if drawn is None:
            return None
        answers = sorted(drawn.form.execute(self.graph), key=str)
        if not 0 < len(answers) <= self.max_answers:
            return None
        words = {**drawn.words, "noun": self.graph.noun, "nouns": self.graph.nouns}
        text = draws.choose(_QUESTIONS[pattern]).format(**words)
        answer = draws.choose(_ANSWERS[pattern]).format(**words, answer=", ".join(map(str, answers)))
        return Question(pattern, drawn.form, text, answer)

    @cached_property
    def _links(self) -> list[Triple]:
        """Facts whose tail is a head as well."""
        heads = set(self.graph.heads)
        return [triple for triple in self.graph.triples if triple.tail in heads and triple.tail != triple.head]

    @cached_property
    def _compared(self) -> dict[str, list[str]]:
        """Heads with one number, by relation; of relations with different numbers."""
        found = {}
        for relation in self.graph.numeric:
            tails = {head: self.graph.tails(head, relation) for head in self.graph.heads}
            heads = [head for head, numbers in tails.items() if len(numbers) == 1]
            if len({tails[head][0] for head in heads}) > 1:
                found[relation] = heads
        return found

    def _fact(self, draws: Draws, head: str) -> Triple:
        """A fact on an entity: its relation first, so that relations with many tails are not more frequent."""
        relation = draws.choose(self.graph.relations_of(head))
        return Triple(head, relation, draws.choose(self.graph.tails(head, relation)))

    def _one_hop(self, draws: Draws) -> _Drawn:
        head, relation, _ = self._fact(draws, draws.choose(self.graph.heads))
        return _Drawn(Tails(head, relation), {"head": head, "relation": relation})

    def _inverse_hop(self, draws: Draws) -> _Drawn:
        _, relation, tail = self._fact(draws, draws.choose(self.graph.heads))
        return _Drawn(Having((Condition(relation, "=", tail),)), {"relation": relation, "value": str(tail)})

    def _two_hops(self, draws: Draws) -> _Drawn | None:
        head, relation, tail = draws.choose(self._links)
        if len(self.graph.tails(head, relation)) > 1:
            return None  # "its" would have two meanings
        second = draws.choose(self.graph.relations_of(str(tail)))
        if self.graph.tails(str(tail), second) == [head]:
            return None  # such as the prequel of its sequel
        return _Drawn(Tails(Tails(head, relation), second), {"head": head, "relation": relation, "second": second})

    def _there_and_back(self, draws: Draws) -> _Drawn | None:
        head, relation, _ = self._fact(draws, draws.choose(self.graph.heads))
        if len(self.graph.tails(head, relation)) > 2:
            return None  # as many calls
        form = Other(Sharing(Tails(head, relation)), head)
        return _Drawn(form, {"head": head, "relation": relation})

    def _intersection(self, draws: Draws) -> _Drawn | None:
        head = draws.choose(self.graph.heads)
        conditions = [self._condition(draws, self._fact(draws, head)) for _ in range(2)]
        return None if conditions[0] == conditions[1] else self._having(tuple(conditions))

    def _count(self, draws: Draws) -> _Drawn | None:
        head, several = draws.choose(self.graph.heads), draws.choose((False, True))
        conditions = [self._condition(draws, self._fact(draws, head)) for _ in range(1 + several)]
        if several and conditions[0] == conditions[1]:
            return None
        having = self._having(tuple(conditions))
        return having._replace(form=Count(having.form))  # type: ignore[arg-type]

    def _condition(self, draws: Draws, fact: Triple) -> Condition:
        """A condition that a fact meets: its tail itself, or a number on one side of it, which another head has."""
        _, relation, tail = fact
        if relation not in self._compared or isinstance(tail, str):
            return Condition(relation, "=", tail)
        bound = self.graph.tails(draws.choose(self._compared[relation]), relation)[0]
        if isinstance(bound, str) or bound == tail:
            return Condition(relation, "=", tail)
        return Condition(relation, ">" if tail > bound else "<", bound)

    @staticmethod
    def _having(conditions: tuple[Condition, ...]) -> _Drawn:
        operators = {"=": " ", ">": " above ", "<": " below "}
        written = (f"{relation}{operators[operator]}{value}" for relation, operator, value in conditions)
        return _Drawn(Having(conditions), {"conditions": " and ".join(written)})

    def _comparison(self, draws: Draws) -> _Drawn | None:
        relation = draws.choose(list(self._compared))
        one, other = (draws.choose(self._compared[relation]) for _ in range(2))
        which: Literal["largest", "smallest"] = draws.choose(("largest", "smallest"))
        if self.graph.tails(one, relation) == self.graph.tails(other, relation):
            return None
        words = {"which": {"largest": "larger", "smallest": "smaller"}[which], "relation": relation}
        return _Drawn(Extreme(which, relation, (one, other)), {**words, "one": one, "other": other})
