"""GSM-Symbolic questions with rationales, as the DataModule `Rationales` reads them: the file that ships with the package.

    pip install reasoning-gym==0.1.25
    python -m benchmarks.make_gsm_symbolic

writes ``datamodules/conversations/gsm_symbolic.jsonl.xz``, the same bytes each time: 100 items of each of the 85 templates that
the package does not list as broken. ``--items 1000 --output more.jsonl.xz`` writes more; the first ones of a template stay.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

SHIPPED = Path(__file__).parent.parent / "datamodules/conversations/gsm_symbolic.jsonl.xz"
LONG_FLOAT = re.compile(r"\d\.\d{4}")
ATTEMPTS = 100
"""Draws for each item that is wanted, at most."""


def plain_number(text: str) -> str:
    """A number without the zeros behind its decimal point."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def items(template: int, generate: Callable[[Random, float], dict[str, Any]], count: int, seen: set[str]) -> list[dict[str, str]]:
    """Items of a template, each drawn with a seed of its own.

    Args:
        template: Number of the template.
        generate: Generator of the template.
        count: Number of items.
        seen: Questions that are taken; those of these items are added.

    Raises:
        ValueError: The template has too few questions, or a rationale does not end with the answer.
    """
    found: list[dict[str, str]] = []
    for attempt in range(ATTEMPTS * count):
        example = generate(Random(f"gsm-symbolic {template} {attempt}"), 1.0)
        question, whole = example["question"].strip(), example["metadata"]["answer_cot"].strip()
        rationale, mark, last = whole.rpartition("\n#### ")
        answer = plain_number(example["answer"])
        if not mark or plain_number(last) != answer:
            raise ValueError(f"The rationale of template {template} ends with {last!r}, not with the answer {answer}.")
        if question in seen or LONG_FLOAT.search(question + whole):
            continue
        seen.add(question)
        found.append({"template": str(template), "question": question, "rationale": rationale.strip(), "answer": answer})
        if len(found) == count:
            return found
    raise ValueError(f"Template {template} gives only {len(found)} of {count} items: ask for fewer.")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic as package

    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_gsm_symbolic", description=__doc__)
    parser.add_argument("--items", type=int, default=100, help="items of each template")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="file to write")
    options = parser.parse_args(arguments)
    generators = package.GSMSymbolicDataset(package.GSMSymbolicDatasetConfig(seed=0)).generators
    seen: set[str] = set()
    rows = [row for number in sorted(set(package.tasks_ok)) for row in items(number, generators[number], options.items, seen)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    options.output.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{options.output}: {len(rows)} items, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
