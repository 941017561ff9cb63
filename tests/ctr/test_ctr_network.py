"""The parts of xDeepFM, DCN-v2 and DLRM: degrees and limits of interactions, and dropout that belongs to the sample."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.base.random import SampleRandom
from zoo.ctr import CompressedInteraction, CrossLayers, DCNNetwork, DeepLayers, DLRMNetwork, FieldEmbedding, XDeepFMNetwork


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


def test_cross_layers_are_the_published_product_and_have_their_degree() -> None:
    torch.manual_seed(0)
    cross, x0 = CrossLayers(4, 3).double(), vectors(5, 1, 4)[:, 0]
    x = x0
    for layer in cross.layers:
        x = x0 * (x @ layer.weight.T + layer.bias) + x
    torch.testing.assert_close(cross(x0), x, rtol=1e-12, atol=1e-14)
    line = torch.linspace(-2, 2, 9, dtype=torch.float64)
    values = cross(line[:, None] * x0[0])  # a polynomial of degree 4 along any line: its fifth differences vanish
    assert values.diff(n=5, dim=0).abs().max() < 1e-10 < values.diff(n=4, dim=0).abs().max()
    assert torch.equal(CrossLayers(4, 0)(x0), x0)


NUMBERS = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
IDS = torch.tensor([[2, 1], [0, 3]])


def network(kind: str) -> DCNNetwork | DLRMNetwork:
    torch.manual_seed(0)
    if kind == "dcn":
        return DCNNetwork([3, 4], 1, 2, num_cross=1, dnn=[5], dropout=0.5, num_vectors=2, vector_dim=3).double()
    return DLRMNetwork([3, 4], 1, 2, bottom=[3], top=[5], dropout=0.5, num_vectors=2, vector_dim=3).double()


@pytest.mark.parametrize("kind", ["dcn", "dlrm"])
def test_vectors_beside_ids_and_numbers_take_part_and_the_forward_pass_is_pure(kind: str) -> None:
    net, given = network(kind), vectors(2, 2, 3).requires_grad_()
    kept = net.draw(SampleRandom(0, torch.arange(2)))
    logit = net(IDS, NUMBERS, (), given)
    logit.square().sum().backward()
    assert given.grad is not None and given.grad.any() and logit.shape == (2,)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())
    scaled = {name: 2 * parameter for name, parameter in net.named_parameters()}
    found = torch.func.functional_call(net, scaled, (IDS, NUMBERS, kept, given))
    for name, parameter in net.named_parameters():
        parameter.data = scaled[name].detach()
    assert torch.equal(found, net(IDS, NUMBERS, kept, given))


def test_dlrm_multiplies_all_pairs_of_vectors() -> None:
    net, given = network("dlrm"), vectors(2, 2, 3)
    bottom, embedding = net.bottom(NUMBERS), net.embedding(IDS, NUMBERS)  # type: ignore[operator,misc]
    them = [bottom, *embedding.unbind(1), *net.projection(given).unbind(1)]  # type: ignore[operator]
    pairs = [(them[i] * them[j]).sum(1) for i in range(5) for j in range(i)]
    expected = net.output(net.top(torch.cat([bottom, torch.stack(pairs, 1)], 1)))[:, 0]  # type: ignore[operator]
    torch.testing.assert_close(net(IDS, NUMBERS, (), given), expected, rtol=1e-12, atol=1e-12)


def test_dcn_without_cross_layers_is_its_hidden_layers() -> None:
    net = DCNNetwork([], 0, 0, num_cross=0, dnn=[], dropout=0.0, num_vectors=2, vector_dim=3).double()
    given = vectors(4, 2, 3)
    torch.testing.assert_close(net(IDS[:0], NUMBERS[:0], (), given), net.output(given.flatten(1))[:, 0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FieldEmbedding([3, 0], 0, 2), r"field_dims=\[3, 0\]"),
        (lambda: FieldEmbedding([], 0, 2), "must be a field"),
        (lambda: CompressedInteraction(3, [2, 0]), r"widths=\[2, 0\]"),
        (lambda: DeepLayers(3, [2], dropout=1.0), "dropout=1.0"),
        (lambda: CrossLayers(0, 1), "num_inputs=0"),
        (lambda: DLRMNetwork([3], 0, 2, [], [], 0.0), "1 of fields, numbers and vectors are too few"),
        (lambda: XDeepFMNetwork([3], 0, 2, [], [], 0.0), "cin and dnn are both empty"),
    ],
)
def test_impossible_sizes_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
