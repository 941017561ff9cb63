"""Batch size and learning rate for an amount of compute.

Source: "Every FLOP Counts", arXiv 2503.05139, section 3.3 and figure 12, whose legends give the numbers.
"""

from typing import NamedTuple

from zoo.ling.config import LingConfig

__all__ = ["Optimum", "compute_of", "optimal"]


class Optimum(NamedTuple):
    """The best hyperparameters for an amount of compute.

    Attributes:
        batch_tokens: tokens of a batch.
        lr: peak learning rate.
    """

    batch_tokens: float
    lr: float


def optimal(compute: float) -> Optimum:
    """Fitted optimum ``0.2008 C^0.3447`` tokens and ``1.5552 C^-0.1579``.

    The fit used runs of 1e18 to 6e20 FLOPs; beyond them it is an extrapolation, which at Ling-Plus (1.56e24) gives 4.4e7 tokens
    and 2.35e-4 where 3.67e7 and 2.4e-4 were used. It depends neither on the share of active experts (4.6 to 12.1 %) nor on the
    router's loss coefficients. What experts save: a dense model needs about 3 times this compute for the same loss at 1e21
    FLOPs, and more than 3.5 times at 1e24 (section 3.3.2, figure 13).

    Args:
        compute: C, training FLOPs without embedding and head, see `compute_of`.

    Raises:
        ValueError: no compute.

    Example:
        >>> found = optimal(1e20)
        >>> f"{found.batch_tokens:.3e} tokens, lr {found.lr:.3e}"
        '1.573e+06 tokens, lr 1.081e-03'
    """
    if not compute > 0:
        raise ValueError(f"optimal: compute={compute} FLOPs must be above 0.")
    return Optimum(0.2008 * compute**0.3447, 1.5552 * compute**-0.1579)


def compute_of(config: LingConfig, tokens: float, seq_len: int = 0) -> float:
    """Training FLOPs C without embedding and head: 6 for each active parameter and token.

    Args:
        config: the architecture.
        tokens: tokens of the training.
        seq_len: length of the sequences, whose causal attention is then counted too; 0: it is not.

    Raises:
        ValueError: a negative number.
    """
    if tokens < 0 or seq_len < 0:
        raise ValueError(f"compute_of: tokens={tokens} and seq_len={seq_len} must not be negative.")
    head = config.vocab_size * config.hidden_size
    return tokens * (config.flops_per_token(seq_len) - 6.0 * head)
