"""Generation: a step gives what the whole network gives, a row of a batch what its prompt gives alone; choices as defined."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import sweep
from torch import Tensor, nn
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation.logits_process import TopPLogitsWarper

from zoo.base.random import SampleRandom
from zoo.ling import Experts, Generation, KVCache, LingConfig, LingForCausalLM, RopeScaling, TokenChoice, generate, stream
from zoo.ling import decode_step as steps
from zoo.ling.decode_step import CPUStep, StaticStep
from zoo.lm.token_choice import draw

BASE = LingConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_experts=6,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=12, intermediate_size=24, initializer_range=0.3,
    rope_theta=100.0, max_position_embeddings=64, pad_token_id=60, eos_token_id=None,
)  # fmt: skip
CONFIGS = {
    "shared expert": BASE,
    "first layer dense, biases, raw weights": BASE.replace(
        first_k_dense_replace=1, use_bias=True, use_qkv_bias=True, norm_topk_prob=False, num_shared_experts=0
    ),
    "one expert, wide heads, plain head": BASE.replace(num_experts_per_tok=1, head_dim=12, norm_head=False),
    "YaRN, tied, no groups": BASE.replace(rope_scaling=RopeScaling(), tie_word_embeddings=True, num_key_value_heads=4),
    "dynamic positions": BASE.replace(rope_scaling=RopeScaling("dynamic", 2.0), num_key_value_heads=1),
}


def network_of(config: LingConfig = BASE, dtype: torch.dtype = torch.float64) -> LingForCausalLM:
    torch.manual_seed(0)
    network = LingForCausalLM(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return network.to(dtype).eval()


def prompts_of(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 59, (length,), generator=generator) for length in lengths]


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.full((width - len(p),), 60), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), torch.ones_like(p)]) for p in prompts])
    return ids, mask


@torch.no_grad()
def greedy_by_whole_forwards(network: LingForCausalLM, prompt: Tensor, count: int) -> Tensor:
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_with_a_cache_are_those_of_whole_forwards(name: str) -> None:
    network = network_of(CONFIGS[name])
    prompts = prompts_of(7, 7)
    expected = torch.stack([greedy_by_whole_forwards(network, prompt, 12) for prompt in prompts])
    assert CPUStep.supports(network, 20)
    assert torch.equal(network.generate(torch.stack(prompts), max_new_tokens=12), expected)
    assert len(expected[:, 7:].unique()) > 5  # else any constant would pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 5])
def test_scores_of_a_step_are_those_of_the_whole_forward(name: str, batch: int, dtype: torch.dtype) -> None:
    network, config = network_of(CONFIGS[name], dtype), CONFIGS[name]
    ids = torch.stack(prompts_of(*[9] * batch))
    with torch.inference_mode():
        whole = network(ids).logits
        cache, step = KVCache(config, batch, 9, dtype), CPUStep(network, 9)
        network(ids[:, :4], cache=cache)
        for t in range(4, 9):
            logits = step(ids[:, t], step.rotation(t), steps.lockstep(step, cache, None))
            cache.advance(1)
            assert torch.allclose(logits, whole[:, t], rtol=0, atol=3e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # products one by one, and grouped
@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_few_tokens_visit_the_same_experts(num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_tokens)
    experts = Experts(7, 16, 8, "loop").to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, out = torch.randn(2, num_tokens, 16, dtype=dtype).unbind(0)
    ids = torch.rand(num_tokens, 7).topk(3).indices
    ids[0] = torch.tensor([6, 0, 3])
    weights = torch.rand(num_tokens, 3, dtype=dtype)
    with torch.inference_mode():
        expected = out + experts(x, ids, weights)
        few = steps.FewTokens(experts)
        assert few.grouped == (dtype == torch.float32)
        few.add_to(out, x, ids, weights)
    assert torch.allclose(out, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("options", sweep([
    {}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.4}, {"temperature": 1.3, "top_k": 9},
    {"temperature": 1.0, "repetition_penalty": 0.7},
], quick=(0, 1, 2)))  # fmt: skip
@pytest.mark.parametrize("plain", [True, False], ids=["cpu step", "modules"])
def test_a_row_of_a_padded_batch_is_the_prompt_alone(
    options: dict[str, float], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not plain:
        monkeypatch.setattr(CPUStep, "supports", lambda *_: False)
    network = network_of()
    prompts = prompts_of(3, 8, 1, 5)
    index = torch.tensor([4, 0, 17, 2])
    ids, mask = padded(prompts)
    together = network.generate(ids, mask, max_new_tokens=10, random=SampleRandom(3, index), **options)
    assert torch.equal(together[:, :8], ids)
    for row, prompt in enumerate(prompts):
        alone = network.generate(prompt[None], max_new_tokens=10, random=SampleRandom(3, index[row : row + 1]), **options)
        assert torch.equal(together[row, 8:], alone[0, len(prompt) :])
    other = network.generate(ids, mask, max_new_tokens=10, random=SampleRandom(4, index), **options)
    assert torch.equal(other, together) == (options.get("temperature", 0) == 0)


def test_fewer_tokens_are_a_beginning_of_more() -> None:
    network, (prompt,) = network_of(), prompts_of(4)
    more = network.generate(prompt[None], max_new_tokens=12, temperature=1.0)
    assert torch.equal(network.generate(prompt[None], max_new_tokens=5, temperature=1.0), more[:, :9])


def test_modules_and_step_agree_where_layers_have_hooks_or_are_not_ours() -> None:
    network, prompts = network_of(), torch.stack(prompts_of(6, 6))
    expected = network.generate(prompts, max_new_tokens=6)
    calls = []
    handle = network.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(network.generate(prompts, max_new_tokens=6), expected)
    assert len(calls) == 6  # the prompt and five tokens: no step goes past the hook
    handle.remove()

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    dense = network.model.layers[0].attention.dense
    dense.weight.data /= 2
    assert CPUStep.supports(network, 12)
    adapter = Adapter(32, 32, bias=False, dtype=torch.float64)
    adapter.weight = dense.weight
    network.model.layers[0].attention.dense = adapter
    assert not CPUStep.supports(network, 12)
    assert torch.equal(network.generate(prompts, max_new_tokens=6), expected)


def test_weights_of_other_types_go_through_the_modules() -> None:
    network, prompts = network_of(dtype=torch.bfloat16), torch.stack(prompts_of(6, 6))
    assert not CPUStep.supports(network, 12)
    assert network.generate(prompts, max_new_tokens=6).shape == (2, 12)
    network.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not CPUStep.supports(network, 12)
        assert network.generate(prompts, max_new_tokens=6).shape == (2, 12)


def test_new_weights_are_used_at_once() -> None:
    network, prompts = network_of(), torch.stack(prompts_of(6))
    before = network.generate(prompts, max_new_tokens=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5).add_(0.01 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    after = network.generate(prompts, max_new_tokens=8)
    assert not torch.equal(before, after)
    assert torch.equal(after[0], greedy_by_whole_forwards(network, prompts[0], 8))


def test_step_of_fixed_shapes_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(BASE.replace(num_hidden_layers=1))
    ids, mask = padded(prompts_of(3, 8, 5))
    expected = network.generate(ids, mask, max_new_tokens=9)
    made = []

    def traced(*arguments: object) -> StaticStep:
        made.append(StaticStep(*arguments, backend="eager"))  # type: ignore[arg-type]  # traced whole, without a compiler
        return made[-1]

    monkeypatch.setattr(steps, "StaticStep", traced)
    monkeypatch.setattr(steps, "_SLOTS", 16)
    assert torch.equal(network.generate(ids, mask, max_new_tokens=9, compile=True), expected)
    assert made[0].cache.max_length == 16
    with torch.no_grad():
        network.lm_head.weight.mul_(torch.linspace(-1, 2, 61)[:, None])  # a head whose normalised weight is another
    changed = network.generate(ids, mask, max_new_tokens=7, compile=True)
    assert torch.equal(changed, network.generate(ids, mask, max_new_tokens=7))
    assert not torch.equal(changed, expected[:, :-2])
    assert len(made) == 1  # the same step served both
    alone = network.generate(ids[1:2], max_new_tokens=9, compile=True)
    assert torch.equal(alone, network.generate(ids[1:2], max_new_tokens=9)) and len(made) == 2
    network.model.norm.weight.data = network.model.norm.weight.data.clone()  # moved: what was made reads the old place
    network.generate(ids, mask, max_new_tokens=9, compile=True)
    assert len(made) == 3


def test_streams_that_take_turns_are_each_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(*arguments: object) -> StaticStep:
        return StaticStep(*arguments, backend="eager")  # type: ignore[arg-type]

    network = network_of(BASE.replace(attention_dropout=0.5, num_hidden_layers=1)).train()
    prompts = prompts_of(5, 5)
    expected = [network.generate(prompt[None], max_new_tokens=6)[0, 5:].tolist() for prompt in prompts]
    monkeypatch.setattr(steps, "StaticStep", traced)
    for compiled in (False, True):
        streams = [stream(network, prompt[None], max_new_tokens=6, compile=compiled) for prompt in prompts]
        found = [[int(token) for token in pair] for pair in zip(*streams, strict=True)]
        assert [list(tokens) for tokens in zip(*found, strict=True)] == expected
        assert all(part.training for part in network.modules())
    assert len(steps._STEPS[network]) == 1  # the one that was given back last


def test_no_compiled_step_where_rotations_depend_on_the_length() -> None:
    network = network_of(CONFIGS["dynamic positions"].replace(max_position_embeddings=8))
    assert CPUStep.supports(network, 8) and not CPUStep.supports(network, 9)
    with pytest.raises(ValueError, match="dynamic to 9 tokens, beyond max_position_embeddings=8"):
        network.generate(torch.stack(prompts_of(6)), max_new_tokens=4, compile=True)


def test_sequences_are_padded_after_their_end_and_generation_stops_with_the_last() -> None:
    network = network_of()
    ids, mask = padded(prompts_of(4, 7, 2))
    free = network.generate(ids, mask, max_new_tokens=20)[:, 7:]
    stops = [int(free[0, 2]), int(free[1, 5])]
    ended = network.generate(ids, mask, max_new_tokens=20, eos_token_id=stops)[:, 7:]
    lengths = []
    for row in range(3):
        end = next((t for t, token in enumerate(free[row].tolist()) if token in stops), 19)
        assert torch.equal(ended[row, : end + 1], free[row, : end + 1])
        assert bool((ended[row, end + 1 :] == 60).all())
        lengths.append(end + 1)
    assert ended.shape[1] == max(lengths) and len(set(lengths)) > 1
    pad = network.generate(ids[:1], mask[:1], max_new_tokens=20, eos_token_id=stops[0], pad_token_id=11)
    assert pad.shape[1] == 7 + lengths[0]
    named = network_of(BASE.replace(eos_token_id=stops[0]))
    assert named.generate(ids[:1], mask[:1], max_new_tokens=20).shape[1] == 7 + lengths[0]
    assert named.generate(ids[:1], mask[:1], max_new_tokens=20, eos_token_id=()).shape[1] == 27


def test_tokens_come_one_by_one_and_the_network_keeps_its_mode() -> None:
    network, prompts = network_of(BASE.replace(attention_dropout=0.5)).train(), torch.stack(prompts_of(5, 5))
    network.model.norm.eval()
    seen: list[Tensor] = []
    tokens = generate(network, prompts, max_new_tokens=6, on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), tokens[:, 5:])
    assert torch.equal(torch.stack(list(stream(network, prompts, max_new_tokens=6)), 1), tokens[:, 5:])
    one_by_one = stream(network, prompts, max_new_tokens=6)
    next(one_by_one)
    assert not torch.is_inference_mode_enabled()
    one_by_one.close()
    assert network.training and not network.model.norm.training
    assert not tokens.is_inference() and torch.equal(tokens, network.eval().generate(prompts, max_new_tokens=6))


def test_ids_of_any_integer_type_are_taken() -> None:
    network, prompts = network_of(), torch.stack(prompts_of(5, 5))
    options = {"max_new_tokens": 6, "repetition_penalty": 1.3}
    tokens = network.generate(prompts.int(), **options)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, network.generate(prompts, **options))


def test_cache_can_be_used_again() -> None:
    network, prompts = network_of(), torch.stack(prompts_of(5, 5))
    cache = KVCache(BASE, 2, 12, torch.float64)
    first = network.generate(prompts, max_new_tokens=6, cache=cache)
    assert torch.equal(first, network.generate(prompts, max_new_tokens=6))
    assert torch.equal(network.generate(prompts.flip(0), max_new_tokens=8, cache=cache)[:, :11], first.flip(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a positive"),
        ({"temperature": -1.0}, r"temperature=-1.0 must be 0 \(the likeliest token\) or positive"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -2}, "top_k=-2 must be 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
        ({"eos_token_id": 61}, "eos_token_id=61 is outside of the vocabulary of 61"),
        ({"pad_token_id": 61}, "pad_token_id=61 is outside of the vocabulary of 61"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids as integers \(B, T\)"),
        ({"input_ids": torch.tensor([[1, 61]])}, "holds the id 61, but the model's vocabulary has the ids 0 to 60"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "holds the id -1"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask of shape \(2, 3\) does not fit"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}, "Row 0 of attention_mask has padding after a token"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "Prompt 1 of the batch is empty"),
        ({"cache": KVCache(BASE, 2, 6, torch.float64)}, "2 sequences of 7 tokens .* is for 2 of 6: make the cache longer"),
        ({"cache": KVCache(BASE, 2, 9)}, r"cache has \(3, 2, 8, torch.float32\) .* needs \(3, 2, 8, torch.float64\)"),
        ({"cache": KVCache(BASE.replace(num_hidden_layers=5), 2, 9, torch.float64)}, r"cache has \(5, 2, 8"),
        ({"cache": KVCache(BASE, 2, 9, torch.float64), "compile": True}, "give either cache or compile=True"),
        ({"input_ids": torch.zeros(129, 1, dtype=torch.long), "compile": True}, "at most 128 sequences in .*64, got 129"),
        ({"random": SampleRandom(0, torch.arange(3))}, "numbers of 3 sequences, but the batch has 2"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "max_new_tokens": 4, **change}
    with pytest.raises(ValueError, match=message):
        network_of().generate(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"repetition_penalty": 0.0},
                                    {"max_new_tokens": 0}])  # fmt: skip
def test_options_of_a_configuration_are_checked_before_the_run(change: dict[str, float]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value} must"):
        Generation(**change)


@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
    penalty=st.sampled_from([1.0, 0.5, 1.3]),
)
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_the_library(seed: int, temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(3, 40, generator=generator)).round(decimals=1)  # with ties
    ids = torch.randint(0, 40, (3, 9), generator=generator)
    library = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        library.append(TopKLogitsWarper(top_k))
    if top_p < 1:  # as the library has it; its warper would drop what float32 takes for impossible
        library.append(TopPLogitsWarper(top_p))
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, ids, True)
    found = TokenChoice(temperature, top_k, top_p, penalty).scores(logits, seen)
    assert torch.allclose(found, library(ids, logits), rtol=1e-6)
    greedy = TokenChoice(repetition_penalty=penalty).choose(logits, seen)
    assert torch.equal(greedy, RepetitionPenaltyLogitsProcessor(penalty)(ids, logits).argmax(-1))


def test_draws_follow_the_probabilities_and_never_give_an_excluded_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf, 2.0, -math.inf]])
    uniform = SampleRandom(0, torch.arange(1)).uniform("u", (20000,), torch.float64)[0]
    tokens = draw(logits.expand(20000, -1), uniform)
    share = tokens.bincount(minlength=6) / 20000
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.015)
    ends = torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert draw(logits.expand(3, -1), ends).tolist() == [1, 4, 4]
    assert not (set(tokens.tolist()) - {1, 2, 4})


def test_temperature_near_zero_is_the_likeliest_token() -> None:
    network, prompts = network_of(), torch.stack(prompts_of(5, 5))
    cold = network.generate(prompts, max_new_tokens=8, temperature=1e-6)
    assert torch.equal(cold, network.generate(prompts, max_new_tokens=8))
    assert torch.equal(cold, network.generate(prompts, max_new_tokens=8, temperature=5.0, top_k=1))
    assert dataclasses.replace(TokenChoice(), temperature=0.5).is_random and not TokenChoice().is_random


def test_tiny_temperatures_take_the_likeliest_token() -> None:
    logits = torch.tensor([[90.0, 89.0, -50.0], [1e30, 0.0, 9e29]])
    for temperature in (1e-5, 1e-30, 1e-42, 5e-324):
        found = TokenChoice(temperature).choose(logits, None, torch.tensor([0.999, 0.999], dtype=torch.float64))
        assert found.tolist() == [0, 0]
