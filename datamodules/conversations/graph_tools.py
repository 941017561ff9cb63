"""The tools that answer questions on a knowledge graph: their JSON schemas, what they return, and the calls of a question."""

from __future__ import annotations

from typing import Any, NamedTuple

from datamodules.conversations.knowledge_graph import Condition, KnowledgeGraph, Value
from datamodules.conversations.logical_form import Count, Extreme, Form, Having, Other, Sharing, Tails

__all__ = ["Call", "calls_of", "run_call", "tool_schemas"]


class Call(NamedTuple):
    """Call of a tool.

    Attributes:
        name: Name of the tool.
        arguments: Its arguments, values of JSON.
    """

    name: str
    arguments: dict[str, Any]


def tool_schemas(graph: KnowledgeGraph) -> list[dict[str, Any]]:
    """Descriptions of the tools in JSON schema, as chat templates take them.

    * ``look_up(name, relation)``: tails of an entity;
    * ``find(conditions)``: entities that meet all conditions, each an object of ``relation``, ``operator`` (``=``, ``<``, ``>``)
      and ``value``;
    * ``count(conditions)``: their number.
    """
    relation = {"type": "string", "enum": graph.relations}
    condition = {"type": "object", "properties": {"relation": {}, "operator": {"enum": ["=", "<", ">"]}, "value": {}}}
    conditions = {"conditions": {"type": "array", "items": condition}}
    return [
        _schema("look_up", f"Values of a {graph.noun} in a relation", {"name": {"type": "string"}, "relation": relation}),
        _schema("find", f"Names of the {graph.nouns} that meet all conditions", conditions),
        _schema("count", f"Number of the {graph.nouns} that meet all conditions", conditions),
    ]


def _schema(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"{description}.", "parameters": parameters}}


def run_call(call: Call, graph: KnowledgeGraph) -> list[Value] | int:
    """The result of a call: values or names, sorted, or a number.

    Raises:
        ValueError: If there is no tool of this name.
    """
    if call.name == "look_up":
        return graph.tails(call.arguments["name"], call.arguments["relation"])
    if call.name not in ("find", "count"):
        raise ValueError(f"There is no tool {call.name!r}: call look_up, find or count.")
    found = Having(tuple(Condition(**condition) for condition in call.arguments["conditions"])).execute(graph)
    return len(found) if call.name == "count" else sorted(found, key=str)


def calls_of(form: Form, graph: KnowledgeGraph) -> list[list[Call]]:
    """The calls that answer a question, in rounds: those of a round need the results of the rounds before."""
    match form:
        case Tails(str() as head, relation):
            return [[_look_up(head, relation)]]
        case Tails(Tails() as inner, relation):
            return [*calls_of(inner, graph), [_look_up(str(head), relation) for head in _sorted(inner, graph)]]
        case Sharing(tails):
            found = ((Condition(tails.relation, "=", tail),) for tail in _sorted(tails, graph))
            return [*calls_of(tails, graph), [_with_conditions("find", conditions) for conditions in found]]
        case Having(conditions):
            return [[_with_conditions("find", conditions)]]
        case Count(Having(conditions)):
            return [[_with_conditions("count", conditions)]]
        case Other(inner, _):
            return calls_of(inner, graph)
        case Extreme(_, relation, entities):
            return [[_look_up(entity, relation) for entity in entities]]
    raise TypeError(f"{type(form).__name__} has no calls: add them to calls_of.")


def _sorted(form: Form, graph: KnowledgeGraph) -> list[Value]:
    return sorted(form.execute(graph), key=str)


def _look_up(name: str, relation: str) -> Call:
    return Call("look_up", {"name": name, "relation": relation})


def _with_conditions(tool: str, conditions: tuple[Condition, ...]) -> Call:
    return Call(tool, {"conditions": [condition._asdict() for condition in conditions]})
