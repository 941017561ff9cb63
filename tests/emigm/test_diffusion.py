"""The head's diffusion process: tables, respacing, the two terms of the loss, DDPM sampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.emigm.diffusion import Diffusion, cosine_betas


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps(*values):
    return torch.tensor(values)


def abar(u):
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


# Tables


def test_betas_multiply_to_the_cosine():
    kept = (1 - cosine_betas()).cumprod(0)[:-1]
    expected = torch.tensor([abar((i + 1) / 1000) / abar(0) for i in range(999)], dtype=torch.float64)
    torch.testing.assert_close(kept, expected, rtol=1e-9, atol=0)


def test_largest_beta_is_reached_at_the_last_step_only():
    betas = cosine_betas()
    assert (betas == 0.999).nonzero().flatten().tolist() == [999]
    assert (betas.diff() > 0).all()


def test_noising_keeps_unit_variance():
    data, noise = (Diffusion.cosine().table(name, torch.arange(1000), torch.float64) for name in ("data", "noise"))
    torch.testing.assert_close(data**2 + noise**2, torch.ones(1000, 1, dtype=torch.float64))


def test_posterior_is_that_of_two_gaussians():
    """q(x_{t-1} | x_t, x_0) is the product of N(x_t; sqrt(1-beta) x_{t-1}, beta) and N(x_{t-1}; sqrt(abar) x_0, 1 - abar)."""
    process = Diffusion.cosine()
    x0, noise = normal(3, 2), normal(3, 2, seed=1)
    for t in (1, 2, 500, 998):
        step = torch.full((3,), t)
        beta, before = process.betas[t], process.abar[t - 1]
        x_t = process.noised(x0, step, noise)
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = ((1 - beta).sqrt() / beta * x_t + before.sqrt() / (1 - before) * x0) / precision
        ours, log_variance = process.posterior(x_t, noise, torch.full((3, 2), -1.0, dtype=torch.float64), step)
        torch.testing.assert_close(ours, mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(log_variance.exp(), (1 / precision).expand(3, 2), rtol=1e-8, atol=0)


def test_variance_output_interpolates_logarithms():
    """v = 1: beta; v = -1: the posterior's variance, that of step 0 replaced by that of step 1."""
    process = Diffusion.cosine()
    step, x = steps(0, 1, 700), normal(3, 1)
    least = process.betas * (1 - process.abar.roll(1)) / (1 - process.abar)
    low, high = torch.stack([least[1], least[1], least[700]]).log(), process.betas[step].log()
    for v in (-1.0, 0.0, 0.5, 1.0):
        _, log_variance = process.posterior(x, x, torch.full((3, 1), v, dtype=torch.float64), step)
        torch.testing.assert_close(log_variance[:, 0], (v + 1) / 2 * high + (1 - v) / 2 * low, rtol=1e-10, atol=1e-10)


# Respacing


def test_a_thousand_steps_are_the_base_process():
    base, respaced = Diffusion.cosine(), Diffusion.cosine().respaced(1000)
    assert torch.equal(respaced.times, base.times)
    torch.testing.assert_close(respaced.betas, base.betas, rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(num_steps=st.integers(2, 1000))
def test_respacing_keeps_both_ends_and_the_marginals(num_steps):
    base, respaced = Diffusion.cosine(), Diffusion.cosine().respaced(num_steps)
    assert respaced.num_steps == num_steps
    assert respaced.times[0] == 0
    assert respaced.times[-1] == 999
    assert (respaced.times.diff() >= 1).all()
    torch.testing.assert_close(respaced.abar, base.abar[respaced.times.long()], rtol=1e-8, atol=1e-15)


def test_steps_of_the_published_hundred():
    """round(i 999/99): 0, 10, 20, 30, 40, 50, 61 ..., 999."""
    times = Diffusion.cosine().respaced(100).times.tolist()
    assert times[:7] == [0, 10, 20, 30, 40, 50, 61]
    assert times[-2:] == [989, 999]


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"1 to 1000 steps, not {num_steps}"):
        Diffusion.cosine().respaced(num_steps)


# Losses


def test_a_perfect_estimate_costs_nothing():
    """With the true noise and v = -1 both means and variances are those of the posterior."""
    noise, x = normal(4, 3), normal(4, 3, seed=1)
    output = torch.cat([noise, torch.full((4, 3), -1.0, dtype=torch.float64)], dim=1)
    mse, vb = Diffusion.cosine().losses(output, x, steps(1, 10, 500, 998), noise)
    torch.testing.assert_close(mse, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(vb, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_bound_is_the_divergence_of_two_gaussians_in_bits():
    process, t = Diffusion.cosine(), 400
    step, x, noise = torch.full((5,), t), normal(5, 3), normal(5, 3, seed=1)
    output = torch.cat([normal(5, 3, seed=2), normal(5, 3, seed=3).tanh()], dim=1)
    estimate, v = output.chunk(2, dim=1)
    x_t = process.noised(x, step, noise)
    mean, log_variance = process.posterior(x_t, estimate, v, step)
    true_mean, true_log = process.posterior(x_t, noise, -torch.ones_like(v), step)  # the true noise gives the true mean
    p = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    q = torch.distributions.Normal(true_mean, (0.5 * true_log).exp())
    expected = torch.distributions.kl_divergence(q, p).mean(1) / math.log(2)
    mse, vb = process.losses(output, x, step, noise)
    torch.testing.assert_close(vb, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(mse, (noise - estimate).square().mean(1))


def test_variance_term_moves_the_variance_only_and_the_squared_error_the_noise_only():
    output = normal(6, 8).requires_grad_()
    mse, vb = Diffusion.cosine().losses(output, normal(6, 4, seed=1), steps(0, 0, 1, 50, 500, 999), normal(6, 4, seed=2))
    (of_vb,) = torch.autograd.grad(vb.sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(mse.sum(), output)
    assert (of_vb[:, :4] == 0).all()
    assert (of_vb[:, 4:] != 0).all()
    assert (of_mse[:, 4:] == 0).all()
    assert (of_mse[:, :4] != 0).all()


def cdf(z):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


@pytest.mark.parametrize("value", [-2.0, -0.9991, -0.9989, 0.0, 0.3, 0.9989, 0.9991, 2.0])
def test_first_step_is_the_likelihood_of_a_bin(value):
    """-log2 of the bin of half width 1/255; beyond +-0.999, where latents do lie, of the open end."""
    process = Diffusion.cosine()
    x, noise = torch.full((1, 1), value, dtype=torch.float64), normal(1, 1)
    estimate, v = noise + 0.1, 0.2  # close to the truth, so that no probability vanishes
    output = torch.cat([estimate, torch.full((1, 1), v, dtype=torch.float64)], dim=1)
    mean, log_variance = process.posterior(process.noised(x, steps(0), noise), estimate, output[:, 1:], steps(0))
    mean, deviation = mean.item(), math.exp(0.5 * log_variance.item())
    upper, lower = cdf((value - mean + 1 / 255) / deviation), cdf((value - mean - 1 / 255) / deviation)
    mass = upper if value < -0.999 else 1 - lower if value > 0.999 else upper - lower
    _, vb = process.losses(output, x, steps(0), noise)
    assert vb.item() == pytest.approx(-math.log2(max(mass, 1e-12)), rel=1e-9)


def test_bins_of_the_first_step_share_all_of_the_probability():
    """Levels 2k/255 - 1 between the open ends: what the discretised likelihood gives them adds up to 1."""
    from zoo.emigm.diffusion import _discretised_log_likelihood

    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.1, -2.0), (-0.97, -3.0), (0.5, 0.0)):
        masses = _discretised_log_likelihood(levels, torch.tensor(mean).double(), torch.tensor(log_scale).double()).exp()
        assert masses.sum().item() == pytest.approx(1, abs=1e-6)


def test_a_hopeless_first_step_costs_forty_bits_and_no_more():
    x, noise = torch.full((1, 1), 0.5, dtype=torch.float64), normal(1, 1)
    output = torch.tensor([[noise.item() + 1e6, -1.0]], dtype=torch.float64)
    _, vb = Diffusion.cosine().losses(output, x, steps(0), noise)
    assert vb.item() == pytest.approx(-math.log2(1e-12))


# Sampling


def gaussian_network(process, mean, deviation):
    """The exact noise estimate for data N(mean, deviation^2), told the original time."""

    def network(x, time):
        kept = Diffusion.cosine().abar[int(time)]
        variance = kept * deviation**2 + 1 - kept
        return (1 - kept).sqrt() * (x - kept.sqrt() * mean) / variance, torch.full_like(x, -1.0)

    return network


def test_ddpm_calls_the_network_once_per_step_with_the_original_times():
    process, seen = Diffusion.cosine().respaced(7), []

    def network(x, time):
        seen.append(time)
        return torch.zeros_like(x), torch.zeros_like(x)

    process.sample(network, normal(2, 1), lambda i: torch.zeros(2, 1, dtype=torch.float64))
    assert seen == process.times.flip(0).tolist()


def test_ddpm_adds_no_noise_in_its_last_step():
    process, asked = Diffusion.cosine().respaced(10), []

    def noise(i):
        asked.append(i)
        return normal(2, 1, seed=i)

    process.sample(gaussian_network(process, 0.5, 0.3), normal(2, 1), noise)
    assert asked == list(range(9, 0, -1))


def test_temperature_0_is_deterministic_given_the_start():
    process, x = Diffusion.cosine().respaced(20), normal(4, 2)
    network = gaussian_network(process, 0.5, 0.3)
    cold = [process.sample(network, x, lambda i, s=s: normal(4, 2, seed=100 * s + i), temperature=0.0) for s in (1, 2)]
    warm = process.sample(network, x, lambda i: normal(4, 2, seed=100 + i))
    assert torch.equal(*cold)
    assert not torch.allclose(cold[0], warm)


def test_ddpm_draws_a_gaussian_it_knows():
    process = Diffusion.cosine().respaced(250)
    x = process.sample(gaussian_network(process, 0.7, 0.5), normal(4000, 1), lambda i: normal(4000, 1, seed=i + 1))
    assert x.mean().item() == pytest.approx(0.7, abs=0.04)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)


def test_ddpm_finds_a_single_point():
    """All mass at a: the noise estimate says so, and whatever the start and the noise, the last step lands on a."""
    process = Diffusion.cosine().respaced(30)
    x = process.sample(gaussian_network(process, -1.3, 0.0), normal(50, 2), lambda i: normal(50, 2, seed=i))
    torch.testing.assert_close(x, torch.full_like(x, -1.3), rtol=0, atol=1e-9)


def test_clipping_confines_the_data_estimate():
    process = Diffusion.cosine().respaced(5)
    wild = lambda x, time: (torch.full_like(x, 3.0), torch.zeros_like(x))  # noqa: E731
    free, clipped = (process.sample(wild, normal(9, 1), lambda i: normal(9, 1, seed=i), clip=clip) for clip in (None, 1.5))
    assert free.abs().max() > 100  # the first division by sqrt(abar) is by 5e-5
    assert clipped.abs().max() <= 1.5 + 1e-9
