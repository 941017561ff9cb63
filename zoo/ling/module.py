"""The language model as a Lightning module: loss, router, optimization, generation.

Shape suffixes: B sequences, T tokens of a sequence, N = B T, L layers with experts, E experts.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from zoo.base.hyperparameters import build
from zoo.base.random import SampleRandom
from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.config import Generation, LingConfig, Preset, preset
from zoo.ling.experts import Backend
from zoo.ling.multiple_choice import encode_pair, loglikelihoods
from zoo.ling.network import LingOutput, RouterNoise
from zoo.ling.router import RouterStatistics, assignment_counts, balance_loss, router_statistics, z_loss
from zoo.ling.state_dict_adapter import infer_hf, load_hf, load_official, save_hf, to_hf_state_dict
from zoo.ling.step_mean import StepMean
from zoo.metrics.mean_and_error import Mean
from zoo.module import ZooModule
from zoo.strategy_contract import forwards_are_collective, keeps_float32_weights, step_group, weighs_batches

__all__ = ["Ling", "Tokenizer"]

_LN2 = math.log(2.0)


class Tokenizer(Protocol):
    """What turns texts into ids and back; the DataModule has it as ``tokenizer``."""

    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


Batch = Mapping[str, Tensor]
"""See `Ling`."""


class Ling(ZooModule):
    """Fine-grained mixture-of-experts language model with NormHead, trained with stochastic routing warm-up (Ling).

    Loss: mean cross-entropy + ``sum_l (aux_coef A_l + z_coef Z_l)`` over the layers with experts, A the balance loss and Z the
    router's z-loss. Source: "Every FLOP Counts", arXiv 2503.05139. The mean is over all labels of an optimizer step, those of
    accumulated micro-batches and of other processes included (`StepMean`). The routers' losses are means over the tokens of a
    micro-batch of one process, as balance is no sum over tokens; a micro-batch's count as much as its labels do, and nothing if
    it has none. What is logged is of the micro-batch of the process that logs: ``train/ce`` the mean over its labels,
    ``train/loss`` with the routers' losses. The returned loss is weighted.

    Batches are dictionaries as transformers shapes them, all int64: ``input_ids`` (B, T); ``labels`` (B, T), not shifted, -100
    where nothing is learned (absent: ``input_ids`` but for padding and each document's first token); ``attention_mask`` (B, T),
    0 for padding (absent: none);
    ``position_ids`` (B, T) that start at 0 with each document, which then do not see one another (absent: one document);
    ``num_bytes`` (B,), the bytes of text that the labels stand for (absent: no bits per byte).

    Weights of half precision stay so in evaluation and in true half precision; other training keeps them in float32. Rebuilt
    from a checkpoint or a folder, the module has them in the type that was stored.

    Args:
        config: the architecture, or the name of a preset.
        checkpoint: folder of released weights (Hugging Face layout) to start from, or the name of a repository of the Hugging
            Face hub with safetensors; its ``config.json`` decides the architecture. A run that is continued does not need it any
            more.
        config_changes: entries of ``config`` or of the checkpoint's architecture that are other ones from here on, such as
            ``rope_theta`` and ``max_position_embeddings`` where training on long texts begins.
        experts: how routed experts are computed: one ``grouped`` product, a ``loop`` over experts, ``batched`` products of
            gathered weights, or what fits each call.
        aux_coef: coefficient of the balance loss.
        z_coef: coefficient of the z-loss.
        aux_reduction: whether these are summed over the layers or averaged.
        aux_scope: whether the loads that balance is judged by are those of one process's batch, or of all processes.
        loss_over: what the loss is a mean over: ``step``: labels count alike in a whole optimizer step; ``micro_batch``:
            micro-batches and processes count alike, whatever their numbers of labels. Both are the same where these are equal,
            but for the gradient of an incomplete last step of an epoch, a mean with ``step`` and too small with the other.
        router_warmup_steps: W, applied steps over which learned scores replace noise; 0: no warm-up. None: 2000, but 0 with
            ``checkpoint``, whose router has learned. It does not begin anew in weights of `from_pretrained` or ``--ckpt_path``.
        router_momentum: weight of the old value in the running mean and deviation of the scores.
        router_dtype: scores in ``float32``, or in the type of the parameters as published (``param``).
        loss_chunk: tokens whose logits are in memory at a time; 0: all.
        activation_checkpointing: compute the blocks' activations again in the backward pass instead of keeping them.
        freeze: patterns of names of parameters that are not trained, such as ``model.word_embeddings.*``.
        generation: how ``predict`` continues prompts.
        optimizer: makes the optimizer; matrices decay, gains and biases do not.
        lr_scheduler: makes the schedule.
        lr_scheduler_interval: whether it advances per applied step or per epoch.
        compile: compile each block in place.

    Raises:
        ValueError: arguments that do not fit one another, or a pattern of ``freeze`` that no parameter has; or, when training
            starts, ``loss_over="step"`` with a strategy such as DeepSpeed that accumulates gradients out of reach.
    """

    keeps_stored_types: ClassVar[bool] = True
    #: What the last training step saw, without gradient: ``ce`` (nats), ``ce_per_sample`` (B,), ``aux``, ``z``, and ``weight``,
    #: how much ``ce`` counts among the micro-batches and processes of the optimizer step.
    last_losses: dict[str, Tensor]
    #: What the routers did in it.
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
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_scheduler_interval, compile)
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
        self.router_momentum = router_momentum
        self.loss_chunk = loss_chunk
        self.generation = generation
        self.last_losses = {}
        self._moments: list[Tensor] = []
        self._step_mean = StepMean()
        self._freeze(freeze or [])
        self.val_metrics, self.test_metrics = _Evaluation(), _Evaluation()

    @property
    def config(self) -> LingConfig:
        """The architecture."""
        return self.network.config

    def networks(self) -> list[nn.Module]:
        """The blocks, each of which ``compile=True`` compiles: alike, so that one compilation serves all."""
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

    def _freeze(self, patterns: list[str]) -> None:
        names = dict(self.network.named_parameters())
        for pattern in patterns:
            matching = fnmatch.filter(names, pattern)
            if not matching:
                raise ValueError(f"Ling: freeze={pattern!r} fits no parameter; they are called such as {next(iter(names))}.")
            for name in matching:
                names[name].requires_grad_(False)

    def parameter_groups(self) -> Iterable[Any]:
        """Matrices, which decay; gains and biases, which do not."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in trained if parameter.dim() >= 2]},
            {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
        ]

    def configure_callbacks(self) -> list[Callback]:
        """Settle the type of the weights that are trained, before callbacks and strategies copy or divide them (Lightning hook).

        An optimizer that adds small updates needs float32: without true half precision, parameters of half precision become it.
        """
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            precision = str(self.trainer.precision)
            small = [p for p in self.network.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
            if small and (precision == "32-true" or precision.endswith("-mixed")):
                rank_zero_info(
                    f"Ling: {len(small)} parameters of half precision are trained in float32, as precision={precision} says;"
                    " bf16-true trains them as they are."
                )
                for parameter in small:
                    parameter.data = parameter.data.float()
            if precision == "bf16-true" and not keeps_float32_weights(self.trainer.strategy):
                rank_zero_warn(
                    "Ling: with precision=bf16-true the optimizer adds its updates to bfloat16 weights, which do not notice small"
                    " ones (at a learning rate of 1e-5, nearly all): use bf16-mixed, or a strategy that keeps float32 weights"
                    " beside them, such as DeepSpeed and PaRO."
                )
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """Compare the vocabularies of model and data before anything runs (Lightning hook).

        Raises:
            ValueError: the tokenizer has ids that the model has not, or marks that the model takes for others in training; or
                the strategy accumulates gradients by itself, where they cannot be weighted.
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
        if tokenizer is not None and tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {tokenizer.vocab_size} ids, the model a vocabulary of {self.config.vocab_size}: take the"
                f" model's own tokenizer (data.tokenizer), or vocab_size: {tokenizer.vocab_size} or more."
            )
        if stage == "fit" and tokenizer is not None:
            self._compare_marks(tokenizer.eos_id, tokenizer.pad_id)

    def _compare_marks(self, eos: int, pad: int) -> None:
        given, ends = self.config.pad_token_id, self.config.eos_token_id
        pad_fits = given is None or given in (pad, eos)  # its embedding is not trained
        if pad_fits and (ends is None or eos in (ends if isinstance(ends, list) else [ends])):
            return
        raise ValueError(
            f"The tokenizer ends texts with the id {eos} and fills up with {pad}, but the model has eos_token_id={ends} and"
            f" pad_token_id={given}: take the model's own tokenizer (data.tokenizer), or a model with --model.config.eos_token_id"
            f" {eos} --model.config.pad_token_id {pad}."
        )

    # Batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check ids, and drop a mask that attention does not need (Lightning hook), before the batch leaves the CPU.

        Raises:
            ValueError: an id or label that the vocabulary does not have, or no ``input_ids``.
        """
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found = f"a dictionary with {', '.join(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"{type(self).__name__} needs batches that are dictionaries with input_ids, as the DataModule Text gives"
                f" them, not {found}."
            )
        batch = dict(batch)
        self._check_ids(batch["input_ids"])
        if "labels" in batch:
            self._check_ids(batch["labels"][batch["labels"] != -100])
        return self._drop_mask(batch)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"The batch holds id {int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())}, but the vocabulary has"
                f" {self.config.vocab_size} entries: take the tokenizer that belongs to the model, or a larger vocab_size."
            )

    @staticmethod
    def _drop_mask(batch: dict[str, Any]) -> dict[str, Any]:
        """Padding on the right needs no mask in causal attention, only in the losses; without padding nothing is needed."""
        mask = batch.pop("attention_mask", None)
        if mask is None or bool(mask.all()):
            return batch
        right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all())
        return {**batch, "valid_mask" if right_padded else "attention_mask": mask}

    @staticmethod
    def _labels(batch: Batch) -> Tensor:
        if "labels" in batch:
            return batch["labels"]
        labels = batch["input_ids"]
        valid = batch.get("valid_mask", batch.get("attention_mask"))
        if valid is not None:
            labels = labels.masked_fill(valid == 0, -100)
            labels[:, 1:].masked_fill_(valid[:, :-1] == 0, -100)  # no token precedes the first one after padding
        if "position_ids" in batch:
            labels = labels.masked_fill(batch["position_ids"] == 0, -100)
        return labels

    # Training

    def run_network(self, batch: Batch, noise: RouterNoise | None = None, share: Any = 1.0) -> LingOutput:
        """Losses of a batch, at each position."""
        position_ids = batch.get("position_ids")
        return self.network(
            batch["input_ids"],
            batch.get("attention_mask"),
            position_ids,
            labels=self._labels(batch),
            document_ids=None if position_ids is None else (position_ids == 0).cumsum(1),
            noise=noise,
            share=share,
            loss_chunk=self.loss_chunk,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted loss of a batch (Lightning hook)."""
        count_B = (self._labels(batch)[:, 1:] != -100).sum(1)
        self._begin_mean(count_B.sum(), batch_idx)
        output = self.run_network(batch, *self._warm_up(batch["input_ids"]))
        assert output.loss is not None and output.loss_BT is not None
        valid_N = self._valid(batch)
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
        if self.applied_steps < self.router_warmup_steps and self.router_stats is not None:
            self._moments.append(torch.stack([self.router_stats.logit_mean, self.router_stats.logit_square]))
        self.log_dict({f"train/{name}": self.last_losses[name] for name in ("ce", "aux", "z")})
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss * weight

    @staticmethod
    def _valid(batch: Batch) -> Tensor | None:
        mask = batch.get("valid_mask", batch.get("attention_mask"))
        return None if mask is None else mask.reshape(-1).bool()

    def router_losses(self, output: LingOutput, valid_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Balance and z-loss, summed or averaged over the layers."""
        if not output.routings:
            zero = torch.zeros((), device=self.device)
            return zero, zero
        assert self.router_stats is not None
        counts_LE = self.router_stats.counts
        if self.aux_scope == "global":
            counts_LE, _ = self._summed(counts_LE)
        aux = torch.stack([
            balance_loss(routing.probs_NE, routing.ids_Nk, valid_N, load_E)
            for routing, load_E in zip(output.routings, counts_LE.unbind(), strict=True)
        ])  # fmt: skip
        z = torch.stack([z_loss(routing.logits_NE, valid_N) for routing in output.routings])
        return (aux.sum(), z.sum()) if self.aux_reduction == "sum" else (aux.mean(), z.mean())

    # The mean over an optimizer step

    @property
    def _weighs_steps(self) -> bool:
        """Whether micro-batches are weighted here; a strategy that deals out batches of its own sizes does it by itself."""
        if self._trainer is None or self.loss_over == "micro_batch":
            return False
        return not weighs_batches(self.trainer.strategy)

    def _begin_mean(self, count: Tensor, batch_idx: int) -> None:
        """Count the labels of a micro-batch (pairs, in preference training), those of other processes while the network runs."""
        if self._weighs_steps:
            self._step_mean.begin(count, batch_idx % self.trainer.accumulate_grad_batches == 0, *self._step_group())

    def _weight(self, loss: Tensor) -> Tensor:
        """What the mean loss of that micro-batch is multiplied with."""
        return self._step_mean.weight(loss.dtype) if self._weighs_steps else torch.ones_like(loss)

    def on_after_backward(self) -> None:
        """Make the gradient the mean over the step, before it is judged or clipped (Lightning hook)."""
        super().on_after_backward()
        if not self._weighs_steps or self.trainer.fit_loop._should_accumulate():
            return
        factor = self._step_mean.finish(self.trainer.accumulate_grad_batches)
        if factor != 1:
            for optimizer in self.trainer.optimizers:
                for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)

    def loss_denominator(self, batch: Any) -> int:
        """What the loss of a batch is a mean over, for strategies that weigh batches: labels, or samples (`loss_over`)."""
        if self.loss_over == "micro_batch":
            return len(batch["input_ids"])
        return int((self._labels(batch)[:, 1:] != -100).sum())

    def _step_group(self) -> tuple[dist.ProcessGroup | None, int]:
        """The processes that take this step together (None: all), and how many they are."""
        if not (dist.is_available() and dist.is_initialized()) or self.trainer.world_size == 1:
            return None, 1
        group = step_group(self.trainer.strategy)
        return group, dist.get_world_size(group)

    # Stochastic routing warm-up

    def _warm_up(self, input_ids: Tensor) -> tuple[RouterNoise | None, Any]:
        """Noise of each layer and the share of the learned scores; nothing is drawn after the warm-up."""
        if self.applied_steps >= self.router_warmup_steps or not self.config.num_moe_layers:
            return None, 1.0
        B, T = input_ids.shape
        first = self.config.first_k_dense_replace
        names = [f"router/{layer}" for layer in range(first, self.config.num_hidden_layers)]
        shape = (T, self.config.num_experts)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        noise_LNE = self.train_random(B).normals(names, shape, dtype).view(len(names), B * T, -1)
        share = torch.tensor(self.applied_steps / self.router_warmup_steps, dtype=dtype, device=self.device)
        return lambda layer: noise_LNE[layer - first], share

    def _summed(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The sum over the processes that take this step together, and how many they are."""
        group, num_processes = self._step_group()
        if num_processes > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=group)
        return tensor, num_processes

    def on_applied_step(self) -> None:
        """Take the scores' mean and deviation of an applied step into the running ones; a skipped step leaves no trace."""
        if self._moments:
            total_2L, num_processes = self._summed(torch.stack(self._moments).mean(0))
            mean_L, square_L = total_2L / num_processes
            std_L = (square_L - mean_L.square()).clamp(min=0).sqrt()
            for moe, mean, std in zip(self.network.moe_layers, mean_L, std_L, strict=True):
                moe.gate.update(mean, std, self.router_momentum, first=self.applied_steps == 0)
            self._moments.clear()
        super().on_applied_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Forget the scores of a step that was skipped (Lightning hook)."""
        if not self.trainer.fit_loop._should_accumulate():
            self._moments.clear()

    # Evaluation

    def _evaluate(self, batch: Batch, metrics: "_Evaluation") -> None:
        output = self.run_network(batch)
        assert output.loss is not None and output.loss_BT is not None
        count = (self._labels(batch)[:, 1:] != -100).sum()
        metrics.loss.update(output.loss, count)
        if "num_bytes" in batch:
            num_bytes = batch["num_bytes"].sum()
            metrics.bits_per_byte.update(output.loss_BT.sum() / _LN2 / num_bytes.clamp(min=1), num_bytes)
        if output.routings:
            counts_LE = torch.stack(
                [assignment_counts(r.ids_Nk, self.config.num_experts, self._valid(batch)) for r in output.routings]
            )
            violation = counts_LE.amax(1) / counts_LE.double().mean(1).clamp(min=1e-9) - 1
            metrics.max_violation.update(violation.mean(), count)

    def _log_evaluation(self, stage: str, metrics: "_Evaluation") -> None:
        values = metrics.compute()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True)
        if "loss" in values:
            self.log(f"{stage}/perplexity", values["loss"].exp())

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss, bits per byte, and how uneven the experts are used (Lightning hook)."""
        self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all batches and processes (Lightning hook)."""
        self._log_evaluation("val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step` (Lightning hook)."""
        self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the means over all batches and processes (Lightning hook)."""
        self._log_evaluation("test", self.test_metrics)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Log-likelihood in nats of each text given the text before it, for `ChoiceEval`.

        All processes call it equally often, with any pairs: each runs the network as often as the one that has most to do.

        Args:
            pairs: context and continuation.
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

    # Generation

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Continue the prompts (Lightning hook): ``index``, ``prompt`` and ``text`` for `JSONLWriter`.

        A batch whose ``index`` is -1 stands for no prompts. Where forward passes wait for all processes, those that are done
        run along until the last one is.

        Raises:
            ValueError: the DataModule has no tokenizer, or prompts are padded elsewhere than on the left.
        """
        tokenizer = self._tokenizer()
        together = self._trainer is not None and forwards_are_collective(self.trainer.strategy)
        agree = self._any if together else None
        blank = int(batch["index"][0]) < 0
        options = dataclasses.replace(self.generation, max_new_tokens=1) if blank else self.generation
        if not blank or agree is not None:
            ids_BT = self.network.generate(
                batch["input_ids"],
                batch.get("attention_mask", batch.get("valid_mask")),
                **dataclasses.asdict(options),
                eos_token_id=tokenizer.eos_id,
                random=SampleRandom(self.random_seed, batch["index"], epoch=-1),
                agree=agree,
            )
        if blank:
            return {"index": batch["index"][:0], "prompt": [], "text": []}
        new_BT = ids_BT[:, batch["input_ids"].shape[1] :]
        return {"index": batch["index"], "prompt": batch["prompt"], "text": [_text(ids, tokenizer) for ids in new_BT.tolist()]}

    def _any(self, here: bool) -> bool:
        """Whether something is so in any process."""
        return self._largest(int(here)) > 0

    # Released weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the released folder said beside the architecture (Lightning hook)."""
        super().on_save_checkpoint(checkpoint)
        folder = self.network.hf_folder
        checkpoint["ling_released"] = {"config": self.network.hf_config, "folder": None if folder is None else str(folder)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back (Lightning hook)."""
        super().on_load_checkpoint(checkpoint)
        if (released := checkpoint.get("ling_released")) is not None:
            self.network.hf_config = released["config"]
            self.network.hf_folder = None if released["folder"] is None else Path(released["folder"])

    def shared_entries(self) -> dict[str, Any]:
        """How far the router's warm-up is, and what the released ``config.json`` said beside the architecture."""
        entries = {**super().shared_entries(), "_applied_steps": self.applied_steps}
        return {**entries, "_released": self.network.hf_config} if self.network.hf_config else entries

    def take_shared_entries(self, config: Mapping[str, Any]) -> None:
        """Take it back.

        Args:
            config: all entries of ``config.json``.
        """
        super().take_shared_entries(config)
        self.network.hf_config = config.get("_released", {})
        # Where it is not said, the training of these weights has come to its end.
        self.applied_steps = config.get("_applied_steps", config.get("router_warmup_steps") or 0)

    def load_official(self, path: str | Path) -> None:
        """Fill the network from a released folder (Hugging Face layout, whole or in shards) or one file of weights.

        Raises:
            ValueError: files that are unsafe, damaged, or do not fit; all names and shapes that differ are listed.
        """
        load_official(self.network, path)

    def to_official(self) -> dict[str, Tensor]:
        """The weights by their released names; `save_hf` writes a whole folder."""
        return {name: tensor.cpu().clone() for name, tensor in to_hf_state_dict(self.network).items()}

    def write_official(self, path: Path) -> int:
        """Write a released folder, in shards; or one file of weights where ``path`` ends like one."""
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin") and not path.is_dir():
            return super().write_official(path)
        save_hf(self.network, path)
        return len(to_hf_state_dict(self.network))

    @classmethod
    def build_official(cls, model: Mapping[str, Any], path: str | Path) -> Self:
        """Build the module with weights in the type they are stored in; memory holds them once.

        Args:
            model: ``{"class_path", "init_args"}``.
            path: a released folder, or one file of weights.
        """
        arguments = dict(model.get("init_args", {}))
        found = infer_hf(cls, path)
        if found is None or found["init_args"]["config"] != arguments.get("config"):  # another architecture on purpose
            return super().build_official(model, path)
        return build(cls, {**model, "init_args": {**arguments, "checkpoint": str(path)}})

    @classmethod
    def from_hf(cls, path: str | Path, **arguments: Any) -> Self:
        """The module of a released folder, see `load_hf`.

        Args:
            path: the folder, or a repository of the hub.
            arguments: of the constructor.
        """
        return cls(checkpoint=str(path), **arguments)

    def to_hf(self, folder: str | Path, **options: Any) -> Path:
        """Write a released folder, see `save_hf`.

        Args:
            folder: where.
            options: of `save_hf`: ``max_shard_size``, ``normalized_head``, ``dtype``.
        """
        return save_hf(self.network, folder, **options)

    @classmethod
    def from_official_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Our hyperparameters from the entries of a released ``config.json``."""
        return infer_hf(cls, config)

    @classmethod
    def infer_official_config(cls, path: str | Path) -> dict[str, Any] | None:
        """Our hyperparameters from a released folder, or a file of weights beside its ``config.json``."""
        return infer_hf(cls, path)


class _Evaluation(nn.Module):
    """Means over an evaluation, weighted by what they are means of."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = Mean()
        self.bits_per_byte = Mean()
        self.max_violation = Mean()

    def compute(self) -> dict[str, Tensor]:
        """The means of what was updated, which are then forgotten."""
        values = {}
        for name, metric in (("loss", self.loss), ("bits_per_byte", self.bits_per_byte), ("max_violation", self.max_violation)):
            if metric.update_called:
                values[name] = metric.compute()
            metric.reset()
        return values


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)
