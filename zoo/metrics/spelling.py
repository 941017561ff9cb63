"""Whether generated text is made of English words, and whether it says more than one thing.

Spelling accuracy as it is measured for text8 samples: Xue et al., arXiv 2404.15766. A line is cut at its spaces; words
cut off at its ends count like all others, and lower-cased names are not in the dictionary. So real text scores well
below 1: always show held-out text beside. Spelling is blind to diversity (a line of "a a a" is spelled perfectly):
read it with the share of distinct words and of duplicates, and compare these at equal numbers of lines only.
"""

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = [
    "SpellingAccuracy",
    "TextScores",
    "english_dictionary",
    "spelling_accuracy",
    "text_scores",
    "vocabulary",
    "words_of",
]

Accepts = Callable[[str], bool]

_REMEMBERED_WORDS = 2**18  # a language's words, with room for what an untrained model makes up


@dataclass(frozen=True)
class TextScores:
    """Scores of lines of text.

    Attributes:
        num_lines: Number of lines.
        num_words: Number of words in them.
        spelling_accuracy: Share of the words that the dictionary accepts; 0 where there are no words.
        vocabulary_accuracy: Share of the words that the vocabulary holds; None without a vocabulary.
        distinct_words: Number of different words, divided by the number of words.
        duplicates: Share of the lines that equal an earlier line.
    """

    num_lines: int
    num_words: int
    spelling_accuracy: float
    vocabulary_accuracy: float | None
    distinct_words: float
    duplicates: float


@functools.cache
def english_dictionary(path: Path | None = None) -> Accepts:
    """Hunspell's spelling check; a word that comes again is not looked up again.

    Args:
        path: A dictionary of your own, as the path of its `.aff` or `.dic` file; None for the en_US that spylls brings.

    Returns:
        A function that tells whether a word is spelled right.

    Raises:
        ImportError: spylls is not installed.
        FileNotFoundError: One of the dictionary's two files is missing.
    """
    try:
        from spylls.hunspell import Dictionary
    except ImportError as error:
        raise ImportError(
            "Spelling accuracy needs the package spylls: pip install spylls (in a checkout: pip install '.[eval]'), "
            "or leave out what measures it."
        ) from error
    if path is None:
        with as_file(files("spylls") / "hunspell" / "data" / "en") as folder:
            dictionary = Dictionary.from_files(str(folder / "en_US"))
    else:
        for file in (path.with_suffix(".aff"), path.with_suffix(".dic")):
            if not file.is_file():
                raise FileNotFoundError(
                    f"The dictionary's file {file} does not exist: a Hunspell dictionary is a .aff and a .dic."
                )
        dictionary = Dictionary.from_files(str(path.with_suffix("")))
    return functools.lru_cache(maxsize=_REMEMBERED_WORDS)(dictionary.lookup)


def words_of(line: str) -> list[str]:
    """The words of a line: what stands between spaces, which may also be written as underscores.

    Example:
        >>> words_of("__to_be or  ")
        ['to', 'be', 'or']
    """
    return line.replace("_", " ").split()


def vocabulary(text: str, min_count: int = 2) -> frozenset[str]:
    """The words that a text holds at least `min_count` times.

    Example:
        >>> sorted(vocabulary("to be or not to be"))
        ['be', 'to']
    """
    counts = Counter(found.group() for found in re.finditer(r"[^\s_]+", text))  # one by one: the text may be long
    return frozenset(word for word, count in counts.items() if count >= min_count)


def spelling_accuracy(lines: Iterable[str], accepts: Accepts | None = None) -> float:
    """Share of the words of all lines together that the dictionary accepts.

    Args:
        lines: Lines of lower-case text.
        accepts: Tells whether a word is spelled right; None for `english_dictionary()`.

    Returns:
        A number in [0, 1]; 0 where there are no words.

    Example:
        >>> spelling_accuracy(["the house", "", "xqzt __"], accepts={"the", "house"}.__contains__)
        0.6666666666666666
    """
    return text_scores(list(lines), accepts=accepts).spelling_accuracy


def text_scores(lines: Sequence[str], known_words: frozenset[str] | None = None, accepts: Accepts | None = None) -> TextScores:
    """Spelling and diversity of lines of text.

    Args:
        lines: Lines of lower-case text.
        known_words: The training text's `vocabulary`.
        accepts: Tells whether a word is spelled right; None for `english_dictionary()`.

    Raises:
        ImportError: spylls is not installed, and no other check was given.
        ValueError: There are no lines.
    """
    accepts = accepts or english_dictionary()
    words = [word for line in lines for word in words_of(line)]
    return _scores(
        num_lines=len(lines),
        num_words=len(words),
        accepted=sum(accepts(word) for word in words),
        in_vocabulary=None if known_words is None else sum(word in known_words for word in words),
        distinct_words=len(set(words)),
        distinct_lines=len(set(lines)),
    )


def _scores(
    *, num_lines: int, num_words: int, accepted: int, in_vocabulary: int | None, distinct_words: int, distinct_lines: int
) -> TextScores:
    """Counts as shares."""
    if not num_lines:
        raise ValueError("Spelling accuracy wants at least one line of text.")
    words = max(num_words, 1)
    return TextScores(
        num_lines=num_lines,
        num_words=num_words,
        spelling_accuracy=accepted / words,
        vocabulary_accuracy=None if in_vocabulary is None else in_vocabulary / words,
        distinct_words=distinct_words / words,
        duplicates=1 - distinct_lines / num_lines,
    )


class SpellingAccuracy(Metric):
    """`text_scores` as a torchmetrics metric that collects lines batch by batch and rank by rank.

    `compute` gathers from all ranks, so all of them must call it (`text_scores` is for one rank alone). Between ranks
    travel counts, and 64 bits for each word and line, from which distinct ones are counted.

    Args:
        known_words: The training text's `vocabulary`; None for none.
        accepts: Tells whether a word is spelled right; None for `english_dictionary()`.

    Raises:
        ImportError: spylls is not installed, and no other check was given.

    Example:
        >>> metric = SpellingAccuracy(accepts={"to", "be"}.__contains__)
        >>> metric.update(["to be", "to bee"])
        >>> metric.compute()["spelling_accuracy"], metric.compute()["distinct_words"]
        (0.75, 0.75)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    accepted: Tensor
    in_vocabulary: Tensor
    words: list[Tensor]
    lines: list[Tensor]

    def __init__(self, known_words: frozenset[str] | None = None, accepts: Accepts | None = None) -> None:
        super().__init__()
        self.known_words = known_words
        if accepts is None:
            english_dictionary()  # to find out now whether it is there; it is no part of the metric, which can be pickled
        self.accepts = accepts
        self.add_state("accepted", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("in_vocabulary", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("words", default=[], dist_reduce_fx="cat")
        self.add_state("lines", default=[], dist_reduce_fx="cat")

    def update(self, lines: Sequence[str]) -> None:
        """Add lines of lower-case text."""
        words = [word for line in lines for word in words_of(line)]
        accepts = self.accepts or english_dictionary()
        self.accepted += sum(accepts(word) for word in words)
        if self.known_words is not None:
            self.in_vocabulary += sum(word in self.known_words for word in words)
        self.words.append(self._fingerprints(words))
        self.lines.append(self._fingerprints(lines))

    def compute(self) -> dict[str, Any]:
        """The fields of `TextScores` of all lines so far.

        Raises:
            ValueError: There are no lines.
        """
        lines, words = (dim_zero_cat(state) if len(state) else torch.empty(0) for state in (self.lines, self.words))
        scores = _scores(
            num_lines=len(lines),
            num_words=len(words),
            accepted=int(self.accepted),
            in_vocabulary=None if self.known_words is None else int(self.in_vocabulary),
            distinct_words=len(words.unique()),
            distinct_lines=len(lines.unique()),
        )
        return dataclasses.asdict(scores)

    def _fingerprints(self, texts: Sequence[str]) -> Tensor:
        """int64 (N,), equal for equal texts."""
        keys = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True) for text in texts]
        return torch.tensor(keys, dtype=torch.int64, device=self.device)
