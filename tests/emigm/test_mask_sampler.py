"""Sampling in mask-prediction steps: every token once, the law of the counts, guidance, in-painting, MAR's order."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sweep import sweep_tuples
from torch import nn

from zoo.base.random import SampleRandom
from zoo.emigm.guidance import Guidance
from zoo.emigm.mask_schedule import expected_reveals, gamma, step_times
from zoo.emigm.network import MaskedTransformer
from zoo.emigm.sampler import MaskSampler, equal_groups, reveal_counts, sample_tokens

N, C, D, S, B = 12, 2, 8, 2, 3
PLAIN = Guidance(scale=1.0)
MAE = pytest.mark.parametrize("use_mae", [True, False], ids=["visible only", "single encoder"])


def make(**options):
    torch.manual_seed(0)
    network = MaskedTransformer(N, C, D, 1, 1, 2, 1, 8, num_classes=5, buffer_size=S, **options).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def sampler(**options):
    return MaskSampler(**{"num_iter": 5, "head_steps": 3, "guidance": PLAIN, **options})


def draw(network, how, label=None, index=None, seed=0, **options):
    index = torch.arange(B) if index is None else index
    label = torch.arange(len(index)) if label is None else label
    return sample_tokens(network, how, SampleRandom(seed, index), SampleRandom(seed, torch.tensor([0])), label, **options)


def runs(how, count, num_tokens=N, num_known=0):
    return [reveal_counts(how, num_tokens - num_known, num_known, SampleRandom(0, torch.tensor([i]))) for i in range(count)]


def transition(num_tokens, p):
    """Law of the masked count after a step, for each count before it."""
    matrix = torch.zeros(num_tokens + 1, num_tokens + 1, dtype=torch.float64)
    matrix[0, 0] = 1
    for masked in range(1, num_tokens + 1):
        law = torch.tensor(stats.binom(masked, p).pmf(range(masked + 1)))
        law[1] += law[0]
        matrix[masked, :masked] = law[1:].flip(0)
    return matrix


# Counts


@settings(max_examples=60)
@given(
    num_iter=st.integers(1, 40),
    num_tokens=st.integers(1, 40),
    known=st.integers(0, 40),
    schedule=st.sampled_from(["linear", "cosine", "poly-0.5", "exp", "log"]),
    law=st.sampled_from(["binomial", "mar"]),
    seed=st.integers(0, 99),
)
def test_every_token_is_revealed_once(num_iter, num_tokens, known, schedule, law, seed):
    """Also with more steps than tokens: no step is empty, none is revealed twice, and the sum is N."""
    known = min(known, num_tokens)
    how = sampler(num_iter=num_iter, schedule=schedule, count_law=law)
    steps = reveal_counts(how, num_tokens - known, known, SampleRandom(seed, torch.tensor([0])))
    assert len(steps) <= min(num_iter, num_tokens - known)
    ends = [known, *(step.after for step in steps)]
    assert [step.before for step in steps] == ends[:-1]
    assert ends[-1] == num_tokens
    assert all(step.after > step.before for step in steps)
    assert [step.number for step in steps] == sorted({step.number for step in steps})


@pytest.mark.parametrize(("schedule", "num_iter"), sweep_tuples([("exp", 8), ("linear", 4), ("cosine", 20)], quick=(0, 1)))
def test_counts_follow_the_markov_chain(schedule, num_iter):
    """Masked tokens after each step: Binomial(masked, 1 - gamma(s)/gamma(t)) are revealed, at least one."""
    count, tau = 800, step_times(num_iter)
    masked = torch.zeros(count, num_iter, dtype=torch.int64)
    for i, steps in enumerate(runs(sampler(schedule=schedule, num_iter=num_iter), count)):
        for step in steps:
            masked[i, step.number :] = N - step.after
    law = torch.zeros(N + 1, dtype=torch.float64)
    law[N] = 1
    for k in range(num_iter - 1):
        law = law @ transition(N, (1 - gamma(schedule, tau[k + 1]) / gamma(schedule, tau[k])).item())
        observed = masked[:, k].bincount(minlength=N + 1).double()
        likely = law * count >= 5
        if likely.sum() > 1:
            expected = torch.cat([law[likely], law[~likely].sum()[None]]) * count + 1e-9
            found = torch.cat([observed[likely], observed[~likely].sum()[None]])
            assert stats.chisquare(found.numpy(), expected.numpy(), sum_check=False).pvalue > 1e-4, k
    assert (masked[:, -1] == 0).all()


def test_mean_counts_are_the_exact_ones():
    total = torch.zeros(16, dtype=torch.float64)
    for steps in runs(sampler(num_iter=16), 400, num_tokens=256):
        for step in steps:
            total[step.number] += step.after - step.before
    torch.testing.assert_close(total / 400, expected_reveals("exp", 256, 16), rtol=0.08, atol=0.1)


def test_runs_that_end_early():
    """linear, N = 256, K = 128: about half of the runs have nothing left for the last step."""
    reached = sum(steps[-1].number == 127 for steps in runs(sampler(num_iter=128, schedule="linear"), 300, num_tokens=256))
    assert stats.binomtest(reached, 300, 0.537).pvalue > 1e-3


@pytest.mark.parametrize(("num_tokens", "num_iter"), [(256, 256), (256, 64), (16, 4), (12, 12)])
def test_mar_counts(num_tokens, num_iter):
    """Masked after step k: max(1, min(before - 1, floor(N cos(pi (k+1) / (2K))))), then none; the same in every run."""
    found = runs(sampler(num_iter=num_iter, count_law="mar"), 2, num_tokens)
    assert found[0] == found[1]
    left, expected = num_tokens, []
    for k in range(num_iter):
        kept = (
            0 if k == num_iter - 1 else max(1, min(left - 1, math.floor(num_tokens * math.cos(math.pi / 2 * (k + 1) / num_iter))))
        )
        if kept < left:
            expected.append(num_tokens - kept)
        left = kept
    assert [step.after for step in found[0]] == expected


@given(num_iter=st.integers(1, 40), low=st.floats(0, 1), high=st.floats(0, 1))
def test_guided_steps_are_those_that_end_in_the_window(num_iter, low, high):
    low, high = sorted((low, high))
    how = sampler(num_iter=num_iter, guidance=Guidance(3.0, low, high))
    tau = step_times(num_iter).tolist()
    for step in reveal_counts(how, 500, 0, SampleRandom(0, torch.tensor([0]))):
        assert step.guided is (low < tau[step.number + 1] <= high)


# Samples


@MAE
@pytest.mark.parametrize("num_iter", [1, 5, N, 30])
def test_revealed_tokens_stay_as_they_are(use_mae, num_iter):
    """Each position is predicted in exactly one step and is bit-identical from then on; masked ones are 0 until then."""
    drawn = draw(make(use_mae=use_mae), sampler(num_iter=num_iter), record=True)
    frames = torch.cat([torch.zeros(B, 1, N, C, dtype=torch.float64), drawn.trajectory], dim=1)
    changes = (frames.diff(dim=1) != 0).any(3)
    assert (changes.sum(1) == 1).all()
    assert torch.equal(drawn.trajectory[:, -1], drawn.tokens)
    counts = changes.sum(2)
    assert (counts == counts[:1]).all()  # equally many in each image
    assert drawn.nfe == drawn.trajectory.shape[1] <= min(num_iter, N)


def test_positions_are_revealed_in_an_order_uniform_over_images():
    network, rows = make(), 2000
    how = sampler(num_iter=N, count_law="mar", head_steps=1)
    drawn = draw(network, how, index=torch.arange(rows), label=torch.zeros(rows, dtype=torch.int64), record=True)
    first = (drawn.trajectory[:, 0] != 0).any(2)
    size = int(first[0].sum())
    observed = first.sum(0)
    assert stats.chisquare(observed.numpy(), [rows * size / N] * N).pvalue > 1e-3


@MAE
def test_one_step_is_one_evaluation_with_everything_masked(use_mae):
    network, calls = make(use_mae=use_mae), []
    network.encoder_blocks[0].register_forward_hook(lambda module, args, output: calls.append(output.shape[1]))
    drawn = draw(network, sampler(num_iter=1))
    assert drawn.nfe == 1
    assert calls == [S if use_mae else S + N]
    hidden = torch.full((B, N, C), math.nan, dtype=torch.float64)
    nothing = torch.empty(B, 0, dtype=torch.int64)
    z = network(hidden, network.class_embedding(torch.arange(B), B), nothing, torch.ones(B, N, dtype=torch.bool))
    z_picked = z.gather(
        1, SampleRandom(0, torch.arange(B)).uniform("order", (N,), torch.float64).argsort(1)[..., None].expand(-1, -1, D)
    )
    noise = SampleRandom(0, torch.arange(B)).normal("head 0 start", (N, C), torch.float64)
    tokens = network.diffloss.sample(z_picked.flatten(0, 1), lambda name: noise.flatten(0, 1), steps=3).view(B, N, C)
    order = SampleRandom(0, torch.arange(B)).uniform("order", (N,), torch.float64).argsort(1)
    torch.testing.assert_close(drawn.tokens.gather(1, order[..., None].expand(-1, -1, C)), tokens)


def test_encoder_sees_the_revealed_tokens_only():
    network, lengths = make(), []
    network.encoder_blocks[0].register_forward_hook(lambda module, args, output: lengths.append(output.shape[1] - S))
    how = sampler(num_iter=6)
    draw(network, how)
    assert lengths == [step.before for step in reveal_counts(how, N, 0, SampleRandom(0, torch.tensor([0])))]


def test_evaluations_reported_are_those_spent():
    """Guided steps count twice, as twice the rows; the head does not count."""
    for num_iter, window in ((5, (0.0, 1.0)), (5, (0.1, 0.5)), (30, (0.0, 0.4)), (4, (0.3, 0.3))):
        network, rows = make(), []
        network.decoder_norm.register_forward_hook(lambda module, args, output, rows=rows: rows.append(len(output)))
        drawn = draw(network, sampler(num_iter=num_iter, guidance=Guidance(3.0, *window)))
        assert sum(rows) == drawn.nfe * B


@MAE
@pytest.mark.parametrize("head", ["dpm-solver", "ddpm"])
def test_scale_1_and_an_empty_window_are_no_guidance(use_mae, head):
    network = make(use_mae=use_mae)
    plain = draw(network, sampler(head=head))
    for guidance in (Guidance(1.0, 0.0, 1.0), Guidance(5.0, 0.4, 0.4)):
        other = draw(network, sampler(head=head, guidance=guidance))
        assert torch.equal(other.tokens, plain.tokens)
        assert other.nfe == plain.nfe
    guided = draw(network, sampler(head=head, guidance=Guidance(5.0, 0.0, 1.0)))
    assert not torch.allclose(guided.tokens, plain.tokens)
    assert guided.nfe == 2 * plain.nfe


def test_guidance_before_its_window_changes_nothing():
    """Steps before the first guided one give the same tokens."""
    network = make()
    plain, guided = (draw(network, sampler(num_iter=6, guidance=Guidance(s, 0.0, 0.4)), record=True) for s in (1.0, 4.0))
    tau = step_times(6).tolist()
    first = next(k for k in range(6) if tau[k + 1] <= 0.4)
    assert first > 1
    torch.testing.assert_close(guided.trajectory[:, :first], plain.trajectory[:, :first])
    assert not torch.allclose(guided.trajectory[:, first], plain.trajectory[:, first])


def test_class_that_is_none_cannot_be_guided():
    """Where the class's embedding is that of no class, every scale gives the same."""
    network = make()
    network.class_emb.weight.data[:] = network.fake_latent.data
    plain, guided = (draw(network, sampler(guidance=Guidance(s, 0.0, 1.0))) for s in (1.0, 6.0))
    torch.testing.assert_close(guided.tokens, plain.tokens, rtol=1e-9, atol=1e-9)


def test_no_class_is_drawn_without_guidance():
    network = make()
    how = sampler(guidance=Guidance(4.0, 0.0, 1.0))
    random, counts = SampleRandom(0, torch.arange(B)), SampleRandom(0, torch.tensor([0]))
    free = sample_tokens(network, how, random, counts, None)
    assert free.nfe == sample_tokens(network, sampler(), random, counts, None).nfe
    network.class_emb.weight.data[:] = network.fake_latent.data
    torch.testing.assert_close(draw(network, sampler()).tokens, free.tokens)


def test_ramp_uses_the_share_revealed_after_the_step(monkeypatch):
    seen = []
    monkeypatch.setattr(Guidance, "scale_at", lambda self, revealed: seen.append(revealed) or 2.0)
    how = sampler(guidance=Guidance(3.0, 0.0, 1.0))
    draw(make(), how)
    assert seen == [step.after / N for step in reveal_counts(how, N, 0, SampleRandom(0, torch.tensor([0])))]


@MAE
@pytest.mark.parametrize("head", ["dpm-solver", "ddpm"])
def test_an_image_is_the_same_in_any_batch(use_mae, head):
    network, how = make(use_mae=use_mae), sampler(head=head, guidance=Guidance(3.0, 0.1, 0.7))
    together = draw(network, how, index=torch.arange(5))
    apart = draw(network, how, index=torch.tensor([3, 1]), label=torch.tensor([3, 1]))
    torch.testing.assert_close(apart.tokens, together.tokens[[3, 1]], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(draw(network, how, seed=1).tokens, together.tokens[:B])


def test_temperature_moves_the_ddpm_head_only():
    network = make()
    for head, equal in (("dpm-solver", True), ("ddpm", False)):
        warm, cold = (draw(network, sampler(head=head, temperature=t)).tokens for t in (1.0, 0.0))
        assert torch.equal(warm, cold) is equal


def test_samples_have_no_gradient():
    assert not draw(make(), sampler()).tokens.requires_grad


# Known tokens


def known(count, seed=0):
    order = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)).argsort(1)
    mask = torch.zeros(B, N, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), mask


@MAE
@pytest.mark.parametrize("count", [0, 1, 7, N - 1, N])
def test_known_tokens_are_kept_and_seen_from_the_start(use_mae, count):
    network, how = make(use_mae=use_mae), sampler(num_iter=4, guidance=Guidance(2.0, 0.0, 0.6))
    tokens, mask = known(count)
    drawn = draw(network, how, known_BNC=tokens, known_BN=mask, record=True)
    assert torch.equal(drawn.tokens[mask], tokens[mask])
    assert (drawn.tokens[~mask] != 0).all()
    assert drawn.nfe <= 2 * (N - count)
    poisoned = tokens.masked_fill(~mask[..., None], math.nan)  # what the user's image hides
    assert torch.equal(draw(network, how, known_BNC=poisoned, known_BN=mask).tokens, drawn.tokens)
    if 0 < count < N:
        other = draw(network, how, known_BNC=tokens + 1, known_BN=mask).tokens
        assert not torch.allclose(other[~mask], drawn.tokens[~mask])
    if count == N:
        assert drawn.nfe == 0


def test_nothing_known_is_sampling():
    tokens, mask = known(0)
    network = make()
    assert torch.equal(draw(network, sampler(), known_BNC=tokens, known_BN=mask).tokens, draw(network, sampler()).tokens)


def test_rows_that_know_differently_many_tokens_are_refused():
    tokens, mask = known(3)
    mask[0, mask[0].nonzero()[0]] = False
    with pytest.raises(ValueError, match="equally many known tokens in each row"):
        draw(make(), sampler(), known_BNC=tokens, known_BN=mask)
    with pytest.raises(ValueError, match="belong together"):
        draw(make(), sampler(), known_BN=known(3)[1])


@given(seed=st.integers(0, 1000), size=st.integers(1, 20))
def test_groups_hold_each_row_once_and_know_equally_many(seed, size):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, 3, generator=generator) < 0.5
    block = torch.randint(3, (size,), generator=generator)
    groups = list(equal_groups(mask, block))
    assert torch.equal(torch.cat([row for row, _ in groups]).sort().values, torch.arange(size))
    for row, number in groups:
        assert (block[row] == number).all()
        assert len(mask[row].sum(1).unique()) == 1
    assert len(list(equal_groups(None, block))) == len(block.unique())


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iter": 0}, "num_iter=0"),
        ({"count_block": 0}, "count_block=0"),
        ({"schedule": "square"}, "no mask schedule 'square'"),
        ({"count_law": "poisson"}, "count_law='poisson' must be one of binomial, mar"),
        ({"head": "heun"}, "no sampler 'heun'"),
        ({"head_steps": 0}, "at least 1 step, not 0"),
        ({"head": "ddpm", "head_steps": 2000}, "1 to 1000 steps, not 2000"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"eps": 0.3}, r"eps=0\.3"),
        ({"head_clip": 0.0}, r"head_clip=0\.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_defaults_are_the_published_settings():
    how = MaskSampler()
    assert how.nfe == 19
    assert replace(how, num_iter=128, head_steps=14, guidance=Guidance(4.0, 0.18, 0.6)).nfe == 181
