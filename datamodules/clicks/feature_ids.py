"""Ids of categories and of ranges of numbers, learnt from the training rows and stored as plain data.

Shape suffixes: N values, K categories or edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Categories", "Ranges"]


@dataclass(frozen=True)
class Categories:
    """Categories that are common in the training rows: ids from 1 on; everything else has id 0.

    Attributes:
        names: The categories, in the order of their ids.

    Example:
        >>> carriers = Categories.of(np.array(["UA", "AA", "UA", "ZZ"]), min_count=2)
        >>> carriers.names, carriers.ids(np.array(["UA", "AA"])).tolist(), carriers.num_ids
        (('UA',), [1, 0], 2)
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, values: np.ndarray, min_count: int = 1) -> Categories:
        """Learn from values, str (N,); those seen fewer than ``min_count`` times, and the empty text, are left to id 0."""
        found, counts = np.unique(values, return_counts=True)
        return cls(tuple(str(name) for name in found[(counts >= min_count) & (found != "")]))

    @property
    def num_ids(self) -> int:
        """Number of ids."""
        return len(self.names) + 1

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Ids int32 (N,) of values, str (N,)."""
        number = {name: place for place, name in enumerate(self.names, start=1)}
        found, place_N = np.unique(values, return_inverse=True)
        return np.array([number.get(str(name), 0) for name in found], dtype=np.int32)[place_N]


@dataclass(frozen=True)
class Ranges:
    """A number as the range it lies in, and as its distance from the mean in standard deviations.

    Attributes:
        edges: Inner edges of the ranges, ascending: a value v has id 1 + (how many edges are <= v); a missing one id 0.
        mean: Mean of the training rows.
        std: Their standard deviation.

    Example:
        >>> Ranges((0.0, 10.0), mean=5.0, std=2.0).ids(np.array([-1.0, 0.0, 12.0, np.nan])).tolist()
        [1, 2, 3, 0]
    """

    edges: tuple[float, ...]
    mean: float
    std: float

    @classmethod
    def of(cls, values: np.ndarray, num_ranges: int) -> Ranges:
        """Learn from values, float (N,), NaN where missing; ranges hold about equally many of them.

        Raises:
            ValueError: All values are missing.
        """
        known = values[~np.isnan(values)]
        if not len(known):
            raise ValueError("Ranges cannot be learnt from a column in which every value is missing.")
        edges = np.unique(np.quantile(known, np.arange(1, num_ranges) / num_ranges, method="higher"))
        return cls(tuple(edges[edges > known.min()].tolist()), float(known.mean()), float(known.std()) or 1.0)

    @property
    def num_ids(self) -> int:
        """Number of ids."""
        return len(self.edges) + 2

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Ids int32 (N,) of values, float (N,)."""
        ids = np.searchsorted(np.array(self.edges), values, side="right") + 1
        return np.where(np.isnan(values), 0, ids).astype(np.int32)

    def standardized(self, values: np.ndarray) -> np.ndarray:
        """float32 (N,): distance from the mean in standard deviations, 0 where missing."""
        return np.nan_to_num((values - self.mean) / self.std).astype(np.float32)
