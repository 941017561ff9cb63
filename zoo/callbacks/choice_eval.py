"""Multiple choice in validation: which option a language model finds most likely."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from zoo.metrics.choice_questions import ChoicePrompt, ChoiceQuestion, Normalization, Target, choose, read_questions

__all__ = ["ChoiceEval", "SupportsLoglikelihood"]


@runtime_checkable
class SupportsLoglikelihood(Protocol):
    """A module that can score texts."""

    def loglikelihood(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Log-likelihood in nats of each continuation after its context, pairs of texts.

        All processes call it equally often, with different pairs, which may be of different lengths.
        """


class ChoiceEval(Callback):
    """Answers multiple-choice questions at the end of each validation, inside `fit` too, by the likelihood of the options.

    Logged are ``val/<name>/accuracy`` and, with a normalization, ``val/<name>/accuracy_norm``, each with its standard error as
    ``..._stderr``. Questions are shared out over the processes, each to exactly one. The attribute ``result`` keeps the figures
    of the last validation.

    Args:
        path: file of questions: lines of JSON, ``{"question", "choices", "answer", "context"}``, see `read_questions`.
        few_shot: solved examples before each question.
        few_shot_path: file that these come from, the first of it; None, or the same file: the first of ``path``, which are then
            not asked.
        target: whether the ``content`` of an option is scored, or its ``label`` (a letter) after a list of all.
        normalization: what log-likelihoods are divided by for ``accuracy_norm``: the option's ``bytes`` without the separator, or
            its ``tokens`` with it, for which the DataModule must have a tokenizer; ``none``: no such figure.
        limit: number of questions, the first of the file; None: all.
        template: what a question is written as, see `ChoicePrompt`.
        separator: what stands between this and the option.
        batch_size: questions of a pass on each process.
        name: name of the figures; None: the file's name without its ending.

    Raises:
        ValueError: numbers or names out of range. Files and module are checked in `setup`, before the run starts.
    """

    def __init__(
        self,
        path: str,
        few_shot: int = 0,
        few_shot_path: str | None = None,
        target: Target = "content",
        normalization: Normalization = "bytes",
        limit: int | None = None,
        template: str | None = None,
        separator: str = " ",
        batch_size: int = 16,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if few_shot < 0 or batch_size < 1 or (limit is not None and limit < 1):
            raise ValueError(
                f"ChoiceEval: few_shot={few_shot} must not be negative, and batch_size={batch_size} and limit={limit} must be at"
                " least 1."
            )
        if normalization not in get_args(Normalization):
            raise ValueError(f"ChoiceEval: normalization={normalization!r} must be one of {', '.join(get_args(Normalization))}.")
        try:
            self.prompt = ChoicePrompt(target, template, separator)
        except ValueError as error:
            raise ValueError(f"ChoiceEval: {error}") from error
        self.path = path
        self.few_shot = few_shot
        self.few_shot_path = few_shot_path
        self.normalization = normalization
        self.limit = limit
        self.batch_size = batch_size
        self.name = name or Path(path).stem
        #: Figures of the last validation by their names: ``accuracy``, ``accuracy_stderr``, ..., ``num_questions``.
        self.result: dict[str, float] | None = None
        self._questions: list[ChoiceQuestion] = []
        self._examples: list[ChoiceQuestion] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the questions, and check that the module can answer them.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: the module does not score texts, or there is no tokenizer to count tokens with.
            ValueError: a file with lines that are no questions, too few examples, or training without validation.
        """
        if stage not in ("fit", "validate"):
            return
        if not isinstance(pl_module, SupportsLoglikelihood):
            raise TypeError(
                f"ChoiceEval scores texts, but {type(pl_module).__name__} has no method loglikelihood(pairs): add it, or remove"
                " the callback."
            )
        if stage == "fit" and not trainer.enable_validation:
            raise ValueError("ChoiceEval acts in validation, and this run has none: give it one, or remove the callback.")
        if self.normalization == "tokens" and self._tokenizer(trainer) is None:
            raise TypeError(
                "ChoiceEval: normalization='tokens' needs a DataModule with a tokenizer; normalization='bytes' does not."
            )
        questions = read_questions(self.path)
        few_shot_path = self.few_shot_path or self.path
        same = Path(few_shot_path).resolve() == Path(self.path).resolve()
        source = questions if same else read_questions(few_shot_path)
        self._examples = source[: self.few_shot]
        if same:
            questions = questions[self.few_shot :]
        if len(self._examples) < self.few_shot or not questions:
            raise ValueError(
                f"ChoiceEval: few_shot={self.few_shot} examples and a question are more than {self.few_shot_path or self.path}"
                f" holds ({len(source)})."
            )
        self._questions = questions[: self.limit]

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, and log the share of right answers."""
        if trainer.sanity_checking:
            return
        self.result = self.measure(trainer, pl_module)
        for name, value in self.result.items():
            if name != "num_questions":
                pl_module.log(f"val/{self.name}/{name}", value)  # all processes log the same

    def measure(self, trainer: Trainer, pl_module: Any) -> dict[str, float]:
        """Answer all questions; the figures, the same on every process."""
        pairs = [self.prompt.pairs(question, self._examples) for question in self._questions]
        # Questions of a pass are of like length. Every process has equally many, so that those that compute together stay
        # together; what is asked twice for that is dropped.
        order = sorted(range(len(pairs)), key=lambda number: -len(pairs[number][0][0]))
        ranks, rank = trainer.world_size, trainer.global_rank
        order += order[-1:] * (-len(order) % ranks)
        mine = order[rank::ranks]
        tokenizer = self._tokenizer(trainer)
        right: list[list[float]] = []
        for start in range(0, len(mine), self.batch_size):
            numbers = mine[start : start + self.batch_size]
            flat = [pair for number in numbers for pair in pairs[number]]
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                logps = iter(pl_module.loglikelihood(flat))
            for number in numbers:
                scores = [next(logps) for _ in pairs[number]]
                right.append(self._right(self._questions[number], pairs[number], scores, tokenizer))
        right_NF = torch.tensor(right, dtype=torch.float64, device=pl_module.device)
        if ranks > 1:
            right_NF = trainer.strategy.all_gather(right_NF).transpose(0, 1).flatten(0, 1)
        right_NF = right_NF[: len(self._questions)]
        names = ("accuracy", "accuracy_norm")[: right_NF.shape[1]]
        figures = {}
        for name, right_N in zip(names, right_NF.T, strict=True):
            figures[name], figures[f"{name}_stderr"] = _mean_and_error(right_N)
        return {**figures, "num_questions": len(self._questions)}

    def _right(
        self, question: ChoiceQuestion, pairs: Sequence[tuple[str, str]], logps: list[float], tokenizer: Any
    ) -> list[float]:
        """1 or 0: whether the most likely option is the right one, without and with normalization."""
        found = [choose(logps)]
        if self.normalization == "bytes":
            sizes = [len(continuation.removeprefix(self.prompt.separator).encode()) for _, continuation in pairs]
            found.append(choose(logps, sizes))
        elif self.normalization == "tokens":
            found.append(choose(logps, [len(tokenizer.encode(continuation)) for _, continuation in pairs]))
        return [float(number == question.answer) for number in found]

    @staticmethod
    def _tokenizer(trainer: Trainer) -> Any:
        return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def _mean_and_error(values_N: Tensor) -> tuple[float, float]:
    """Mean, and sample standard deviation over sqrt(N), NaN for a single value."""
    error = values_N.std().item() / math.sqrt(len(values_N)) if len(values_N) > 1 else math.nan
    return values_N.mean().item(), error
