"""The diffusion head: initialisation, gradients of its two terms, repeated draws, guidance, samplers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.emigm.diffusion import Diffusion
from zoo.emigm.head import DiffLossHead, check_head_steps

C, Z, R = 3, 6, 5


def head(seed=0, untrained=False, dtype=torch.float64):
    torch.manual_seed(seed)
    made = DiffLossHead(C, Z, depth=2, width=16)
    if not untrained:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.to(dtype).eval()


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noise(name):
    return normal(R, C, seed=sum(map(ord, name)))


def loss_inputs(draws, seed=0):
    step = torch.randint(1000, (R, draws), generator=torch.Generator().manual_seed(seed))
    return normal(R, C, seed=1), normal(R, Z, seed=2), step, normal(R, draws, C, seed=3)


def test_untrained_head_estimates_nothing():
    """Output exactly 0: the squared error of a row is the mean of its noise's squares."""
    made = head(untrained=True)
    target, z, step, eps = loss_inputs(4)
    losses = made.loss(target, z, step, eps)
    assert torch.equal(losses["mse"], eps.square().mean(2))
    assert torch.equal(made.net(target, step[:, 0], made.net.cond_embed(z)), torch.zeros(R, 2 * C, dtype=torch.float64))


def test_untrained_squared_error_is_about_1():
    losses = head(untrained=True).loss(normal(R, C), normal(R, Z), torch.full((R, 2000), 5), normal(R, 2000, C))
    assert losses["mse"].mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("algorithm", ["dpm-solver", "ddpm"])
def test_untrained_head_cannot_be_guided(algorithm):
    made, z, without = head(untrained=True), normal(R, Z), normal(R, Z, seed=1)
    options = {"algorithm": algorithm, "steps": 5}
    plain = made.sample(z, noise, **options)
    assert torch.equal(made.sample(z, noise, z_uncond=without, scale=7.0, **options), plain)


def test_untrained_variance_is_the_geometric_mean_of_its_bounds():
    """v = 0: half of each logarithm."""
    process, x = Diffusion.cosine(), normal(R, C)
    step = torch.tensor([0, 1, 10, 500, 999])
    _, log_variance = process.posterior(x, x, torch.zeros_like(x), step)
    low, high = (process.table(name, step, torch.float64) for name in ("log_variance", "log_beta"))
    torch.testing.assert_close(log_variance, ((low + high) / 2).expand(R, C))


# Loss


def test_loss_is_the_sum_of_its_terms():
    losses = head().loss(*loss_inputs(3))
    assert losses["loss"].shape == (R, 3)
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])


def test_variance_term_reaches_the_variance_half_of_the_last_layer_only():
    made = head()
    losses = made.loss(*loss_inputs(2))
    weight = made.net.final_layer.linear.weight
    (of_vb,) = torch.autograd.grad(losses["vb"].sum(), weight, retain_graph=True)
    (of_mse,) = torch.autograd.grad(losses["mse"].sum(), weight)
    assert (of_vb[:C] == 0).all()
    assert of_vb[C:].abs().sum() > 0
    assert (of_mse[C:] == 0).all()
    assert of_mse[:C].abs().sum() > 0


@settings(max_examples=15)
@given(draws=st.integers(1, 6), seed=st.integers(0, 50))
def test_several_draws_are_as_many_evaluations(draws, seed):
    made = head()
    target, z, step, eps = loss_inputs(draws, seed)
    together = made.loss(target, z, step, eps)
    for i in range(draws):
        alone = made.loss(target, z, step[:, i : i + 1], eps[:, i : i + 1])
        for name in together:
            torch.testing.assert_close(together[name][:, i : i + 1], alone[name], rtol=1e-9, atol=1e-12)


def test_gradient_of_several_draws_is_their_mean():
    made = head()
    target, z, step, eps = loss_inputs(4)
    parameters = list(made.parameters())
    whole = torch.autograd.grad(made.loss(target, z, step, eps)["loss"].mean(), parameters)
    parts = [
        torch.autograd.grad(made.loss(target, z, step[:, i : i + 1], eps[:, i : i + 1])["loss"].mean(), parameters)
        for i in range(4)
    ]
    for gradient, several in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(gradient, torch.stack(several).mean(0), rtol=1e-8, atol=1e-10)


def test_rows_do_not_see_each_other():
    made = head()
    target, z, step, eps = loss_inputs(2)
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = made.loss(target, z, step, eps)["loss"]
    torch.testing.assert_close(made.loss(target[order], z[order], step[order], eps[order])["loss"], whole[order])


def test_a_step_in_the_middle_of_training_depends_on_condition_and_time():
    made, (target, z, step, eps) = head(), loss_inputs(1)
    plain = made.loss(target, z, step, eps)["loss"]
    assert (made.loss(target, z + 1, step, eps)["loss"] != plain).all()
    assert (made.loss(target, z, (step + 400) % 1000, eps)["loss"] != plain).all()


# Samplers


@pytest.mark.parametrize("algorithm", ["dpm-solver", "ddpm"])
def test_scale_1_and_equal_conditions_are_no_guidance(algorithm):
    made, z, without = head(), normal(R, Z), normal(R, Z, seed=9)
    options = {"algorithm": algorithm, "steps": 6}
    plain = made.sample(z, noise, **options)
    assert torch.equal(made.sample(z, noise, z_uncond=without, scale=1.0, **options), plain)
    torch.testing.assert_close(made.sample(z, noise, z_uncond=z, scale=5.0, **options), plain, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(made.sample(z, noise, z_uncond=without, scale=3.0, **options), plain)


def test_scale_0_draws_without_the_class():
    made, z, without = head(), normal(R, Z), normal(R, Z, seed=9)
    guided = made.sample(z, noise, z_uncond=without, scale=0.0)
    torch.testing.assert_close(guided, made.sample(without, noise), rtol=1e-9, atol=1e-9)


@settings(max_examples=10)
@given(scale=st.floats(0, 8))
def test_guided_estimate_is_linear_in_the_scale(scale):
    """One call of the solver maps the noise estimate linearly: so does the sample depend on the scale."""
    made, z, without = head(), normal(R, Z), normal(R, Z, seed=9)
    at = [made.sample(z, noise, z_uncond=without, scale=s, steps=1) for s in (0.0, 1.0, scale)]
    torch.testing.assert_close(at[2], at[0] + scale * (at[1] - at[0]), rtol=1e-8, atol=1e-8)


def test_variance_of_the_guided_ddpm_is_that_under_the_class():
    """Where both conditions estimate the same noise but not the same variance, guidance changes nothing."""
    made = head()
    made.net.final_layer.linear.weight.data[:C] = 0  # the noise estimate is the bias
    z, without = normal(R, Z), normal(R, Z, seed=9)
    options = {"algorithm": "ddpm", "steps": 4}
    plain = made.sample(z, noise, **options)
    torch.testing.assert_close(made.sample(z, noise, z_uncond=without, scale=4.0, **options), plain, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(made.sample(without, noise, **options), plain)


def test_temperature_matters_to_ddpm_only():
    made, z = head(), normal(R, Z)
    for algorithm, equal in (("dpm-solver", True), ("ddpm", False)):
        warm, cold = (made.sample(z, noise, algorithm=algorithm, steps=4, temperature=t) for t in (1.0, 0.5))
        assert torch.equal(warm, cold) is equal


@pytest.mark.parametrize(("algorithm", "steps"), [("dpm-solver", 8), ("dpm-solver", 14), ("ddpm", 10)])
@pytest.mark.parametrize("guided", [False, True])
def test_one_call_per_step(algorithm, steps, guided):
    """Guidance doubles the rows, not the calls."""
    made, rows = head(), []
    made.net.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    options = {"z_uncond": normal(R, Z, seed=1), "scale": 2.0} if guided else {}
    made.sample(normal(R, Z), noise, algorithm=algorithm, steps=steps, **options)
    assert rows == [2 * R if guided else R] * steps


@pytest.mark.parametrize("algorithm", ["dpm-solver", "ddpm"])
def test_a_token_does_not_depend_on_the_others(algorithm):
    made, z = head(), normal(R, Z)
    together = made.sample(z, noise, algorithm=algorithm, steps=6)
    alone = made.sample(z[2:3], lambda name: noise(name)[2:3], algorithm=algorithm, steps=6)
    torch.testing.assert_close(together[2:3], alone)


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_not_reach_the_head(dtype):
    made = head(dtype=dtype)
    target, z, step, eps = loss_inputs(2)
    plain, sample = made.loss(target, z, step, eps)["loss"], made.sample(z, noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.loss(target, z, step, eps)["loss"], plain)
        assert torch.equal(made.sample(z, noise), sample)
    assert plain.dtype == sample.dtype == dtype


@pytest.mark.parametrize(
    ("algorithm", "steps", "message"),
    [("euler", 8, "no sampler 'euler'; it has dpm-solver, ddpm"), ("dpm-solver", 0, "at least 1"), ("ddpm", 1001, "1 to 1000")],
)
def test_bad_samplers_are_refused(algorithm, steps, message):
    with pytest.raises(ValueError, match=message):
        check_head_steps(algorithm, steps)


@pytest.mark.parametrize("name", ["token_channels", "condition_channels", "depth", "width"])
def test_sizes_below_1_are_refused(name):
    sizes = {"token_channels": 1, "condition_channels": 1, "depth": 1, "width": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        DiffLossHead(**sizes)
