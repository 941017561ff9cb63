"""Language models under the task collection of lm-evaluation-harness (package lm-eval, extra ``eval``).

``ZooLM`` is one of its models. It stands on any model that scores continuations and continues prompts, an `EvaluatedModel`; one
that gives logits for ids scores by deriving from `LogitsModel`::

    from datamodules.text.tokenizer import load_tokenizer
    from zoo.lm.lm_eval_adapter import ZooLM

    model = ZooLM(my_model, load_tokenizer("my_folder"))
    lm_eval.simple_evaluate(model, tasks=["my_task"], task_manager=lm_eval.tasks.TaskManager(include_path="tasks"))

Shape suffixes: B sequences, T tokens, V vocabulary, N pairs.
"""

import copy
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from zoo.base.random import SampleRandom
from zoo.lm.encoded_pair import Ids, encode_pair
from zoo.lm.generation import Continuations, Generation
from zoo.lm.stop_strings import text_before

__all__ = ["Answers", "Conversation", "EvaluatedModel", "LogitsModel", "Tokenizer", "ZooLM", "as_lm_eval_model", "converted"]

_BLOCK = 64
"""Batches that are sorted by length together; between blocks the progress is shown and results are handed on."""


class Tokenizer(Protocol):
    """Turns texts into ids and back."""

    eos_id: int

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, with no special tokens added; those written in it are taken as such if ``special``."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


class Conversation(Protocol):
    """Writes conversations in the model's form."""

    def encode_prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], str]:
        """Ids and text of messages, up to where the assistant's answer begins."""


class EvaluatedModel(Protocol):
    """A model, as far as evaluation needs it.

    Attributes:
        max_length: Tokens that it sees at a time, as trained.
        device: Device of its inputs.
    """

    max_length: int
    device: torch.device

    def loglikelihoods(self, pairs: Sequence[tuple[Ids, Ids]], batch_size: int) -> tuple[Tensor, Tensor]:
        """Scores of continuations.

        Args:
            pairs: Ids of contexts and continuations, at least one of each.
            batch_size: Sequences computed at a time.

        Returns:
            Log-likelihood of each continuation in nats, float64 (N,), and whether greedy decoding gives it, bool (N,).
        """

    def continued(self, input_ids: Tensor, attention_mask: Tensor, generation: Generation, **arguments: Any) -> Continuations:
        """Continue prompts.

        Args:
            input_ids: Prompts, int64 (B, T), padded on the left.
            attention_mask: int64 (B, T), 0 at padding.
            generation: Options, with the ids and texts that end an answer.
            **arguments: ``random`` and ``decode`` of `zoo.lm.generation.continue_prompts`.
        """


class LogitsModel(ABC):
    """Base of an `EvaluatedModel` that gives logits for ids: scores follow from them."""

    max_length: int
    device: torch.device

    @abstractmethod
    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T), padded on the right where the mask is 0."""

    @abstractmethod
    def continued(self, input_ids: Tensor, attention_mask: Tensor, generation: Generation, **arguments: Any) -> Continuations:
        """Continue prompts, see `EvaluatedModel`."""

    @torch.no_grad()
    def loglikelihoods(self, pairs: Sequence[tuple[Ids, Ids]], batch_size: int) -> tuple[Tensor, Tensor]:
        """Scores of continuations, see `EvaluatedModel`; each sequence is computed as a whole, those of like length together."""
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        logp_N, greedy_N = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.bool)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            rows = [[*pairs[number][0], *pairs[number][1]][:-1] for number in numbers]  # the last token is predicted only
            width = len(rows[0])
            ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
            mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
            logits_BTV = self.logits(ids_BT, mask_BT)
            for row, number in enumerate(numbers):
                context, continuation = pairs[number]
                target_T = torch.tensor(continuation, device=self.device)
                logits_TV = logits_BTV[row, len(context) - 1 : len(rows[row])].double()
                logp_N[number] = logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum()
                greedy_N[number] = (logits_TV.argmax(-1) == target_T).all()
        return logp_N, greedy_N


def converted(network: nn.Module, device: str | None, dtype: str | None) -> nn.Module:
    """A network on a device and with weights of a type: a copy, or itself if it is that already.

    Raises:
        ValueError: ``dtype`` is no type of weights.
    """
    found = None if dtype is None else getattr(torch, str(dtype).removeprefix("torch."), None)
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is no type of weights: choose float32, bfloat16, float16 or float64.")
    if all(weight.to(device=device, dtype=found) is weight for weight in network.parameters()):
        return network
    return copy.deepcopy(network).to(device=device, dtype=found)


class Answers:
    """Answers to the requests of lm-eval: all of `ZooLM` that does not need the package.

    Args:
        model: Scores and continues.
        tokenizer: The one that the model was trained with.
        batch_size: Sequences computed at a time.
        max_length: Tokens that are seen at a time; longer contexts lose their beginning, which is said. None: as trained.
        max_gen_toks: Tokens generated where a task does not say how many.
        seed: Seed of sampled generations.
        chat: Writes conversations, such as ``datamodules.text.chat_template.chat_template("ling", tokenizer, None)``; needed for
            ``apply_chat_template``.

    Raises:
        TypeError: ``tokenizer`` is no tokenizer.
        ValueError: Numbers below 1.
    """

    cache_hook: Any
    backend = "causal"

    def __init__(
        self,
        model: EvaluatedModel,
        tokenizer: Tokenizer,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        chat: Conversation | None = None,
    ) -> None:
        super().__init__()
        if not all(hasattr(tokenizer, name) for name in ("encode", "decode", "eos_id")):
            raise TypeError(
                f"{self._name}: tokenizer={tokenizer!r} has no encode, decode and eos_id: make one with"
                " datamodules.text.tokenizer.load_tokenizer(name)."
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"{self._name}: batch_size={batch_size!r} must be a number of at least 1.")
        self._batch_size = int(batch_size)
        self.max_length = model.max_length if max_length is None else int(max_length)
        self.max_gen_toks = int(max_gen_toks)
        if self.max_length < 1 or self.max_gen_toks < 1:
            raise ValueError(f"{self._name}: max_length={max_length} and max_gen_toks={max_gen_toks} must be at least 1.")
        self.evaluated = model
        self._device = model.device
        self.tokenizer = tokenizer
        self.seed = int(seed)
        self.chat = chat
        self._written: dict[str, list[int]] = {}  # ids of what `apply_chat_template` wrote

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document, and stands before one whose context is empty."""
        return self.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; there are no special tokens to add."""
        return list(self._written[string]) if string in self._written else self.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._written:
            return self.tok_encode(context), self.tokenizer.encode(continuation)
        return encode_pair(self.tokenizer, context, continuation)

    @property
    def tokenizer_name(self) -> str:
        """Key of lm-eval's stored requests."""
        return f"{getattr(self.tokenizer, 'fingerprint', type(self.tokenizer).__name__)}-{self.chat_template()}"

    def chat_template(self, chat_template: bool | str = True) -> str:
        """Name of what writes conversations, for lm-eval's records."""
        return "" if self.chat is None else type(self.chat).__name__

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; its ids, special tokens included, are kept and used when the text comes back.

        Raises:
            ValueError: the model was made without ``chat``, or the task begins the assistant's answer (``gen_prefix``).
        """
        if self.chat is None:
            raise ValueError(f"{self._name}: apply_chat_template needs chat=chat_template(name, tokenizer, None).")
        if not add_generation_prompt:
            raise ValueError(f"{self._name}: a task with a gen_prefix cannot be asked with a chat template.")
        ids, text = self.chat.encode_prompt(chat_history)
        self._written[text] = ids
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and whether it is greedy, of each ((context, continuation), context's ids, continuation's ids).

        Raises:
            ValueError: a continuation is longer than ``max_length``.
        """
        pairs, cut = [], 0
        for texts, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, but not seen
            if room < 1:
                raise ValueError(
                    f"{self._name}: a continuation of {len(continuation)} tokens does not fit into max_length={self.max_length}:"
                    f" {str(texts)[:80]}"
                )
            cut += len(context) > room
            pairs.append((context[-room:], continuation))
        self._say_cut(cut, len(pairs))
        answers: list[tuple[float, bool]] = []
        for block in self._blocks(pairs, disable_tqdm, "loglikelihood"):
            logp_N, greedy_N = self.evaluated.loglikelihoods(block, self._batch_size)
            for answer in zip(logp_N.tolist(), greedy_N.tolist(), strict=True):
                if requests[len(answers)][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[len(answers)][0], answer)
                answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` in which each token is predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logp, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts up to a stop text, the end of a document or a number of tokens.

        Raises:
            ValueError: an option of a task's ``generation_kwargs`` that is not known here, or more tokens than ``max_length``.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        groups: dict[str, tuple[Generation, list[int]]] = {}
        for number, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            groups.setdefault(repr(request.args[1]), (self._generation(dict(options)), []))[1].append(number)
        answers = [""] * len(requests)
        for generation, numbers in groups.values():
            room = self.max_length - generation.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"{self._name}: {generation.max_new_tokens} generated tokens leave no room for a context in max_length="
                    f"{self.max_length}."
                )
            prompts = {number: self.tok_encode(requests[number].args[0]) or [self.eot_token_id] for number in numbers}
            self._say_cut(sum(len(ids) > room for ids in prompts.values()), len(prompts))
            numbers.sort(key=lambda number: -len(prompts[number]))
            for batch in self._batches(numbers, disable_tqdm):
                ids = [prompts[number][-room:] for number in batch]
                for number, new in zip(batch, self._generate(ids, batch, generation), strict=True):
                    answers[number] = text_before(self.tokenizer.decode(new), generation.stop)
                    self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
        return answers

    def _generation(self, options: dict[str, Any]) -> Generation:
        """Our options of a task's."""
        stops = options.pop("until")
        sampled = options.pop("do_sample")
        temperature = options.pop("temperature", None)
        for name, neutral in (("num_beams", 1), ("num_return_sequences", 1)):
            if options.get(name) == neutral:
                del options[name]
        named = {name: options.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if options.get(name) is not None}
        if unknown := ", ".join(sorted(options.keys() - {"max_gen_toks"})):
            raise ValueError(
                f"{self._name}: generation_kwargs {unknown} of the task is not known:"
                " it takes until, max_gen_toks, do_sample, temperature, top_k, top_p and repetition_penalty."
            )
        temperature = (1.0 if temperature is None else float(temperature)) if sampled else 0.0
        return Generation(options["max_gen_toks"], temperature, **named, stop=[stop for stop in stops if stop])

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], numbers: list[int], generation: Generation) -> list[list[int]]:
        """New ids of each prompt up to a stop text, without the end of the document and what comes after."""
        ends = {self.eot_token_id}
        for stop in generation.stop:
            ids = self.tokenizer.encode(stop, special=True)
            if len(ids) == 1 and not self.tokenizer.decode(ids):  # a special token, which has no text
                ends.update(ids)
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[self.eot_token_id] * (width - len(ids)) + ids for ids in prompts], device=self._device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self._device)
        new = self.evaluated.continued(
            ids_BT,
            mask_BT,
            dataclasses.replace(generation, eos_token_id=sorted(ends)),
            random=SampleRandom(self.seed, torch.tensor(numbers, device=self._device)),
            decode=self.tokenizer.decode,
        )
        rows = [row[:length] for row, length in zip(new.tokens.tolist(), new.length.tolist(), strict=True)]
        return [row[:-1] if row[-1] in ends else row for row in rows]

    def _blocks(self, pairs: list[Any], quiet: bool, what: str) -> Iterator[list[Any]]:
        size = _BLOCK * self._batch_size
        blocks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        yield from _shown(blocks, quiet, what)

    def _batches(self, numbers: list[int], quiet: bool) -> Iterator[list[int]]:
        batches = [numbers[start : start + self._batch_size] for start in range(0, len(numbers), self._batch_size)]
        yield from _shown(batches, quiet, "generate_until")

    def _say_cut(self, cut: int, of: int) -> None:
        if cut:
            logging.getLogger(__name__).warning(
                "%s: %d of %d contexts are longer than max_length=%d and lose their beginning.",
                self._name,
                cut,
                of,
                self.max_length,
            )


def _shown(parts: list[Any], quiet: bool, what: str) -> Iterable[Any]:
    """The parts, with a bar that shows how many are done."""
    from tqdm import tqdm

    return tqdm(parts, desc=what, disable=quiet or len(parts) < 2)


def as_lm_eval_model(answers: type[Answers], name: str) -> type:
    """The model of lm-eval that gives some answers, made when it is asked for, because its base class is of an optional package.

    Args:
        answers: The answers.
        name: Name of the class.

    Raises:
        ImportError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ImportError(
            f"{name} needs the package lm-eval: pip install 'lightning-zoo[eval]' (in a checkout: pip install '.[eval]')."
        ) from error
    return type(name, (answers, TemplateLM), {"__doc__": answers.__doc__, "__module__": answers.__module__})


@cache
def _zoo_lm() -> type:
    return as_lm_eval_model(Answers, "ZooLM")


if TYPE_CHECKING:
    ZooLM = Answers
else:

    def __getattr__(name: str) -> Any:
        if name == "ZooLM":
            return _zoo_lm()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
