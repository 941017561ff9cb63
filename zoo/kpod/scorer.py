"""Verdicts on written answers: ours, in which a miss is wrong, and that of MCC-KD for comparison; intervals of accuracies.

Source of ``mcc_kd``: the evaluators of arXiv 2310.14747's repository for GSM8K and CommonsenseQA, repeated with what is odd about
them, since accuracies in the literature were measured so.
"""

import math
import re
from decimal import Decimal
from fractions import Fraction
from statistics import NormalDist
from typing import Literal, NamedTuple, get_args

__all__ = ["CONNECTOR", "Scorer", "Verdict", "score", "wilson_interval"]

Scorer = Literal["strict", "choice", "mcc_kd"]

CONNECTOR = "Therefore, the answer is"
"""Sentence between the rationale and the answer."""

_CONNECTOR = re.compile(re.escape(CONNECTOR), re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212]?\s?\$?\s?[-\u2212]?)(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/(?P<under>\d+))?"
)
_CHOICE = re.compile(r"\b[A-N]\b")  # a letter of a choice
_MCC_NUMBER = re.compile(r"-?\d+(?:,?\d+)?(?:\.\d+)?")
_MCC_CONCLUSIONS = (re.compile("[Tt]herefore(.*)"), re.compile("[Ss]o(.*)"))
_MCC_WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_MCC_WORD = re.compile(rf"\b({'|'.join(_MCC_WORDS)})\b", re.IGNORECASE)


class Verdict(NamedTuple):
    """Judgement of one output.

    Attributes:
        answer: The answer that was found, None if there is none.
        correct: Whether it equals the label.
        counted: Whether an accuracy's denominator counts it; only ``mcc_kd`` leaves misses out.
    """

    answer: str | None
    correct: bool
    counted: bool = True


def score(output: str, label: str, scorer: Scorer = "strict") -> Verdict:
    """Judge an output.

    ``strict``: the first number behind the first connector, behind the last equals sign of its line if there is one; compared as
    a number. ``choice``: the first stand-alone capital letter A to N behind the connector. Without a connector, number or letter
    the output is wrong.

    ``mcc_kd``: the last number of the last line that has one, of the words one to twelve too; in a line with "therefore" or "so",
    even inside another word, the last number behind the first "so", else that behind the first "therefore". A thousands comma is
    understood once (1,234,567 is 567), and numbers are compared as text (3.50 is not 3.5). Labels that begin with a letter A to N
    are choices: the last stand-alone one of the whole output is its answer, the article A too. A miss is not counted.

    Args:
        output: What the student wrote.
        label: The right answer.
        scorer: Rule.

    Raises:
        ValueError: If there is no such scorer, or the label has no number or letter of a choice.

    Example:
        >>> score("4 * 3 = 12. Therefore, the answer is $12.00.", "12").correct, score("12", "12").correct
        (True, False)
        >>> score("Therefore, the answer is (B).", "B", "choice")
        Verdict(answer='B', correct=True, counted=True)
    """
    if scorer not in get_args(Scorer):
        raise ValueError(f"score: scorer={scorer!r} must be one of {', '.join(get_args(Scorer))}.")
    if scorer == "mcc_kd":
        return _mcc_kd(output, label)
    find = _number if scorer == "strict" else _choice
    expected = find(label)
    if expected is None:
        wanted = "number: give choices scorer=choice" if scorer == "strict" else "letter A to N: give numbers scorer=strict"
        raise ValueError(f"score: the label {label[:80]!r} has no {wanted}.")
    connector = _CONNECTOR.search(output)
    found = find(output[connector.end() :]) if connector else None
    return Verdict(None, False) if found is None else Verdict(found[0], found[1] == expected[1])


def _number(text: str) -> tuple[str, Fraction] | None:
    """Text and value of the first number of the first line, behind its last equals sign if a number is there."""
    line = text.strip().partition("\n")[0]
    match = _NUMBER.search(line.rpartition("=")[2]) or _NUMBER.search(line)
    if match is None:
        return None
    value = Fraction(Decimal(match["digits"].replace(",", ""))) / (Fraction(Decimal(match["under"] or 1)) or 1)
    return match[0].strip(), -value if match["sign"].strip("$ ") else value


def _choice(text: str) -> tuple[str, str] | None:
    match = _CHOICE.search(text)
    return match and (match[0], match[0])


def _mcc_kd(output: str, label: str) -> Verdict:
    if re.match(r"\W*[A-N]\b", label):
        choices = _CHOICE.findall(output)
        return _mcc_verdict(choices, _CHOICE.findall(label)[0])
    numbers: list[str] = []
    for line in output.strip().split("\n"):
        conclusions = [text for pattern in _MCC_CONCLUSIONS for text in pattern.findall(line)]
        numbers = _mcc_numbers(conclusions) or _mcc_numbers([line]) or numbers
    return _mcc_verdict(numbers, _mcc_plain(label))


def _mcc_verdict(found: list[str], label: str) -> Verdict:
    return Verdict(found[-1], found[-1] == label) if found else Verdict(None, False, counted=False)


def _mcc_numbers(texts: list[str]) -> list[str]:
    digits = [_MCC_WORD.sub(lambda word: str(1 + _MCC_WORDS.index(word[0].lower())), text) for text in texts]
    return [_mcc_plain(number) for text in digits for number in _MCC_NUMBER.findall(text)]


def _mcc_plain(number: str) -> str:
    return re.sub(r",|\.0+$", "", number)


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson score interval of 95 % of a share, inside [0, 1]; all of it for no trials.

    Example:
        >>> [round(end, 3) for end in wilson_interval(8, 10)]
        [0.49, 0.943]
    """
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    share, narrow = correct / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / narrow
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / narrow
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)
