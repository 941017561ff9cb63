"""Sizes and times of a module's models, measured on this machine, for the planner."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.placement.cost_model import RoleCost, Workload
from zoo.base.gradient_sums import GradientSums
from zoo.base.random import SampleRandom
from zoo.lm.backbone import Backbone
from zoo.lm.generation import Generation, continue_prompts
from zoo.role_placement import Role

__all__ = ["measure_roles", "workload_of"]


@runtime_checkable
class HasRollout(Protocol):
    """A module that answers batches of prompts, with numbers of a rollout such as `zoo.rlhf.Rollout`."""

    rollout: Any


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
    roles: Mapping[str, Role], job: Workload, device: torch.device, ranks: int = 1, repetitions: int = 8
) -> dict[str, RoleCost]:
    """Time the passes of each model, on all ranks at once; no weight, gradient or random state is changed.

    Each model has to fit on the device with gradients and the states of Adam, one at a time.

    Args:
        roles: Models of a module such as `zoo.rlhf.RLHF`.
        job: The rollout: prompts and answers have its lengths, passes its unit.
        device: Where.
        ranks: Number of ranks for which plans are made; generation is timed for the samples of one rank, of half of them, and of
            twice as many.
        repetitions: Runs of each pass, of which the mean counts, since a step is the sum of many.
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

    each = max(1, job.samples // max(1, ranks))
    sizes = sorted({each, max(1, each // 2), min(job.samples, 2 * each)}) if name == "actor" else []
    passes: dict[tuple[str, int], Callable[[], Any]] = {}
    for size in sizes:
        passes["prefill", size], passes["whole", size] = _generate(backbones[0], size, job, device)
    passes["score", job.unit] = torch.no_grad()(lambda: _passes(name, role.network, ids, mask, job.new_tokens))
    gradients = [parameter.grad for parameter in parameters]
    if trained:
        sums, optimizer = GradientSums(trained), torch.optim.AdamW(trained, lr=0.0)

        def train() -> None:
            _passes(name, role.network, ids, mask, job.new_tokens).sum().backward()
            sums.add()

        def update() -> None:
            sums.give(lambda total: None)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        passes["train", job.unit], passes["update", 1] = train, update
    times, slowest = _times(passes, device, repetitions)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    decode = {size: max(0.0, times["whole", size] - times["prefill", size]) / max(1, job.new_tokens - 1) for size in sizes}
    return RoleCost(
        count, sum(parameter.numel() for parameter in trained), max(1, len(blocks)), max(0, count - inside),
        max((backbone.hidden_size for backbone in backbones), default=0),
        vocabulary=vocabulary if name in ("actor", "reference") else 0,
        parameter_bytes=width, gradient_bytes=width, state_bytes=2 * width,
        prefill={size: times["prefill", size] for size in sizes}, decode=decode, score={job.unit: times["score", job.unit]},
        train={job.unit: times["train", job.unit]} if trained else {}, update=times.get(("update", 1), 0.0),
        slowest=slowest,
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


def _times(
    passes: Mapping[tuple[str, int], Callable[[], Any]], device: torch.device, repetitions: int
) -> tuple[dict[tuple[str, int], float], float]:
    """Mean seconds of each pass over all ranks, and how much longer the slowest rank takes.

    Passes take turns, as in a run, where none finds its weights in the caches.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    taken: list[list[float]] = []
    for _ in range(repetitions + 1):  # the first one warms up
        taken.append([])
        for function in passes.values():
            if not alone:
                dist.barrier()
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[-1].append(time.perf_counter() - begin)
    own = torch.tensor(taken[1:], dtype=torch.float64, device=device)
    mean, most = own.clone(), own
    if not alone:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip(passes, mean.mean(0).tolist(), strict=True)), float(most.sum() / mean.sum())


def _generate(backbone: Backbone, size: int, job: Workload, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Generation of the first token of prompts, and of all."""
    ids = torch.arange(size * job.prompt_tokens, device=device).remainder(backbone.vocab_size).view(size, job.prompt_tokens)
    index = torch.arange(size, device=device)

    def run(new_tokens: int) -> Callable[[], Any]:
        options = Generation(new_tokens, temperature=1.0, eos_token_id=[], pad_token_id=0)
        return lambda: continue_prompts(backbone.decodes(), ids, torch.ones_like(ids), options, random=SampleRandom(0, index))

    return run(1), run(job.new_tokens)
