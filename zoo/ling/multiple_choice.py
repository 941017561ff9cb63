"""Log-likelihoods of continuations after contexts that they share: what multiple choice is decided by.

Shape suffixes: N pairs, C contexts of a pass, R rows (continuations) of a pass, S tokens of the longest context but its last,
T tokens of the longest continuation, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zoo.ling.cache import KVCache
from zoo.ling.network import LingForCausalLM
from zoo.nn.evaluation_mode import evaluation_mode

__all__ = ["Encodes", "Likelihoods", "encode_pair", "loglikelihoods"]

Ids = Sequence[int]


class Encodes(Protocol):
    """A tokenizer, as far as it is needed here."""

    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with no marks added."""


class Likelihoods(NamedTuple):
    """How likely continuations are.

    Attributes:
        logp_N: float64, log-likelihood of each continuation in nats, the sum over its tokens.
        greedy_N: bool, whether greedy decoding would produce it.
    """

    logp_N: Tensor
    greedy_N: Tensor


def encode_pair(tokenizer: Encodes, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it.

    The two are encoded as one text and cut where the context ends. Where a token would reach over the cut, spaces at the end of
    the context are counted as the continuation's, and if that is not enough the two are encoded apart. An empty context is the
    end of a document before.

    Args:
        tokenizer: makes ids of text.
        context: what is given; may be empty.
        continuation: what is scored.

    Raises:
        ValueError: the continuation has no tokens.
    """
    if not continuation:
        raise ValueError(f"The continuation of {context[-40:]!r} is empty: there is nothing to score.")
    if not context:
        return [tokenizer.eos_id], tokenizer.encode(continuation)
    whole = tokenizer.encode(context + continuation)
    for given in dict.fromkeys((context, context.rstrip(" "))):
        ids = tokenizer.encode(given)
        if ids and whole[: len(ids)] == ids and len(whole) > len(ids):
            return ids, whole[len(ids) :]
    return tokenizer.encode(context), tokenizer.encode(continuation)


@torch.no_grad()
def loglikelihoods(
    network: LingForCausalLM,
    pairs: Sequence[tuple[Ids, Ids]],
    batch_size: int = 16,
    logit_tokens: int = 8192,
) -> Likelihoods:
    """Log-likelihood of each continuation after its context.

    A context that several continuations share is computed once: contexts of a pass, longest first, are padded on the left and
    fill a cache, whose rows are then repeated for their continuations. The numbers do not depend on batch size and order but by
    rounding.

    Args:
        network: in any mode; it is evaluated without dropout.
        pairs: ids of contexts and continuations, at least one of each.
        batch_size: contexts of a pass. The passes are as many as different contexts over this, and each calls the network twice
            (once if all its contexts are single tokens), which matters where several processes compute together.
        logit_tokens: tokens whose logits are in memory at a time; longer continuations take more calls.

    Raises:
        ValueError: a context or a continuation without tokens, an id outside of the vocabulary, or numbers below 1.
    """
    if batch_size < 1 or logit_tokens < 1:
        raise ValueError(f"loglikelihoods: batch_size={batch_size} and logit_tokens={logit_tokens} must be at least 1.")
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"loglikelihoods: pair {number} has {len(context)} + {len(continuation)} tokens: both need some.")
        if not 0 <= min(*context, *continuation) <= max(*context, *continuation) < network.config.vocab_size:
            raise ValueError(
                f"loglikelihoods: pair {number} has an id outside of the vocabulary of {network.config.vocab_size}: take the"
                " tokenizer that belongs to the model."
            )
        rows_of.setdefault(tuple(context), []).append(number)
    contexts = sorted(rows_of, key=len, reverse=True)
    logp_N = torch.zeros(len(pairs), dtype=torch.float64)
    greedy_N = torch.zeros(len(pairs), dtype=torch.bool)
    with evaluation_mode(network):
        for start in range(0, len(contexts), batch_size):
            part = contexts[start : start + batch_size]
            numbers_R = [number for context in part for number in rows_of[context]]
            owner_R = [position for position, context in enumerate(part) for _ in rows_of[context]]
            logp_R, greedy_R = _pass(network, part, owner_R, [pairs[number][1] for number in numbers_R], logit_tokens)
            logp_N[numbers_R], greedy_N[numbers_R] = logp_R.cpu(), greedy_R.cpu()
    return Likelihoods(logp_N, greedy_N)


def _pass(
    network: LingForCausalLM, contexts: Sequence[Ids], owner_R: list[int], continuations: Sequence[Ids], logit_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log-likelihoods (R,) and whether they are greedy, of continuations whose contexts are rows ``owner_R``."""
    device = network.lm_head.weight.device
    R, S, T = len(owner_R), max(map(len, contexts)) - 1, max(map(len, continuations))
    # The last token of a context predicts the first of a continuation: it goes with these.
    prefix_CS = torch.zeros(len(contexts), S, dtype=torch.long)
    mask_CS = torch.zeros_like(prefix_CS)
    for row, context in enumerate(contexts):
        prefix_CS[row, S - len(context) + 1 :] = torch.tensor(context[:-1], dtype=torch.long)
        mask_CS[row, S - len(context) + 1 :] = 1
    ids_RT, label_RT = torch.zeros(R, T, dtype=torch.long), torch.full((R, T), -1)
    for row, (owner, continuation) in enumerate(zip(owner_R, continuations, strict=True)):
        ids_RT[row, : len(continuation)] = torch.tensor([contexts[owner][-1], *continuation[:-1]])
        label_RT[row, : len(continuation)] = torch.tensor(continuation)
    prefix_CS, mask_CS, ids_RT, label_RT = (t.to(device) for t in (prefix_CS, mask_CS, ids_RT, label_RT))
    padded = not bool(mask_CS.all())

    cache = _cache(network, R, S + T)
    if S:
        shared = _cache(network, len(contexts), S)
        network(prefix_CS, mask_CS if padded else None, cache=shared, with_logits=False)
        cache.keys[:, :, :, :S] = shared.keys[:, owner_R]
        cache.values[:, :, :, :S] = shared.values[:, owner_R]
        cache.length = S
        del shared
    mask_RU = torch.cat([mask_CS[owner_R], torch.ones_like(ids_RT)], 1) if padded else None  # U = S + T
    logp_R = torch.zeros(R, dtype=torch.float64, device=device)
    greedy_R = torch.ones(R, dtype=torch.bool, device=device)
    for columns in _segments(T, max(1, logit_tokens // R)):
        mask = None if mask_RU is None else mask_RU[:, : S + columns.stop]
        logits = network(ids_RT[:, columns], mask, cache=cache).logits
        label = label_RT[:, columns]
        counted = label >= 0
        chosen = logits.gather(-1, label.clamp(min=0)[..., None]).squeeze(-1)
        logp = chosen - logits.logsumexp(-1)
        logp_R += logp.double().masked_fill(~counted, 0.0).sum(1)
        greedy_R &= ((logits.argmax(-1) == label) | ~counted).all(1)
    return logp_R, greedy_R


def _cache(network: LingForCausalLM, rows: int, length: int) -> KVCache:
    """Room for keys and values in the type that attention computes with."""
    weight = network.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return KVCache(network.config, rows, length, dtype, weight.device)


def _segments(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
