"""Sizes and times of a module's models, measured on this machine, for the planner; kept as JSON."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from strategies.placement.cost_model import RoleCost, Workload
from zoo.base.random import SampleRandom
from zoo.lm.backbone import Backbone
from zoo.lm.generation import Generation, continue_prompts
from zoo.role_placement import Role

__all__ = ["measure_roles", "read_roles", "workload_of", "write_roles"]


class RolloutOptions(Protocol):
    """Numbers of a rollout, such as `zoo.rlhf.Rollout`."""

    samples_per_prompt: int
    max_new_tokens: int
    minibatches: int
    epochs: int
    unit: int


@runtime_checkable
class HasRollout(Protocol):
    """A module that answers batches of prompts."""

    rollout: RolloutOptions


def workload_of(module: Any, datamodule: Any) -> Workload:
    """The rollout of a module on the first batch of its data; the order of a run's batches and draws does not change.

    Raises:
        ValueError: If the module has no rollouts, or batches are no prompts.
    """
    with torch.random.fork_rng(devices=[]):
        batch = None if datamodule is None else next(iter(datamodule.train_dataloader()), None)
    if not isinstance(module, HasRollout) or not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            "plan=auto needs a module with rollouts, such as RLHF, and a DataModule of prompts: name a plan instead."
        )
    options, (prompts, width) = module.rollout, batch["input_ids"].shape
    return Workload(
        prompts * options.samples_per_prompt, width, options.max_new_tokens, options.minibatches, options.epochs, options.unit
    )


def measure_roles(
    roles: Mapping[str, Role], job: Workload, device: torch.device, ranks: int = 1, repetitions: int = 3
) -> dict[str, RoleCost]:
    """Time the passes of each model; no weight, gradient or random state is changed.

    Each model has to fit on the device with gradients and the states of Adam, one at a time.

    Args:
        roles: Models of a module such as `zoo.rlhf.RLHF`.
        job: The rollout: prompts and answers have its lengths, passes its unit.
        device: Where.
        ranks: Number of ranks for which plans are made; generation is timed for the samples of one rank and of half of them.
        repetitions: Runs of each pass, of which the median counts.
    """
    found = {}
    for name, role in roles.items():
        home = next((parameter.device for parameter in role.network.parameters()), device)
        role.network.to(device)
        modes = [(module, module.training) for module in role.network.modules()]
        role.network.eval()
        found[name] = _measure(name, role, job, device, ranks, repetitions)
        for module, mode in modes:
            module.training = mode
        role.network.to(home)
    return found


def _measure(name: str, role: Role, job: Workload, device: torch.device, ranks: int, repetitions: int) -> RoleCost:
    parameters = list(role.network.parameters())
    backbones = [module for module in role.network.modules() if isinstance(module, Backbone)]
    blocks = role.blocks or [block for backbone in backbones for block in backbone.blocks]
    trained = [parameter for parameter in parameters if parameter.requires_grad] if role.trained else []
    count = sum(parameter.numel() for parameter in parameters)
    inside = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    width = parameters[0].element_size() if parameters else 4
    tokens = job.prompt_tokens + job.new_tokens
    vocabulary = max((backbone.vocab_size for backbone in backbones), default=1)
    ids = torch.arange(job.unit * tokens, device=device).remainder(vocabulary).view(job.unit, tokens)
    mask = torch.ones_like(ids)

    def timed(function: Callable[[], Any], runs: int = repetitions) -> float:
        taken = []
        for _ in range(runs + 1):  # the first one warms up
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begin)
        return median(taken[1:])

    prefill, decode, train, update = {}, {}, {}, 0.0
    with torch.no_grad():
        score = timed(lambda: _passes(name, role.network, ids, mask, job.new_tokens))
        if name == "actor":
            per_rank = max(1, job.samples // max(1, ranks))
            for size in sorted({per_rank, max(1, per_rank // 2), min(job.samples, 2 * per_rank)}):
                prefill[size], decode[size] = _generate(backbones[0], size, job, device, timed)
    if trained:
        gradients = [parameter.grad for parameter in parameters]

        def step() -> None:
            _passes(name, role.network, ids, mask, job.new_tokens).sum().backward()

        train[job.unit] = timed(step)
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        update = timed(lambda: (nn.utils.clip_grad_norm_(trained, 1.0), optimizer.step(), optimizer.zero_grad(False)))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return RoleCost(
        count, sum(parameter.numel() for parameter in trained), max(1, len(blocks)), max(0, count - inside),
        max((backbone.hidden_size for backbone in backbones), default=0),
        vocabulary=vocabulary if name in ("actor", "reference") else 0,
        parameter_bytes=width, gradient_bytes=width, state_bytes=2 * width,
        prefill=prefill, decode=decode, score={job.unit: score}, train=train, update=update,
    )  # fmt: skip


def _passes(name: str, network: nn.Module, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
    """One pass of scoring or training, in whatever form a role has it."""
    if name == "reward":
        texts: list[str] = [""] * len(ids)
        rows: list[dict[str, Any]] = [{} for _ in texts]
        scorers: Any = network
        return torch.stack([ids[:, 0].float(), *(part.score(ids, mask, texts, texts, rows) for part in scorers)])
    found = network(ids, mask, new_tokens)
    return found[0] if isinstance(found, tuple) else found


def _generate(
    backbone: Backbone, size: int, job: Workload, device: torch.device, timed: Callable[..., float]
) -> tuple[float, float]:
    """Seconds of prompts with the first token, and of each further one."""
    ids = torch.arange(size * job.prompt_tokens, device=device).remainder(backbone.vocab_size).view(size, job.prompt_tokens)
    index = torch.arange(size, device=device)

    def run(new_tokens: int) -> Callable[[], Any]:
        options = Generation(new_tokens, eos_token_id=[], pad_token_id=0)
        model = backbone.decodes()
        return lambda: continue_prompts(model, ids, torch.ones_like(ids), options, random=SampleRandom(0, index))

    first, whole = timed(run(1)), timed(run(job.new_tokens))
    return first, max(0.0, whole - first) / max(1, job.new_tokens - 1)


def write_roles(roles: Mapping[str, RoleCost], path: str | Path) -> None:
    """Write sizes and times as JSON, which ``zoo plan rlhf -c`` reads."""
    Path(path).write_text(json.dumps({"roles": {name: asdict(role) for name, role in roles.items()}}, indent=1))


def read_roles(path: str | Path) -> dict[str, RoleCost]:
    """Read what `write_roles` wrote.

    Raises:
        ValueError: If it is something else.
    """
    try:
        found = json.loads(Path(path).read_text())["roles"]
        for entries in found.values():
            for name in ("prefill", "decode", "score", "train"):
                entries[name] = {int(size): seconds for size, seconds in entries[name].items()}
        return {name: RoleCost(**entries) for name, entries in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no sizes and times of roles ({str(error)[:120]}): write_roles makes such a file."
        ) from error
