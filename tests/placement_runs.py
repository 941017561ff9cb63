"""Small runs of RLHF under the placements, for their tests: what is trained, on which prompts, and what a rank saw of it."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from small_llama import LLAMA, QUIET
from torch import Tensor, nn

from datamodules import RolloutPrompts
from strategies import FlatteningStrategy, InterleavingStrategy, SeparationStrategy
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
    "divided separation": partial(SeparationStrategy, backend="fsdp2"),
    "lag": partial(SeparationStrategy, max_lag=1),
    "once": partial(FlatteningStrategy, backend="fsdp2"),
    "per_token": partial(FlatteningStrategy, backend="fsdp2", gather="per_token"),
    "resident": partial(FlatteningStrategy, backend="fsdp2", gather="resident"),
    "divided interleaving": partial(InterleavingStrategy, backend="fsdp2"),
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


def module_of(llama: bool = False, lr: float = 1e-5, **options: Any) -> RLHF:
    """PPO with four models, Ling's or the library's."""
    seed_everything(0, verbose=False)
    make = partial(HFBackbone, LLAMA) if llama else partial(LingBackbone, CONFIG)
    optimizer = partial(torch.optim.AdamW, lr=lr)
    rollout = Rollout(max_new_tokens=NEW, minibatches=MINIBATCHES, unit=options.pop("unit", 2))
    return RLHF(
        make(**options.pop("actor", {})), Length(), make(scalar_head=True), rollout=rollout, optimizer=optimizer,
        critic_optimizer=optimizer, **options,
    )  # fmt: skip


class Seen(Callback):
    """Tokens of rollouts, ages of what is trained on, collectives and weights that a rank saw in a run."""

    def __init__(self, module: RLHF) -> None:
        self.tokens: list[Tensor] = []
        self.ages: list[int] = []
        self.behaviour: list[bool] = []
        self.weights: dict[str, Tensor] = {}
        self.traffic = Traffic()
        self._watch(module)

    def _watch(self, module: RLHF) -> None:
        collect, targets = module.collect, module.algorithm.targets

        def collected(samples: Any, rollout: int, *arguments: Any) -> Any:
            fields = collect(samples, rollout, *arguments)
            if rollout >= 0:
                self.tokens.append(fields["tokens"].clone())
            return fields

        def targeted(experience: Any, *arguments: Any) -> Any:
            self.ages.append(module.rollouts - experience.version)
            self.behaviour.append(experience.behaviour_logp is not None)
            return targets(experience, *arguments)

        module.collect, module.algorithm.targets = collected, targeted  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.traffic.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: RLHF) -> None:  # type: ignore[override]
        self.traffic.__exit__(None, None, None)
        state = trainer.strategy.lightning_module_state_dict()
        self.weights = {name: value.clone() for name, value in state.items() if name.startswith(("actor.", "critic."))}
        self.steps = trainer.global_step
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        frozen = [*pl_module._reference, *pl_module._scorers]
        self.frozen_bytes = sum(p.numel() * p.element_size() for each in frozen for p in each.parameters())
        self.trained = {
            name: sum(p.numel() for p in getattr(pl_module, name).parameters() if p.requires_grad) for name in ("actor", "critic")
        }
        placement = getattr(trainer.strategy, "placement", None)
        self.spans = [] if placement is None else list(placement.timeline.spans)


def run(
    name: str, folder: Path, rollouts: int = 2, checkpoint: Path | None = None, save: Path | None = None, val: bool = False,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train by a strategy; everything as plain data, so that it can travel between processes.

    Args:
        name: Of the strategy, in `STRATEGIES`.
        folder: Where the prompts are.
        rollouts: Number of rollouts that are trained on.
        checkpoint: A run to continue.
        save: File for the checkpoint after the first rollout.
        val: Whether to validate after each rollout.
        options: As of `module_of`.
    """
    module = module_of(**options)
    seen = Seen(module)
    callbacks: list[Callback] = [seen] if save is None else [seen, Save(save)]
    trainer = Trainer(
        **QUIET, devices=dist.get_world_size() if name != "one" else 1, strategy=STRATEGIES[name](), callbacks=callbacks,
        max_steps=rollouts * MINIBATCHES, enable_checkpointing=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        limit_val_batches=1.0 if val else 0, val_check_interval=1 if val else None,
    )  # fmt: skip
    data = RolloutPrompts(folder / "prompts.jsonl", val_fraction=0.1, prompt_len=8, batch_size=ROWS, seed=0)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    found = {name: value for name, value in vars(seen).items() if name not in ("traffic", "_watch")}
    return found | {"transfers": seen.traffic.transfers, "module_rollouts": module.rollouts}


class Save(Callback):
    """Saves after the first rollout that was trained on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == MINIBATCHES and not self.path.exists():
            trainer.save_checkpoint(self.path)


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of the weights of two runs.

    Raises:
        AssertionError: If their weights have other names.
    """
    assert one["weights"].keys() == other["weights"].keys() and one["weights"]
    return max(float((value - other["weights"][name]).abs().max()) for name, value in one["weights"].items())


def sent(transfers: Sequence[Transfer], operation: str) -> int:
    """Bytes of the transfers of an operation."""
    return sum(each.num_bytes for each in transfers if each.operation == operation)
