"""Preference training of the language model.

Shape suffixes: B pairs, T tokens.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.ling.dpo_loss import DPOLoss, dpo_loss, sequence_logps, token_losses
from zoo.ling.module import Ling
from zoo.ling.network import LingForCausalLM
from zoo.ling.state_dict_adapter import load_hf

__all__ = ["LingDPO"]

_SIDES = ("chosen", "rejected")


class LingDPO(Ling):
    """Direct preference optimisation of a language model, with a share of the chosen answers' likelihood.

    Batches hold, for ``chosen`` and ``rejected`` each, ``<side>_input_ids`` and ``<side>_labels`` (B, T), -100 outside of the
    answer, padded on the right; with ``reference="precomputed"`` also ``reference_<side>_logps`` (B,), as the DataModule
    Preferences gives them. Source: Rafailov et al., arXiv 2305.18290; the share of likelihood is that of the Ling-Coder report.

    Args:
        beta: how much a difference of likelihoods to the reference counts.
        nll_weight: weight of the chosen answers' cross-entropy.
        reference: ``copy`` takes the weights at the start of the training (kept in checkpoints, so that a continued run has
            the same reference), ``precomputed`` the log-likelihoods that the data hold, anything else is the folder of a
            model in the released format.
        kwargs: as for `Ling`; the routers' losses count as there, the warm-up of the router is off by default.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        nll_weight: float = 0.05,
        reference: str = "copy",
        router_warmup_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(router_warmup_steps=router_warmup_steps, **kwargs)
        if beta <= 0 or nll_weight < 0:
            raise ValueError(f"LingDPO: beta={beta} must be positive, nll_weight={nll_weight} must not be negative.")
        if router_warmup_steps:
            raise ValueError("LingDPO: router_warmup_steps must be 0: the router has learned already.")
        self.beta = beta
        self.nll_weight = nll_weight
        self.reference = reference
        # In a list, so that it is no part of the module: not trained, not averaged, not in what is shared.
        self._reference: list[LingForCausalLM] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check ids and what the batch holds (Lightning hook).

        Raises:
            ValueError: entries are missing, or an id or label is not in the vocabulary.
        """
        if not isinstance(batch, Mapping) or "chosen_input_ids" not in batch:
            return super().on_before_batch_transfer(batch, dataloader_idx)
        wanted = [f"{side}_{name}" for side in _SIDES for name in ("input_ids", "labels")]
        if self.reference == "precomputed":
            wanted += [f"reference_{side}_logps" for side in _SIDES]
        if missing := [name for name in wanted if name not in batch]:
            raise ValueError(f"LingDPO: the batch lacks {', '.join(missing)}; the DataModule Preferences gives them.")
        for side in _SIDES:
            self._check_ids(batch[f"{side}_input_ids"])
            labels = batch[f"{side}_labels"]
            self._check_ids(labels[labels != -100])
        return batch

    def on_fit_start(self) -> None:
        """Make the reference (Lightning hook)."""
        if self.reference == "precomputed":
            return
        if not self._reference:
            if self.reference == "copy":
                self._reference = [copy.deepcopy(self.network)]
            else:
                self._reference = [load_hf(self.reference)]
        self._reference[0].requires_grad_(False).eval().to(self.network.lm_head.weight)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the copied reference (Lightning hook)."""
        super().on_save_checkpoint(checkpoint)
        if self.reference == "copy" and self._reference:
            checkpoint["ling_reference"] = self._reference[0].state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference of the run that is continued (Lightning hook)."""
        super().on_load_checkpoint(checkpoint)
        if self.reference == "copy" and "ling_reference" in checkpoint:
            self._reference = [copy.deepcopy(self.network)]
            self._reference[0].load_state_dict(checkpoint["ling_reference"])

    def _logps(self, network: LingForCausalLM, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-likelihoods (B,) of chosen and of rejected answers."""
        return tuple(
            sequence_logps(token_losses(network(batch[f"{side}_input_ids"]).logits, batch[f"{side}_labels"])) for side in _SIDES
        )  # type: ignore[return-value]

    def preferences(self, batch: Mapping[str, Tensor]) -> DPOLoss:
        """Loss and rewards of a batch."""
        if self.reference == "precomputed":
            references = batch["reference_chosen_logps"], batch["reference_rejected_logps"]
        else:
            with torch.no_grad():
                references = self._logps(self._reference[0] if self._reference else self.network, batch)
        num_chosen_B = (batch["chosen_labels"][:, 1:] != -100).sum(1)
        chosen_B, rejected_B = self._logps(self.network, batch)
        return dpo_loss(chosen_B, rejected_B, *references, num_chosen_B, beta=self.beta, nll_weight=self.nll_weight)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch of pairs (Lightning hook)."""
        result = self.preferences(batch)
        self.last_losses = {"ce": result.loss.detach()}
        self.log_dict(
            {"train/preference": result.preference.detach(), "train/nll": result.nll.detach(), "train/accuracy": result.accuracy}
        )
        self.log("train/loss", result.loss.detach(), prog_bar=True)
        return result.loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss, accuracy and margin of the rewards (Lightning hook)."""
        result = self.preferences(batch)
        values = {"loss": result.loss, "accuracy": result.accuracy,
                  "margin": (result.chosen_reward_B - result.rejected_reward_B).mean()}  # fmt: skip
        size = len(batch["chosen_input_ids"])
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=size, sync_dist=True)
