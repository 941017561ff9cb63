"""Likelihoods are sums of conditional parts, however batched; multiple choice does not depend on the order of options."""

import json
import math
import random
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from zoo.ling import LingForCausalLM, RopeScaling, preset
from zoo.ling.multiple_choice import encode_pair, loglikelihoods
from zoo.metrics.choice_questions import ChoicePrompt, ChoiceQuestion, choose, read_questions


class Bytes:
    """Bytes as ids, 257 ends a document."""

    eos_id = 257

    def encode(self, text):
        return list(text.encode())


class Pieces(Bytes):
    """Greedy longest match of a few pieces, that may hold a space in front."""

    pieces = (" yes", "yes", " ", "y", "ab", "b", "a")

    def encode(self, text):
        ids = []
        while text:
            piece = next(piece for piece in self.pieces if text.startswith(piece))
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = preset("ling_tiny").replace(
        hidden_size=32, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1, intermediate_size=32, attention_dropout=0.3, initializer_range=0.5,
    )  # fmt: skip
    network = LingForCausalLM(config).double()
    with torch.no_grad():
        network.model.norm.weight.fill_(4.0)
    return network


def score_one(network, context, continuation):
    """Log-likelihood of one pair, by one plain forward pass."""
    ids = torch.tensor([[*context, *continuation]])
    network.eval()
    with torch.no_grad():
        log_p = F.log_softmax(network(ids).logits[0], -1)
    chosen = range(len(context) - 1, len(ids[0]) - 1)
    return sum(log_p[t, ids[0, t + 1]].item() for t in chosen), all(log_p[t].argmax() == ids[0, t + 1] for t in chosen)


def some_pairs():
    """Pairs with contexts of many lengths, of which some are shared and one has a single token."""
    draw = random.Random(0)
    contexts = [[draw.randrange(256) for _ in range(length)] for length in (5, 1, 9, 5, 14, 2)]
    lengths = (1, 4, 2, 7, 3, 1, 5, 2, 2, 6, 1, 3)
    return [(contexts[i % 6], [draw.randrange(256) for _ in range(length)]) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("logit_tokens", [1, 20, 10_000])
def test_batches_and_shared_contexts_change_nothing(network, batch_size, logit_tokens):
    pairs = some_pairs()
    network.train()
    found = loglikelihoods(network, pairs, batch_size, logit_tokens)
    assert network.training and network.lm_head.training
    expected = [score_one(network, *pair)[0] for pair in pairs]
    assert found.logp_N.dtype == torch.float64
    assert found.logp_N.tolist() == pytest.approx(expected, rel=1e-10)
    assert len({round(value, 6) for value in expected}) == len(pairs)


def test_order_and_repetition_of_pairs_change_nothing(network):
    pairs = some_pairs()
    plain = loglikelihoods(network, pairs).logp_N
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    assert torch.allclose(loglikelihoods(network, [pairs[i] for i in order], 3).logp_N, plain[order], rtol=1e-12)
    assert torch.allclose(loglikelihoods(network, pairs + pairs, 4).logp_N, plain.repeat(2), rtol=1e-12)
    assert loglikelihoods(network, []).logp_N.shape == (0,)


def test_concatenation_is_the_sum_of_conditional_parts(network):
    ids = [ord(letter) for letter in "the house of the king"]
    whole = loglikelihoods(network, [([257], ids)]).logp_N.item()
    for cut in (1, 7, 20):
        parts = loglikelihoods(network, [([257], ids[:cut]), ([257, *ids[:cut]], ids[cut:])]).logp_N
        assert parts.sum().item() == pytest.approx(whole, rel=1e-10)
    # All one-token continuations together are certain.
    every = loglikelihoods(network, [(ids, [token]) for token in range(network.config.vocab_size)])
    assert every.logp_N.exp().sum().item() == pytest.approx(1)
    assert every.greedy_N.sum() == 1 and every.greedy_N[every.logp_N.argmax()]


def test_greedy_continuations_are_known(network):
    context = [1, 2, 3]
    ids = list(context)
    for _ in range(5):
        with torch.no_grad():
            ids.append(network.eval()(torch.tensor([ids])).logits[0, -1].argmax().item())
    greedy = ids[3:]
    other = [*greedy[:-1], (greedy[-1] + 1) % 256]
    assert loglikelihoods(network, [(context, greedy), (context, other), (context, greedy[:2])]).greedy_N.tolist() == [1, 0, 1]


def test_a_shared_context_is_computed_once(network):
    seen = []
    handle = network.model.word_embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    loglikelihoods(network, [(list(range(100)), [option]) for option in range(50)])
    handle.remove()
    assert seen == [99, 50]


def rows_of_calls(network, pairs, **options):
    seen = []
    handle = network.model.word_embeddings.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    loglikelihoods(network, pairs, **options)
    handle.remove()
    return seen


def test_passes_have_as_many_rows_as_asked_for(network):
    texts = [([257], [1] * length) for length in (3, 90, 4, 5, 88, 2)]
    assert rows_of_calls(network, texts, batch_size=2) == [(2, 90), (2, 5), (2, 3)]  # of like length, whatever the order
    assert max(rows for rows, _ in rows_of_calls(network, [([1, 2], [i]) for i in range(50)], batch_size=3)) <= 24


def test_processes_run_the_network_equally_often(network):
    pairs = some_pairs()
    plain = loglikelihoods(network, pairs, 4)
    calls = len(rows_of_calls(network, pairs, batch_size=4))
    found = []
    seen = rows_of_calls(network, pairs, batch_size=4, agree=lambda number: found.append(number) or number + 3)
    assert found == [calls] and len(seen) == calls + 3 and seen[-3:] == [(1, 1)] * 3
    assert torch.equal(loglikelihoods(network, pairs, 4, agree=lambda number: number + 1).logp_N, plain.logp_N)
    assert loglikelihoods(network, [], agree=lambda number: number + 2).logp_N.shape == (0,)


def test_dynamic_positions_depend_on_the_pair_alone(network):
    scaled = LingForCausalLM(
        network.config.replace(rope_scaling=RopeScaling("dynamic", 2.0), max_position_embeddings=16)
    ).double()
    scaled.load_state_dict(network.state_dict())
    pairs = [([1] * 12, [2, 3, 4]), ([5] * 4, [6] * 9), ([7] * 14, [8] * 9), ([9] * 14, [1]), ([7] * 14, [3])]
    alone = [loglikelihoods(scaled, [pair]).logp_N.item() for pair in pairs]
    assert loglikelihoods(scaled, pairs).logp_N.tolist() == pytest.approx(alone, rel=1e-10)
    assert loglikelihoods(network, pairs[2:3]).logp_N.item() != pytest.approx(alone[2], rel=1e-4)


def test_bfloat16_and_autocast_are_near(network):
    pairs = some_pairs()
    exact = loglikelihoods(network, pairs).logp_N
    single = LingForCausalLM(network.config)
    single.load_state_dict({name: value.float() for name, value in network.state_dict().items()})
    assert torch.allclose(loglikelihoods(single, pairs).logp_N, exact, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loglikelihoods(single, pairs).logp_N
    assert (rounded != exact).any() and (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert loglikelihoods(single.bfloat16(), pairs).logp_N.isfinite().all()


def test_text_is_cut_between_tokens():
    assert encode_pair(Bytes(), "a \n", "é") == ([97], [32, 10, 195, 169])
    assert encode_pair(Bytes(), "", "a") == ([257], [97])
    pieces = Pieces()
    assert encode_pair(pieces, "a", " yes") == ([6], [0])
    assert encode_pair(pieces, "a ", "yes") == ([6], [0])  # the space belongs to the token after it
    assert encode_pair(pieces, "a", "b") == ([6], [5])  # "ab" is one token: encoded apart
    assert encode_pair(pieces, " ", "yes") == ([pieces.eos_id], [0])
    assert encode_pair(pieces, "a ", "b") == ([6], pieces.encode(" b"))  # after the same ids as "yes"
    with pytest.raises(ValueError, match="continuation of 'a' is empty"):
        encode_pair(Bytes(), "a", "")


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([([1], [2]), ([], [1])], {}, r"pair 1 has 0 \+ 1 tokens"),
        ([([1], [])], {}, r"pair 0 has 1 \+ 0 tokens"),
        ([([1], [264])], {}, "pair 0 has an id outside of the vocabulary of 264"),
        ([([-1], [0])], {}, "pair 0 has an id outside"),
        ([], {"batch_size": 0}, "batch_size=0"),
        ([], {"logit_tokens": 0}, "logit_tokens=0"),
    ],
)
def test_bad_pairs_are_refused(network, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        loglikelihoods(network, pairs, **options)


# Questions

QUESTION = ChoiceQuestion("Which king?", ("old", "the young one", "none"), answer=1, context="A tale.")


@pytest.mark.parametrize("normalize", [False, True])
def test_content_scoring_does_not_depend_on_the_order_of_options(network, normalize):
    answers, positions = set(), set()
    for order in permutations(QUESTION.choices):
        pairs = ChoicePrompt().pairs(ChoiceQuestion("Which king?", order, 0))
        logps = loglikelihoods(network, [encode_pair(Bytes(), *pair) for pair in pairs]).logp_N.tolist()
        positions.add(choose(logps, list(map(len, order)) if normalize else None))
        answers.add(order[choose(logps, list(map(len, order)) if normalize else None)])
    assert len(answers) == 1 and positions == {0, 1, 2}


def test_prompts_are_what_they_say():
    example = ChoiceQuestion("1 + 1 =", ("2", "3"), answer=0)
    content = ChoicePrompt().pairs(QUESTION, [example])
    assert content == [
        ("Question: 1 + 1 =\nAnswer: 2\n\nA tale.\n\nQuestion: Which king?\nAnswer:", f" {choice}") for choice in QUESTION.choices
    ]
    label = ChoicePrompt("label").pairs(QUESTION, [example])
    asked = "A tale.\n\nQuestion: Which king?\nA. old\nB. the young one\nC. none\nAnswer:"
    assert label == [(f"Question: 1 + 1 =\nA. 2\nB. 3\nAnswer: A\n\n{asked}", f" {letter}") for letter in "ABC"]
    code = ChoicePrompt(template="{question} {{}}", separator="")
    assert code.pairs(ChoiceQuestion("{x}", ("a", "b"), 0))[1] == ("{x} {}", "b")


def test_most_likely_option_is_chosen_by_what_it_is_divided():
    assert choose([-3.0, -2.0, -2.0]) == 1
    assert choose([-3.0, -2.0, -2.5], [6, 2, 3]) == 0
    assert choose([-math.inf, -2.0]) == 1
    with pytest.raises(ValueError, match="not all numbers"):
        choose([math.nan, -1.0])


def test_questions_are_read(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": "q", "choices": ["x", "é"], "answer": 1, "id": 7},
        {"question": "r", "choices": ["x", "y", "z"], "answer": "C", "context": "c"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    assert read_questions(path) == [ChoiceQuestion("q", ("x", "é"), 1), ChoiceQuestion("r", ("x", "y", "z"), 2, "c")]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors begin a file
    assert len(read_questions(path)) == 2
    path.write_bytes(path.read_bytes() + '{"question": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="1 lines that are no questions: line 4: 'utf-8' codec"):
        read_questions(path)
    with pytest.raises(FileNotFoundError, match="no file of questions"):
        read_questions(tmp_path / "other")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2: no JSON object"),
        ('{"question": "q"}', "line 2: no choices, answer"),
        ('{"question": 1, "choices": ["a", "b"], "answer": 0}', "must be strings"),
        ('{"question": "q", "choices": "ab", "answer": 0}', "must be a list of strings"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "1 choices, and there must be 2 to 26"),
        ('{"question": "q", "choices": ["a", "a"], "answer": 0}', "empty or equal"),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', "empty or equal"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer 2 of 2 choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "answer -1 of 2 choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "D"}', "answer 3 of 2 choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0.5}', r"answer 0\.5 is neither"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer True is neither"),
    ],
)
def test_lines_that_are_no_questions_are_named(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_questions(path)


def test_bad_files_and_templates_are_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no questions"):
        read_questions(path)
    path.write_text("[]\n" * 9)
    with pytest.raises(ValueError, match=r"9 lines that are no questions: .*line 5: no JSON object$"):
        read_questions(path)
    for options, message in (
        ({"target": "letter"}, "target='letter' must be one of content, label"),
        ({"template": "Q"}, "must hold {question} for target='content'"),
        ({"template": "{question} {options}"}, "must hold {question} for target='content', and nothing else"),
        ({"target": "label", "template": "{question}"}, "must hold {question} and {options}"),
        ({"template": "{question} {"}, "cannot be filled in"),
    ):
        with pytest.raises(ValueError, match=message):
            ChoicePrompt(**options)
