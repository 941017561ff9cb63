"""Facts on films of MovieLens-100K (genres and year) and of Freebase (actors, directors, awards and the like).

The two do not know each other. RecBole's archive has a file that links them, ``ml-100k.link``, but its film numbers are those of
another edition of MovieLens: it gives *The Craft*, *Half Baked* and *A Goofy Movie* one director, and whether Freebase calls a
film a comedy says nothing on whether MovieLens does (correlation -0.05 over 1,596 films). So it is not read: films of MovieLens
have titles, those of Freebase keep their ids, as persons, companies and awards do.

The facts are for research, and must not be passed on (GroupLens), so they are fetched and never shipped.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

from datamodules.conversations.knowledge_graph import KnowledgeGraph, Triple, read_triples

__all__ = ["film_graph", "titled_films"]

# Relations of the file: our name, and whether head and tail change places.
_RELATIONS = {
    "film.film.actor": ("actor", False),
    "film.actor.film": ("actor", True),
    "film.film.award_nomination": ("award nomination", False),
    "film.film.award_won": ("award won", False),
    "film.film.cinematography": ("cinematographer", False),
    "film.cinematographer.film": ("cinematographer", True),
    "film.film.country": ("country", False),
    "film.film.directed_by": ("director", False),
    "film.director.film": ("director", True),
    "film.film.genre": ("Freebase genre", False),
    "film.film_genre.films_in_this_genre": ("Freebase genre", True),
    "film.film.language": ("language", False),
    "film.film.prequel": ("prequel", False),
    "film.film.produced_by": ("producer", False),
    "film.producer.film": ("producer", True),
    "film.film.production_companies": ("production company", False),
    "film.production_company.films": ("production company", True),
    "film.film.rating": ("content rating", False),
    "film.content_rating.film": ("content rating", True),
    "film.film.sequel": ("sequel", False),
    "film.film.subjects": ("subject", False),
    "film.film_subject.films": ("subject", True),
    "film.film.written_by": ("writer", False),
    "film.writer.film": ("writer", True),
}
_ARTICLE = re.compile(r"(.+), (The|A|An|Das|Der|Die|El|Il|L'|La|Las|Le|Les|Los)( \(.*\))?")


def film_graph(folder: Path) -> KnowledgeGraph:
    """The facts of the asset ``movielens-100k``, with films as heads.

    Relations that Freebase has in both directions are one here. Films of the same title are told apart by their year; those of
    the same year are one.

    Args:
        folder: Folder with ``ml-100k.item`` and ``ml-100k.kg``.
    """
    triples = titled_films(folder / "ml-100k.item")
    for head, relation, tail in read_triples(folder / "ml-100k.kg"):
        name, turned = _RELATIONS[relation]
        triples.append(Triple(str(tail), name, head) if turned else Triple(head, name, tail))
    return KnowledgeGraph(triples, "film", "films")


def titled_films(path: Path) -> list[Triple]:
    """Genres and years of the films of a table such as ``ml-100k.item``, whose heads are titles.

    Args:
        path: Table separated by tabs with the columns ``movie_title``, ``release_year`` and ``class``, the genres.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            {name.partition(":")[0]: text for name, text in row.items()}
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
    years = defaultdict(set)
    for row in rows:
        years[_title(row["movie_title"])].add(row["release_year"])
    triples = []
    for row in rows:
        title, year = _title(row["movie_title"]), row["release_year"]
        if year.isdecimal():  # one film has none, and is unknown altogether; another has a letter
            name = f"{title} ({year})" if len(years[title]) > 1 else title
            triples.append(Triple(name, "release year", year))
            triples += [Triple(name, "genre", genre) for genre in row["class"].split() if genre != "unknown"]
    return triples


def _title(written: str) -> str:
    """A title with its article in front: ``Net, The`` is ``The Net``."""
    found = _ARTICLE.fullmatch(written)
    if found is None:
        return written
    title, article, original = found.groups(default="")
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{title}{original}"
