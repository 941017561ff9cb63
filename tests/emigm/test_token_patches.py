"""Latents as tokens: nothing is lost, and known pixels make known tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.emigm.patches import known_positions, patchify, token_mask, unpatchify


@given(patch_size=st.sampled_from([1, 2, 3, 4]), rows=st.integers(1, 4), columns=st.integers(1, 4), channels=st.integers(1, 4))
def test_unpatchify_inverts_patchify(patch_size, rows, columns, channels):
    shape = (channels, rows * patch_size, columns * patch_size)
    x = torch.arange(2 * shape[0] * shape[1] * shape[2]).view(2, *shape)
    tokens = patchify(x, patch_size)
    assert tokens.shape == (2, rows * columns, channels * patch_size**2)
    assert torch.equal(unpatchify(tokens, shape, patch_size), x)


def test_patches_of_one_position_are_its_channels():
    x = torch.arange(24).view(1, 2, 3, 4)
    assert torch.equal(patchify(x, 1), x.flatten(2).transpose(1, 2))


def test_published_order_within_a_token():
    """Channels, then rows, then columns; tokens row by row."""
    x = torch.arange(32).view(1, 2, 4, 4)
    tokens = patchify(x, 2)[0]
    assert tokens[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert tokens[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert tokens[2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]


@given(seed=st.integers(0, 1000), patch_size=st.sampled_from([1, 2, 4]))
def test_a_token_is_known_if_all_of_it_is(seed, patch_size):
    known = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)) < 0.8
    tokens = token_mask(known, patch_size)
    for i, row in enumerate(tokens):
        for j, value in enumerate(row):
            top, left = (j // (8 // patch_size)) * patch_size, (j % (8 // patch_size)) * patch_size
            assert value == known[i, top : top + patch_size, left : left + patch_size].all()


def test_a_position_that_stands_for_many_pixels_needs_all_of_them():
    known = torch.ones(1, 32, 32, dtype=torch.bool)
    known[0, 5, 20] = False
    positions = known_positions(known, 2, 2)
    assert positions.tolist() == [[[True, False], [True, True]]]


def test_the_border_of_padded_images_is_known():
    known = torch.zeros(1, 28, 28, dtype=torch.bool)
    positions = known_positions(known, 32, 32)
    assert not positions[0, 2:30, 2:30].any()
    assert positions.sum() == 32**2 - 28**2


@pytest.mark.parametrize("side", [8, 28])
def test_positions_of_pixels_are_the_pixels(side):
    known = torch.rand(2, side, side, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(known_positions(known, side, side), known)
