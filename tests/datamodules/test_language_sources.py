"""Tokenizers, sources, de-duplication, what is held out, and ids on disk."""

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.assets.fetch import cache_folder
from datamodules.base.held_out import held_out
from datamodules.text.corpus import read_corpora
from datamodules.text.deduplication import Deduplicator, minhash
from datamodules.text.documents import Bible, PythonFiles, text_source
from datamodules.text.token_files import open_token_file, write_token_file
from datamodules.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of some hundred ids, trained on this file."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<role>", "</role>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([__file__], trainer)
    folder = tmp_path_factory.mktemp("bpe")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


# Tokenizers


@given(st.text())
def test_bytes_round_trip_and_count_one_each(text):
    ids = BYTES.encode(text)
    assert bytes(ids) == text.encode()
    assert BYTES.decode([*ids, BYTES.eos_id, 300]) == text
    assert int(BYTES.token_bytes[ids].sum()) == len(ids)
    assert BYTES.token_bytes[256:].tolist() == [0, 0, 0]
    assert (BYTES.bos_id, BYTES.eos_id, BYTES.pad_id, BYTES.vocab_size) == (256, 257, 258, 259)


def test_a_fast_tokenizer_round_trips_counts_bytes_and_takes_text_as_text(bpe_folder):
    tokenizer = load_tokenizer(str(bpe_folder))
    from_file = load_tokenizer(str(bpe_folder / "tokenizer.json"))
    text = "def f(x):\n\treturn 'wörld 🐍 <role>'  # <|endoftext|>\n"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id, 10**6]) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode()) > len(ids)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 400
    assert tokenizer.token_bytes[[0, 1, 2]].tolist() == [0, 0, 0], "marks stand for no text"
    assert tokenizer.encode("a<|endoftext|>", special=True)[-1] == tokenizer.eos_id == tokenizer.pad_id
    assert [row.tolist() for row in tokenizer.encode_many([text, "a"])] == [ids, tokenizer.encode("a")]
    assert tokenizer.fingerprint == from_file.fingerprint != BYTES.fingerprint


def raw_fingerprint(folder: Path) -> str:
    """The fingerprint of a tokenizer as its file has it."""
    raw = PreTrainedTokenizerFast.from_pretrained(str(folder))
    pad = raw.eos_token_id if raw.pad_token_id is None else raw.pad_token_id
    return hashlib.sha256(f"{raw.eos_token_id}/{pad}/{raw.backend_tokenizer.to_str()}".encode()).hexdigest()


def test_a_file_that_tells_to_cut_off_and_to_fill_up_is_not_obeyed(tmp_path, bpe_folder):
    folder = tmp_path / "cutting"
    shutil.copytree(bpe_folder, folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length=5)
    backend.enable_padding(length=8, pad_id=0, pad_token="<|endoftext|>")
    backend.save(str(folder / "tokenizer.json"))
    plain, cutting = load_tokenizer(str(bpe_folder)), load_tokenizer(str(folder))
    texts = ["a", "def f(x): return x + x + x + x + x"]
    assert [len(ids) for ids in cutting.encode_many(texts)] == [len(plain.encode(text)) for text in texts] != [8, 8]
    for text in texts:
        assert cutting.encode(text) == plain.encode(text) == cutting.encode_with_spans(text)[0]
        assert cutting.decode(cutting.encode(text)) == text
    assert plain.fingerprint == raw_fingerprint(bpe_folder), "what others have in the cache stays right"
    assert cutting.fingerprint == plain.fingerprint != raw_fingerprint(folder)


def test_a_tokenizer_of_spaces_written_as_a_mark_counts_bytes(tmp_path):
    vocabulary = {"<unk>": 0, "</s>": 1, "▁a": 2, "é": 3, "<0x0A>": 4, "▁": 5, "a": 6}
    backend = Backend(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    assert HuggingFaceTokenizer(str(tmp_path)).token_bytes.tolist() == [0, 0, 2, 2, 1, 1, 1]


def test_what_is_no_tokenizer_is_named(tmp_path, bpe_folder):
    for name in (str(tmp_path), str(tmp_path / "tokenizer.json"), "bytes", str(tmp_path / "no" / "where")):
        with pytest.raises(FileNotFoundError, match=r"is neither `byte`, nor a folder with a tokenizer\.json"):
            load_tokenizer(name)
    (tmp_path / "tokenizer.json").write_bytes((bpe_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="has no eos token, which has to end documents: name one as eos_token"):
        load_tokenizer(str(tmp_path))


# Sources


def test_the_standard_library_is_read_without_tests_and_installed_packages():
    documents = list(text_source("python-stdlib").documents("raise"))
    keys = {document.key for document in documents}
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= keys
    assert not any({"site-packages", "test", "tests", "pydoc_data"} & set(Path(key).parts) for key in keys)
    assert 8e6 < sum(len(document.text) for document in documents) < 20e6
    by_key = dict(documents)
    assert by_key["argparse.py"].encode() == Path(sys.modules["argparse"].__file__ or "").read_bytes()


def test_python_files_of_any_encoding_are_read(tmp_path):
    contents = {
        "a.py": "# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"),
        "b.py": b"# coding: no-such\nx = 1\n",
        "c.py": b"x = '\xff\xfe'\n",
        "d.py": "\ufeffx = 'ü'\r\n".encode(),
        "e.py": b"",
        "f.py": b"\x00\xff\n\xfe" * 9,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    documents = dict(PythonFiles("mine", [(name, tmp_path / name) for name in contents]).documents("raise"))
    assert "é" in documents["a.py"] and "�" in documents["c.py"]
    assert documents["d.py"].endswith("'ü'\r\n"), "line ends stay"
    assert documents.keys() == contents.keys() - {"e.py"}


def test_the_topics_are_those_of_help():
    from pydoc_data.topics import topics

    documents = dict(text_source("python-topics").documents("raise"))
    assert documents.keys() == topics.keys()
    assert all(documents[name] == text.strip() + "\n" for name, text in topics.items())


def test_folders_patterns_files_and_rows_give_their_documents(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.txt").write_text("second")
    (folder / "a.md").write_text("first")
    (folder / "c.rst").write_text("third")
    (folder / "rows.jsonl").write_text('{"text": "row 1"}\n\n{"text": "row 2", "more": 1}\n{"text": ""}\n')

    def read(name: object) -> list[tuple[str, str]]:
        return [tuple(document) for document in text_source(str(name)).documents("raise")]

    rows = [("row 1", "row 1"), ("row 2", "row 2")]
    assert read(folder) == [("a.md", "first"), ("deep/b.txt", "second"), *rows]
    assert read(folder / "**" / "*.txt") == [("deep/b.txt", "second")]
    assert read(folder / "*.rst") == [("c.rst", "third")]
    assert read(folder / "c.rst") == [("c.rst", "third")]
    assert read(folder / "rows.jsonl") == rows


def test_a_file_whose_name_is_not_utf_8_is_read_like_others(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    odd = os.fsdecode(b"caf\xe9.txt")
    (folder / "a.txt").write_text("first")
    try:
        (folder / odd).write_text("second")
    except (OSError, UnicodeError):
        pytest.skip("not measured: this file system takes UTF-8 names only")
    assert dict(text_source(str(folder)).documents("raise")) == {"a.txt": "first", odd: "second"}
    (corpus,) = read_corpora([str(folder)], BYTES, 0.5, "exact", "raise")
    assert corpus.facts.num_documents == 2 and len(corpus.train) and len(corpus.val)
    names = [f"{number}.txt" for number in range(50)]
    assert held_out([*names, odd], 0.3)[:50].tolist() == held_out(names, 0.3).tolist(), "others stay where they are"


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no source 'python-stdlb': give a file, .* python-stdlib"):
        text_source("python-stdlb")
    with pytest.raises(FileNotFoundError, match=r"holds no file that ends in \.txt"):
        text_source(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt holds no text\."):
        read_corpora([str(tmp_path / "empty.txt")], BYTES, 0.1, "exact", "raise")
    rows = ['{"text": "fine"}', '{"texts": 1}', "{", '{"text": 5}', "[1]", '{"text": "\\ud800"}', '{"text": "good"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"5 of 7 rows of .*jsonl are malformed \(line 2: it has no text; line 3: it is no JSON"):
        read_corpora([str(path)], BYTES, 0.0, "exact", "raise")
    with pytest.warns(UserWarning, match=r"5 of 7 rows .* and are left out"):
        (corpus,) = read_corpora([str(path)], BYTES, 0.0, "exact", "skip")
    assert corpus.facts.num_malformed == 5
    assert BYTES.decode(corpus.train.tokens) == "finegood"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"1 of 1 files of .*latin\.txt are malformed \(latin\.txt: it is no UTF-8 text"):
        read_corpora([str(tmp_path / "latin.txt")], BYTES, 0.0, "exact", "raise")


# De-duplication


def test_exact_duplicates_differ_in_white_space_only():
    seen = Deduplicator("exact")
    texts = ["a b", "a  b\n", "a b c", "ab", "A b"]
    assert [seen.is_duplicate(text) for text in texts] == [False, True, False, False, False]
    everything = Deduplicator("none")
    assert not any(everything.is_duplicate("a") for _ in range(3))


def words(rng: np.random.Generator, count: int) -> list[str]:
    return ["".join(chr(97 + letter) for letter in rng.integers(0, 26, 6)) for _ in range(count)]


def similarity(one: str, two: str) -> float:
    """Jaccard similarity of the sets of runs of 16 characters."""
    runs = [{text[i : i + 16] for i in range(len(text) - 15)} for text in (one, two)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_the_sketch_estimates_the_overlap():
    rng = np.random.default_rng(0)
    for changed in (0, 2, 5, 10, 40, 200):
        errors = []
        for _ in range(20):
            first = words(rng, 300)
            second = list(first)
            for place in rng.choice(300, min(changed, 300), replace=False):
                second[place] = words(rng, 1)[0]
            one, two = " ".join(first), " ".join(second)
            errors.append((minhash(one) == minhash(two)).mean() - similarity(one, two))
        assert abs(np.mean(errors)) < 0.04, "unbiased"
        assert np.std(errors) < 0.07


def test_near_duplicates_are_found_and_others_stay():
    rng = np.random.default_rng(1)
    originals = [words(rng, 200) for _ in range(60)]
    near = [[*text[:100], "changed", *text[101:]] for text in originals]
    half = [[*text[:100], *words(rng, 100)] for text in originals]
    seen = Deduplicator("minhash")
    assert not any(seen.is_duplicate(" ".join(text)) for text in originals)
    assert sum(seen.is_duplicate(" ".join(text)) for text in near) >= 59
    assert not any(seen.is_duplicate(" ".join(text)) for text in half)
    assert not seen.is_duplicate("short") and not seen.is_duplicate("brief") and seen.is_duplicate("short ")


# What is held out


@given(st.lists(st.text(min_size=1), min_size=2, max_size=50, unique=True), st.floats(0.01, 0.99))
def test_what_is_held_out_does_not_depend_on_order_and_neither_side_is_empty(keys, share):
    chosen = dict(zip(keys, held_out(keys, share), strict=True))
    backwards = dict(zip(reversed(keys), held_out(keys[::-1], share), strict=True))
    assert chosen == backwards
    assert any(chosen.values()) and not all(chosen.values())
    assert not held_out(keys, 0).any()


def test_the_held_out_share_is_right_and_grows_with_the_fraction():
    keys = [f"file {number}.py" for number in range(4000)]
    small, large = held_out(keys, 0.05), held_out(keys, 0.2)
    assert 0.04 < small.mean() < 0.06 and 0.18 < large.mean() < 0.22
    assert not (small & ~large).any()


def test_files_are_on_one_side_each_and_the_bytes_are_those_of_the_text():
    (corpus,) = read_corpora(["python-stdlib"], BYTES, 0.05, "exact", "raise")
    documents = {document.text for document in text_source("python-stdlib").documents("raise")}
    sides = []
    for part in (corpus.train, corpus.val):
        pieces = np.split(np.asarray(part.tokens), part.ends[:-1])
        assert all(piece[-1] == BYTES.eos_id for piece in pieces)
        sides.append({BYTES.decode(piece[:-1]) for piece in pieces})
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == corpus.facts.num_documents
    assert sides[0] | sides[1] <= documents
    assert {" ".join(text.split()) for text in documents} == {" ".join(text.split()) for text in sides[0] | sides[1]}
    assert 0.02 < len(sides[1]) / corpus.facts.num_documents < 0.08
    facts = corpus.facts
    assert facts.train_bytes + facts.val_bytes == facts.text_bytes == sum(len(t.encode()) for t in sides[0] | sides[1])


def test_of_a_single_document_the_end_is_held_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij")
    (corpus,) = read_corpora([str(path)], BYTES, 0.2, "exact", "raise")
    assert BYTES.decode(corpus.train.tokens) == "abcdefgh" and BYTES.decode(corpus.val.tokens) == "ij"
    assert corpus.facts.text_bytes == corpus.facts.num_bytes == 10


# The cache


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_a_source_is_tokenised_once_and_anew_when_anything_changes(tmp_path, monkeypatch, bpe_folder):
    name = write_rows(tmp_path / "rows.jsonl", ["one", "two", "three"])
    calls = []
    plain = ByteTokenizer.encode_many
    monkeypatch.setattr(ByteTokenizer, "encode_many", lambda self, texts: calls.append(len(texts)) or plain(self, texts))
    for _ in range(3):
        read_corpora([name], BYTES, 0.1, "exact", "raise")
    assert calls == [3]
    read_corpora([name], BYTES, 0.5, "exact", "raise")
    write_rows(tmp_path / "rows.jsonl", ["one", "two", "thref"])
    read_corpora([name], BYTES, 0.1, "exact", "raise")
    assert calls == [3, 3, 3]
    read_corpora([name], load_tokenizer(str(bpe_folder)), 0.1, "exact", "raise")
    assert len(list((cache_folder() / "tokens").iterdir())) == 4
    assert not list((cache_folder() / "partial").iterdir())


def test_an_interrupted_run_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    name = write_rows(tmp_path / "rows.jsonl", ["one", "two"])

    def stop(self, texts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ByteTokenizer, "encode_many", stop)
        read_corpora([name], BYTES, 0.0, "exact", "raise")
    assert not list((cache_folder() / "tokens").iterdir())
    (corpus,) = read_corpora([name], BYTES, 0.0, "exact", "raise")
    assert BYTES.decode(corpus.train.tokens) == "onetwo"


def _read(name: str) -> int:
    return len(read_corpora([name], BYTES, 0.1, "exact", "raise")[0].train)


def test_processes_at_once_agree(tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", [f"text {number} " * 100 for number in range(300)])
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sizes = pool.map(_read, [name] * 3)
    assert len(set(sizes)) == 1 and len(list((cache_folder() / "tokens").iterdir())) == 1


def test_of_equal_documents_the_first_stays_across_sources(tmp_path, caplog):
    first = write_rows(tmp_path / "a.jsonl", ["alpha", "beta", "alpha "])
    second = write_rows(tmp_path / "b.jsonl", ["gamma", "beta"])
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        one, two = read_corpora([first, second], BYTES, 0.0, "exact", "raise")
    assert (one.facts.num_duplicates, two.facts.num_duplicates) == (1, 1)
    assert BYTES.decode(one.train.tokens) + BYTES.decode(two.train.tokens) == "alphabetagamma"
    assert (
        f"a.jsonl: 9 bytes of text in 2 documents; left out are 1 duplicates and 0 malformed ones; SHA-256 {one.facts.sha256}"
        in (caplog.text)
    )
    (alone,) = read_corpora([second], BYTES, 0.0, "exact", "raise")
    assert BYTES.decode(alone.train.tokens) == "gammabeta", "the cache knows what came before"
    third = write_rows(tmp_path / "c.jsonl", ["gamma", "delta"])
    *_, last = read_corpora([first, second, third], BYTES, 0.0, "exact", "raise")
    assert BYTES.decode(last.train.tokens) == "delta", "also what was in the cache is known"
    kept = read_corpora([first, second], BYTES, 0.0, "none", "raise")
    assert [corpus.facts.num_documents for corpus in kept] == [3, 2]


def test_a_tokenizer_that_loses_bytes_is_told_of(tmp_path):
    backend = Backend(models.WordLevel({"<unk>": 0, "</s>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    name = write_rows(tmp_path / "rows.jsonl", ["one two"])
    with pytest.warns(UserWarning, match=r"does not keep every byte .* stand for 6 bytes, the text has 7.* factor of 1\.1667"):
        read_corpora([name], load_tokenizer(str(tmp_path)), 0.0, "exact", "raise")


# Ids on disk


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=9), st.floats(0.01, 0.9))
def test_files_of_ids_round_trip_and_are_divided_between_documents(tmp_path_factory, texts, share):
    path = tmp_path_factory.mktemp("ids") / "mine.bin"
    write_token_file(path, map(BYTES.encode, texts), BYTES)
    whole, sha = open_token_file(path, BYTES)
    assert [BYTES.decode(ids) for ids in np.split(np.asarray(whole.tokens), whole.ends[:-1])] == texts
    train, val = whole.split(share)
    assert np.array_equal(np.concatenate([train.tokens, val.tokens]), whole.tokens)
    assert len(train.ends) + len(val.ends) == len(texts)
    if len(texts) > 1:
        assert train.ends[-1] == len(train) > 0 and val.ends[-1] == len(val) > 0
        assert len(val) >= share * len(whole) or len(train.ends) == 1
    for part in (train, val):
        assert part.num_bytes(BYTES.token_bytes.numpy()) == len(part) - len(part.ends)
    path.with_suffix(".json").unlink()
    again, same = open_token_file(path, BYTES)
    assert same == sha and np.array_equal(again.ends, whole.ends)
    path.with_suffix(".idx.npy").unlink()
    assert np.array_equal(open_token_file(path, BYTES)[0].ends, whole.ends), "every eos ends a document"


def stopping(documents):
    yield from documents
    raise KeyboardInterrupt


def test_an_interrupted_file_of_ids_is_not_taken_for_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    with pytest.raises(KeyboardInterrupt):
        write_token_file(path, stopping([[1, 2], [3]]), BYTES)
    with pytest.raises(FileNotFoundError, match=r"a\.bin does not exist"):
        open_token_file(path, BYTES)
    write_token_file(path, [[4, 5, 6]], BYTES)
    before = open_token_file(path, BYTES)[1]
    with pytest.raises(KeyboardInterrupt):
        write_token_file(path, stopping([[1, 2], [3]]), BYTES)
    file, sha = open_token_file(path, BYTES)
    assert sha == before and file.tokens.tolist() == [4, 5, 6, 257], "the one of before stays"

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space left"):
            write_token_file(path, [[1, 2], [3]], BYTES)
    with pytest.raises(FileNotFoundError, match=r"a\.bin does not exist"):
        open_token_file(path, BYTES)
    write_token_file(path, [[1, 2], [3]], BYTES)
    assert open_token_file(path, BYTES)[0].tokens.tolist() == [1, 2, 257, 3, 257]
    assert sorted(found.name for found in tmp_path.glob("a.*")) == ["a.bin", "a.idx.npy", "a.json"]


def test_a_worker_that_is_sent_a_file_is_not_sent_the_ids(tmp_path):
    file = write_token_file(tmp_path / "a.bin", [np.zeros(50_000)], BYTES)
    assert len(file.tokens) == 50_001
    assert len(pickle.dumps(file)) < 2000
    assert np.array_equal(pickle.loads(pickle.dumps(file)).tokens, file.tokens)  # noqa: S301


def test_large_vocabularies_have_wide_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 70_000)
    write_token_file(tmp_path / "a.bin", [[69_999, 1]], BYTES)
    file, _ = open_token_file(tmp_path / "a.bin", BYTES)
    assert file.tokens.dtype == np.int32 and file.tokens.tolist() == [69_999, 1, 257]
    np.array([-5, 257], dtype="<i4").tofile(tmp_path / "b.bin")
    with pytest.raises(ValueError, match="holds the id 4294967291, and the tokenizer has ids from 0 to 69999"):
        open_token_file(tmp_path / "b.bin", BYTES)


def test_files_of_ids_that_do_not_fit_are_named(tmp_path, bpe_folder):
    path = tmp_path / "a.bin"
    with pytest.raises(FileNotFoundError, match=r"a\.bin does not exist"):
        open_token_file(path, BYTES)
    with pytest.raises(ValueError, match=r"Document 1 holds the id 259; the vocabulary has 259 ids"):
        write_token_file(path, [[1], [2, 259]], BYTES)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes, and should hold some ids of 2 bytes"):
        open_token_file(path, BYTES)
    np.array([5, 400, 257], dtype="<u2").tofile(path)
    with pytest.raises(ValueError, match="holds the id 400, and the tokenizer has ids from 0 to 258"):
        open_token_file(path, BYTES)
    np.array([5, 6], dtype="<u2").tofile(path)
    with pytest.raises(ValueError, match=r"has no a\.idx\.npy beside it and does not end with the eos id 257"):
        open_token_file(path, BYTES)
    np.save(tmp_path / "a.idx.npy", [1])
    with pytest.raises(ValueError, match=r"do not ascend to the 2 ids of a\.bin"):
        open_token_file(path, BYTES)
    np.save(tmp_path / "a.idx.npy", [1, 2])
    with pytest.raises(ValueError, match=r"2 of 2 documents of .* do not end with the eos id 257, first the one that ends at 1"):
        open_token_file(path, BYTES)
    write_token_file(path, [[1, 2, 3]], BYTES)
    with pytest.raises(ValueError, match="written with another tokenizer"):
        open_token_file(path, load_tokenizer(str(bpe_folder)))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="has 6 bytes, and should hold 4 ids of 2 bytes: it is empty or cut off"):
        open_token_file(path, BYTES)
    assert torch.equal(BYTES.token_bytes[:256], torch.ones(256, dtype=torch.int64))


def test_the_bible_is_divided_into_its_books(tmp_path):
    verses = "        1001001: 1,\n        1001002: 14,\n        2001001: 25,\n"
    (tmp_path / "bible.py").write_text(
        f'bible = Bible(\n    """\nIn the dawn. And night.\nNow these.\n""",\n    {{\n{verses}    }},\n)\n'
    )
    documents = list(Bible("kjv", [("bible.py", tmp_path / "bible.py")]).documents("raise"))
    assert [document.key for document in documents] == ["book 1", "book 2"]
    assert "".join(document.text for document in documents).replace("\n", "") == "In the dawn. And night.Now these."
