"""Areas under the curve inside of groups: the library's, whatever the order, batches and processes."""

import pytest
import torch
from distributed import RankPool
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.retrieval import RetrievalAUROC

from zoo.metrics import GroupedAUC, grouped_auc


def rows(count: int = 400, groups: int = 30) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with ties, and groups of one class among them."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(groups, (count,), generator=generator) * 7
    score = torch.randint(9, (count,), generator=generator) / 9
    label = (torch.rand(count, generator=generator) < 0.3).long() * (group > 20) | (group == 70)
    return score, label.long(), group


def test_it_is_the_librarys_mean_over_groups_and_the_weighted_one_counts_rows() -> None:
    score, label, group = rows()
    both = [g for g in group.unique() if 0 < label[group == g].float().mean() < 1]
    areas = torch.stack([binary_auroc(score[group == g], label[group == g]) for g in both])
    sizes = torch.stack([(group == g).sum() for g in both])
    for weighted, expected in ((False, areas.mean()), (True, (areas * sizes).sum() / sizes.sum())):
        metric = GroupedAUC(weighted=weighted)
        for part in torch.randperm(400, generator=torch.Generator().manual_seed(1)).split(90):
            metric.update(score[part], label[part], group[part])
        found = metric.compute()
        torch.testing.assert_close(found["auc"], expected)
        assert (found["groups"], found["left_out"]) == (len(both), len(group.unique()) - len(both))
        assert found["left_out"] > 3
    kept = torch.isin(group, torch.stack(both))
    library = RetrievalAUROC(empty_target_action="skip")
    torch.testing.assert_close(library(score[kept], label[kept], indexes=group[kept]), areas.mean())


def part(rank_count: int) -> dict[str, float]:
    metric = GroupedAUC()
    rank = torch.distributed.get_rank()
    metric.update(*(value[rank::rank_count] for value in rows(401)))
    return {name: value.item() for name, value in metric.compute().items()}


def test_two_processes_equal_one(pool: RankPool) -> None:
    (one,) = pool.run(part, 1, world_size=1)
    assert pool.run(part, 2, world_size=2) == [one, one]


def test_without_a_group_of_both_classes_there_is_none_and_nan_is_refused() -> None:
    metric = GroupedAUC()
    metric.update(torch.tensor([0.1, 0.2]), torch.tensor([1, 1]), torch.tensor([0, 1]))
    found = metric.compute()
    assert found["auc"].isnan() and (found["groups"], found["left_out"]) == (0, 2)
    with pytest.raises(ValueError, match="NaN, which has no rank"):
        grouped_auc(torch.tensor([float("nan")]), torch.tensor([1]), torch.tensor([0]))
