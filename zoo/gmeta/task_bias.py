"""The plainest way to adapt: a constant for each task, in closed form.

Shape suffixes: T tasks, S samples of support.
"""

from torch import Tensor

__all__ = ["task_bias"]


def task_bias(logit_TS: Tensor, label_TS: Tensor, mask_TS: Tensor, prior: float = 1.0) -> Tensor:
    """What to add to the logits of each task, (T, 1): one step of Newton's method from 0 on its support.

    Args:
        logit_TS: Logits of support before any adaptation.
        label_TS: 0 or 1.
        mask_TS: Which samples there are.
        prior: Precision of a normal prior of the constant, whose mean is 0.

    Example:
        >>> import torch
        >>> task_bias(torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool))
        tensor([[1.]])
    """
    probability_TS = logit_TS.sigmoid()
    rest_T1 = ((label_TS - probability_TS) * mask_TS).sum(1, keepdim=True)
    return rest_T1 / ((probability_TS * (1 - probability_TS) * mask_TS).sum(1, keepdim=True) + prior)
