"""Write conversations on films, and fine-tune a small language model on them:

    python examples/make_chats.py
    zoo fit -c lm/smollm2_sft --data.path chats.jsonl --data.val_path chats_held_out.jsonl

200 conversations to train on and 100 held out ask for years, genres and films of MovieLens-100K (2 MB, fetched once; for
research, not to be passed on). No film is in both files. Your own table does as well: ``python examples/make_chats.py my.tsv``,
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


def main(table: str | None = None, folder: str = ".", num_train: int = 200, num_held_out: int = 100) -> None:
    """Write ``chats.jsonl`` and ``chats_held_out.jsonl``."""
    path = Path(table) if table else fetch("movielens-100k") / "ml-100k.item"
    train, held_out = KnowledgeGraph(titled_films(path), "film", "films").split(1 / 3)
    for name, graph, count in (("chats", train, num_train), ("chats_held_out", held_out, num_held_out)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chats(graph, count))
        Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {count} conversations on {len(graph.heads)} films")


if __name__ == "__main__":
    main(*sys.argv[1:2])
