"""The convolutional network for text: what an untrained one says, how far it sees, and what it refuses."""

import pytest
import torch

from zoo.bfn import TextConvNet


@pytest.fixture
def network() -> TextConvNet:
    torch.manual_seed(0)
    return TextConvNet(num_classes=5, width=12, depth=2, kernel_size=3, time_features=8).double()


def trained(network: TextConvNet) -> TextConvNet:
    """Weights without zeros, so that everything has an effect."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def beliefs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(3).softmax(-1)


def test_an_untrained_network_repeats_the_belief(network: TextConvNet) -> None:
    belief = beliefs(3, 7, 5)
    output = network(belief, torch.rand(3, dtype=torch.float64))
    assert torch.allclose(output.softmax(-1), belief, atol=1e-12)


def test_a_position_sees_its_neighbourhood_and_no_further(network: TextConvNet) -> None:
    belief = beliefs(1, 15, 5).requires_grad_()
    output = trained(network)(belief, torch.tensor([0.4], dtype=torch.float64))
    output[0, 7].square().sum().backward()
    assert belief.grad is not None
    seen = belief.grad[0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]  # two blocks of one position on either side


def test_a_shifted_text_gives_a_shifted_prediction(network: TextConvNet) -> None:
    belief, t = beliefs(2, 20, 5), torch.rand(2, dtype=torch.float64)
    whole, part = trained(network)(belief, t), network(belief[:, 4:], t)
    assert torch.allclose(whole[:, 6:18], part[:, 2:14], atol=1e-12)


def test_time_matters_and_each_sample_has_its_own(network: TextConvNet) -> None:
    belief = beliefs(1, 6, 5).repeat(2, 1, 1)
    early, late = trained(network)(belief, torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert not torch.allclose(early, late)
    assert torch.allclose(network(belief[:1], torch.tensor([0.9], dtype=torch.float64))[0], late)


def test_certainty_and_impossibility_give_finite_logits_and_gradients(network: TextConvNet) -> None:
    belief = torch.eye(5, dtype=torch.float64)[None].requires_grad_()
    output = trained(network)(belief, torch.ones(1, dtype=torch.float64))
    output.logsumexp(-1).sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [belief, *network.parameters()])


def test_half_precision_comes_close_and_keeps_the_beliefs_type(network: TextConvNet) -> None:
    network, belief, t = trained(network).float(), beliefs(2, 9, 5).float(), torch.rand(2)
    exact = network(belief, t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(belief, t)
    half = network.bfloat16()(belief, t)
    for output in (mixed, half):
        assert output.dtype == torch.float32
        assert (output - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 2}, "num_classes=2 must be at least 3"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConvNet(**arguments)


@pytest.mark.parametrize("shape", [(2, 9, 4), (9, 5)])
def test_data_of_another_alphabet_is_refused(network: TextConvNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="set num_classes to the number of classes"):
        network(torch.full(shape, 0.2), torch.rand(2))
