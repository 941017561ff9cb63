"""Classes of tokens: digits and operators, and the rest."""

import functools
import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["arithmetic_tokens"]

_ARITHMETIC = re.compile(r".*\d.*|[-+*/=<>%^×÷]+")


@functools.lru_cache(maxsize=2)
def arithmetic_tokens(tokenizer: Any, vocab_size: int) -> Tensor:
    """Whether tokens hold a digit or are operators, bool (V,).

    Args:
        tokenizer: Gives the text of an id; None: no token is known.
        vocab_size: V.
    """
    known = range(0 if tokenizer is None else min(vocab_size, tokenizer.vocab_size))
    texts = [tokenizer.decode([number]).strip() for number in known] + [""] * (vocab_size - len(known))
    return torch.tensor([_ARITHMETIC.fullmatch(text) is not None for text in texts])
