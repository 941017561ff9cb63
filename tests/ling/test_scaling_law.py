"""Scaling laws of the report at the points that it names."""

import math

import pytest

from zoo.ling import preset
from zoo.ling.scaling_law import compute_of, optimal


def test_optimum_at_1e20_flops():
    batch, lr = optimal(1e20)
    assert batch == pytest.approx(1.573e6, rel=5e-4)
    assert lr == pytest.approx(1.081e-3, rel=5e-4)


def test_optimum_of_ling_plus_is_near_what_was_used():
    found = optimal(6 * 28.8e9 * 9e12)
    assert found.batch_tokens == pytest.approx(4.4e7, rel=0.01)
    assert found.lr == pytest.approx(2.35e-4, rel=0.01)
    assert found.batch_tokens == pytest.approx(8960 * 4096, rel=0.25)
    assert found.lr == pytest.approx(2.4e-4, rel=0.03)


def test_power_laws():
    (batch_1, lr_1), (batch_2, lr_2) = optimal(1e19), optimal(1e21)
    assert math.log(batch_2 / batch_1, 100) == pytest.approx(0.3447)
    assert math.log(lr_2 / lr_1, 100) == pytest.approx(-0.1579)


@pytest.mark.parametrize(("name", "active"), [("ling_lite", 2.235e9), ("ling_plus", 27.64e9)])
def test_compute_counts_active_parameters_without_embedding_and_head(name, active):
    config = preset(name)
    assert compute_of(config, 1e12) == pytest.approx(6 * active * 1e12, rel=1e-3)
    assert compute_of(config.replace(tie_word_embeddings=True), 1e12) == compute_of(config, 1e12)
    assert compute_of(config, 2e12, 4096) == pytest.approx(2 * compute_of(config, 1e12, 4096))
    attention = 6 * config.num_hidden_layers * 4096 * config.num_attention_heads * config.head_width
    assert compute_of(config, 1, 4096) - compute_of(config, 1) == pytest.approx(attention)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="compute=0 FLOPs"):
        optimal(0)
    with pytest.raises(ValueError, match="compute=nan"):
        optimal(math.nan)
    with pytest.raises(ValueError, match="tokens=-1"):
        compute_of(preset("ling_tiny"), -1)
