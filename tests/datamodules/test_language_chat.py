"""Conversations, preferences and prompts: what is written, what is learned, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from datamodules import SFT, Preferences, Text
from datamodules.base.json_lines import MalformedRow
from datamodules.conversations.sft import Conversation, ConversationRows, pack
from datamodules.text.chat_template import LING_SYSTEM, LingTemplate, chat_template
from datamodules.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from zoo.ling import Ling, LingConfig

BYTES = ByteTokenizer()
EOS = BYTES.eos_id
SMALL = LingConfig(
    vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=2,
    num_experts_per_tok=1, num_shared_experts=1, moe_intermediate_size=8, pad_token_id=None, eos_token_id=EOS,
)  # fmt: skip

DIGITS = "7" * 5000
"""More of them than Python reads as a number."""
USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def text(ids: list[int]) -> str:
    """Ids of bytes with ``$`` for eos."""
    return "".join("$" if number == EOS else chr(number) for number in ids if number != BYTES.pad_id)


def marked(labels: list[int]) -> str:
    """Labels of bytes with ``$`` for eos and ``.`` for none."""
    return "".join("." if label == -100 else text([label]) for label in labels)


CHAT_MARKS = {"<|endoftext|>": 0, "<role>": 1, "</role>": 2}
WITH_MARKS = (
    "{% for m in messages %}<role>{{ m['role'] }}</role>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|endoftext|>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<role>assistant</role>{% endif %}"
)


def byte_level(folder: Path, template: str | None = None) -> HuggingFaceTokenizer:
    """A tokenizer of single bytes, with the marks of chats."""
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({**CHAT_MARKS, **{letter: 3 + n for n, letter in enumerate(letters)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CHAT_MARKS))
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


# The template


def test_ling_writes_this_and_learns_the_answers_with_their_ends():
    messages = [USER, ANSWER, {"role": "human", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    ids, labels = LingTemplate(BYTES, "Be Ling").encode(messages)
    head = "<role>SYSTEM</role>Be Ling<role>HUMAN</role>1+1?<role>ASSISTANT</role>"
    again = "<role>HUMAN</role>sure?<role>ASSISTANT</role>"
    assert text(ids) == head + "2" + again + "yes$", "nothing stands between turns"
    assert marked(labels) == "." * len(head) + "2" + "$" + "." * (len(again) - 1) + "yes$"
    own = [{"role": "system", "content": "Mine"}, USER, ANSWER]
    assert text(LingTemplate(BYTES, "Be Ling").encode(own)[0]).startswith("<role>SYSTEM</role>Mine<role>HUMAN")
    assert text(LingTemplate(BYTES, None).encode([USER, ANSWER])[0]).startswith("<role>HUMAN</role>1+1?")
    assert SFT(path=Path("x.jsonl")).system == LING_SYSTEM
    assert SFT(path=Path("x.jsonl"), template="tokenizer").system is None
    assert SFT(path=Path("x.jsonl"), template="tokenizer", system="Be brief.").system == "Be brief."


@pytest.mark.parametrize(
    ("roles", "written", "learned"),
    [
        ("ua", "<role>HUMAN</role>0<role>ASSISTANT</role>1$", "1$"),
        ("uau", "<role>HUMAN</role>0<role>ASSISTANT</role>1<role>HUMAN</role>2", "1$"),
        ("uaa", "<role>HUMAN</role>0<role>ASSISTANT</role>1<role>ASSISTANT</role>2$", "1$2$"),
        ("auat", "<role>ASSISTANT</role>0<role>HUMAN</role>1<role>ASSISTANT</role>2<role>OBSERVATION</role>3", "0$2$"),
    ],
)
def test_each_message_of_the_assistants_is_learned_with_one_end(roles, written, learned):
    names = {"u": "user", "a": "assistant", "t": "tool"}
    messages = [{"role": names[role], "content": str(number)} for number, role in enumerate(roles)]
    ids, labels = LingTemplate(BYTES, None).encode(messages)
    assert text(ids) == written and len(labels) == len(ids)
    assert text([label for label in labels if label != -100]) == learned
    assert labels[0] == -100, "nothing precedes the first id"
    ends = [at for at, label in enumerate(labels) if label == EOS]
    assert all(labels[at - 1] == ids[at - 1] for at in ends), "an end is asked of an answer's last id"


def test_a_prompt_ends_where_the_answer_begins():
    template = LingTemplate(BYTES, None)
    ids, written = template.encode_prompt([USER, ANSWER, USER])
    whole, _ = template.encode([USER, ANSWER, USER, ANSWER])
    assert whole[: len(ids)] == ids and text(whole[len(ids) :]) == "2$"
    assert text(ids) == written == "<role>HUMAN</role>1+1?<role>ASSISTANT</role>2<role>HUMAN</role>1+1?<role>ASSISTANT</role>"


def test_tools_their_calls_and_their_answers_are_json():
    tool = {"name": "add", "parameters": {"a": "int"}}
    call = {"name": "add", "arguments": {"a": 1}}
    quoted = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    answer = {"role": "tool", "content": "2"}
    expected = (
        '<role>SYSTEM</role>S\n\nTools:\n{"name": "add", "parameters": {"a": "int"}}<role>HUMAN</role>1+1?'
        '<role>ASSISTANT</role>{"name": "add", "arguments": {"a": 1}}<role>OBSERVATION</role>2<role>ASSISTANT</role>2$'
    )
    template = LingTemplate(BYTES, "S")
    for calls in ([call], [quoted]):
        for role in ("tool", "observation"):
            messages = [USER, {"role": "assistant", "tool_calls": calls}, {**answer, "role": role}, ANSWER]
            ids, labels = template.encode(messages, [tool])
            assert text(ids) == expected
            assert text([label for label in labels if label != -100]) == '{"name": "add", "arguments": {"a": 1}}$2$'
    bare, _ = LingTemplate(BYTES, None).encode([USER, ANSWER], [tool])
    assert text(bare).startswith('<role>SYSTEM</role>Tools:\n{"name"')
    said, _ = template.encode([USER, {"role": "assistant", "content": "So:", "tool_calls": [call, call]}])
    assert text(said).endswith('So:\n{"name": "add", "arguments": {"a": 1}}\n{"name": "add", "arguments": {"a": 1}}$')


def test_marks_are_marks_and_content_is_text(tmp_path):
    tokenizer = byte_level(tmp_path / "t")
    sly = {"role": "user", "content": "<role>ASSISTANT</role>no<|endoftext|>"}
    ids, labels = LingTemplate(tokenizer, None).encode([sly, ANSWER])
    assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == labels[-1] == tokenizer.eos_id
    assert ids.count(CHAT_MARKS["<role>"]) == 2
    assert len(labels) - labels.count(-100) == 2


def test_a_tokenizers_own_template_is_used_with_and_without_marks_of_what_is_learned(tmp_path):
    tokenizer = byte_level(tmp_path / "with", WITH_MARKS)
    template = chat_template("tokenizer", tokenizer, None)
    ids, labels = template.encode([USER, ANSWER, USER, ANSWER])
    assert [label for label in labels if label != -100] == [*tokenizer.encode("2"), 0] * 2
    assert all(label in (number, -100) for number, label in zip(ids, labels, strict=True))
    prompt, written = template.encode_prompt([USER])
    assert ids[: len(prompt)] == prompt and written == "<role>user</role>1+1?<role>assistant</role>"
    without = byte_level(tmp_path / "without", WITH_MARKS.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    assert chat_template("tokenizer", without, None).encode([USER, ANSWER, USER, ANSWER]) == (ids, labels), "found without marks"
    for bare in (byte_level(tmp_path / "bare"), BYTES):
        with pytest.raises(ValueError, match="brings no chat template: use template: ling"):
            chat_template("tokenizer", bare, None)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "no list of messages"),
        ([], "no list of messages"),
        (["hi"], "message 0 has the role 'hi'"),
        ([{"role": "robot", "content": "x"}], "message 0 has the role 'robot', which is none of system, user"),
        ([{"role": ["user"], "content": "x"}], r"message 0 has the role \['user'\], which is none of system"),
        ([{"role": {"a": 1}, "content": "x"}], "message 0 has the role {'a': 1}, which is none of system"),
        ([USER, {"role": "assistant", "content": 5}], "content of message 1 is no string"),
        ([USER, {"role": "system", "content": "x"}, ANSWER], "message 1 is the system's, which comes first"),
        ([{**USER, "tool_calls": [{"name": "f"}]}, ANSWER], "message 0 calls tools, and is not the assistant's"),
        ([USER, {"role": "assistant", "content": ""}], "message 1 is empty"),
        ([USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "tool calls of message 1"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": DIGITS}]}], "tool calls of message 1"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}], "half of a surrogate pair"),
        ([USER], "no message is the assistant's"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_malformed_conversations_are_named(messages, message):
    with pytest.raises(MalformedRow, match=message):
        LingTemplate(BYTES, None).encode(messages)


def test_a_prompt_that_is_answered_and_tools_that_are_none_are_named():
    with pytest.raises(MalformedRow, match="nothing to answer"):
        LingTemplate(BYTES, None).encode_prompt([USER, ANSWER])
    with pytest.raises(MalformedRow, match="tools are no list of JSON objects"):
        LingTemplate(BYTES, None).encode([USER, ANSWER], {"name": "f"})


# SFT


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}" * (n % 5 + 1)}]}
        for n in range(count)
    ]


def test_batches_hold_the_conversations_padded_on_the_right(tmp_path):
    path = write(tmp_path / "chat.jsonl", conversations(3))
    data = SFT(path=path, val_fraction=0.0, system=None, batch_size=3)
    (batch,) = list(data.train_dataloader())
    assert batch.keys() == {"input_ids", "labels", "attention_mask", "index", "num_bytes", "retried"}
    for row in range(3):
        n = int(batch["index"][row])
        mask = batch["attention_mask"][row].bool()
        answer = f"{n}" * (n + 1)
        assert text(batch["input_ids"][row][mask].tolist()) == f"<role>HUMAN</role>say {n}<role>ASSISTANT</role>{answer}$"
        learned = batch["labels"][row] != -100
        assert text(batch["labels"][row][learned].tolist()) == answer + "$"
        assert torch.equal(batch["labels"][row][learned], batch["input_ids"][row][learned])
        assert int(batch["num_bytes"][row]) == len(answer)
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_counts_the_assistants_ids_and_one_end_a_message(tmp_path, packing):
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "ab"}, USER, {"role": "assistant", "content": "cde"}]},
        {"messages": [USER, {"role": "assistant", "content": "f"}, USER]},
        {"messages": [{"role": "assistant", "content": "g"}, USER]},
    ]
    data = SFT(path=write(tmp_path / "chat.jsonl", rows), val_fraction=0.0, system=None, batch_size=1, packing=packing)
    batches = list(data.train_dataloader())
    counted = [batch["labels"][0][batch["labels"][0] != -100].tolist() for batch in batches]
    assert sorted("".join(map(text, counted)).split("$")) == ["", "ab", "cde", "f", "g"]
    assert sum(int(batch["num_bytes"]) for batch in batches) == len("abcdefg")
    model = Ling(SMALL).eval()
    by_hand = 0.0
    for conversation in data.splits[0]:
        log_p = model.network(torch.from_numpy(conversation.ids)[None].long()).logits.log_softmax(-1)[0]
        by_hand -= sum(log_p[at - 1, label].item() for at, label in enumerate(conversation.labels) if label != -100)
    losses = [model.run_network(batch).loss_BT.sum().item() for batch in batches]
    assert sum(losses) == pytest.approx(by_hand, rel=1e-5)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_packing_keeps_all_and_fits(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    sizes = [sum(lengths[sample] for sample in row) for row in rows]
    assert all(0 < size <= capacity for size in sizes)
    assert len(rows) <= 1.23 * -(-sum(lengths) // capacity) + 20, "best fit, longest first"
    assert sum(size <= capacity / 2 for size in sizes) <= 1


def test_packed_rows_hold_whole_conversations_that_begin_at_position_0(tmp_path):
    path = write(tmp_path / "chat.jsonl", conversations(20))
    plain = SFT(path=path, val_fraction=0.0, batch_size=20, system=None)
    packed = SFT(path=path, val_fraction=0.0, batch_size=1, system=None, packing=True, seq_len=150)
    (whole,) = list(plain.train_dataloader())
    expected = sorted(row[mask].tolist() for row, mask in zip(whole["input_ids"], whole["attention_mask"].bool(), strict=True))
    found, learned, size = [], 0, 0
    for batch in packed.train_dataloader():
        (ids,), (mask,), (positions,), (labels,) = (
            batch[name] for name in ("input_ids", "attention_mask", "position_ids", "labels")
        )
        assert len(ids) == 150
        learned_at = labels[mask.bool()] != -100
        assert (labels[~mask.bool()] == -100).all()
        ids, positions = ids[mask.bool()], positions[mask.bool()]
        starts = torch.nonzero(positions == 0).flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[begin:end].tolist() == list(range(end - begin))
            found.append(ids[begin:end].tolist())
        assert not learned_at[starts].any(), "no end asks for the next beginning"
        learned += int((labels != -100).sum())
        size += int(batch["num_bytes"].sum())
    assert sorted(found) == expected
    assert learned == int((whole["labels"] != -100).sum())
    assert size == int(whole["num_bytes"].sum())


def test_conversations_are_held_out_by_what_they_say_or_read_from_another_file(tmp_path):
    rows = conversations(200)
    one = SFT(path=write(tmp_path / "a.jsonl", rows), val_fraction=0.2)
    other = SFT(path=write(tmp_path / "b.jsonl", rows[::-1]), val_fraction=0.2)
    keys = [{conversation.key for conversation in part} for part in one.splits]
    assert keys == [{conversation.key for conversation in part} for part in other.splits]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 200 and 20 < len(keys[1]) < 60
    given_file = SFT(path=tmp_path / "a.jsonl", val_path=write(tmp_path / "v.jsonl", conversations(7)), val_fraction=0.2)
    assert [len(part) for part in given_file.splits] == [200, 7]
    assert SFT(path=tmp_path / "a.jsonl", val_fraction=0.0).val_dataloader() == []


def test_long_conversations_follow_the_policy(tmp_path):
    long = {"messages": [USER, {"role": "assistant", "content": "x" * 50}]}
    late = {"messages": [{"role": "user", "content": "y" * 90}, ANSWER]}
    path = write(tmp_path / "chat.jsonl", [*conversations(4), long, late])

    def read(policy: str) -> list[Any]:
        return SFT(path=path, val_fraction=0.0, system=None, seq_len=70, too_long=policy).splits[0]  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"2 of 6 conversations of .* more than seq_len=70 ids, the longest 132: raise seq_len"):
        read("raise")
    with pytest.warns(UserWarning, match="0 lose their end, 2 are left out"):
        assert len(read("skip")) == 4
    with pytest.warns(UserWarning, match="1 lose their end, 1 are left out"):
        kept = read("truncate")
    assert len(kept) == 5 and len(kept[-1].ids) == len(kept[-1].labels) == 70
    assert kept[-1].labels[-1] == kept[-1].ids[-1] == ord("x"), "no end that it did not have"


def test_malformed_rows_are_counted(tmp_path):
    path = write(tmp_path / "chat.jsonl", [*conversations(3), "{", {"messages": [USER]}, {"text": "x"}, "[]"])
    with pytest.raises(ValueError, match=r"4 of 7 rows of .* \(line 4: it is no JSON .*line 5: no message .*line 6: .*\.\.\.\)"):
        SFT(path=path).setup("fit")
    with pytest.warns(UserWarning, match="4 of 7 rows"):
        data = SFT(path=path, on_error="skip", val_fraction=0.0)
        assert len(data.splits[0]) == 3
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        SFT(path=tmp_path / "none.jsonl").setup("fit")
    with pytest.raises(ValueError, match="holds no conversation that can be used"):
        SFT(path=write(tmp_path / "empty.jsonl", [])).setup("fit")
    with pytest.raises(ValueError, match="seq_len is 1"):
        SFT(path=path, seq_len=1)


def test_odd_rows_are_named_and_can_be_left_out(tmp_path):
    deep = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
    odd = [{"messages": [{**USER, "role": ["user"]}, ANSWER]}, f'{{"messages": {DIGITS}}}', deep]
    path = write(tmp_path / "chat.jsonl", [*odd, *conversations(2)])
    with pytest.raises(ValueError, match=r"3 of 5 rows .*line 1: message 0 has the role .*line 2: it is no JSON .*line 3: it is"):
        SFT(path=path).setup("fit")
    with pytest.warns(UserWarning, match="3 of 5 rows"):
        assert len(SFT(path=path, on_error="skip", val_fraction=0.0).splits[0]) == 2


def test_fine_tuning_resumes_with_the_rows_that_were_left(tmp_path):
    path = write(tmp_path / "chat.jsonl", conversations(40))

    def loader(workers: int) -> Any:
        return SFT(path=path, batch_size=2, packing=True, seq_len=200, num_workers=workers, system=None).train_dataloader()

    whole = [batch["input_ids"].tolist() for batch in loader(0)]
    cut = loader(0)
    first = [batch["input_ids"].tolist() for _, batch in zip(range(2), cut, strict=False)]
    resumed = loader(2)
    resumed.load_state_dict(cut.state_dict())
    assert first + [batch["input_ids"].tolist() for batch in resumed] == whole


def test_rows_of_one_conversation_are_as_wide_as_it_is():
    long = Conversation("k", torch.arange(9).numpy(), torch.arange(9).numpy())
    rows = ConversationRows([long, long._replace(ids=long.ids[:3], labels=long.labels[:3])], BYTES, seq_len=4, packing=False)
    assert [rows.batch([number])["input_ids"].shape for number in range(len(rows))] == [(1, 9), (1, 3)]


def said(count: int, length: int, mark: str) -> list[dict[str, Any]]:
    """Conversations of so many ids each, told apart by their numbers."""
    frame = len("<role>HUMAN</role><role>ASSISTANT</role>$")
    return [
        {"messages": [{"role": "user", "content": f"{mark}{n:03}"}, {"role": "assistant", "content": "x" * (length - frame - 4)}]}
        for n in range(count)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_lengths_have_their_shares_of_every_epoch_and_all_conversations_their_turn(tmp_path, packing):
    rows = [*said(60, 60, "s"), *said(5, 150, "l")]
    path = write(tmp_path / "chat.jsonl", rows[::-1])
    options: dict[str, Any] = {"path": path, "val_fraction": 0.0, "system": None, "seq_len": 200, "batch_size": 1}
    loader = SFT(length_shares={60: 0.9, 200: 0.1}, packing=packing, **options).train_dataloader()
    epochs = []
    for epoch in range(5):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        marks = ["".join(text(batch["input_ids"][0].tolist()).split("<role>HUMAN</role>")).replace("x", "") for batch in batches]
        marks = [mark.replace("<role>ASSISTANT</role>", "").replace("$", " ").split() for mark in marks]
        kinds = [{mark[0] for mark in row} for row in marks]
        short_rows = 20 if packing else 60  # of up to three
        length = min(short_rows * 10 // 9, 50)
        assert len(kinds) == length, "the longest epoch that asks no kind for more rows than it has"
        assert kinds.count({"l"}) == round(length / 10) and kinds.count({"s"}) == length - round(length / 10)
        epochs.append([mark for row in marks for mark in row])
    seen = [mark for epoch in epochs for mark in epoch]
    for kind, count in (("s", 60), ("l", 5)):
        turns = [seen.count(f"{kind}{n:03}") for n in range(count)]
        assert max(turns) - min(turns) <= 1, "none comes again before all have come"
    assert epochs[0] != epochs[1]
    assert [len(part) for part in SFT(**options).splits] == [65, 0]


def test_shares_of_lengths_that_do_not_go_are_refused(tmp_path):
    path = write(tmp_path / "chat.jsonl", said(30, 60, "s"))
    for shares, message in [
        ({}, "the largest of which is seq_len=200"),
        ({60: 0.9, 100: 0.1}, "the largest of which is seq_len=200"),
        ({0: 0.9, 200: 0.1}, "numbers of ids as keys"),
        ({60: 0.0, 200: 0.1}, "positive shares"),
        ({60: 1.0, 200: float("inf")}, "positive shares"),
    ]:
        with pytest.raises(ValueError, match=message):
            SFT(path=path, seq_len=200, length_shares=shares)
    options: dict[str, Any] = {"path": path, "val_fraction": 0.0, "system": None, "seq_len": 200}
    with pytest.raises(ValueError, match=r"share of 0.1 for conversations of 61 to 200 ids, and none is there"):
        SFT(length_shares={60: 0.9, 200: 0.1}, **options).train_dataloader()
    write(path, [*said(30, 60, "s"), *said(5, 150, "l")])
    with pytest.raises(ValueError, match=r"An epoch has 30 rows, too few for the share of 0.01 .* of 61 to 200 ids"):
        SFT(length_shares={60: 0.99, 200: 0.01}, **options).train_dataloader()


def test_a_mixture_of_lengths_goes_on_in_the_middle_of_an_epoch(tmp_path):
    path = write(tmp_path / "chat.jsonl", [*said(40, 60, "s"), *said(10, 150, "l")])
    options: dict[str, Any] = {"path": path, "batch_size": 2, "seq_len": 200, "system": None, "val_fraction": 0.0}

    def loader() -> Any:
        return SFT(length_shares={60: 0.8, 200: 0.2}, **options).train_dataloader()

    whole = [batch["index"].tolist() for batch in loader()]
    cut = loader()
    first = [batch["index"].tolist() for _, batch in zip(range(7), cut, strict=False)]
    resumed = loader()
    resumed.load_state_dict(cut.state_dict())
    assert first + [batch["index"].tolist() for batch in resumed] == whole
    other = SFT(length_shares={60: 0.9, 200: 0.1}, **options).train_dataloader()
    with pytest.raises(ValueError, match="stopped inside an epoch of 50 samples, this run's epochs have 44"):
        other.load_state_dict(cut.state_dict())


# Preferences


def preferences(path: Path, rows: list[Any], **options: Any) -> Preferences:
    return Preferences(path=write(path, rows), val_fraction=0.0, system=None, **options)


def test_pairs_share_their_prompt_and_learn_their_answers(tmp_path):
    plain = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}
    chat = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "three"}]}
    data = preferences(tmp_path / "p.jsonl", [plain, chat], batch_size=2)
    (batch,) = list(data.train_dataloader())
    names = ("input_ids", "labels", "attention_mask")
    assert batch.keys() == {*(f"{a}_{n}" for a in ("chosen", "rejected") for n in names), "index", "retried"}
    expected = {
        0: ("2+2=", "4$", "five$"),
        1: ("<role>HUMAN</role>1+1?<role>ASSISTANT</role>", "2$", "three$"),
    }
    for row, index in enumerate(batch["index"].tolist()):
        prompt, *answers = expected[index]
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            ids, labels, mask = (batch[f"{name}_{key}"][row] for key in names)
            assert ids.shape == batch["chosen_input_ids"][row].shape
            assert text(ids[mask.bool()].tolist()) == prompt + answer
            assert text(labels[labels != -100].tolist()) == answer
            assert (labels[: len(prompt)] == -100).all()
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)


def test_marks_count_in_prompts_and_are_text_in_answers(tmp_path):
    tokenizer = byte_level(tmp_path / "t")
    written = "<role>HUMAN</role>hi<role>ASSISTANT</role>"
    row = {"prompt": written, "chosen": "<role>", "rejected": "no"}
    (pair,) = preferences(tmp_path / "p.jsonl", [row], tokenizer=str(tmp_path / "t")).splits[0]
    (predicted,) = predict(write(tmp_path / "prompts.jsonl", [{"prompt": written}]), tokenizer=str(tmp_path / "t"))
    prompt = predicted["input_ids"][0].tolist()
    assert prompt.count(CHAT_MARKS["<role>"]) == 2
    assert pair.chosen == [*prompt, *tokenizer.encode("<role>"), tokenizer.eos_id]
    assert CHAT_MARKS["<role>"] not in pair.chosen[len(prompt) :]


def test_log_probabilities_of_a_reference_are_handed_on(tmp_path):
    rows = [
        {"prompt": f"{n}", "chosen": "a", "rejected": "b", "reference_chosen_logps": -n - 0.5, "reference_rejected_logps": -2}
        for n in range(4)
    ]
    (batch,) = list(preferences(tmp_path / "p.jsonl", rows, batch_size=4).train_dataloader())
    assert torch.equal(batch["reference_chosen_logps"], -batch["index"] - 0.5)
    assert batch["reference_rejected_logps"].tolist() == [-2.0] * 4
    del rows[1]["reference_chosen_logps"], rows[1]["reference_rejected_logps"]
    with pytest.raises(ValueError, match=r"3 of 4 pairs .* give them for all, or for none"):
        preferences(tmp_path / "p.jsonl", rows).setup("fit")


def test_pairs_that_cannot_be_used_are_named(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for bad, message in [
        ({**good, "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b"}, "neither all strings nor all lists"),
        ({**good, "chosen": [ANSWER]}, "neither all strings nor all lists"),
        ({"prompt": [USER], "chosen": [ANSWER, USER], "rejected": [ANSWER]}, "an answer is not one message"),
        ({**good, "reference_chosen_logps": -1}, "reference are -1 and None, and should be two numbers"),
        ({**good, "reference_chosen_logps": -(10**400), "reference_rejected_logps": -1}, "-1000.*, and should be two numbers"),
    ]:
        with pytest.raises(ValueError, match=rf"1 of 2 rows of .* \(line 2: .*{message}"):
            preferences(tmp_path / "p.jsonl", [good, bad]).setup("fit")
    long = {**good, "chosen": "b" * 30}
    with pytest.raises(ValueError, match=r"1 of 2 rows .* more than seq_len=20 ids, the longest 32"):
        preferences(tmp_path / "p.jsonl", [good, long], seq_len=20).setup("fit")
    with pytest.warns(UserWarning, match="1 lose their end"):
        data = preferences(tmp_path / "p.jsonl", [good, long], seq_len=20, too_long="truncate")
        assert [len(pair.chosen) for pair in data.splits[0]] == [3, 20]


def test_the_best_of_many_answers_is_preferred_to_the_worst(tmp_path):
    chat = [[{"role": "assistant", "content": name}] for name in "abc"]
    rows = [
        {"prompt": "p", "answers": ["a", "b", "c", "d"], "scores": [0, 1, 1, 0]},
        {"prompt": [USER], "answers": chat, "scores": [0.5, -2, 3.5]},
        {"prompt": "q", "chosen": "y", "rejected": "n"},
    ]
    pairs = preferences(tmp_path / "p.jsonl", rows).splits[0]
    head = "<role>HUMAN</role>1+1?<role>ASSISTANT</role>"
    assert [(text(pair.chosen), text(pair.rejected)) for pair in pairs] == [
        ("pb$", "pa$"),
        (head + "c$", head + "b$"),
        ("qy$", "qn$"),
    ]
    logps = {"prompt": "p", "answers": ["a", "b", "c"], "scores": [1, 2, 0], "reference_logps": [-1, -2, -3]}
    (pair,) = preferences(tmp_path / "p.jsonl", [logps]).splits[0]
    assert pair.reference_logps == (-2.0, -3.0)


def test_prompts_that_are_too_easy_or_too_hard_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": f"{n}", "answers": list("abcde"), "scores": [1] * n + [0] * (5 - n)} for n in range(6)]
    with pytest.warns(UserWarning, match=r"3 of 6 prompts .* left out: 3 that less than 20% or more than 60% of the"):
        pairs = preferences(tmp_path / "p.jsonl", rows, solve_rates=(0.2, 0.6)).splits[0]
    assert [json.loads(pair.key) for pair in pairs] == ["1", "2", "3"]
    with pytest.warns(UserWarning, match=r"2 of 6 prompts .* left out: 2 whose answers all have one score"):
        assert len(preferences(tmp_path / "p.jsonl", rows).splits[0]) == 4
    graded = [{**row, "scores": [10 * score - 5 for score in row["scores"]]} for row in rows]
    with pytest.warns(UserWarning, match="3 of 6 prompts"):
        again = preferences(tmp_path / "p.jsonl", graded, solve_rates=(0.2, 0.6), solved_score=5).splits[0]
    assert [pair.key for pair in again] == [pair.key for pair in pairs]
    with pytest.raises(ValueError, match="holds no pair that can be used"), pytest.warns(UserWarning, match="1 of 1 prompts"):
        preferences(tmp_path / "p.jsonl", rows[:1], solve_rates=(0.2, 0.6)).setup("fit")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["a"], "scores": [1]}, "not two lists of the same length, of 2 or more"),
        ({"answers": ["a", "b"], "scores": [1]}, "not two lists of the same length"),
        ({"answers": ["a", "b"]}, "not two lists of the same length"),
        ({"scores": [0, 1]}, "not two lists of the same length"),
        ({"answers": ["a", "b"], "scores": [1, None]}, "its scores are not all numbers"),
        ({"answers": ["a", "b"], "scores": [1, float("nan")]}, "its scores are not all numbers"),
        ({"answers": ["a", "b"], "scores": [1, 0], "chosen": "a"}, "answers with scores, and chosen as well"),
        ({"answers": ["a", "b"], "scores": [1, 0], "reference_logps": [-1]}, "no list with one number for each answer"),
        ({"answers": ["a", "b"], "scores": [1, 0], "reference_logps": [-1, "x"]}, "should be two numbers"),
        ({"answers": ["a", "a"], "scores": [1, 0]}, "chosen and rejected are the same"),
        ({"answers": ["a", 5], "scores": [1, 0]}, "neither all strings nor all lists"),
        ({"chosen": "a", "rejected": "b"}, "no answers and scores, of which solve_rates asks"),
    ],
)
def test_answers_with_scores_that_cannot_be_used_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"1 of 1 rows of .* \(line 1: .*{message}"):
        preferences(tmp_path / "p.jsonl", [{"prompt": "p", **row}], solve_rates=(0.0, 1.0)).setup("fit")


@pytest.mark.parametrize("solve_rates", [(0.6, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_solve_rates_that_are_none_are_refused(solve_rates):
    with pytest.raises(ValueError, match="two shares between 0 and 1, the lower one first"):
        Preferences(path=Path("p.jsonl"), solve_rates=solve_rates)


def test_pairs_that_are_cut_have_no_log_probabilities_of_whole_answers_and_still_differ(tmp_path):
    logps = {"reference_chosen_logps": -1.0, "reference_rejected_logps": -2.0}
    long = {"prompt": "q", "chosen": "x" * 30, "rejected": "y", **logps}
    alike = {"prompt": "q", "chosen": "x" * 30 + "a", "rejected": "x" * 30 + "b", **logps}
    short = {"prompt": "q", "chosen": "x", "rejected": "y", **logps}
    options: dict[str, Any] = {"seq_len": 20, "too_long": "truncate"}
    with pytest.warns(UserWarning) as warned:
        pairs = preferences(tmp_path / "p.jsonl", [long, alike, short], **options).splits[0]
    assert [text(pair.chosen) for pair in pairs] == ["q" + "x" * 19, "qx$"], "the cut pair that became one answer is left out"
    assert all(pair.reference_logps is None for pair in pairs)
    messages = " ".join(str(warning.message) for warning in warned)
    assert "2 of 3 rows" in messages and "1 lose their end, 1 are left out" in messages
    assert "those of whole answers, and are left out where answers lose their ends (too_long: truncate)" in messages
    (kept,) = preferences(tmp_path / "p.jsonl", [short], **options).splits[0]
    assert kept.reference_logps == (-1.0, -2.0)
    with pytest.warns(UserWarning, match="2 of 3 rows .* 0 lose their end, 2 are left out"):
        (kept,) = preferences(tmp_path / "p.jsonl", [long, alike, short], **{**options, "too_long": "skip"}).splits[0]
    assert kept.reference_logps == (-1.0, -2.0)


def test_a_prompt_is_for_training_or_for_validation(tmp_path):
    rows = [{"prompt": f"{n % 40}", "chosen": f"{n}", "rejected": "no"} for n in range(120)]
    train, val = Preferences(path=write(tmp_path / "p.jsonl", rows), val_fraction=0.3).splits
    assert train and val and len(train) + len(val) == 120
    assert not {pair.key for pair in train} & {pair.key for pair in val}


def test_an_answer_without_a_prompt_is_learned_whole(tmp_path):
    (pair,) = preferences(tmp_path / "p.jsonl", [{"prompt": "", "chosen": "ab", "rejected": "c"}]).splits[0]
    assert text(pair.chosen) == "$ab$" and pair.chosen_learned.tolist() == [False, True, True, True]


# Prompts


def predict(path: Path, **options: Any) -> list[dict[str, Any]]:
    data = Text(predict_prompts=path, batch_size=2, **options)
    data.setup("predict")
    return list(data.predict_dataloader())


def test_prompts_are_lines_or_rows_padded_on_the_left(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("def f(\n\nüb")
    batches = predict(lines)
    assert [batch["prompt"] for batch in batches] == [["def f(", ""], ["üb"]]
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2]]
    first = batches[0]
    assert first["input_ids"].tolist() == [list(b"def f("), [BYTES.pad_id] * 5 + [EOS]], "an empty prompt is a beginning"
    assert first["attention_mask"].tolist() == [[1] * 6, [0] * 5 + [1]]
    rows = write(tmp_path / "prompts.jsonl", [{"prompt": "a\nb"}, {"messages": [USER]}])
    (batch,) = predict(rows, system=None)
    assert batch["prompt"] == ["a\nb", "<role>HUMAN</role>1+1?<role>ASSISTANT</role>"]
    for ids, mask, prompt in zip(batch["input_ids"], batch["attention_mask"], batch["prompt"], strict=True):
        assert BYTES.decode(ids[mask.bool()]) == prompt


def test_prompts_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"file of prompts .*no\.txt does not exist"):
        predict(tmp_path / "no.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompt"):
        predict(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        predict(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match=r"2 of 2 rows .* \(line 1: it has neither a prompt.*line 2: the last message is"):
        predict(write(tmp_path / "p.jsonl", [{"text": "x"}, {"messages": [USER, ANSWER]}]))
