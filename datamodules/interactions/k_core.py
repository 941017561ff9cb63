"""The k-core of a bipartite graph: the largest part in which every user and every item still has enough interactions.

Shape suffixes: N interactions.
"""

from __future__ import annotations

import numpy as np

__all__ = ["k_core"]


def k_core(user_N: np.ndarray, item_N: np.ndarray, user_k: int, item_k: int) -> np.ndarray:
    """Find the interactions of the k-core; repeats of a pair count.

    Args:
        user_N: User numbers, int64 (N,), from 0.
        item_N: Item numbers, int64 (N,), from 0.
        user_k: Interactions that a user has at least.
        item_k: Interactions that an item has at least.

    Returns:
        Places of the interactions that remain, ascending int64. The core is unique: it is the union of all such parts.

    Example:
        >>> k_core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2]), 2, 2).tolist()
        [0, 1, 2, 3]
    """
    place_N = np.arange(len(user_N))
    while len(place_N):
        users, items = user_N[place_N], item_N[place_N]
        kept = (np.bincount(users)[users] >= user_k) & (np.bincount(items)[items] >= item_k)
        if kept.all():
            break
        place_N = place_N[kept]
    return place_N
