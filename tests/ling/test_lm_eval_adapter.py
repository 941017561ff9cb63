"""The task collection of lm-eval finds with our model what our own scoring and plain forward passes find."""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sweep import sweep

from zoo.ling import LingForCausalLM, preset
from zoo.ling.multiple_choice import encode_pair, loglikelihoods
from zoo.metrics.choice_questions import ChoicePrompt, choose, read_questions

TASKS = Path(__file__).parent / "tasks"
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(
    not HAS_LM_EVAL, reason="not measured: lm-eval is not installed; pip install lightning-zoo[eval]"
)


class Bytes:
    """Bytes as ids, 257 ends a document."""

    eos_id = 257

    def encode(self, text, special=False):
        return list(text.encode())

    def decode(self, ids):
        return bytes(number for number in ids if number < 256).decode(errors="replace")


def network_of(seed=0):
    """A network whose likely ids are letters."""
    torch.manual_seed(seed)
    config = preset("ling_tiny").replace(
        hidden_size=32, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        initializer_range=0.3, max_position_embeddings=128,
    )  # fmt: skip
    network = LingForCausalLM(config)
    with torch.no_grad():
        network.model.norm.weight.fill_(4.0)
        network.lm_head.weight[97:123] *= 3
    return network.eval()


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """`simple_evaluate` on a task of this folder, without network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def run(model, task, **options):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        found = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True, **options)
        return found["results"][task], [sample["resps"] for sample in found["samples"][task]]

    return run


def lm_of(network, **options):
    from zoo.ling.lm_eval_adapter import LingLM

    return LingLM(network, Bytes(), **options)


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_multiple_choice_agrees_with_our_own(evaluate, batch_size):
    network = network_of()
    found, _ = evaluate(lm_of(network, batch_size=batch_size), "quiz")
    right, right_norm = [], []
    questions = read_questions(TASKS / "quiz.jsonl")
    for question in questions:
        logps = loglikelihoods(network, [encode_pair(Bytes(), *pair) for pair in ChoicePrompt().pairs(question)]).logp_N.tolist()
        right.append(choose(logps) == question.answer)
        right_norm.append(choose(logps, list(map(len, question.choices))) == question.answer)
    assert found["acc,none"] == pytest.approx(sum(right) / len(questions))
    assert found["acc_norm,none"] == pytest.approx(sum(right_norm) / len(questions))
    assert 0 < sum(right) != sum(right_norm) < len(questions)


@needs_lm_eval
def test_model_is_known_by_its_name(evaluate):
    network = network_of()
    lm_of(network)
    named, _ = evaluate("ling", "quiz", model_args={"pretrained": network, "tokenizer": Bytes()}, batch_size=2, device="cpu")
    assert named == evaluate(lm_of(network), "quiz")[0]


@needs_lm_eval
@pytest.mark.parametrize("max_length", sweep([10, 128]))
def test_rolling_likelihood_predicts_each_byte_once(evaluate, max_length):
    network = network_of()
    found, responses = evaluate(lm_of(network, max_length=max_length), "prose")
    total, num_bytes = 0.0, 0
    for question, response in zip(read_questions(TASKS / "quiz.jsonl"), responses, strict=True):
        ids = [257, *f"{question.question} {', '.join(question.choices)}".encode()]
        logp, done = 0.0, 0
        while done < len(ids) - 1:
            # The first window is whole; later ones end where the text goes on for `max_length` or less, and are always full.
            end = min(done + max_length, len(ids) - 1)
            logps = network(torch.tensor([ids[max(0, end - max_length) : end]])).logits[0].double().log_softmax(-1)
            logp += sum(logps[number - end, ids[number + 1]].item() for number in range(done, end))
            done = end
        assert response[0][0] == pytest.approx(logp, rel=1e-4)
        total, num_bytes = total + logp, num_bytes + len(ids) - 1
    assert found["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-4)


def greedy(network, prompt, count):
    """Continuation of a text by one plain forward pass for each token."""
    ids = list(prompt.encode())
    for _ in range(count):
        ids.append(network(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == 257:
            break
    return Bytes().decode(ids[len(prompt.encode()) :])


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_generation_stops_at_the_text_of_the_task(evaluate, batch_size):
    network = network_of()
    _, responses = evaluate(lm_of(network, batch_size=batch_size), "tell")
    whole = [greedy(network, question.question, 12) for question in read_questions(TASKS / "quiz.jsonl")]
    assert [response[0][0] for response in responses] == [text.partition("e")[0] for text in whole]
    assert any("e" in text for text in whole) and any(whole)


@needs_lm_eval
def test_long_contexts_lose_their_beginning_and_that_is_said(caplog):
    network = network_of()
    request = SimpleNamespace(args=("a" * 50 + "bcdef", "gh"))
    short = lm_of(network, max_length=5)
    (found,) = short.loglikelihood([request], disable_tqdm=True)
    expected = loglikelihoods(network, [(list(b"cdef"), list(b"gh"))])
    assert found == (expected.logp_N.item(), expected.greedy_N.item())
    assert "1 of 1 contexts are longer than max_length=5" in caplog.text
    with pytest.raises(ValueError, match="continuation of 6 tokens does not fit into max_length=5"):
        short.loglikelihood([SimpleNamespace(args=("a", "bcdefg"))], disable_tqdm=True)
    with pytest.raises(ValueError, match="256 generated tokens leave no room"):
        lm_of(network).generate_until([SimpleNamespace(args=("a", {"until": ["b"]}))])
    assert lm_of(network).loglikelihood_rolling([SimpleNamespace(args=("",))]) == [0.0]


@needs_lm_eval
def test_generation_ends_with_the_stop_text_or_mark_of_all(monkeypatch):
    network = network_of()
    whole = greedy(network, "a", 60)
    letter = whole[2]
    calls = []
    monkeypatch.setattr(network, "generate", None)
    handle = network.model.word_embeddings.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    monkeypatch.setattr("zoo.ling.decode_step.CPUStep.supports", lambda *_: False)
    request = SimpleNamespace(args=("a", {"until": [letter], "max_gen_toks": 100, "num_beams": 1}))
    assert lm_of(network).generate_until([request], disable_tqdm=True) == [whole.partition(letter)[0]]
    assert len(calls) == 1 + whole.index(letter)  # not up to max_gen_toks
    handle.remove()

    class Marked(Bytes):
        """With a mark that no text shows."""

        def encode(self, text, special=False):
            return [258] if special and text == "<end>" else super().encode(text)

    from zoo.ling.lm_eval_adapter import LingLM

    with torch.no_grad():  # the mark comes before long
        network.lm_head.weight[258] = network.lm_head.weight[ord(letter)]
        network.lm_head.weight[ord(letter)] = 0
    request = SimpleNamespace(args=("a", {"until": ["<end>"], "max_gen_toks": 100}))
    assert LingLM(network, Marked()).generate_until([request], disable_tqdm=True) == [whole[: whole.index(letter)]]


@needs_lm_eval
def test_tokens_over_the_cut_are_scored_whole():
    class Pairs(Bytes):
        """Two bytes "ab" are one token."""

        def encode(self, text, special=False):
            return list(text.encode().replace(b"ab", b"\x01"))

    from zoo.ling.lm_eval_adapter import LingLM

    network = network_of()
    (found,) = LingLM(network, Pairs()).loglikelihood([SimpleNamespace(args=("xa", "b"))], disable_tqdm=True)
    assert found[0] == loglikelihoods(network, [(list(b"xa"), list(b"b"))]).logp_N.item()


@needs_lm_eval
def test_given_network_stays_as_it_is():
    network = network_of().train()
    model = lm_of(network, dtype="bfloat16")
    model.loglikelihood([SimpleNamespace(args=("a", "b"))], disable_tqdm=True)
    assert network.training and network.lm_head.weight.dtype == torch.float32
    assert model.network.lm_head.weight.dtype == torch.bfloat16
    assert lm_of(network).network is network


class Roles:
    """Conversations with a mark, 258, before each turn."""

    def encode_prompt(self, messages):
        turns = [*((message["role"], message["content"]) for message in messages), ("assistant", "")]
        ids = [number for role, text in turns for number in [258, *f"{role}:{text}".encode()]]
        return ids, "".join(f"<|{role}|>{text}" for role, text in turns)


@needs_lm_eval
def test_conversations_are_asked_as_their_writer_encodes_them(evaluate):
    network = network_of()
    model = lm_of(network, chat=Roles())
    _, responses = evaluate(model, "quiz", apply_chat_template=True)
    question = read_questions(TASKS / "quiz.jsonl")[0]
    expected = [
        loglikelihoods(network, [(ids, list(option.encode()))]).logp_N.item()
        for ids in [Roles().encode_prompt([{"role": "user", "content": f"Question: {question.question}\nAnswer:"}])[0]]
        for option in question.choices
    ]
    assert [answer[0][0] for answer in responses[0]] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="apply_chat_template needs chat="):
        evaluate(lm_of(network), "quiz", apply_chat_template=True)


@needs_lm_eval
def test_bad_options_are_refused():
    network = network_of()
    for options, message in (
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"max_length": 0}, "max_length=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            lm_of(network, **options)
    with pytest.raises(TypeError, match="Linear is no Ling module"):
        lm_of(torch.nn.Linear(1, 1))
    from zoo.ling.lm_eval_adapter import LingLM

    with pytest.raises(TypeError, match=r"tokenizer='byte' has no encode.*load_tokenizer"):
        LingLM(network, "byte")
    request = SimpleNamespace(args=("a", {"until": ["b"], "max_gen_toks": 3, "num_beams": 4}))
    with pytest.raises(ValueError, match="generation_kwargs num_beams of the task is not known"):
        lm_of(network).generate_until([request])


def test_missing_package_is_named_with_its_extra(monkeypatch):
    from zoo.ling import lm_eval_adapter

    monkeypatch.setattr(lm_eval_adapter, "_registered", lm_eval_adapter._registered.__wrapped__)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-zoo\[eval\]'"):
        lm_eval_adapter.LingLM  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        lm_eval_adapter.Other  # noqa: B018
