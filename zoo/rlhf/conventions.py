"""Conventions in which published implementations of RLHF differ, each selectable by name.

Shape suffixes: R samples, N answer tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONVENTIONS", "Convention", "ConventionName", "Whitening", "find_convention"]

ConventionName = Literal["zoo", "dschat", "app", "trl"]
Whitening = Literal["minibatch", "rollout", "none"]


@dataclass(frozen=True)
class Convention:
    """Tokens that are trained, place of the score, and defaults.

    Attributes:
        eos_in_mask: Train the end-of-sequence token as an action.
        score_at: Position of the score: the last token, or the one after it if there is room.
        kl_per_length: Divide the KL of each token, as a reward, by the number of tokens of the answer.
        beta: Initial KL coefficient.
        score_clip: Bound of the score; None: none.
        whiten: Scope in which advantages are whitened.
    """

    eos_in_mask: bool = True
    score_at: Literal["last", "after"] = "last"
    kl_per_length: bool = False
    beta: float = 0.05
    score_clip: float | None = 5.0
    whiten: Whitening = "minibatch"

    def action_mask(self, mask_RN: Tensor, ended_R: Tensor) -> Tensor:
        """Tokens of the policy's loss, bool (R, N).

        Args:
            mask_RN: bool, tokens up to and including the first end-of-sequence token.
            ended_R: bool, whether there is one.
        """
        if self.eos_in_mask:
            return mask_RN
        last_RN = mask_RN & ~F.pad(mask_RN[:, 1:], (0, 1))
        return mask_RN & ~(last_RN & ended_R[:, None])

    def reward_mask(self, mask_RN: Tensor) -> Tensor:
        """Positions of rewards, values and advantages, bool (R, N); the last of a row takes the score."""
        if self.score_at == "last":
            return mask_RN
        after_RN = F.pad(mask_RN[:, :-1], (1, 0), value=True)
        return (mask_RN | after_RN) & mask_RN.any(1, keepdim=True)

    def value_mask(self, mask_RN: Tensor, ended_R: Tensor) -> Tensor:
        """States of the critic's loss, bool (R, N): those of `action_mask`, and one after the last if it takes the score."""
        return self.reward_mask(mask_RN) if self.score_at == "after" else self.action_mask(mask_RN, ended_R)


CONVENTIONS: dict[ConventionName, Convention] = {
    "zoo": Convention(),
    "dschat": Convention(eos_in_mask=False, beta=0.1, whiten="none"),
    "app": Convention(kl_per_length=True, beta=0.02, score_clip=None, whiten="none"),
    "trl": Convention(score_at="after", score_clip=None, whiten="rollout"),
}
"""Conventions by name: ours, DeepSpeed-Chat, APP's Separation path, TRL's PPOTrainer.

DeepSpeed-Chat's pad is its end token, and its mask leaves out pads; its score stands at the end token all the same, or at the
last token of an answer without. APP's whitening and bound of the score on the Separation path are not published: none here.
"""


def find_convention(name: ConventionName) -> Convention:
    """Convention of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"convention={name!r} is not known: choose one of {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[name]
