"""Byte-level BPE of the shipped language models: ``rlhf-vader-sft`` (2,048 ids, `RatedSnippets`) and ``kpod-gsm-symbolic`` (1,024
ids, `Rationales`, each digit by itself).

``python -m benchmarks.train_bpe`` writes ``tokenizer.json`` into the folders of both, the same files each time. Ids 0, 1 and 2
are ``<pad>``, ``<bos>`` and ``<eos>``; the 256 bytes follow, so that any text has ids, then the merges.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from datamodules.conversations.rated_texts import read_rated_texts
from datamodules.conversations.rationale_files import CONNECTOR
from datamodules.conversations.rationales import Rationales, question_text

ZOO = Path(__file__).parent.parent / "zoo"


def train_bpe(texts: Iterable[str], vocab_size: int = 2048, digits: bool = False) -> Tokenizer:
    """Train a byte-level BPE.

    Args:
        texts: Texts to train on; their order does not matter.
        vocab_size: Number of ids, special tokens and bytes included.
        digits: Whether each digit is an id of its own, without the space before it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        parts = [pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def gsm_symbolic_texts() -> Iterable[str]:
    """Texts of the examples that ``kpod/distill_gsm_symbolic`` trains on: nothing of what it holds out."""
    data = Rationales(tokenizer="byte", template_fraction=0.09, max_length=4096)
    return [f"{question_text(text.question)} {text.rationale} {CONNECTOR} {text.answer}" for text, *_ in data.splits[0]]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_bpe", description=__doc__)
    parser.add_argument("--output", type=Path, default=ZOO, help="folder with the methods' folders")
    output = parser.parse_args(arguments).output
    for folder, tokenizer in (
        ("rlhf/weights/rlhf-vader-sft", train_bpe(rated.text for rated in read_rated_texts())),
        ("kpod/weights/kpod-gsm-symbolic", train_bpe(gsm_symbolic_texts(), 1024, digits=True)),
    ):
        path = output / folder / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path), pretty=False)
        print(f"{path}: {tokenizer.get_vocab_size()} ids")


if __name__ == "__main__":
    main()
