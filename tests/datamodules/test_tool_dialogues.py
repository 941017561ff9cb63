"""Conversations from a knowledge graph: every answer is what a search through all triples finds, and no head is on both sides."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from datamodules import SFT, ToolDialogues
from datamodules.assets.fetch import fetch
from datamodules.conversations.dialogue_patterns import Pattern
from datamodules.conversations.film_graph import film_graph, titled_films
from datamodules.conversations.graph_tools import Call, run_call
from datamodules.conversations.knowledge_graph import KnowledgeGraph, Triple, read_triples
from datamodules.conversations.tool_dialogues import ToolDialogue, generate_dialogues

PATTERNS = get_args(Pattern)


def facts(count: int = 60) -> list[Triple]:
    """Made-up films with directors, genres, years and sequels."""
    films = [f'The "{n}" film, part {n % 3}' for n in range(count)]
    triples = []
    for n, film in enumerate(films):
        triples += [Triple(film, "director", f"person {n * n % 11}"), Triple(film, "release year", str(1970 + n % 17))]
        triples += [Triple(film, "genre", genre) for genre in {("Comedy", "War", "Crime")[n % 3], ("Drama", "War")[n % 2]}]
        triples += [Triple(film, "sequel", films[(n + 7) % count])] * (n % 4 == 0)
    return triples


@pytest.fixture(scope="module")
def graph() -> KnowledgeGraph:
    return KnowledgeGraph(facts(), "film", "films")


@pytest.fixture(scope="module")
def dialogues(graph: KnowledgeGraph) -> list[ToolDialogue]:
    return generate_dialogues(graph, 210, seed=3)


def table(path: Path, triples: list[Triple], header: str = "head\trelation\ttail") -> Path:
    path.write_text("\n".join([header, *("\t".join(map(str, triple)) for triple in triples)]) + "\n")
    return path


# By search: a loop over all triples for each step, on the logical form as it is written.


def having(triples: list[Triple], conditions: list[tuple[str, str, Any]]) -> set[str]:
    heads = {triple.head for triple in triples}
    for relation, operator, value in conditions:
        meets = {"=": lambda x, y: x == y, "<": lambda x, y: x < y, ">": lambda x, y: x > y}[operator]
        heads &= {head for head, name, tail in triples if name == relation and meets(tail, value)}
    return heads


def search(triples: list[Triple], form: str) -> set[Any]:
    """Answers to a logical form."""
    name, inside = re.fullmatch(r"(\w+)\((.*)\)", form).groups()
    if name == "having":
        return having(triples, [(relation, sign, value) for relation, sign, value in conditions_of(inside)])
    if name == "count":
        return {len(search(triples, inside))}
    *_, last = strings(inside)
    if name == "tails":
        inner = inside[: inside.rindex(", ")] if inside.startswith("tails(") else None
        heads = search(triples, inner) if inner else {strings(inside)[0]}
        return {tail for head, relation, tail in triples if head in heads and relation == last}
    if name == "sharing":
        tails = search(triples, inside)
        return {head for head, relation, tail in triples if relation == last and tail in tails}
    if name == "other":
        return search(triples, inside[: len(inside) - len(json.dumps(last)) - 2]) - {last}
    relation, *entities = strings(inside)
    years = {head: tail for head, name, tail in triples if name == relation and head in entities}
    best = max(years.values()) if name == "largest" else min(years.values())
    return {head for head, year in years.items() if year == best}


def strings(text: str) -> list[str]:
    return [json.loads(found) for found in re.findall(r'"(?:[^"\\]|\\.)*"', text)]


def conditions_of(text: str) -> list[tuple[str, str, Any]]:
    found = re.findall(r'("(?:[^"\\]|\\.)*") ([=<>]) ("(?:[^"\\]|\\.)*"|[\d.]+)', text)
    return [(json.loads(relation), sign, json.loads(value)) for relation, sign, value in found]


def test_every_answer_is_what_a_search_through_all_triples_finds(graph, dialogues):
    assert {dialogue["pattern"] for dialogue in dialogues} == set(PATTERNS)
    assert any(">" in dialogue["logical_form"] for dialogue in dialogues) and any("<" in d["logical_form"] for d in dialogues)
    for dialogue in dialogues:
        assert set(dialogue["answer"]) == search(graph.triples, dialogue["logical_form"]), dialogue["logical_form"]
        assert 0 < len(dialogue["answer"]) <= 5
        assert all(str(answer) in dialogue["messages"][-1]["content"] for answer in dialogue["answer"])


def test_results_of_tools_are_those_of_their_calls_and_hold_the_answer(graph, dialogues):
    for dialogue in dialogues:
        calls, results, offered = [], [], {tool["function"]["name"] for tool in dialogue["tools"]}
        for message in dialogue["messages"]:
            calls += [call["function"] for call in message.get("tool_calls", ())]
            if message["role"] == "tool":
                results.append(json.loads(message["content"]))
        for call, result in zip(calls, results, strict=True):
            arguments = call["arguments"]
            assert call["name"] in offered
            if call["name"] == "look_up":
                head, relation = arguments["name"], arguments["relation"]
                found = {t.tail for t in graph.triples if t.head == head and t.relation == relation}
                assert set(result) == found and len(result) == len(found)
            else:
                found = having(graph.triples, [tuple(condition.values()) for condition in arguments["conditions"]])
                assert (result == len(found)) if call["name"] == "count" else (set(result) == found)
        last = results[-1]
        if dialogue["pattern"] == "count":
            assert dialogue["answer"] == [last]
        elif dialogue["pattern"] not in ("there_and_back", "comparison"):
            assert dialogue["answer"] == sorted(last, key=str)


def test_a_conversation_depends_on_seed_and_number_alone(graph, dialogues):
    assert generate_dialogues(graph, 50, seed=3) == dialogues[:50]
    assert generate_dialogues(KnowledgeGraph(facts()[::-1], "film", "films"), 20, seed=3) == dialogues[:20]
    assert generate_dialogues(graph, 50, seed=4) != dialogues[:50]
    texts = {pattern: {d["messages"][1]["content"] for d in dialogues if d["pattern"] == pattern} for pattern in PATTERNS}
    assert all(len(found) > 10 for found in texts.values())


def test_the_calls_come_in_the_form_that_chat_templates_read(dialogues):
    roles = ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    two = next(dialogue for dialogue in dialogues if dialogue["pattern"] == "two_hops")
    assert [message["role"] for message in two["messages"]] == roles
    assert json.loads(json.dumps(two)) == two
    for tool in two["tools"]:
        assert tool["type"] == "function" and {"name", "description", "parameters"} == tool["function"].keys()


# The DataModule


@pytest.fixture
def data(tmp_path):
    path = table(tmp_path / "facts.tsv", facts(), "head_id:token\trelation_id:token\ttail_id:token")
    return ToolDialogues(triples=path, num_train=70, num_val=28, val_fraction=0.4, system=None, num_call_prompts=9, batch_size=7)


def test_no_head_is_on_both_sides(data):
    train, val = ({text for row in rows for text in names(row)} for rows in data.dialogues)
    films = {triple.head for triple in facts()}
    assert train & films and val & films and not train & val & films
    assert [len(part) for part in data.dialogues] == [len(part) for part in data.splits] == [70, 28]


def names(value: Any) -> set[str]:
    """All strings in the messages of a conversation, those inside JSON and logical forms too."""
    if isinstance(value, dict):
        return set().union(*map(names, value.values()))
    if isinstance(value, list):
        return set().union(*map(names, value))
    if isinstance(value, str) and value.startswith("["):
        return names(json.loads(value))
    return {value, *strings(value)} if isinstance(value, str) else set()


def test_batches_are_those_of_sft_on_the_same_rows(data, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, data.dialogues[0])) + "\n")
    same = SFT(path=tmp_path / "rows.jsonl", val_fraction=0.0, system=None, batch_size=7)
    for one, other in zip(data.train_dataloader(), same.train_dataloader(), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_held_out_calls_are_asked_for_behind_true_messages(data):
    _, prompts = data.val_dataloader()
    texts, calls = [], []
    for batch in prompts:
        texts += batch["prompt"]
        calls += [json.loads(reference) for reference in batch["calls"]]
        assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert len(texts) == 9
    expected = [m for row in data.dialogues[1] for m in row["messages"] if m.get("tool_calls")][:9]
    assert calls == [[call["function"] for call in message["tool_calls"]] for message in expected]
    assert all(text.endswith("<role>ASSISTANT</role>") for text in texts)
    assert any("<role>OBSERVATION</role>" in text for text in texts), "second calls follow the results of the first"
    assert next(iter(data.predict_dataloader()))["prompt"] == texts[:7], "what predict asks without prompts of one's own"
    plain = SFT(path=Path("x"), num_call_prompts=3)
    plain.__dict__["splits"] = ([], [data.splits[1][0]._replace(key='[{"role": "user", "content": "hi"}]')])
    with pytest.raises(ValueError, match="num_call_prompts=3, but no held-out conversation of x calls a tool"):
        plain.val_dataloader()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("head\ttail", r"lacks the column\(s\) relation: its first line .* separated by tabs"),
        ("", r"column\(s\) head, relation, tail"),
    ],
)
def test_missing_columns_are_named_in_a_sentence(tmp_path, header, message):
    with pytest.raises(ValueError, match=message) as error:
        read_triples(table(tmp_path / "t.tsv", facts(1), header))
    assert len(str(error.value)) < 300 + len(str(tmp_path)) and "\n" not in str(error.value)


def test_tables_of_ones_own(tmp_path):
    (tmp_path / "t.csv").write_text('note,tail,head,relation\nx,"Scott, Ridley",Alien,director\ny,12,Alien,oscar id\n')
    assert read_triples(tmp_path / "t.csv") == [Triple("Alien", "director", "Scott, Ridley"), Triple("Alien", "oscar id", "12")]
    broken = table(tmp_path / "t.tsv", [*facts(2), Triple("x", "y", "")])
    with pytest.raises(ValueError, match=r"1 of 9 rows .*line 10: it has no tail"):
        read_triples(broken)
    with pytest.warns(UserWarning, match="left out"):
        assert len(set(read_triples(broken, "skip"))) == len(set(facts(2)))
    with pytest.raises(ValueError, match="holds no triple"):
        read_triples(table(tmp_path / "u.tsv", []))
    with pytest.raises(FileNotFoundError, match="give a table of triples"):
        read_triples(tmp_path / "none.tsv")


def test_a_relation_is_numeric_if_its_tails_are_numbers_and_no_ids():
    graph = KnowledgeGraph(
        [Triple("1", "knows", "2"), Triple("2", "knows", "1"), Triple("1", "age", "30"), Triple("2", "age", "4.5")]
    )
    assert graph.numeric == ["age"] and graph.tails("1", "knows") == ["2"] and graph.tails("2", "age") == [4.5]
    assert run_call(Call("count", {"conditions": [{"relation": "age", "operator": ">", "value": 4.5}]}), graph) == 1


def test_what_the_triples_do_not_have_is_refused(tmp_path):
    plain = KnowledgeGraph([Triple("a", "colour", "red"), Triple("b", "colour", "blue")])
    with pytest.raises(ValueError, match=r"nothing for the pattern.* two_hops, comparison"):
        generate_dialogues(plain, 1, ["two_hops", "comparison"])
    with pytest.raises(ValueError, match="No subgraph of the pattern there_and_back with at most 5 answers"):
        generate_dialogues(plain, 1, ["there_and_back"])
    for options, message in (
        ({"num_train": 0}, "num_train=0"),
        ({"num_val": 5, "val_fraction": 0.0}, "num_val=5 needs a val_fraction above 0"),
        ({"patterns": ["three_hops"]}, r"patterns=\['three_hops'\] must be some of one_hop"),
        ({"num_call_prompts": -1}, "num_call_prompts=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            ToolDialogues(**options)


# The films


def test_films_have_plain_titles_that_tell_them_apart(tmp_path):
    rows = ["1\tNet, The\t1995\tSci-Fi Thriller", "2\tSabrina\t1954\tComedy",
            "3\tSabrina\t1995\tComedy", "4\t?\tunkonwn\tunknown",
            "5\tPostman, The (Postino, Il)\t1994\tunknown"]  # fmt: skip
    path = tmp_path / "item"
    path.write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + "\n".join(rows) + "\n")
    assert titled_films(path)[:3] == [
        Triple("The Net", "release year", "1995"), Triple("The Net", "genre", "Sci-Fi"), Triple("The Net", "genre", "Thriller"),
    ]  # fmt: skip
    assert {triple.head for triple in titled_films(path)} == {
        "The Net",
        "Sabrina (1954)",
        "Sabrina (1995)",
        "The Postman (Postino, Il)",
    }


def test_the_knowledge_graph_of_movielens_has_the_facts_that_were_counted():
    folder = fetch("movielens-100k")
    assert len(read_triples(folder / "ml-100k.kg")) == 91_631
    graph = film_graph(folder)
    assert graph.numeric == ["release year"] and len(graph.relations) == 17
    assert len(graph.triples) == 77_368, "directions that the file has twice are one"
    assert graph.tails("Toy Story", "genre") == ["Animation", "Children's", "Comedy"]
    assert graph.tails("Toy Story", "release year") == [1995]
