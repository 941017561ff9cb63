"""Area under the curve inside of groups, such as the candidates of one user.

Shape suffixes: B rows, G groups.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["GroupedAUC", "grouped_auc"]


def grouped_auc(score_B: Tensor, label_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Area under the receiver operating characteristic of each group; tied scores count half.

    Args:
        score_B: Scores.
        label_B: 1 or 0.
        group_B: Integers that name the groups.

    Returns:
        Areas (G,), float64, NaN for groups of one class; numbers of rows (G,); names of the groups (G,), rising.

    Raises:
        ValueError: If a score is NaN.

    Example:
        >>> grouped_auc(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 1, 1]), torch.tensor([3, 3, 8]))[0]
        tensor([1., nan], dtype=torch.float64)
    """
    if score_B.isnan().any():
        raise ValueError("grouped_auc got a score that is NaN, which has no rank: look for NaN in the model's outputs.")
    names_G, group_B, rows_G = group_B.unique(return_inverse=True, return_counts=True)
    # Places in the order of group and score, from 1, the mean of those of ties; inside of its group a row's rank is less by the
    # rows of the groups before it.
    _, value_B = score_B.unique(return_inverse=True)
    key_B = group_B * (len(score_B) + 1) + value_B
    _, tie_B, ties = key_B.unique(return_inverse=True, return_counts=True)
    rank_B = (ties.cumsum(0) - (ties - 1) / 2.0).double()[tie_B] - (rows_G.cumsum(0) - rows_G)[group_B]
    clicks_G, ranks_G = torch.zeros(2, len(names_G), dtype=torch.float64, device=score_B.device)
    clicks_G.index_add_(0, group_B, label_B.double())
    ranks_G.index_add_(0, group_B, rank_B * label_B)
    return (ranks_G - clicks_G * (clicks_G + 1) / 2) / (clicks_G * (rows_G - clicks_G)), rows_G, names_G


class GroupedAUC(Metric):
    """Mean over groups of their areas under the curve, over all batches and processes; groups of one class are left out.

    Unweighted it is torchmetrics' ``RetrievalAUROC(empty_target_action="skip")`` but for ties.

    Args:
        weighted: Whether a group counts for its rows, as is usual (GAUC), or groups count alike.
        kwargs: Arguments of ``Metric``.

    Example:
        >>> metric = GroupedAUC()
        >>> metric.update(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 1, 1]), torch.tensor([3, 3, 8]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'auc': 1.0, 'groups': 1.0, 'left_out': 1.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]
    groups: list[Tensor]

    def __init__(self, weighted: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weighted = weighted
        for name in ("scores", "labels", "groups"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, score_B: Tensor, label_B: Tensor, group_B: Tensor) -> None:
        """Add rows; see `grouped_auc`."""
        self.scores.append(score_B.detach().float())
        self.labels.append(label_B.long())
        self.groups.append(group_B.long())

    def compute(self) -> dict[str, Tensor]:
        """``auc``, NaN if no group has both classes; the number of ``groups`` that have, and that of those ``left_out``."""
        area_G, rows_G, _ = grouped_auc(*(dim_zero_cat(state) for state in (self.scores, self.labels, self.groups)))
        counts_G = ~area_G.isnan()
        weight_G = rows_G[counts_G].double() if self.weighted else torch.ones_like(area_G[counts_G])
        auc = (area_G[counts_G] * weight_G).sum() / weight_G.sum()
        return {"auc": auc.float(), "groups": counts_G.sum().float(), "left_out": (~counts_G).sum().float()}
