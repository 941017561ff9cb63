"""Speed of a whole training step of the language model, and what the small one learns in three minutes.

``python -m benchmarks.ling_step`` (``--device cuda``: 8 layers of Ling-Lite in bfloat16) times steps of `Ling`: forward, loss,
router losses, backward and AdamW, eager and compiled (each block, on both sides), against networks with equal weights,

* the masked loop: ours with the experts of :mod:`benchmarks.moe_layer` that are computed as published for training;
* the sorted loop: ours with ``experts="loop"``;
* transformers: the library's Qwen2-MoE of equally many parameters that computes the same function (:mod:`benchmarks.decode`),
  with ``grouped_mm`` experts.

The first and the last have no router losses to compute. Cross-entropies have to agree before anything is timed, and on a CPU
arms take turns, each repetition beginning with another; on a GPU, whose memory has no room for all, they run one after another.
Tokens per second are those of a batch over the median time; the MFU counts 6 FLOPs for each parameter that a token uses in a
product and causal attention at half, over the device's dense bfloat16 peak.

``python -m benchmarks.ling_step --tiny`` types ``zoo fit -c configs/ling/tiny.yaml``, takes the time from start to end and the
bits per byte that it logs, and sets beside them interpolated Kneser-Ney n-grams of the same bytes (:mod:`benchmarks.byte_ngram`).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.bfn_solvers import data_of, now
from benchmarks.byte_ngram import bits_per_byte
from benchmarks.decode import library_model
from benchmarks.moe_layer import COMPILED, MASKED, OURS, SORTED, TRANSFORMERS, MaskedLoop
from benchmarks.record import ROOT, Record
from benchmarks.tables import Table
from zoo.callbacks.speed_monitor import peak_flops_of
from zoo.ling import Ling, LingConfig, preset
from zoo.ling.network import MoE

# B sequences, T tokens of each

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Largest difference of cross-entropies, over ours."""
ORDERS = (3, 4, 5, 6)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        name: In words.
        config: The architecture, with dense layers or none, and a NormHead.
        batch: B.
        length: T.
        dtype: Of weights and optimizer.
        options: Of `Ling`.
    """

    name: str
    config: LingConfig
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


def cases_of(device: str) -> list[Case]:
    """The cases of a device."""
    if device == "cuda":
        lite = preset("ling_lite").replace(num_hidden_layers=8, pad_token_id=None)
        return [Case("8 layers of Ling-Lite", lite, 4, 4096, torch.bfloat16, {"loss_chunk": 4096})]
    # Without the dense layers and padding id that the library's class does not have.
    tiny = preset("ling_tiny").replace(pad_token_id=None)
    wide = tiny.replace(
        vocab_size=4096, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, num_experts=64,
        num_experts_per_tok=6, moe_intermediate_size=96,
    )  # fmt: skip
    return [Case("ling_tiny", tiny, 8, 257), Case("8 layers, D 256, E 64, k 6", wide, 4, 256)]


def smoke_case() -> Case:
    """A case that takes no time."""
    config = preset("ling_tiny").replace(
        hidden_size=32, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, pad_token_id=None
    )
    return Case("smoke", config, 2, 16)


class Arm:
    """A model, its optimizer and its step.

    Args:
        model: What is trained.
        cross_entropy: Its mean cross-entropy, and the loss that is differentiated, of ids (B, T).
        blocks: What is compiled.
    """

    def __init__(self, model: nn.Module, cross_entropy: Callable[[Tensor], tuple[Tensor, Tensor]], blocks: Sequence[Any]) -> None:
        self.model, self.cross_entropy, self.blocks = model.train(), cross_entropy, blocks
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self, ids_BT: Tensor) -> Tensor:
        """Train a step; the cross-entropy before it."""
        ce, loss = self.cross_entropy(ids_BT)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return ce.detach()


def make(name: str, case: Case, device: str) -> Arm:
    """An arm with the weights that all of a case have; ``, compiled`` at the end of its name has its blocks compiled."""
    kind = name.removesuffix(COMPILED)
    torch.manual_seed(0)
    with _default_dtype(case.dtype), torch.device(device):
        ling = Ling(case.config, router_warmup_steps=0, experts="loop" if kind == SORTED else "auto", **case.options)
        ling.log = ling.log_dict = lambda *_, **__: None  # type: ignore[assignment, method-assign]
        if kind == TRANSFORMERS:
            library = library_model(ling.network, "Qwen2-MoE")
            del ling
            library.set_experts_implementation("grouped_mm")
            arm = Arm(library, functools.partial(_library_loss, library), library.model.layers)
        else:
            if kind == MASKED:
                for block in ling.network.model.layers:
                    if isinstance(block.mlp, MoE):
                        block.mlp = MaskedLoop(block.mlp)
            arm = Arm(ling, functools.partial(_our_loss, ling), ling.networks())
    if name != kind:
        for block in arm.blocks:
            block.compile(dynamic=False)
    return arm


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _our_loss(ling: Ling, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    loss = ling.training_step({"input_ids": ids_BT}, 0)
    return ling.last_losses["ce"], loss


def _library_loss(model: Any, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    return loss, loss


def batch_of(case: Case, device: str) -> Tensor:
    """Ids (B, T)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, case.config.vocab_size, (case.batch, case.length), generator=generator).to(device)


def check(case: Case, name: str, ce: float, expected: float) -> None:
    """Refuse an arm whose first cross-entropy is another than ours.

    Raises:
        RuntimeError: It is.
    """
    if not abs(ce / expected - 1) <= TOLERANCES[case.dtype]:
        raise RuntimeError(f"{case.name}: {name} has a cross-entropy of {ce:.4f}, ours {expected:.4f}: nothing is timed.")


def time_in_turns(case: Case, names: Sequence[str], device: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each arm in each repetition, all arms in memory."""
    ids_BT = batch_of(case, device)
    arms = {}
    expected: float | None = None
    for name in names:
        arms[name] = make(name, case, device)
        ce = float(arms[name].step(ids_BT))  # compiles and allocates
        expected = ce if expected is None else expected
        check(case, name, ce, expected)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        for turn in range(len(names)):
            name = names[(turn + repetition) % len(names)]
            begin = now()
            arms[name].step(ids_BT)
            taken[name].append(now() - begin)
    return taken


def time_one_by_one(case: Case, names: Sequence[str], device: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each arm in each repetition, one arm in memory at a time; arms that do not run are left out."""
    ids_BT = batch_of(case, device)
    expected: float | None = None
    taken: dict[str, list[float]] = {}
    for name in names:
        arm = make(name, case, device)
        ce = float(arm.step(ids_BT))
        expected = ce if expected is None else expected
        check(case, name, ce, expected)
        arm.step(ids_BT)
        taken[name] = []
        for _ in range(repetitions):
            begin = now()
            arm.step(ids_BT)
            taken[name].append(now() - begin)
        del arm
        torch.cuda.empty_cache()
    return taken


def measure(record: Record, case: Case, device: str, repetitions: int, modes: Sequence[str]) -> dict[str, float]:
    """Add the rows of a case; tokens per second of each arm, and under ``mfu`` ours at its best, where the peak is known."""
    eager = [OURS, MASKED, SORTED, TRANSFORMERS] if "eager" in modes else []
    names = [*eager, *([OURS + COMPILED, TRANSFORMERS + COMPILED] if "compiled" in modes else [])]
    torch._dynamo.reset()
    taken = (time_one_by_one if device == "cuda" else time_in_turns)(case, names, device, repetitions)
    peak = peak_flops_of(torch.cuda.get_device_name()) if device == "cuda" else None
    tokens, speeds = case.batch * case.length, {}
    for name, seconds in taken.items():
        reference = taken.get(OURS + COMPILED if name.endswith(COMPILED) else OURS, seconds)
        speeds[name] = tokens / statistics.median(seconds)
        for repetition, one in enumerate(seconds):
            flops = tokens * case.config.flops_per_token(case.length) / one
            record.row(
                case=case.name,
                arm=name,
                repetition=repetition,
                tokens_per_second=tokens / one,
                over_ours=one / reference[repetition],
                mfu=None if peak is None else flops / peak,
            )
    if peak is not None:
        best = max(speed for name, speed in speeds.items() if name.startswith(OURS))
        speeds["mfu"] = best * case.config.flops_per_token(case.length) / peak
    return speeds


def steps(device: str, repetitions: int, modes: Sequence[str], smoke: bool) -> Path:
    """Measure all cases of a device; returns the path of the result."""
    gpu = device == "cuda"
    record = Record(
        f"ling_step_{'gpu' if gpu else 'cpu'}",
        seeds=[0],
        smoke=smoke,
        tables=[
            Table("A training step: tokens per second", "case", ["tokens_per_second"], columns="arm", digits=0),
            Table("Time over that of ours (compiled over compiled)", "case", ["over_ours"], columns="arm", digits=2),
            *([Table("MFU", "case", ["mfu"], columns="arm", digits=3)] if gpu else []),
        ],
    )
    for case in [smoke_case()] if smoke else cases_of(device):
        speeds = measure(record, case, device, 2 if smoke else repetitions, ["eager"] if smoke else modes)
        print(f"{case.name}: " + ", ".join(f"{name} {speed:,.3g}" for name, speed in speeds.items()), flush=True)
        if gpu:
            record.measure("tokens_per_second", max(speed for name, speed in speeds.items() if name.startswith(OURS)))
            record.measure("mfu", speeds.get("mfu"))
    return record.save()


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of what a run logged under a name.

    Raises:
        RuntimeError: Nothing was.
    """
    with (folder / "metrics.csv").open(newline="") as file:
        found = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    if not found:
        raise RuntimeError(f"The run logged no {name}.")
    return found


def text_of(file: Any) -> np.ndarray:
    """The bytes (N,) of a source's part, without what ends documents."""
    ids_N = np.asarray(file.tokens)
    return ids_N[ids_N < 256].astype(np.uint8)


def fit(folder: Path, seed: int, smoke: bool) -> float:
    """Type ``zoo fit -c configs/ling/tiny.yaml``; the minutes from start to end.

    Raises:
        RuntimeError: It failed.
    """
    words = [sys.executable, "-m", "zoo", "fit", "-c", "configs/ling/tiny.yaml", "--seed_everything", str(seed),
             "--trainer.default_root_dir", str(folder)]  # fmt: skip
    if smoke:
        words += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    begin = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"zoo fit failed with status {done.returncode}:\n{done.stdout[-3000:]}")
    return (time.perf_counter() - begin) / 60


def tiny(seeds: Sequence[int], smoke: bool) -> Path:
    """Time the small run from start to end and compare it with counting; returns the path of the result."""
    record = Record(
        "ling_tiny",
        seeds=seeds,
        smoke=smoke,
        tables=[
            Table("zoo fit -c configs/ling/tiny.yaml", "run", ["minutes", "bits_per_byte"], digits=3),
            Table("Bits per byte of the same held-out text", "model", ["bits_per_byte"], digits=3),
        ],
    )
    data = data_of("ling/tiny")
    (corpus,) = data.corpora
    grams = bits_per_byte(text_of(corpus.train), text_of(corpus.val), ORDERS)
    for order, bits in grams.items():
        record.row(model=f"interpolated {order}-gram (Kneser-Ney)", bits_per_byte=bits)
        print(f"{order}-gram: {bits:.3f} bits per byte", flush=True)
    minutes, reached = [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            minutes.append(fit(Path(folder), seed, smoke))
            reached.append(logged(Path(folder), "val/bits_per_byte")[-1][1])
        print(f"seed {seed}: {minutes[-1]:.2f} minutes, {reached[-1]:.3f} bits per byte", flush=True)
        record.row(run="zoo fit", seed=seed, minutes=minutes[-1], bits_per_byte=reached[-1])
        record.row(model="ling_tiny", seed=seed, bits_per_byte=reached[-1])
    record.measure("fit_minutes", max(minutes))
    record.measure("bits_per_byte_below_3_gram", grams[3] - max(reached))
    return record.save()


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ling_step", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="train configs/ling/tiny.yaml instead, and compare with n-grams")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=11, help="turns of each arm")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of --tiny")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, eager only; the result is not kept")
    options = parser.parse_args(arguments)
    if options.tiny:
        return tiny(options.seeds, options.smoke)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here.")
    return steps(options.device, options.repetitions, options.modes, options.smoke)


if __name__ == "__main__":
    main()
