"""KPOD: a student that learns rationales by weights of their tokens, and step by step from the last to the first.

Shape suffixes: B examples, S places of a row, N labels that count, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from zoo.kpod.arithmetic_tokens import arithmetic_tokens
from zoo.kpod.artefacts import TokenWeights
from zoo.kpod.keypoint_loss import WeightNorm, keypoint_weights, move_given_steps, supervised_labels, weighted_nll
from zoo.kpod.scorer import CONNECTOR, Scorer, score, wilson_interval
from zoo.lm.backbone import Backbone
from zoo.lm.batches import counted_labels
from zoo.lm.cross_entropy import IGNORED
from zoo.lm.decoder import Decodes
from zoo.lm.evaluation import TokenLosses
from zoo.lm.language_module import LanguageModule
from zoo.lm.tuned_backbone import TunedBackbone
from zoo.metrics.mean_and_error import Float64Sums, Mean

__all__ = ["KPOD"]


class KPOD(TunedBackbone, LanguageModule):
    """Distillation of chains of thought with weights of tokens and a curriculum inside the rationale.

    Batches are those of the DataModule Rationales. The steps that are given come from the callback `InRationaleCurriculum`;
    without it all are learned, and without weights as well this is ordinary fine-tuning. Validation answers questions greedily,
    and logs accuracies with intervals of 95 % and losses (nats a token) of digits and operators and of other tokens, by group of
    questions. Source: Feng et al., ICML 2024, arXiv 2405.16064.

    Args:
        student: A causal or encoder-decoder model; what of it is trained is its ``tuning``.
        token_weights: File that ``zoo predict`` of `TokenWeighter` wrote, or those of the folds of a cross-fit; None: all 1.
        weight_norm: ``mean1`` divides the weights of an example by their mean.
        weight_floor: Least weight; 0 is the paper's, 0.1 keeps a weak student fluent.
        answer_weight: Weight of the answer's tokens.
        scorer: Comparison of an answer with the true one: ``strict``, ``choice`` (letters) or ``mcc_kd`` (as MCC-KD does).
        optimizer: Makes the optimizer; matrices decay, gains and biases do not.
        kwargs: Arguments of `LanguageModule` and `ZooModule`.

    Raises:
        ValueError: If the student is an encoder, or a number is out of range.
    """

    def __init__(
        self,
        student: Backbone,
        token_weights: Path | list[Path] | None = None,
        weight_norm: WeightNorm = "none",
        weight_floor: float = 0.0,
        answer_weight: float = 1.0,
        scorer: Scorer = "strict",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if student.kind == "encoder":
            raise ValueError(
                "KPOD: the student is an encoder, which writes no rationales: take a causal or an encoder-decoder model."
            )
        if not 0 <= weight_floor <= 1 or answer_weight < 0:
            raise ValueError(
                f"KPOD: weight_floor={weight_floor} must lie in 0 to 1, answer_weight={answer_weight} not be negative."
            )
        self.backbone = student
        self.is_pretrained = student.is_pretrained
        self.token_weights = token_weights
        self.weight_norm: WeightNorm = weight_norm
        self.weight_floor, self.answer_weight = weight_floor, answer_weight
        self.scorer: Scorer = scorer
        #: Leading steps that are given, int64 by number of the training example; None: none.
        self.given_steps: Tensor | None = None
        self._weights: TokenWeights | None = None
        self.accuracy: Any = nn.ModuleDict({f"of_{group}": _Accuracy("sums", shape=(2,)) for group in ("items", "templates")})
        self.class_losses: Any = nn.ModuleDict(
            {f"{group}_{kind}": Mean() for group in ("items", "templates") for kind in ("arithmetic", "words")}
        )

    @property
    @override
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    @override
    def setup(self, stage: str) -> None:
        """Read the weights of tokens.

        Raises:
            ValueError: If they are of other data or another tokenizer.
        """
        super().setup(stage)
        if stage == "fit" and self.token_weights is not None:
            fingerprint = getattr(getattr(self.trainer, "datamodule", None), "fingerprint", {})
            self._weights = TokenWeights.read(self.token_weights, fingerprint.get("tokenizer", ""), fingerprint.get("data", ""))

    # Batches

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check ids, and look up the weights of the rationales.

        Raises:
            ValueError: If batches are no examples, an id is unknown, or an example has no weights.
        """
        checked = super().on_before_batch_transfer(batch, dataloader_idx)
        if "answer" in batch:
            return checked
        if self.trainer.predicting:
            raise ValueError("KPOD predicts answers to questions, which these batches lack: set data.predict_on to questions.")
        if "step_ids" not in batch or "labels" not in batch:
            raise ValueError("KPOD needs batches with labels and step_ids, as the DataModule Rationales gives them.")
        checked["attention_mask"] = batch["attention_mask"]
        if self.trainer.training and self._weights is not None:
            checked["token_weights"] = self._weights.lookup(batch["index"], batch["step_ids"])
        return checked

    def given_of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Number of given steps of each example, (B,); none in evaluation."""
        index_B = batch["index"]
        if self.given_steps is None or self._trainer is None or not self.trainer.training:
            return torch.zeros_like(index_B)
        return self.given_steps.to(index_B.device)[index_B]

    @override
    def loss_denominator(self, batch: Any) -> int:
        if self.loss_over == "micro_batch":
            return len(batch["input_ids"])
        label_BS = supervised_labels(counted_labels(batch), batch["step_ids"], self.given_of(batch))
        return int((label_BS[:, 1:] != IGNORED).sum())

    # Losses

    def scored(self, batch: Mapping[str, Tensor], given_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (N, V), labels (N,) and factors (N,) of the supervised tokens, and their places in the rows of labels, bool."""
        step_BS = batch["step_ids"]
        weight_BS = batch.get("token_weights", torch.ones_like(step_BS, dtype=torch.float32))
        weight_BS = keypoint_weights(weight_BS, step_BS, self.weight_norm, self.weight_floor, self.answer_weight)
        if self.backbone.kind == "causal":
            label_BS = supervised_labels(counted_labels(batch), step_BS, given_B)
            hidden_BSD = self.backbone(batch["input_ids"], batch["attention_mask"])
        else:
            rows = move_given_steps(batch, weight_BS, given_B, self.backbone.start_id, self.backbone.pad_id)
            label_BS, weight_BS = rows["labels"], rows["weights"]
            hidden_BSD = self.backbone(rows["input_ids"], rows["attention_mask"], decoder_ids_BT=rows["decoder_input_ids"])
        counted_BS = label_BS[:, 1:] != IGNORED
        logits_NV = self.backbone.logits(hidden_BSD[:, :-1][counted_BS])
        return logits_NV, label_BS[:, 1:][counted_BS], weight_BS[:, 1:][counted_BS], counted_BS

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        given_B = self.given_of(batch)
        count = torch.tensor(self.loss_denominator(batch), device=self.device) if self.loss_over == "step" else None
        if count is not None:
            self._begin_mean(count, batch_idx)
        logits_NV, label_N, weight_N, _ = self.scored(batch, given_B)
        total, count = weighted_nll(logits_NV, label_N, weight_N)
        loss = total / count.clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/supervised_tokens", count.float(), reduce_fx="sum")
        return loss * self._weight(loss)

    @override
    def token_losses(self, batch: Mapping[str, Tensor]) -> TokenLosses:
        """Unweighted losses of all tokens of rationales and answers; a row's stand at its first places in an encoder-decoder."""
        loss_N, _, counted_BS = self._losses(batch)
        each_BS = loss_N.new_zeros(counted_BS.shape).masked_scatter(counted_BS, loss_N.detach())
        return TokenLosses(loss_N.sum() / max(1, len(loss_N)), each_BS)

    def _losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits_NV, label_N, _, counted_BS = self.scored(batch, torch.zeros_like(batch["index"]))
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        return nn.functional.cross_entropy(logits_NV, label_N, reduction="none"), label_N, counted_BS

    # Evaluation and answers

    @override
    def _evaluate(self, batch: Any, metrics: Any, calls: Any) -> None:
        if "answer" in batch:
            for text, answer, group in zip(self._answers(batch), batch["answer"], batch["group"], strict=False):
                verdict = score(text, answer, self.scorer)
                self.accuracy[f"of_{group}"].update(verdict.correct, verdict.counted)
            return
        loss_N, label_N, counted_BS = self._losses(batch)
        each_BS = loss_N.new_zeros(counted_BS.shape).masked_scatter(counted_BS, loss_N)
        metrics.update(loss_N.sum() / max(1, len(loss_N)), each_BS, batch)
        arithmetic_N = arithmetic_tokens(self._tokenizer(), self.vocab_size).to(label_N.device)[label_N]
        new_N = batch["new_template"][:, None].expand(counted_BS.shape)[counted_BS]
        for group, of_group_N in (("items", ~new_N), ("templates", new_N)):
            self.class_losses[f"{group}_arithmetic"].update(loss_N[of_group_N & arithmetic_N])
            self.class_losses[f"{group}_words"].update(loss_N[of_group_N & ~arithmetic_N])

    @override
    def _log_evaluation(self, stage: str, metrics: Any, calls: Any) -> None:
        super()._log_evaluation(stage, metrics, calls)
        for name, metric in self.class_losses.items():
            group, _, kind = name.partition("_")
            if metric.update_called and not (loss := metric.compute()).isnan():
                self.log(f"{stage}/{group}/loss_{kind}", loss)
            metric.reset()
        for name, accuracy in self.accuracy.items():
            group = name.removeprefix("of_")
            if accuracy.update_called:
                correct, count = accuracy.compute().tolist()
                low, high = wilson_interval(int(correct), int(count))
                self.log(f"{stage}/{group}/accuracy", correct / max(1, count), prog_bar=True)
                self.log_dict({f"{stage}/{group}/accuracy_low": low, f"{stage}/{group}/accuracy_high": high})
            accuracy.reset()

    @override
    def decodes(self) -> Decodes:
        return self.backbone.decodes()

    @override
    def scores(self, pairs: Sequence[Any]) -> list[float]:
        raise ValueError("KPOD compares no likelihoods of choices: its scorer reads written answers (scorer: choice).")

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Answer questions: ``index``, ``question``, ``rationale``, ``answer``, and ``correct`` (None: not known)."""
        texts = self._answers(batch)
        if not texts:
            return {"index": batch["index"][:0], "question": [], "rationale": [], "answer": [], "correct": []}
        verdicts = [score(text, answer, self.scorer) for text, answer in zip(texts, batch["answer"], strict=True)]
        return {
            "index": batch["index"],
            "question": batch["question"],
            "rationale": [text.partition(CONNECTOR)[0].strip() for text in texts],
            "answer": [verdict.answer for verdict in verdicts],
            "correct": [verdict.correct if answer else None for verdict, answer in zip(verdicts, batch["answer"], strict=True)],
        }


class _Accuracy(Float64Sums):
    """Correct answers, and those that count, over batches and processes."""

    sums: Tensor

    def update(self, *correct_and_counted: bool) -> None:
        self.sums += torch.tensor(correct_and_counted, device=self.sums.device)

    def compute(self) -> Tensor:
        return self.sums
