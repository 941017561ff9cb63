"""Log-likelihoods of continuations after contexts that they share, which decide multiple choice.

Shape suffixes: N pairs, C contexts of a pass, R rows (continuations) of a pass, S tokens of the longest context but its last,
T tokens of the longest continuation, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ling.cache import KVCache
from zoo.ling.decoder import cache_dtype
from zoo.ling.network import LingNetwork
from zoo.lm.encoded_pair import Encodes, Ids, encode_pair
from zoo.nn.evaluation_mode import evaluation_mode

__all__ = ["MOST_OPTIONS", "Encodes", "Likelihoods", "encode_pair", "loglikelihoods"]

MOST_OPTIONS = 8
"""Continuations of a context for which a pass has room."""


class Likelihoods(NamedTuple):
    """Log-likelihoods of continuations.

    Attributes:
        logp_N: float64, log-likelihood of each continuation in nats, the sum over its tokens.
        greedy_N: bool, whether greedy decoding would produce it.
    """

    logp_N: Tensor
    greedy_N: Tensor


@torch.no_grad()
def loglikelihoods(
    network: LingNetwork,
    pairs: Sequence[tuple[Ids, Ids]],
    batch_size: int = 16,
    logit_tokens: int = 8192,
    agree: Callable[[int], int] | None = None,
) -> Likelihoods:
    """Log-likelihood of each continuation after its context.

    A context that several continuations share is computed once: contexts of a pass, longest first, are padded on the left and
    fill a cache, whose rows are then repeated for their continuations. The numbers do not depend on batch size and order but by
    rounding.

    Args:
        network: in any mode; it is evaluated without dropout.
        pairs: ids of contexts and continuations, at least one of each.
        batch_size: contexts of a pass, with up to `MOST_OPTIONS` continuations each, or more continuations of fewer contexts;
            where a context is a single token, continuations.
        logit_tokens: tokens whose logits are in memory at a time; longer continuations take more calls.
        agree: for a network that communicates between processes, which must call it equally often: gives the largest of
            their numbers of calls. Processes with fewer fill up with calls on a single token.

    Raises:
        ValueError: a context or a continuation without tokens, an id outside of the vocabulary, or numbers below 1.
    """
    if batch_size < 1 or logit_tokens < 1:
        raise ValueError(f"loglikelihoods: batch_size={batch_size} and logit_tokens={logit_tokens} must be at least 1.")
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"loglikelihoods: pair {number} has {len(context)} + {len(continuation)} tokens: both need some.")
        if not 0 <= min(*context, *continuation) <= max(*context, *continuation) < network.config.vocab_size:
            raise ValueError(
                f"loglikelihoods: pair {number} has an id outside of the vocabulary of {network.config.vocab_size}: take the"
                " tokenizer that belongs to the model."
            )
    scaling = network.config.rope_scaling
    passes = _passes(
        pairs,
        batch_size,
        # Beyond the trained length, dynamic scaling turns each sequence by the length of the longest one beside it.
        network.config.max_position_embeddings if scaling is not None and scaling.type == "dynamic" else None,
    )
    num_calls = sum(_num_calls(each, logit_tokens) for each in passes)
    idle_calls = 0 if agree is None else agree(num_calls) - num_calls
    logp_N = torch.zeros(len(pairs), dtype=torch.float64)
    greedy_N = torch.zeros(len(pairs), dtype=torch.bool)
    with evaluation_mode(network):
        for each in passes:
            continuations = [pairs[number][1] for number in each.numbers_R]
            logp_R, greedy_R = _pass(network, each.contexts, each.owner_R, continuations, logit_tokens)
            logp_N[each.numbers_R], greedy_N[each.numbers_R] = logp_R.cpu(), greedy_R.cpu()
        for _ in range(idle_calls):
            network(torch.zeros(1, 1, dtype=torch.long, device=network.lm_head.weight.device), with_logits=False)
    return Likelihoods(logp_N, greedy_N)


class _Plan(NamedTuple):
    """Pairs of one pass.

    Attributes:
        contexts: of the pass.
        owner_R: which of them each row continues.
        numbers_R: the pair of each row.
        num_prefix: S.
        num_tokens: T.
    """

    contexts: list[Ids]
    owner_R: list[int]
    numbers_R: list[int]
    num_prefix: int
    num_tokens: int


def _passes(pairs: Sequence[tuple[Ids, Ids]], batch_size: int, trained_length: int | None) -> list[_Plan]:
    """Pairs of like length together, those that share a context side by side.

    Args:
        pairs: contexts and continuations.
        batch_size: see `loglikelihoods`.
        trained_length: most tokens of a pass; longer pairs are computed each by itself. None: any number.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        rows_of.setdefault(tuple(context), []).append(number)
    groups: list[list[int]] = []  # pairs that take one place of a pass
    for context, numbers in rows_of.items():
        numbers.sort(key=lambda number: -len(pairs[number][1]))
        alone = len(context) == 1
        if trained_length is not None and len(context) - 1 + len(pairs[numbers[0]][1]) > trained_length:
            alone = True
        size = 1 if alone else MOST_OPTIONS
        groups += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    groups.sort(key=lambda numbers: (-len(pairs[numbers[0]][0]), -len(pairs[numbers[0]][1])))
    passes: list[list[list[int]]] = []
    longest = 0
    for group in groups:
        context, continuation = pairs[group[0]]
        new = True
        if passes and len(passes[-1]) < batch_size:
            longest_context = len(pairs[passes[-1][0][0]][0])
            together = longest_context - 1 + max(longest, len(continuation))
            new = trained_length is not None and together > trained_length
        if new:
            passes.append([])
            longest = 0
        passes[-1].append(group)
        longest = max(longest, len(continuation))
    return [_plan(pairs, [number for group in each for number in group]) for each in passes]


def _plan(pairs: Sequence[tuple[Ids, Ids]], numbers_R: list[int]) -> _Plan:
    places: dict[tuple[int, ...], int] = {}
    owner_R = [places.setdefault(tuple(pairs[number][0]), len(places)) for number in numbers_R]
    longest = max(len(pairs[number][1]) for number in numbers_R)
    return _Plan(list(places), owner_R, numbers_R, max(map(len, places)) - 1, longest)


def _num_calls(plan: _Plan, logit_tokens: int) -> int:
    """Number of network calls of a pass."""
    return (plan.num_prefix > 0) + len(list(_segments(plan.num_tokens, max(1, logit_tokens // len(plan.owner_R)))))


def _pass(
    network: LingNetwork, contexts: Sequence[Ids], owner_R: list[int], continuations: Sequence[Ids], logit_tokens: int
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


def _cache(network: LingNetwork, rows: int, length: int) -> KVCache:
    """Room for keys and values in the type that attention computes with."""
    return KVCache(network.config, rows, length, cache_dtype(network), network.lm_head.weight.device)


def _segments(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
