"""SmolLM2-135M-Instruct tuned by the commands of the card: on conversations about films, and to call tools.

``python -m benchmarks.lm_tuning`` types ``zoo fit -c lm/smollm2_sft`` on the files of ``examples/make_chats.py``, whole and once
more with a SIGKILL on the way, loads the adapter by peft alone, and types ``zoo fit -c lm/smollm2_tools``. The losses and the
exact matches of calls are those of held-out films, before (``zoo validate`` of the model as it comes) and after.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.commands import column, run, run_with_kill, zoo
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules.assets.fetch import fetch
from examples import make_chats
from zoo.lm import CausalLM

CHATS, TOOLS = "lm/smollm2_sft", "lm/smollm2_tools"
SOURCE = "smollm2-135m"


def peft_difference(checkpoint: Path, folder: Path) -> float:
    """Largest difference of logits between a run's checkpoint and its adapter as peft alone loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = CausalLM.load_from_checkpoint(checkpoint).eval()
    model.backbone.save_pretrained(folder)  # type: ignore[operator]
    files = fetch(SOURCE)
    name = next(files.glob("*.gguf")).name
    base = AutoModelForCausalLM.from_pretrained(files, gguf_file=name, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    ids_1T = torch.tensor([model.backbone.tokenizer("The film Toy Story was released in").input_ids])
    with torch.no_grad():
        return float((model.backbone.logits(model.backbone(ids_1T)) - theirs(input_ids=ids_1T).logits).abs().max())


def chats(record: Record, folder: Path, steps: int) -> None:
    """Tuning on conversations: losses, minutes, a killed run, the adapter."""
    make_chats.main(folder=str(folder))
    data = ["--data.path", str(folder / "chats.jsonl"), "--data.val_path", str(folder / "chats_held_out.jsonl")]
    fit = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps), *data]
    before, whole, cut = folder / "before", folder / "whole", folder / "cut"
    run(zoo("validate", CHATS, before, *data))
    seconds = run(zoo("fit", CHATS, whole, *fit))
    died = run_with_kill(zoo("fit", CHATS, cut, "--ckpt_path", "last", *fit), cut, min(30, steps - 5))
    pairs = zip(column(whole, "train/loss"), column(cut, "train/loss"), strict=True)
    difference = max(abs(a - b) if (step, other) == (step, step) else float("inf") for (step, a), (other, b) in pairs)
    (_, first), (_, last) = column(before, "val/loss")[-1], column(whole, "val/loss")[-1]
    adapter = peft_difference(whole / "checkpoints" / "last.ckpt", folder / "adapter")
    record.row(run="conversations on films", loss_before=first, loss_after=last, minutes=seconds / 60)
    record.row(killed_at=died, loss_difference=difference, peft_difference=adapter)
    record.measure("fall_of_held_out_loss", first - last)
    record.measure("minutes", seconds / 60)
    record.measure("difference_after_sigkill", difference)
    record.measure("difference_from_peft", adapter)


def tools(record: Record, folder: Path, steps: int) -> None:
    """Tuning on calls of tools: loss and exact matches."""
    before, after = folder / "tools_before", folder / "tools_after"
    run(zoo("validate", TOOLS, before))
    seconds = run(zoo("fit", TOOLS, after, "--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)))
    found = {}
    for name, place in (("before", before), ("after", after)):
        found[f"loss_{name}"] = column(place, "val/loss")[-1][1]
        found[f"exact_{name}"] = column(place, "val/calls/exact")[-1][1]
    record.row(run="calls of tools", minutes=seconds / 60, **found)


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm_tuning", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps on conversations")
    parser.add_argument("--tool-steps", type=int, default=80, help="steps on calls of tools")
    parser.add_argument("--smoke", action="store_true", help="a few steps; the result is not kept")
    options = parser.parse_args(arguments)
    steps, tool_steps = (12, 2) if options.smoke else (options.steps, options.tool_steps)
    values = ["loss_before", "loss_after", "exact_before", "exact_after", "minutes"]
    record = Record(
        "lm_tuning",
        seeds=[0],
        smoke=options.smoke,
        tables=[
            Table("SmolLM2-135M-Instruct, low-rank adapters, held-out films", "run", values),
            Table("A run that is killed and continued; its adapter in peft", "killed_at", ["loss_difference", "peft_difference"]),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        chats(record, Path(folder), steps)
        tools(record, Path(folder), tool_steps)
    return record.save()


if __name__ == "__main__":
    main()
