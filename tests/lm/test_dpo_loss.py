"""Preference loss: its value and gradients where they are known, what it does not depend on, long answers in float32."""

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.ling import LingForCausalLM, preset
from zoo.lm.dpo_loss import dpo_loss, sequence_logps, token_losses


@pytest.fixture
def logps():
    """Log-likelihoods (B,) of policy and reference, float64, those of the policy with gradient."""
    draws = -20 - 5 * torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return draws[0].requires_grad_(), draws[1].requires_grad_(), draws[2], draws[3]


def test_policy_that_is_the_reference_has_ln_2_and_pushes_both_ways(logps):
    chosen, rejected, *_ = logps
    found = dpo_loss(chosen, rejected, chosen, rejected, nll_weight=0.0)
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert not found.chosen_reward_B.any() and not found.rejected_reward_B.any() and found.accuracy == 0
    found.loss.backward()
    # d/dx of -log sigmoid at 0 is -1/2; mean over pairs, times beta; nothing flows into the reference.
    assert torch.allclose(chosen.grad, torch.full_like(chosen, -0.1 / 2 / len(chosen)))
    assert torch.allclose(rejected.grad, -chosen.grad)


def test_gradient_is_beta_times_how_wrong_the_order_is(logps):
    chosen, rejected, ref_chosen, ref_rejected = logps
    dpo_loss(*logps, beta=0.3, nll_weight=0.0).loss.backward()
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
    expected = 0.3 * torch.sigmoid(-margin) / len(chosen)
    assert torch.allclose(chosen.grad, -expected, rtol=1e-12) and torch.allclose(rejected.grad, expected, rtol=1e-12)
    inputs = tuple(t.detach().requires_grad_() for t in logps[:2])
    count = torch.arange(1, 7)
    assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, *logps[2:], count).loss, inputs)


def test_constants_that_both_answers_share_do_not_count(logps):
    chosen, rejected, ref_chosen, ref_rejected = (t.detach() for t in logps)
    plain = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, nll_weight=0.0)
    prompt = torch.tensor(-37.5, dtype=torch.float64)
    for policy, reference in ((prompt, 0), (0, prompt), (prompt, 2 * prompt)):
        shifted = dpo_loss(chosen + policy, rejected + policy, ref_chosen + reference, ref_rejected + reference, nll_weight=0.0)
        assert torch.allclose(shifted.loss, plain.loss, rtol=1e-12)
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, nll_weight=0.0)
    margin = plain.chosen_reward_B - plain.rejected_reward_B
    assert torch.allclose(swapped.loss - plain.loss, margin.mean())  # log sigmoid(x) - log sigmoid(-x) = x
    assert swapped.accuracy.item() == pytest.approx(1 - plain.accuracy.item())


def test_likelihood_of_the_chosen_answer_is_a_mean_over_its_tokens(logps):
    chosen, rejected, *_ = logps
    count = torch.tensor([1, 2, 3, 4, 5, 6])
    found = dpo_loss(*logps, count)
    assert torch.allclose(found.nll, -(chosen / count).mean())
    assert torch.allclose(found.loss, found.preference + 0.05 * found.nll)
    alone = [dpo_loss(*(logp[[pair]] for logp in logps), count[[pair]]).loss for pair in range(6)]
    assert torch.allclose(found.loss_B, torch.stack(alone)) and not found.loss_B.requires_grad
    plain = torch.autograd.grad(dpo_loss(*logps, nll_weight=0.0).loss, (chosen, rejected))
    both = torch.autograd.grad(found.loss, (chosen, rejected))
    assert torch.allclose(both[0] - plain[0], -0.05 / count.double() / len(count)) and torch.equal(both[1], plain[1])


def test_long_answers_and_far_margins_in_float32():
    # 5,000 nats: float32 steps by 5e-4, and by twice that at the sum of two.
    values = [torch.tensor([value], dtype=torch.float64) for value in (-5000.25, -4100.125, -5000.5, -4100.0)]
    exact = dpo_loss(*values, nll_weight=0.0).loss
    rounded = dpo_loss(*(value.float() for value in values), nll_weight=0.0).loss
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-6)
    for margin, expected in ((1e4, 0.0), (-1e4, 1e3)):
        policy = torch.tensor([margin], requires_grad=True)
        zero = torch.zeros(1)
        loss = dpo_loss(policy, zero, zero, zero, nll_weight=0.0).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected) and policy.grad.isfinite().all()


def test_sequences_of_a_network_are_scored_by_their_counted_labels():
    torch.manual_seed(0)
    network = LingForCausalLM(preset("ling_tiny").replace(num_hidden_layers=1, num_experts=4)).double()
    ids = torch.randint(0, 256, (2, 7))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 5:] = -100
    output = network(ids, labels=labels, with_logits=True)
    losses = token_losses(output.logits, labels)
    assert torch.allclose(losses, output.loss_BT)
    log_p = F.log_softmax(output.logits, -1)
    by_hand = [sum(log_p[0, t - 1, ids[0, t]] for t in range(3, 7)), sum(log_p[1, t - 1, ids[1, t]] for t in range(1, 5))]
    assert torch.allclose(sequence_logps(losses), torch.stack(by_hand))
    sequence_logps(losses).sum().backward()
    assert network.lm_head.weight.grad.abs().sum() > 0
    assert token_losses(output.logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta=0\.0"),
        ({"nll_weight": -1.0}, r"nll_weight=-1\.0"),
        ({}, r"nll_weight=0\.05 needs num_chosen_B"),
        ({"num_chosen_B": torch.tensor([1, 0])}, "has no tokens"),
        ({"nll_weight": 0.0, "reference_rejected_B": torch.zeros(3)}, r"different shapes \[\(2,\), \(3,\)\]"),
    ],
)
def test_bad_input_is_refused(options, message):
    names = ("policy_chosen_B", "policy_rejected_B", "reference_chosen_B", "reference_rejected_B")
    with pytest.raises(ValueError, match=message):
        dpo_loss(**{**dict.fromkeys(names, torch.zeros(2)), **options})
