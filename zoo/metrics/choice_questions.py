"""Multiple choice: questions, the texts that a language model is asked to score, and the answer it then gives.

The option that is most likely is the answer. Scoring the option's *content* instead of its letter is less noisy early in
training, when a model has not yet learned what the letters are for ("Every FLOP Counts", arXiv 2503.05139, section 5.1).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal, get_args

__all__ = ["ChoicePrompt", "ChoiceQuestion", "Normalization", "Target", "choose", "read_questions"]

Target = Literal["content", "label"]
Normalization = Literal["none", "bytes", "tokens"]

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TEMPLATES = {"content": "Question: {question}\nAnswer:", "label": "Question: {question}\n{options}\nAnswer:"}
_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with options.

    Attributes:
        question: what is asked.
        choices: the options, at least two.
        answer: position of the right one.
        context: a text that it is about; empty: none.

    Raises:
        ValueError: fewer than two options, more than there are letters, empty or equal ones, or no such answer.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) <= len(LABELS):
            raise ValueError(f"{len(self.choices)} choices, and there must be 2 to {len(LABELS)}")
        if not all(self.choices) or len(set(self.choices)) < len(self.choices):
            raise ValueError("choices that are empty or equal")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices, which are counted from 0")


def read_questions(path: str | Path) -> list[ChoiceQuestion]:
    """Read questions from lines of JSON, ``{"question": str, "choices": [str, ...], "answer": int or letter, "context": str}``.

    An answer is counted from 0, or a letter from A. ``context`` may be missing; other entries are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: lines that are no questions, with their number and the first of them, or a file without questions.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of questions {path}.")
    questions, errors = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                questions.append(_question(json.loads(line.decode("utf-8-sig"))))
            except (ValueError, RecursionError) as error:  # not UTF-8 and no JSON among them
                errors.append(f"line {number}: {error}")
    if errors:
        raise ValueError(f"{path} has {len(errors)} lines that are no questions: " + "; ".join(errors[:_SHOWN_ERRORS]))
    if not questions:
        raise ValueError(f"{path} has no questions.")
    return questions


def _question(row: Any) -> ChoiceQuestion:
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    missing = [name for name in ("question", "choices", "answer") if name not in row]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    question, choices, answer, context = row["question"], row["choices"], row["answer"], row.get("context", "")
    if not isinstance(question, str) or not isinstance(context, str):
        raise ValueError("question and context must be strings")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices must be a list of strings")
    if isinstance(answer, str) and len(answer) == 1 and answer in LABELS:
        answer = LABELS.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise ValueError(f"answer {answer!r} is neither a whole number nor a capital letter")
    return ChoiceQuestion(question, tuple(choices), answer, context)


@dataclass(frozen=True)
class ChoicePrompt:
    """Texts to score, made from a question.

    Attributes:
        target: whether an option's ``content`` is scored, which then stands nowhere else, or its ``label``, a letter; the options
            are then listed in the prompt.
        template: what a question is written as, with ``{question}`` and, for lists of options, ``{options}``; None: the usual
            words for the target. The context, if there is one, stands before.
        separator: what stands between this and the option, and is scored with it.
        between: what stands between examples.

    Raises:
        ValueError: an unknown target, or a template with other or missing places.

    Example:
        >>> question = ChoiceQuestion("2 + 2 =", ("3", "4"), answer=1)
        >>> ChoicePrompt("content").pairs(question)
        [('Question: 2 + 2 =\\nAnswer:', ' 3'), ('Question: 2 + 2 =\\nAnswer:', ' 4')]
        >>> ChoicePrompt("label").pairs(question)[1]
        ('Question: 2 + 2 =\\nA. 3\\nB. 4\\nAnswer:', ' B')
    """

    target: Target = "content"
    template: str | None = None
    separator: str = " "
    between: str = "\n\n"

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise ValueError(f"target={self.target!r} must be one of {', '.join(get_args(Target))}.")
        if self.template is None:
            return
        wanted = {"question"} | ({"options"} if self.target == "label" else set())
        try:
            found = {name for _, name, _, _ in Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise ValueError(
                f"template={self.template!r} cannot be filled in ({error}): braces are written {{{{ }}}}."
            ) from error
        if found != wanted:
            places = " and ".join(f"{{{name}}}" for name in sorted(wanted, reverse=True))
            raise ValueError(
                f"template={self.template!r} must hold {places} for target={self.target!r}, and nothing else in braces."
            )

    def pairs(self, question: ChoiceQuestion, examples: Sequence[ChoiceQuestion] = ()) -> list[tuple[str, str]]:
        """Context and continuation for each option, with solved examples before the question."""
        solved = [self._asked(example) + self._continuation(example, example.answer) for example in examples]
        context = self.between.join([*solved, self._asked(question)])
        return [(context, self._continuation(question, number)) for number in range(len(question.choices))]

    def _asked(self, question: ChoiceQuestion) -> str:
        options = "\n".join(f"{label}. {choice}" for label, choice in zip(LABELS, question.choices, strict=False))
        template = _TEMPLATES[self.target] if self.template is None else self.template
        asked = template.format(question=question.question, options=options)
        return f"{question.context}{self.between}{asked}" if question.context else asked

    def _continuation(self, question: ChoiceQuestion, number: int) -> str:
        return self.separator + (question.choices[number] if self.target == "content" else LABELS[number])


def choose(logps: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """Position of the most likely option; of equals the first.

    Args:
        logps: log-likelihood of each option.
        lengths: what it is divided by, such as the number of bytes or tokens, so that long options are not less likely just for
            their length; None: nothing.

    Raises:
        ValueError: a log-likelihood that is no number.

    Example:
        >>> choose([-6.0, -4.0]), choose([-6.0, -4.0], lengths=[12, 2])
        (1, 0)
    """
    scores = list(logps) if lengths is None else [logp / length for logp, length in zip(logps, lengths, strict=True)]
    if any(score != score for score in scores):
        raise ValueError(f"The log-likelihoods {list(logps)} are not all numbers: the model's weights or inputs are not finite.")
    return max(range(len(scores)), key=scores.__getitem__)
