"""Direct preference optimisation, with a share of the chosen answer's likelihood.

Shape suffixes: B pairs of answers, T tokens, V vocabulary; R rows that hold several of A answers.
Source: Rafailov et al., arXiv 2305.18290, equation 7; beta and the share of likelihood as in the Ling reports.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.lm.cross_entropy import IGNORED

__all__ = ["DPOLoss", "dpo_loss", "sequence_logps", "token_losses", "unpack"]


class DPOLoss(NamedTuple):
    """Loss and rewards of a batch of preferences.

    Attributes:
        loss: mean over pairs, which the policy minimises.
        preference: its first part, ``-log sigmoid(margin)``; ln 2 while the policy is the reference.
        nll: its second part, without the weight: nats a token of the chosen answers.
        chosen_reward_B: ``beta (log pi - log pi_ref)`` of the chosen answers, without gradient.
        rejected_reward_B: the same of the rejected ones.
        loss_B: of each pair, what ``loss`` is the mean of, without gradient.
    """

    loss: Tensor
    preference: Tensor
    nll: Tensor
    chosen_reward_B: Tensor
    rejected_reward_B: Tensor
    loss_B: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs whose chosen answer has the higher reward."""
        return (self.chosen_reward_B > self.rejected_reward_B).float().mean()


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of the label at each position, which the logits before it predict, with gradient.

    Args:
        logits_BTV: what the model says; computed with in float32 at least.
        labels_BT: int64, in the positions of the input; -100 does not count.

    Returns:
        (B, T), 0 at the first position and where the label does not count.
    """
    accurate = torch.promote_types(logits_BTV.dtype, torch.float32)
    losses = F.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2).to(accurate), labels_BT[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return F.pad(losses, (1, 0))


def unpack(value_RT: Tensor, answer_RT: Tensor, position_RT: Tensor, num_answers: int, fill: float = 0) -> Tensor:
    """Values at the tokens of packed answers, with a row for each answer again.

    Long answers are summed in float32 as accurately then as those of padded batches, and without atomic additions.

    Args:
        value_RT: Values of the packed rows.
        answer_RT: int64, number of the answer that a token belongs to.
        position_RT: int64, its place in that answer; no two tokens have the same answer and place.
        num_answers: A.
        fill: Value after the end of shorter answers.

    Returns:
        (A, T), with gradient.

    Example:
        >>> unpack(torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 0]]), 2)
        tensor([[7, 0, 0],
                [5, 6, 0]])
    """
    empty = value_RT.new_full((num_answers, value_RT.shape[1]), fill)
    return empty.index_put((answer_RT, position_RT), value_RT)


def sequence_logps(loss_BT: Tensor) -> Tensor:
    """Log-likelihood (B,) in nats of each sequence's labels, of the cross-entropy of each, 0 where it does not count.

    Args:
        loss_BT: as from `token_losses`.
    """
    return -loss_BT.sum(1)


def dpo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    num_chosen_B: Tensor | None = None,
    beta: float = 0.1,
    nll_weight: float = 0.05,
) -> DPOLoss:
    """``mean(-log sigmoid(beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)))) + nll_weight NLL(chosen)``.

    NLL is the mean over pairs of the chosen answer's cross-entropy a token, so that it does not grow with its length (the
    reports leave that open). Policy and reference are subtracted first, since they are alike and large for long answers: sums
    of unlike ones would be rounded, in float32, by as much as the margin.

    Args:
        policy_chosen_B: log-likelihood of the chosen answer, in nats, see `sequence_logps`.
        policy_rejected_B: of the rejected answer.
        reference_chosen_B: the same under the reference, without gradient.
        reference_rejected_B: the same under the reference, without gradient.
        num_chosen_B: tokens of the chosen answer, needed for the NLL.
        beta: Weight of a difference of likelihoods.
        nll_weight: weight of the NLL; 0: plain preference optimisation.

    Raises:
        ValueError: beta is not positive, the weight negative, shapes differ, or tokens are not given or none.
    """
    if beta <= 0 or nll_weight < 0:
        raise ValueError(f"dpo_loss: beta={beta} must be above 0, and nll_weight={nll_weight} must not be negative.")
    shapes = {tuple(t.shape) for t in (policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)}
    if len(shapes) != 1:
        raise ValueError(f"dpo_loss: the four log-likelihoods have different shapes {sorted(shapes)}.")
    if nll_weight and num_chosen_B is None:
        raise ValueError(f"dpo_loss: nll_weight={nll_weight} needs num_chosen_B, the tokens of each chosen answer.")
    chosen_B = beta * (policy_chosen_B - reference_chosen_B.detach())
    rejected_B = beta * (policy_rejected_B - reference_rejected_B.detach())
    preference_B = -F.logsigmoid(chosen_B - rejected_B)
    preference, loss_B = preference_B.mean(), preference_B.detach()
    nll = torch.zeros_like(preference)
    if num_chosen_B is not None:
        if not bool((num_chosen_B > 0).all()):
            raise ValueError("dpo_loss: a chosen answer has no tokens: leave such pairs out of the data.")
        nll_B = -policy_chosen_B / num_chosen_B
        nll, loss_B = nll_B.mean(), loss_B + nll_weight * nll_B.detach()
    loss = preference + nll_weight * nll if nll_weight else preference
    return DPOLoss(loss, preference, nll, chosen_B.detach(), rejected_B.detach(), loss_B)
