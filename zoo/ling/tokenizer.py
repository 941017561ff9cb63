"""The tokenizer as the model needs it, and whether it belongs to the model."""

from typing import Protocol

from zoo.ling.config import LingConfig

__all__ = ["Tokenizer", "check_special_tokens", "check_tokenizer"]


class Tokenizer(Protocol):
    """Turns texts into ids and back; the DataModule has it as ``tokenizer``."""

    eos_id: int
    pad_id: int

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


def check_tokenizer(config: LingConfig, tokenizer: Tokenizer) -> None:
    """Compare the sizes of the vocabularies.

    Raises:
        ValueError: If the tokenizer has ids beyond the model's vocabulary.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} ids, the model a vocabulary of {config.vocab_size}: take the"
            f" model's own tokenizer (data.tokenizer), or vocab_size: {tokenizer.vocab_size} or more."
        )


def check_special_tokens(config: LingConfig, eos: int, pad: int) -> None:
    """Compare the tokenizer's ids of the end of a text and of padding with the model's.

    Raises:
        ValueError: If they differ.
    """
    given, ends = config.pad_token_id, config.eos_token_id
    pad_fits = given is None or given in (pad, eos)  # its embedding is not trained
    if pad_fits and (ends is None or eos in (ends if isinstance(ends, list) else [ends])):
        return
    raise ValueError(
        f"The tokenizer ends texts with the id {eos} and fills up with {pad}, but the model has eos_token_id={ends} and"
        f" pad_token_id={given}: take the model's own tokenizer (data.tokenizer), or a model with --model.config.eos_token_id"
        f" {eos} --model.config.pad_token_id {pad}."
    )
