"""Questions to a knowledge graph as logical forms, whose execution is the answer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from datamodules.conversations.knowledge_graph import Condition, KnowledgeGraph, Value

__all__ = ["Count", "Extreme", "Form", "Having", "Other", "Sharing", "Tails"]


class Form(ABC):
    """A question; written as text by ``str``."""

    @abstractmethod
    def execute(self, graph: KnowledgeGraph) -> frozenset[Value]:
        """The answers."""


@dataclass(frozen=True)
class Tails(Form):
    """Tails in a relation, of an entity or of the answers to a question.

    Example:
        >>> print(Tails(Tails("Alien", "sequel"), "director"))
        tails(tails("Alien", "sequel"), "director")
    """

    head: str | Tails
    relation: str

    @override
    def execute(self, graph: KnowledgeGraph) -> frozenset[Value]:
        heads = [self.head] if isinstance(self.head, str) else self.head.execute(graph)
        return frozenset(tail for head in heads if isinstance(head, str) for tail in graph.tails(head, self.relation))

    @override
    def __str__(self) -> str:
        head = json.dumps(self.head, ensure_ascii=False) if isinstance(self.head, str) else str(self.head)
        return f"tails({head}, {json.dumps(self.relation, ensure_ascii=False)})"


@dataclass(frozen=True)
class Having(Form):
    """Heads that meet all of some conditions, at least one.

    Example:
        >>> print(Having((Condition("genre", "=", "Comedy"), Condition("year", ">", 1990))))
        having("genre" = "Comedy", "year" > 1990)
    """

    conditions: tuple[Condition, ...]

    @override
    def execute(self, graph: KnowledgeGraph) -> frozenset[Value]:
        first, *others = (frozenset[Value](graph.having(condition)) for condition in self.conditions)
        return first.intersection(*others)

    @override
    def __str__(self) -> str:
        conditions = (
            f"{json.dumps(relation, ensure_ascii=False)} {operator} {json.dumps(value, ensure_ascii=False)}"
            for relation, operator, value in self.conditions
        )
        return f"having({', '.join(conditions)})"


@dataclass(frozen=True)
class Sharing(Form):
    """Heads that share a tail with an entity: from it to its tails, and back from any of them.

    The entity itself is among them.
    """

    tails: Tails

    @override
    def execute(self, graph: KnowledgeGraph) -> frozenset[Value]:
        conditions = (Condition(self.tails.relation, "=", tail) for tail in self.tails.execute(graph))
        return frozenset(head for condition in conditions for head in graph.having(condition))

    @override
    def __str__(self) -> str:
        return f"sharing({self.tails})"


@dataclass(frozen=True)
class Other(Form):
    """Answers to a question without one of them."""

    form: Form
    entity: str

    @override
    def execute(self, graph: KnowledgeGraph) -> frozenset[Value]:
        return self.form.execute(graph) - {self.entity}

    @override
    def __str__(self) -> str:
        return f"other({self.form}, {json.dumps(self.entity, ensure_ascii=False)})"


@dataclass(frozen=True)
class Count(Form):
    """Number of answers to a question."""

    form: Having

    @override
    def execute(self, graph: KnowledgeGraph) -> frozenset[Value]:
        return frozenset([len(self.form.execute(graph))])

    @override
    def __str__(self) -> str:
        return f"count({self.form})"


@dataclass(frozen=True)
class Extreme(Form):
    """Those of some entities whose number in a relation is the largest or the smallest; each has one."""

    which: Literal["largest", "smallest"]
    relation: str
    entities: tuple[str, ...]

    @override
    def execute(self, graph: KnowledgeGraph) -> frozenset[Value]:
        numbers = {entity: float(graph.tails(entity, self.relation)[0]) for entity in self.entities}
        best = max(numbers.values()) if self.which == "largest" else min(numbers.values())
        return frozenset(entity for entity, number in numbers.items() if number == best)

    @override
    def __str__(self) -> str:
        names = (json.dumps(name, ensure_ascii=False) for name in (self.relation, *self.entities))
        return f"{self.which}({', '.join(names)})"
