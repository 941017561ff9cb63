"""The plainest baseline: rates of clicks of users and items.

Shape suffixes: B rows.
"""

import torch
from torch import Tensor

__all__ = ["ClickRates"]


class ClickRates:
    """Log odds of a user's rate of clicks, plus those of the item's popularity.

    A rate is ``(clicks + strength * mean) / (rows + strength)``, so that users and items without rows have the mean.

    Args:
        user_B: Numbers of the users of training rows.
        item_B: Numbers of the items.
        label_B: 1 for a click, else 0.
        strength: Rows that the mean counts for.

    Example:
        >>> rates = ClickRates(torch.tensor([1, 1, 2]), torch.tensor([1, 2, 1]), torch.tensor([1.0, 1.0, 0.0]))
        >>> score = rates(torch.tensor([1, 2, 9]), torch.tensor([1, 1, 9]))
        >>> bool(score[0] > score[2] > score[1])
        True
    """

    def __init__(self, user_B: Tensor, item_B: Tensor, label_B: Tensor, strength: float = 10.0) -> None:
        mean = label_B.double().mean()
        self.odds = []
        for number_B in (user_B, item_B):
            rows = torch.bincount(number_B).double()
            clicks = torch.bincount(number_B, label_B.double())
            self.odds.append(((clicks + strength * mean) / (rows + strength)).logit() - mean.logit())
        self.mean = float(mean.logit())

    def __call__(self, user_B: Tensor, item_B: Tensor) -> Tensor:
        """Scores (B,), float32."""
        score_B = torch.full((len(user_B),), self.mean, dtype=torch.float64, device=user_B.device)
        for odds, number_B in zip(self.odds, (user_B, item_B), strict=True):
            known = torch.cat([odds.to(number_B.device), odds.new_zeros(1).to(number_B.device)])
            score_B += known[number_B.clamp(max=len(odds))]
        return score_B.float()
