"""Continuous batching: each request gets what its prompt gets alone, in any company and memory, and all memory comes back."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import sweep_tuples

from zoo.base.random import SampleRandom
from zoo.ling import Engine, LingConfig, LingForCausalLM
from zoo.ling.decode_step import CPUStep

CONFIG = LingConfig(
    vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, intermediate_size=12, first_k_dense_replace=1,
    initializer_range=0.4, rope_theta=100.0, max_position_embeddings=64, pad_token_id=None, eos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def network() -> LingForCausalLM:
    torch.manual_seed(0)
    return LingForCausalLM(CONFIG).double().eval()


@pytest.fixture(params=[True, False], ids=["cpu step", "modules"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(CPUStep, "supports", lambda *_: False)


def alone(network: LingForCausalLM, prompt: list[int], **options: object) -> list[int]:
    tokens = network.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()  # type: ignore[arg-type]
    return tokens


def slots_in_use(engine: Engine) -> int:
    segments = {id(segment): segment for request in engine._running for segment in request.segments}
    owners = Counter(id(segment) for request in engine._running for segment in request.segments)
    assert all(segments[key].owners == count for key, count in owners.items())
    return sum(map(len, segments.values()))


def finish(engine: Engine) -> dict[int, list[int]]:
    """Step to the end, with the account of the memory after each step."""
    found = {}
    while engine.num_waiting or engine.num_running:
        for completion in engine.step():
            assert completion.request not in found
            found[completion.request] = completion.tokens
        assert engine.free_tokens + slots_in_use(engine) == engine.max_tokens
        assert engine.num_running <= engine.max_batch
    assert engine.memory.free_runs == [(0, engine.max_tokens)]
    return found


def mixed(count: int, seed: int = 0) -> list[tuple[list[int], dict[str, object]]]:
    generator = torch.Generator().manual_seed(seed)
    rules: list[dict[str, object]] = [
        {}, {"temperature": 0.9, "top_p": 0.8}, {"repetition_penalty": 1.3}, {"temperature": 1.2, "top_k": 5},
        {"eos_token_id": 3},
    ]  # fmt: skip
    requests = []
    for number in range(count):
        length, new = (int(torch.randint(1, high, (), generator=generator)) for high in (12, 14))
        prompt = torch.randint(0, 37, (length,), generator=generator).tolist()
        options = {**rules[number % len(rules)], "max_new_tokens": new, "random": SampleRandom(1, torch.tensor([number]))}
        requests.append((prompt, options))
    return requests


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("max_tokens", "max_batch", "growth"), sweep_tuples([(400, 8, 32), (30, 8, 2), (24, 3, 1), (24, 1, 5)], quick=(1, 2))
)
def test_requests_get_what_they_get_alone(network: LingForCausalLM, max_tokens: int, max_batch: int, growth: int) -> None:
    requests = mixed(9)
    expected = [alone(network, prompt, **options) for prompt, options in requests]
    engine = Engine(network, max_tokens, max_batch, growth)
    numbers = [engine.submit(prompt, **options) for prompt, options in requests]  # type: ignore[arg-type]
    found = finish(engine)
    assert [found[number] for number in numbers] == expected


def test_order_of_arrival_does_not_matter(network: LingForCausalLM) -> None:
    requests = mixed(10, seed=1)
    expected = [alone(network, prompt, **options) for prompt, options in requests]
    engine = Engine(network, 40, 4, growth=3)
    found: dict[int, list[int]] = {}
    numbers = {}
    for number in reversed(range(10)):  # and they come while others run
        numbers[number] = engine.submit(requests[number][0], **requests[number][1])  # type: ignore[arg-type]
        found |= {completion.request: completion.tokens for completion in engine.step()}
    found |= {completion.request: completion.tokens for completion in engine.run()}
    assert [found[numbers[number]] for number in range(10)] == expected


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=8),
    max_tokens=st.integers(20, 45),
    max_batch=st.integers(1, 5),
    growth=st.integers(1, 6),
    base=st.integers(0, 6),
)
@settings(max_examples=12, deadline=None)
def test_any_queue_ends_with_its_tokens_and_all_memory_free(
    network: LingForCausalLM, sizes: list[tuple[int, int]], max_tokens: int, max_batch: int, growth: int, base: int
) -> None:
    # Prompts that begin alike after `base` tokens of their own, so that some are shared and split.
    prompts = [
        [number % 2] * min(base, 1) + list(range(5, 5 + length)) + [number % 3] for number, (length, _) in enumerate(sizes)
    ]
    engine = Engine(network, max_tokens, max_batch, growth, min_shared=2)
    for prompt, (_, new) in zip(prompts, sizes, strict=True):
        engine.submit(prompt, max_new_tokens=new)
    found = finish(engine)
    for number, (prompt, (_, new)) in enumerate(zip(prompts, sizes, strict=True)):
        assert found[number] == alone(network, prompt, max_new_tokens=new)


@pytest.mark.usefixtures("either_way")
def test_common_beginnings_lie_in_memory_once(network: LingForCausalLM) -> None:
    beginning = [(7 * i) % 37 for i in range(20)]
    prompts = [[*beginning, 1, 2], [*beginning, 3], [*beginning[:11], 4, 5, 6], [*beginning[:11], 4, 5, 9], beginning]
    engine = Engine(network, 200, growth=4, min_shared=5)
    for prompt in prompts:
        engine.submit(prompt, max_new_tokens=6)
    engine.step()
    # 22 tokens; 1 and 14 - 11 more, 14 - 13 more, 20 - 19 more; and 4 slots to grow each.
    assert engine.max_tokens - engine.free_tokens == 22 + 1 + 3 + 1 + 1 + 5 * 4
    found = finish(engine)
    assert [found[number] for number in range(5)] == [alone(network, prompt, max_new_tokens=6) for prompt in prompts]

    apart = Engine(network, 200, growth=4, min_shared=0)
    for prompt in prompts:
        apart.submit(prompt, max_new_tokens=6)
    apart.step()
    assert apart.max_tokens - apart.free_tokens == sum(map(len, prompts)) + 5 * 4


def test_beginning_stays_when_the_one_that_read_it_has_left(network: LingForCausalLM) -> None:
    beginning = [(5 * i) % 37 for i in range(16)]
    engine = Engine(network, 80, growth=2, min_shared=4)
    engine.submit([*beginning, 1], max_new_tokens=2)
    engine.submit([*beginning, 2], max_new_tokens=9)
    ended = engine.step()  # two tokens: one from the prompt, one from the step
    assert [completion.request for completion in ended] == [0]
    engine.submit([*beginning, 3], max_new_tokens=9)  # shares with the second what the first has read
    found = finish(engine)
    assert found[1] == alone(network, [*beginning, 2], max_new_tokens=9)
    assert found[2] == alone(network, [*beginning, 3], max_new_tokens=9)


def test_sequences_grow_into_their_neighbour_then_into_another_segment_then_wait(network: LingForCausalLM) -> None:
    engine = Engine(network, 20, growth=2, min_shared=0)
    engine.submit([1, 2], max_new_tokens=12)  # 4 slots, at the beginning
    engine.submit([3, 4], max_new_tokens=12)
    engine.step()
    first, second = engine._running
    assert [(s.start, s.stop) for r in (first, second) for s in r.segments] == [(0, 4), (4, 8)]
    for _ in range(2):
        engine.step()
    assert [len(segment) for segment in first.segments] == [4, 2]  # the neighbour's place is taken
    assert [(segment.start, segment.stop) for segment in first.segments] == [(0, 4), (8, 10)]
    assert [(segment.start, segment.stop) for segment in second.segments] == [(4, 8), (10, 12)]
    waiting = []
    while engine.num_running == 2 or not waiting:  # 13 and 13 slots are more than 20: the second gives its memory back
        assert not engine.step()
        waiting += [second] * engine.num_waiting
    assert not second.segments and len(second.tokens) > 8 and sum(map(len, first.segments)) == 12
    found = finish(engine)
    for number, prompt in enumerate(([1, 2], [3, 4])):
        assert found[number] == alone(network, prompt, max_new_tokens=12)


def test_tokens_are_told_as_they_come_and_prompts_are_returned(network: LingForCausalLM) -> None:
    engine, told = Engine(network, 30), []
    engine.submit(torch.tensor([4, 5, 6]), max_new_tokens=5, on_token=told.append)
    (completion,) = engine.run()
    assert completion.prompt == [4, 5, 6] and completion.tokens == told == alone(network, [4, 5, 6], max_new_tokens=5)
    assert engine.step() == []


def test_weights_may_change_between_queues(network: LingForCausalLM) -> None:
    torch.manual_seed(1)
    own = LingForCausalLM(CONFIG).double()
    engine = Engine(own, 30)
    engine.submit([1, 2, 3], max_new_tokens=8)
    (before,) = engine.run()
    own.load_state_dict(network.state_dict(), assign=True)
    engine.submit([1, 2, 3], max_new_tokens=8)
    (after,) = engine.run()
    assert after.tokens == alone(network, [1, 2, 3], max_new_tokens=8) != before.tokens


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "The prompt is empty"),
        ([37], {}, "holds the id 37"),
        (torch.zeros(1, 3, dtype=torch.long), {}, r"ids as integers \(T,\), got torch.int64 of shape \(1, 3\)"),
        ([1.5], {}, "got torch.float32"),
        (list(range(8)), {"max_new_tokens": 4}, "A prompt of 8 and max_new_tokens=4 need 11 slots, .* max_tokens=10"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"top_p": 2.0, "max_new_tokens": 4}, "top_p=2.0"),
        ([1], {"max_new_tokens": 4, "random": SampleRandom(0, torch.arange(2))}, "numbers of 2 sequences"),
    ],
)
def test_bad_requests_are_named(network: LingForCausalLM, prompt: list[int], options: dict[str, object], message: str) -> None:
    engine = Engine(network, 10)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, **options)  # type: ignore[arg-type]
    assert engine.num_waiting == 0
    with pytest.raises(ValueError, match="growth=0 must be at least 1"):
        Engine(network, 10, growth=0)


@pytest.mark.usefixtures("either_way")
def test_failure_of_one_listener_costs_no_request_a_token(network: LingForCausalLM) -> None:
    heard: list[int] = []

    def fail_at_third(token: int) -> None:
        heard.append(token)
        if len(heard) == 3:
            raise OSError("gone")

    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    engine = Engine(network, 400, growth=8, min_shared=0)
    numbers = [
        engine.submit(prompt, max_new_tokens=8, on_token=fail_at_third if prompt == [1, 2, 3] else None) for prompt in prompts
    ]
    found, failures = {}, 0
    while engine.num_waiting or engine.num_running:
        try:
            found |= {completion.request: completion.tokens for completion in engine.step()}
        except OSError:
            failures += 1
    assert failures == 1 and heard == found[numbers[0]]
    assert [found[number] for number in numbers] == [alone(network, prompt, max_new_tokens=8) for prompt in prompts]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("last", [0, 3])
def test_interrupted_step_leaves_requests_as_they_were(
    network: LingForCausalLM, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(network, 400, growth=8)
    prompts = [[1, 2, 3], [1, 2, 3, 4, 5], [8, 9]]
    numbers = [engine.submit(prompt, max_new_tokens=6) for prompt in prompts]
    calls = 0

    def interrupted(requests: list, logits: torch.Tensor) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == last + 1:
            raise KeyboardInterrupt
        return chosen(requests, logits)

    chosen = engine._choose
    monkeypatch.setattr(engine, "_choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.step()
    found = finish(engine)
    assert [found[number] for number in numbers] == [alone(network, prompt, max_new_tokens=6) for prompt in prompts]


def test_cancelled_requests_give_their_memory_back_and_are_never_completed(network: LingForCausalLM) -> None:
    engine = Engine(network, 400, max_batch=2)
    heard = []

    def listen(token: int) -> None:
        heard.append(token)
        if len(heard) == 2:
            assert engine.cancel(first)

    first = engine.submit([1, 2, 3], max_new_tokens=8, on_token=listen)
    second, third = (engine.submit(prompt, max_new_tokens=4) for prompt in ([4, 5], [6]))
    assert engine.cancel(third) and not engine.cancel(third) and not engine.cancel(99)
    assert finish(engine) == {second: alone(network, [4, 5], max_new_tokens=4)}
    assert len(heard) == 2


def test_scores_that_are_not_finite_are_refused(network: LingForCausalLM) -> None:
    broken = LingForCausalLM(CONFIG)
    with torch.no_grad():
        broken.lm_head.weight[3, 4] = torch.nan
    engine = Engine(broken, 40)
    engine.submit([1, 2], max_new_tokens=4)
    with pytest.raises(ValueError, match="scores are not finite"):
        engine.step()
    with pytest.raises(ValueError, match="scores are not finite"):
        broken.generate(torch.tensor([[1, 2]]))
