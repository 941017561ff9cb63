"""The language model as a Lightning module.

Shape suffixes: B sequences, T tokens of a sequence, N = B T, L layers with experts, E experts.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.ling.batches import Batch, check_vocabulary, counted_labels, drop_mask, valid_tokens
from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.config import LingConfig, Preset, preset
from zoo.ling.evaluation import Evaluation
from zoo.ling.experts import Backend
from zoo.ling.head import IGNORED
from zoo.ling.multiple_choice import encode_pair, loglikelihoods
from zoo.ling.network import LingOutput, RouterNoise
from zoo.ling.official import LingOfficialWeights
from zoo.ling.router import RouterStatistics, layer_losses, router_statistics
from zoo.ling.routing_warm_up import RoutingWarmUp
from zoo.ling.state_dict_adapter import load_hf
from zoo.ling.tokenizer import check_special_tokens, check_tokenizer, text_until_end
from zoo.ling.trained_types import settle_types
from zoo.lm.generation import Generation
from zoo.lm.step_mean import StepMean
from zoo.lm.step_weights import StepWeights
from zoo.lm.stop_strings import text_before
from zoo.module import ZooModule
from zoo.strategy_contract import forwards_are_collective

__all__ = ["Ling"]


class Ling(StepWeights, LingOfficialWeights, ZooModule):
    """Fine-grained mixture-of-experts language model with NormHead, trained with stochastic routing warm-up (Ling).

    Loss: mean cross-entropy + ``sum_l (aux_coef A_l + z_coef Z_l)`` over the layers with experts, A the balance loss and Z the
    router's z-loss. Source: "Every FLOP Counts", arXiv 2503.05139. The mean is over all labels of an optimizer step, those of
    accumulated micro-batches and of other processes included (`StepMean`). The routers' losses are means over the tokens of a
    micro-batch of one process, as balance is no sum over tokens; a micro-batch counts as much as its labels do, and nothing if
    it has none. Logged values are of the micro-batch of the process that logs: ``train/ce`` the mean over its labels,
    ``train/loss`` with the routers' losses. The returned loss is weighted.

    Batches are dictionaries as transformers shapes them, all int64: ``input_ids`` (B, T); ``labels`` (B, T), not shifted, -100
    where nothing is learned (absent: ``input_ids`` but for padding and each document's first token); ``attention_mask`` (B, T),
    0 for padding (absent: none); ``position_ids`` (B, T) that start at 0 with each document, whose tokens do not see those of
    others (absent: one document); ``num_bytes`` (B,), the bytes of text behind the labels (absent: no bits per byte).

    Weights of half precision stay so in evaluation and in true half precision; other training keeps them in float32. A module
    that is rebuilt from a checkpoint or a folder has them in the stored type.

    Args:
        config: Architecture, or the name of a preset.
        checkpoint: Folder of released weights (Hugging Face layout) to start from, or the name of a repository of the Hugging
            Face hub with safetensors; its ``config.json`` decides the architecture. A run that is continued does not need it.
        config_changes: New values for entries of ``config`` or of the checkpoint's architecture, such as ``rope_theta`` and
            ``max_position_embeddings`` where training on long texts begins.
        experts: Computation of routed experts: one ``grouped`` product, a ``loop`` over experts, ``batched`` products of
            gathered weights, or the one that fits each call.
        aux_coef: Coefficient of the balance loss.
        z_coef: Coefficient of the z-loss.
        aux_reduction: Sum or mean of these losses over the layers.
        aux_scope: Loads that balance is judged by: of one process's batch, or of all processes.
        loss_over: Terms of the loss's mean. ``step``: labels count alike in a whole optimizer step; ``micro_batch``:
            micro-batches and processes count alike, whatever their numbers of labels. Both are the same where these are equal,
            but for the gradient of an incomplete last step of an epoch, a mean with ``step`` and too small with the other.
        router_warmup_steps: W, applied steps over which learned scores replace noise; 0: no warm-up. None: 2000, but 0 with
            ``checkpoint``, whose router has learned. Weights loaded with `from_pretrained` or ``--ckpt_path`` do not restart it.
        router_momentum: Weight of the old value in the running mean and deviation of the scores.
        router_dtype: Type of the scores: ``float32``, or that of the parameters as published (``param``).
        loss_chunk: Tokens whose logits are in memory at a time; 0: all.
        activation_checkpointing: Compute the blocks' activations again in the backward pass instead of keeping them.
        freeze: Patterns of names of parameters that are not trained, such as ``model.word_embeddings.*``.
        generation: Options of the texts that ``predict`` writes.
        optimizer: Makes the optimizer; matrices decay, gains and biases do not.
        kwargs: Arguments of `ZooModule`; ``compile`` compiles each block in place.

    Raises:
        ValueError: If arguments do not fit one another, or no parameter has a name of ``freeze``; or, when training starts, if
            ``loss_over="step"`` meets a strategy such as DeepSpeed that accumulates gradients out of reach.
    """

    keeps_stored_types: ClassVar[bool] = True
    #: Losses of the last training step, without gradient: ``ce`` (nats), ``ce_per_sample`` (B,), ``aux``, ``z``, and ``weight``
    #: of ``ce`` among the micro-batches and processes of the optimizer step.
    last_losses: dict[str, Tensor]
    #: Statistics of its routers.
    router_stats: RouterStatistics | None = None

    def __init__(
        self,
        config: LingConfig | Preset = "ling_tiny",
        checkpoint: str | None = None,
        config_changes: dict[str, Any] | None = None,
        experts: Backend = "auto",
        aux_coef: float = 0.015,
        z_coef: float = 1e-4,
        aux_reduction: Literal["sum", "mean"] = "sum",
        aux_scope: Literal["micro", "global"] = "micro",
        loss_over: Literal["step", "micro_batch"] = "step",
        router_warmup_steps: int | None = None,
        router_momentum: float = 0.99,
        router_dtype: Literal["float32", "param"] = "float32",
        loss_chunk: int = 0,
        activation_checkpointing: bool = False,
        freeze: list[str] | None = None,
        generation: Generation = Generation(),  # noqa: B008 (read only)
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=2.4e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if router_warmup_steps is None:
            router_warmup_steps = 2000 if checkpoint is None else 0
        elif router_warmup_steps > 0 and checkpoint is not None:
            rank_zero_warn(
                f"Ling: router_warmup_steps={router_warmup_steps} makes the routing of {checkpoint}, which has been learned,"
                " random at first: leave it out, or set it to 0, to train on from these weights."
            )
        if aux_coef < 0 or z_coef < 0 or router_warmup_steps < 0 or loss_chunk < 0 or not 0 <= router_momentum < 1:
            raise ValueError(
                f"Ling: aux_coef={aux_coef}, z_coef={z_coef}, router_warmup_steps={router_warmup_steps} and "
                f"loss_chunk={loss_chunk} must not be negative, router_momentum={router_momentum} must lie in [0, 1)."
            )
        for name, value, allowed in (("aux_reduction", aux_reduction, ("sum", "mean")),
                                     ("aux_scope", aux_scope, ("micro", "global")),
                                     ("loss_over", loss_over, ("step", "micro_batch")),
                                     ("router_dtype", router_dtype, ("float32", "param"))):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"Ling: {name}={value!r} must be one of {', '.join(allowed)}.")
        accurate = router_dtype == "float32"
        if checkpoint is not None:
            self.network = load_hf(checkpoint, experts=experts, accurate_router=accurate, config_changes=config_changes).train()
        else:
            config = preset(config) if isinstance(config, str) else config
            self.network = LingForCausalLM(config.replace(**(config_changes or {})), experts, accurate)
        for hyperparameters in (self._hparams, self._hparams_initial):
            hyperparameters.update(router_warmup_steps=router_warmup_steps)
            if checkpoint is not None or config_changes:
                # Plain data that need no folder: the weights are in every checkpoint of the run.
                architecture = dataclasses.asdict(self.network.config)
                hyperparameters.update(config=architecture, checkpoint=None, config_changes=None)
        self.network.model.activation_checkpointing = activation_checkpointing
        self.aux_coef = aux_coef
        self.z_coef = z_coef
        self.aux_reduction = aux_reduction
        self.aux_scope = aux_scope
        self.loss_over = loss_over
        self.router_warmup_steps = router_warmup_steps
        self.loss_chunk = loss_chunk
        self.generation = generation
        self.last_losses = {}
        self._warm_up = RoutingWarmUp(router_warmup_steps, router_momentum)
        self._step_mean = StepMean()
        self.network.freeze(freeze or [])
        self.val_metrics, self.test_metrics = Evaluation(), Evaluation()

    @property
    def config(self) -> LingConfig:
        """The architecture."""
        return self.network.config

    @override
    def networks(self) -> list[nn.Module]:
        """The blocks, which are alike, so that one compilation serves all."""
        return list(self.network.model.layers)

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters that expert parallelism shards."""
        return self.network.expert_parameters()

    def sync_blocks(self) -> list[nn.Module]:
        """Parts that a strategy synchronises one by one, in the order of the forward pass."""
        return [self.network.model.word_embeddings, *self.network.model.layers, self.network.model.norm, self.network.lm_head]

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token, see `LingConfig.flops_per_token`."""
        return self.config.flops_per_token(seq_len)

    @override
    def parameter_groups(self) -> Iterable[Any]:
        """Matrices, which decay; gains and biases, which do not."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in trained if parameter.dim() >= 2]},
            {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
        ]

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Settle the type of trained weights before callbacks and strategies copy or divide them."""
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            settle_types(self.network, self.trainer)
        return super().configure_callbacks()

    @override
    def setup(self, stage: str) -> None:
        """Compare the vocabularies of model and data before anything runs.

        Raises:
            ValueError: If the tokenizer has ids beyond the model's, or other special tokens in training; or if the strategy
                accumulates gradients by itself, where they cannot be weighted.
        """
        super().setup(stage)
        hidden = self.trainer.strategy.handles_gradient_accumulation and self.trainer.accumulate_grad_batches != 1
        if stage == "fit" and self._weighs_steps and hidden:
            raise ValueError(
                f"{type(self).__name__}: loss_over=step weighs the accumulated gradient, which"
                f" {type(self.trainer.strategy).__name__} keeps to itself: set --model.loss_over micro_batch (the same for packed"
                f" batches with equal numbers of labels), or accumulate_grad_batches to 1 instead of"
                f" {self.trainer.accumulate_grad_batches}, with a larger batch_size."
            )
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            check_tokenizer(self.config, tokenizer)
            if stage == "fit":
                check_special_tokens(self.config, tokenizer.eos_id, tokenizer.pad_id)

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
        check_vocabulary(batch["input_ids"], self.config.vocab_size)
        if "labels" in batch:
            check_vocabulary(batch["labels"][batch["labels"] != IGNORED], self.config.vocab_size)
        return drop_mask(dict(batch))

    def run_network(self, batch: Batch, noise: RouterNoise | None = None, share: Any = 1.0) -> LingOutput:
        """Losses of a batch, at each position."""
        position_ids = batch.get("position_ids")
        return self.network(
            batch["input_ids"],
            batch.get("attention_mask"),
            position_ids,
            labels=counted_labels(batch),
            document_ids=None if position_ids is None else (position_ids == 0).cumsum(1),
            noise=noise,
            share=share,
            loss_chunk=self.loss_chunk,
        )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted loss of a batch."""
        count_B = (counted_labels(batch)[:, 1:] != IGNORED).sum(1)
        self._begin_mean(count_B.sum(), batch_idx)
        output = self.run_network(batch, *self._noise(batch["input_ids"]))
        assert output.loss is not None and output.loss_BT is not None
        valid_N = valid_tokens(batch)
        self.router_stats = router_statistics(output.routings, valid_N) if output.routings else None
        aux, z = self.router_losses(output, valid_N)
        loss = output.loss + self.aux_coef * aux + self.z_coef * z
        weight = self._weight(loss)
        self.last_losses = {
            "ce": output.loss.detach(),
            "ce_per_sample": output.loss_BT.sum(1) / count_B.clamp(min=1),
            "aux": aux.detach(),
            "z": z.detach(),
            "weight": weight,
        }
        self._warm_up.observe(self.router_stats, self.applied_steps)
        self.log_dict({f"train/{name}": self.last_losses[name] for name in ("ce", "aux", "z")})
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss * weight

    def router_losses(self, output: LingOutput, valid_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Balance and z-loss, summed or averaged over the layers."""
        if not output.routings:
            zero = torch.zeros((), device=self.device)
            return zero, zero
        assert self.router_stats is not None
        counts_LE = self.router_stats.counts
        if self.aux_scope == "global":
            counts_LE, _ = self._summed(counts_LE)
        aux, z = layer_losses(output.routings, counts_LE, valid_N)
        return (aux.sum(), z.sum()) if self.aux_reduction == "sum" else (aux.mean(), z.mean())

    def loss_denominator(self, batch: Any) -> int:
        """Number of terms of a batch's mean loss, for strategies that weigh batches: labels, or samples (`loss_over`)."""
        if self.loss_over == "micro_batch":
            return len(batch["input_ids"])
        return int((counted_labels(batch)[:, 1:] != IGNORED).sum())

    # Stochastic routing warm-up

    def _noise(self, input_ids: Tensor) -> tuple[RouterNoise | None, Any]:
        """Noise of each layer and the share of the learned scores; nothing is drawn after the warm-up."""
        if self.applied_steps >= self.router_warmup_steps or not self.config.num_moe_layers:
            return None, 1.0
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        random = self.train_random(len(input_ids))
        return self._warm_up.noise(self.config, input_ids.shape[1], self.applied_steps, random, dtype)

    @override
    def on_applied_step(self) -> None:
        """Take the scores' mean and deviation of an applied step into the running ones; a skipped step leaves no trace."""
        self._warm_up.update((moe.gate for moe in self.network.moe_layers), self._summed, first=self.applied_steps == 0)
        super().on_applied_step()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Forget the scores of a step that was skipped."""
        if not self.trainer.fit_loop._should_accumulate():
            self._warm_up.forget()

    # Evaluation

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.val_metrics.update(self.run_network(batch), batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val", self.val_metrics)

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.test_metrics.update(self.run_network(batch), batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", self.test_metrics)

    def _log_evaluation(self, stage: str, metrics: Evaluation) -> None:
        values = metrics.compute()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True)
        if "loss" in values:
            self.log(f"{stage}/perplexity", values["loss"].exp())

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Log-likelihood in nats of each text given the text before it, for `ChoiceEval`.

        All processes call it equally often, with any pairs: each runs the network as often as the one with the most pairs.

        Args:
            pairs: Context and continuation.
        """
        tokenizer = self._tokenizer()
        ids = [encode_pair(tokenizer, *pair) for pair in pairs]
        return loglikelihoods(self.network, ids, batch_size=max(1, len(ids)), agree=self._largest).logp_N.tolist()

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

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Continue the prompts: ``index``, ``prompt`` and ``text`` for `JSONLWriter`.

        A batch whose ``index`` is -1 stands for no prompts. Where forward passes wait for all processes, those that have ended
        run along until the last one has.

        Raises:
            ValueError: If the DataModule has no tokenizer, or prompts are padded elsewhere than on the left.
        """
        tokenizer = self._tokenizer()
        together = self._trainer is not None and forwards_are_collective(self.trainer.strategy)
        agree = (lambda here: self._largest(int(here)) > 0) if together else None
        blank = int(batch["index"][0]) < 0
        options = dataclasses.replace(self.generation, max_new_tokens=1) if blank else self.generation
        if options.eos_token_id is None:
            options = dataclasses.replace(options, eos_token_id=tokenizer.eos_id)
        if not blank or agree is not None:
            ids_BT = self.network.generate(
                batch["input_ids"],
                batch.get("attention_mask", batch.get("valid_mask")),
                generation=options,
                decode=tokenizer.decode,
                random=SampleRandom(self.random_seed, batch["index"], epoch=-1),
                agree=agree,
            )
        if blank:
            return {"index": batch["index"][:0], "prompt": [], "text": []}
        texts = [
            text_before(text_until_end(ids, tokenizer), options.stop) for ids in ids_BT[:, batch["input_ids"].shape[1] :].tolist()
        ]
        return {"index": batch["index"], "prompt": batch["prompt"], "text": texts}
