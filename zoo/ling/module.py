"""The language model as a Lightning module.

Shape suffixes: B sequences, T tokens of a sequence, N = B T, L layers with experts, E experts.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.config import LingConfig, Preset, preset
from zoo.ling.evaluation import Evaluation
from zoo.ling.experts import Backend
from zoo.ling.multiple_choice import loglikelihoods
from zoo.ling.network import LingOutput, RouterNoise
from zoo.ling.official import LingOfficialWeights
from zoo.ling.router import RouterStatistics, layer_losses, router_statistics
from zoo.ling.routing_warm_up import RoutingWarmUp
from zoo.ling.state_dict_adapter import load_hf
from zoo.ling.tokenizer import check_special_tokens, check_tokenizer
from zoo.lm.batches import Batch, counted_labels, valid_tokens
from zoo.lm.cross_entropy import IGNORED
from zoo.lm.encoded_pair import Ids
from zoo.lm.evaluation import TokenLosses
from zoo.lm.language_module import LanguageModule
from zoo.lm.trained_types import settle_types
from zoo.metrics.tool_calls import ToolCallMatch

__all__ = ["Ling"]


class Ling(LingOfficialWeights, LanguageModule):
    """Fine-grained mixture-of-experts language model with NormHead, trained with stochastic routing warm-up (Ling).

    Loss: mean cross-entropy + ``sum_l (aux_coef A_l + z_coef Z_l)`` over the layers with experts, A the balance loss and Z the
    router's z-loss. Source: "Every FLOP Counts", arXiv 2503.05139. The mean is over all labels of an optimizer step, those of
    accumulated micro-batches and of other processes included (`StepMean`). The routers' losses are means over the tokens of a
    micro-batch of one process, as balance is no sum over tokens; a micro-batch counts as much as its labels do, and nothing if
    it has none. Logged values are of the micro-batch of the process that logs: ``train/ce`` the mean over its labels,
    ``train/loss`` with the routers' losses. The returned loss is weighted.

    Batches: see `LanguageModule`.

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
        router_warmup_steps: W, applied steps over which learned scores replace noise; 0: no warm-up. None: 2000, but 0 with
            ``checkpoint``, whose router has learned. Weights loaded with `from_pretrained` or ``--ckpt_path`` do not restart it.
        router_momentum: Weight of the old value in the running mean and deviation of the scores.
        router_dtype: Type of the scores: ``float32``, or that of the parameters as published (``param``).
        loss_chunk: Tokens whose logits are in memory at a time; 0: all.
        activation_checkpointing: Compute the blocks' activations again in the backward pass instead of keeping them.
        freeze: Patterns of names of parameters that are not trained, such as ``model.word_embeddings.*``.
        optimizer: Makes the optimizer; matrices decay, gains and biases do not.
        kwargs: Arguments of `LanguageModule` and `ZooModule`; ``compile`` compiles each block in place.

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
        router_warmup_steps: int | None = None,
        router_momentum: float = 0.99,
        router_dtype: Literal["float32", "param"] = "float32",
        loss_chunk: int = 0,
        activation_checkpointing: bool = False,
        freeze: list[str] | None = None,
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
        self.router_warmup_steps = router_warmup_steps
        self.loss_chunk = loss_chunk
        self.last_losses = {}
        self._warm_up = RoutingWarmUp(router_warmup_steps, router_momentum)
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
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            check_tokenizer(self.config, tokenizer)
            if stage == "fit":
                check_special_tokens(self.config, tokenizer.eos_id, tokenizer.pad_id)

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

    @property
    @override
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @override
    def token_losses(self, batch: Batch) -> TokenLosses:
        output = self.run_network(batch)
        assert output.loss is not None and output.loss_BT is not None
        return TokenLosses(output.loss, output.loss_BT)

    @override
    def _evaluate(self, batch: Any, metrics: Any, calls: ToolCallMatch) -> None:
        if "calls" in batch:
            super()._evaluate(batch, metrics, calls)
            return
        output = self.run_network(batch)
        metrics.update(output.loss, output.loss_BT, batch)
        metrics.update_routing(output, batch)

    @override
    def decodes(self) -> LingForCausalLM:
        return self.network

    @override
    def scores(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        return loglikelihoods(self.network, pairs, batch_size=max(1, len(pairs)), agree=self._largest).logp_N.tolist()
