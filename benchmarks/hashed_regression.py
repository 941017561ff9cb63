"""Logistic regression on hashed categories and their crosses: the baseline of click prediction.

Every field's id, and every pair of ids of some fields, is hashed into one of 2^17 weights; scikit-learn fits them with an L2
penalty. Of several strengths of the penalty, the one with the least log loss on the validation rows is taken.

Shape suffixes: N rows, F fields, K weights in use of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

__all__ = ["HashedRegression", "hashed"]


def hashed(ids_NF: np.ndarray, crossed: Sequence[int], num_bits: int = 17) -> csr_matrix:
    """Rows as ones in ``2^num_bits`` columns: of each field, and of each pair of the fields ``crossed``.

    >>> hashed(np.array([[1, 2, 3]]), crossed=[0, 1, 2]).sum()
    np.float64(6.0)
    """
    ids = ids_NF.astype(np.uint64)
    columns = [_mixed(ids[:, field], field, 0) for field in range(ids.shape[1])]
    columns += [_mixed(_mixed(ids[:, one], one, 1) + ids[:, other], other, 2) for one, other in combinations(crossed, 2)]
    column_NK = (np.stack(columns, axis=1) >> np.uint64(64 - num_bits)).astype(np.int32)
    row_starts = np.arange(len(ids) + 1) * len(columns)
    ones = np.ones(column_NK.size, np.float64)
    return csr_matrix((ones, column_NK.ravel(), row_starts), shape=(len(ids), 1 << num_bits))


def _mixed(values: np.ndarray, field: int, kind: int) -> np.ndarray:
    z = (values + np.uint64((kind << 56) + (field << 40))) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class HashedRegression:
    """Logistic regression on hashed categories.

    Args:
        crossed: Fields all pairs of which have weights.
        strengths: Values of scikit-learn's C to choose from; larger is a weaker penalty.
        num_bits: Bits of the hash.
    """

    def __init__(self, crossed: Sequence[int], strengths: Sequence[float], num_bits: int = 17) -> None:
        self.crossed, self.strengths, self.num_bits = crossed, strengths, num_bits

    def fit(self, ids_NF: np.ndarray, label_N: np.ndarray, val_ids_NF: np.ndarray, val_label_N: np.ndarray) -> HashedRegression:
        """Fit with each strength, keep the best on the validation rows."""
        train, val = (hashed(ids, self.crossed, self.num_bits) for ids in (ids_NF, val_ids_NF))
        models = [
            LogisticRegression(C=strength, solver="lbfgs", max_iter=500, tol=1e-5).fit(train, label_N)
            for strength in self.strengths
        ]
        losses = [log_loss(val_label_N, model.predict_proba(val)[:, 1]) for model in models]
        best = int(np.argmin(losses))
        self.model, self.strength, self.val_loss = models[best], self.strengths[best], losses[best]
        return self

    def predict(self, ids_NF: np.ndarray) -> np.ndarray:
        """Probability of a click (N,)."""
        probability: np.ndarray = self.model.predict_proba(hashed(ids_NF, self.crossed, self.num_bits))[:, 1]
        return probability
