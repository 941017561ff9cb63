"""Identities of the mathematics of PPO, in float64."""

import math

import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from zoo.rlhf.ppo import (
    KLCoefficient,
    entropy,
    generalized_advantages,
    importance_weights,
    kl_estimate,
    kl_sums,
    policy_loss,
    shaped_score,
    token_mean,
    token_rewards,
    value_loss,
    whiten,
)

LENGTHS = torch.tensor([1, 4, 7, 7, 2])
R, N = len(LENGTHS), 7
MASK = torch.arange(N) < LENGTHS[:, None]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (R, N), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor | float, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=0, atol=atol)


# KL


def _expectation(kind: str, logits: Tensor, reference: Tensor) -> Tensor:
    """Expectation of an estimate over the policy's draws, with the gradient of the estimate alone, as a loss has it."""
    logp, other = logits.log_softmax(0), reference.log_softmax(0)
    return (logp.exp().detach() * kl_estimate(logp, other, kind)).sum()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["k1", "k3", "k1+", "k3+"])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_k1_and_k3_have_the_expectation_of_the_exact_kl(kind: str, scale: float) -> None:
    policy, reference = scale * normal(1, 9), scale * normal(2, 9)
    exact = torch.nn.functional.kl_div(reference.log_softmax(0), policy.log_softmax(0), reduction="sum", log_target=True)
    close(_expectation(kind, policy, reference), float(exact))
    assert exact > 0


def test_k2_and_abs_are_not_unbiased_but_k2_agrees_for_near_distributions() -> None:
    policy = normal(1, 9)
    far, near = normal(2, 9), policy + 1e-3 * normal(2, 9)
    assert abs(float(_expectation("k2", policy, far) / _expectation("k1", policy, far)) - 1) > 0.1
    assert abs(float(_expectation("k2", policy, near) / _expectation("k1", policy, near)) - 1) < 1e-2
    assert _expectation("abs", policy, far) > _expectation("k1", policy, far)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k1+", "k3+"])
def test_as_a_loss_only_k2_has_the_gradient_of_the_kl(kind: str) -> None:
    policy, reference = normal(3, 9).requires_grad_(), normal(4, 9)
    logp = policy.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - reference.log_softmax(0))).sum(), policy)[0]
    found = torch.autograd.grad(_expectation(kind, policy, reference), policy)[0]
    if kind in ("k2", "k1+", "k3+"):
        close(found, exact)
    else:
        assert float((found - exact).abs().max()) > 0.01
    if kind == "k1":
        close(found, 0)


def test_monte_carlo_means_of_k1_and_k3_agree_and_k3_is_never_negative() -> None:
    logp, other = normal(5, 9).log_softmax(0), normal(6, 9).log_softmax(0)
    drawn = torch.multinomial(logp.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))
    k1, k3 = (kl_estimate(logp[drawn], other[drawn], kind) for kind in ("k1", "k3"))
    error = float((k1 - k3).std()) / math.sqrt(len(drawn))
    assert abs(float(k1.mean() - k3.mean())) < 4 * error
    assert float(k3.min()) >= 0 > float(k1.min())


def test_known_estimates_and_bounds() -> None:
    logp, other = torch.tensor([-1.0, -3.0], dtype=torch.float64), torch.tensor([-3.0, -1.0], dtype=torch.float64)
    known = {"k1": [2, -2], "k2": [2, 2], "abs": [2, 2], "k3": [math.exp(-2) + 1, math.exp(2) - 3]}
    for kind, values in known.items():
        close(kl_estimate(logp, other, kind), torch.tensor(values, dtype=torch.float64))  # type: ignore[arg-type]
    assert kl_estimate(logp, other, "k1", clamp=1.5).tolist() == [1.5, -1.5]
    assert float(kl_estimate(torch.tensor(-500.0), torch.tensor(0.0), "k3")) < math.exp(20)
    with pytest.raises(ValueError, match="kind='k4' must be one of k1"):
        kl_estimate(logp, other, "k4")  # type: ignore[arg-type]


def test_kl_of_sequences_is_a_sum_or_a_mean_over_their_tokens() -> None:
    kl = normal(7).masked_fill(~MASK, torch.nan)
    rows = [kl[row, :length] for row, length in enumerate(LENGTHS)]
    for measure, of in (("sequence", torch.sum), ("token", torch.mean)):
        parts = [kl_sums(kl[part], MASK[part], measure) for part in (slice(0, 2), slice(2, R))]  # type: ignore[arg-type]
        total, count = (sum(part[place] for part in parts) for place in (0, 1))
        close(total / count, float(torch.stack([of(row) for row in rows]).mean()))
    assert kl_sums(kl[:1], torch.zeros(1, N, dtype=torch.bool), "token")[0] == 0


def test_entropy_of_uniform_and_certain_distributions() -> None:
    close(entropy(torch.full((3, 5), 7.0, dtype=torch.float64)), math.log(5))
    close(entropy(torch.tensor([0.0, 900.0], dtype=torch.float64)), 0)
    logits = normal(8, 4, 6)
    close(entropy(logits), torch.distributions.Categorical(logits=logits).entropy())


def test_adaptive_coefficient_rests_at_the_target_and_moves_within_bounds() -> None:
    for kl, factor in ((6.0, 1.0), (0.0, 1 - 0.2 * 64 / 1000), (1e9, 1 + 0.2 * 64 / 1000), (6.6, 1 + 0.1 * 64 / 1000)):
        controller = KLCoefficient(0.05, target=6.0, horizon=1000)
        controller.update(kl, 64)
        assert controller.coefficient == pytest.approx(0.05 * factor, rel=1e-12)
    again = KLCoefficient(0.5, 6.0, 1000)
    again.load_state_dict(controller.state_dict())
    assert again.coefficient == controller.coefficient
    with pytest.raises(ValueError, match="horizon=10 must be above a fifth of the 64 samples"):
        KLCoefficient(0.05, 6.0, 10).update(6.0, 64)
    with pytest.raises(ValueError, match="must all be above 0"):
        KLCoefficient(0.0, 6.0, 10)
    fixed = KLCoefficient(0.05)
    fixed.update(1e9, 64)
    fixed.load_state_dict(again.state_dict())
    assert fixed.coefficient == 0.05


# Rewards


def test_score_is_clipped_then_punished_for_a_missing_end() -> None:
    score, ended = torch.tensor([-9.0, -9.0, 3.0, 9.0]), torch.tensor([True, False, False, True])
    assert shaped_score(score, 5.0, ended, 1.0).tolist() == [-5, -6, 2, 5]
    assert shaped_score(score).tolist() == score.tolist()
    with pytest.raises(ValueError, match="needs ended_R"):
        shaped_score(score, missing_eos_penalty=1.0)


def test_rewards_of_tokens_sum_to_the_score_less_the_weighted_kl() -> None:
    score, kl = normal(9, R), normal(10).masked_fill(~MASK, torch.nan)
    reward = token_rewards(score, kl, MASK, 0.1)
    close(reward.sum(1), score - 0.1 * kl.nansum(1))
    close(reward[~MASK], 0)
    close(reward[2], -0.1 * kl[2] + torch.nn.functional.one_hot(torch.tensor(6), 7) * score[2])
    close(token_rewards(score, kl, MASK, 0.1, per_length=True).sum(1), score - 0.1 * kl.nansum(1) / LENGTHS)
    close(token_rewards(score, torch.zeros(R, N, dtype=torch.float64), MASK, 0.1).sum(1), score)
    close(token_rewards(score, kl, torch.zeros_like(MASK), 0.1), 0)


# Advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_equal_the_recursion_of_scipy(gamma: float, lam: float) -> None:
    reward, value = normal(11), normal(12)
    advantage, returns = generalized_advantages(reward, value, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS.tolist()):
        r, v = reward[row, :length].numpy(), value[row, : length + 1].numpy().copy()
        following = [*v[1:length], 0.0]
        delta = r + gamma * torch.tensor(following).double().numpy() - v[:length]
        expected = lfilter([1.0], [1.0, -gamma * lam], delta[::-1])[::-1].copy()
        close(advantage[row, :length], torch.from_numpy(expected))
    close(advantage[~MASK], 0)
    close(returns - advantage, value.masked_fill(~MASK, 0))


def test_limits_of_the_advantage() -> None:
    reward, value = normal(13), normal(14)
    following = reward.masked_fill(~MASK, 0).flip(1).cumsum(1).flip(1)
    close(generalized_advantages(reward, value, MASK, 1.0, 1.0)[0], (following - value).masked_fill(~MASK, 0))
    close(generalized_advantages(reward, 0 * value, MASK, 1.0, 1.0)[0], following.masked_fill(~MASK, 0))
    next_value = torch.nn.functional.pad(value.masked_fill(~MASK, 0)[:, 1:], (0, 1))
    delta = (reward + 0.9 * next_value - value).masked_fill(~MASK, 0)
    close(generalized_advantages(reward, value, MASK, 0.9, 0.0)[0], delta)
    close(generalized_advantages(reward, value, MASK)[0][0, 0], reward[0, 0] - value[0, 0])  # an answer of one token


def test_nothing_after_the_end_counts() -> None:
    reward, value = normal(15), normal(16)
    spoiled = [x.masked_fill(~MASK, torch.inf) for x in (reward, value)]
    for a, b in zip(generalized_advantages(reward, value, MASK), generalized_advantages(*spoiled, MASK), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whiten(reward, MASK), whiten(spoiled[0], MASK))


def test_whitening_has_mean_0_and_unbiased_deviation_1() -> None:
    x = 3 + 5 * normal(17)
    white = whiten(x, MASK)
    close(white[MASK].mean(), 0)
    close(white[MASK].std(), 1, 1e-8)
    close(white[~MASK], 0)
    close(whiten(x + 100, MASK), white)
    close(whiten(x[:1], MASK[:1]), 0)  # one token
    half = x.bfloat16()
    assert torch.equal(whiten(half, MASK), whiten(half.float(), MASK))


def test_shifted_scores_shift_every_advantage_and_no_whitened_one() -> None:
    score, kl, value = normal(18, R), normal(19), normal(20)
    plain, shifted = (
        generalized_advantages(token_rewards(score + c, kl, MASK, 0.1), value, MASK, 1.0, 1.0)[0] for c in (0.0, 1.5)
    )
    close((shifted - plain)[MASK], 1.5)
    close(whiten(shifted, MASK), whiten(plain, MASK))


# Losses


def test_first_update_has_ratio_1_loss_0_and_a_gradient() -> None:
    old = normal(21)
    logp = old.clone().requires_grad_()
    advantage = whiten(normal(22), MASK)
    loss, sums = policy_loss(logp, old, advantage, MASK)
    mean = token_mean(loss, MASK.sum())
    close(mean, 0)
    assert sums["clipped"] == sums["old_kl"] == 0 and sums["ratio"] == MASK.sum()
    mean.backward()
    close(logp.grad, -advantage / MASK.sum())  # type: ignore[arg-type]
    assert float(logp.grad.abs().max()) > 0.01  # type: ignore[union-attr]


@pytest.mark.parametrize("dual_clip", [None, 1.1, 3.0])
def test_policy_loss_equals_a_plain_loop(dual_clip: float | None) -> None:
    logp, old, advantage, weight = normal(23).requires_grad_(), normal(24), normal(25), normal(26).exp()
    loss, sums = policy_loss(logp, old, advantage, MASK, 0.2, dual_clip, weight)
    clipped = 0
    for row in range(R):
        for k in range(int(LENGTHS[row])):
            a, ratio = float(advantage[row, k]), math.exp(float(logp[row, k].detach() - old[row, k]))
            bounded = min(max(ratio, 0.8), 1.2)
            expected = max(-a * ratio, -a * bounded)
            clipped += -a * bounded > -a * ratio
            if dual_clip is not None and a < 0:
                expected = min(expected, -a * dual_clip)
            assert float(loss[row, k].detach()) == pytest.approx(expected * float(weight[row, k]), abs=1e-12)
    close(loss[~MASK], 0)
    assert float(sums["clipped"]) == clipped > 0


def test_gradient_of_the_policy_loss_stops_where_clipped() -> None:
    logp = torch.tensor([[0.5, 0.5, -0.5, -0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 5, dtype=torch.bool)
    policy_loss(logp, torch.zeros(1, 5), advantage, mask, 0.2, 3.0)[0].sum().backward()
    moved = logp.grad != 0  # type: ignore[operator]
    assert moved.tolist() == [[False, True, True, False, False]]


def test_values_at_the_start_have_equal_terms_and_clipped_ones_a_loop() -> None:
    old, returns = normal(27), normal(28)
    loss, sums = value_loss(old, old, returns, MASK)
    close(loss, 0.5 * (old - returns).square().masked_fill(~MASK, 0))
    assert sums["clipped"] == 0
    value = normal(29)
    loss, sums = value_loss(value, old, returns, MASK, 0.2)
    near = old + (value - old).clamp(-0.2, 0.2)
    close(loss, 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2).masked_fill(~MASK, 0))
    assert sums["clipped"] > 0


def test_decoupled_loss_is_that_of_ppo_for_equal_weights_and_bounded_else() -> None:
    logp, proximal, advantage = normal(30), normal(31), normal(32)
    weight = importance_weights(proximal, proximal, MASK)
    assert torch.equal(weight, torch.ones_like(weight))
    assert torch.equal(
        policy_loss(logp, proximal, advantage, MASK, weight_RN=weight)[0], policy_loss(logp, proximal, advantage, MASK)[0]
    )
    behaviour = proximal - torch.tensor([0.5, 1.0, -1.0, 30.0, 0, 0, 0])
    known = torch.tensor([0.5, 1.0, -1.0, 30.0, 0, 0, 0]).double().exp()
    row = MASK[2:3]
    close(importance_weights(proximal[2:3], behaviour[2:3], row, 2.0, "truncate"), known.clamp(max=2)[None])
    close(importance_weights(proximal[2:3], behaviour[2:3], row, 2.0, "mask"), known.where(known <= 2, 0)[None])


def test_a_minibatch_without_tokens_has_loss_0() -> None:
    nothing = torch.zeros_like(MASK)
    logp = normal(33).requires_grad_()
    loss = token_mean(policy_loss(logp, normal(34), normal(35), nothing)[0], nothing.sum())
    loss.backward()
    close(loss, 0)
    close(logp.grad, 0)  # type: ignore[arg-type]
