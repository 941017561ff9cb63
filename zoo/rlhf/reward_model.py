"""Training of reward models on preferences.

Shape suffixes: B pairs, K answers of a prompt, the best one first, T tokens.
"""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from zoo.lm.backbone import Backbone
from zoo.lm.batches import check_vocabulary
from zoo.lm.tuned_backbone import TunedBackbone
from zoo.module import ZooModule
from zoo.rlhf.evaluation import RewardEvaluation
from zoo.rlhf.reward_loss import RewardLoss, RewardLossKind, last_values, reward_loss
from zoo.rlhf.rewards import tokenizer_mark

__all__ = ["RewardModel"]


class RewardModel(TunedBackbone, ZooModule):
    """A language model with a scalar head that learns to score preferred answers higher, as `Preferences` gives them.

    From a file of rankings these are ``ranked_input_ids`` and ``ranked_attention_mask`` (B, K, T), the best answer first.
    Validation gives loss, accuracy of pairs and calibration error, and notes mean and deviation of the preferred answers'
    scores, by which `TrainedReward` normalises. One epoch is usual: several overfit.
    Source: Ouyang et al. (InstructGPT), arXiv 2203.02155; ``per_token``: DeepSpeed-Chat.

    Args:
        backbone: A model with ``scalar_head=True``.
        loss: Compare the values at the last tokens, or those of all tokens that tell two answers apart.
        margin: Difference of scores that the model shall exceed.
        optimizer: Makes the optimizer.
        kwargs: Arguments of `ZooModule`.

    Raises:
        ValueError: If the backbone has no scalar head, or the margin is negative.
    """

    score_mean: Tensor
    score_deviation: Tensor
    tokenizer_mark: Tensor

    def __init__(
        self,
        backbone: Backbone,
        loss: RewardLossKind = "last",
        margin: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=9e-6, weight_decay=0.1),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if backbone.scalar is None:
            raise ValueError("RewardModel: the backbone has no scalar head: set scalar_head to true.")
        if margin < 0:
            raise ValueError(f"RewardModel: margin={margin} must not be negative.")
        backbone.freeze_output_head()
        self.backbone = backbone
        self.is_pretrained = backbone.is_pretrained
        self.loss: RewardLossKind = loss
        self.margin = margin
        self.val_metrics, self.test_metrics = RewardEvaluation(), RewardEvaluation()
        self.register_buffer("score_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("score_deviation", torch.ones((), dtype=torch.float64))
        self.register_buffer("tokenizer_mark", torch.zeros((), dtype=torch.int64))

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if stage == "fit" and tokenizer is not None:
            self.tokenizer_mark.copy_(tokenizer_mark(tokenizer))

    # Batches

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the batch.

        Raises:
            ValueError: If it holds no preferences, or an id is outside of the vocabulary.
        """
        names = [name for name in ("chosen_input_ids", "ranked_input_ids", "input_ids") if name in batch]
        if not names:
            raise ValueError(
                "RewardModel needs batches of pairs, as the DataModules Preferences (packed: false) and RatedSnippets (use:"
                " pairs) give them."
            )
        check_vocabulary(batch[names[0]], self.backbone.vocab_size)
        return batch

    def _ranked(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, K, T)."""
        if "ranked_input_ids" in batch:
            return batch["ranked_input_ids"], batch["ranked_attention_mask"]
        ids, mask = (
            torch.stack([batch[f"{side}_{name}"] for side in ("chosen", "rejected")], 1)
            for name in ("input_ids", "attention_mask")
        )
        return ids, mask

    def losses(self, batch: Any) -> RewardLoss:
        """Loss of a batch, with what `zoo.rlhf.reward_loss` gives beside it."""
        ids_BKT, mask_BKT = self._ranked(batch)
        value_NT = self.backbone.values(ids_BKT.flatten(0, 1), mask_BKT.flatten(0, 1))
        value_BKT = value_NT.view(ids_BKT.shape).to(torch.promote_types(value_NT.dtype, torch.float32))
        return reward_loss(value_BKT, ids_BKT, mask_BKT, self.loss, self.margin)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        found = self.losses(batch)
        self.log("train/loss", found.loss.detach(), prog_bar=True)
        return found.loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss, accuracy and calibration error of held-out pairs."""
        self._evaluate(self.val_metrics, batch)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(self.test_metrics, batch)

    def _evaluate(self, metrics: RewardEvaluation, batch: Any) -> None:
        """Add the pairs that count; all ranks run the pass."""
        found, counts_B = self.losses(batch), batch["index"] >= 0
        if bool(counts_B.any()):
            metrics.update(RewardLoss(found.loss, *(part[counts_B] for part in found[1:])))

    @override
    def on_validation_epoch_end(self) -> None:
        mean, deviation = self._report("val", self.val_metrics)
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking and bool(deviation > 0):
            self.score_mean.copy_(mean)
            self.score_deviation.copy_(deviation)

    @override
    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_metrics)

    def _report(self, stage: str, metrics: RewardEvaluation) -> tuple[Tensor, Tensor]:
        values, mean, deviation = metrics.compute()
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "accuracy", sync_dist=False)
        return mean, deviation

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Normalised scores of whole texts: ``index``, ``prompt``, ``score`` for `JSONLWriter`."""
        counts_B = batch["index"] >= 0
        value_BT = self.backbone.values(batch["input_ids"], batch["attention_mask"])
        score_B = last_values(value_BT, batch["attention_mask"])
        score_B = (score_B - self.score_mean) / self.score_deviation
        texts = [text for text, counts in zip(batch["prompt"], counts_B.tolist(), strict=True) if counts]
        return {"index": batch["index"][counts_B], "prompt": texts, "score": score_B[counts_B].tolist()}
