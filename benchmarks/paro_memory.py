"""Memory of every way to shard data-parallel training, measured on one GPU that plays one rank of 32.

``python -m benchmarks.paro_memory --device cuda`` builds a dense transformer of 1.3 billion parameters (Ling's, without
experts) in bfloat16 with float32 masters as rank 0 of 32 in groups of 8. Collectives do nothing (torch's fake process group), so
that no time of communication is measured and losses mean nothing; what is real is what lies in the device's memory: after the
second step of AdamW, with gradients, against the closed formula of :mod:`strategies.paro.volume`, and at most within a step.
Codes for which the GPU has no room are reported as such. Without ``--device cuda`` the same runs with a small network on the
CPU, where states are counted by the engine alone, and the result is not kept.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.record import Record
from benchmarks.tables import Table
from strategies.paro import CODES, Collectives, PaROEngine, Partition, RankGrid, StatePrecision
from strategies.paro.volume import memory
from zoo.ling import LingConfig, LingForCausalLM

WORLD_SIZE, GROUP_SIZE = 32, 8
LARGE = LingConfig(
    vocab_size=32000, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, num_experts=1,
    num_experts_per_tok=1, num_shared_experts=0, moe_intermediate_size=8, intermediate_size=5504, first_k_dense_replace=24,
    max_position_embeddings=4096, pad_token_id=None, eos_token_id=None,
)  # fmt: skip
SMALL = LARGE.replace(
    vocab_size=256, hidden_size=64, num_hidden_layers=3, first_k_dense_replace=3, num_attention_heads=2,
    num_key_value_heads=2, intermediate_size=192,
)  # fmt: skip


def measure(record: Record, code: str, config: LingConfig, device: str, batch: tuple[int, int]) -> None:
    """Add the row of a code."""
    gc.collect()
    gpu = device == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    try:
        with torch.device(device):
            network = LingForCausalLM(config).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        comm = Collectives(RankGrid(GROUP_SIZE, device), "two_phase")
        engine = PaROEngine(
            network, optimizer, Partition.of(code), comm, precision=StatePrecision("bfloat16", "bfloat16", "bfloat16")
        )
        del network
        ids = torch.zeros(batch, dtype=torch.long, device=device)
        for _ in range(2):
            engine.begin_forward()
            engine.module(ids, labels=ids, loss_chunk=4096).loss.backward()
            engine.finish_backward()
            optimizer.step()
            engine.sync_parameters()
            held = engine.memory()  # with gradients
            at_rest = torch.cuda.memory_allocated() - before if gpu else sum(held.values())
            optimizer.zero_grad()
        psi = sum(unit.size for unit in engine.units)
        expected = memory(Partition.of(code), n=WORLD_SIZE, m=GROUP_SIZE, psi=psi, bytes_p=2, bytes_g=4, bytes_optimizer=12)
        # Gradients of masters are float32 and as finely cut as these when a step ends.
        gradients = memory(Partition.of(code[0] + code[2] * 2), n=WORLD_SIZE, m=GROUP_SIZE, psi=psi, bytes_g=4).gradients
        formula = expected.parameters + expected.optimizer + gradients
        peak = torch.cuda.max_memory_allocated() - before if gpu else None
        record.row(code=code, at_rest_mb=at_rest / 1e6, counted_mb=sum(held.values()) / 1e6, formula_mb=formula / 1e6,
                   off_formula=at_rest / formula - 1, peak_mb=None if peak is None else peak / 1e6)  # fmt: skip
        engine.close(restore=False)
    except torch.cuda.OutOfMemoryError:
        record.row(code=code, no_room=True)


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paro_memory", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--codes", nargs="+", choices=CODES, default=list(CODES))
    parser.add_argument("--smoke", action="store_true", help="the result is not kept")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here.")
    columns = ["at_rest_mb", "counted_mb", "formula_mb", "off_formula", "peak_mb"]
    record = Record(
        "paro_memory_gpu" if gpu else "paro_memory_cpu",
        seeds=[0],
        smoke=options.smoke or not gpu,
        tables=[Table("MB of rank 0 of 32 in groups of 8, after a step of AdamW", "code", columns, digits=2)],
    )
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    try:
        config, batch = (LARGE, (1, 2048)) if gpu else (SMALL, (1, 16))
        for code in options.codes:
            measure(record, code, config, options.device, batch)
    finally:
        dist.destroy_process_group()
    return record.save()


if __name__ == "__main__":
    main()
