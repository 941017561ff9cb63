"""Write conversations on films, and fine-tune a small language model on them:

    python examples/make_chats.py
    zoo fit -c lm/smollm2_sft --data.path chats.jsonl --data.val_path chats_held_out.jsonl
    zoo fit -c lm/smollm2_dpo --data.path pairs.jsonl --data.val_path pairs_held_out.jsonl

200 conversations to train on and 100 held out ask for years, genres and films of MovieLens-100K (2 MB, fetched once; for
research, not to be passed on). No film is in both files. The pairs prefer the answer on the film that was asked for to the
same answer on another one. Your own table does as well: ``python examples/make_chats.py my.tsv``,
with columns ``movie_title``, ``release_year`` and ``class`` (genres), separated by tabs.
"""

import json
import random
import sys
from pathlib import Path

from datamodules.assets.fetch import fetch
from datamodules.conversations.film_graph import titled_films
from datamodules.conversations.knowledge_graph import Condition, KnowledgeGraph

ASKED = {
    "year": ("When was {film} released?", "From which year is {film}?", "{film}: which year?"),
    "genres": ("What kind of film is {film}?", "Which genres does {film} have?", "Name the genres of {film}."),
    "both": ("Tell me about {film}.", "What do you know about the film {film}?"),
    "films": ("Name a few films from {year} of the genre {genre}.", "Which {genre} films of {year} do you know?"),
}
ANSWERED = {
    "year": "{film} was released in {year}.",
    "genres": "{film} is listed under {genres}.",
    "both": "{film} was released in {year} and is listed under {genres}.",
    "films": "{genre} films of {year}: {films}.",
}


def chats(graph: KnowledgeGraph, count: int, seed: int = 0) -> list[dict]:
    """Conversations on the films of a graph; each is one question and its answer."""
    choices = random.Random(seed)
    films = [film for film in graph.heads if graph.tails(film, "genre") and graph.tails(film, "release year")]
    rows = []
    for number in range(count):
        film, kind = choices.choice(films), list(ASKED)[number % len(ASKED)]
        genres, (year, *_) = graph.tails(film, "genre"), graph.tails(film, "release year")
        genre = choices.choice(genres)
        others = set(graph.having(Condition("genre", "=", genre))) & set(graph.having(Condition("release year", "=", year)))
        listed = [film, *choices.sample(sorted(others - {film}), min(2, len(others) - 1))]
        words = {"film": film, "year": year, "genre": genre, "genres": ", ".join(genres), "films": "; ".join(sorted(listed))}
        question, answer = choices.choice(ASKED[kind]).format(**words), ANSWERED[kind].format(**words)
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def pairs(rows: list[dict]) -> list[dict]:
    """Preferences: each answer, and the one to the next question of the same kind, which is wrong here."""
    found = []
    for row, other in zip(rows, rows[len(ASKED) :] + rows[: len(ASKED)], strict=True):
        (question, answer), (_, wrong) = row["messages"], other["messages"]
        if answer != wrong:
            found.append({"prompt": [question], "chosen": [answer], "rejected": [wrong]})
    return found


def main(table: str | None = None, folder: str = ".", num_train: int = 200, num_held_out: int = 100) -> None:
    """Write ``chats.jsonl``, ``pairs.jsonl``, and the same of the films that are held out."""
    path = Path(table) if table else fetch("movielens-100k") / "ml-100k.item"
    train, held_out = KnowledgeGraph(titled_films(path), "film", "films").split(1 / 3)
    for ending, graph, count in (("", train, num_train), ("_held_out", held_out, num_held_out)):
        conversations = chats(graph, count)
        for name, rows in (("chats", conversations), ("pairs", pairs(conversations))):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(folder, f"{name}{ending}.jsonl").write_text(text, encoding="utf-8")
        print(f"chats{ending}.jsonl, pairs{ending}.jsonl: {count} conversations on {len(graph.heads)} films")


if __name__ == "__main__":
    main(*sys.argv[1:2])
