"""Ranks of target items, Recall, NDCG and MRR of them, and their means by domain.

Shape suffixes: B examples, K other candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.metrics.mean_and_error import Float64Sums

__all__ = ["RankingMetrics", "Ties", "check_ks", "rank", "ranking_metrics", "target_ranks"]

Ties = Literal["pessimistic", "average", "optimistic"]

_BEFORE = {"pessimistic": 1.0, "average": 0.5, "optimistic": 0.0}
"""Share of the tied candidates that stand before the target."""
_METRICS = ("Recall", "NDCG", "MRR")


def target_ranks(target_score_B: Tensor, scores_BK: Tensor, ties: Ties = "pessimistic") -> Tensor:
    """Ranks of targets among other candidates: 1 + better ones + a share of the tied ones.

    Args:
        target_score_B: Scores of the targets.
        scores_BK: Scores of the others; ``-inf`` for those that are no candidates.
        ties: Tied candidates that stand before the target: all (``pessimistic``, with which a model of equal scores finds
            nothing), half of them (``average``), or none (``optimistic``).

    Returns:
        Ranks (B,), float64.

    Raises:
        ValueError: If a score is NaN.

    Example:
        >>> target_ranks(torch.tensor([2.0]), torch.tensor([[3.0, 2.0, 1.0, 2.0]]))
        tensor([4.], dtype=torch.float64)
    """
    if target_score_B.isnan().any() or scores_BK.isnan().any():
        raise ValueError("target_ranks got a score that is NaN, which has no rank: look for NaN in the model's outputs.")
    target_B1 = target_score_B[:, None]
    tied_B = ((scores_BK == target_B1) & (scores_BK > -torch.inf)).sum(1)
    return rank((scores_BK > target_B1).sum(1), tied_B, ties)


def rank(better_B: Tensor, tied_B: Tensor, ties: Ties) -> Tensor:
    """Ranks (B,), float64, of targets with so many better and tied candidates; see `target_ranks`."""
    if ties not in _BEFORE:
        raise ValueError(f"ties={ties!r} must be one of {', '.join(_BEFORE)}.")
    return 1 + better_B.double() + _BEFORE[ties] * tied_B.double()


def ranking_metrics(rank_B: Tensor, ks: Sequence[int], num_candidates: int | None = None) -> dict[str, Tensor]:
    """Recall, NDCG and MRR at k of examples with one target each; Recall at k is then the hit rate.

    ``Recall@k = [rank <= k]``, ``NDCG@k = [rank <= k] / log2(1 + rank)``, ``MRR@k = [rank <= k] / rank``.

    Args:
        rank_B: Ranks from 1, whole or not.
        ks: Cut-offs.
        num_candidates: Least number of candidates of an example, the target included, if known.

    Returns:
        ``Recall@k``, ``NDCG@k`` and ``MRR@k`` of each example, (B,), float64.

    Raises:
        ValueError: If a rank is NaN or below 1, or k is not from 1 to the number of candidates.

    Example:
        >>> {name: round(value.item(), 3) for name, value in ranking_metrics(torch.tensor([3.0]), [1, 5]).items()}
        {'Recall@1': 0.0, 'Recall@5': 1.0, 'NDCG@1': 0.0, 'NDCG@5': 0.5, 'MRR@1': 0.0, 'MRR@5': 0.333}
    """
    check_ks(ks, num_candidates)
    rank_B = rank_B.double()
    if not (rank_B >= 1).all():
        raise ValueError("ranking_metrics needs ranks of at least 1, got a smaller one or NaN.")
    values = torch.ones_like(rank_B), 1 / (1 + rank_B).log2(), 1 / rank_B
    return {f"{metric}@{k}": value_B * (rank_B <= k) for metric, value_B in zip(_METRICS, values, strict=True) for k in ks}


def check_ks(ks: Sequence[int], num_candidates: int | None) -> None:
    """Refuse cut-offs that are below 1, repeated, or more than the candidates."""
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ValueError(f"ks={list(ks)} must be different numbers of at least 1.")
    if num_candidates is not None and max(ks) > num_candidates:
        raise ValueError(f"k={max(ks)} is more than the {num_candidates} candidates of an example: choose a smaller k.")


class RankingMetrics(Float64Sums):
    """Means of Recall, NDCG and MRR at k over examples, in all, by domain and by group, over all batches and processes.

    Args:
        ks: Cut-offs.
        domains: Names of the domains.
        groups: Names of groups of examples, such as ``tail`` and ``cold``.
        protocol: The candidates, as the names of the results say: ``full-domain``, ``full-all``, ``sampled-1000``.
        num_candidates: Numbers of candidates in each domain, if known, which are checked against k.
        kwargs: Arguments of ``Metric``.

    Raises:
        ValueError: If a name occurs twice, or k is more than the number of candidates.

    Example:
        >>> metric = RankingMetrics(ks=[10], domains=["Drama", "Crime"], groups=["tail"])
        >>> metric.update(torch.tensor([1.0, 11.0]), torch.tensor([0, 1]), {"tail": torch.tensor([False, True])})
        >>> {name: value.item() for name, value in metric.compute().items() if "Recall" in name}
        {'full-domain/Recall@10': 0.5, 'full-domain/Recall@10/Drama': 1.0, 'full-domain/Recall@10/Crime': 0.0, 'full-domain/Recall@10/tail': 0.0}
    """  # noqa: E501

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor

    def __init__(
        self,
        ks: Sequence[int] = (1, 5, 10, 20),
        domains: Sequence[str] = ("all",),
        groups: Sequence[str] = (),
        protocol: str = "full-domain",
        num_candidates: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        check_ks(ks, min(num_candidates) if num_candidates else None)
        names = [*domains, *groups]
        if not domains or len(set(names)) < len(names):
            raise ValueError(f"Names of domains and groups must differ, got {names}."[:300])
        super().__init__("sums", shape=(len(names), len(_METRICS) * len(ks) + 1), **kwargs)
        self.ks, self.domains, self.groups, self.protocol = tuple(ks), tuple(domains), tuple(groups), protocol

    def update(self, rank_B: Tensor, domain_B: Tensor, groups: Mapping[str, Tensor] | None = None) -> None:
        """Add ranks of examples.

        Args:
            rank_B: Ranks from 1, whole or not.
            domain_B: Numbers of their domains.
            groups: For each group, which examples belong to it, bool (B,).

        Raises:
            ValueError: If a rank is NaN or below 1, a domain does not exist, or the groups are others.
        """
        groups = groups or {}
        if set(groups) != set(self.groups):
            raise ValueError(f"RankingMetrics has the groups {list(self.groups)}, got {list(groups)}."[:300])
        values_BM = torch.stack([*ranking_metrics(rank_B, self.ks).values(), torch.ones_like(rank_B, dtype=torch.float64)], 1)
        number_1C = torch.arange(len(self.domains), device=domain_B.device)[None]
        member_BC = domain_B[:, None] == number_1C
        if not member_BC.any(1).all():
            raise ValueError(f"RankingMetrics has {len(self.domains)} domains, from 0, got another number.")
        member_BG = torch.cat([member_BC, *(groups[name][:, None] for name in self.groups)], 1)
        self.sums += member_BG.double().T @ values_BM

    def compute(self) -> dict[str, Tensor]:
        """Means, float32 as logged numbers are, by ``protocol/metric`` and ``protocol/metric/domain or group``.

        Domains and groups without examples are left out.
        """
        num = len(self.domains)
        rows = {"": self.sums[:num].sum(0)}
        rows |= {f"/{name}": row for name, row in zip((*self.domains, *self.groups), self.sums, strict=True)}
        metrics = [f"{metric}@{k}" for metric in _METRICS for k in self.ks]
        return {
            f"{self.protocol}/{metric}{name}": (row[place] / row[-1]).float()
            for name, row in rows.items()
            if row[-1] > 0
            for place, metric in enumerate(metrics)
        }
