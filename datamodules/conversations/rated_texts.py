"""Short texts with the ratings of about twenty people each, on the scale from -4 (negative) to 4 (positive).

The asset ``vader-sentiment`` has four corpora: sentences of film reviews, of product reviews and of editorials, and tweets. Its
tar is read where it lies, and of its members only the eight with texts and ratings. Source: Hutto and Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from datamodules.assets.fetch import fetch
from datamodules.base.loader import epoch_generator

__all__ = ["PreferenceSource", "RatedCorpus", "RatedText", "draw_pairs", "read_rated_texts"]

RatedCorpus = Literal["movies", "products", "editorials", "tweets"]
PreferenceSource = Literal["raters", "means"]

_AGAIN = "remove the asset vader-sentiment from the cache, to fetch it again"
_FILES: dict[RatedCorpus, str] = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}


class RatedText(NamedTuple):
    """A text with its ratings.

    Attributes:
        corpus: Origin of the text.
        text: The text, without white space around it.
        mean: Mean rating as the corpus gives it, -4 to 4; that of some tweets leaves raters out.
        ratings: Rating of each person, -4 to 4.
    """

    corpus: RatedCorpus
    text: str
    mean: float
    ratings: tuple[int, ...]


def read_rated_texts(archive: Path | None = None) -> list[RatedText]:
    """Read the four corpora.

    Args:
        archive: The asset's tar. ``None``: that of the cache, where it is fetched to if need be (2.5 MB).

    Raises:
        AssetError: The asset cannot be fetched.
        ValueError: A file is missing, or a line is not what it should be.
    """
    if archive is None:
        archive = fetch("vader-sentiment") / "hutto_ICWSM_2014.tar.gz"
    texts: list[RatedText] = []
    with tarfile.open(archive) as tar:
        for corpus, name in _FILES.items():
            rated = _rows(tar, f"{name}_anonDataRatings", columns=4)
            for key, (mean, text) in _rows(tar, f"{name}_GroundTruth", columns=3).items():
                try:
                    ratings = tuple(map(int, json.loads(rated[key][-1])))
                    if not ratings:
                        raise ValueError("an empty list")
                    texts.append(RatedText(corpus, text.strip(), float(mean), ratings))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"The text {key} of {name} has no ratings ({error!r}): {_AGAIN}.") from error
    return texts


def _rows(tar: tarfile.TarFile, name: str, columns: int) -> dict[str, list[str]]:
    """The rows of a table without header by their first column, which is left out."""
    path = f"hutto_ICWSM_2014/{name}.txt"
    member = tar.extractfile(path) if path in tar.getnames() else None
    if member is None:
        raise ValueError(f"The tar of vader-sentiment has no file {path}: {_AGAIN}.")
    rows = [line.split("\t") for line in member.read().decode("utf-8-sig").split("\r\n") if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise ValueError(f"Line {number} of {path} has {len(row)} columns instead of {columns}: {_AGAIN}.")
    return {key: rest for key, *rest in rows}


def draw_pairs(
    texts: Sequence[RatedText], rounds: int, source: PreferenceSource, min_difference: float, seed: int
) -> list[tuple[int, int]]:
    """Draw pairs of texts, the more positive one first.

    Each round matches all texts at random, so that each is in one pair. Pairs without a preference, or of equal texts, are left
    out.

    Args:
        texts: The texts.
        rounds: Number of rounds.
        source: Origin of the preference: ``raters``: one person of each text, drawn at random, so that pairs have the noise of
            human judgement; ``means``: the mean ratings.
        min_difference: Least difference of the means for a preference.
        seed: Seed of matches and raters.

    Returns:
        Positions of the two in ``texts``.
    """
    pairs = []
    for number in range(rounds):
        generator = epoch_generator(seed, number, "pairs")
        order = torch.randperm(len(texts), generator=generator).tolist()
        draws = torch.rand(len(texts), generator=generator).tolist()
        for first, second in zip(order[::2], order[1::2], strict=False):
            if source == "means":
                scores = [texts[first].mean, texts[second].mean]
            else:
                scores = [texts[at].ratings[int(draws[at] * len(texts[at].ratings))] for at in (first, second)]
            difference = scores[0] - scores[1]
            least = min_difference if source == "means" else 0
            if difference and abs(difference) >= least and texts[first].text != texts[second].text:
                pairs.append((first, second) if difference > 0 else (second, first))
    return pairs
