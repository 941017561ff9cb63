"""Serve many prompts at once: requests come and go at every step, and share one memory of keys and values.

A batch of `generate` runs until its longest sequence has ended, and reserves memory for that. Here a request leaves when it has
ended, the next one takes its place (continuous batching), and memory is handed out in segments that grow with the sequence.

Shape suffixes: L layers, R requests in a step, T tokens, S tokens with earlier ones, K key/value heads, H query heads, W width of
a head, V vocabulary.
Source: arXiv 2503.05139, section 2.4.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.ling.decode_step import Attend, CPUStep
from zoo.ling.decoder import cache_dtype
from zoo.ling.network import LingNetwork
from zoo.ling.segments import Segment, SegmentAllocator, runs_of
from zoo.lm.generation import Generation, check_ids, check_scores, stop_tokens, token_uniforms
from zoo.lm.token_choice import TokenChoice
from zoo.nn.evaluation_mode import evaluation_mode

__all__ = ["Completion", "Engine"]


@dataclass(frozen=True)
class Completion:
    """A request that has ended.

    Attributes:
        request: its number, as `Engine.submit` gave it.
        prompt: ids of the prompt.
        tokens: new ids, with the one that ended it, if one did.
    """

    request: int
    prompt: list[int]
    tokens: list[int]


@dataclass(eq=False)
class _Request:
    number: int
    tokens: list[int]
    num_prompt: int
    max_new_tokens: int
    choice: TokenChoice
    stops: frozenset[int]
    uniform_T: Tensor | None
    seen_1V: Tensor | None
    on_token: Callable[[int], object] | None
    segments: list[Segment] = field(default_factory=list)
    stored: int = 0  # tokens whose keys and values are in memory

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def capacity(self) -> int:
        return sum(map(len, self.segments))

    @property
    def still_to_store(self) -> int:
        """Most slots that it can need beyond what it has: the last token is not read."""
        return max(0, self.num_prompt + self.max_new_tokens - 1 - self.capacity)

    @property
    def has_ended(self) -> bool:
        return self.num_new == self.max_new_tokens or (self.num_new > 0 and self.tokens[-1] in self.stops)


class Engine:
    """Continuous batching over one memory of ``max_tokens`` slots for keys and values of all requests.

    A prompt is admitted when there is a contiguous segment for it, in the order of arrival. A sequence that outgrows its memory
    gets the free slots behind it, else another segment, else it waits for others to end; if all wait, the one that came last
    gives its memory back, and its tokens are read again later. Prompts that begin as a running sequence does use its keys and
    values, without a copy.

    Each request's tokens are those that `generate` makes of its prompt alone, whatever else runs (up to rounding, which in low
    precision can turn the scales between two tokens of nearly the same score; and but for ``dynamic`` rotary scaling beyond the
    trained length, where rotations depend on the longest sequence that runs). The weights must not change while requests run.

    Args:
        network: the model.
        max_tokens: slots S of the memory.
        max_batch: most requests that run at once.
        growth: slots that a segment grows by.
        min_shared: shortest common beginning that is shared; 0: nothing is.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, network: LingNetwork, max_tokens: int, max_batch: int = 16, growth: int = 32, min_shared: int = 16
    ) -> None:
        for name, value, least in (
            ("max_tokens", max_tokens, 1), ("max_batch", max_batch, 1), ("growth", growth, 1), ("min_shared", min_shared, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"Engine: {name}={value} must be at least {least}.")
        self.network, self.max_batch, self.growth, self.min_shared = network, max_batch, growth, min_shared
        self.memory = SegmentAllocator(max_tokens)
        config, weight = network.config, network.lm_head.weight
        shape = (config.num_hidden_layers, 2, max_tokens, config.num_key_value_heads, config.head_width)
        self.both = torch.zeros(shape, dtype=cache_dtype(network), device=weight.device)  # keys, then values
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # in the order of arrival
        self._ended: list[Completion] = []  # that `step` has not given yet
        self._step: CPUStep | None = None
        self._head: list[Tensor] = []
        self._next = 0

    @property
    def max_tokens(self) -> int:
        """Slots of the memory."""
        return self.memory.num_slots

    @property
    def free_tokens(self) -> int:
        """Slots that belong to no request."""
        return self.memory.num_free

    @property
    def num_waiting(self) -> int:
        """Requests that have no memory yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold memory."""
        return len(self._running)

    def submit(
        self,
        prompt: Sequence[int] | Tensor,
        generation: Generation | None = None,
        *,
        random: SampleRandom | None = None,
        on_token: Callable[[int], object] | None = None,
        **options: Any,
    ) -> int:
        """Add a request; its number.

        Args:
            prompt: ids, at least one.
            generation: The options, of which ``compile`` and ``pad_token_id`` have no effect; None: the defaults.
            random: the numbers of this one sequence; None: those of seed 0 and the request's number.
            on_token: called with each new token.
            options: Fields of `Generation` by name, which replace its own.

        Raises:
            ValueError: a number out of range, a prompt that is empty or no row of integers, an id outside of the vocabulary, stop
                texts, or more tokens than the memory could ever hold.
        """
        generation = replace(generation or Generation(), **options)
        if generation.stop:
            raise ValueError("The engine has no tokenizer for stop texts: give eos_token_id, or cut the text afterwards.")
        max_new_tokens = generation.max_new_tokens
        tokens = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        if not tokens:
            raise ValueError("The prompt is empty, it has no token: begin it with the bos or eos token.")
        ids_T = torch.tensor(tokens)
        if ids_T.dim() != 1 or ids_T.is_floating_point():
            raise ValueError(f"A prompt is ids as integers (T,), got {ids_T.dtype} of shape {tuple(ids_T.shape)}.")
        check_ids(self.network.config, ids_T)
        if len(tokens) + max_new_tokens - 1 > self.max_tokens:
            raise ValueError(
                f"A prompt of {len(tokens)} and max_new_tokens={max_new_tokens} need {len(tokens) + max_new_tokens - 1} slots,"
                f" but the engine has max_tokens={self.max_tokens}: make it larger, or the prompt or max_new_tokens shorter."
            )
        choice = generation.choice
        device = self.both.device
        if random is not None and len(random) != 1:
            raise ValueError(f"random holds the numbers of {len(random)} sequences, but a request is one.")
        uniform_T = seen_1V = None
        if choice.is_random:
            uniform_T = token_uniforms(random or SampleRandom(0, torch.tensor([self._next])), max_new_tokens)[0].to(device)
        if choice.needs_seen:
            seen_1V = torch.zeros(1, self.network.config.vocab_size, dtype=torch.bool, device=device)
            seen_1V[0, tokens] = True
        stops = frozenset(stop_tokens(self.network.config, generation.eos_token_id))
        request = _Request(
            self._next, tokens, len(tokens), max_new_tokens, choice, stops, uniform_T, seen_1V, on_token
        )  # fmt: skip
        self._waiting.append(request)
        self._next += 1
        return request.number

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit requests, then add one token to each running sequence; return those that have ended.

        A step without requests does nothing. If ``on_token`` of a request raises, or the step is interrupted, the requests are as
        they were before or with one token more each, and can continue; the next step returns those that have ended.
        """
        self._take_ended()  # of a step that was interrupted
        blocked = self._make_room()
        if not blocked:
            self._admit()
        ready = [request for request in self._running if request not in blocked and not request.has_ended]
        if ready:
            self._compute(ready, self._decode)
        self._take_ended()
        ended, self._ended = self._ended, []
        return ended

    def _take_ended(self) -> None:
        for request in [request for request in self._running if request.has_ended]:
            self._free(request)
            tokens, length = request.tokens, request.num_prompt
            self._ended.append(Completion(request.number, tokens[:length], tokens[length:]))

    def cancel(self, number: int) -> bool:
        """Drop a request and free its memory; it is never completed. May be called in ``on_token`` too.

        Args:
            number: as `submit` gave it.

        Returns:
            Whether there was such a request.
        """
        for request in [*self._running, *self._waiting]:
            if request.number == number:
                if request in self._running:
                    self._free(request)
                else:
                    self._waiting.remove(request)
                return True
        return False

    def run(self) -> Iterator[Completion]:
        """Step until no request is left; requests as they end. More may be submitted meanwhile."""
        while self._waiting or self._running or self._ended:
            yield from self.step()

    # Memory

    def _make_room(self) -> list[_Request]:
        """Give every running request a slot for its next token; returns those that have to wait for one."""
        while True:
            blocked = [request for request in self._running if not self._grow(request)]
            if not blocked or len(blocked) < len(self._running):
                return blocked
            last = self._running[-1]
            self._free(last)
            self._waiting.appendleft(last)

    def _grow(self, request: _Request) -> bool:
        if request.stored < request.capacity:
            return True
        size = min(self.growth, request.still_to_store)
        last = request.segments[-1]
        if last.owners == 1 and self.memory.extend(last, size):
            return True
        segment = self.memory.allocate_some(size)
        if segment is not None:
            request.segments.append(segment)
        return segment is not None

    def _free(self, request: _Request) -> None:
        for segment in request.segments:
            self.memory.release(segment)
        request.segments, request.stored = [], 0
        self._running.remove(request)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            request = self._waiting[0]
            donor, shared = self._common_beginning(request)
            left = request.num_prompt + request.max_new_tokens - 1 - shared
            segment = self.memory.allocate(min(len(request.tokens) - shared + self.growth, left))
            if segment is None:
                return
            self._waiting.popleft()
            num_new = request.num_new  # some, where it had to give its memory back
            request.segments = [*(self._share(donor, shared) if donor is not None else []), segment]
            request.stored = shared
            if not self._running:
                self._step, self._head = None, []  # weights may have changed since
            self._running.append(request)
            try:
                self._compute([request], self._prefill)
            except BaseException:
                if request.num_new == num_new:  # nothing came of it: it waits again
                    self._free(request)
                    self._waiting.appendleft(request)
                raise

    def _common_beginning(self, request: _Request) -> tuple[_Request | None, int]:
        """The running request that begins like this one for longest, and for how long; one token is always left to read."""
        best, longest = None, max(1, self.min_shared) - 1
        for other in self._running if self.min_shared else ():
            length = min(len(request.tokens) - 1, other.stored)
            if length > longest and other.tokens[: longest + 1] == request.tokens[: longest + 1]:
                common = longest + 1
                while common < length and other.tokens[common] == request.tokens[common]:
                    common += 1
                best, longest = other, common
        return best, longest if best is not None else 0

    def _share(self, donor: _Request, length: int) -> list[Segment]:
        """The segments of the first ``length`` tokens, which get one more owner each; the last is split at its end."""
        shared: list[Segment] = []
        for segment in list(donor.segments):
            if not length:
                break
            if len(segment) > length:
                rest = self.memory.split(segment, length)
                for holder in self._running:
                    if segment in holder.segments:
                        holder.segments.insert(holder.segments.index(segment) + 1, rest)
            segment.owners += 1
            length -= len(segment)
            shared.append(segment)
        return shared

    # Computation

    def _compute(self, requests: list[_Request], scores: Callable[[list[_Request]], Tensor]) -> None:
        """Give each request its next token, or none of them if anything fails; then call ``on_token`` of all."""
        stored = [request.stored for request in requests]
        try:
            tokens = self._choose(requests, scores(requests))
        except BaseException:
            for request, number in zip(requests, stored, strict=True):
                request.stored = number
            raise
        for request, token in zip(requests, tokens, strict=True):
            request.tokens.append(token)
            if request.seen_1V is not None:
                request.seen_1V[0, token] = True
        failures = []
        for request, token in zip(requests, tokens, strict=True):
            if request.on_token is not None:
                try:
                    request.on_token(token)
                except Exception as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    def _choose(self, requests: list[_Request], logits_RV: Tensor) -> list[int]:
        """The next token of each request."""
        tokens = [0] * len(requests)
        rows: dict[TokenChoice, list[int]] = {}
        for row, request in enumerate(requests):
            rows.setdefault(request.choice, []).append(row)
        for choice, group in rows.items():
            seen = [seen_1V for row in group if (seen_1V := requests[row].seen_1V) is not None]
            uniform = [u_T[requests[row].num_new] for row in group if (u_T := requests[row].uniform_T) is not None]
            chosen = choice.choose(
                logits_RV if len(rows) == 1 else logits_RV[group],
                torch.cat(seen) if seen else None,
                torch.stack(uniform) if uniform else None,
            )
            for row, token in zip(group, chosen.tolist(), strict=True):
                tokens[row] = token
        return tokens

    def _prefill(self, requests: list[_Request]) -> Tensor:
        """Scores (1, V) after all tokens of a single request, whose keys and values are stored."""
        (request,) = requests
        new_1T = torch.tensor([request.tokens[request.stored :]], device=self.both.device)
        with evaluation_mode(self.network), self.network.lm_head.keep(self._head):
            logits = self.network(new_1T, cache=_Reading(self.both, request), last_only=True).logits
        assert logits is not None
        check_scores(logits[:, -1])
        return logits[:, -1]

    def _decode(self, requests: list[_Request]) -> Tensor:
        """Scores (R, V) after the newest token of each request."""
        if self._step is None and CPUStep.supports(self.network, self.max_tokens):
            with self.network.lm_head.keep(self._head):
                self._step = CPUStep(self.network, self.max_tokens)
        token_R = torch.tensor([request.tokens[-1] for request in requests], device=self.both.device)
        if self._step is not None:
            position_R = torch.tensor([request.stored for request in requests])
            attend = _attend_in_segments(self._step, self.both, requests)
            logits_RV = self._step(token_R, self._step.rotation(position_R), attend)
            for request in requests:
                request.stored += 1
            return logits_RV
        gathered = _Gathered(self.both, requests)
        with evaluation_mode(self.network), self.network.lm_head.keep(self._head):
            logits = self.network(token_R[:, None], gathered.mask_RS, cache=gathered, last_only=True).logits
        assert logits is not None
        return logits[:, -1]


def _attend_in_segments(step: CPUStep, both: Tensor, requests: list[_Request]) -> Attend:
    """Attention of the newest token of each request over its own segments, where they lie; a copy only of several runs."""
    R, H, K, W = len(requests), step.num_heads, step.num_kv_heads, step.width
    slots, views = [], []
    for request in requests:
        runs = runs_of(request.segments, 0, request.stored + 1)
        slots.append(runs[-1][1] - 1)
        # (L, 2, 1, K, S, W) of each run, taken apart into keys and values of each layer.
        views.append([both[:, :, start:stop].transpose(2, 3).unsqueeze(2).flatten(0, 1).unbind(0) for start, stop in runs])
    slot_R, layers = torch.tensor(slots), both.unbind(0)

    def attend(layer: int, heads_RHW: Tensor) -> Tensor:
        layers[layer].index_copy_(1, slot_R, heads_RHW.narrow(1, H, 2 * K).view(R, 2, K, W).transpose(0, 1))
        queries = heads_RHW.narrow(1, 0, H).view(R, 1, K, H // K, W).unbind(0)
        y = []
        for q_1KGW, runs in zip(queries, views, strict=True):
            key, value = (
                runs[0][part] if len(runs) == 1 else torch.cat([run[part] for run in runs], dim=2)
                for part in (2 * layer, 2 * layer + 1)
            )
            y.append(F.scaled_dot_product_attention(q_1KGW, key, value))
        return torch.cat(y).reshape(R, H * W)

    return attend


class _Reading:
    """The memory of one request as `zoo.ling.network.Cache`, for several tokens at once."""

    def __init__(self, both: Tensor, request: _Request) -> None:
        self.both, self.request, self.length = both, request, request.stored

    def update(self, layer: int, key_BKTW: Tensor, value_BKTW: Tensor) -> tuple[Tensor, Tensor]:
        begin, end = self.length, self.length + key_BKTW.shape[2]
        place = 0
        for start, stop in runs_of(self.request.segments, begin, end):
            for store_SKW, new_BKTW in zip(self.both[layer], (key_BKTW, value_BKTW), strict=True):
                store_SKW[start:stop] = new_BKTW[0, :, place : place + stop - start].transpose(0, 1)
            place += stop - start
        if not begin:
            return key_BKTW, value_BKTW
        runs = runs_of(self.request.segments, 0, end)
        keys_values = torch.cat([self.both[layer, :, start:stop] for start, stop in runs], dim=1)
        key_1KSW, value_1KSW = keys_values.transpose(1, 2).unsqueeze(1).unbind(0)
        return key_1KSW, value_1KSW

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens
        self.request.stored += num_tokens


class _Gathered:
    """The newest token of several requests as `zoo.ling.network.Cache`: their memory copied side by side, padded on the left."""

    def __init__(self, both: Tensor, requests: list[_Request]) -> None:
        self.both, self.requests = both, requests
        self.length = max(request.stored for request in requests)
        slots, mask = [], []
        for request in requests:
            runs = runs_of(request.segments, 0, request.stored + 1)
            padding = self.length - request.stored
            slots.append([0] * padding + [slot for start, stop in runs for slot in range(start, stop)])
            mask.append([0] * padding + [1] * (request.stored + 1))
        self.slot_RS = torch.tensor(slots, device=both.device)
        self.mask_RS = torch.tensor(mask, device=both.device)

    def update(self, layer: int, key_BKTW: Tensor, value_BKTW: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.stack([key_BKTW[:, :, 0], value_BKTW[:, :, 0]]).to(self.both.dtype)
        self.both[layer].index_copy_(1, self.slot_RS[:, -1], new)
        found = self.both[layer].index_select(1, self.slot_RS.flatten()).unflatten(1, self.slot_RS.shape)
        key_RKSW, value_RKSW = found.transpose(2, 3).unbind(0)
        return key_RKSW, value_RKSW

    def advance(self, num_tokens: int) -> None:
        for request in self.requests:
            request.stored += num_tokens
