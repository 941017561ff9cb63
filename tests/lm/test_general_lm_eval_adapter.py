"""Any model that gives logits for ids and continues prompts is evaluated as its plain forward passes say."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from zoo.lm.generation import Continuations
from zoo.lm.lm_eval_adapter import LogitsModel, converted

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="not measured: lm-eval is not installed; pip install lightning-zoo[eval]"
)


class Bytes:
    """Bytes as ids, 257 ends a document."""

    eos_id = 257

    def encode(self, text, special=False):
        return list(text.encode())

    def decode(self, ids):
        return bytes(number for number in ids if number < 256).decode(errors="replace")


class Bigrams(LogitsModel):
    """The next byte depends on the last two and on the position, so that padding and cuts would be seen."""

    max_length = 64
    device = torch.device("cpu")

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(260, 260, generator=generator, dtype=torch.float64)
        self.table[:, 97:123] += 4
        self.rows = []

    def logits(self, input_ids, attention_mask):
        self.rows.append(len(input_ids))
        before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
        positions = torch.arange(input_ids.shape[1])
        return self.table[input_ids] + self.table[before].roll(1, -1) + self.table[positions].flip(-1)

    def continued(self, input_ids, attention_mask, generation, *, random, decode):
        assert generation.temperature == 0 and generation.eos_token_id == [257] and len(random) == len(input_ids)
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        news = []
        for row in rows:
            new = []
            while len(new) < generation.max_new_tokens and not any(stop in decode(new) for stop in generation.stop):
                new.append(self.logits(torch.tensor([row + new]), None)[0, -1].argmax().item())
            news.append(new)
        length = torch.tensor([len(new) for new in news])
        tokens = torch.tensor([new + [257] * (int(length.max()) - len(new)) for new in news])
        return Continuations(tokens, length)


PAIRS = [("ab", "cd"), ("a", "x"), ("longer context", " and more"), ("ab", "zz")]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_scores_are_those_of_each_sequence_alone(batch_size):
    model = Bigrams()
    pairs = [(list(context.encode()), list(text.encode())) for context, text in PAIRS]
    greedy = model.logits(torch.tensor([pairs[0][0]]), None)[0, -1].argmax().item()
    pairs.append((pairs[0][0], [greedy]))
    logp_N, greedy_N = model.loglikelihoods(pairs, batch_size)
    assert max(model.rows) <= batch_size
    for (context, text), logp in zip(pairs, logp_N, strict=True):
        logits = model.logits(torch.tensor([context + text]), None)[0].log_softmax(-1)
        torch.testing.assert_close(logp, sum(logits[len(context) + at - 1, number] for at, number in enumerate(text)))
    assert greedy_N.tolist() == [False] * 4 + [True]


@needs_lm_eval
def test_requests_of_the_harness_are_answered():
    from zoo.lm.lm_eval_adapter import ZooLM

    model = Bigrams()
    answers = ZooLM(model, Bytes(), batch_size=2)
    found = answers.loglikelihood([SimpleNamespace(args=pair) for pair in PAIRS], disable_tqdm=True)
    pairs = [(list(context.encode()), list(text.encode())) for context, text in PAIRS[:2]]
    assert [logp for logp, _ in found[:2]] == pytest.approx(model.loglikelihoods(pairs, 1)[0].tolist())
    whole = "".join(map(chr, next_bytes(model, "ab", 12)))
    stop = whole[5]
    requests = [SimpleNamespace(args=(text, {"until": [stop], "max_gen_toks": 12})) for text in ("ab", "a longer one")]
    first, _ = answers.generate_until(requests, disable_tqdm=True)
    assert first == whole.partition(stop)[0]


def next_bytes(model, text, count):
    ids = list(text.encode())
    for _ in range(count):
        ids.append(model.logits(torch.tensor([ids]), None)[0, -1].argmax().item())
    return ids[len(text) :]


@needs_lm_eval
def test_bad_options_name_the_model():
    from zoo.lm.lm_eval_adapter import ZooLM

    with pytest.raises(ValueError, match="ZooLM: batch_size='auto'"):
        ZooLM(Bigrams(), Bytes(), batch_size="auto")
    with pytest.raises(TypeError, match="ZooLM: tokenizer='byte' has no encode"):
        ZooLM(Bigrams(), "byte")


def test_a_network_is_copied_only_where_it_changes():
    network = torch.nn.Linear(2, 2)
    assert converted(network, None, None) is network is converted(network, "cpu", "float32")
    copy = converted(network, None, "bfloat16")
    assert copy.weight.dtype == torch.bfloat16 and network.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='int8' is no type of weights"):
        converted(network, None, "int8")
