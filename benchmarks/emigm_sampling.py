"""Sampling speed of eMIGM: against a sampler that loops over images, and against a Bayesian flow network at equal time.

``python -m benchmarks.emigm_sampling`` (``--device cuda`` on a GPU) measures

* speed: `zoo.emigm.sample_tokens` against a straight re-implementation, in this file, of the published sampler. That one keeps a
  mask tensor and indexes by it, picks positions in a Python loop over the images, computes the decoder's output at all positions,
  and embeds time and condition anew at each step of the head, for each row. Both skip the guidance half of the batch where it is
  off, send only newly revealed tokens through the head, and use the same attention kernels and the same coefficients of the
  head's solver. They are fed with the same random numbers, and the benchmark stops if they do not give the same tokens. The
  network has a published size, random weights and non-zero last layers; repetitions alternate, and the figure is the median of
  the paired ratios, loop over ours. On a GPU that is done in float32 (TF32 products) and under bfloat16 autocast, and the bar is
  set at the slower gain;
* with the CPU, or ``--checkpoint``: the feature distance of eMIGM's digits and of the shipped ``bfn-digits`` by milliseconds per
  image, for several numbers of network calls each, and which of the two is closer within the same time. The eMIGM is trained on
  the spot by ``configs/emigm/digits.yaml``, or read from ``--checkpoint``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from benchmarks.bfn_solvers import data_of, now, train
from benchmarks.emigm_design_space import FLOOR, Judge, judge_of, read_model
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.base.random import SampleRandom
from zoo.emigm import (
    Architecture,
    DPMSolver,
    Drawn,
    Guidance,
    MaskedTransformer,
    MaskSampler,
    reveal_probability,
    sample_tokens,
    step_times,
)
from zoo.emigm.sizes import architecture
from zoo.metrics import NUM_SAMPLES

TOLERANCE = 1e-4
PUBLISHED = {
    16: MaskSampler(16, head_steps=8, guidance=Guidance(4.0, 0.1, 0.3)),
    64: MaskSampler(64, head_steps=14, guidance=Guidance(4.0, 0.25, 0.5)),
}
"""Samplers by number of steps, as published for the 256- and the 512-pixel models."""
OURS, LOOP = "ours", "per-image loop"
BFN_SAMPLERS = ("ancestral", "sde2m", "ode2m")
BFN_NFES = (3, 5, 10, 20, 50, 100)
ITERATIONS = (1, 2, 3, 4, 6, 8, 12, 16)
EMIGM_ARMS: dict[str, dict[str, Any]] = {
    "eMIGM": {"guidance": Guidance(1.0)},
    "eMIGM, head of 4 steps": {"guidance": Guidance(1.0), "head_steps": 4},
    "eMIGM, late guidance": {"guidance": Guidance(3.0, 0.1, 0.3)},
}


@dataclass(frozen=True)
class Case:
    """One comparison of speed.

    Attributes:
        bar: Name of its bar.
        size: Published size.
        num_iter: Mask-prediction steps.
        batch: Images at once.
    """

    bar: str
    size: str
    num_iter: int
    batch: int

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.size}, K = {self.num_iter}, batch {self.batch}"


CASES = {
    "cpu": [Case("xs_k16_batch_4", "xsmall", 16, 4)],
    "cuda": [
        Case("xs_k16_batch_64", "xsmall", 16, 64),
        Case("xs_k64_batch_64", "xsmall", 64, 64),
        Case("b_k16_batch_64", "base", 16, 64),
        Case("b_k64_batch_64", "base", 64, 64),
    ],
}
TINY = Architecture(width=32, encoder_depth=2, decoder_depth=2, num_heads=4, head_depth=2, head_width=32)


def loop_encode(network: MaskedTransformer, x_BNC: Tensor, mask_BN: Tensor, class_BD: Tensor) -> Tensor:
    """The encoder as published: embed everything, then drop what is masked."""
    slots_BSD = class_BD[:, None].repeat(1, network.buffer_size, 1)
    x_BLD = torch.cat([slots_BSD, network.z_proj(x_BNC)], dim=1) + network.encoder_pos_embed_learned
    x_BLD = network.z_proj_ln(x_BLD)
    kept_BL = torch.cat([torch.ones_like(mask_BN[:, :1]).repeat(1, network.buffer_size), ~mask_BN], dim=1)
    x_BVD = x_BLD[kept_BL].reshape(len(x_BNC), -1, network.width)
    for block in network.encoder_blocks:
        x_BVD = block(x_BVD)
    return network.encoder_norm(x_BVD)


def loop_decode(network: MaskedTransformer, x_BVD: Tensor, mask_BN: Tensor) -> Tensor:
    """The decoder as published: its output at all positions."""
    x_BVD = network.decoder_embed(x_BVD)
    kept_BL = torch.cat([torch.ones_like(mask_BN[:, :1]).repeat(1, network.buffer_size), ~mask_BN], dim=1)
    x_BLD = network.mask_token.view(1, 1, -1).repeat(*kept_BL.shape, 1).to(x_BVD.dtype)
    x_BLD[kept_BL] = x_BVD.flatten(0, 1)
    x_BLD = x_BLD + network.decoder_pos_embed_learned
    for block in network.decoder_blocks:
        x_BLD = block(x_BLD)
    return network.decoder_norm(x_BLD)[:, network.buffer_size :] + network.diffusion_pos_embed_learned


def loop_head(net: Any, x_RC: Tensor, time_R: Tensor, z_RD: Tensor) -> Tensor:
    """The head's network as published: time and condition are embedded at each call."""
    y_RW = net.time_embed(time_R) + net.cond_embed(z_RD)
    h_RW = net.input_proj(x_RC)
    for block in net.res_blocks:
        shift_RW, scale_RW, gate_RW = block.adaLN_modulation(y_RW).chunk(3, dim=1)
        h_RW = h_RW + gate_RW * block.mlp(block.in_ln(h_RW) * (1 + scale_RW) + shift_RW)
    final = net.final_layer
    shift_RW, scale_RW = final.adaLN_modulation(y_RW).chunk(2, dim=1)
    return final.linear(final.norm_final(h_RW) * (1 + scale_RW) + shift_RW)


def loop_head_sample(network: MaskedTransformer, z_RD: Tensor, noise_RC: Tensor, scale: float, steps: int) -> Tensor:
    """Tokens of rows; with guidance ``z_RD`` holds the rows without class, then those with."""
    net, channels = network.diffloss.net, network.token_channels
    guided = len(z_RD) != len(noise_RC)
    with torch.autocast(z_RD.device.type, enabled=False):
        z_RD = z_RD.float()

        def estimate(x_RC: Tensor, time: float) -> Tensor:
            both_RC = torch.cat([x_RC, x_RC]) if guided else x_RC
            output = loop_head(net, both_RC, torch.full((len(both_RC),), time, device=x_RC.device), z_RD)[:, :channels]
            if not guided:
                return output
            without, under = output.chunk(2)
            return without + scale * (under - without)

        return DPMSolver.with_steps(steps).sample(estimate, noise_RC)


@torch.no_grad()
def loop_sample(
    network: MaskedTransformer, sampler: MaskSampler, random: SampleRandom, counts: SampleRandom, label_B: Tensor
) -> Drawn:
    """The published sampler, with the random numbers of `zoo.emigm.sample_tokens`; masks and picks image by image.

    Args:
        network: In evaluation mode, with an encoder of visible tokens.
        sampler: With the DPM-Solver head and the binomial law.
        random: The samples' streams.
        counts: The stream of the numbers of revealed tokens.
        label_B: Classes.
    """
    batch, N, C, K = len(random), network.num_tokens, network.token_channels, sampler.num_iter
    device = label_B.device
    key_BN = random.uniform("order", (N,), torch.float64)
    order_BN = key_BN.argsort(dim=1)  # only hands the noise out in the order in which ours does
    uniform_KN = counts.uniform("reveal counts", (K, N), torch.float64)[0]
    tau = step_times(K, sampler.eps)
    x_BNC = torch.zeros(batch, N, C, device=device)
    mask_BN = torch.ones(batch, N, dtype=torch.bool, device=device)
    noise_BNC = torch.zeros_like(x_BNC)
    nfe = 0
    for k in range(K):
        left = int(mask_BN[0].sum())
        if left == 0:
            break
        guided = sampler.guidance.guides(float(tau[k + 1]))
        class_BD = network.class_emb(label_B)
        x, mask = x_BNC, mask_BN
        if guided:
            class_BD = torch.cat([network.fake_latent.repeat(batch, 1), class_BD])
            x, mask = torch.cat([x, x]), torch.cat([mask, mask])
        z_BND = loop_decode(network, loop_encode(network, x, mask, class_BD), mask)
        nfe += 1 + guided

        number = left
        if k < K - 1:
            probability = float(reveal_probability(sampler.schedule, tau[k], tau[k + 1]))
            number = max(1, int((uniform_KN[k, :left] < probability).sum()))
        picked_BN = torch.zeros_like(mask_BN)
        for i in range(batch):
            masked = mask_BN[i].nonzero().squeeze(1)
            chosen = masked[key_BN[i, masked].argsort()[:number]]
            picked_BN[i, chosen] = True
        mask_BN = mask_BN & ~picked_BN

        done = N - left
        draws = random.normal(f"head {k} start", (number, C))
        noise_BNC.scatter_(1, order_BN[:, done : done + number, None].expand(-1, -1, C), draws)
        rows = torch.cat([picked_BN, picked_BN]) if guided else picked_BN
        scale = sampler.guidance.scale_at((done + number) / N)
        tokens = loop_head_sample(network, z_BND[rows], noise_BNC[picked_BN], scale, sampler.head_steps)
        x_BNC = x_BNC.clone()
        x_BNC[picked_BN] = tokens
    return Drawn(x_BNC, nfe)


def random_network(sizes: Architecture, num_tokens: int, token_channels: int, device: str) -> MaskedTransformer:
    """A network of random weights, none of them zero, ready to sample."""
    torch.manual_seed(0)
    network = MaskedTransformer(num_tokens, token_channels, **vars(sizes))
    for parameter in network.diffloss.parameters():
        if not parameter.any() and parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return network.to(device).eval()


def difference(one: Drawn, other: Drawn) -> float:
    """Largest difference of two sets of tokens, relative to the largest token where that is above 1."""
    return ((one.tokens - other.tokens).abs().max() / one.tokens.abs().max().clamp(min=1)).item()


def measure_speed(record: Record, case: Case, network: MaskedTransformer, repetitions: int, precisions: Sequence[str]) -> float:
    """Add the rows of one case; returns the median of the paired ratios, of the precision where it is least.

    Raises:
        RuntimeError: The two samplers give different tokens.
    """
    device, sampler = network.fake_latent.device, PUBLISHED[case.num_iter]
    index_B = torch.arange(case.batch, device=device)
    label_B = index_B * 7 % network.num_classes

    def drawing(draw: Callable[..., Drawn], seed: int) -> tuple[Drawn, float]:
        begin = now()
        drawn = draw(network, sampler, SampleRandom(seed, index_B), SampleRandom(seed, torch.tensor([0])), label_B)
        return drawn, now() - begin

    torch.set_float32_matmul_precision("highest")
    apart = difference(drawing(sample_tokens, 0)[0], drawing(loop_sample, 0)[0])
    if not apart <= TOLERANCE:
        raise RuntimeError(f"{case.name}: the two samplers differ by {apart:.2g} of the largest token: nothing is compared.")
    medians = []
    try:
        for precision in precisions:
            torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
            ratios = []
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                if device.type == "cuda":
                    drawing(sample_tokens, 0), drawing(loop_sample, 0)
                for repetition in range(repetitions):
                    arms = {OURS: sample_tokens, LOOP: loop_sample}
                    taken = {}
                    for name in (OURS, LOOP) if repetition % 2 == 0 else (LOOP, OURS):
                        drawn, taken[name] = drawing(arms[name], repetition)
                    ratios.append(taken[LOOP] / taken[OURS])
                    record.row(
                        case=f"{case.name}, {precision}",
                        repetition=repetition,
                        ours_seconds=taken[OURS],
                        loop_seconds=taken[LOOP],
                        loop_over_ours=ratios[-1],
                        images_per_second=case.batch / taken[OURS],
                        nfe=drawn.nfe,
                        relative_difference=apart,
                    )
            medians.append(statistics.median(ratios))
    finally:
        torch.set_float32_matmul_precision("highest")
    return min(medians)


@torch.inference_mode()
def curve_point(draw: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Samples, and the median of the seconds that drawing them took."""
    taken = []
    for _ in range(repeats):
        begin = now()
        samples = draw()
        taken.append(now() - begin)
    return samples, statistics.median(taken)


def closest_within(points: Sequence[tuple[float, float]], budget: float) -> float | None:
    """The least distance among points (time, distance) that cost no more than a budget; ``None`` if none is so cheap.

    >>> closest_within([(1.0, 9.0), (2.0, 4.0), (4.0, 5.0)], 3.0), closest_within([(1.0, 9.0)], 0.5)
    (4.0, None)
    """
    return min((distance for time, distance in points if time <= budget), default=None)


def budgets_between(least: float, most: float) -> list[float]:
    """The numbers 1, 2 and 5 times a power of ten from ``least`` to ``most``, and the first one beyond.

    >>> budgets_between(0.3, 4.0)
    [0.5, 1.0, 2.0, 5.0]
    """
    exponents = range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 2)
    grid = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    beyond = min(value for value in grid if value >= most)
    return [value for value in grid if least <= value <= beyond]


def compare_with_bfn(record: Record, emigm: Any, bfn: Any, data: Any, count: int, repeats: int, few: bool) -> None:
    """Add the rows of both models: distance, and milliseconds per image."""
    index_N = torch.arange(count, device=emigm.device)
    judges: dict[str, Judge] = {"eMIGM": judge_of(emigm, data, count), "BFN": judge_of(bfn, data, count)}
    arms: list[tuple[str, str, int, Callable[[], Any]]] = []
    for name, options in EMIGM_ARMS.items():
        for num_iter in ITERATIONS[1:4:2] if few else ITERATIONS:
            sampler = MaskSampler(num_iter, **options)
            arms.append(("eMIGM", name, num_iter, lambda s=sampler: emigm.sample(index_N, sampler=s)))
    for sampler in BFN_SAMPLERS:
        for nfe in BFN_NFES[1:3] if few else BFN_NFES:
            arms.append(("BFN", f"BFN, {sampler}", nfe, lambda s=sampler, n=nfe: bfn.sample(index_N, sampler=s, nfe=n)))
    labels = emigm.sample_labels(index_N)
    points: dict[str, list[tuple[float, float]]] = {"eMIGM": [], "BFN": []}
    for model, name, calls, draw in arms:
        draw()  # the first call pays for allocations
        samples, seconds = curve_point(draw, repeats)
        seen = judges[model](samples.images, labels)
        milliseconds = 1000 * seconds / count
        points[model].append((milliseconds, float(seen["distance"] or math.inf)))
        record.row(
            sampled=name,
            calls=calls,
            nfe=samples.nfe,
            milliseconds=milliseconds,
            log10_milliseconds=math.log10(milliseconds),
            distance=seen["distance"],
            class_accuracy=seen["class_accuracy"] if model == "eMIGM" else None,  # that BFN draws without class
        )
    times = [time for family in points.values() for time, _ in family]
    floor = judges["eMIGM"].floor()
    columns = list(dict.fromkeys(calls for _, _, calls, _ in arms))
    for calls, place in zip(columns, torch.linspace(math.log10(min(times)), math.log10(max(times)), len(columns)), strict=True):
        record.row(sampled=FLOOR, calls=calls, log10_milliseconds=place.item(), distance=floor)
    for budget in budgets_between(min(times), max(times)):
        within = {model: closest_within(family, budget) for model, family in points.items()}
        known = {model: distance for model, distance in within.items() if distance is not None}
        record.row(budget=f"{budget:g} ms", emigm_distance=within["eMIGM"], bfn_distance=within["BFN"],
                   closer=min(known, key=lambda model: known[model]))  # fmt: skip
    for name, model in (("eMIGM", emigm), ("BFN", bfn)):
        record.row(model=name, parameters=sum(parameter.numel() for parameter in model.parameters()))


def tables_of(count: int, with_bfn: bool) -> tuple[list[Table], list[Plot]]:
    """Tables and plots of the result."""
    tables = [
        Table("Seconds of sampling tokens, per-image loop over ours", "case",
              ["loop_over_ours", "ours_seconds", "loop_seconds", "images_per_second", "nfe"]),
    ]  # fmt: skip
    if not with_bfn:
        return tables, []
    tables += [
        Table(f"Digits: feature distance by sampler, {count} samples", "sampled", ["distance"], columns="calls"),
        Table("Digits: milliseconds per image", "sampled", ["milliseconds"], columns="calls", digits=3),
        Table("Digits: least feature distance within the same time per image", "budget",
              ["emigm_distance", "bfn_distance", "closer"]),
        Table("Digits: models", "model", ["parameters"], digits=0),
    ]  # fmt: skip
    return tables, [
        Plot("Digits: feature distance by time per image", "log10_milliseconds", "distance", "sampled", log="y", reference=FLOOR)
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emigm_sampling", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--checkpoint", type=Path, help="weights of an eMIGM of the digits: a folder or a .ckpt file")
    parser.add_argument("--repetitions", type=int, default=7, help="pairs of runs for each case of the speed")
    parser.add_argument("--smoke", action="store_true", help="a tiny network and few samples; the result is not kept")
    options = parser.parse_args(arguments)
    with_bfn = options.device == "cpu" or options.checkpoint is not None
    count, repetitions = (100, 2) if options.smoke else (NUM_SAMPLES, options.repetitions)
    tables, plots = tables_of(count, with_bfn)
    name = f"emigm_sampling_{'gpu' if options.device == 'cuda' else 'cpu'}"
    record = Record(name, seeds=[0], smoke=options.smoke, tables=tables, plots=plots)
    precisions = ["float32", "bfloat16"] if options.device == "cuda" else ["float32"]
    for case in CASES[options.device]:
        sizes, shape = (TINY, (16, 4)) if options.smoke else (architecture(case.size, 256), (256, 16))  # type: ignore[arg-type]
        network = random_network(sizes, *shape, options.device)
        ratio = measure_speed(record, case, network, repetitions, precisions)
        record.measure(case.bar, ratio)
        print(f"{case.name}: per-image loop over ours {ratio:.2f}", flush=True)
        del network
    if with_bfn:
        if options.checkpoint is None:
            short = ["--trainer.max_steps=20", "--trainer.limit_val_batches=0"] if options.smoke else []
            with tempfile.TemporaryDirectory() as folder:
                emigm: Any = train("emigm/digits", 0, Path(folder), short)[0]
        else:
            emigm = read_model(options.checkpoint)
        emigm, bfn = emigm.to(options.device).eval(), zoo.load("bfn-digits").to(options.device)
        compare_with_bfn(record, emigm, bfn, data_of("emigm/digits"), count, 1 if options.smoke else 3, options.smoke)
    return record.save()


if __name__ == "__main__":
    main()
