"""Tools in chat templates that know none, as SmolLM2's: schemas, calls and results are text, and the calls are learned."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from datamodules.base.json_lines import MalformedRow
from datamodules.text.chat_template import chat_template
from datamodules.text.tokenizer import load_tokenizer
from datamodules.text.tool_text import tools_as_text

START, END = "<|im_start|>", "<|im_end|>"
# Any role, no tools, no marks of what is learned, a system message of its own: SmolLM2's is one of this kind.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
MESSAGES = [
    {"role": "user", "content": "1+2, twice?"},
    {"role": "assistant", "content": "So:", "tool_calls": [CALL, {"name": "add", "arguments": '{"a": 3}'}]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "3 and 4"},
]
CALLS = 'So:\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>\n<tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call>'  # noqa: E501


def tokenizer(folder, template):
    """Bytes, with the marks of chats."""
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({END: 0, START: 1, **{letter: 2 + n for n, letter in enumerate(letters)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, START])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": template}))
    return load_tokenizer(str(folder))


def test_tools_calls_and_results_are_written_as_text_and_the_calls_are_learned(tmp_path):
    made = tokenizer(tmp_path / "t", CHATML)
    template = chat_template("tokenizer", made, None)
    ids, labels = template.encode(MESSAGES, [TOOL])
    learned = [label for label in labels if label != -100]
    assert made.transformers.decode(learned) == f"{CALLS}{END}3 and 4{END}", "with its ends, without the line behind them"
    assert all(label in (number, -100) for number, label in zip(ids, labels, strict=True))
    text = made.transformers.decode(ids)
    assert text.startswith(f"{START}system\n<tools>\n{json.dumps(TOOL)}\n</tools>\n")
    assert f"{START}user\n<tool_response>3</tool_response>\n<tool_response>4</tool_response>{END}\n" in text
    prompt, _ = template.encode_prompt(MESSAGES[:1], [TOOL])
    assert ids[: len(prompt)] == prompt and labels[len(prompt)] == ids[len(prompt)] and set(labels[: len(prompt)]) == {-100}


def test_schemas_follow_the_system_message_and_messages_without_tools_stay():
    system = {"role": "system", "content": "Be brief"}
    assert tools_as_text([system, MESSAGES[0]], [TOOL])[0]["content"].startswith("Be brief\n<tools>\n")
    assert tools_as_text([system, MESSAGES[0], MESSAGES[4]], []) == [system, MESSAGES[0], MESSAGES[4]]


def test_a_template_that_writes_calls_gets_them(tmp_path):
    source = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}!{% endfor %}")
    made = tokenizer(tmp_path / "t", source)
    ids, labels = chat_template("tokenizer", made, None).encode(MESSAGES, [TOOL])
    assert made.transformers.decode([label for label in labels if label != -100]) == f"So:!!{END}3 and 4{END}"
    assert f"{START}tool\n3{END}" in made.transformers.decode(ids)


def test_what_cannot_be_told_without_marks_is_an_error(tmp_path):
    template = chat_template("tokenizer", tokenizer(tmp_path / "t", CHATML), None)
    with pytest.raises(MalformedRow, match="begins with the assistant, and the template does not mark"):
        template.encode(MESSAGES[4:])
    counts = CHATML.replace("{% if messages", "{{ messages | length }}{% if messages")
    with pytest.raises(MalformedRow, match="writes it differently with more messages behind"):
        chat_template("tokenizer", tokenizer(tmp_path / "u", counts), None).encode(MESSAGES)
