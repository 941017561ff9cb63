"""The parts of xDeepFM: degrees, limits and identities of the interactions, and dropout that belongs to the sample."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.base.random import SampleRandom
from zoo.ctr import CompressedInteraction, DeepLayers, FieldEmbedding, XDeepFMNetwork


def vectors(batch: int, fields: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, fields, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(fields=st.integers(1, 4), widths=st.lists(st.integers(1, 3), min_size=1, max_size=3), size=st.integers(1, 3))
def test_cin_is_the_published_sum(fields: int, widths: list[int], size: int) -> None:
    cin = CompressedInteraction(fields, widths).double()
    x0 = vectors(2, fields, size)
    maps, pooled = x0, []
    for weight, width in zip(cin.weights, widths, strict=True):
        of_pairs = weight.view(width, maps.shape[1], fields)
        maps = torch.stack([
            sum(of_pairs[h, i, j] * maps[:, i] * x0[:, j] for i, j in product(range(maps.shape[1]), range(fields)))
            for h in range(width)
        ], dim=1)  # fmt: skip
        pooled.append(maps.sum(dim=2))
    torch.testing.assert_close(cin(x0), torch.cat(pooled, dim=1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [-2.0, 0.5, 3.0])
def test_a_layer_of_the_cin_has_its_degree(factor: float) -> None:
    cin = CompressedInteraction(5, [3, 3, 3, 3]).double()
    x0 = vectors(4, 5, 3)
    degree = torch.tensor([2, 3, 4, 5], dtype=torch.float64).repeat_interleave(3)
    torch.testing.assert_close(cin(factor * x0), cin(x0) * factor**degree, rtol=1e-10, atol=1e-12)


def test_a_cin_of_one_map_of_ones_is_a_factorization_machine() -> None:
    """With W = 1 the only map is the square of the sum: all pairs of fields, twice, and the squares."""
    cin = CompressedInteraction(6, [1]).double()
    torch.nn.init.ones_(cin.weights[0])
    x = vectors(3, 6, 4)
    pairs = sum((x[:, i] * x[:, j]).sum(dim=1) for i in range(6) for j in range(i))
    torch.testing.assert_close(cin(x)[:, 0], 2 * pairs + x.square().sum(dim=(1, 2)))


def test_fields_share_a_table_but_no_row_and_numbers_scale_their_vectors() -> None:
    embedding = FieldEmbedding([3, 1, 4], num_dense=2, embed_dim=5)
    sparse = torch.cartesian_prod(torch.arange(3), torch.arange(1), torch.arange(4))
    dense = torch.randn(len(sparse), 2)
    found = embedding(sparse, dense)
    rows = embedding.table.weight
    for field, start in enumerate((0, 3, 4)):
        assert torch.equal(found[:, field], rows[start + sparse[:, field]])
    assert embedding.numbers_ND is not None
    torch.testing.assert_close(found[:, 3:], dense[:, :, None] * embedding.numbers_ND)
    used = torch.autograd.grad(found.sum(), rows)[0].abs().sum(dim=1) > 0
    assert len(rows) == 8 and used.all()


def test_without_its_parts_the_network_is_logistic_regression() -> None:
    network = XDeepFMNetwork([3, 4], num_dense=1, embed_dim=2, cin=[2], dnn=[3], dropout=0.0)
    torch.nn.init.zeros_(network.output.weight)
    torch.nn.init.constant_(network.output.bias, 0.25)
    sparse, dense = torch.tensor([[2, 1], [0, 3]]), torch.tensor([[1.0], [-2.0]])
    one_hot = torch.cat([torch.nn.functional.one_hot(sparse[:, 0], 3), torch.nn.functional.one_hot(sparse[:, 1], 4)], dim=1)
    assert network.linear.numbers_ND is not None
    weights = torch.cat([network.linear.table.weight, network.linear.numbers_ND])[:, 0]
    torch.testing.assert_close(network(sparse, dense), torch.cat([one_hot, dense], dim=1) @ weights + 0.25)


def test_each_part_takes_part() -> None:
    torch.manual_seed(0)
    network = XDeepFMNetwork([3, 4], num_dense=1, embed_dim=2, cin=[2, 2], dnn=[3], dropout=0.0)
    network(torch.tensor([[2, 1], [0, 3]]), torch.tensor([[1.0], [-2.0]])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert {name.partition(".")[0] for name, _ in network.named_parameters()} == {"linear", "embedding", "cin", "dnn", "output"}


@pytest.mark.parametrize(("cin", "dnn"), [([], [4]), ([3], [])])
def test_parts_can_be_left_out(cin: list[int], dnn: list[int]) -> None:
    network = XDeepFMNetwork([3, 4], num_dense=0, embed_dim=2, cin=cin, dnn=dnn, dropout=0.5)
    drawn = network.draw(SampleRandom(0, torch.arange(2)))
    assert network(torch.tensor([[2, 1], [0, 3]]), torch.zeros(2, 0), drawn).shape == (2,)


def test_dropout_belongs_to_the_sample_and_keeps_the_mean() -> None:
    layers = DeepLayers(4, [200, 300], dropout=0.25).double()
    everyone = layers.draw(SampleRandom(0, torch.arange(100), epoch=1))
    few = layers.draw(SampleRandom(0, torch.tensor([7, 93]), epoch=1))
    for all_rows, two_rows in zip(everyone, few, strict=True):
        assert torch.equal(all_rows[[7, 93]], two_rows)
        assert abs(all_rows.double().mean() - 0.75) < 0.01
    assert not torch.equal(everyone[0][:, :200], everyone[1][:, :200])
    assert not torch.equal(everyone[0], layers.draw(SampleRandom(0, torch.arange(100), epoch=2))[0])
    x = vectors(100, 1, 4)[:, 0]
    hidden = layers.layers[0](x).relu()
    dropped = hidden * everyone[0] / 0.75
    torch.testing.assert_close(layers(x, everyone), layers.layers[1](dropped).relu() * everyone[1] / 0.75)
    assert DeepLayers(4, [2], dropout=0.0).draw(SampleRandom(0, torch.arange(3))) == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FieldEmbedding([3, 0], 0, 2), r"field_dims=\[3, 0\]"),
        (lambda: FieldEmbedding([], 0, 2), "must be a field"),
        (lambda: CompressedInteraction(3, [2, 0]), r"widths=\[2, 0\]"),
        (lambda: DeepLayers(3, [2], dropout=1.0), "dropout=1.0"),
        (lambda: XDeepFMNetwork([3], 0, 2, [], [], 0.0), "cin and dnn are both empty"),
    ],
)
def test_impossible_sizes_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
