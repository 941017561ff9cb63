"""Ling under the task collection of lm-evaluation-harness (package lm-eval, extra ``eval``).

``LingLM`` is one of its models, also known to it as ``ling`` once it is imported from here::

    from datamodules.text.tokenizer import load_tokenizer
    from zoo.ling.lm_eval_adapter import LingLM

    model = LingLM("ling-tiny", load_tokenizer("byte"))
    lm_eval.simple_evaluate(model, tasks=["my_task"], task_manager=lm_eval.tasks.TaskManager(include_path="tasks"))
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.multiple_choice import loglikelihoods
from zoo.lm.encoded_pair import Ids
from zoo.lm.generation import Continuations, Generation, continue_prompts
from zoo.lm.lm_eval_adapter import Answers, Conversation, Tokenizer, as_lm_eval_model, converted
from zoo.module import ZooModule

__all__ = ["Conversation", "LingLM", "Tokenizer"]


class _Evaluated:
    """A network of Ling, as far as evaluation needs it."""

    def __init__(self, network: LingForCausalLM) -> None:
        self.network = network
        self.max_length = network.config.max_position_embeddings
        self.device = network.lm_head.weight.device

    def loglikelihoods(self, pairs: Sequence[tuple[Ids, Ids]], batch_size: int) -> tuple[Tensor, Tensor]:
        """Scores of continuations; a context that several share is computed once."""
        return loglikelihoods(self.network, pairs, batch_size)

    def continued(self, input_ids: Tensor, attention_mask: Tensor, generation: Generation, **arguments: Any) -> Continuations:
        """Continue prompts."""
        return continue_prompts(self.network, input_ids, attention_mask, generation, **arguments)


class _Answers(Answers):
    """Answers of Ling to the requests of lm-eval.

    Args:
        pretrained: A `Ling` module, its network, or what `ZooModule.from_pretrained` takes: a folder or a name.
        tokenizer: The one that the model was trained with.
        batch_size: Sequences computed at a time; where options share a prompt, prompts.
        device: Device to compute on; None: the model's.
        dtype: Type of the weights, such as ``bfloat16``; None: as they are.
        **kwargs: Arguments of `zoo.lm.lm_eval_adapter.Answers`.

    Raises:
        TypeError: ``pretrained`` is no such model, or ``tokenizer`` no tokenizer.
        ValueError: Numbers below 1, or an unknown type.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Tokenizer,
        batch_size: int | str = 16,
        device: str | None = None,
        dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        module = ZooModule.from_pretrained(pretrained) if isinstance(pretrained, str) else pretrained
        network = getattr(module, "network", module)
        if not isinstance(network, LingForCausalLM):
            raise TypeError(f"LingLM: {type(module).__name__} is no Ling module and no LingForCausalLM.")
        self.network = cast(LingForCausalLM, converted(network, device, dtype))
        super().__init__(_Evaluated(self.network), tokenizer, batch_size, **kwargs)


@cache
def _registered() -> type:
    """`LingLM`, known to lm-eval as ``ling``.

    Raises:
        ImportError: lm-eval is not installed.
    """
    made = as_lm_eval_model(_Answers, "LingLM")
    from lm_eval.api.registry import register_model

    return register_model("ling")(made)


if TYPE_CHECKING:
    LingLM = _Answers
else:

    def __getattr__(name: str) -> Any:
        if name == "LingLM":
            return _registered()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
