"""The loop of generation: prompts are continued token by token, whatever the model.

Shape suffixes: B sequences, T tokens of the prompts, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.ling.token_choice import TokenChoice

__all__ = [
    "Decoder",
    "Decodes",
    "Vocabulary",
    "check_ids",
    "check_number",
    "check_scores",
    "generate",
    "stop_tokens",
    "stream",
    "token_uniforms",
]


class Vocabulary(Protocol):
    """The ids of a model, as its configuration gives them."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """Ids that end a sequence."""

    @property
    def pad_token_id(self) -> int | None:
        """Id of padding."""


class Decoder(Protocol):
    """The passes of a model over one batch of sequences that grow together."""

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Scores (B, V) of the tokens after prompts (B, T); the mask is 0 at padding, and absent if there is none."""

    def step(self, token_B: Tensor) -> Tensor:
        """Scores (B, V) of the tokens after the newest ones (B,)."""

    def run_along(self) -> None:
        """A pass without a result, for other processes that communicate in theirs."""


class Decodes(Protocol):
    """A model that `generate` can continue prompts with."""

    @property
    def config(self) -> Vocabulary:
        """The vocabulary."""

    def decoder(self, batch_size: int, length: int, cache: Any = None, compile: bool = False) -> AbstractContextManager[Decoder]:
        """The passes for ``batch_size`` sequences of at most ``length`` tokens that are read; see `generate` for the rest."""


def stop_tokens(vocabulary: Vocabulary, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Ids that end a sequence.

    Args:
        vocabulary: The model's.
        eos_token_id: One or several ids; None: the vocabulary's own, if it has any.

    Raises:
        ValueError: If an id is outside of the vocabulary.
    """
    if eos_token_id is None:
        eos_token_id = [] if vocabulary.eos_token_id is None else vocabulary.eos_token_id
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    for token in ids:
        if not 0 <= token < vocabulary.vocab_size:
            raise ValueError(f"eos_token_id={token} is outside of the vocabulary of {vocabulary.vocab_size}.")
    return ids


def check_ids(vocabulary: Vocabulary, input_ids: Tensor) -> None:
    """Make sure that the model has an embedding for each id.

    Raises:
        ValueError: If an id is outside of the vocabulary.
    """
    low, high = input_ids.aminmax()
    if low < 0 or high >= vocabulary.vocab_size:
        wrong = int(low) if low < 0 else int(high)
        raise ValueError(
            f"The prompt holds the id {wrong}, but the model's vocabulary has the ids 0 to {vocabulary.vocab_size - 1}:"
            " was it encoded with another tokenizer?"
        )


def token_uniforms(random: SampleRandom, num_tokens: int) -> Tensor:
    """Uniform numbers of each sequence's draws, float64 (B, num_tokens); the first are the same for any number of tokens."""
    return random.uniform("token", (num_tokens,), torch.float64)


def check_scores(logits_BV: Tensor) -> None:
    """Make sure that a token can be chosen.

    Raises:
        ValueError: If scores are not finite.
    """
    if not bool(logits_BV.isfinite().all()):
        raise ValueError("The network's scores are not finite: its weights are damaged, or its type is too narrow for them.")


def check_number(max_new_tokens: int) -> None:
    """Make sure that at least one token is asked for.

    Raises:
        ValueError: If not.
    """
    if max_new_tokens < 1 or max_new_tokens != int(max_new_tokens):
        raise ValueError(f"max_new_tokens={max_new_tokens} must be a positive whole number.")


def _needed_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask as given, once both are checked; None if there is no padding."""
    if input_ids.dim() != 2 or input_ids.is_floating_point() or 0 in input_ids.shape:
        raise ValueError(
            f"generate needs input_ids as integers (B, T) with at least one token, got {input_ids.dtype} of shape"
            f" {tuple(input_ids.shape)}: begin an empty prompt with the bos or eos token."
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids of shape {tuple(input_ids.shape)}."
        )
    mask_BT = attention_mask.bool()
    if mask_BT.all():
        return None
    empty_B = ~mask_BT.any(1)
    if empty_B.any():
        raise ValueError(
            f"Prompt {int(empty_B.nonzero()[0])} of the batch is empty, it has no token: begin it with the bos or eos token."
        )
    gap_B = (mask_BT[:, :-1] & ~mask_BT[:, 1:]).any(1)
    if gap_B.any():
        raise ValueError(
            f"Row {int(gap_B.nonzero()[0])} of attention_mask has padding after a token: generate needs padding on the left only."
        )
    return attention_mask


def stream(
    model: Decodes,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    random: SampleRandom | None = None,
    cache: Any = None,
    compile: bool = False,
    agree: Callable[[bool], bool] | None = None,
) -> Iterator[Tensor]:
    """The tokens of `generate` as they come, int64 (B,) each; arguments and errors as there.

    Between two tokens the model stays in evaluation mode. With ``agree`` the stream has to be read to its end.
    """
    # What a pass gathers of sharded weights may stay with the network, and must not be unfit for training.
    run = torch.inference_mode()(_stream) if agree is None else torch.no_grad()(_stream)
    return run(
        model, input_ids, attention_mask, max_new_tokens, TokenChoice(temperature, top_k, top_p, repetition_penalty),
        eos_token_id, pad_token_id, random, cache, compile, agree,
    )  # fmt: skip


def _stream(
    model: Decodes,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    choice: TokenChoice,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    random: SampleRandom | None,
    cache: Any,
    compile: bool,
    agree: Callable[[bool], bool] | None,
) -> Iterator[Tensor]:
    if compile and agree is not None:
        raise ValueError("generate: a compiled step cannot wait for other processes (agree): leave compile out.")
    check_number(max_new_tokens)
    attention_mask = _needed_mask(input_ids, attention_mask)
    vocabulary = model.config
    check_ids(vocabulary, input_ids)
    input_ids = input_ids.long()
    eos = stop_tokens(vocabulary, eos_token_id)
    (B, T), device = input_ids.shape, input_ids.device
    if random is not None and len(random) != B:
        raise ValueError(f"random holds the numbers of {len(random)} sequences, but the batch has {B}.")
    uniform_BT = None
    if choice.is_random:
        uniform_BT = token_uniforms(random or SampleRandom(0, torch.arange(B, device=device)), max_new_tokens)
    if pad_token_id is None:
        pad_token_id = vocabulary.pad_token_id
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0  # where nothing ends, nothing is padded
    if not 0 <= pad < vocabulary.vocab_size:
        raise ValueError(f"pad_token_id={pad} is outside of the vocabulary of {vocabulary.vocab_size}.")
    seen_BV = None
    if choice.needs_seen:
        count_BV = torch.zeros(B, vocabulary.vocab_size, dtype=torch.int64, device=device)
        real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        seen_BV = count_BV.scatter_add_(1, input_ids, real_BT) > 0
    eos_E = torch.tensor(eos, dtype=torch.int64, device=device)
    running_B = torch.ones(B, dtype=torch.bool, device=device)

    # The last token is not read.
    with model.decoder(B, T + max_new_tokens - 1, cache=cache, compile=compile) as decoder:
        logits_BV = decoder.prefill(input_ids, attention_mask)
        check_scores(logits_BV)
        for number in range(max_new_tokens):
            token_B = choice.choose(logits_BV, seen_BV, None if uniform_BT is None else uniform_BT[:, number])
            if eos:
                token_B = token_B.masked_fill(~running_B, pad)
                running_B &= ~torch.isin(token_B, eos_E)
            yield token_B
            if number + 1 == max_new_tokens or (eos and not running_B.any()):
                break
            if agree is not None:
                agree(True)
            if seen_BV is not None:
                seen_BV.scatter_(1, token_B[:, None], True)
            logits_BV = decoder.step(token_B)
        while agree is not None and agree(False):
            decoder.run_along()


def generate(
    model: Decodes,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    random: SampleRandom | None = None,
    cache: Any = None,
    compile: bool = False,
    on_token: Callable[[Tensor], object] | None = None,
    agree: Callable[[bool], bool] | None = None,
) -> Tensor:
    """Continue prompts until each has ended or has ``max_new_tokens`` more tokens.

    A sequence does not depend on its batch: padding is hidden, and its draws are its own. (Only with ``dynamic`` rotary scaling
    beyond the trained length do rotations depend on the longest sequence.)

    Args:
        model: The model.
        input_ids: Prompts (B, T), integers, padded on the left where their lengths differ.
        attention_mask: (B, T), 1 for tokens and 0 for padding; None: no padding.
        max_new_tokens: Most tokens to add.
        temperature: See `TokenChoice`; 0 takes the likeliest token.
        top_k: See `TokenChoice`.
        top_p: See `TokenChoice`.
        repetition_penalty: See `TokenChoice`; tokens of the prompt count, padding does not.
        eos_token_id: One or several ids that end a sequence; None: the configuration's; empty: none.
        pad_token_id: Id after the end; None: the configuration's, else eos.
        random: Random numbers of the sequences, used if the temperature is positive; None: those of seed 0, by row.
        cache: Memory of the model for keys and values, emptied first; None: as much as is needed.
        compile: Compile the step, and on a GPU capture it as one CUDA graph. The first call with a batch size and a length
            (rounded up) takes long; later ones reuse the result.
        on_token: Called with the new tokens (B,) of each step.
        agree: For a model that communicates between processes, all of which must then call it equally often: takes whether this
            process continues, and returns whether any does. Processes that have ended run along on a single token. All of them
            call `generate` equally often, each with a batch of its own.

    Returns:
        int64 (B, T + n): the prompts as given, then the new tokens, as many as the longest continuation has.

    Raises:
        ValueError: If a number is out of range, a prompt is empty or padded elsewhere than on the left, an id is outside of the
            vocabulary, ``cache`` has no room for the tokens, or a compiled step cannot do what is asked.
    """
    tokens = []
    for token_B in stream(
        model, input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p, repetition_penalty, eos_token_id,
        pad_token_id, random, cache, compile, agree,
    ):  # fmt: skip
        tokens.append(token_B)
        if on_token is not None:
            on_token(token_B)
    return torch.cat([input_ids, torch.stack(tokens, dim=1)], dim=1)
