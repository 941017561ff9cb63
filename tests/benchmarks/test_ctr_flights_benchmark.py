"""The baseline of click prediction: what crosses can and cannot do, and that the hash tells features apart."""

import numpy as np
import pytest

from benchmarks.hashed_regression import HashedRegression, hashed

pytest.importorskip("sklearn")


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two coins that only together decide the label, and a field of noise."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.integers(2, size=count), random.integers(2, size=count), random.integers(50, size=count)], axis=1)
    return ids, (ids[:, 0] ^ ids[:, 1]).astype(float)


def test_a_row_has_a_one_for_each_field_and_pair() -> None:
    ids = np.array([[3, 3, 3], [3, 3, 4]])
    matrix = hashed(ids, crossed=[0, 1, 2])
    assert matrix.shape == (2, 1 << 17) and matrix.sum(axis=1).ravel().tolist() == [[6, 6]]
    shared = matrix[0].multiply(matrix[1]).sum()
    assert shared == 3  # fields 0 and 1, and their pair
    assert len(set(matrix[0].indices.tolist())) == 6  # equal ids of different fields are different features


@pytest.mark.slow
def test_only_crosses_learn_what_fields_do_together() -> None:
    train, val, test = rows(400, 0), rows(100, 1), rows(200, 2)
    errors = {}
    for crossed in ([], [0, 1]):
        model = HashedRegression(crossed, [0.1, 10.0], num_bits=12).fit(*train, *val)
        errors[len(crossed)] = np.mean((model.predict(test[0]) > 0.5) != test[1])
        assert model.strength in (0.1, 10.0)
    assert errors[2] == 0 and errors[0] > 0.3
