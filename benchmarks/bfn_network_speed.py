"""Speed of the published CIFAR-10 network (30.7 M parameters), sampling and training.

``python -m benchmarks.bfn_network_speed`` times, on the CPU and on the GPU if there is one, in float32 and in bfloat16
(autocast), eagerly and compiled:

* sampling: network calls under ``inference_mode``, in which samplers such as ODE2M spend nearly all their time; samples per
  second are those at 10 network calls;
* training: forward, backward and a step of AdamW, with the published batch of 32 on a GPU.

Float32 on a GPU uses TF32 matrix products, as the published sampling code does. Each row is one repetition, of several calls or
steps on a GPU; the first ones, which compile and allocate, are timed apart. MFU is the share of the dense bfloat16 peak of
the GPU's data sheet.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import Record
from benchmarks.tables import Cell, Table
from zoo.bfn import UNetVDM

CALLS_PER_SAMPLE = 10
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
"""Dense bfloat16 peaks by a word of the GPU's name, in 10^12 floating-point operations per second."""


@dataclass(frozen=True)
class Load:
    """How much is run on a device.

    Attributes:
        sampling_batch: Images per network call.
        training_batch: Images per training step.
        calls: Calls or steps per repetition.
        repetitions: Rows of the result.
    """

    sampling_batch: int
    training_batch: int
    calls: int
    repetitions: int


LOADS = {"cpu": Load(2, 2, 1, 3), "cuda": Load(256, 32, 10, 5)}
SMOKE = Load(2, 2, 1, 2)


def inputs(network: UNetVDM, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Noise (batch, H, W, C) and times (batch,), the same at each call."""
    channels, height, width = network.image_shape
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(batch, height, width, channels, generator=generator)
    return mu.to(device), torch.rand(batch, generator=generator).to(device)


def flops_per_image(make: Callable[[], UNetVDM]) -> int:
    """Floating-point operations of one network call on one image, counted without running it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = make()
        channels, height, width = network.image_shape
        network(torch.zeros(1, height, width, channels), torch.zeros(1))
    return counter.get_total_flops()


def sampling_call(network: nn.Module, mu: Tensor, t: Tensor, bf16: bool) -> Callable[[], object]:
    """One network call."""

    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast(mu.device.type, torch.bfloat16, enabled=bf16):
            return network(mu, t)

    network.eval()
    return call


def training_step(network: nn.Module, mu: Tensor, t: Tensor, bf16: bool) -> Callable[[], object]:
    """One training step; the noise to predict is the input, which costs the same as any other."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4, betas=(0.9, 0.99), weight_decay=0.01)

    def step() -> None:
        with torch.autocast(mu.device.type, torch.bfloat16, enabled=bf16):
            output = network(mu, t)
        (output.squeeze(-1).float() - mu).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    network.train()
    return step


def seconds(call: Callable[[], object], device: str, times: int = 1) -> float:
    """Seconds that a call takes, on average over some."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = now()
    for _ in range(times):
        call()
    return (now() - begin) / times


def measure(record: Record, make: Callable[[], UNetVDM], device: str, load: Load, precision: str, mode: str, flops: int) -> None:
    """Add the rows of one device, precision and mode."""
    setting = f"{device}, {precision}, {mode}"
    bf16 = precision == "bfloat16"
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((peak for word, peak in PEAK_TFLOPS.items() if word in name), None)
    for work, batch, passes in (("sampling", load.sampling_batch, 1), ("training", load.training_batch, 3)):
        torch.manual_seed(0)
        network = make().to(device)
        if mode == "compiled":
            network.compile()
        prepare = sampling_call if work == "sampling" else training_step
        call = prepare(network, *inputs(network, batch, device), bf16)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = seconds(call, device)
        seconds(call, device, min(3, load.calls))
        for repetition in range(load.repetitions):
            taken = seconds(call, device, load.calls)
            tflops = flops * passes * batch / taken / 1e12
            rate = batch / taken / CALLS_PER_SAMPLE if work == "sampling" else 1 / taken
            speed = {"samples_per_second" if work == "sampling" else "steps_per_second": rate}
            cells: dict[str, Cell] = {work: setting, "batch": batch, "repetition": repetition, "seconds": taken}
            cells |= {"first_seconds": first, "tflops": tflops, "mfu_percent": 100 * tflops / peak if peak and bf16 else None}
            cells["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
            record.row(**cells, **speed)
        del network, call
        gc.collect()
        torch._dynamo.reset()


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bfn_network_speed", description=__doc__)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=devices)
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--smoke", action="store_true", help="a tiny network, eager only; the result is not kept")
    options = parser.parse_args(arguments)
    make = (lambda: UNetVDM(image_shape=(3, 8, 8), width=32, depth=2)) if options.smoke else UNetVDM
    cost = ["tflops", "mfu_percent", "peak_gigabytes", "first_seconds", "batch"]
    record = Record(
        "bfn_network_speed",
        seeds=[0],
        smoke=options.smoke,
        tables=[
            Table(f"Sampling with {CALLS_PER_SAMPLE} network calls", "sampling", ["samples_per_second", *cost]),
            Table("Training", "training", ["steps_per_second", *cost]),
        ],
    )
    torch.set_float32_matmul_precision("high")
    flops = flops_per_image(make)
    for device in options.devices:
        for precision in options.precisions:
            for mode in ["eager"] if options.smoke else options.modes:
                measure(record, make, device, SMOKE if options.smoke else LOADS[device], precision, mode, flops)
    return record.save()


if __name__ == "__main__":
    main()
