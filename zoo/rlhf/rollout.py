"""Rollouts: prompts of a batch, each answered once or several times.

Shape suffixes: R samples, P prompt ids, N answer tokens.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.base.hyperparameters import Configurable
from zoo.base.random import SampleRandom
from zoo.lm.decoder import Decodes
from zoo.lm.generation import Generation, continue_prompts
from zoo.rlhf.experience import Rows, answer_mask

__all__ = ["Rollout", "RolloutEngine", "Samples", "samples_of"]


@dataclass
class Rollout:
    """Options of rollouts; a batch of the data is one.

    Attributes:
        samples_per_prompt: Answers to each prompt.
        max_new_tokens: N.
        temperature: Divisor of the logits.
        top_k: As of `Generation`.
        top_p: As of `Generation`.
        minibatches: Optimizer steps that one pass over a rollout takes.
        epochs: Passes over a rollout.
        unit: Samples that pass a network together; it does not depend on the number of processes, so that neither do results.

    Raises:
        ValueError: Numbers out of range.
    """

    samples_per_prompt: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    minibatches: int = 4
    epochs: int = 1
    unit: int = 4

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "minibatches", "epochs", "unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout: {name}={getattr(self, name)} must be at least 1.")
        if self.temperature <= 0:
            raise ValueError(
                f"rollout: temperature={self.temperature} must be positive, since a policy that does not draw learns nothing."
            )
        self.generation([], 0)

    def generation(self, eos_ids: Sequence[int], pad_id: int) -> Generation:
        """The options of `zoo.lm.generation`."""
        return Generation(
            self.max_new_tokens, self.temperature, self.top_k, self.top_p, eos_token_id=list(eos_ids), pad_token_id=pad_id
        )


@dataclass
class Samples(Rows):
    """Prompts of a rollout, one row a sample.

    Attributes:
        ids: int64 (R, P), padded on the left.
        mask: int64 (R, P).
        index: int64 (R,), number of the sample in its rollout.
        texts: Prompts as text.
        rows: Columns of the prompts' rows in the data, for rewards.
    """

    ids: Tensor
    mask: Tensor
    index: Tensor
    texts: list[str]
    rows: list[dict[str, Any]]

    def with_answers(self, tokens_RN: Tensor, eos_ids: Collection[int]) -> tuple[Tensor, Tensor]:
        """Ids (R, P+N) of prompts and answers, and their mask; see `answer_mask`."""
        mask_RN = answer_mask(tokens_RN, eos_ids)[0]
        return torch.cat([self.ids, tokens_RN], 1), torch.cat([self.mask, mask_RN.long()], 1)


def samples_of(batch: Mapping[str, Any], samples_per_prompt: int) -> Samples:
    """The samples of a batch of prompts, those of a prompt one after the other.

    Args:
        batch: As `RolloutPrompts` gives it: ``input_ids``, ``attention_mask``, ``prompt``, ``rows``.
        samples_per_prompt: Answers to each prompt.
    """
    ids = batch["input_ids"].repeat_interleave(samples_per_prompt, 0)
    texts = list(batch.get("prompt") or [""] * len(batch["input_ids"]))
    rows = list(batch.get("rows") or [{} for _ in texts])
    return Samples(
        ids,
        batch["attention_mask"].long().repeat_interleave(samples_per_prompt, 0),
        torch.arange(len(ids), device=ids.device),
        [text for text in texts for _ in range(samples_per_prompt)],
        [row for row in rows for _ in range(samples_per_prompt)],
    )


class RolloutEngine(Configurable):
    """Generation of answers; derive from it to generate with another engine.

    This one continues prompts by `zoo.lm`: Ling models by their fast decoder, others by the library's own caches. Draws belong to
    samples, so that no batch, rank or placement changes a token.
    """

    def answers(
        self,
        actor: Decodes,
        samples: Samples,
        generation: Generation,
        seed: int,
        rollout: int,
        agree: Callable[[bool], bool] | None = None,
    ) -> Tensor:
        """Tokens int64 (R, N), padded after the end.

        Args:
            actor: The policy with the weights of now, see `zoo.lm.decoder`.
            samples: Prompts.
            generation: Options; ``pad_token_id`` fills up.
            seed: Of the run.
            rollout: Number of the rollout; with ``samples.index`` it names the draws.
            agree: As of `zoo.lm.generation.generate`.
        """
        random = SampleRandom(seed, samples.index, epoch=rollout)
        found = continue_prompts(actor, samples.ids, samples.mask, generation, random=random, agree=agree).tokens
        missing = generation.max_new_tokens - found.shape[1]
        return torch.nn.functional.pad(found, (0, missing), value=generation.pad_token_id or 0)
