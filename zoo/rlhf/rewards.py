"""Rewards (to be replaced)."""

from typing import Any
import torch
from torch import Tensor
from zoo.base.hyperparameters import Configurable


class Reward(Configurable):
    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def check_tokenizer(self, tokenizer: Any) -> None: ...
    def score(self, ids_BT, mask_BT, prompts, answers, rows) -> Tensor:
        raise NotImplementedError


class Short(Reward):
    def score(self, ids_BT, mask_BT, prompts, answers, rows) -> Tensor:
        return torch.tensor([a.count("e") - 0.1 * len(a) for a in answers])
