"""Small runs of RLHF under the placements, for their tests: what is trained, on which prompts, and what a rank saw of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from small_llama import LLAMA, QUIET
from torch import Tensor, nn

from datamodules import RolloutPrompts
from strategies import FlatteningStrategy, InterleavingStrategy, PlacementStrategy, SeparationStrategy
from strategies.placement import PlacementPlan, Span
from strategies.traffic import Traffic, Transfer
from zoo.ling import LingBackbone, LingConfig
from zoo.lm.hf_backbone import HFBackbone
from zoo.rlhf.module import RLHF
from zoo.rlhf.rewards import Reward
from zoo.rlhf.rollout import Rollout

CONFIG = LingConfig(
    vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=2, first_k_dense_replace=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=258, eos_token_id=257,
)  # fmt: skip
ROWS, MINIBATCHES, NEW = 16, 2, 6
#: Strategies by name; none: one process.
STRATEGIES: dict[str, Callable[[], Any]] = {
    "one": lambda: "auto",
    "flattening": FlatteningStrategy,
    "interleaving": InterleavingStrategy,
    "separation": SeparationStrategy,
    "chunks": partial(SeparationStrategy, chunks=2),
    "lag": partial(SeparationStrategy, max_lag=1),
    "once": partial(FlatteningStrategy, backend="fsdp2"),
    "per_token": partial(FlatteningStrategy, backend="fsdp2", gather="per_token"),
    "resident": partial(FlatteningStrategy, backend="fsdp2", gather="resident"),
}


class Length(Reward, nn.Module):
    """Counts the letters of answers, and has as many weights as the actor."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        Reward.__init__(self)
        self.network = LingBackbone(CONFIG).requires_grad_(False)

    def score(self, ids_BT: Tensor, mask_BT: Tensor, prompts: Any, answers: Sequence[str], rows: Any) -> Tensor:
        return torch.tensor([0.1 * len(answer) + answer.count("e") for answer in answers])


def prompts(folder: Path) -> Path:
    """A file of as many prompts as four rollouts need, and some for validation."""
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Say {number * 37 % 101}"}) for number in range(90)]
    path.write_text("\n".join(lines))
    return path


def module_of(llama: bool = False, unit: int = 2, actor: dict[str, Any] | None = None, **options: Any) -> RLHF:
    """PPO with four models, Ling's or the library's."""
    seed_everything(0, verbose=False)
    make = partial(HFBackbone, LLAMA) if llama else partial(LingBackbone, CONFIG)
    # With a large epsilon, so that gradients of zero but for rounding do not decide the sign of a step.
    optimizer = partial(torch.optim.AdamW, lr=1e-3, eps=1e-3)
    rollout = Rollout(max_new_tokens=NEW, minibatches=MINIBATCHES, unit=unit)
    return RLHF(
        make(**actor or {}), Length(), make(scalar_head=True), rollout=rollout, optimizer=optimizer, critic_optimizer=optimizer,
        **options,
    )  # fmt: skip


@dataclass
class Seen:
    """View that a rank has of a run.

    Attributes:
        tokens: Of each rollout.
        ages: Of the weights that generated, in rollouts, at each call for targets.
        drift: Largest difference of the log-probabilities at those calls from those of generation; None: there are not two.
        weights: Of actor and critic at the end, whole.
        steps: Of the Trainer.
        metrics: Logged last.
        frozen_bytes: Of the reference's and the reward's weights on this rank.
        trained: Number of weights of actor and critic on this rank.
        spans: Of the timeline.
        transfers: Collectives of the training.
    """

    tokens: list[Tensor] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    drift: list[float | None] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    frozen_bytes: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)


class Watch(Callback):
    """Fills `Seen`."""

    def __init__(self, module: RLHF) -> None:
        self.seen = seen = Seen()
        self.traffic = Traffic()
        collect, targets = module.collect, module.algorithm.targets

        def collected(samples: Any, rollout: int, *arguments: Any) -> Any:
            fields = collect(samples, rollout, *arguments)
            if rollout >= 0:
                seen.tokens.append(fields["tokens"].clone())
            return fields

        def targeted(experience: Any, *arguments: Any) -> Any:
            seen.ages.append(module.rollouts - experience.version)
            older = experience.behaviour_logp
            seen.drift.append(None if older is None else float((older - experience.logp).abs().max()))
            return targets(experience, *arguments)

        module.collect, module.algorithm.targets = collected, targeted  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.traffic.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.traffic.__exit__(None, None, None)
        seen = self.seen
        state = trainer.strategy.lightning_module_state_dict()
        seen.weights = {name: value.clone() for name, value in state.items() if name.startswith(("actor.", "critic."))}
        seen.steps = trainer.global_step
        seen.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        frozen = [weight for each in (*pl_module._reference, *pl_module._scorers) for weight in each.parameters()]
        seen.frozen_bytes = sum(weight.numel() * weight.element_size() for weight in frozen)
        for name in ("actor", "critic"):
            seen.trained[name] = sum(weight.numel() for weight in getattr(pl_module, name).parameters())
        seen.transfers = self.traffic.transfers
        if isinstance(trainer.strategy, PlacementStrategy):
            assert trainer.strategy.placement is not None
            seen.spans = list(trainer.strategy.placement.timeline.spans)


def run(
    strategy: str | PlacementPlan, folder: Path, rollouts: int = 2, checkpoint: Path | None = None, save: Path | None = None,
    val: bool = False, save_end: Path | None = None, **options: Any,
) -> Seen:  # fmt: skip
    """Train by a strategy.

    Args:
        strategy: Name in `STRATEGIES`, or a plan.
        folder: Where the prompts are.
        rollouts: Number of rollouts that are trained on.
        checkpoint: A run to continue.
        save: File for the checkpoint after the first rollout that was trained on.
        val: Whether to validate after each rollout.
        save_end: File for the checkpoint when the training has ended.
        options: As of `module_of`.
    """
    module = module_of(**options)
    watch = Watch(module)
    placed = isinstance(strategy, PlacementPlan)
    made = PlacementStrategy(strategy, trace=str(folder / "trace.json")) if placed else STRATEGIES[strategy]()
    trainer = Trainer(
        **QUIET, devices=1 if strategy == "one" else dist.get_world_size(), strategy=made, max_steps=rollouts * MINIBATCHES,
        callbacks=[watch] if save is None else [watch, Save(save)], enable_checkpointing=False, use_distributed_sampler=False,
        num_sanity_val_steps=0, limit_val_batches=1.0 if val else 0, val_check_interval=1 if val else None,
    )  # fmt: skip
    trainer.fit(module, data_of(folder), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    if save_end is not None:
        trainer.save_checkpoint(save_end)
    return watch.seen


def data_of(folder: Path) -> RolloutPrompts:
    """The prompts of `prompts`."""
    return RolloutPrompts(folder / "prompts.jsonl", val_fraction=0.1, prompt_len=8, batch_size=ROWS, seed=0)


class Save(Callback):
    """Saves after the first rollout that was trained on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == MINIBATCHES:
            trainer.save_checkpoint(self.path)


def difference(one: Seen, other: Seen) -> float:
    """Largest difference of the weights of two runs.

    Raises:
        AssertionError: If their weights have other names.
    """
    assert one.weights.keys() == other.weights.keys() and one.weights
    return max(float((value - other.weights[name]).abs().max()) for name, value in one.weights.items())


def same_tokens(one: Seen, ranks: Sequence[Seen], rollouts: int | None = None) -> bool:
    """Whether all ranks that generate have the tokens of another run, of all rollouts or of the first ones."""
    expected = torch.cat(one.tokens[:rollouts])
    found = [torch.cat(each.tokens)[: len(expected)] for each in ranks if each.tokens]
    return bool(found) and all(torch.equal(each, expected) for each in found)


def sent_bytes(ranks: Sequence[Seen], operation: str, group: tuple[int, ...] | None = None) -> int:
    """Bytes of the transfers of an operation, of all ranks or within one group."""
    transfers = [each for seen in ranks for each in seen.transfers if each.operation == operation]
    return sum(each.num_bytes for each in transfers if group in (None, each.ranks))
