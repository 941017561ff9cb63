"""A language model under Lightning, whatever its network: batches, the mean of the loss, evaluation, and answers to prompts.

Shape suffixes: B sequences, T tokens of a sequence.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.lm.batches import Batch, check_vocabulary, counted_labels, drop_mask
from zoo.lm.cross_entropy import IGNORED
from zoo.lm.decoder import Decodes
from zoo.lm.encoded_pair import Ids, encode_pair
from zoo.lm.evaluation import Evaluation, TokenLosses
from zoo.lm.generation import Generation, continue_prompts
from zoo.lm.step_weights import StepWeights
from zoo.lm.stop_strings import text_before
from zoo.metrics.tool_calls import ToolCallMatch
from zoo.module import ZooModule
from zoo.strategy_contract import forwards_are_collective

__all__ = ["LanguageModule"]


class LanguageModule(StepWeights, ZooModule):
    """The base of modules that predict tokens: a subclass gives ``vocab_size``, `token_losses`, `decodes` and `scores`.

    Batches are dictionaries as transformers shapes them, all int64: ``input_ids`` (B, T); ``labels`` (B, T), not shifted, -100
    where nothing is learned (absent: ``input_ids`` but for padding and each document's first token); ``attention_mask`` (B, T),
    0 for padding (absent: none); ``position_ids`` (B, T) that start at 0 with each document, whose tokens do not see those of
    others (absent: one document); ``num_bytes`` (B,), the bytes of text behind the labels (absent: no bits per byte). Batches of
    evaluation with ``calls`` are prompts: the texts that follow are compared with these calls of tools.

    Args:
        loss_over: Terms of the loss's mean. ``step``: labels count alike in a whole optimizer step, those of accumulated
            micro-batches and of other processes included (`StepMean`); ``micro_batch``: micro-batches and processes count alike,
            whatever their numbers of labels.
        generation: Options of the texts that ``predict`` writes.
        kwargs: Arguments of `ZooModule`.

    Raises:
        ValueError: If ``loss_over`` has another value; or, when training starts, if ``loss_over="step"`` meets a strategy such as
            DeepSpeed that accumulates gradients out of reach.
    """

    val_metrics: Evaluation
    test_metrics: Evaluation

    def __init__(
        self,
        loss_over: Literal["step", "micro_batch"] = "step",
        generation: Generation = Generation(),  # noqa: B008 (read only)
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.average_over(loss_over)
        self.generation = generation
        self.val_metrics, self.test_metrics = Evaluation(), Evaluation()
        self.val_calls, self.test_calls = ToolCallMatch(), ToolCallMatch()

    # Parts of a subclass

    @property
    def vocab_size(self) -> int:
        """Number of ids that the network knows."""
        raise NotImplementedError

    def token_losses(self, batch: Batch) -> TokenLosses:
        """Cross-entropies of a batch."""
        raise NotImplementedError

    def decodes(self) -> Decodes:
        """The model as generation continues prompts with it."""
        raise NotImplementedError

    def scores(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Log-likelihoods in nats of continuations after contexts, both as ids.

        All processes call it together, with any numbers of pairs; see `_largest`.
        """
        raise NotImplementedError

    # Batches

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check ids, and drop a mask that attention does not need, before the batch leaves the CPU.

        Raises:
            ValueError: If an id or label is outside of the vocabulary, or ``input_ids`` are missing.
        """
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found = f"a dictionary with {', '.join(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"{type(self).__name__} needs batches that are dictionaries with input_ids, as the DataModule Text gives"
                f" them, not {found}."
            )
        check_vocabulary(batch["input_ids"], self.vocab_size)
        if "labels" in batch:
            check_vocabulary(batch["labels"][batch["labels"] != IGNORED], self.vocab_size)
        return drop_mask(dict(batch))

    def loss_denominator(self, batch: Any) -> int:
        """Number of terms of a batch's mean loss, for strategies that weigh batches: labels, or samples (`loss_over`)."""
        if self.loss_over == "micro_batch":
            return len(batch["input_ids"])
        return int((counted_labels(batch)[:, 1:] != IGNORED).sum())

    # Evaluation

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, self.val_metrics, self.val_calls)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val", self.val_metrics, self.val_calls)

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, self.test_metrics, self.test_calls)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", self.test_metrics, self.test_calls)

    def _evaluate(self, batch: Any, metrics: Evaluation, calls: ToolCallMatch) -> None:
        if "calls" not in batch:
            metrics.update(*self.token_losses(batch), batch)
            return
        texts = self._answers(batch)
        if texts:
            calls.update(texts, batch["calls"])

    def _log_evaluation(self, stage: str, metrics: Evaluation, calls: ToolCallMatch) -> None:
        values = metrics.compute()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True)
        if "loss" in values:
            self.log(f"{stage}/perplexity", values["loss"].exp())
        if calls.update_called:
            self.log_dict({f"{stage}/calls/{name}": value for name, value in calls.compute().items()})
            calls.reset()

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Log-likelihood in nats of each text given the text before it, for `ChoiceEval`.

        All processes call it equally often, with any pairs: each runs the network as often as the one with the most pairs.

        Args:
            pairs: Context and continuation.
        """
        tokenizer = self._tokenizer()
        return self.scores([encode_pair(tokenizer, *pair) for pair in pairs])

    def _largest(self, number: int) -> int:
        """The largest number of all processes."""
        if self.trainer.world_size == 1:
            return number
        return int(self.trainer.strategy.reduce(torch.tensor(number, device=self.device), reduce_op="max"))

    def _tokenizer(self) -> Any:
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("This needs a DataModule with a tokenizer, such as Text.")
        return tokenizer

    # Answers

    def _answers(self, batch: dict[str, Any]) -> list[str]:
        """Texts that follow the prompts of a batch; none if its ``index`` is -1, which stands for no prompts.

        Where forward passes wait for all processes, those that have ended run along until the last one has.
        """
        tokenizer = self._tokenizer()
        together = self._trainer is not None and forwards_are_collective(self.trainer.strategy)
        agree = (lambda here: self._largest(int(here)) > 0) if together else None
        blank = int(batch["index"][0]) < 0
        if blank and agree is None:
            return []
        options = dataclasses.replace(self.generation, max_new_tokens=1) if blank else self.generation
        if options.eos_token_id is None:
            options = dataclasses.replace(options, eos_token_id=tokenizer.eos_id)
        new = continue_prompts(
            self.decodes(),
            batch["input_ids"],
            batch.get("attention_mask", batch.get("valid_mask")),
            options,
            decode=tokenizer.decode,
            random=SampleRandom(self.random_seed, batch["index"], epoch=-1),
            agree=agree,
        )
        if blank:
            return []
        rows = zip(new.tokens.tolist(), new.length.tolist(), strict=True)
        return [text_before(text_until_end(ids[:length], tokenizer), options.stop) for ids, length in rows]

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Continue the prompts: ``index``, ``prompt`` and ``text`` for `JSONLWriter`.

        Raises:
            ValueError: If the DataModule has no tokenizer, or prompts are padded elsewhere than on the left.
        """
        texts = self._answers(batch)
        if not texts:
            return {"index": batch["index"][:0], "prompt": [], "text": []}
        return {"index": batch["index"], "prompt": batch["prompt"], "text": texts}


def text_until_end(ids: list[int], tokenizer: Any) -> str:
    """Text of ids, up to the one that ends it."""
    return str(tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids))
