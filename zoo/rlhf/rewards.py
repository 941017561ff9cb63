"""Rewards of answers: a trained model, or a class of the user's that verifies them.

Shape suffixes: R samples, S ids of a prompt with its answer.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from zoo.base.hyperparameters import Configurable
from zoo.rlhf.reward_loss import last_values
from zoo.rlhf.state_dict_adapter import read_reward_model

__all__ = ["Reward", "TrainedReward", "Verifier", "tokenizer_mark"]

_PROBE = "The quick brown fox, 1,234 jumps: naïve? Yes!\n"


def tokenizer_mark(tokenizer: Any) -> Tensor:
    """A number, int64 (), that differs where tokenizers give a sentence different ids."""
    ids = tokenizer(_PROBE, add_special_tokens=False).input_ids if callable(tokenizer) else tokenizer.encode(_PROBE)
    digest = hashlib.sha256(repr([int(each) for each in ids]).encode()).digest()
    return torch.tensor(int.from_bytes(digest[:8], "big", signed=True))


class Reward(Configurable, ABC):
    """Base of rewards; what is a module too is placed as the role ``reward``.

    Args:
        weight: Factor of its scores in the sum of several.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer of the data that is not the reward's.

        Raises:
            ValueError: If it is not.
        """

    @abstractmethod
    def score(
        self, ids_RS: Tensor, mask_RS: Tensor, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Tensor:
        """Scores (R,) of whole answers.

        Args:
            ids_RS: Prompts with their answers.
            mask_RS: 0 for padding, which may stand on both sides.
            prompts: The prompts as text.
            answers: The answers as text, without the end.
            rows: Columns of the prompts' rows in the data.
        """


class Verifier(Reward):
    """Base of rewards that are ordinary code: override `verify`.

    Example:
        >>> class Short(Verifier):
        ...     def verify(self, prompts, answers, rows):
        ...         return [float(len(answer) < 20) for answer in answers]
        >>> Short().score(torch.zeros(2, 3), torch.ones(2, 3), ["a", "b"], ["yes", "no " * 20], [{}, {}])
        tensor([1., 0.])
    """

    @abstractmethod
    def verify(self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> Sequence[float]:
        """A finite number for each answer; arguments as of `Reward.score`."""

    @override
    def score(
        self, ids_RS: Tensor, mask_RS: Tensor, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Tensor:
        found = [float(number) for number in self.verify(prompts, answers, rows)]
        if len(found) != len(answers) or not all(map(math.isfinite, found)):
            raise ValueError(
                f"{type(self).__name__}.verify gave {len(found)} numbers for {len(answers)} answers, of which"
                f" {sum(map(math.isfinite, found))} are finite: return one finite number for each answer."
            )
        return torch.tensor(found, device=ids_RS.device)


class TrainedReward(Reward, nn.Module):
    """A reward model at work: `RewardModel` of the zoo, or a published one.

    Args:
        source: Checkpoint, folder or name of a trained `RewardModel`; or a folder of DeepSpeed-Chat, OpenRLHF, APP or of
            transformers' sequence classification with one label, see `zoo.rlhf.state_dict_adapter`.
        weight: As of `Reward`.
    """

    moments: Tensor

    def __init__(self, source: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.source = source
        self.backbone, moments = read_reward_model(source)
        self.register_buffer("moments", torch.stack([moments["score_mean"], moments["score_deviation"]]).double())
        self.mark = moments.get("tokenizer_mark")
        self.requires_grad_(False).eval()

    @override
    def check_tokenizer(self, tokenizer: Any) -> None:
        self.backbone.check_tokenizer(tokenizer)
        mark = self.mark
        if mark is None or not mark:
            try:
                mark = tokenizer_mark(self.backbone.tokenizer)
            except ValueError:  # it has none that could be compared
                return
        if mark != tokenizer_mark(tokenizer):
            raise ValueError(
                f"The reward model {self.source} was trained with another tokenizer than the data's: give the data the"
                " tokenizer of the reward model, or take another reward model."
            )

    @override
    def train(self, mode: bool = True) -> "TrainedReward":
        """Stay in evaluation."""
        return super().train(False)

    @override
    @torch.no_grad()
    def score(
        self, ids_RS: Tensor, mask_RS: Tensor, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Tensor:
        score_R = last_values(self.backbone.values(ids_RS, mask_RS), mask_RS).double()
        return ((score_R - self.moments[0]) / self.moments[1]).float()
