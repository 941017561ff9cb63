"""Training of the weights of a rationale's tokens, and their evaluation.

Shape suffixes: B examples, P places of question and rationale, A tokens of an answer, N tokens of rationales, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.kpod.arithmetic_tokens import arithmetic_tokens
from zoo.kpod.token_weighter import DividedRows, MaskLearner, PrefixSamples, divide_rows, draw_prefixes
from zoo.lm.backbone import Backbone
from zoo.lm.batches import check_vocabulary
from zoo.lm.cross_entropy import IGNORED
from zoo.metrics.mean_and_error import Mean
from zoo.module import ZooModule

__all__ = ["TokenWeighter"]

_COLLAPSED, _POOR_CURVE = (0.02, 0.98), 0.6


class TokenWeighter(ZooModule):
    """Learns which tokens of rationales an answer needs, by masking them; ``predict`` gives the weights for `TokenWeightsWriter`.

    Batches are those of the DataModule Rationales. Validation logs cross-entropies of held-out answers (nats) with all tokens of
    rationales kept, all masked, and masked by ``w < 1/2``; ``val/gap``, masked less kept, for EarlyStopping: a predictor that
    memorises answers of training needs no rationale, and all weights fall to 0.

    Args:
        student: Model whose input embedding is read, which stays as it is.
        predictor: Predicts the answers, written by its own tokenizer if it has one; None: a copy of the student.
        alpha: Price of a kept token.
        tau: Temperature of the masks.
        hard: Straight-through masks, which collapse (`benchmarks/kpod_keypoints.py`).
        prefix_samples: Prefixes of a rationale that the predictor reads in a step, or ``all``.
        warmup_steps: Steps without masks.
        ramp_steps: Steps after these over which alpha grows from 0.
        keep_ratio: Mean of the masks that a Lagrange multiplier holds instead of ``alpha``; None: alpha.
        heads: Of the attention among the tokens of a rationale.
        fold: Cross-fitting: of ``folds``, the fold (index modulo folds) that is not trained on, and alone predicted; None: all
            examples are trained on and predicted.
        folds: Number of folds.
        on_collapse: Treatment of weights whose mean is below 0.02 or above 0.98: an error, a warning, or a warning and weights 1.
        head_lr: Learning rate of the weights; that of the predictor is the optimizer's.
        optimizer: Makes the optimizer.
        kwargs: Arguments of `ZooModule`.

    Raises:
        ValueError: If an argument is out of range, or the predictor is an encoder.
    """

    def __init__(
        self,
        student: Backbone,
        predictor: Backbone | None = None,
        alpha: float = 0.5,
        tau: float = 1.0,
        hard: bool = False,
        prefix_samples: PrefixSamples = 1,
        warmup_steps: int = 500,
        ramp_steps: int = 200,
        keep_ratio: float | None = None,
        heads: int = 8,
        fold: int | None = None,
        folds: int = 5,
        on_collapse: Literal["error", "warn", "uniform"] = "error",
        head_lr: float = 1e-3,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-5, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        allowed = {
            "alpha must not be negative": alpha >= 0,
            "tau must be positive": tau > 0,
            "prefix_samples must be at least 1, or all": prefix_samples == "all" or int(prefix_samples) >= 1,
            "keep_ratio must lie in (0, 1)": keep_ratio is None or 0 < keep_ratio < 1,
            "fold must lie in 0 ... folds - 1, of at least 2 folds": fold is None or 0 <= fold < folds > 1,
        }
        if wrong := [rule for rule, holds in allowed.items() if not holds]:
            raise ValueError(f"TokenWeighter: {wrong[0]}.")
        self.learner = MaskLearner(student, predictor, heads, tau, hard)
        self.multiplier = None if keep_ratio is None else nn.Parameter(torch.zeros(()))
        self.alpha, self.prefix_samples, self.keep_ratio = alpha, prefix_samples, keep_ratio
        self.warmup_steps, self.ramp_steps, self.head_lr = warmup_steps, ramp_steps, head_lr
        self.fold, self.folds, self.on_collapse = fold, folds, on_collapse
        self.own_predictor = predictor is not None
        self.metrics: Any = nn.ModuleDict({name: Mean() for name in ("kept", "masked", "hard", "weight")})
        self.curve = BinaryAUROC()

    @override
    def networks(self) -> list[nn.Module]:
        return self.learner.predictor.backbone.blocks

    @override
    def parameter_groups(self) -> Iterable[Any]:
        predictor = [p for p in self.learner.predictor.parameters() if p.requires_grad]
        known = {id(p) for p in predictor}
        head = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return [*([{"params": predictor}] if predictor else []), {"params": head, "lr": self.head_lr, "weight_decay": 0.0}]

    # Batches

    @property
    def _tokenizer(self) -> Any:
        return getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check ids, and write the answers in the predictor's vocabulary.

        Raises:
            ValueError: If batches hold no rationales, an id is unknown, or the predictor's tokenizer cannot write an answer.
        """
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ValueError("TokenWeighter needs batches with input_ids and step_ids, as the DataModule Rationales gives them.")
        if "step_ids" not in batch:
            if self.trainer.predicting:
                raise ValueError("TokenWeighter predicts weights of rationales, not answers: set data.predict_on to train.")
            return batch
        check_vocabulary(batch["input_ids"], self.learner.embedding.num_embeddings)
        rows = divide_rows(batch)
        return {"rows": rows._replace(answer_BA=self._own_answers(rows.answer_BA)), "index": batch["index"]}

    def _own_answers(self, answer_BA: Tensor) -> Tensor:
        """Answers in the vocabulary of the predictor."""
        backbone, tokenizer = self.learner.predictor.backbone, self._tokenizer
        own = _tokenizer_of(backbone) if self.own_predictor and tokenizer is not None else None
        if own is None:
            check_vocabulary(answer_BA[answer_BA != IGNORED], backbone.vocab_size)
            return answer_BA
        answers = []
        for row in answer_BA:
            text = str(tokenizer.decode(row[row != IGNORED])).strip()
            ids = own(text, add_special_tokens=False)["input_ids"]
            if str(own.decode(ids)).split() != text.split():
                raise ValueError(
                    f"TokenWeighter: the predictor's tokenizer cannot write the answer {text[:60]!r} (it reads"
                    f" {str(own.decode(ids))[:60]!r}): take a predictor that shares the student's vocabulary, or leave it out."
                )
            answers.append(torch.tensor([*ids, own.eos_token_id]))
        return nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)

    # Training

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        rows, index_B = batch["rows"], batch["index"]
        after = self.applied_steps - self.warmup_steps
        random = SampleRandom(self.random_seed, index_B, self.trainer.current_epoch)
        found = self.learner(rows, random, self.prefix_samples, masked=after >= 0)
        trained_B = torch.ones_like(index_B) if self.fold is None else (index_B % self.folds != self.fold).long()
        answer, kept = ((part * trained_B).sum() / trained_B.sum().clamp(min=1) for part in found)
        self.log_dict({"train/answer_loss": answer.detach(), "train/kept": kept.detach()}, prog_bar=True, batch_size=len(index_B))
        if self.multiplier is not None and self.keep_ratio is not None:
            excess = (kept - self.keep_ratio) * float(after >= 0)
            return answer + self.multiplier.detach() * excess - self.multiplier * excess.detach()  # ascends in the multiplier
        return answer + self.alpha * min(1.0, max(0.0, (after + 1) / max(1, self.ramp_steps))) * kept

    # Evaluation

    @override
    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if "rows" not in batch:
            return
        rows: DividedRows = batch["rows"]
        random = SampleRandom(self.random_seed, batch["index"], epoch=-1)
        prefixes = draw_prefixes(rows.rationale_B, self.prefix_samples, random)
        weight_BP = self.learner.logits(rows).sigmoid()
        masks = {
            "kept": torch.ones_like(weight_BP),
            "masked": torch.zeros_like(weight_BP),
            "hard": (weight_BP > 0.5).to(weight_BP),
        }
        losses = {name: self.learner.answer_loss(rows, mask_BP, *prefixes) for name, mask_BP in masks.items()}
        counts_B = batch["index"] >= 0
        for name, loss_B in losses.items():
            self.metrics[name].update(loss_B[counts_B])
        of_rationale_BP = rows.rationale_BP & counts_B[:, None]
        self.metrics["weight"].update(weight_BP[of_rationale_BP])
        if self._tokenizer is not None:
            arithmetic_V = arithmetic_tokens(self._tokenizer, self.learner.embedding.num_embeddings)
            self.curve.update(weight_BP[of_rationale_BP].float(), arithmetic_V.to(self.device)[rows.ids_BP[of_rationale_BP]])

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def _log_evaluation(self, stage: str) -> None:
        found = {name: metric.compute() for name, metric in self.metrics.items()}
        losses = {f"{stage}/answer_loss_{name}": found[name] for name in ("kept", "masked", "hard")}
        self.log_dict(
            {**losses, f"{stage}/gap": found["masked"] - found["kept"], f"{stage}/mean_weight": found["weight"]},
            prog_bar=True,
            sync_dist=False,
        )
        is_trained = stage == "test" or self.applied_steps >= self.warmup_steps + max(1, self.ramp_steps)
        if is_trained:
            self.is_collapsed(float(found["weight"]))
        if self.curve.update_called:
            curve = self.curve.compute()
            self.log(f"{stage}/auc", curve, prog_bar=True, sync_dist=False)
            if is_trained and curve < _POOR_CURVE:
                rank_zero_warn(
                    f"Weights tell digits and operators from other tokens with an area under the curve of {float(curve):.2f},"
                    f" below {_POOR_CURVE}: look at the heat map before you use them."
                )
        for metric in (*self.metrics.values(), self.curve):
            metric.reset()

    def is_collapsed(self, mean: float) -> bool:
        """Whether weights are to be 1 everywhere, since masks have collapsed.

        Args:
            mean: Mean weight.

        Raises:
            ValueError: If they have, and ``on_collapse`` is ``error``.
        """
        if _COLLAPSED[0] <= mean <= _COLLAPSED[1]:
            return False
        message = (
            f"TokenWeighter: the masks have collapsed, the mean weight is {mean:.3f}: "
            + ("lower alpha, or train on more examples or for fewer epochs" if mean < 0.5 else "raise alpha or warmup_steps")
            + ". on_collapse: warn or uniform continues."
        )
        if self.on_collapse == "error":
            raise ValueError(message)
        rank_zero_warn(message)
        return self.on_collapse == "uniform"

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Weights of the tokens of rationales: ``index``, ``weights`` and ``tokens`` (texts) for `TokenWeightsWriter`."""
        rows, index_B = batch["rows"], batch["index"]
        chosen_B = index_B >= 0
        if self.fold is not None:
            chosen_B &= index_B % self.folds == self.fold
        weight_BP = self.learner.logits(rows).sigmoid().float()
        places = [rows.rationale_BP[row] for row in chosen_B.nonzero()[:, 0].tolist()]
        weights, ids = (
            [part[there] for part, there in zip(of[chosen_B], places, strict=True)] for of in (weight_BP, rows.ids_BP)
        )
        texts = [[self._tokenizer.decode([number]) if self._tokenizer else str(number) for number in row.tolist()] for row in ids]
        return {"index": index_B[chosen_B], "weights": [row.tolist() for row in weights], "tokens": texts}


def _tokenizer_of(backbone: Backbone) -> Any:
    """Tokenizer of a model that has one."""
    try:
        return backbone.tokenizer
    except ValueError:
        return None
