"""Our language models under the task collection of lm-evaluation-harness (package lm-eval, extra ``eval``).

``LingLM`` is one of its models, also known to it as ``ling`` once it is imported from here::

    from datamodules.text.tokenizer import load_tokenizer
    from zoo.ling.lm_eval_adapter import LingLM

    model = LingLM("ling-tiny", load_tokenizer("byte"))
    lm_eval.simple_evaluate(model, tasks=["my_task"], task_manager=lm_eval.tasks.TaskManager(include_path="tasks"))
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from zoo.base.random import SampleRandom
from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.multiple_choice import encode_pair, loglikelihoods
from zoo.lm.generation import Generation, continue_prompts
from zoo.lm.stop_strings import text_before
from zoo.module import ZooModule

__all__ = ["Conversation", "LingLM", "Tokenizer"]

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


class _Answers:
    """Answers to the requests of lm-eval: all of `LingLM` that does not need the package.

    Args:
        pretrained: a `Ling` module, its network, or what `ZooModule.from_pretrained` takes: a folder or a name.
        tokenizer: the one that the model was trained with.
        batch_size: sequences computed at a time; where options share a prompt, prompts.
        max_length: tokens that are seen at a time; longer contexts lose their beginning, which is said. None: as trained.
        max_gen_toks: tokens generated where a task does not say how many.
        device: Device to compute on; None: the model's.
        dtype: type of the weights, such as ``bfloat16``; None: as they are.
        seed: seed of sampled generations.
        chat: writes conversations, such as ``datamodules.text.chat_template.chat_template("ling", tokenizer, None)``; needed for
            ``apply_chat_template``.

    Raises:
        TypeError: ``pretrained`` is no such model, or ``tokenizer`` no tokenizer.
        ValueError: numbers below 1, or an unknown type.
    """

    cache_hook: Any
    backend = "causal"

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Tokenizer,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        dtype: str | None = None,
        seed: int = 0,
        chat: Conversation | None = None,
    ) -> None:
        super().__init__()
        module = ZooModule.from_pretrained(pretrained) if isinstance(pretrained, str) else pretrained
        network = getattr(module, "network", module)
        if not isinstance(network, LingForCausalLM):
            raise TypeError(f"LingLM: {type(module).__name__} is no Ling module and no LingForCausalLM.")
        if not all(hasattr(tokenizer, name) for name in ("encode", "decode", "eos_id")):
            raise TypeError(
                f"LingLM: tokenizer={tokenizer!r} has no encode, decode and eos_id: make one with"
                " datamodules.text.tokenizer.load_tokenizer(name)."
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"LingLM: batch_size={batch_size!r} must be a number of at least 1.")
        self._batch_size = int(batch_size)
        self.max_length = network.config.max_position_embeddings if max_length is None else int(max_length)
        self.max_gen_toks = int(max_gen_toks)
        if self.max_length < 1 or self.max_gen_toks < 1:
            raise ValueError(f"LingLM: max_length={max_length} and max_gen_toks={max_gen_toks} must be at least 1.")
        found = None if dtype is None else getattr(torch, str(dtype).removeprefix("torch."), None)
        if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"LingLM: dtype={dtype!r} is no type of weights: choose float32, bfloat16, float16 or float64.")
        weight = network.lm_head.weight
        if weight.to(device=device, dtype=found) is not weight:  # the given one stays what and where it is
            network = copy.deepcopy(network).to(device=device, dtype=found)
        self.network = network
        self._device = network.lm_head.weight.device
        self.tokenizer = tokenizer
        self.seed = int(seed)
        self.chat = chat
        self._written: dict[str, list[int]] = {}  # ids of what `apply_chat_template` wrote

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
            raise ValueError("LingLM: apply_chat_template needs chat=chat_template('ling', tokenizer, None), see its arguments.")
        if not add_generation_prompt:
            raise ValueError("LingLM: a task with a gen_prefix cannot be asked with a chat template.")
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
                    f"LingLM: a continuation of {len(continuation)} tokens does not fit into max_length={self.max_length}:"
                    f" {str(texts)[:80]}"
                )
            cut += len(context) > room
            pairs.append((context[-room:], continuation))
        self._say_cut(cut, len(pairs))
        answers: list[tuple[float, bool]] = []
        for block in self._blocks(pairs, disable_tqdm, "loglikelihood"):
            found = loglikelihoods(self.network, block, self._batch_size)
            for answer in zip(found.logp_N.tolist(), found.greedy_N.tolist(), strict=True):
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
                    f"LingLM: {generation.max_new_tokens} generated tokens leave no room for a context in max_length="
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

    @staticmethod
    def _generation(options: dict[str, Any]) -> Generation:
        """Our options of a task's."""
        stops = options.pop("until")
        sampled = options.pop("do_sample")
        temperature = options.pop("temperature", None)
        for name, neutral in (("num_beams", 1), ("num_return_sequences", 1)):
            if options.get(name) == neutral:
                del options[name]
        named = {name: options.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if options.get(name) is not None}
        if options.keys() - {"max_gen_toks"}:
            raise ValueError(
                f"LingLM: generation_kwargs {', '.join(sorted(options.keys() - {'max_gen_toks'}))} of the task is not known: it"
                " takes until, max_gen_toks, do_sample, temperature, top_k, top_p and repetition_penalty."
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
        new = continue_prompts(
            self.network,
            ids_BT,
            mask_BT,
            generation,
            eos_token_id=sorted(ends),
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
                "LingLM: %d of %d contexts are longer than max_length=%d and lose their beginning.", cut, of, self.max_length
            )


def _shown(parts: list[Any], quiet: bool, what: str) -> Iterable[Any]:
    """The parts, with a bar that shows how many are done."""
    from tqdm import tqdm

    return tqdm(parts, desc=f"LingLM {what}", disable=quiet or len(parts) < 2)


@cache
def _registered() -> type:
    """`LingLM`, made when it is first asked for, because its base class belongs to an optional package.

    Raises:
        ImportError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(
            "LingLM needs the package lm-eval: pip install 'lightning-zoo[eval]' (in a checkout: pip install '.[eval]')."
        ) from error
    return register_model("ling")(type("LingLM", (_Answers, TemplateLM), {"__doc__": _Answers.__doc__, "__module__": __name__}))


if TYPE_CHECKING:
    LingLM = _Answers
else:

    def __getattr__(name: str) -> Any:
        if name == "LingLM":
            return _registered()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
