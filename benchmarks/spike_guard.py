"""How much of the damage of corrupted batches the spike guard undoes, and what it costs.

``python -m benchmarks.spike_guard`` trains a small `Ling` on bytes (width 64, 2 layers, 2 of 8 experts, 16 sequences of 128
bytes, 240 steps) on the sources of Python's standard library, a twentieth of the files held out, from several seeds. In the
planted arms, the batches of 12 steps in a row are corrupted: in turns random bytes, and the bytes of each sequence in random
order. All arms of a seed have the same initial weights and, up to the first skipped step, the same batches. The result
holds validation bits per byte along the training of

* the clean run, without and with the guard: skipped and reduced steps there are false alarms, and the time inside the guard is
  measured by its own clock;
* the planted run, without and with the guard. Undone is the share ``(unguarded - guarded) / (unguarded - clean)`` of the damage
  at the end, for the guard with its default patience of 12, which lets all of these batches be skipped, to which the bar belongs;
  and, beside it, for a patience of 3, which takes the rest with a tenth of the learning rate and lets them into its averages.

Claim: arXiv 2503.05139, sections 3.4.4 and 6.1, where no figure is given.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo import ZooModule
from zoo.callbacks import SpikeGuard
from zoo.ling import Ling, preset

# B sequences of a batch, T bytes of a sequence, V ids, D width

VOCAB = 264
"""Bytes, three special ids, rounded up to a multiple of eight."""
CLEAN, CLEAN_GUARDED = "clean", "clean, guarded"
PLANTED, PLANTED_GUARDED, PLANTED_IMPATIENT = "planted", "planted, guarded", "planted, guarded, patience 3"


@dataclass(frozen=True)
class Sizes:
    """What is trained, and for how long.

    Attributes:
        width: Width of the model.
        layers: Its layers.
        batch: Sequences of a batch.
        length: Bytes of a sequence.
        steps: Optimizer steps.
        planted: The steps whose batches are corrupted.
        warmup: Steps before the guard takes anything finite for an outlier.
        val_every: Steps between two validations.
        val_sequences: Held-out sequences.
    """

    width: int = 64
    layers: int = 2
    batch: int = 16
    length: int = 128
    steps: int = 240
    planted: range = range(120, 132)
    warmup: int = 100
    val_every: int = 20
    val_sequences: int = 256


FULL = Sizes()
SMOKE = Sizes(width=16, layers=1, batch=4, length=64, steps=90, planted=range(70, 74), warmup=60, val_every=15, val_sequences=8)


class Subject(NamedTuple):
    """A language model under test.

    Attributes:
        module: What is trained.
        logits: Its logits (B, T, V) for ids (B, T).
    """

    module: LightningModule
    logits: Callable[[Tensor], Tensor]


def language_model(sizes: Sizes, smoke: bool) -> Subject:
    """A new model with random weights from torch's generator; trials take a smaller kind."""
    if smoke:
        tiny = Bigrams(sizes.width)
        return Subject(tiny, tiny)
    config = preset("ling_tiny").replace(
        hidden_size=sizes.width, num_hidden_layers=sizes.layers, num_experts=8, num_experts_per_tok=2, initializer_range=0.1
    )
    ling = Ling(config, router_warmup_steps=20, optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95)))
    return Subject(ling, lambda ids_BT: ling.network(ids_BT).logits)


class Bigrams(ZooModule):
    """Predicts a byte from the one before: enough to try the benchmark out."""

    def __init__(self, width: int) -> None:
        super().__init__(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-2))
        self.network = nn.Sequential(nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return self.network(ids_BT)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy, in nats."""
        nats_BT = nats(self(batch["input_ids"]), batch["labels"])
        self.last_losses = {"ce": nats_BT.mean().detach(), "ce_per_sample": nats_BT.mean(1).detach()}
        return nats_BT.mean()


def nats(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropies (B, T - 1) of each byte but the first."""
    return cross_entropy(logits_BTV[:, :-1].transpose(1, 2).float(), labels_BT[:, 1:], reduction="none")


def read_sources(folder: Path) -> dict[str, bytes]:
    """The library's source files by their path in it, without its tests and what was installed into it."""
    leave_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*.py")))
    return {path.as_posix(): (folder / path).read_bytes() for path in paths if not leave_out & set(path.parts)}


def split(sources: dict[str, bytes]) -> tuple[Tensor, Tensor]:
    """Bytes (N,) to train on and held out, a twentieth of the files, told by a hash of their path."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path, text in sources.items():
        parts[int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20 == 0].append(text)
    train, val = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train, val


class Windows:
    """Batches of random windows of a text, some corrupted; samples can be put again.

    Args:
        text: Bytes (N,).
        sizes: Sizes of the batches.
        seed: Seed of the windows and of the corruption.
        planted: Numbers of the batches that are corrupted, whichever windows they hold.
    """

    def __init__(self, text: Tensor, sizes: Sizes, seed: int, planted: Sequence[int]) -> None:
        self.text, self.sizes, self.seed, self.planted = text, sizes, seed, planted
        self.batch_size = sizes.batch
        count = sizes.batch * sizes.steps
        self.order = torch.randint(len(text) - sizes.length, (count,), generator=_generator(seed, "order")).tolist()
        self._batches = 0

    def __len__(self) -> int:
        return self.sizes.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in range(self.sizes.steps):
            self._batches = number + 1
            index_B = torch.tensor(self.order[number * self.batch_size : self._batches * self.batch_size])
            ids_BT = self.text[index_B[:, None] + torch.arange(self.sizes.length)].long()
            if number in self.planted:
                ids_BT = corrupted(ids_BT, number, _generator(self.seed, f"corruption {number}"))
            yield {"input_ids": ids_BT, "labels": ids_BT, "attention_mask": torch.ones_like(ids_BT), "index": index_B}

    def requeue(self, sample_ids: list[int], window: int, seed_key: int) -> None:
        """Put windows among those of the next batches; what follows moves back."""
        begin = self._batches * self.batch_size
        end = min(begin + window * self.batch_size, len(self.order))
        places = torch.randperm(end - begin, generator=_generator(self.seed, f"retry {seed_key}"))[: len(sample_ids)]
        for place, sample in zip(sorted(places.tolist()), sample_ids, strict=False):
            self.order.insert(begin + place, sample)


def corrupted(ids_BT: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Random bytes for even numbers of the batch, each sequence in random order for odd ones."""
    if number % 2 == 0:
        return torch.randint(256, ids_BT.shape, generator=generator)
    return ids_BT.gather(1, torch.rand(ids_BT.shape, generator=generator).argsort(1))


def _generator(seed: int, purpose: str) -> torch.Generator:
    key = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


class Course(Callback):
    """Validates along the way and measures the time of training, without validation."""

    def __init__(self, subject: Subject, ids_ST: Tensor, every: int) -> None:
        self.subject, self.ids_ST, self.every = subject, ids_ST, every
        self.bits: dict[int, float] = {}
        self.seconds = 0.0
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock (Lightning hook)."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock, and validate if it is time (Lightning hook)."""
        self.seconds += time.perf_counter() - self._begin
        if trainer.global_step % self.every == 0:
            self.bits[trainer.global_step] = bits_per_byte(self.subject, self.ids_ST)


@torch.no_grad()
def bits_per_byte(subject: Subject, ids_ST: Tensor) -> float:
    """Mean cross-entropy of held-out sequences, in bits."""
    subject.module.eval()
    losses = [nats(subject.logits(ids_BT), ids_BT) for ids_BT in ids_ST.split(64)]
    subject.module.train()
    return torch.cat(losses).mean().item() / math.log(2)


class Outcome(NamedTuple):
    """What one run gave.

    Attributes:
        bits: Validation bits per byte by step.
        seconds: Time of training.
        guard: Its guard, if it had one.
    """

    bits: dict[int, float]
    seconds: float
    guard: SpikeGuard | None

    @property
    def final(self) -> float:
        """Bits per byte at the end."""
        return self.bits[max(self.bits)]


def run(
    sizes: Sizes, seed: int, text: tuple[Tensor, Tensor], planted: Sequence[int], patience: int | None, smoke: bool
) -> Outcome:
    """Train one arm; ``patience`` None is without the guard."""
    torch.manual_seed(seed)
    subject = language_model(sizes, smoke)
    guard = None if patience is None else SpikeGuard(alpha=0.05, warmup=sizes.warmup, patience=patience)
    starts = torch.linspace(0, len(text[1]) - sizes.length, sizes.val_sequences).long()
    course = Course(subject, text[1][starts[:, None] + torch.arange(sizes.length)].long(), sizes.val_every)
    trainer = Trainer(
        max_steps=sizes.steps, accelerator="cpu", gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*([guard] if guard else []), course],
    )  # fmt: skip
    trainer.fit(subject.module, Windows(text[0], sizes, seed, planted))
    return Outcome(course.bits, course.seconds, guard)


def measure(record: Record, sizes: Sizes, seeds: Sequence[int], text: tuple[Tensor, Tensor], smoke: bool) -> None:
    """Train all arms of all seeds; add their rows and the bars."""
    many = len(sizes.planted)
    arms: dict[str, tuple[Sequence[int], int | None]] = {
        CLEAN: ((), None),
        CLEAN_GUARDED: ((), many),
        PLANTED: (sizes.planted, None),
        PLANTED_GUARDED: (sizes.planted, many),
        PLANTED_IMPATIENT: (sizes.planted, 3),
    }
    undone, alarms, shares = [], [], []
    for seed in seeds:
        outcomes = {}
        for arm, (planted, patience) in arms.items():
            outcome = outcomes[arm] = run(sizes, seed, text, planted, patience, smoke)
            guard = outcome.guard
            record.row(
                arm=arm,
                seed=seed,
                bits_per_byte=outcome.final,
                skipped=guard.skipped if guard else None,
                reduced=guard.reduced if guard else None,
                milliseconds_per_step=1000 * outcome.seconds / sizes.steps,
                time_inside=guard.time_inside / outcome.seconds if guard else None,
            )
            for step, bits in outcome.bits.items():
                record.row(course=arm, seed=seed, step=step, val_bits=bits)
            print(f"seed {seed}, {arm}: {outcome.final:.4f} bits per byte", flush=True)
        damage = outcomes[PLANTED].final - outcomes[CLEAN].final
        shares_undone = {
            arm: (outcomes[PLANTED].final - outcomes[arm].final) / damage for arm in (PLANTED_GUARDED, PLANTED_IMPATIENT)
        }
        record.row(
            damaged_seed=seed,
            damage=damage,
            undone=shares_undone[PLANTED_GUARDED],
            undone_with_patience_3=shares_undone[PLANTED_IMPATIENT],
        )
        undone.append(shares_undone[PLANTED_GUARDED])
        clean = outcomes[CLEAN_GUARDED]
        assert clean.guard is not None
        alarms.append(clean.guard.skipped + clean.guard.reduced)
        shares.append(clean.guard.time_inside / clean.seconds)
    record.measure("damage_undone", statistics.median(undone))
    record.measure("skips_on_clean_run", max(alarms))
    record.measure("time_inside_guard", max(shares))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spike_guard", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few steps; the result is not kept")
    options = parser.parse_args(arguments)
    sizes, seeds = (SMOKE, [0]) if options.smoke else (FULL, list(range(options.seeds)))
    text = split(read_sources(Path(sysconfig.get_paths()["stdlib"])))
    tables = [
        Table(f"Validation bits per byte after {sizes.steps} steps, {len(sizes.planted)} corrupted batches", "arm",
              ["bits_per_byte", "skipped", "reduced", "milliseconds_per_step", "time_inside"], digits=4),
        Table("Damage in bits per byte, and the share of it that is undone", "damaged_seed",
              ["damage", "undone", "undone_with_patience_3"], digits=3),
    ]  # fmt: skip
    plots = [Plot("Validation bits per byte", "step", "val_bits", "course", reference=CLEAN)]
    record = Record("spike_guard", seeds=seeds, smoke=options.smoke, tables=tables, plots=plots)
    record.row(corpus="Python standard library", train_bytes=len(text[0]), val_bytes=len(text[1]), sha256=_digest(text))
    measure(record, sizes, seeds, text, options.smoke)
    return record.save()


def _digest(text: tuple[Tensor, Tensor]) -> str:
    """Beginning of the SHA-256 of both parts: other versions of Python have another library."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in text)).hexdigest()[:16]


if __name__ == "__main__":
    main()
