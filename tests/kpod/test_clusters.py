"""k-means finds planted clusters and is deterministic; GloVe files are read word by word, malformed ones refused."""

from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from zoo.kpod.clusters import kmeans, mean_word_vectors, read_glove


def inertia(x: torch.Tensor, labels: torch.Tensor) -> float:
    return sum(float((x[labels == k] - x[labels == k].mean(0)).square().sum()) for k in labels.unique())


def test_planted_clusters_are_found_whatever_the_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.randint(5, (300,), generator=generator)
    x = 10 * torch.randn(5, 8, generator=generator)[planted] + torch.randn(300, 8, generator=generator)
    for seed in range(3):
        labels = kmeans(x, 5, seed)
        assert len(set(zip(labels.tolist(), planted.tolist(), strict=True))) == 5
        assert list(dict.fromkeys(labels.tolist())) == [0, 1, 2, 3, 4]  # by first question


def test_equal_seeds_give_equal_labels_and_the_global_generator_stays() -> None:
    x = torch.rand(200, 16, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first = kmeans(x, 7, seed=3)
    torch.manual_seed(5)
    assert torch.equal(kmeans(x, 7, seed=3), first)
    torch.set_rng_state(state)
    kmeans(x, 7)
    assert torch.equal(torch.get_rng_state(), state)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_labels_are_a_fixed_point_near_the_best_partition(seed: int) -> None:
    x = torch.rand(7, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = kmeans(x, 2)
    centres = torch.stack([x[labels == k].mean(0) for k in range(2)])
    assert torch.equal(torch.cdist(x, centres).argmin(1), labels)
    partitions = (torch.tensor([0, *rest]) for rest in product(range(2), repeat=6))
    assert inertia(x, labels) <= 1.3 * min(inertia(x, partition) for partition in partitions)


def test_no_worse_than_scikit_learn() -> None:
    x = torch.rand(400, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs = KMeans(5, n_init=10, random_state=0).fit(x.numpy()).inertia_
    assert inertia(x, kmeans(x, 5)) <= 1.01 * theirs


def test_zero_vectors_are_one_cluster_and_equal_rows_leave_clusters_empty() -> None:
    x = torch.eye(3).repeat_interleave(4, 0)
    x[:4] = 0
    labels = kmeans(x, 3)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert kmeans(torch.zeros(6, 4), 5).tolist() == [0] * 6
    assert all(kmeans(torch.eye(4), 4)[i] != kmeans(torch.eye(4), 4)[j] for i, j in combinations(range(4), 2))


def test_means_of_word_vectors(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("how 1 0 0\nmany 0 2 0\n? 0 0 3\nMary 4 4 4\n. . 9 9 9\nunused broken 0 0\n")
    found = mean_word_vectors(["How many?", "Mary how", "Zzz", ""], path)
    expected = [[1 / 3, 2 / 3, 1], [2.5, 2, 2], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert set(read_glove(path, {"how", "Mary", "absent", "."})) == {"how", "Mary"}  # ". ." is a word with a space inside


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"400000 50\nhow 1 2\n", "txt, line 1: 1 numbers behind the word instead of 2: .* without a header"),
        (b"how 1 2 3\nmany 1 2\n", "txt, line 2: 2 numbers behind the word instead of 3: give a GloVe text file, complete"),
        (b"how 1 2 3\nmany 1 x 3\n", "txt, line 2: could not convert string to float: 'x': give a GloVe text file"),
        (b"how 1 2 3\n\xff\xfe 1 2 3\n", "txt, line 1: 'utf-8' codec can't decode byte 0xff .* unpacked"),
        (b"much 1 2 3\n", "a vector for no word of the questions"),
        (b"", "a vector for no word of the questions"),
    ],
)
def test_malformed_glove_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        mean_word_vectors(["how many"], path)


@pytest.mark.parametrize(
    ("x", "clusters", "message"),
    [
        (torch.zeros(2, 3), 5, "clusters=5 must be from 1 to the number of questions, 2"),
        (torch.zeros(2, 3), 0, "clusters=0"),
        (torch.full((2, 3), torch.nan), 2, "an embedding is not finite"),
    ],
)
def test_embeddings_that_cannot_be_clustered_are_refused(x: torch.Tensor, clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(x, clusters)
