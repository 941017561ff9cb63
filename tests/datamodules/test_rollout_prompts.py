"""Prompts to train on: their padding, their columns, exact resuming, and what is refused; preferences of rm-static."""

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules import Preferences, RolloutPrompts
from datamodules.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sums(folder: Path, count: int = 23) -> Path:
    return write(folder / "sums.jsonl", [{"prompt": f"{n}+{n * n}=", "answer": n + n * n, "hints": [n]} for n in range(count)])


def seen(batches: list[dict[str, Any]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def test_prompts_are_padded_on_the_left_and_keep_all_columns(tmp_path):
    data = RolloutPrompts(path=sums(tmp_path), val_fraction=0.2, batch_size=4, seed=0)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            assert ids.shape == mask.shape == (len(batch["index"]), max(map(len, batch["prompt"])))
            for row, kept, text, columns in zip(ids, mask, batch["prompt"], batch["rows"], strict=True):
                length = len(text)
                assert row[-length:].tolist() == BYTES.encode(text) and kept.tolist() == [0] * (len(row) - length) + [1] * length
                assert (row[:-length] == BYTES.pad_id).all()
                n = columns["hints"][0]
                assert columns == {"prompt": text, "answer": n + n * n, "hints": [n]} and text == f"{n}+{n * n}="


def test_a_fixed_width_is_that_of_every_batch(tmp_path):
    data = RolloutPrompts(path=sums(tmp_path), prompt_len=9, val_fraction=0.2, batch_size=4, seed=0)
    assert {batch["input_ids"].shape for batch in data.train_dataloader()} == {(4, 9)}
    blank = data.val_dataloader().dataset.dataset.blank()
    assert blank["index"].tolist() == [-1] and blank["input_ids"].shape == (1, 9) and blank["rows"] == [{}]


def test_longer_prompts_are_an_error_or_left_out_or_lose_their_beginning(tmp_path):
    path = write(tmp_path / "p.txt", ["abcdef", "ab", "abcd"])
    with pytest.raises(
        ValueError, match=r"1 of 3 prompts of .* have more than prompt_len=4 ids, the longest 6: raise prompt_len"
    ):
        _ = RolloutPrompts(path=path, prompt_len=4).splits
    with pytest.warns(UserWarning, match="0 lose their beginning, 1 are left out"):
        rows = RolloutPrompts(path=path, prompt_len=4, too_long="skip", val_fraction=0).splits[0]
    assert [prompt.text for prompt, _ in rows] == ["ab", "abcd"]
    with pytest.warns(UserWarning, match="1 lose their beginning, 0 are left out"):
        rows = RolloutPrompts(path=path, prompt_len=4, too_long="truncate", val_fraction=0).splits[0]
    assert [BYTES.decode(prompt.ids) for prompt, _ in rows] == ["cdef", "ab", "abcd"]
    with pytest.raises(ValueError, match="holds no prompt of at most prompt_len=1"), pytest.warns(UserWarning):
        _ = RolloutPrompts(path=path, prompt_len=1, too_long="skip").splits


def test_lines_of_text_have_no_columns_and_messages_are_written_by_the_template(tmp_path):
    (batch,) = RolloutPrompts(path=write(tmp_path / "p.txt", ["ab"]), val_fraction=0, batch_size=1).train_dataloader()
    assert batch["rows"] == [{}] and batch["prompt"] == ["ab"]
    row = {"messages": [{"role": "user", "content": "1+1?"}], "answer": "2"}
    data = RolloutPrompts(path=write(tmp_path / "p.jsonl", [row]), val_fraction=0, batch_size=1, system=None)
    (batch,) = data.train_dataloader()
    assert batch["prompt"] == ["<role>HUMAN</role>1+1?<role>ASSISTANT</role>"] and batch["rows"] == [row]


def test_held_out_prompts_are_a_share_or_a_file_and_equal_ones_are_on_one_side(tmp_path):
    path = write(tmp_path / "p.txt", [f"prompt {n % 50}" for n in range(100)])
    train, val = ({prompt.text for prompt, _ in side} for side in RolloutPrompts(path=path, val_fraction=0.2).splits)
    assert not train & val and len(train | val) == 50 and 4 <= len(val) <= 16
    own = write(tmp_path / "val.txt", ["mine"])
    data = RolloutPrompts(path=path, val_path=own)
    assert len(data.splits[0]) == 100 and next(iter(data.val_dataloader()))["prompt"] == ["mine"]
    assert RolloutPrompts(path=path, val_fraction=0).val_dataloader() == []


def test_predict_gives_all_prompts_of_its_file_else_those_held_out(tmp_path):
    own = write(tmp_path / "own.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "bcd", "answer": 2}])
    data = RolloutPrompts(path=tmp_path / "not read", predict_prompts=own, batch_size=8)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["prompt"] == ["a", "bcd"] and [row["answer"] for row in batch["rows"]] == [1, 2]
    data = RolloutPrompts(path=sums(tmp_path), val_fraction=0.2, batch_size=64)
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["prompt"] == next(iter(data.val_dataloader()))["prompt"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_cut_inside_an_epoch_continues_with_the_next_prompt(num_workers, tmp_path):
    path = sums(tmp_path)

    def loader(workers: int = 0):
        return RolloutPrompts(path=path, val_fraction=0.1, batch_size=3, num_workers=workers, seed=5).train_dataloader()

    whole = list(loader())
    assert len({index for batch in seen(whole) for index in batch}) == 3 * len(whole) > 15
    first, second = loader(num_workers), loader(num_workers)
    iterator = iter(first)
    begin = [next(iterator) for _ in range(2)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = list(second)
    assert seen(begin + rest) == seen(whole)
    for batch, expected in zip(begin + rest, whole, strict=True):
        assert torch.equal(batch["input_ids"], expected["input_ids"]) and batch["rows"] == expected["rows"]


def test_where_a_strategy_says_so_every_rank_has_the_same_global_prompts(tmp_path):
    path = sums(tmp_path)

    def batches(**share: int) -> list[list[int]]:
        data = RolloutPrompts(path=path, val_fraction=0, batch_size=4, seed=0)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=share, current_epoch=0, strategy=strategy)  # type: ignore[assignment]
        return seen(list(data.train_dataloader()))

    everything = batches(num_replicas=1, rank=0)
    assert everything == seen(list(RolloutPrompts(path=path, val_fraction=0, batch_size=4, seed=0).train_dataloader()))
    halves = [batches(num_replicas=2, rank=rank) for rank in (0, 1)]
    assert halves[0] != halves[1] and not {*chain(*halves[0])} & {*chain(*halves[1])}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"text": "b"}], "1 of 2 rows of .*line 2: it has neither a prompt that is a string nor messages"),
        (["{"], "line 1: it is no JSON"),
        ([{"prompt": 3}], "line 1: it has neither a prompt"),
        ([{"messages": []}], "line 1: it has no list of messages"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "line 1: the last message is the assistant's"),
        ([], "holds no prompt"),
    ],
)
def test_malformed_rows_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RolloutPrompts(path=write(tmp_path / "bad.jsonl", rows)).setup("fit")


def test_malformed_rows_are_left_out_on_request(tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"prompt": None}, {"prompt": "b"}])
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert len(RolloutPrompts(path=path, on_error="skip", val_fraction=0).splits[0]) == 2


def test_arguments_out_of_range_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="prompt_len is 0, and must be at least 1, or null"):
        RolloutPrompts(path=tmp_path, prompt_len=0)
    with pytest.raises(ValueError, match=r"val_fraction is -0\.1"):
        RolloutPrompts(path=tmp_path, val_fraction=-0.1)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        RolloutPrompts(path=tmp_path / "none.jsonl").setup("fit")


# rm-static


def test_rows_of_rm_static_are_pairs_as_they_are(tmp_path):
    prompt = "\n\nHuman: Can you <role>describe</role> it?\n\nAssistant: Yes.\n\nHuman: Do.\n\nAssistant:"
    row = {"prompt": prompt, "response": " It is red.", "chosen": " It is red.", "rejected": " No."}
    data = Preferences(path=write(tmp_path / "rm.jsonl", [row, {**row, "rejected": " What?"}]), val_fraction=0, batch_size=2)
    (batch,) = data.train_dataloader()
    assert batch["chosen_input_ids"].shape == batch["rejected_input_ids"].shape
    for number, at in enumerate(batch["index"].tolist()):
        for name, answer in (("chosen", " It is red."), ("rejected", (" No.", " What?")[at])):
            ids, labels = batch[f"{name}_input_ids"][number], batch[f"{name}_labels"][number]
            assert BYTES.decode(ids) == prompt + answer
            assert labels[labels != -100].tolist() == [*BYTES.encode(answer), BYTES.eos_id]
            assert batch[f"{name}_attention_mask"][number].sum() == len(prompt + answer) + 1


def test_a_row_of_rm_static_without_a_column_is_malformed(tmp_path):
    for row in (
        {"prompt": "a", "chosen": "b"},
        {"chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ):
        with pytest.raises(ValueError, match=r"1 of 1 rows of .* are malformed"):
            Preferences(path=write(tmp_path / "rm.jsonl", [row])).setup("fit")
