"""Algorithms as components: targets, and losses whose parts add up however a minibatch is divided, in float64."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.rlhf import GRPO, PPO, RLOO, Algorithm, DrGRPO, Experience, Importance, KLPenalty, ReinforcePP
from zoo.rlhf.algorithm import Targets
from zoo.rlhf.ppo import entropy, policy_loss, token_mean

R, N, V, K = 8, 6, 11, 4
LENGTHS = torch.tensor([1, 1, 2, 3, 6, 6, 5, 4])
ALGORITHMS = [PPO, GRPO, DrGRPO, RLOO, ReinforcePP]


def experience(seed: int = 0) -> Experience:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = torch.randint(0, V, (R, N), generator=generator)
    mask = torch.arange(N) < LENGTHS[:, None]
    logp, score = -2 + 0.3 * normal(R, N), 2 * normal(R)
    return Experience(
        tokens[:, :2], torch.ones(R, 2), tokens, mask, torch.arange(R), logp, score, LENGTHS < N,
        reference_logp=logp + 0.3 * normal(R, N), value=normal(R, N),
    )  # fmt: skip


class Policy(nn.Module):
    """A table of logits that depends on the token: enough for gradients of log-probabilities, entropies and values."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.logits = nn.Parameter(0.3 * torch.randn(V, V, generator=generator, dtype=torch.float64))
        self.values = nn.Parameter(torch.randn(V, generator=generator, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = tokens.roll(1, 1)
        logits = self.logits[state]
        logp = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        return logp, entropy(logits), self.values[state]


def gradient(algorithm: Algorithm, parts: list[slice], local_means: bool = False) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one minibatch whose parts are as many ranks, which add up their gradients."""
    whole, policy = experience(), Policy()
    targets = algorithm.targets(whole, K, 0.1)
    mask = algorithm.action_mask(whole)
    advantage = algorithm.minibatch_advantage(targets, mask)
    total = torch.zeros((), dtype=torch.float64)
    for rows in parts:
        part = whole.select(rows)
        logp, entropies, value = policy(part.tokens)
        count, states, sequences = mask.sum(), algorithm.value_mask(whole).sum(), len(whole)
        if local_means:
            count = states = len(parts) * mask[rows].sum()
        loss, _ = algorithm.policy_loss(logp, entropies, part, advantage[rows], count, sequences, 0.1)
        if algorithm.needs_critic:
            assert targets.returns is not None
            loss = loss + algorithm.value_loss(value, part, targets.returns[rows], states)[0]
        loss.backward()
        total += loss.detach()
    return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def split(ranks: int) -> list[slice]:
    return [slice(rank * R // ranks, (rank + 1) * R // ranks) for rank in range(ranks)]


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_gradient_does_not_depend_on_the_number_of_ranks(kind: type[Algorithm]) -> None:
    algorithm = kind(entropy_weight=0.01)
    loss, whole = gradient(algorithm, split(1))
    assert float(whole.abs().max()) > 1e-3
    for ranks in (2, 4):
        divided_loss, divided = gradient(algorithm, split(ranks))
        torch.testing.assert_close((divided_loss, divided), (loss, whole), rtol=0, atol=1e-12)


def test_with_local_means_it_would() -> None:
    whole = gradient(PPO(), split(1))[1]
    torch.testing.assert_close(gradient(PPO(), split(1), local_means=True)[1], whole, rtol=0, atol=1e-12)
    for ranks in (2, 4):
        assert float((gradient(PPO(), split(ranks), local_means=True)[1] - whole).abs().max()) > 1e-3


def loss_of(algorithm: Algorithm, samples: Experience, logp: Tensor, advantage: Tensor) -> Tensor:
    count = algorithm.action_mask(samples).sum()
    return algorithm.policy_loss(logp, torch.zeros_like(logp), samples, advantage, count, R, 0.5)[0]


def test_means_of_each_algorithm() -> None:
    samples = experience()
    ones = torch.ones(R, N, dtype=torch.float64)
    no_kl: dict[str, Any] = {"kl": KLPenalty(0.0)}
    advantage = torch.arange(1.0, R + 1, dtype=torch.float64)[:, None] * ones
    rows = torch.arange(1.0, R + 1, dtype=torch.float64)
    for algorithm, known in (
        (PPO(**no_kl), (rows * LENGTHS).sum() / LENGTHS.sum()),
        (RLOO(**no_kl), (rows * LENGTHS).sum() / LENGTHS.sum()),
        (GRPO(**no_kl), rows.mean()),
        (DrGRPO(), (rows * LENGTHS).sum() / (R * N)),
        (DrGRPO(max_length=10), (rows * LENGTHS).sum() / (R * 10)),
    ):
        torch.testing.assert_close(loss_of(algorithm, samples, samples.logp, advantage), -known)


def test_advantages_of_groups_by_hand() -> None:
    samples = dataclasses.replace(experience(), score=torch.tensor([1.0, 2, 3, 2, 0, 0, 0, 4], dtype=torch.float64))
    first = {
        GRPO: [-1.0, 0.0, 1.0, 0.0, -1.0, -1, -1, 3],
        DrGRPO: [-1.0, 0.0, 1.0, 0.0, -1.0, -1, -1, 3],
        RLOO: [-4 / 3, 0.0, 4 / 3, 0.0, -4 / 3, -4 / 3, -4 / 3, 4],
    }
    deviation = torch.tensor([2 / 3] * 4 + [4.0] * 4, dtype=torch.float64).sqrt() + 1e-6
    for kind, values in first.items():
        known = torch.tensor(values, dtype=torch.float64)
        known = known / deviation if kind is GRPO else known
        found = kind(kl=KLPenalty(0.0)).targets(samples, K, 0.0)
        torch.testing.assert_close(found.advantage, (known[:, None] * samples.mask))
        assert found.returns is None


def test_reinforce_pp_whitens_over_the_rollout_less_a_baseline_if_asked() -> None:
    samples = experience()
    for baseline in (False, True):
        algorithm = ReinforcePP(baseline=baseline, kl=KLPenalty(0.0))
        score = samples.score.clamp(-5, 5)
        if baseline:
            score = score - score.view(2, K).mean(1).repeat_interleave(K)
        assert algorithm.needs_groups is baseline and algorithm.needs_whole_rollout
        tokens = score.repeat_interleave(LENGTHS)
        found = algorithm.targets(samples, K, 0.0).advantage
        torch.testing.assert_close(found[samples.mask], (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt())


def test_rloo_counts_the_kl_as_a_reward() -> None:
    samples = experience()
    assert samples.reference_logp is not None
    kl = (samples.logp - samples.reference_logp).masked_fill(~samples.mask, 0).sum(1)
    total = samples.score.clamp(-5, 5) - 0.3 * kl
    others = (total.view(2, K).sum(1, keepdim=True) - total.view(2, K)) / (K - 1)
    found = RLOO().targets(samples, K, 0.3).advantage[:, 0]
    torch.testing.assert_close(found, total - others.flatten())


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_an_actor_that_is_the_reference_has_no_kl(kind: type[Algorithm]) -> None:
    samples = experience()
    same = dataclasses.replace(samples, reference_logp=samples.logp.clone())
    targets = kind(kl=KLPenalty(0.1), score_clip=0).targets(same, K, 0.1)
    assert not targets.kl.any()
    torch.testing.assert_close(targets.reward.sum(1), samples.score)


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_without_a_coefficient_no_reference_is_used(kind: type[Algorithm]) -> None:
    algorithm = kind(kl=KLPenalty(0.0, "k3", "loss"))
    samples = dataclasses.replace(experience(), reference_logp=None)
    assert not algorithm.needs_reference
    targets = algorithm.targets(samples, K, 0.0)
    loss = loss_of(algorithm, samples, samples.logp, algorithm.minibatch_advantage(targets, samples.mask))
    assert bool(loss.isfinite()) and not targets.kl.any()
    with pytest.raises(ValueError, match=r"no reference_logp, which kl\.coefficient=0\.1 needs"):
        kind(kl=KLPenalty(0.1)).targets(samples, K, 0.1)


def test_kl_in_the_loss_leaves_rewards_alone() -> None:
    samples = experience()
    assert samples.reference_logp is not None
    algorithm = GRPO(kl=KLPenalty(0.2, "k2", "loss"))
    assert torch.equal(algorithm.targets(samples, K, 0.2).reward, GRPO(kl=KLPenalty(0.0)).targets(samples, K, 0.0).reward)
    zero = torch.zeros(R, N, dtype=torch.float64)
    k2 = 0.5 * (samples.logp - samples.reference_logp).square() * samples.mask
    torch.testing.assert_close(loss_of(algorithm, samples, samples.logp, zero), 0.5 * (k2.sum(1) / LENGTHS).mean())


def test_older_samples_are_weighted_and_equal_ones_are_not() -> None:
    samples = experience()
    advantage = torch.ones(R, N, dtype=torch.float64)
    algorithm = PPO(importance=Importance(cap=1.5))
    plain = loss_of(algorithm, samples, samples.logp, advantage)
    same = dataclasses.replace(samples, behaviour_logp=samples.logp.clone())
    assert torch.equal(loss_of(algorithm, same, samples.logp, advantage), plain)
    older = dataclasses.replace(samples, behaviour_logp=samples.logp - 1)
    torch.testing.assert_close(loss_of(algorithm, older, samples.logp, advantage), 1.5 * plain)
    masked = PPO(importance=Importance(cap=1.5, mode="mask"))
    assert loss_of(masked, older, samples.logp, advantage) == 0


def test_whitened_advantages_do_not_depend_on_a_constant_of_the_scores() -> None:
    samples = experience()
    algorithm = PPO(lam=1.0, score_clip=0)
    plain, shifted = (algorithm.targets(dataclasses.replace(samples, score=samples.score + c), K, 0.1) for c in (0.0, 2.0))
    mask = samples.mask
    torch.testing.assert_close((shifted.advantage - plain.advantage)[mask], torch.full((28,), 2.0, dtype=torch.float64))
    whitened = [algorithm.minibatch_advantage(targets, mask) for targets in (plain, shifted)]
    torch.testing.assert_close(*whitened)
    loss, _ = policy_loss(samples.logp, samples.logp, whitened[0], mask)
    assert float(token_mean(loss, mask.sum())) == pytest.approx(0, abs=1e-12)


def test_parts_of_a_rollout_have_the_targets_of_the_whole() -> None:
    samples = experience()
    for algorithm in (PPO(), GRPO(), DrGRPO(), RLOO()):
        whole = algorithm.targets(samples, K, 0.1)
        for rows in split(2):
            part = algorithm.targets(samples.select(rows), K, 0.1)
            for a, b in zip(vars(part).values(), vars(whole.select(rows)).values(), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
    assert ReinforcePP().needs_whole_rollout and PPO(convention="trl").needs_whole_rollout


def test_answers_without_an_end_lose_the_penalty() -> None:
    samples = experience()
    plain, punished = (PPO(missing_eos_penalty=p).targets(samples, K, 0.1).reward.sum(1) for p in (None, 1.5))
    torch.testing.assert_close(plain - punished, 1.5 * (~samples.ended).double())


def test_selection_keeps_what_is_no_tensor() -> None:
    samples = dataclasses.replace(experience(), version=3)
    part = samples.select(torch.tensor([5, 1]))
    assert (len(part), part.version, part.behaviour_logp, part.length.tolist()) == (2, 3, None, [6, 1])
    assert isinstance(PPO().targets(samples, K, 0.1).select(slice(0, 2)), Targets)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (PPO, {"clip": 0.0}, "clip=0.0 must be positive"),
    (PPO, {"dual_clip": 1.0}, "dual_clip=1.0 must be above 1"),
    (PPO, {"score_clip": -1.0}, "score_clip=-1.0"),
    (PPO, {"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0"),
    (PPO, {"entropy_weight": float("nan")}, "entropy_weight=nan"),
    (PPO, {"gamma": 1.5}, "gamma=1.5 and lam=0.95"),
    (PPO, {"value_clip": 0.0}, "value_clip=0.0"),
    (DrGRPO, {"max_length": 0}, "max_length=0"),
    (ReinforcePP, {"gamma": -1.0}, "gamma=-1.0"),
    (KLPenalty, {"coefficient": -1.0}, "kl.coefficient=-1.0"),
    (KLPenalty, {"place": "loss"}, "kl.kind=k1 has no gradient"),
    (KLPenalty, {"clamp": 0.0}, "kl.clamp=0.0"),
    (PPO, {"kl": KLPenalty(0.0, target=6.0)}, "coefficient=0.0, target=6.0 and horizon=10000.0 must all be above 0"),
    (Importance, {"cap": 0.5}, "importance.cap=0.5"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), BAD)
def test_numbers_out_of_range_are_refused(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        kind(**arguments)
    assert len(str(caught.value)) <= 300


def test_what_is_missing_is_named() -> None:
    samples = dataclasses.replace(experience(), value=None)
    with pytest.raises(ValueError, match="no value, which PPO needs"):
        PPO().targets(samples, K, 0.1)
    with pytest.raises(ValueError, match=r"entropy_weight=0\.1 needs entropy_RN"):
        PPO(entropy_weight=0.1).policy_loss(samples.logp, None, samples, samples.logp, 1, 1, 0.1)
    with pytest.raises(NotImplementedError, match="GRPO has no critic"):
        GRPO().value_loss(samples.logp, samples, samples.logp, 1)
