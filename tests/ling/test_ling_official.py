"""Released folders compute what the published description says: against a naive model that shares no code with ours."""

import copy

import pytest
import torch
from ling_reference import CASES, LITE, logits_and_routes, random_weights, write_released
from torch import Tensor

from zoo.ling import Head, KVCache, LingForCausalLM, load_hf, normalized_weight
from zoo.ling.state_dict_adapter import released_tensors

IDS = [[3, 17, 39, 8, 25, 30, 1], [5, 5, 21, 12]]
PAD = 39


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    entries = CASES[request.param]
    weights = random_weights(entries)
    return entries, weights, write_released(tmp_path_factory.mktemp("released"), entries, weights)


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def released_gradients(network: LingForCausalLM) -> dict[str, Tensor]:
    """Gradients by released names."""
    shifted = copy.deepcopy(network)
    for own, parameter in zip(shifted.parameters(), network.parameters(), strict=True):
        own.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return dict(released_tensors(shifted))


def test_logits_and_routes_of_a_left_padded_batch(case):
    entries, weights, folder = case
    ids, mask = left_padded(IDS)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        network = load_hf(folder, dtype=dtype)
        output = network(ids, attention_mask=mask)
        for b, row in enumerate(IDS):
            expected, routes = logits_and_routes(weights, entries, row)
            start = ids.shape[1] - len(row)
            torch.testing.assert_close(output.logits[b, start:].double(), expected, rtol=0, atol=tolerance)
            for routing, chosen in zip(output.routings, routes, strict=True):
                assert routing.ids_Nk.view(*ids.shape, -1)[b, start:].tolist() == chosen


def test_gradients_of_every_released_tensor(case):
    entries, weights, folder = case
    ids, mask = left_padded(IDS)
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, len(IDS[0]) - len(IDS[1])] = -100  # nothing precedes the first token but padding
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    logits = torch.cat([logits_and_routes(leaves, entries, row)[0][:-1] for row in IDS])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([token for row in IDS for token in row[1:]]))
    expected.backward()
    for chunk in (0, 4):
        network = load_hf(folder, dtype=torch.float64)
        loss = network(ids, attention_mask=mask, labels=labels, loss_chunk=chunk).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
        for name, gradient in released_gradients(network).items():
            wanted = leaves[name].grad
            wanted = torch.zeros_like(gradient) if wanted is None else wanted  # an expert that no token visits
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))


def test_greedy_continuation_of_a_left_padded_batch(case):
    entries, weights, folder = case
    network = load_hf(folder)
    ids, mask = left_padded(IDS)
    cache = KVCache(network.config, 2, ids.shape[1] + 4, torch.float64)
    step, ours = ids, []
    with torch.no_grad():
        for _ in range(4):
            token = network(step, attention_mask=mask, cache=cache, last_only=True).logits[:, -1].argmax(-1, keepdim=True)
            ours.append(token)
            step, mask = token, torch.cat([mask, torch.ones_like(token)], dim=1)
        theirs = []
        for row in IDS:
            row = list(row)
            for _ in range(4):
                row.append(int(logits_and_routes(weights, entries, row)[0][-1].argmax()))
            theirs.append(row[-4:])
    assert torch.cat(ours, dim=1).tolist() == theirs


# NormHead


def head(normalize: bool = True) -> Head:
    torch.manual_seed(0)
    made = Head(30, 8, normalize).double()
    torch.nn.init.normal_(made.weight, std=0.3)
    return made


def test_norm_head_knows_no_scale_of_a_column():
    one, other = head(), head()
    with torch.no_grad():
        other.weight.mul_(torch.linspace(0.1, 9, 8))
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalized_weight(one.weight).norm(dim=0), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not torch.allclose(head(False)(x), one(x))


def test_its_gradient_is_that_of_a_linear_layer_divided_by_the_norms():
    normed, linear = head(), head(False)
    norm_D = normed.weight.detach().norm(dim=0) + 1e-7
    with torch.no_grad():
        linear.weight.copy_(normed.weight / norm_D)
    x, up = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 30, dtype=torch.float64)
    for layer in (normed, linear):
        layer(x).backward(up)
    torch.testing.assert_close(normed.weight.grad, linear.weight.grad / norm_D)
    radial = (normed.weight.grad * normed.weight.detach()).sum(0)
    assert bool((radial.abs() > 1e-3).any())  # kept, where the gradient of the norm itself would take it away


def test_evaluation_leaves_no_trace():
    layer = head()
    before = layer.weight.detach().clone()
    x = torch.randn(5, 8, dtype=torch.float64)
    trained = layer(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), trained, rtol=0, atol=0)
    assert torch.equal(layer.weight, before) and list(layer.state_dict()) == ["weight"]
    torch.testing.assert_close(layer.train()(x), trained, rtol=0, atol=0)


@pytest.mark.parametrize("through_data", [False, True])
def test_evaluation_sees_each_change_of_the_weight(through_data):
    """Also that of an optimizer that changes ``weight.data``, which autograd does not count."""
    layer = head()
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    with torch.no_grad():
        (layer.weight.data if through_data else layer.weight).add_(layer.weight.grad)
        expected = x @ normalized_weight(layer.weight).T
        torch.testing.assert_close(layer(x), expected)


def test_the_loss_after_evaluation_is_the_loss_without(tmp_path):
    folder = write_released(tmp_path / "a", LITE, random_weights(LITE))
    ids, _ = left_padded([IDS[0]])
    losses = []
    for evaluate in (False, True):
        network = load_hf(folder).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            loss = network(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluate:
                with torch.no_grad():
                    network.eval()(ids)
                network.train()
        losses.append(loss.item())
    assert losses[0] == losses[1]
