"""The interface between a language model and the loop of generation: begin with prompts, then step token by token.

Shape suffixes: B sequences, T tokens of the prompts, V vocabulary.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Decoder", "Decodes", "Vocabulary"]


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

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Scores (B, V) of the tokens after prompts (B, T); the mask is 0 at padding, and absent if there is none."""

    def step(self, token_B: Tensor) -> Tensor:
        """Scores (B, V) of the tokens after the newest ones (B,)."""

    def run_along(self) -> None:
        """A pass without a result, for other processes that communicate in theirs."""


class Decodes(Protocol):
    """A model that `zoo.lm.generation.generate` can continue prompts with."""

    @property
    def config(self) -> Vocabulary:
        """The vocabulary."""

    @property
    def encodes_prompts(self) -> bool:
        """Whether an encoder reads the prompts: they may be padded on either side, and are no part of the answer."""

    def decoder(self, batch_size: int, length: int, cache: Any = None, compile: bool = False) -> AbstractContextManager[Decoder]:
        """The passes for ``batch_size`` sequences of at most ``length`` tokens that are read; see `generate` for the rest."""
