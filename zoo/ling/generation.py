"""Continue prompts token by token.

Shape suffixes: B sequences, T tokens of the prompts, S slots of the cache, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.ling.cache import KVCache
from zoo.ling.decode_step import CPUStep, StaticStep, lockstep, static_step
from zoo.ling.token_choice import TokenChoice
from zoo.nn.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from zoo.ling.network import LingForCausalLM

__all__ = ["cache_dtype", "check_ids", "check_number", "check_scores", "generate", "stop_tokens", "stream", "token_uniforms"]

Step = Callable[[Tensor], Tensor]
"""From the newest tokens (B,) to the scores (B, V) of the next."""


def cache_dtype(network: "LingForCausalLM") -> torch.dtype:
    """The type that attention computes with, in which keys and values are kept."""
    weight = network.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def stop_tokens(network: "LingForCausalLM", eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Ids that end a sequence.

    Args:
        network: whose configuration has one.
        eos_token_id: one or several; None: the configuration's, if it has one.

    Raises:
        ValueError: an id outside of the vocabulary.
    """
    if eos_token_id is None:
        eos_token_id = [] if network.config.eos_token_id is None else network.config.eos_token_id
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    for token in ids:
        if not 0 <= token < network.config.vocab_size:
            raise ValueError(f"eos_token_id={token} is outside of the vocabulary of {network.config.vocab_size}.")
    return ids


def check_ids(network: "LingForCausalLM", input_ids: Tensor) -> None:
    """Make sure that the model has an embedding for each id.

    Raises:
        ValueError: it has not.
    """
    low, high = input_ids.aminmax()
    if low < 0 or high >= network.config.vocab_size:
        wrong = int(low) if low < 0 else int(high)
        raise ValueError(
            f"The prompt holds the id {wrong}, but the model's vocabulary has the ids 0 to {network.config.vocab_size - 1}:"
            " was it encoded with another tokenizer?"
        )


def token_uniforms(random: SampleRandom, num_tokens: int) -> Tensor:
    """What each sequence's draws are made with, float64 (B, num_tokens); the first are the same for any number."""
    return random.uniform("token", (num_tokens,), torch.float64)


def check_scores(logits_BV: Tensor) -> None:
    """Make sure that there is something to choose from.

    Raises:
        ValueError: a row of scores that are not finite.
    """
    if not bool(logits_BV.isfinite().all()):
        raise ValueError("The network's scores are not finite: its weights are damaged, or its type is too narrow for them.")


def check_number(max_new_tokens: int) -> None:
    """Make sure that something is asked for.

    Raises:
        ValueError: less than one token.
    """
    if max_new_tokens < 1 or max_new_tokens != int(max_new_tokens):
        raise ValueError(f"max_new_tokens={max_new_tokens} must be a positive whole number.")


def _padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """How many tokens of padding each row has on its left, (B,); None where no row has any."""
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
    return (~mask_BT).sum(1)


def stream(
    network: "LingForCausalLM",
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
    cache: KVCache | None = None,
    compile: bool = False,
    agree: Callable[[bool], bool] | None = None,
) -> Iterator[Tensor]:
    """The tokens of `generate` as they come, int64 (B,) each; arguments and errors as there.

    Between two tokens the network stays in evaluation mode. With ``agree`` the stream has to be read to its end.
    """
    # What a pass gathers of sharded weights may stay with the network, and must not be unfit for training.
    run = torch.inference_mode()(_stream) if agree is None else torch.no_grad()(_stream)
    return run(
        network, input_ids, attention_mask, max_new_tokens, TokenChoice(temperature, top_k, top_p, repetition_penalty),
        eos_token_id, pad_token_id, random, cache, compile, agree,
    )  # fmt: skip


def _stream(
    network: "LingForCausalLM",
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    choice: TokenChoice,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    random: SampleRandom | None,
    cache: KVCache | None,
    compile: bool,
    agree: Callable[[bool], bool] | None,
) -> Iterator[Tensor]:
    if compile and agree is not None:
        raise ValueError("generate: a compiled step cannot wait for other processes (agree): leave compile out.")
    check_number(max_new_tokens)
    padding_B = _padding(input_ids, attention_mask)
    check_ids(network, input_ids)
    input_ids = input_ids.long()
    eos = stop_tokens(network, eos_token_id)
    B, T = input_ids.shape
    device = network.lm_head.weight.device
    if random is not None and len(random) != B:
        raise ValueError(f"random holds the numbers of {len(random)} sequences, but the batch has {B}.")
    uniform_BT = None
    if choice.is_random:
        uniform_BT = token_uniforms(random or SampleRandom(0, torch.arange(B, device=device)), max_new_tokens)
    if pad_token_id is None:
        pad_token_id = network.config.pad_token_id
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0  # where nothing ends, nothing is padded
    if not 0 <= pad < network.config.vocab_size:
        raise ValueError(f"pad_token_id={pad} is outside of the vocabulary of {network.config.vocab_size}.")
    if padding_B is None:
        attention_mask = None
    seen_BV = None
    if choice.needs_seen:
        count_BV = torch.zeros(B, network.config.vocab_size, dtype=torch.int64, device=device)
        real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        seen_BV = count_BV.scatter_add_(1, input_ids, real_BT) > 0
    eos_E = torch.tensor(eos, dtype=torch.int64, device=device)
    running_B = torch.ones(B, dtype=torch.bool, device=device)

    length = T + max_new_tokens - 1  # the last token is not read
    with ExitStack() as held:
        held.enter_context(evaluation_mode(network))
        static = held.enter_context(static_step(network, B, length, cache_dtype(network))) if compile else None
        head: list[Tensor] = []
        logits_BV, step = _begin(network, input_ids, attention_mask, padding_B, length, cache, static, head)
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
            logits_BV = step(token_B)
        while agree is not None and agree(False):
            with network.lm_head.keep(head):
                network(torch.zeros(1, 1, dtype=torch.int64, device=device), last_only=True)


def generate(
    network: "LingForCausalLM",
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
    cache: KVCache | None = None,
    compile: bool = False,
    on_token: Callable[[Tensor], object] | None = None,
    agree: Callable[[bool], bool] | None = None,
) -> Tensor:
    """Continue prompts until each has ended or has ``max_new_tokens`` more tokens.

    What a sequence becomes does not depend on its batch: padding is seen by nobody, and its draws are its own. (Only with
    ``dynamic`` rotary scaling beyond the trained length do rotations depend on the longest sequence.)

    Args:
        network: the model.
        input_ids: (B, T), integers, prompts of different lengths padded on the left.
        attention_mask: (B, T), 1 for tokens and 0 for padding; None: no padding.
        max_new_tokens: most tokens to add.
        temperature: see `TokenChoice`; 0 takes the likeliest token.
        top_k: see `TokenChoice`.
        top_p: see `TokenChoice`.
        repetition_penalty: see `TokenChoice`; tokens of the prompt count, padding does not.
        eos_token_id: one or several ids that end a sequence; None: the configuration's; empty: none.
        pad_token_id: what follows the end; None: the configuration's, else eos.
        random: the sequences' random numbers, used where the temperature is positive; None: those of seed 0, by row.
        cache: memory for keys and values, which is used anew; None: as much as is needed.
        compile: compile the step, and on a GPU capture it as one CUDA graph. The first call with a batch size and a length
            (rounded up) takes long, later ones use what it made.
        on_token: called with the new tokens (B,) of each step.
        agree: where the network communicates between processes, which then must call it equally often: given whether this
            process goes on, tells whether any does. Processes that have ended run along on a single token. All of them call
            `generate` equally often, each with a batch of its own.

    Returns:
        int64 (B, T + n): the prompts as given, then the new tokens, as many as the longest continuation has.

    Raises:
        ValueError: a number out of range, an empty prompt, padding elsewhere than on the left, an id outside of the vocabulary,
            more tokens than ``cache`` has room for, or what a compiled step cannot do.
    """
    tokens = []
    for token_B in stream(
        network, input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p, repetition_penalty, eos_token_id,
        pad_token_id, random, cache, compile, agree,
    ):  # fmt: skip
        tokens.append(token_B)
        if on_token is not None:
            on_token(token_B)
    return torch.cat([input_ids, torch.stack(tokens, dim=1)], dim=1)


def _begin(
    network: "LingForCausalLM",
    input_ids: Tensor,
    attention_mask: Tensor | None,
    padding_B: Tensor | None,
    length: int,
    cache: KVCache | None,
    static: StaticStep | None,
    head: list[Tensor],
) -> tuple[Tensor, Step]:
    """Scores (B, V) after the prompts, and the step that goes on from there, in the way that suits network and device.

    ``head``, empty, keeps the head's weight for the steps.
    """
    B, dtype = len(input_ids), cache_dtype(network)
    if cache is not None:
        if static is not None:
            raise ValueError("generate: a compiled step has a cache of its own; give either cache or compile=True.")
        config, (layers, _, heads, _, width) = network.config, cache.keys.shape
        has = (layers, heads, width, cache.keys.dtype)
        needs = (config.num_hidden_layers, config.num_key_value_heads, config.head_width, dtype)
        if has != needs:
            raise ValueError(
                f"generate: the cache has {has} layers, key heads, their width and type, but the network needs {needs}: make it"
                " with KVCache(network.config, batch_size, max_length, dtype, device)."
            )
        if cache.batch_size != B or cache.max_length < length:
            raise ValueError(
                f"generate needs a cache for {B} sequences of {length} tokens (prompt and max_new_tokens), but the given one is"
                f" for {cache.batch_size} of {cache.max_length}: make the cache longer, or the prompt or max_new_tokens shorter."
            )
        cache.reset()
    if static is not None:
        cache = static.cache
    elif cache is None:
        cache = KVCache(network.config, B, length, dtype, network.lm_head.weight.device)
    with network.lm_head.keep(head):
        logits = network(input_ids, attention_mask, cache=cache, last_only=True).logits
        assert logits is not None
        if static is not None:
            static.begin(network, padding_B)
            return logits[:, -1], static
        if CPUStep.supports(network, length):
            return logits[:, -1], _cpu_step(network, cache, length, padding_B)
    return logits[:, -1], _module_step(network, cache, attention_mask, head)


def _cpu_step(network: "LingForCausalLM", cache: KVCache, length: int, padding_B: Tensor | None) -> Step:
    step = CPUStep(network, length)
    mask_B11S = None
    if padding_B is not None:
        hidden_BS = torch.arange(cache.max_length) < padding_B[:, None]
        mask_B11S = torch.zeros(hidden_BS.shape, dtype=cache.keys.dtype).masked_fill_(hidden_BS, -math.inf)[:, None, None]

    def run(token_B: Tensor) -> Tensor:
        position = cache.length if padding_B is None else cache.length - padding_B
        logits_BV = step(token_B, step.rotation(position), lockstep(step, cache, mask_B11S))
        cache.advance(1)
        return logits_BV

    return run


def _module_step(network: "LingForCausalLM", cache: KVCache, attention_mask: Tensor | None, head: list[Tensor]) -> Step:
    mask_BS = None
    if attention_mask is not None:
        mask_BS = attention_mask.new_ones(len(attention_mask), cache.max_length)
        mask_BS[:, : attention_mask.shape[1]] = attention_mask

    def run(token_B: Tensor) -> Tensor:
        mask = None if mask_BS is None else mask_BS[:, : cache.length + 1]
        with network.lm_head.keep(head):
            logits = network(token_B[:, None], mask, cache=cache, last_only=True).logits
        assert logits is not None
        return logits[:, -1]

    return run
