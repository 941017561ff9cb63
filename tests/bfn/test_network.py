"""The small network and the time features that it is built from."""

import pytest
import torch

from zoo.bfn.networks import ResidualMLP
from zoo.nn import SinusoidalEmbedding


def test_untrained_network_predicts_no_noise_and_learns_in_every_part():
    torch.manual_seed(0)
    network = ResidualMLP(width=16, depth=2)
    mu, t = torch.randn(5, 8, 8, 1), torch.rand(5)
    assert network(mu, t).eq(0).all()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (network(mu, t) - mu[..., None]).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@pytest.mark.parametrize(
    ("shape", "options", "output"),
    [
        ((8, 8, 1), {"num_elements": 64}, (8, 8, 1, 1)),
        ((4, 4, 3), {"num_elements": 48, "num_outputs": 2}, (4, 4, 3, 2)),
        ((10, 27), {"num_elements": 10, "num_inputs": 27, "num_outputs": 27}, (10, 27)),
    ],
)
def test_output_has_the_numbers_that_the_head_reads_for_each_element(shape, options, output):
    network = ResidualMLP(width=8, depth=1, **options)
    assert network(torch.randn(3, *shape), torch.rand(3)).shape == (3, *output)


def test_samples_do_not_see_one_another():
    torch.manual_seed(0)
    network = ResidualMLP(num_elements=4, width=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    mu, t = torch.randn(6, 4), torch.rand(6)
    assert torch.allclose(network(mu, t)[2:4], network(mu[2:4], t[2:4]), atol=1e-4)
    assert not torch.allclose(network(mu, t), network(mu, t.flip(0)))


def test_default_network_can_be_shipped():
    assert 4 * sum(parameter.numel() for parameter in ResidualMLP().parameters()) <= 3 * 2**20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types(dtype):
    network = ResidualMLP(width=8).to(dtype)
    torch.nn.init.normal_(network.output.weight)
    output = network(torch.randn(2, 8, 8, 1), torch.rand(2))
    assert output.dtype == dtype
    assert output.isfinite().all()


def test_data_of_another_size_are_refused():
    with pytest.raises(ValueError, match="built for 64 elements"):
        ResidualMLP(width=8)(torch.randn(2, 28, 28, 1), torch.rand(2))
    with pytest.raises(ValueError, match="depth=0"):
        ResidualMLP(depth=0)


def test_time_features_turn_with_their_frequencies():
    features = SinusoidalEmbedding(8, scale=100.0, max_period=1000.0)(torch.tensor([0.0, 0.25]).double())
    frequencies = 100 * 1000.0 ** -torch.linspace(0, 1, 4).double()
    assert features[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    expected = torch.cat(((0.25 * frequencies).sin(), (0.25 * frequencies).cos()))
    assert torch.allclose(features[1], expected, atol=1e-6)
    assert SinusoidalEmbedding(8)(torch.rand(3, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match="dim=3"):
        SinusoidalEmbedding(3)
