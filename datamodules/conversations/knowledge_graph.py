"""Facts as triples of head, relation and tail, and the questions that can be asked of them directly."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from datamodules.base.held_out import held_out
from datamodules.base.json_lines import MalformedRows, OnError

__all__ = ["Condition", "KnowledgeGraph", "Operator", "Triple", "Value", "read_triples"]

Value = str | int | float
Operator = Literal["=", "<", ">"]
_COLUMNS = ("head", "relation", "tail")


class Triple(NamedTuple):
    """A fact: the relation of the head is the tail, such as (Alien, release year, 1979).

    Attributes:
        head: Entity that the fact is about.
        relation: Name of the relation, best a noun.
        tail: An entity or another text, or a number.
    """

    head: str
    relation: str
    tail: Value


class Condition(NamedTuple):
    """A condition on entities: one of their tails equals a value, or is a smaller or a larger number.

    Attributes:
        relation: Relation of the tails.
        operator: ``=``, ``<`` or ``>``.
        value: What they are compared with.
    """

    relation: str
    operator: Operator
    value: Value


class KnowledgeGraph:
    """Facts, found by head and by tail.

    A relation is *numeric* if all its tails are numbers and none of them is a head, which would be an id.

    Args:
        triples: Facts; of equal ones, one stays.
        noun: Name of a head, such as ``film``.
        nouns: Name of several.

    Example:
        >>> graph = KnowledgeGraph([Triple("Alien", "year", "1979"), Triple("Aliens", "year", "1986")])
        >>> graph.tails("Alien", "year"), graph.having(Condition("year", ">", 1980))
        ([1979], ['Aliens'])
    """

    def __init__(self, triples: Iterable[Triple], noun: str = "entity", nouns: str = "entities") -> None:
        self.noun = noun
        self.nouns = nouns
        distinct = set(triples)
        heads = {triple.head for triple in distinct}
        numbers = {triple.tail: _number(triple.tail) for triple in distinct}
        texts = {triple.relation for triple in distinct if triple.tail in heads or numbers[triple.tail] is None}
        #: The facts, sorted.
        self.triples = sorted(
            {
                triple if triple.relation in texts else triple._replace(tail=numbers[triple.tail])  # type: ignore[arg-type]
                for triple in distinct
            }
        )
        #: Entities that facts are about, sorted.
        self.heads = sorted(heads)
        #: Names of the relations, sorted.
        self.relations = sorted({triple.relation for triple in distinct})
        #: Those whose tails are numbers.
        self.numeric = [relation for relation in self.relations if relation not in texts]
        self._tails: dict[str, dict[str, list[Value]]] = defaultdict(dict)
        self._heads: dict[tuple[str, Value], list[str]] = defaultdict(list)
        self._numbers: dict[str, list[tuple[str, int | float]]] = defaultdict(list)
        for head, relation, tail in self.triples:
            if not isinstance(tail, str):
                self._numbers[relation].append((head, tail))
            self._tails[head].setdefault(relation, []).append(tail)
            self._heads[relation, tail].append(head)

    def relations_of(self, head: str) -> list[str]:
        """Relations of an entity, sorted."""
        return list(self._tails[head]) if head in self._tails else []

    def tails(self, head: str, relation: str) -> list[Value]:
        """Tails of an entity in a relation, sorted."""
        return self._tails[head].get(relation, []) if head in self._tails else []

    def having(self, condition: Condition) -> list[str]:
        """Entities that meet a condition, sorted; a text is neither smaller nor larger than another."""
        relation, operator, value = condition
        if operator == "=":
            return self._heads.get((relation, value), [])
        if isinstance(value, str):
            return []
        numbers = self._numbers.get(relation, [])
        return sorted({head for head, tail in numbers if (tail < value if operator == "<" else tail > value)})

    def split(self, share: float) -> tuple[KnowledgeGraph, KnowledgeGraph]:
        """Two graphs without a head in common; facts that link heads of both are in neither.

        Args:
            share: Expected share of the heads in the second graph, chosen by a fixed hash of their names.
        """
        second = dict(zip(self.heads, held_out(self.heads, share).tolist(), strict=True))
        parts: tuple[list[Triple], list[Triple]] = ([], [])
        for triple in self.triples:
            side = second[triple.head]
            if not isinstance(triple.tail, str) or second.get(triple.tail, side) == side:
                parts[side].append(triple)
        return KnowledgeGraph(parts[0], self.noun, self.nouns), KnowledgeGraph(parts[1], self.noun, self.nouns)


def read_triples(path: Path, on_error: OnError = "raise") -> list[Triple]:
    """Read facts from a table with the columns ``head``, ``relation`` and ``tail``; others are not read.

    The names may be written as RecBole writes them, ``head_id:token``. A ``.csv`` is separated by commas, any other file by tabs.

    Args:
        path: UTF-8 file with a line of names first.
        on_error: Treatment of rows without one of the three.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Columns or facts are missing, or the file is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a table of triples with the columns head, relation and tail.")
    problems, triples = MalformedRows(on_error), []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            comma = path.suffix.lower() == ".csv"
            rows = csv.reader(file) if comma else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            names = [name.partition(":")[0].strip().lower().removesuffix("_id") for name in next(rows, [])]
            missing = [name for name in _COLUMNS if name not in names]
            if missing:
                raise ValueError(
                    f"{path} lacks the column(s) {', '.join(missing)}: its first line should name head, relation and tail,"
                    f" separated by {'commas' if comma else 'tabs'}."
                )
            places, total = [names.index(name) for name in _COLUMNS], 0
            for total, row in enumerate(rows, start=1):
                fields = [row[place].strip() if place < len(row) else "" for place in places]
                if row and not all(fields):
                    problems.add(f"line {total + 1}: it has no {_COLUMNS[fields.index('')]}")
                elif row:
                    triples.append(Triple(*fields))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as plain text.") from error
    problems.report(path, total)
    if not triples:
        raise ValueError(f"{path} holds no triple.")
    return triples


def _number(value: Value) -> int | float | None:
    """The number that a value is or names, if it does."""
    try:
        return value if not isinstance(value, str) else int(value)
    except ValueError:
        pass
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
