"""Ranks by chunks equal a naive count, whatever the chunks, batches and processes; the metrics equal torchmetrics'."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall, retrieval_reciprocal_rank

from zoo.metrics import ItemTable, RankingMetrics, ranking_metrics, target_ranks

SIZES = [60, 1, 39]
KS = [1, 5, 10]
BEFORE = {"pessimistic": 1.0, "average": 0.5, "optimistic": 0.0}


def naive_ranks(users_BD: Tensor, items_ID: Tensor, target_B: Tensor, ties: str, scope: str, seen_BS: Tensor) -> list[float]:
    """Item by item, from scores in float64 rounded to what float32 vectors can tell apart."""
    domain_I = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES)).tolist()
    found = []
    for user_D, target, seen in zip(users_BD.double(), target_B.tolist(), seen_BS.tolist(), strict=True):
        scores = [round(float((user_D * item_D.double()).sum()), 9) for item_D in items_ID]
        others = [item for item in range(len(items_ID)) if item != target and item not in seen]
        others = [item for item in others if scope == "all" or domain_I[item] == domain_I[target]]
        better = sum(scores[item] > scores[target] for item in others)
        found.append(1 + better + BEFORE[ties] * sum(scores[item] == scores[target] for item in others))
    return found


def problem(seed: int, users: int = 7, few_values: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors of users and items, targets, and seen items, which repeat and may be the target."""
    random = torch.Generator().manual_seed(seed)
    items_ID = torch.randn(sum(SIZES), 24, generator=random)
    users_BD = torch.randn(users, 24, generator=random)
    if few_values:
        items_ID = items_ID[torch.randint(10, (sum(SIZES),), generator=random)]
    target_B = torch.randint(sum(SIZES), (users,), generator=random)
    seen_BS = torch.randint(-1, sum(SIZES), (users, 30), generator=random)
    return users_BD, items_ID, target_B, torch.cat([seen_BS, seen_BS[:, :9], target_B[:, None]], 1)


@settings(max_examples=15)
@given(
    st.integers(0, 10**6), st.booleans(), st.sampled_from(list(BEFORE)), st.sampled_from(["domain", "all"]), st.integers(1, 110)
)
def test_chunked_ranks_equal_a_naive_count(seed, few_values, ties, scope, chunk_size):
    users_BD, items_ID, target_B, seen_BS = problem(seed, few_values=few_values)
    table = ItemTable(items_ID, SIZES, chunk_size=chunk_size, batch_size=1 + seed % 8)
    for seen in (seen_BS, torch.full((7, 1), -1)):
        found = table.ranks(users_BD, target_B, scope=scope, ties=ties, seen_BS=seen)
        assert found.tolist() == naive_ranks(users_BD, items_ID, target_B, ties, scope, seen)


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=1, max_size=9), min_size=1, max_size=1), st.integers(-2, 2))
def test_ranks_of_given_scores_count_ties_as_asked(rows, target):
    scores, ranks = torch.tensor(rows).float(), {}
    for ties, share in BEFORE.items():
        ranks[ties] = target_ranks(torch.tensor([float(target)]), scores, ties).item()
        assert ranks[ties] == 1 + sum(s > target for s in rows[0]) + share * rows[0].count(target)
    assert ranks["average"] == (ranks["pessimistic"] + ranks["optimistic"]) / 2


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 4096), (7, 13), (256, 4095), (64, 100), (300, 20_000)])
@pytest.mark.parametrize("device_precision", ["highest", "medium"])
def test_neither_chunks_nor_batches_nor_precision_change_a_rank(batch_size, chunk_size, device_precision):
    random = torch.Generator().manual_seed(0)
    items_ID, users_BD = torch.randn(500, 384, generator=random).repeat(3, 1), torch.randn(40, 384, generator=random)
    target_B = torch.randint(1500, (40,), generator=random)
    score_BI = users_BD.double() @ items_ID[:500].double().T
    expected_B = 3 + 3 * (score_BI > score_BI.gather(1, target_B[:, None] % 500)).sum(1)  # each vector is there three times
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(device_precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found_B = ItemTable(items_ID, batch_size=batch_size, chunk_size=chunk_size).ranks(users_BD, target_B)
        assert torch.get_float32_matmul_precision() == device_precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found_B, expected_B.double())


def test_a_model_with_equal_scores_finds_nothing():
    for items_ID in (torch.ones(99, 8), torch.zeros(99, 8), 1e-3 * torch.randn(1, 8).expand(99, 8)):
        table = ItemTable(items_ID.contiguous(), chunk_size=10)
        users_BD, target_B = torch.randn(5, 8), torch.arange(5)
        for ties, rank in (("pessimistic", 99), ("average", 50), ("optimistic", 1)):
            assert table.ranks(users_BD, target_B, ties=ties).tolist() == [rank] * 5


def test_metrics_equal_those_of_torchmetrics_without_ties():
    random = torch.Generator().manual_seed(1)
    scores_BI = torch.randn(50, 120, generator=random)
    target_B = torch.randint(120, (50,), generator=random)
    theirs = {"Recall": retrieval_recall, "NDCG": retrieval_normalized_dcg, "MRR": retrieval_reciprocal_rank}
    relevant_BI = nn.functional.one_hot(target_B, 120)
    rank_B = target_ranks(scores_BI.gather(1, target_B[:, None])[:, 0], scores_BI.scatter(1, target_B[:, None], -math.inf))
    assert torch.equal(rank_B, 1 + (scores_BI > scores_BI.gather(1, target_B[:, None])).sum(1).double())
    for name, values_B in ranking_metrics(rank_B, KS, num_candidates=120).items():
        metric, k = name.split("@")
        expected = [float(theirs[metric](s, r, top_k=int(k))) for s, r in zip(scores_BI, relevant_BI, strict=True)]
        assert values_B.tolist() == pytest.approx(expected, abs=1e-6)


def test_expectations_of_a_random_scorer_are_those_of_uniform_ranks():
    items, users = 50, 4000
    random = torch.Generator().manual_seed(2)
    table = ItemTable(torch.randn(items, 16, generator=random))
    rank_B = table.ranks(torch.randn(users, 16, generator=random), torch.randint(items, (users,), generator=random))
    found = {name: values_B.mean().item() for name, values_B in ranking_metrics(rank_B, KS).items()}
    for k in KS:
        discounts = sum(1 / math.log2(1 + rank) for rank in range(1, k + 1))
        assert found[f"Recall@{k}"] == pytest.approx(k / items, abs=0.02)
        assert found[f"NDCG@{k}"] == pytest.approx(discounts / items, abs=0.02)


@pytest.mark.parametrize("ties", BEFORE)
def test_sampled_candidates_that_are_the_whole_domain_give_the_full_rank(ties):
    users_BD, items_ID, _, _ = problem(3, users=20, few_values=True)
    table = ItemTable(items_ID, SIZES)
    target_B = torch.randint(SIZES[0], (20,))
    candidates_BK = torch.cat([torch.arange(SIZES[0]).expand(20, -1), torch.full((20, 3), -1)], 1)
    full_B = table.ranks(users_BD, target_B, ties=ties)
    assert torch.equal(table.sampled_ranks(users_BD, target_B, candidates_BK, ties=ties), full_B)
    one_B = table.sampled_ranks(users_BD, target_B, target_B[:, None], ties=ties)
    assert one_B.tolist() == [1.0] * 20


@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_top_k_are_the_items_with_the_best_scores(chunk_size):
    users_BD, items_ID, _, seen_BS = problem(4)
    table = ItemTable(items_ID, SIZES, chunk_size=chunk_size, batch_size=3)
    for domain, (low, high) in {None: (0, 100), 0: (0, 60), 2: (61, 100)}.items():
        best = table.top_k(users_BD, 20, domain=domain, seen_BS=seen_BS)
        for user, (items, scores) in enumerate(zip(best.item_BK.tolist(), best.score_BK.tolist(), strict=True)):
            score_I = items_ID @ users_BD[user]
            allowed = sorted(set(range(low, high)) - set(seen_BS[user].tolist()), key=lambda item: -score_I[item])
            assert items == (allowed[:20] + [-1] * 20)[:20]
            assert scores == pytest.approx([float(score_I[item]) if item >= 0 else -math.inf for item in items], abs=1e-4)
    assert ItemTable(torch.ones(9, 2), chunk_size=4).top_k(torch.ones(1, 2), 9).item_BK.tolist() == [list(range(9))]


def examples() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(5)
    group = {"tail": torch.rand(41, generator=random) < 0.3, "cold": torch.zeros(41, dtype=torch.bool)}
    return torch.randint(1, 30, (41,), generator=random).double(), torch.randint(2, (41,), generator=random), group


def metric() -> RankingMetrics:
    return RankingMetrics(KS, ["Drama", "Crime", "Empty"], ["tail", "cold"], num_candidates=[60, 30, 10])


def test_streamed_means_are_those_of_domains_and_groups():
    rank_B, domain_B, groups = examples()
    total = metric().to(torch.bfloat16)
    for part in torch.arange(41).split(4):
        total.update(rank_B[part], domain_B[part], {name: member[part] for name, member in groups.items()})
    assert total.sums.dtype == torch.float64
    found = total.compute()
    assert not [name for name in found if name.endswith(("Empty", "cold"))]
    masks = {"": torch.ones(41, dtype=torch.bool), "/Drama": domain_B == 0, "/Crime": domain_B == 1, "/tail": groups["tail"]}
    expected = {
        f"full-domain/{name}{where}": values_B[mask].mean().item()
        for where, mask in masks.items()
        for name, values_B in ranking_metrics(rank_B, KS).items()
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-6)


def _on_rank() -> tuple[dict[str, float], list[list[float]], list[list[int]]]:
    """Means, ranks and best items, of examples and of an item table that are divided unevenly over the ranks."""
    number, ranks = distributed.get_rank(), distributed.get_world_size()
    rank_B, domain_B, groups = examples()
    mine = slice(number, None, ranks)
    total = metric()
    total.update(rank_B[mine], domain_B[mine], {name: member[mine] for name, member in groups.items()})
    users_BD, items_ID, target_B, seen_BS = problem(6, users=30, few_values=True)
    edges = [0, 100] if ranks == 1 else [0, 37, 100]
    rows = slice(*edges[number : number + 2])
    table = ItemTable(items_ID[rows], SIZES, chunk_size=16, group=distributed.group.WORLD, first_row=edges[number])
    found = [table.ranks(users_BD, target_B, scope=scope, ties=ties, seen_BS=seen_BS).tolist()
             for scope in ("domain", "all") for ties in BEFORE]  # fmt: skip
    items_ID, users_BD = problem(7)[1::-1]
    table = ItemTable(items_ID[rows], SIZES, group=distributed.group.WORLD, first_row=edges[number])
    return {name: value.item() for name, value in total.compute().items()}, found, table.top_k(users_BD, 9).item_BK.tolist()


def test_two_ranks_equal_one(pool):
    (one,) = pool.run(_on_rank, world_size=1)
    assert pool.run(_on_rank, world_size=2) == [one, one]


def test_what_has_no_rank_is_an_error():
    users_BD, items_ID, target_B, _ = problem(8)
    broken_BD = users_BD.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(math.nan))
    table = ItemTable(items_ID, SIZES)
    for call, words in (
        (lambda: table.ranks(broken_BD, target_B), "vector of user 2 has NaN"),
        (lambda: table.top_k(broken_BD, 3), "vector of user 2 has NaN"),
        (lambda: ItemTable(items_ID / 0), "vector of item 0 has NaN"),
        (lambda: ItemTable(items_ID.bfloat16()), "must be float32"),
        (lambda: ItemTable(items_ID, [60, 41]), "add up to the 100 items"),
        (lambda: ItemTable(items_ID, [60, 0, 40]), "at least 1"),
        (lambda: table.ranks(users_BD, target_B + 100), "target item is not a row"),
        (lambda: table.ranks(users_BD, target_B, seen_BS=target_B[:, None] - 200), "seen item is not a row"),
        (lambda: table.ranks(users_BD, target_B, scope="Drama"), "scope='Drama' must be"),
        (lambda: table.ranks(users_BD, target_B, ties="fair"), "ties='fair' must be"),
        (lambda: table.top_k(users_BD, 2, domain=1), "k=2 is more than the 1 candidates"),
        (lambda: table.top_k(users_BD, 2, domain=3), "domain=3 must be None or from 0 to 2"),
        (lambda: target_ranks(torch.tensor([1.0]), torch.tensor([[math.nan]])), "a score that is NaN"),
        (lambda: ranking_metrics(torch.tensor([math.nan]), [1]), "smaller one or NaN"),
        (lambda: ranking_metrics(torch.tensor([1.0]), [20], num_candidates=11), "k=20 is more than the 11 candidates"),
        (lambda: RankingMetrics([20], ["Drama", "Crime"], num_candidates=[60, 11]), "k=20 is more than the 11 candidates"),
        (lambda: RankingMetrics([1, 1]), "must be different"),
        (lambda: RankingMetrics(domains=["tail"], groups=["tail"]), "must differ"),
        (lambda: metric().update(torch.ones(1), torch.tensor([3]), {"tail": torch.ones(1).bool(), "cold": torch.ones(1).bool()}),
         "has 3 domains"),
        (lambda: metric().update(torch.ones(1), torch.tensor([0])), "has the groups"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert len(str(error.value)) <= 300
