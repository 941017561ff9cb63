"""Rationales as batches: parts and steps of every tokenizer, held-out items and templates, ordered passes, fingerprints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from benchmarks.train_bpe import ZOO, gsm_symbolic_texts, train_bpe
from datamodules import Rationales, load_tokenizer
from datamodules.conversations.rationale_files import CONNECTOR, Rationale, read_rationales, source_path
from datamodules.conversations.rationales import encode_rationale, question_text
from datamodules.conversations.steps import StepSplitter
from datamodules.text.tokenizer import HuggingFaceTokenizer

ROWS = read_rationales(source_path("gsm-symbolic"))[::170]
CHARACTERS = sorted(set("".join(row.question + row.rationale + row.answer for row in ROWS)) | set("QA:'Therfo,tanswi"))


def saved(backend: Backend, folder: Path, special: dict[str, str]) -> HuggingFaceTokenizer:
    folder.mkdir()
    backend.add_special_tokens(list(special.values()))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({f"{role}_token": token for role, token in special.items()}))
    return HuggingFaceTokenizer(str(folder))


def t5_like(folder: Path) -> HuggingFaceTokenizer:
    """Unigram pieces with a mark for the space; lines end in spaces, which are joined; no bos."""
    pieces = [("<unk>", -20.0), ("▁", -4.0), *((character, -6.0) for character in CHARACTERS if not character.isspace())]
    pieces += [(f"▁{word}", -5.0) for word in ("the", "is", "answer", "Therefore", "He", "step", "of")]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return saved(backend, folder, {"pad": "<pad>", "eos": "</s>"})


def llama_like(folder: Path) -> HuggingFaceTokenizer:
    """Pieces with a mark for the space and one at the beginning; unknown characters as bytes; bos, and no padding."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(c for c in CHARACTERS if not c.isspace()), "▁i", "▁is"]
    merges = [("▁", "i"), ("▁i", "s")]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return saved(backend, folder, {"bos": "<s>", "eos": "</s>"})


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {"t5": t5_like(folder / "t5"), "llama": llama_like(folder / "llama")}
    return {"byte": load_tokenizer("byte"), "shipped": load_tokenizer("rlhf-vader-sft"), **made}


@pytest.fixture
def file(tmp_path):
    """Eight templates with five questions each."""
    rows = [
        {
            "template": str(t),
            "question": f"What is {t} + {n}?",
            "rationale": f"{t} and {n}.\nIt is {t + n}.",
            "answer": str(t + n),
        }
        for t in range(8)
        for n in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def texts(examples) -> list[Rationale]:
    return [example.text for example in examples]


def plain(text: str) -> str:
    return "".join(text.split())


# Parts and steps


@pytest.mark.parametrize("name", ["byte", "shipped", "t5", "llama"])
def test_an_example_is_the_question_that_generation_continues_then_whole_steps_then_the_answer(tokenizers, name):
    tokenizer = tokenizers[name]
    splitter = StepSplitter()
    for row in ROWS:
        example = encode_rationale(row, tokenizer, splitter)
        ids, step_ids, start = example.ids.tolist(), example.step_ids, example.num_question
        assert ids[:start] == tokenizer.encode(question_text(row.question)) and ids[-1] == tokenizer.eos_id
        stop = start + int((step_ids >= 0).sum())
        assert (step_ids[start:stop] >= 0).all() and (step_ids[:start] == -1).all() and (step_ids[stop:] == -1).all()
        assert set(np.diff(step_ids[start:stop])) <= {0, 1} and step_ids[start] == 0
        assert plain(tokenizer.decode(ids[stop:])) == plain(f"{CONNECTOR} {row.answer}")
        steps = [tokenizer.decode(example.ids[step_ids == step]) for step in range(step_ids.max() + 1)]
        assert [plain(step) for step in steps] == [plain(step) for step in splitter.split(row.rationale)]


@pytest.mark.parametrize("name", ["byte", "shipped"])
def test_decoded_ids_are_the_template_of_the_paper(tokenizers, name):
    example = encode_rationale(Rationale("Q?", "One.\n2 é", "3"), tokenizers[name], StepSplitter())
    whole = "Q: Q? A: Let's think step by step One.\n2 é Therefore, the answer is 3"
    assert tokenizers[name].decode(example.ids) == whole


def test_a_tokenizer_that_joins_question_and_rationale_is_refused(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: n for n, piece in enumerate([*alphabet, "pĠ"])}, [("p", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.raises(ValueError, match=r"joins the end of a question with its rationale.*do not reach over spaces"):
        encode_rationale(ROWS[0], saved(backend, tmp_path / "joins", {"eos": "</s>"}), StepSplitter())


# Batches


def test_batches_have_ids_as_labels_on_rationale_and_answer_and_steps_on_the_rationale(file):
    data = Rationales(source=str(file), val_fraction=0.2, batch_size=4, seed=3)
    train = data.splits[0]
    seen = []
    for batch in data.train_dataloader():
        ids, mask, labels, step_ids = (batch[name] for name in ("input_ids", "attention_mask", "labels", "step_ids"))
        assert all(value.dtype == torch.int64 for value in (ids, mask, labels, step_ids, batch["index"]))
        assert (mask[:, 1:] <= mask[:, :-1]).all() and (ids[mask == 0] == data.tokenizer.pad_id).all()
        assert (labels[mask == 0] == -100).all() and (step_ids[mask == 0] == -1).all()
        for row, index in enumerate(batch["index"].tolist()):
            example = train[index]
            assert ids[row][mask[row] == 1].tolist() == example.ids.tolist()
            assert torch.equal(labels[row][labels[row] != -100], ids[row][mask[row] == 1][example.num_question :])
            assert step_ids[row, : len(example.ids)].tolist() == example.step_ids.tolist()
            seen.append(index)
    assert len(set(seen)) == len(seen) == len(train) // 4 * 4 and seen != sorted(seen)


def test_questions_are_padded_on_the_left_and_carry_the_answer(file):
    data = Rationales(source=str(file), val_fraction=0.2, template_fraction=0.3, batch_size=64)
    rows, questions = data.val_dataloader()
    (batch,) = questions
    val = data.splits[1]
    assert len(rows.dataset) == len(val) == len(batch["index"])
    assert batch["answer"] == [example.text.answer for example in val]
    assert batch["question"] == [example.text.question for example in val]
    assert batch["group"] == [example.group for example in val]
    for row, example in enumerate(val):
        real = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        assert bool(batch["attention_mask"][row, -1]) and real.tolist() == example.ids[: example.num_question].tolist()
        assert data.tokenizer.decode(real) == batch["prompt"][row] == question_text(example.text.question)
    assert len(Rationales(source=str(file), ask_questions=False).val_dataloader()) == 1


def test_batches_in_which_nothing_counts(file):
    rows, questions = Rationales(source=str(file)).val_dataloader()
    blank = rows.dataset.dataset.blank()
    assert (blank["labels"] == -100).all() and (blank["step_ids"] == -1).all() and blank["index"].tolist() == [-1]
    assert questions.dataset.dataset.blank()["index"].tolist() == [-1]


# Held out


def test_templates_are_held_out_whole_and_questions_of_the_others_beside_them(file):
    train, val = Rationales(source=str(file), val_fraction=0.2, template_fraction=0.3).splits
    trained = {row.template for row in texts(train)}
    groups = {group: [e.text for e in val if e.group == group] for group in ("items", "templates")}
    assert {row.template for row in groups["items"]} <= trained
    assert trained.isdisjoint(row.template for row in groups["templates"])
    whole = [*texts(train), *groups["items"], *groups["templates"]]
    assert len(whole) == len(set(whole)) == 40 and len(groups["templates"]) % 5 == 0 and all(groups.values())


def test_splits_are_the_same_each_time_and_train_is_in_the_order_of_the_file(file):
    first, second = (Rationales(source=str(file), template_fraction=0.2, seed=seed) for seed in (0, 1))
    assert texts(first.splits[0]) == texts(second.splits[0]) and texts(first.splits[1]) == texts(second.splits[1])
    order = {row: place for place, row in enumerate(read_rationales(file))}
    places = [order[row] for row in texts(first.splits[0])]
    assert places == sorted(places)


def test_several_rationales_of_a_question_are_on_one_side_and_it_is_asked_once(tmp_path):
    entries = [{"instruction": f"{n}?", "output": [f"It is {n}.", f"So {n}."], "label": str(n)} for n in range(20)]
    (tmp_path / "mcc.json").write_text(json.dumps(entries))
    data = Rationales(source=str(tmp_path / "mcc.json"), val_fraction=0.3)
    train, val = ([row.question for row in texts(side)] for side in data.splits)
    assert set(train).isdisjoint(val) and len(train) + len(val) == 40
    rows, questions = data.val_dataloader()
    assert len(rows.dataset) == 2 * len(questions.dataset) == len(val)


def test_fewer_examples_are_evenly_spaced(file):
    whole = Rationales(source=str(file), val_fraction=0.0, template_fraction=0.3)
    some = Rationales(source=str(file), val_fraction=0.0, template_fraction=0.3, num_train=5, num_val=2)
    train = texts(whole.splits[0])
    assert texts(some.splits[0]) == [train[place * len(train) // 5] for place in range(5)]
    assert len(some.splits[1]) == 2


def test_another_source_is_for_validation(file, tmp_path):
    row = {"passage": "He has 2.", "question": "How many?", "answer": "2 balls"}
    (tmp_path / "asdiv.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    data = Rationales(source=str(file), val_source=str(tmp_path / "asdiv.jsonl"))
    (questions,) = data.val_dataloader()
    (batch,) = questions
    assert len(data.splits[0]) == 40 and batch["answer"] == ["2", "2"] and batch["group"] == ["items"] * 2
    only = Rationales(source=str(tmp_path / "asdiv.jsonl"))
    (questions,) = only.test_dataloader()
    assert len(questions.dataset) == 2
    for loader in (only.train_dataloader, only.ordered_train_dataloader):
        with pytest.raises(ValueError, match=r"No example of .* is left to train on.*no rationales, give it as val_source"):
            loader()


# Ordered passes, predict and fingerprints


def test_the_ordered_pass_has_each_training_example_once_with_its_training_index(file):
    data = Rationales(source=str(file), batch_size=7)
    batches = list(data.ordered_train_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(data.splits[0])))
    assert data.train_questions == [row.question for row in texts(data.splits[0])]
    assert "retried" not in batches[0]


def test_predict_asks_held_out_questions_or_the_users_or_gives_the_training_examples(file, tmp_path):
    def predicted(**options):
        data = Rationales(source=str(file), batch_size=50, **options)
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        return data, batch

    data, batch = predicted()
    assert batch["question"] == [row.question for row in texts(data.splits[1])]
    data, batch = predicted(val_fraction=0.0)
    assert batch["question"] == data.train_questions
    data, batch = predicted(predict_on="train")
    assert batch["index"].tolist() == list(range(len(data.splits[0]))) and (batch["step_ids"] >= 0).any(1).all()
    (tmp_path / "mine.txt").write_text("How many?\n\nWhy?\n")
    _, batch = predicted(predict_prompts=tmp_path / "mine.txt")
    assert batch["question"] == ["How many?", "Why?"] and batch["answer"] == ["", ""]
    _, batch = predicted(predict_prompts=file)
    assert batch["answer"] == [row.answer for row in read_rationales(file)]


def test_fingerprints_tell_data_steps_and_tokenizers_apart(file):
    def fingerprint(**options):
        return Rationales(source=str(file), **options).fingerprint

    same, other_steps, fewer = fingerprint(), fingerprint(step_split="line"), fingerprint(num_train=5)
    other_tokenizer = fingerprint(tokenizer="rlhf-vader-sft")
    assert same == fingerprint(seed=5) == fingerprint(step_split=r"(?<=\.)") and len(bytes.fromhex(same["data"])) == 32
    assert len({value["data"] for value in (same, fewer, other_tokenizer)}) == 3
    assert other_steps == same  # here, each line is a sentence
    assert fingerprint(step_split=" and ")["data"] != same["data"]
    assert same["tokenizer"] == fewer["tokenizer"] != other_tokenizer["tokenizer"]


def test_the_file_is_the_same_after_a_round_through_the_hyperparameters(file):
    data = Rationales(source=str(file), template_fraction=0.2, step_split="line")
    arguments = {name: value for name, value in data.hparams.items() if not name.startswith("_")}
    assert Rationales(**arguments).fingerprint == data.fingerprint


# Lengths and refusals


def test_an_example_fits_whole_or_is_refused_or_left_out(file):
    data = Rationales(source=str(file), val_fraction=0.0)
    longest = max(len(example.ids) for example in data.splits[0])
    exact = Rationales(source=str(file), val_fraction=0.0, max_length=longest)
    assert texts(exact.splits[0]) == texts(data.splits[0])
    with pytest.raises(ValueError, match=rf"examples of .* have more than max_length={longest - 1} ids.*too_long: skip"):
        _ = Rationales(source=str(file), val_fraction=0.0, max_length=longest - 1).splits
    shorter = Rationales(source=str(file), val_fraction=0.0, max_length=longest - 1, too_long="skip")
    with pytest.warns(UserWarning, match="are left out"):
        kept = shorter.splits[0]
    assert texts(kept) == [each.text for each in data.splits[0] if len(each.ids) < longest] and len(kept) < 40
    with pytest.raises(ValueError, match="raise max_length"):
        _ = Rationales(source=str(file), max_length=10, too_long="skip").splits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"template_fraction": -0.1}, "template_fraction=-0.1 must be from 0 to less than 1"),
        ({"num_train": 0}, "num_train=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"step_split": "["}, "step_split='\\['"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Rationales(**options)


def test_mixed_files_and_missing_templates_are_refused(tmp_path):
    rows = [{"question": "1?", "rationale": "It is 1.", "answer": "1"}, {"question": "2?", "answer": "2"}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"1 of 2 rows of .* have no rationale: give one to each, or to none"):
        Rationales(source=str(tmp_path / "mixed.jsonl")).setup("fit")
    (tmp_path / "plain.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"names no templates.*set it to 0"):
        Rationales(source=str(tmp_path / "plain.jsonl"), template_fraction=0.1).setup("fit")


def test_training_again_gives_the_shipped_tokenizer():
    again = json.loads(train_bpe(gsm_symbolic_texts(), 1024, digits=True).to_str())
    assert again["model"] == json.loads((ZOO / "kpod/weights/kpod-gsm-symbolic/tokenizer.json").read_text())["model"]
