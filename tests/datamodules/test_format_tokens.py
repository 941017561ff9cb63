"""Training on the format alone: which tokens overlap a match, with bytes and with tokenizers that join and split characters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from datamodules import Preferences
from datamodules.conversations.format_tokens import FormatTokens
from datamodules.conversations.preferences import Pair
from datamodules.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

BYTES = ByteTokenizer()
TAGS = ["</?b>"]
TEMPLATE = (
    "{% for m in messages %}<role>{{ m['role'] }}</role>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|endoftext|>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<role>assistant</role>{% endif %}"
)


def saved(backend: Backend, folder: Path) -> HuggingFaceTokenizer:
    folder.mkdir(exist_ok=True)
    backend.add_special_tokens(["<|endoftext|>", "<role>", "</role>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def byte_level(folder: Path) -> HuggingFaceTokenizer:
    """Bytes, some of them joined; its offsets leave spaces out."""
    merges = [("Ġ", "h"), ("Ġh", "i"), ("<", "b"), ("Ġ", "Ġ"), (">", "x")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Backend(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return saved(backend, folder)


def sentence_pieces(folder: Path) -> HuggingFaceTokenizer:
    """Pieces with a mark for the space; unknown characters as bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁<>/bhi", "▁h", "▁hi"]
    merges = [("▁", "h"), ("▁h", "i")]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return saved(backend, folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: Any) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return [BYTES, byte_level(folder / "bytes"), sentence_pieces(folder / "pieces")]


@given(st.text("<>/b hi\n中é😀x", max_size=40))
def test_spans_cover_the_text_in_order_and_marks_are_those_of_their_characters(tokenizers: Any, text: str) -> None:
    matched = np.zeros(len(text), dtype=bool)
    for at in range(len(text)):
        for tag in ("<b>", "</b>"):
            if text.startswith(tag, at):
                matched[at : at + len(tag)] = True
    for tokenizer in tokenizers:
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == tokenizer.encode(text) and spans.shape == (len(ids), 2)
        assert {at for begin, end in spans.tolist() for at in range(begin, end)} == set(range(len(text)))
        assert (np.diff(spans, axis=0) >= 0).all() and (spans[:, 0] < spans[:, 1]).all()
        marks = FormatTokens(TAGS).marks(text, spans)
        assert marks.tolist() == [bool(matched[begin:end].any()) for begin, end in spans.tolist()]


def test_tokens_that_reach_into_a_match_and_white_space_count(tokenizers: Any) -> None:
    _, tokenizer, pieces = tokenizers
    ids, spans = tokenizer.encode_with_spans("a  hi<b>x")
    found = [tokenizer.transformers.convert_ids_to_tokens(number) for number in ids]
    assert found == ["a", "Ġ", "Ġhi", "<b", ">x"]
    assert FormatTokens(TAGS).marks("a  hi<b>x", spans).tolist() == [False, False, False, True, True]
    assert FormatTokens(["a "]).marks("a  hi<b>x", spans).tolist() == [True, True, False, False, False]
    assert FormatTokens(["  "]).marks("a  hi<b>x", spans).tolist() == [False, True, True, False, False]
    ids, spans = pieces.encode_with_spans("hi中")
    assert len(ids) == 4 and FormatTokens(["中"]).marks("hi中", spans).tolist() == [False, True, True, True]


def test_empty_matches_are_no_format() -> None:
    spans = BYTES.encode_with_spans("axx")[1]
    assert FormatTokens(["x*"]).marks("axx", spans).tolist() == [False, True, True]
    assert not FormatTokens(["^", "$"]).marks("axx", spans).any()
    assert FormatTokens(["a"]).marks("", BYTES.encode_with_spans("")[1]).shape == (0,)


# In preferences


def preferences(folder: Path, rows: list[dict[str, Any]], patterns: list[str] = TAGS, **options: Any) -> Preferences:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Preferences(path=path, val_fraction=0.0, system=None, format_patterns=patterns, **options)


def counted(pair: Pair, tokenizer: Tokenizer = BYTES) -> tuple[str, str]:
    sides = ((pair.chosen, pair.chosen_learned), (pair.rejected, pair.rejected_learned))
    return tuple(tokenizer.decode([n for n, mark in zip(*side, strict=True) if mark]) for side in sides)  # type: ignore[return-value]


GOOD = {"prompt": "<b>?", "chosen": "é <b>yes</b>", "rejected": "no</b>"}


def test_labels_are_those_of_the_format_for_both_answers(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "rejected": "no"}]
    for packed in (False, True):
        data = preferences(tmp_path, rows, batch_size=2, packed=packed)
        assert [counted(pair) for pair in data.splits[0]] == [("<b></b>", "</b>"), ("<b></b>", "")], "no prompt, no eos"
        (batch,) = list(data.train_dataloader())
        labels = [batch[name] for name in batch if name.endswith("labels")]
        kept = sorted(int(n) for label in labels for n in label[label != -100])
        assert kept == sorted(b"<b></b>" * 2 + b"</b>")


def test_messages_are_searched_as_they_are_written(tmp_path: Path, tokenizers: Any) -> None:
    def say(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text}

    call = {"role": "assistant", "content": "<b>é", "tool_calls": [{"name": "f", "arguments": {}}]}
    row = {"prompt": [{"role": "user", "content": "<b>"}], "chosen": [say("x<b>é</b>y")], "rejected": [say("z")]}
    (pair,) = preferences(tmp_path, [row]).splits[0]
    assert counted(pair) == ("<b></b>", "")
    (pair,) = preferences(tmp_path, [{**row, "chosen": [call]}], [r'\{"name"']).splits[0]
    assert counted(pair) == ('{"name"', "")
    for name in ("ling", "tokenizer"):
        data = preferences(tmp_path, [row], tokenizer=tokenizers[1].name, template=name)
        (pair,) = data.splits[0]
        assert counted(pair, tokenizers[1]) == ("<b></b>", "")
    # The tokenizer's own template writes the mark at the end, so that it can be format.
    data = preferences(tmp_path, [row], [r"<\|endoftext\|>"], tokenizer=tokenizers[1].name, template="tokenizer")
    (pair,) = data.splits[0]
    assert [n for n, mark in zip(pair.chosen, pair.chosen_learned, strict=True) if mark] == [tokenizers[1].eos_id]


def test_pairs_without_a_format_are_counted_or_left_out(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "chosen": "plain"}, GOOD, {**GOOD, "chosen": "plain too"}]
    message = r"2 of 4 rows of .*line 2: no token of the chosen answer is format, as format_patterns says; line 4: no token"
    with pytest.raises(ValueError, match=message + ".*on_error: skip"):
        preferences(tmp_path, rows).setup("fit")
    with pytest.warns(UserWarning, match=message):
        assert len(preferences(tmp_path, rows, on_error="skip").splits[0]) == 2
    # What is cut off does not count: of the first, the beginning tag is left, of the second nothing.
    rows = [GOOD, {**GOOD, "chosen": "0123456789<b>"}]
    with pytest.warns(UserWarning, match="1 lose their end, 1 are left out"):
        (pair,) = preferences(tmp_path, rows, too_long="truncate", seq_len=12).splits[0]
    assert counted(pair) == ("<b>", "</b>") and len(pair.chosen) == len(pair.chosen_learned) == 12


def test_references_of_whole_answers_are_left_out(tmp_path: Path) -> None:
    rows = [{**GOOD, "reference_chosen_logps": -3.0, "reference_rejected_logps": -4.0}]
    with pytest.warns(UserWarning, match="those of whole answers, and are left out .*another reference than precomputed"):
        data = preferences(tmp_path, rows, batch_size=1)
        assert data.splits[0][0].reference_logps is None
    assert "reference_chosen_logps" not in next(iter(data.train_dataloader()))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [([], r"\[\], and must be a list"), ("<b>", "'<b>', and must be a list"), (["a", "("], r"has '\(', which is no regular")],
)
def test_bad_patterns_are_refused(patterns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preferences(path=Path("pairs.jsonl"), format_patterns=patterns)


def test_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    class Slow(Tokenizer):
        vocab_size, eos_id, bos_id, pad_id = 2, 0, None, 0
        token_bytes = fingerprint = None  # type: ignore[assignment]

        def encode(self, text: str, special: bool = False) -> list[int]:
            return [1] * len(text)

        def decode(self, ids: Any) -> str:
            return "x" * len(ids)

    data = preferences(tmp_path, [GOOD])
    data.tokenizer = Slow()  # type: ignore[misc]
    with pytest.raises(
        ValueError, match=r"Slow does not tell which characters its ids stand for .* take tokenizer: byte, or a fast"
    ):
        data.setup("fit")
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(FileNotFoundError, match=r"nor a folder with a tokenizer\.json \(the file of a fast tokenizer\)"):
        preferences(tmp_path, [GOOD], tokenizer=str(folder)).setup("fit")
