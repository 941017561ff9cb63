"""Facts of the whole network: positions, cache, padding, documents, the router's warm-up, parameter counts, initial loss."""

import math

import pytest
import torch
from torch import Tensor

from zoo.ling import KVCache, LingConfig, LingForCausalLM, RopeScaling, RotaryEmbedding, preset
from zoo.ling.network import RouterNoise, expected_initial_loss
from zoo.ling.rope import yarn_scale

SMALL = LingConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=8,
    num_experts_per_tok=3, num_shared_experts=1, moe_intermediate_size=16, intermediate_size=48, rope_theta=1e4,
    max_position_embeddings=64, initializer_range=0.1, pad_token_id=49, eos_token_id=48,
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(**changes: object) -> LingForCausalLM:
    torch.manual_seed(0)
    return LingForCausalLM(SMALL.replace(**changes))


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 48, (batch, length), generator=torch.Generator().manual_seed(1))


SCALINGS = {
    "plain": None,
    "linear": RopeScaling("linear", 2.0),
    "dynamic": RopeScaling("dynamic", 2.0),
    "yarn": RopeScaling("yarn", 4.0, original_max_position_embeddings=16),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_logits_depend_on_relative_positions_only(scaling):
    model, ids = network(rope_scaling=scaling), tokens()
    positions = torch.arange(12)[None]
    torch.testing.assert_close(
        model(ids, position_ids=positions + 7).logits, model(ids, position_ids=positions).logits, rtol=0, atol=1e-5
    )
    assert not torch.allclose(model(ids, position_ids=positions * 2).logits, model(ids).logits, atol=1e-3)


def test_yarn_with_factor_1_is_plain_and_scales_by_its_table():
    positions = torch.arange(40)[None]
    plain = RotaryEmbedding(16, 1e4, 32)(positions, 40, torch.float64)
    yarn = RotaryEmbedding(16, 1e4, 32, RopeScaling("yarn", 1.0))(positions, 40, torch.float64)
    for one, other in zip(plain, yarn, strict=True):
        torch.testing.assert_close(one, other)
    assert yarn_scale(4.0, 1.0) == pytest.approx(1.13863, abs=1e-5)


def test_yarn_leaves_fast_frequencies_and_divides_slow_ones():
    plain = RotaryEmbedding(64, 1e4, 2048).frequencies(1)
    yarn = RotaryEmbedding(64, 1e4, 2048, RopeScaling("yarn", 4.0)).frequencies(1)
    ratio = plain / yarn
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(4.0)
    assert bool((ratio.diff() >= 0).all())


def test_dynamic_scaling_starts_beyond_the_trained_length():
    rope, plain = RotaryEmbedding(16, 1e4, 32, RopeScaling("dynamic", 2.0)), RotaryEmbedding(16, 1e4, 32)
    torch.testing.assert_close(rope.frequencies(32), plain.frequencies(32))
    stretched = 1e4 * (2.0 * 48 / 32 - 1) ** (16 / 14)
    torch.testing.assert_close(rope.frequencies(48), RotaryEmbedding(16, stretched, 32).frequencies(48))


def test_angles_are_accurate_at_long_range_in_half_precision():
    cos, _ = RotaryEmbedding(16, 6e5, 16384)(torch.tensor([[16000]]), 16001, torch.bfloat16)
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(16000.0), abs=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("scaling", [None, SCALINGS["yarn"]], ids=["plain", "yarn"])
def test_decoding_with_a_cache_equals_the_full_forward(scaling):
    model, ids = network(rope_scaling=scaling).eval(), tokens()
    full = model(ids).logits
    cache = KVCache(model.config, 2, 12, torch.float64)
    parts = [model(ids[:, :5], cache=cache).logits, model(ids[:, 5:9], cache=cache).logits]
    parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(9, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="longer than the cache of 12"):
        model(ids[:, :1], cache=cache)


def test_a_padded_batch_equals_each_row_alone():
    model, ids = network().eval(), tokens(1, 9)
    left = torch.cat([torch.full((1, 4), 49), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    alone = model(ids).logits
    torch.testing.assert_close(model(left, attention_mask=mask).logits[:, 4:], alone)
    right = torch.cat([ids, torch.full((1, 4), 49)], dim=1)
    torch.testing.assert_close(model(right).logits[:, :9], alone)
    torch.testing.assert_close(model(right, attention_mask=mask.flip(1)).logits[:, :9], alone)


def test_documents_do_not_see_one_another():
    model, ids = network().eval(), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(ids, position_ids=positions, document_ids=documents).logits
    torch.testing.assert_close(packed[:, :5], model(ids[:, :5]).logits)
    torch.testing.assert_close(packed[:, 5:], model(ids[:, 5:]).logits)


def test_activation_checkpointing_changes_nothing():
    plain, saving, ids = network(), network(), tokens()
    saving.model.activation_checkpointing = True
    noise = noise_of(plain, ids)
    for model in (plain, saving):
        model(ids, labels=ids, noise=noise, share=0.5).loss.backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("saving", [False, True])
def test_a_cache_with_gradients_is_refused_and_never_passed_over(saving):
    model, ids = network(), tokens()
    model.model.activation_checkpointing = saving
    with pytest.raises(ValueError, match="KVCache keeps no gradients"):
        model(ids, cache=KVCache(model.config, 2, 12, torch.float64))


def noise_of(model: LingForCausalLM, ids: Tensor, seed: int = 3) -> RouterNoise:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(model.config.num_hidden_layers, ids.numel(), model.config.num_experts, generator=generator)
    return lambda layer: draws[layer]


def test_at_the_start_of_the_warm_up_the_router_is_not_asked():
    model, ids = network(), tokens()
    noise = noise_of(model, ids)
    before = model(ids, noise=noise, share=0.0).logits
    with torch.no_grad():
        for moe in model.moe_layers:
            moe.gate.weight.normal_()
    torch.testing.assert_close(model(ids, noise=noise, share=0.0).logits, before, rtol=0, atol=0)
    assert not torch.allclose(model(ids, noise=noise, share=0.5).logits, before)


def test_at_its_end_the_noise_is_gone():
    model, ids = network(), tokens()
    torch.testing.assert_close(model(ids, noise=noise_of(model, ids), share=1.0).logits, model(ids).logits, rtol=0, atol=0)


def test_bf16_weights_and_autocast_run_forward_and_backward():
    torch.set_default_dtype(torch.float32)
    ids = tokens()
    for model, context in ((network().bfloat16(), torch.autocast("cpu", enabled=False)),
                           (network(), torch.autocast("cpu", torch.bfloat16))):  # fmt: skip
        with context:
            output = model(ids, labels=ids, with_logits=True)
        output.loss.backward()
        assert output.logits.dtype == torch.float32
        assert output.loss.item() == pytest.approx(math.log(50), abs=0.5)
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_untrained_loss_is_that_of_the_norm_head_whatever_the_scale():
    assert expected_initial_loss(preset("ling_lite")) == pytest.approx(11.756, abs=5e-4)
    ids = torch.randint(0, 2000, (8, 64), generator=torch.Generator().manual_seed(1))
    for scale in (0.006, 0.1):
        model = network(vocab_size=2000, hidden_size=64, initializer_range=scale)
        assert model(ids, labels=ids).loss.item() == pytest.approx(expected_initial_loss(model.config), abs=0.02)


@pytest.mark.parametrize(("name", "total", "active"), [("ling_lite", 16.802e9, 2.753e9), ("ling_plus", 290.60e9, 29.00e9)])
def test_the_presets_have_the_published_numbers_of_parameters(name, total, active):
    config = preset(name)
    with torch.device("meta"):
        model = LingForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters() == pytest.approx(total, rel=5e-5)
    assert config.num_parameters(active=True) == pytest.approx(active, rel=3e-4)
    # No number of parameters tells them: heads of another width would give tensors of the same shapes.
    heads = {"ling_lite": (16, 4, 128), "ling_plus": (42, 6, 128)}
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_width) == heads[name]


def test_flops_count_matrix_products_and_half_of_the_attention():
    config = SMALL
    active = config.num_parameters(active=True) - 50 * 32 - 32 * 5
    assert config.flops_per_token(12) == 6 * active + 6 * 2 * 12 * 32


def test_the_embedding_of_padding_gets_no_gradient():
    model = network()
    ids = torch.tensor([[1, 49, 2, 49, 3]])
    model(ids, labels=ids).loss.backward()
    assert not model.model.word_embeddings.weight.grad[49].any()


def test_tied_embeddings_are_one_parameter():
    model = network(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.word_embeddings.weight
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()


@pytest.mark.parametrize("tied", [False, True])
def test_padding_has_an_embedding_of_zero(tied):
    weight = network(tie_word_embeddings=tied).model.word_embeddings.weight
    assert not weight[49].any() and bool(weight[:49].any(1).all())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_experts=8"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": 7}, "even"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({"hidden_size": 30}, "no multiple of num_attention_heads"),
        ({"eos_token_id": 50}, "eos_token_id=50 is outside"),
        ({"first_k_dense_replace": 1, "intermediate_size": None}, "need intermediate_size"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be above 1"),
        ({"initializer_range": -0.1}, "initializer_range=-0.1 must not be negative"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_scaling.type='ntk'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": {"type": "yarn", "foo": 1}}, "may have factor, .*, but not foo"),
        ({"rope_scaling": {"factor": 2.0}}, "needs type"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be of type RopeScaling or null"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic needs heads that are wider than 2"),
        ({"num_experts_per_tok": 2.0}, "num_experts_per_tok=2.0 must be of type int"),
        ({"hidden_size": "32"}, "hidden_size='32' must be of type int"),
        ({"norm_head": 1}, "norm_head=1 must be of type bool"),
        ({"vocab_size": True}, "vocab_size=True must be of type int"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be of type float"),
        ({"eos_token_id": [48, 50]}, "eos_token_id=50 is outside"),
        ({"eos_token_id": ["48"]}, "eos_token_id=.* must be of type int or"),
    ],
)
def test_numbers_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        SMALL.replace(**changes)


def test_inputs_that_do_not_fit_are_named():
    model, ids = network(), tokens()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    for shape in ((2, 3), (3, 12), (12,)):
        with pytest.raises(ValueError, match=rf"shape \({str(shape)[1:-1]}\), but there are 2 sequences of 0 cached and 12 new"):
            model(ids, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match=r"labels of shape \(2, 11\) do not fit tokens of shape \(2, 12\)"):
        model(ids, labels=ids[:, 1:])
    for name in ("position_ids", "document_ids"):
        with pytest.raises(ValueError, match=rf"{name} of shape \(2, 11\) does not fit 2 sequences of 12 new tokens"):
            model(ids, **{name: ids[:, 1:]})
    with pytest.raises(ValueError, match="There is no preset"):
        preset("ling_huge")


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("chunk", [0, 4])
def test_nothing_gives_nothing(shape, chunk):
    model, ids = network(), torch.zeros(shape, dtype=torch.long)
    output = model(ids, labels=ids, with_logits=True, loss_chunk=chunk)
    assert output.logits.shape == (*shape, 50) and output.loss_BT.shape == shape and output.loss == 0
    output.loss.backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_narrow_integers_are_ids_and_labels_too():
    model, ids = network(), tokens()
    expected = model(ids, labels=ids)
    narrow = model(ids.int(), labels=ids.int())
    assert torch.equal(narrow.loss, expected.loss) and torch.equal(narrow.loss_BT, expected.loss_BT)
