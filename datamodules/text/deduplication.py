"""Leaving out documents that were seen before.

``exact``: documents that are equal but for white space. ``minhash``: also near duplicates, documents whose sets of runs of 16
characters overlap by an estimated 80 % or more (Jaccard similarity; Broder, "On the resemblance and containment of documents",
1997). Candidates come from locality-sensitive hashing of 128 values in 16 bands of 8: a pair of similarity s becomes one with
probability 1 - (1 - s^8)^16, which is 0.9999 at 0.9, 0.95 at 0.8, 0.06 at 0.5; the estimate, whose standard deviation is
0.035 at 0.8 for texts of some hundred characters and more, decides. The first of the duplicates stays.

Shape suffixes: N runs of a document, H values of its sketch.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

__all__ = ["Dedup", "Deduplicator", "minhash"]

Dedup = Literal["none", "exact", "minhash"]

_RUN = 16
_BANDS, _ROWS = 16, 8
_THRESHOLD = 0.8
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no information is lost modulo 2^64


class Deduplicator:
    """Remembers the documents it was shown.

    Args:
        dedup: Documents that count as seen before.
    """

    def __init__(self, dedup: Dedup) -> None:
        self.dedup = dedup
        self._seen: set[bytes] = set()
        self._bands: dict[bytes, list[int]] = {}
        self._sketches: list[np.ndarray] = []

    def is_duplicate(self, text: str) -> bool:
        """Whether the text, or nearly it, was shown before; if not, it is remembered."""
        if self.dedup == "none":
            return False
        normal = " ".join(text.split())
        digest = hashlib.blake2b(normal.encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            return True
        if self.dedup == "minhash" and self._is_near(minhash(normal)):
            return True
        self._seen.add(digest)
        return False

    def _is_near(self, sketch_H: np.ndarray) -> bool:
        bands = [bytes([band]) + row.tobytes() for band, row in enumerate(sketch_H.reshape(_BANDS, _ROWS))]
        candidates = {document for band in bands for document in self._bands.get(band, ())}
        if any((self._sketches[document] == sketch_H).mean() >= _THRESHOLD for document in candidates):
            return True
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._sketches))
        self._sketches.append(sketch_H)
        return False


def minhash(text: str) -> np.ndarray:
    """The sketch of a text: of each of 128 equal parts of the range of hashes, the least hash of the text's runs in it.

    The share of equal values of two texts estimates the Jaccard similarity of their sets of runs, as 128 separate hash
    functions would, for the price of one (one-permutation hashing; Li, Owen and Zhang, 2012). A part without any run borrows
    the next part's value (Shrivastava and Li, 2014).

    Args:
        text: The text; one that is shorter than a run is one run.

    Returns:
        uint64 (H,).
    """
    runs_N = np.unique(_run_hashes(text))
    parts_H = np.arange(_BANDS * _ROWS, dtype=np.uint64) << np.uint64(64 - 7)
    return runs_N[np.searchsorted(runs_N, parts_H) % len(runs_N)]


def _run_hashes(text: str) -> np.ndarray:
    """A hash of each run of 16 characters, uint64 (N,): a polynomial in the characters, its length doubled four times."""
    hashes_N = np.frombuffer(text.ljust(_RUN).encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(np.uint64)
    factor, length = _FACTOR, 1
    while length < _RUN:
        hashes_N = hashes_N[:-length] * np.uint64(factor) + hashes_N[length:]
        factor, length = factor * factor % (1 << 64), 2 * length
    for shift, odd in ((31, 0xBF58476D1CE4E5B9), (29, 0x94D049BB133111EB)):  # low bits of a product know only low bits
        hashes_N = (hashes_N ^ (hashes_N >> np.uint64(shift))) * np.uint64(odd)
    return hashes_N
