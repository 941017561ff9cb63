"""The loop of generation: prompts are continued token by token, whatever the model.

Shape suffixes: B sequences, T tokens of the prompts, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.lm.decoder import Decodes, Vocabulary
from zoo.lm.stop_strings import StopStrings
from zoo.lm.token_choice import TokenChoice

__all__ = [
    "Continuations",
    "Generation",
    "check_ids",
    "check_number",
    "check_scores",
    "continue_prompts",
    "generate",
    "stop_tokens",
    "stream",
    "token_uniforms",
]


@dataclass
class Generation:
    """Options of the continuation of texts.

    Attributes:
        max_new_tokens: Most tokens to add; the end-of-text token ends a text before.
        temperature: Divisor of the logits; 0: always the most probable token.
        top_k: draw from the k most probable tokens; 0: from all.
        top_p: draw from the most probable tokens that together have this probability.
        repetition_penalty: Divisor of the logits of tokens that occurred (factor, where negative); 1: none.
        eos_token_id: One or several ids that end a text; None: the model's; empty: none.
        pad_token_id: Id after the end; None: the model's, else the first that ends a text.
        stop: Texts that end a text; they need a tokenizer.
        compile: Compile the step of one token, where the model can do it.

    Raises:
        ValueError: numbers out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    stop: list[str] = field(default_factory=list)
    compile: bool = False

    def __post_init__(self) -> None:
        check_number(self.max_new_tokens)
        self.choice  # noqa: B018 (which checks its numbers)
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"Generation: stop={self.stop!r} must be a list of texts, none of them empty.")

    @property
    def choice(self) -> TokenChoice:
        """The choice of a token."""
        return TokenChoice(self.temperature, self.top_k, self.top_p, self.repetition_penalty)


@dataclass(frozen=True)
class Continuations:
    """Continuations of the prompts of a batch, n tokens at most.

    Attributes:
        tokens: int64 (B, n), padded after the end.
        length: int64 (B,), tokens up to the end, with the one that ended the text.
        logp: (B, n), logarithm of the probability that the model itself gives each token, without temperature and penalty; 0
            after the end; None if it was not asked for.
    """

    tokens: Tensor
    length: Tensor
    logp: Tensor | None = None


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


def _needed_mask(input_ids: Tensor, attention_mask: Tensor | None, either_side: bool = False) -> Tensor | None:
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
    if gap_B.any() and not either_side:
        raise ValueError(
            f"Row {int(gap_B.nonzero()[0])} of attention_mask has padding after a token: generate needs padding on the left only."
        )
    return attention_mask


_Step = tuple[Tensor, Tensor, Tensor | None]
"""Tokens (B,), whether each is one of its text and not padding, and their log-probabilities if they are asked for."""


def stream(
    model: Decodes,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation: Generation | None = None,
    *,
    random: SampleRandom | None = None,
    cache: Any = None,
    decode: Callable[[list[int]], str] | None = None,
    agree: Callable[[bool], bool] | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """The tokens of `generate` as they come, int64 (B,) each; arguments and errors as there.

    Between two tokens the model stays in evaluation mode. With ``agree`` the stream has to be read to its end.
    """
    chosen = dataclasses.replace(generation or Generation(), **options)
    for token_B, _, _ in _steps(model, input_ids, attention_mask, chosen, random, cache, decode, agree):
        yield token_B


def _steps(
    model: Decodes,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation: Generation,
    random: SampleRandom | None,
    cache: Any,
    decode: Callable[[list[int]], str] | None,
    agree: Callable[[bool], bool] | None,
    wants_logp: bool = False,
) -> Iterator[_Step]:
    # What a pass gathers of sharded weights may stay with the network, and must not be unfit for training.
    run = torch.inference_mode()(_loop) if agree is None else torch.no_grad()(_loop)
    return run(model, input_ids, attention_mask, generation, random, cache, decode, agree, wants_logp)


def _loop(
    model: Decodes,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation: Generation,
    random: SampleRandom | None,
    cache: Any,
    decode: Callable[[list[int]], str] | None,
    agree: Callable[[bool], bool] | None,
    wants_logp: bool,
) -> Iterator[_Step]:
    choice, max_new_tokens = generation.choice, generation.max_new_tokens
    if generation.compile and agree is not None:
        raise ValueError("generate: a compiled step cannot wait for other processes (agree): leave compile out.")
    attention_mask = _needed_mask(input_ids, attention_mask, model.encodes_prompts)
    vocabulary = model.config
    check_ids(vocabulary, input_ids)
    input_ids = input_ids.long()
    eos = stop_tokens(vocabulary, generation.eos_token_id)
    (B, T), device = input_ids.shape, input_ids.device
    if random is not None and len(random) != B:
        raise ValueError(f"random holds the numbers of {len(random)} sequences, but the batch has {B}.")
    uniform_BT = None
    if choice.is_random:
        uniform_BT = token_uniforms(random or SampleRandom(0, torch.arange(B, device=device)), max_new_tokens)
    pad_token_id = vocabulary.pad_token_id if generation.pad_token_id is None else generation.pad_token_id
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0  # where nothing ends, nothing is padded
    if not 0 <= pad < vocabulary.vocab_size:
        raise ValueError(f"pad_token_id={pad} is outside of the vocabulary of {vocabulary.vocab_size}.")
    stops = None
    if generation.stop:
        if decode is None:
            raise ValueError("generate: stop texts need decode, the tokenizer's function from ids to text.")
        stops = StopStrings(generation.stop, decode, B)
    ends = bool(eos) or stops is not None
    seen_BV = None
    if choice.needs_seen:
        count_BV = torch.zeros(B, vocabulary.vocab_size, dtype=torch.int64, device=device)
        real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        seen_BV = count_BV.scatter_add_(1, input_ids, real_BT) > 0
        if model.encodes_prompts:
            seen_BV.zero_()
    eos_E = torch.tensor(eos, dtype=torch.int64, device=device)
    running_B = torch.ones(B, dtype=torch.bool, device=device)

    # The last token is not read.
    with model.decoder(B, T + max_new_tokens - 1, cache=cache, compile=generation.compile) as decoder:
        logits_BV = decoder.begin(input_ids, attention_mask)
        check_scores(logits_BV)
        for number in range(max_new_tokens):
            token_B = choice.choose(logits_BV, seen_BV, None if uniform_BT is None else uniform_BT[:, number])
            logp_B = _logp(logits_BV, token_B) if wants_logp else None
            counts_B = running_B
            if ends:
                token_B = token_B.masked_fill(~running_B, pad)
                running_B = running_B & ~torch.isin(token_B, eos_E)
            if stops is not None:
                running_B = running_B & ~stops.ended(token_B)
            yield token_B, counts_B, logp_B
            if number + 1 == max_new_tokens or (ends and not running_B.any()):
                break
            if agree is not None:
                agree(True)
            if seen_BV is not None:
                seen_BV.scatter_(1, token_B[:, None], True)
            logits_BV = decoder.step(token_B)
        while agree is not None and agree(False):
            decoder.run_along()


def _logp(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    accurate_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    return accurate_BV.gather(1, token_B[:, None]).squeeze(1) - accurate_BV.logsumexp(1)


def continue_prompts(
    model: Decodes,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation: Generation | None = None,
    *,
    random: SampleRandom | None = None,
    cache: Any = None,
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    agree: Callable[[bool], bool] | None = None,
    logp: bool = False,
    **options: Any,
) -> Continuations:
    """The new tokens alone, with their number and on request (``logp``) their log-probabilities; arguments as of `generate`."""
    chosen = dataclasses.replace(generation or Generation(), **options)
    tokens, counts, logps = [], [], []
    for token_B, counts_B, logp_B in _steps(model, input_ids, attention_mask, chosen, random, cache, decode, agree, logp):
        tokens.append(token_B)
        counts.append(counts_B)
        if logp_B is not None:
            logps.append(logp_B.masked_fill(~counts_B, 0))
        if on_token is not None:
            on_token(token_B)
    stacked = (torch.stack(tokens, dim=1), torch.stack(counts, dim=1).sum(1))
    return Continuations(*stacked, torch.stack(logps, dim=1) if logp else None)


def generate(
    model: Decodes,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation: Generation | None = None,
    *,
    random: SampleRandom | None = None,
    cache: Any = None,
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    agree: Callable[[bool], bool] | None = None,
    **options: Any,
) -> Tensor:
    """Continue prompts until each has ended or has ``max_new_tokens`` more tokens.

    A sequence does not depend on its batch: padding is hidden, and its draws are its own. (Only with ``dynamic`` rotary scaling
    beyond the trained length do rotations depend on the longest sequence.)

    Args:
        model: The model.
        input_ids: Prompts (B, T), integers, padded on the left where their lengths differ; for an encoder on either side.
        attention_mask: (B, T), 1 for tokens and 0 for padding; None: no padding.
        generation: The options; None: the defaults.
        random: Random numbers of the sequences, used if the temperature is positive; None: those of seed 0, by row.
        cache: Memory of the model for keys and values, emptied first; None: as much as is needed.
        decode: From ids to text, for the stop texts.
        on_token: Called with the new tokens (B,) of each step.
        agree: For a model that communicates between processes, all of which must then call it equally often: takes whether this
            process continues, and returns whether any does. Processes that have ended run along on a single token. All of them
            call `generate` equally often, each with a batch of its own.
        options: Fields of `Generation` by name, which replace its own. In the penalty on repetition tokens of the prompt count,
            but not padding and what an encoder reads. With ``compile`` the step is compiled, and on a GPU captured as one CUDA
            graph; the first call with a batch size and a length (rounded up) takes long, later ones reuse the result.

    Returns:
        int64 (B, T + n): the prompts as given, then the new tokens, as many as the longest continuation has.

    Raises:
        ValueError: If a number is out of range, a prompt is empty or padded elsewhere than on the left, an id is outside of the
            vocabulary, ``cache`` has no room for the tokens, or a compiled step cannot do what is asked.
    """
    new = continue_prompts(
        model, input_ids, attention_mask, generation, random=random, cache=cache, decode=decode, on_token=on_token, agree=agree,
        **options,
    )  # fmt: skip
    return torch.cat([input_ids, new.tokens], dim=1)
