"""Preference training of language models.

Shape suffixes: B pairs, T tokens; 2B both answers of each pair, all chosen ones first; R rows that hold several answers; N
labels that count, V vocabulary.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from zoo.lm.backbone import Backbone
from zoo.lm.batches import check_vocabulary
from zoo.lm.cross_entropy import IGNORED
from zoo.lm.dpo_loss import DPOLoss, dpo_loss, sequence_logps, unpack
from zoo.lm.hf_backbone import HFBackbone
from zoo.lm.language_module import LanguageModule
from zoo.lm.module import CausalLM
from zoo.metrics.mean_and_error import Mean
from zoo.strategy_contract import shards_parameters

__all__ = ["DPO", "PreferenceTraining"]

_SIDES = ("chosen", "rejected")
_PACKED = tuple(f"packed_{name}" for name in ("input_ids", "labels", "position_ids", "answer_ids"))


class PreferenceTraining(LanguageModule):
    """Direct preference optimisation of a language model, with a share of the chosen answers' likelihood.

    Batches hold, for ``chosen`` and ``rejected`` each, ``<side>_input_ids`` and ``<side>_labels`` (B, T), -100 outside of the
    answer, padded on the right to one width, and ``<side>_attention_mask`` (B, T), 0 for padding (absent: none); with
    ``reference="precomputed"`` also ``reference_<side>_logps`` (B,), as the DataModule Preferences gives them. Source: Rafailov
    et al., arXiv 2305.18290; the share of likelihood is that of the Ling-Coder report. A batch whose ``index`` (B,) is -1 has no
    weight in an evaluation.

    Packed batches hold several answers in a row, which do not see one another, and give the same numbers and gradients:
    ``packed_input_ids``, ``packed_labels`` and ``packed_attention_mask`` (R, T); ``packed_position_ids`` (R, T) from 0 in each
    answer, ``packed_answer_ids`` (R, T), b for the chosen answer of pair b and B + b for the rejected one, both continued in the
    padding behind a row's last answer; ``index`` (B,), whose length is the number of pairs.

    A subclass stands before the module that it extends, and gives `policy`, `answer_losses` and `load_reference`.

    Args:
        beta: Weight of a difference of likelihoods to the reference.
        nll_weight: Weight of the chosen answers' cross-entropy.
        reference: ``copy`` takes the weights at the start of the training (kept in checkpoints, so that a continued run has
            the same reference), ``precomputed`` the log-likelihoods of the data; any other text is where a model is loaded from.
        kwargs: Arguments of the module; ``loss_over="step"`` lets pairs count alike, and ``loss_chunk`` has no effect: the
            logits of whole answers are in memory.

    Raises:
        ValueError: If numbers are out of range.
    """

    exact_batches = True  # log-likelihoods of a reference are larger than what half precision tells apart
    #: Model that takes other data, for messages.
    other_data = "CausalLM"
    #: Entry of checkpoints that holds a copied reference.
    reference_entry = "reference"

    def __init__(self, beta: float = 0.1, nll_weight: float = 0.05, reference: str = "copy", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if beta <= 0 or nll_weight < 0:
            raise ValueError(
                f"{type(self).__name__}: beta={beta} must be positive, nll_weight={nll_weight} must not be negative."
            )
        self.beta = beta
        self.nll_weight = nll_weight
        self.reference = reference
        # In a list, so that it is no part of the module: not trained, not averaged, not in what is shared.
        self._reference: list[nn.Module] = []
        self.val_preferences, self.test_preferences = _Preferences(), _Preferences()

    # Parts of a subclass

    @property
    def policy(self) -> nn.Module:
        """The network that is trained."""
        raise NotImplementedError

    def answer_losses(
        self, network: nn.Module, ids_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor | None, answers_BT: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Cross-entropy (B, T) of the label at each position, with gradient, and what else the network gave.

        Args:
            network: The policy or the reference.
            ids_BT: int64, padded on the right.
            labels_BT: int64, in the positions of the input; -100 does not count.
            positions_BT: Of packed answers, from 0 in each.
            answers_BT: Of packed answers, their numbers.
        """
        raise NotImplementedError

    def load_reference(self, source: str) -> tuple[nn.Module, int]:
        """A reference model, and the size of its vocabulary."""
        raise NotImplementedError

    def copied_policy(self) -> nn.Module:
        """The weights of now, as a reference."""
        return copy.deepcopy(self.policy)

    def not_stored(self) -> list[str]:
        """Names of weights of the policy that no checkpoint holds."""
        return []

    def like_policy(self, reference: nn.Module) -> None:
        """Give the reference the policy's device and type."""
        types = {parameter.dtype for parameter in self.policy.parameters()}
        reference.to(self.device, types.pop() if len(types) == 1 else None)

    def other_losses(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Losses beside that of the preferences: their sum, and the parts by name."""
        return 0.0, {}

    # The reference

    @override
    def setup(self, stage: str) -> None:
        """Make the reference before a strategy divides the weights.

        Raises:
            FileNotFoundError: If there is no model of that name.
            ValueError: If its weights are damaged, or its vocabulary is another.
        """
        super().setup(stage)
        if stage == "predict" or self._reference or self.reference == "precomputed":
            return
        if self.reference != "copy":
            network, size = self.load_reference(self.reference)
            if size != self.vocab_size:
                raise ValueError(
                    f"{type(self).__name__}: the reference {self.reference} has a vocabulary of {size}, the model one of"
                    f" {self.vocab_size}: take a reference that has the model's tokenizer."
                )
            self._keep(network)
        elif stage == "fit":
            self._keep(self.copied_policy())

    def _keep(self, network: nn.Module) -> None:
        self._reference = [network.requires_grad_(False).eval()]

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the entries of the batch and their ids.

        Raises:
            ValueError: If these are no pairs, entries are missing, the answers have several widths, an id or label is outside
                of the vocabulary, or packed answers are numbered in another way.
        """
        if self.trainer.predicting:
            return super().on_before_batch_transfer(batch, dataloader_idx)
        if not isinstance(batch, Mapping) or not {"chosen_input_ids", "packed_input_ids"} & batch.keys():
            raise ValueError(
                f"{type(self).__name__} needs batches with chosen_input_ids and rejected_input_ids, as the DataModule Preferences"
                f" gives them: set data: Preferences, or take {self.other_data} for other data."
            )
        packed = "packed_input_ids" in batch
        wanted = list(_PACKED) if packed else [f"{side}_{name}" for side in _SIDES for name in ("input_ids", "labels")]
        references = [f"reference_{side}_logps" for side in _SIDES] if self.reference == "precomputed" else []
        if missing := [name for name in (*wanted, *(["index"] if packed else []), *references) if name not in batch]:
            where = ", which reference: precomputed needs: the data file gives them in each row" if missing == references else ""
            raise ValueError(f"{type(self).__name__}: the batch lacks {', '.join(missing)}{where}.")
        if len({batch[name].shape for name in wanted}) > 1:
            shapes = ", ".join(f"{name} {list(batch[name].shape)}" for name in wanted)
            raise ValueError(f"{type(self).__name__}: pad all answers of a batch to one width ({shapes}).")
        for side in ["packed"] if packed else _SIDES:
            check_vocabulary(batch[f"{side}_input_ids"], self.vocab_size)
            labels = batch[f"{side}_labels"]
            check_vocabulary(labels[labels != IGNORED], self.vocab_size)
        if packed:
            _check_packing(batch, type(self).__name__)
        return batch

    @override
    def on_fit_start(self) -> None:
        if self.reference == "copy" and not self._reference:  # continued from weights that were trained without one
            self._keep(self.copied_policy())
        self._place_reference()

    @override
    def on_validation_start(self) -> None:
        self._place_reference()

    @override
    def on_test_start(self) -> None:
        self._place_reference()

    def _place_reference(self) -> None:
        for network in self._reference:
            self.like_policy(network)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the copied reference."""
        super().on_save_checkpoint(checkpoint)
        if self.reference == "copy" and self._reference:
            state, left_out = self._reference[0].state_dict(), set(self.not_stored())
            checkpoint[self.reference_entry] = {name: value for name, value in state.items() if name not in left_out}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the reference that `on_save_checkpoint` stored."""
        super().on_load_checkpoint(checkpoint)
        if self.reference != "copy":
            return
        if self.reference_entry not in checkpoint:
            self._reference = []  # the copy of `setup` is not of the weights that are loaded now
            return
        if not self._reference:
            self._keep(self.copied_policy())
        left_out = {name: self._reference[0].state_dict()[name] for name in self.not_stored()}
        self._reference[0].load_state_dict({**left_out, **checkpoint[self.reference_entry]})

    # The loss

    def _run(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        """Log-likelihoods (B,) of chosen and of rejected answers, and the network's output for all tokens."""
        if "packed_input_ids" in batch:
            ids_RT, labels_RT, position_RT, answer_RT = (batch[name] for name in _PACKED)
            losses_RT, output = self.answer_losses(network, ids_RT, labels_RT, position_RT, answer_RT)
            losses_2BT = unpack(losses_RT, answer_RT, position_RT, 2 * _num_pairs(batch))
        else:
            ids_2BT, labels_2BT = (torch.cat([batch[f"{side}_{name}"] for side in _SIDES]) for name in ("input_ids", "labels"))
            losses_2BT, output = self.answer_losses(network, ids_2BT, labels_2BT, None, None)
        chosen_B, rejected_B = sequence_logps(losses_2BT).chunk(2)
        return chosen_B, rejected_B, output

    @staticmethod
    def _chosen_labels(batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T)."""
        if "packed_input_ids" not in batch:
            return batch["chosen_labels"]
        where = batch["packed_answer_ids"], batch["packed_position_ids"]
        return unpack(batch["packed_labels"], *where, 2 * _num_pairs(batch), fill=IGNORED)[: _num_pairs(batch)]

    def preferences(self, batch: Mapping[str, Tensor]) -> tuple[DPOLoss, Any]:
        """Loss and rewards of a batch, and the model's output for its tokens."""
        if self.reference == "precomputed":
            references = batch["reference_chosen_logps"], batch["reference_rejected_logps"]
        else:
            with torch.no_grad():
                references = self._run(self._reference[0] if self._reference else self.policy, batch)[:2]
        num_chosen_B = (self._chosen_labels(batch)[:, 1:] != IGNORED).sum(1)
        chosen_B, rejected_B, output = self._run(self.policy, batch)
        return dpo_loss(chosen_B, rejected_B, *references, num_chosen_B, beta=self.beta, nll_weight=self.nll_weight), output

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Weighted loss of a batch of pairs."""
        self._begin_mean(torch.tensor(_num_pairs(batch), device=self.device), batch_idx)
        result, output = self.preferences(batch)
        added, parts = self.other_losses(output, batch)
        loss = result.loss + added
        weight = self._weight(loss)
        losses = {"ce": result.loss, "ce_per_sample": result.loss_B, **parts, "weight": weight}
        self.last_losses = {name: value.detach() for name, value in losses.items()}
        values = {"preference": result.preference, "nll": result.nll, "accuracy": result.accuracy, **parts}
        self.log_dict({f"train/{name}": value.detach() for name, value in values.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss * weight

    @override
    def loss_denominator(self, batch: Any) -> int:
        """The pairs of a batch."""
        return _num_pairs(batch)

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss of the preferences, accuracy and margin of the rewards."""
        self._log_preferences("val", batch)

    @override
    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_preferences("test", batch)

    def _log_preferences(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        result, _ = self.preferences(batch)
        margin = (result.chosen_reward_B - result.rejected_reward_B).mean()
        weight = 0 if "index" in batch and bool((batch["index"] < 0).all()) else _num_pairs(batch)
        means = self.val_preferences if stage == "val" else self.test_preferences
        means.loss.update(result.loss, weight)
        means.accuracy.update(result.accuracy, weight)
        means.margin.update(margin, weight)
        self.log_dict({f"{stage}/loss": means.loss, f"{stage}/accuracy": means.accuracy, f"{stage}/margin": means.margin})


class DPO(PreferenceTraining, CausalLM):
    """Preference training of any causal language model, see `PreferenceTraining`.

    A copied reference shares the weights that are not trained, such as those under low-rank adapters, unless a strategy divides
    them.

    Args:
        reference: As of `PreferenceTraining`; a model is named as the ``source`` of `HFBackbone`.
        kwargs: Arguments of `PreferenceTraining` and `CausalLM`.
    """

    def __init__(self, beta: float = 0.1, nll_weight: float = 0.0, reference: str = "copy", **kwargs: Any) -> None:
        super().__init__(beta=beta, nll_weight=nll_weight, reference=reference, **kwargs)

    @property
    @override
    def policy(self) -> nn.Module:
        return self.backbone

    @override
    def load_reference(self, source: str) -> tuple[nn.Module, int]:
        network = HFBackbone(source, kind="causal", tuning="frozen")
        return network, network.vocab_size

    @override
    def copied_policy(self) -> nn.Module:
        frozen = {id(parameter): parameter for parameter in self.backbone.parameters() if not parameter.requires_grad}
        trainer = self._trainer
        shared = frozen if trainer is None or not shards_parameters(trainer.strategy) else {}
        return copy.deepcopy(self.backbone, shared)

    @override
    def not_stored(self) -> list[str]:
        backbone = self.backbone
        return backbone.named_weights() if isinstance(backbone, HFBackbone) and backbone.named_source() is not None else []

    @override
    def answer_losses(
        self, network: nn.Module, ids_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor | None, answers_BT: Tensor | None
    ) -> tuple[Tensor, Any]:
        assert isinstance(network, Backbone)
        hidden_BTD = network(ids_BT, None, positions_BT)
        counted_BT = labels_BT[:, 1:] != IGNORED
        logits_NV = network.logits(hidden_BTD[:, :-1][counted_BT])
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        loss_N = nn.functional.cross_entropy(logits_NV, labels_BT[:, 1:][counted_BT], reduction="none")
        losses_BT = loss_N.new_zeros(counted_BT.shape).masked_scatter(counted_BT, loss_N)
        return nn.functional.pad(losses_BT, (1, 0)), None


class _Preferences(nn.Module):
    """Means over the pairs of an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = Mean()
        self.accuracy = Mean()
        self.margin = Mean()


def _num_pairs(batch: Mapping[str, Tensor]) -> int:
    """B, of a padded or packed batch."""
    return len(batch["index" if "packed_input_ids" in batch else "chosen_input_ids"])


def _check_packing(batch: Mapping[str, Tensor], name: str) -> None:
    """Refuse answers that would see one another, predict one another's beginning, or be lost.

    Raises:
        ValueError: If there are any.
    """
    labels_RT, position_RT, answer_RT = (batch[f"packed_{name}"] for name in ("labels", "position_ids", "answer_ids"))
    begins_RT = position_RT == 0
    goes_on = torch.equal(position_RT[:, 1:], (position_RT[:, :-1] + 1).masked_fill(begins_RT[:, 1:], 0))
    changes_RT = answer_RT[:, 1:] != answer_RT[:, :-1]
    numbers, expected = answer_RT[begins_RT].sort().values, torch.arange(2 * _num_pairs(batch))
    if not (goes_on and begins_RT[:, 0].all() and torch.equal(changes_RT, begins_RT[:, 1:]) and torch.equal(numbers, expected)):
        raise ValueError(
            f"{name}: packed_answer_ids must number the {len(expected)} answers of {_num_pairs(batch)} pairs, each in one "
            f"piece, and packed_position_ids count 0, 1, 2, ... in each, on through the padding behind it."
        )
    if bool((labels_RT[begins_RT] != IGNORED).any()):
        raise ValueError(f"{name}: nothing precedes the first token of a packed answer: its label must be -100.")
