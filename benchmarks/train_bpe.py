"""Byte-level BPE of 2,048 ids, trained on the texts of `RatedSnippets`: the tokenizer of the shipped ``rlhf-vader-sft``.

``python -m benchmarks.train_bpe`` writes ``zoo/rlhf/weights/rlhf-vader-sft/tokenizer.json``, the same file each time. Ids 0, 1
and 2 are ``<pad>``, ``<bos>`` and ``<eos>``; the 256 bytes follow, so that any text has ids, then the merges.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from datamodules.conversations.rated_texts import read_rated_texts

SHIPPED = Path(__file__).parent.parent / "zoo/rlhf/weights/rlhf-vader-sft/tokenizer.json"


def train_bpe(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """Train a byte-level BPE.

    Args:
        texts: Texts to train on; their order does not matter.
        vocab_size: Number of ids, special tokens and bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_bpe", description=__doc__)
    parser.add_argument("--output", type=Path, default=SHIPPED, help="file to write")
    options = parser.parse_args(arguments)
    tokenizer = train_bpe(rated.text for rated in read_rated_texts())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.output), pretty=False)
    print(f"{options.output}: {tokenizer.get_vocab_size()} ids")


if __name__ == "__main__":
    main()
