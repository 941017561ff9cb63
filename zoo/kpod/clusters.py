"""Clusters of questions, among which the curriculum spreads its choice: k-means on embeddings.

The paper embeds a question as the mean of its words' GloVe vectors; any other embedding may be clustered as well (the student's,
a sentence encoder's). Nothing is standardised. Sources: arXiv 2405.16064, section 3.4; Arthur and Vassilvitskii, "k-means++: the
advantages of careful seeding", SODA 2007.

Shape suffixes: N questions, D width of an embedding, K clusters.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["kmeans", "mean_word_vectors", "read_glove"]

_MAX_ITERATIONS, _STARTS = 300, 10
_WORD = re.compile(r"\w+|[^\w\s]")


def kmeans(x_ND: Tensor, clusters: int = 5, seed: int = 0) -> Tensor:
    """Lloyd's algorithm from k-means++ centres, the best of ten starts (least sum of squared distances); float64 on the CPU.

    Args:
        x_ND: Embeddings; rows may be equal, or 0.
        clusters: K. Where fewer rows differ, some clusters stay empty.
        seed: Seed of the starts; equal seeds and embeddings give equal labels.

    Returns:
        Labels 0 to K - 1, int64 (N,), numbered in the order of their first questions.

    Raises:
        ValueError: If there are fewer questions than clusters, or an embedding is not finite.

    Example:
        >>> kmeans(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), clusters=2)
        tensor([0, 1, 0, 1])
    """
    x_ND = x_ND.detach().cpu().double()
    if not 1 <= clusters <= len(x_ND):
        raise ValueError(f"kmeans: clusters={clusters} must be from 1 to the number of questions, {len(x_ND)}.")
    if not bool(x_ND.isfinite().all()):
        raise ValueError("kmeans: an embedding is not finite: check the embeddings; a question without words may be all zeros.")
    x_ND = x_ND - x_ND.mean(0)  # distances stay, and are rounded less
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(x_ND, _spread_centres(x_ND, clusters, generator)) for _ in range(_STARTS)]
    _, label_N = min(runs, key=lambda run: run[0])
    names: dict[int, int] = {}
    return torch.tensor([names.setdefault(label, len(names)) for label in label_N.tolist()])


def _spread_centres(x_ND: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each further centre (K, D) is drawn in proportion to the squared distance to the nearest one before."""
    chosen = [int(torch.randint(len(x_ND), (), generator=generator))]
    nearest_N = torch.full((len(x_ND),), torch.inf, dtype=x_ND.dtype)
    while len(chosen) < clusters:
        nearest_N = nearest_N.minimum((x_ND - x_ND[chosen[-1]]).square().sum(1))
        weight_N = nearest_N if bool(nearest_N.any()) else torch.ones_like(nearest_N)
        chosen.append(int(torch.multinomial(weight_N, 1, generator=generator)))
    return x_ND[chosen]


def _lloyd(x_ND: Tensor, centre_KD: Tensor) -> tuple[float, Tensor]:
    """Sum of squared distances and labels (N,) once labels no longer change; a cluster that loses all keeps its centre."""
    label_N = torch.full((len(x_ND),), -1)
    for _ in range(_MAX_ITERATIONS):
        distance_NK = centre_KD.square().sum(1) - x_ND @ (2 * centre_KD.T)  # squared, less that of the row to 0
        last_N, label_N = label_N, distance_NK.argmin(1)
        if torch.equal(label_N, last_N):
            break
        member_NK = F.one_hot(label_N, len(centre_KD)).double()
        count_K1 = member_NK.sum(0)[:, None]
        centre_KD = torch.where(count_K1 > 0, member_NK.T @ x_ND / count_K1.clamp(min=1), centre_KD)
    return float((x_ND - centre_KD[label_N]).square().sum()), label_N


def mean_word_vectors(questions: Sequence[str], glove: str | Path) -> Tensor:
    """Mean of the GloVe vectors of each question's words, float64 (N, D); 0 where the file has none of them.

    Words are runs of letters and digits, and single other signs; a word that the file lacks is looked up in lower case.

    Args:
        questions: Texts.
        glove: GloVe text file.

    Raises:
        ValueError: If the file is malformed, or has no word of any question.
    """
    words_N = [_WORD.findall(question) for question in questions]
    vectors = read_glove(glove, {form for words in words_N for word in words for form in (word, word.lower())})
    if not vectors:
        raise ValueError(f"{Path(glove).name} has a vector for no word of the questions: give vectors of their language.")
    zero = torch.zeros_like(next(iter(vectors.values())))
    found_N = [[v for word in words if (v := vectors.get(word, vectors.get(word.lower()))) is not None] for words in words_N]
    return torch.stack([torch.stack(found).mean(0) if found else zero for found in found_N])


def read_glove(path: str | Path, words: Collection[str]) -> dict[str, Tensor]:
    """Vectors, float64 (D,), of those words that a GloVe text file has: lines of a word and D numbers, divided by spaces.

    Words with spaces inside, as a few of the published files have, are skipped.

    Args:
        path: The file, in UTF-8.
        words: The words that are wanted.

    Raises:
        ValueError: If a line is malformed.
    """
    vectors: dict[str, Tensor] = {}
    width, where = 0, "line 1"
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"line {number}"
                word, *numbers = line.rstrip("\n").split(" ") if line.partition(" ")[0] in words else [""]
                found = line.count(" ")
                width = width or found
                if width < 2 or found < width:
                    raise ValueError(f"{found} numbers behind the word instead of {max(width, 2)}")
                if len(numbers) == width:
                    vectors[word] = torch.tensor([float(text) for text in numbers], dtype=torch.float64)
    except ValueError as error:  # of the encoding, too
        problem = f"{Path(path).name}, {where}: {str(error)[:120]}"
        raise ValueError(f"{problem}: give a GloVe text file, complete, unpacked and without a header.") from error
    return vectors
