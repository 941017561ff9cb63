"""What experts gain over dense layers: the same active width, and the same number of parameters.

``python -m benchmarks.moe_dense`` trains three kinds of `Ling` on the bytes of Python's standard library, on the same batches of
8 sequences of 256 bytes for 250 steps, from several seeds, and validates on held-out files:

* 16 experts, of which a token visits 3 beside a shared one (width 128, 4 layers);
* dense layers as wide as what is active of these: equal arithmetic for a token, but for the router;
* dense layers as wide as all experts together: about as many parameters, several times the arithmetic.

The report's gain, a third of the compute at equal loss, is one of far longer trainings (arXiv 2503.05139, figure 13: 1e21 FLOPs);
these have 1e12. So no bar belongs to it.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Text
from zoo.ling import WSD, Ling, LingConfig, preset

BATCH, LENGTH, STEPS, VAL_BATCHES, VAL_EVERY = 8, 256, 250, 64, 50
EXPERTS, DENSE, WIDE = "experts", "dense, equal active width", "dense, as wide as all experts"


def arms(smoke: bool) -> dict[str, LingConfig]:
    """What is compared."""
    experts = preset("ling_tiny").replace(num_experts_per_tok=3)
    if smoke:
        experts = experts.replace(hidden_size=16, num_hidden_layers=1)
    shared, unit, layers = experts.num_shared_experts, experts.moe_intermediate_size, experts.num_hidden_layers

    def dense(width: int) -> LingConfig:
        return experts.replace(first_k_dense_replace=layers, intermediate_size=width * unit)

    return {
        EXPERTS: experts,
        DENSE: dense(experts.num_experts_per_tok + shared),
        WIDE: dense(experts.num_experts + shared),
    }


class Clock(Callback):
    """Measures the time of training steps, without the first one, which allocates, and keeps each validation."""

    def __init__(self) -> None:
        self.bits: dict[int, float] = {}
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock (Lightning hook)."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it (Lightning hook)."""
        self.seconds.append(time.perf_counter() - self._begin)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was validated (Lightning hook)."""
        self.bits[trainer.global_step] = float(trainer.callback_metrics["val/bits_per_byte"])

    @property
    def tokens_per_second(self) -> float:
        """Bytes trained on in a second."""
        return BATCH * LENGTH * len(self.seconds[1:]) / sum(self.seconds[1:])


def run(config: LingConfig, seed: int, source: str, steps: int) -> Clock:
    """Train one arm."""
    seed_everything(seed, verbose=False)
    model = Ling(
        config,
        router_warmup_steps=20,
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=functools.partial(WSD, total_steps=steps, warmup_steps=min(20, steps // 2), halve_at=0.6),
    )
    data = Text({source: 1.0}, seq_len=LENGTH + 1, batch_size=BATCH)
    clock = Clock()
    Trainer(
        max_steps=steps, accelerator="cpu", devices=1, gradient_clip_val=1.0, val_check_interval=min(VAL_EVERY, steps),
        check_val_every_n_epoch=None, limit_val_batches=min(VAL_BATCHES, steps), num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
    ).fit(model, data)  # fmt: skip
    return clock


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_dense", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--smoke", action="store_true", help="tiny models and two steps; the result is not kept")
    options = parser.parse_args(arguments)
    seeds = [0] if options.smoke else list(range(options.seeds))
    columns = ["bits_per_byte", "over_experts", "tokens_per_second", "megaflops_per_token", "million_parameters"]
    record = Record(
        "moe_dense",
        seeds=seeds,
        smoke=options.smoke,
        tables=[Table(f"Held-out bits per byte after {STEPS} steps of {BATCH * LENGTH} bytes", "arm", columns, digits=3)],
        plots=[Plot("Held-out bits per byte", "step", "val_bits", "course")],
    )
    for seed in seeds:
        final: dict[str, float] = {}
        for arm, config in arms(options.smoke).items():
            clock = run(config, seed, "python-topics" if options.smoke else "python-stdlib", 2 if options.smoke else STEPS)
            final[arm] = clock.bits[max(clock.bits)]
            record.row(
                arm=arm,
                seed=seed,
                bits_per_byte=final[arm],
                over_experts=final[arm] - final[EXPERTS],
                tokens_per_second=clock.tokens_per_second,
                megaflops_per_token=config.flops_per_token(LENGTH) / 1e6,
                million_parameters=config.num_parameters() / 1e6,
            )
            for step, bits in clock.bits.items():
                record.row(course=arm, seed=seed, step=step, val_bits=bits)
            print(f"seed {seed}, {arm}: {final[arm]:.4f} bits per byte", flush=True)
    return record.save()


if __name__ == "__main__":
    main()
