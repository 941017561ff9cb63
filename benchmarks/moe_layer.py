"""Speed of one layer of experts, forward and backward, against the ways in which others compute it.

``python -m benchmarks.moe_layer`` (``--device cuda`` on a GPU, with the dimensions of Ling-Lite in bfloat16) times, with equal
weights and inputs, router and shared expert included everywhere,

* ours: `zoo.ling.network.MoE`, its choice of backend, eager and compiled;
* the masked loop: a re-implementation, in this file, of the training path released with the weights, in which every expert has
  matrices of its own, selects its tokens by comparing all ids with its number, and writes its outputs at that mask;
* the sorted loop: ours with ``experts="loop"``, one product for each expert over tokens sorted by expert;
* transformers: its mixture block of the same function (HunYuan's: softmax router, normalised top-k, shared expert without a
  gate) with ``grouped_mm`` experts, which it takes by default, eager and compiled. Its shared expert is made as wide as ours.

Outputs and all gradients have to agree with ours before anything is timed. Arms take turns, each repetition beginning with
another; a figure is the median over repetitions of the time of an arm over that of ours in the same repetition. A bar over
several sizes is set at the least gain.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.bfn_solvers import now
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.ling import LingConfig
from zoo.ling.network import MoE, SwiGLU

# N tokens, D width, I width of an expert, E experts, k experts of a token, M = N k

OURS, MASKED, SORTED, TRANSFORMERS = "ours", "masked loop", "sorted loop", "transformers"
COMPILED = ", compiled"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference over the largest number of a tensor."""


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison.

    Attributes:
        tokens: N.
        experts: E.
        chosen: k.
        hidden: D.
        width: I.
        shared: width of the shared expert, in units of I.
        dtype: of weights and tokens.
    """

    tokens: int
    experts: int = 64
    chosen: int = 6
    hidden: int = 128
    width: int = 96
    shared: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The case in words."""
        return f"E {self.experts}, k {self.chosen}, D {self.hidden}, I {self.width}, {self.tokens} tokens"

    @property
    def config(self) -> LingConfig:
        """The architecture; what is no part of the layer does not matter."""
        return LingConfig(
            hidden_size=self.hidden, num_experts=self.experts, num_experts_per_tok=self.chosen,
            moe_intermediate_size=self.width, num_shared_experts=self.shared, num_attention_heads=1,
            num_key_value_heads=1, head_dim=2,
        )  # fmt: skip

    @property
    def flops(self) -> float:
        """Floating-point operations of forward and backward: 6 for each parameter that a token uses."""
        expert = 3 * self.hidden * self.width
        return 6.0 * self.tokens * (self.experts * self.hidden + (self.chosen + self.shared) * expert)


CASES = {
    "cpu": [Case(64), Case(512), Case(2048), Case(1024, experts=16, chosen=4, hidden=256, width=176)],
    "cuda": [
        Case(tokens, hidden=2048, width=1408, shared=2, dtype=torch.bfloat16) for tokens in (64, 2048, 8192, 32768)
    ],
}  # fmt: skip
SMOKE = [Case(24, experts=6, chosen=2, hidden=16, width=8)]


class MaskedLoop(nn.Module):
    """Ours with the experts as published for training: a mask over all assignments for each of them."""

    def __init__(self, ours: MoE) -> None:
        super().__init__()
        E, D, width = ours.experts.down_proj.shape
        self.gate = copy.deepcopy(ours.gate)
        self.shared_experts = copy.deepcopy(ours.shared_experts)
        self.experts = nn.ModuleList(SwiGLU(D, width) for _ in range(E)).to(ours.experts.down_proj)
        with torch.no_grad():
            for expert, gate_up, down in zip(self.experts, ours.experts.gate_up_proj, ours.experts.down_proj, strict=True):
                expert.gate_proj.weight.copy_(gate_up[:width])
                expert.up_proj.weight.copy_(gate_up[width:])
                expert.down_proj.weight.copy_(down)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        id_M = routing.ids_Nk.flatten()
        x_MD = x_ND.repeat_interleave(routing.ids_Nk.shape[1], dim=0)
        y_MD = torch.empty_like(x_MD)
        for number, expert in enumerate(self.experts):
            y_MD[id_M == number] = expert(x_MD[id_M == number])
        y_NkD = y_MD.view(*routing.ids_Nk.shape, -1) * routing.weights_Nk[..., None]
        y_BTD = y_NkD.sum(1).to(x_BTD.dtype).view(x_BTD.shape)
        return y_BTD if self.shared_experts is None else y_BTD + self.shared_experts(x_BTD)

    def gradients(self) -> list[Tensor]:
        """Of router, shared expert and experts, stacked as ours are."""
        experts = [
            torch.cat([_stack(self.experts, "gate_proj"), _stack(self.experts, "up_proj")], dim=1),
            _stack(self.experts, "down_proj"),
        ]
        return [_grad(self.gate.weight), *experts, *_shared(self.shared_experts)]


class Ours(nn.Module):
    """The layer, without what it says of its routing."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.moe(x_BTD)[0]

    def gradients(self) -> list[Tensor]:
        """Of router, experts and shared expert."""
        experts = self.moe.experts
        return [
            _grad(self.moe.gate.weight), _grad(experts.gate_up_proj), _grad(experts.down_proj), *_shared(self.moe.shared_experts)
        ]  # fmt: skip


class Transformers(nn.Module):
    """The block of transformers with the weights of ours."""

    def __init__(self, ours: MoE) -> None:
        super().__init__()
        from transformers.models.hunyuan_v1_moe import modeling_hunyuan_v1_moe as hunyuan
        from transformers.models.hunyuan_v1_moe.configuration_hunyuan_v1_moe import HunYuanMoEV1Config

        E, D, width = ours.experts.down_proj.shape
        assert ours.shared_experts is not None
        config = HunYuanMoEV1Config(
            hidden_size=D, intermediate_size=width, num_experts=E, moe_topk=ours.gate.num_experts_per_tok, hidden_act="silu"
        )
        config._experts_implementation = "grouped_mm"
        self.block = hunyuan.HunYuanMoEV1Moe(config)
        wider = copy.deepcopy(config)
        wider.intermediate_size = ours.shared_experts.gate_proj.out_features
        self.block.shared_mlp = hunyuan.HunYuanMoEV1MLP(wider)
        self.block.to(ours.experts.down_proj)
        self.block.gate.wg.float()  # scores in float32, as ours
        with torch.no_grad():
            self.block.gate.wg.weight.copy_(ours.gate.weight)
            self.block.experts.gate_up_proj.copy_(ours.experts.gate_up_proj)
            self.block.experts.down_proj.copy_(ours.experts.down_proj)
            self.block.shared_mlp.load_state_dict(ours.shared_experts.state_dict())

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.block(x_BTD)

    def gradients(self) -> list[Tensor]:
        """Of router, experts and shared expert."""
        experts = self.block.experts
        return [
            _grad(self.block.gate.wg.weight), _grad(experts.gate_up_proj), _grad(experts.down_proj),
            *_shared(self.block.shared_mlp),
        ]  # fmt: skip


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _stack(experts: nn.ModuleList, name: str) -> Tensor:
    return torch.stack([_grad(getattr(expert, name).weight) for expert in experts])


def _shared(experts: nn.Module | None) -> list[Tensor]:
    assert experts is not None
    return [_grad(getattr(experts, name).weight) for name in ("gate_proj", "up_proj", "down_proj")]


def layers(case: Case, device: str) -> dict[str, nn.Module]:
    """All arms, with equal random weights under which outputs are about as large as inputs."""
    torch.manual_seed(0)
    ours = MoE(case.config, "auto", accurate_router=True)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_(0, (case.width if "down" in name else case.hidden) ** -0.5)
    ours = ours.to(device, case.dtype)
    looped = MoE(case.config, "loop", accurate_router=True).to(device, case.dtype)
    looped.load_state_dict(ours.state_dict())
    return {OURS: Ours(ours), MASKED: MaskedLoop(ours), SORTED: Ours(looped), TRANSFORMERS: Transformers(ours)}


def step(layer: Callable[[Tensor], Tensor], x_BTD: Tensor, seed_BTD: Tensor) -> Tensor:
    """Forward and backward; gradients of parameters are left in them, earlier ones have to be gone."""
    x_BTD.grad = None
    y_BTD = layer(x_BTD)
    y_BTD.backward(seed_BTD)
    return y_BTD


def forget(layer: nn.Module) -> None:
    """Drop gradients."""
    layer.zero_grad(set_to_none=True)


def disagreement(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference of two lists of tensors, each over the largest number of its tensor."""
    return max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(one, other, strict=True)
    )


def agree(case: Case, arms: dict[str, nn.Module], x_BTD: Tensor, seed_BTD: Tensor) -> dict[str, float]:
    """How far each arm is from ours, in output and gradients.

    Raises:
        RuntimeError: An arm is too far.
    """
    found: dict[str, list[Tensor]] = {}
    for name, arm in arms.items():
        forget(arm)
        y_BTD = step(arm, x_BTD, seed_BTD)
        found[name] = [y_BTD.detach(), _grad(x_BTD), *arm.gradients()]  # type: ignore[operator]
        forget(arm)
    apart = {name: disagreement(tensors, found[OURS]) for name, tensors in found.items()}
    for name, value in apart.items():
        if not value <= TOLERANCES[case.dtype]:
            raise RuntimeError(f"{case.name}: {name} differs from ours by {value:.2g} of the largest number: nothing is timed.")
    return apart


def compile_arms(arms: dict[str, nn.Module], x_BTD: Tensor, seed_BTD: Tensor) -> tuple[dict[str, Callable[..., Tensor]], str]:
    """Ours and transformers' compiled and run once, and why not, where the machine cannot."""
    compiled: dict[str, Callable[..., Tensor]] = {}
    try:
        for name in (OURS, TRANSFORMERS):
            compiled[name + COMPILED] = torch.compile(arms[name], dynamic=False)
            expected = step(arms[name], x_BTD, seed_BTD).detach()
            apart = disagreement([step(compiled[name + COMPILED], x_BTD, seed_BTD).detach()], [expected])
            forget(arms[name])
            if not apart <= TOLERANCES[expected.dtype]:
                raise RuntimeError(f"Compiled, {name} gives something else, by {apart:.2g} of the largest number.")
    except torch._dynamo.exc.TorchDynamoException as error:  # no compiler of C++ or of kernels
        return {}, type(error).__name__
    return compiled, ""


def measure(record: Record, case: Case, device: str, repetitions: int, calls: int, modes: Sequence[str]) -> dict[str, float]:
    """Add the rows of one case; returns for each arm the median of its time over that of ours (of its mode)."""
    arms = layers(case, device)
    generator = torch.Generator().manual_seed(1)
    x_BTD, seed_BTD = (
        torch.randn(1, case.tokens, case.hidden, generator=generator).to(device, case.dtype) for _ in range(2)
    )  # fmt: skip
    x_BTD.requires_grad_()
    apart = agree(case, arms, x_BTD, seed_BTD)
    run: dict[str, Callable[..., Tensor]] = dict(arms) if "eager" in modes else {}
    if "compiled" in modes:
        torch._dynamo.reset()
        compiled, reason = compile_arms(arms, x_BTD, seed_BTD)
        if reason:
            print(f"{case.name}: torch.compile does not work here ({reason}).", flush=True)
            record.row(not_compiled=case.name, reason=reason)
        run |= compiled
    parameters = {name: arms[name.removesuffix(COMPILED)] for name in run}
    names = list(run)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-1, repetitions):  # the first one allocates
        for turn in range(len(names)):
            name = names[(turn + repetition) % len(names)]
            begin = now()
            for _ in range(calls):
                forget(parameters[name])
                step(run[name], x_BTD, seed_BTD)
            seconds = (now() - begin) / calls
            forget(parameters[name])
            if repetition >= 0:
                taken[name].append(seconds)
                record.row(case=case.name, arm=name, repetition=repetition, milliseconds=1000 * seconds,
                           tflops=case.flops / seconds / 1e12, difference=apart.get(name))  # fmt: skip
    medians = {}
    for name in names:
        ours = OURS + COMPILED if name.endswith(COMPILED) else OURS
        if name != ours:
            ratios = [theirs / mine for theirs, mine in zip(taken[name], taken[ours], strict=True)]
            for ratio in ratios:
                record.row(compared=case.name, against=name, ratio=ratio)
            medians[name] = statistics.median(ratios)
    return medians


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_layer", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=21, help="turns of each arm")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--smoke", action="store_true", help="a tiny layer, eager only; the result is not kept")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here.")
    record = Record(
        f"moe_layer_{'gpu' if gpu else 'cpu'}",
        seeds=[0],
        smoke=options.smoke,
        tables=[
            Table("One layer, forward and backward: milliseconds", "case", ["milliseconds"], columns="arm"),
            Table("Time over that of ours (compiled over compiled)", "compared", ["ratio"], columns="against"),
            *([Table("One layer: TFLOP/s", "case", ["tflops"], columns="arm", digits=0)] if gpu else []),
        ],
    )
    medians: dict[Case, dict[str, float]] = {}
    modes = ["eager"] if options.smoke else options.modes
    for case in SMOKE if options.smoke else CASES[options.device]:
        repetitions = 2 if options.smoke else options.repetitions
        medians[case] = measure(record, case, options.device, repetitions, 10 if gpu or case.tokens < 256 else 2, modes)
        print(f"{case.name}: " + ", ".join(f"{arm} {ratio:.2f}" for arm, ratio in medians[case].items()), flush=True)
        if gpu:
            torch.cuda.empty_cache()

    def least(arm: str, cases: Sequence[Case]) -> float | None:
        return min((medians[case][arm] for case in cases if arm in medians[case]), default=None)

    every = list(medians)
    if gpu:
        record.measure("over_masked_loop_8192_tokens", least(MASKED, [case for case in every if case.tokens == 8192]))
        record.measure("over_transformers_eager", least(TRANSFORMERS, every))
        record.measure("over_transformers_compiled", least(TRANSFORMERS + COMPILED, every))
    else:
        large = [case for case in every if case.tokens >= 512]
        record.measure("over_masked_loop", least(MASKED, every if options.smoke else large))
        record.measure("over_transformers", least(TRANSFORMERS, every))
    return record.save()


if __name__ == "__main__":
    main()
