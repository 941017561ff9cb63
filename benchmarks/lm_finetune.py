"""Fine-tuning of a language model: ours against the library's ``Trainer`` and TRL's, on the same batches in the same order.

``python -m benchmarks.lm_finetune`` tunes SmolLM2-135M-Instruct (the asset ``smollm2-135m``, float32) on conversations of drawn
lengths, all weights and low-rank adapters, with AdamW and no schedule. All arms get the very same batches from the DataModule
`SFT`; TRL's ``SFTTrainer`` takes part where it is installed (``pip install trl datasets``). First 20 steps of each are compared
loss by loss; then short runs of all take turns, and the figure is the median over steps of the paired ratio of tokens a second.
Packing is compared with padding on conversations whose lengths spread (log-normal), by labels a second. Peak memory is that of
a fresh process for each arm.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import SFT
from zoo.lm import CausalLM, HFBackbone, LoRA

SOURCE = "smollm2-135m"
OURS, LIBRARY, TRL = "ours", "library's Trainer", "TRL's SFTTrainer"
TUNINGS = ("full", "lora")
SEQ_LEN, SPREAD_LEN, BATCH, RATE = 128, 512, 4, 1e-4
SMOKE = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip


def conversations(path: Path, count: int, medians: tuple[int, int], spread: float, seed: int = 0) -> Path:
    """Write conversations of random letters with log-normal lengths: median characters of question and answer."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(count):
        texts = []
        for median in medians:
            length = round(median * math.exp(spread * float(torch.randn((), generator=generator))))
            letters = torch.randint(97, 123, (max(length, 4),), generator=generator)
            texts.append(bytes(letters.tolist()).decode())
        messages = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


def batches_of(path: Path, smoke: bool, seq_len: int, packing: bool) -> list[dict[str, Tensor]]:
    """Batches of a file, in one order."""
    tokenizer = {"tokenizer": "byte", "template": "ling"} if smoke else {"tokenizer": SOURCE, "template": "tokenizer"}
    seq_len = SPREAD_LEN if smoke else seq_len  # bytes are many
    data = SFT(
        path=path, val_fraction=0.0, seq_len=seq_len, packing=packing, too_long="skip", batch_size=BATCH, seed=0, **tokenizer
    )  # type: ignore[arg-type]
    data.setup("fit")
    return list(data.train_dataloader())


def backbone(smoke: bool, tuning: str, folder: str) -> HFBackbone:
    """The model, the same weights each time; a folder in Hugging Face's layout is read faster than a GGUF file."""
    torch.manual_seed(0)
    kept = Path(folder) / SOURCE
    if not smoke and not kept.exists():
        HFBackbone(SOURCE).save_pretrained(kept)
    return HFBackbone(SMOKE if smoke else str(kept), tuning=tuning, lora=LoRA())  # type: ignore[arg-type]


class Times(Callback):
    """Losses and seconds of steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        """Keep seconds and loss."""
        self.seconds.append(time.perf_counter() - self.begin)
        self.losses.append(float(module.last_losses["ce"]))


def ours(model: HFBackbone, batches: list[dict[str, Tensor]], folder: str) -> tuple[list[float], list[float]]:
    """Losses and seconds of each step with `CausalLM`."""
    module = CausalLM(model, optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0))
    times = Times()
    Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[times], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=folder,
    ).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # fmt: skip
    return times.losses, times.seconds


def library(
    model: HFBackbone, batches: list[dict[str, Tensor]], folder: str, trl: bool = False
) -> tuple[list[float], list[float]]:
    """The same with the library's Trainer, or TRL's, on its own model."""
    from transformers import Trainer as LibraryTrainer
    from transformers import TrainerCallback, TrainingArguments

    names = ("input_ids", "attention_mask", "position_ids", "labels")
    rows = [{name: batch[name] for name in names if name in batch} for batch in batches]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)

    base: Any = LibraryTrainer
    make: Any = TrainingArguments
    more: dict[str, Any] = {}
    if trl:
        from trl import SFTConfig, SFTTrainer

        base, make = SFTTrainer, SFTConfig
        more = {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
            "gradient_checkpointing": False,
            "bf16": False,
        }

    class InOrder(base):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)  # type: ignore[arg-type]

    arguments = make(
        output_dir=folder, per_device_train_batch_size=1, num_train_epochs=1, learning_rate=RATE, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, dataloader_num_workers=0, optim="adamw_torch", **more,
    )  # fmt: skip
    dataset: Any = rows
    if trl:  # the numbers of the batches, since it takes a table
        from datasets import Dataset

        dataset = Dataset.from_dict({"number": list(range(len(rows)))})
    trainer = InOrder(
        model=model._peft or model.network, args=arguments, train_dataset=dataset, callbacks=[Clock()],
        data_collator=lambda found: rows[found[0]["number"]] if trl else found[0],
        **({"processing_class": model.tokenizer} if trl else {}),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seconds


ARMS = {OURS: ours, LIBRARY: library}
if find_spec("trl") and find_spec("datasets"):
    ARMS[TRL] = partial(library, trl=True)


def _peak(queue: Any, arm: str, smoke: bool, tuning: str, batches: list[dict[str, Tensor]], folder: str) -> None:
    ARMS[arm](backbone(smoke, tuning, folder), batches, folder)
    status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak, where that is larger
    queue.put(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def peak_mib(arm: str, smoke: bool, tuning: str, batches: list[dict[str, Tensor]], folder: str) -> float:
    """Largest resident memory of a process of its own, MiB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(queue, arm, smoke, tuning, batches, folder))
    process.start()
    peak = float(queue.get())
    process.join()
    return peak


def measure(record: Record, smoke: bool, steps: int, repetitions: int, folder: str) -> None:
    """Losses, speed and memory of both arms and tunings; packing against padding."""
    even = conversations(Path(folder) / "even.jsonl", BATCH * steps, (20, 40), 0.3)
    whole = batches_of(even, smoke, SEQ_LEN, packing=False)[:steps]
    arms = {arm: run for arm, run in ARMS.items() if arm != TRL or not smoke}  # which needs a tokenizer beside the model
    differences, ratios = [], []
    for tuning in TUNINGS:
        losses = {arm: run(backbone(smoke, tuning, folder), whole, folder)[0] for arm, run in arms.items()}
        others = [arm for arm in arms if arm != OURS]
        found: dict[str, list[float]] = {arm: [] for arm in others}
        for number in range(repetitions):
            order = list(arms) if number % 2 else list(reversed(arms))
            seconds = {arm: arms[arm](backbone(smoke, tuning, folder), whole[:5], folder)[1] for arm in order}
            for arm in others:
                found[arm] += [b / a for a, b in zip(seconds[OURS][1:], seconds[arm][1:], strict=True)]
        for arm in others:
            differences.append(max(abs(a - b) for a, b in zip(losses[OURS], losses[arm], strict=True)))
            ratios.append(statistics.median(found[arm]))
            where = f"{tuning}, {arm}"
            record.row(against=where, largest_difference_of_losses=differences[-1], speed_over_it=ratios[-1])
        for arm in arms:
            record.row(arm=arm, peak_tuning=tuning, peak_mib=peak_mib(arm, smoke, tuning, whole[:2], folder))
    spread = conversations(Path(folder) / "spread.jsonl", BATCH * steps, (60, 120), 1.0)
    speeds = {}
    for packing in (False, True):
        batches = batches_of(spread, smoke, SPREAD_LEN, packing)
        labels = [int((batch["labels"] != -100).sum()) for batch in batches]
        seconds = ours(backbone(smoke, "lora", folder), batches, folder)[1]
        speeds[packing] = sum(labels[1:]) / sum(seconds[1:])
        record.row(layout="packed" if packing else "padded", labels_a_second=speeds[packing])
    record.measure("largest_difference_of_losses", max(differences))
    record.measure("speed_over_library", min(ratios))
    record.measure("packed_over_padded", speeds[True] / speeds[False])


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm_finetune", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps whose losses are compared")
    parser.add_argument("--repetitions", type=int, default=5, help="short runs of each arm")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; the result is not kept")
    options = parser.parse_args(arguments)
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    record = Record(
        "lm_finetune",
        seeds=[0],
        smoke=options.smoke,
        tables=[
            Table("Fine-tuning against other trainers", "against", ["largest_difference_of_losses", "speed_over_it"], digits=6),
            Table("Peak memory, MiB", "arm", ["peak_mib"], columns="peak_tuning"),
            Table("Packing of conversations of spread lengths", "layout", ["labels_a_second"]),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        steps, repetitions = (6, 1) if options.smoke else (options.steps, options.repetitions)
        measure(record, options.smoke, steps, repetitions, folder)
    return record.save()


if __name__ == "__main__":
    main()
