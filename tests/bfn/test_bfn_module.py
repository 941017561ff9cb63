"""The LightningModule: data, likelihood, sampling by number, in-painting, training in a Trainer."""

import functools
import math
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

from zoo.base.random import SampleRandom
from zoo.base.samples import SupportsSampling
from zoo.bfn import BFN, SDE1, BFNSampler, ContinuousFlow, DeltaHead, ImageCodec, Network, ResidualMLP
from zoo.bfn.bins import bin_centre


def make(seed=0, width=16, **options):
    torch.manual_seed(seed)
    model = BFN(ResidualMLP(width=width, depth=1), **options)
    torch.nn.init.normal_(model.network.output.weight, std=0.1)
    return model.eval()


def to_images(model, x):
    return model.codec.samples(model.flow.to_levels(x, model.num_levels), 0, None, model.num_levels).images


def images(num=40, seed=0):
    return torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def loader(num=40, batch_size=8):
    return DataLoader(TensorDataset(images(num), torch.zeros(num, dtype=torch.int64)), batch_size=batch_size)


def trainer(folder, **options):
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **{**silent, **options})


# Data


def test_grey_digits_become_sixteen_bins():
    """Levels k/16, k = 0 ... 16, become min(k, 15); the data's last axis is the channel."""
    levels = (torch.arange(64) % 17).view(1, 1, 8, 8)
    x = make().encode([levels / 16])
    assert x.shape == (1, 8, 8, 1)
    assert torch.equal(x[0, ..., 0], bin_centre(levels[0, 0].clamp(max=15), 16))


def test_eight_bit_images_keep_their_levels():
    model = BFN(ResidualMLP(256 * 3, width=8, depth=1), head=DeltaHead(num_bins=256), codec=ImageCodec((3, 16, 16)))
    pixels = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    x = model.encode([pixels / 255])
    assert torch.equal(x, bin_centre(pixels.movedim(1, -1), 256))
    assert torch.equal((to_images(model, x) * 255).round().long(), pixels)


@pytest.mark.parametrize("num_bins", [2, 16, 17, 256])
def test_images_are_the_levels_of_their_bins(num_bins):
    """Black stays black and white stays white: bin k is the level k / (K - 1)."""
    model = make(head=DeltaHead(num_bins=num_bins), codec=ImageCodec((1, 1, num_bins)))
    levels = torch.arange(num_bins).view(1, 1, 1, -1) / (num_bins - 1)
    assert torch.allclose(to_images(model, model.encode([levels])), levels, atol=1e-6)
    assert to_images(model, torch.tensor([[[-1.0], [1.0]]])).flatten().tolist() == [0, 1]


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), but the data has \(3, 8, 8\)"):
        make().encode([torch.rand(2, 3, 8, 8)])


# Likelihood


def test_likelihood_of_an_untrained_model_is_that_of_its_flow(tmp_path: Path):
    """Without a network's help x̂ = mu / gamma: the loss is -½ ln(s^2) E[eps^2 / gamma], up to clipping."""
    model = BFN(ResidualMLP(width=8), head=DeltaHead(clip=1e9))
    x = model.encode([images(1000)])
    t = torch.full((1000,), 0.5)
    noise = SampleRandom(0, torch.arange(1000)).normal("noise", (8, 8, 1))
    value = model.predict_data(x, t, noise).mean()
    gamma = 1 - math.sqrt(1e-3)
    assert torch.allclose(value, x + math.sqrt((1 - gamma) / gamma) * noise, atol=1e-5)


def test_likelihood_does_not_depend_on_the_batches(tmp_path: Path):
    model = make(likelihood_steps=(0, 1, 10), likelihood_repeats=2)
    bounds = [f"test/bits_per_dim/{name}" for name in ("continuous", "n=1", "n=10", "reconstruction")]
    names = {*bounds, *(f"{name}/standard_error" for name in bounds)}
    results = [trainer(tmp_path).test(model, loader(batch_size=size), verbose=False)[0] for size in (40, 16)]
    assert set(results[0]) == names
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert all(math.isfinite(value) for value in results[0].values())


def test_validation_logs_nats_and_bits(tmp_path: Path):
    model = make()
    result = trainer(tmp_path).validate(model, loader(), verbose=False)[0]
    x = model.encode([images()])
    random = SampleRandom(model.random_seed, torch.arange(40), epoch=-1)
    with torch.no_grad():
        loss, reconstruction = model.loss(x, random), model.reconstruction(x, random)
    assert result["val_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert result["val_bits_per_dim"] == pytest.approx((loss + reconstruction).mean().item() / math.log(2), rel=1e-5)


def test_more_messages_tighten_the_bound():
    """The discrete-time loss falls with the number of messages towards the continuous one."""
    model = make().double()
    x = model.encode([images(2000).double()])
    with torch.no_grad():
        losses = [model.loss(x, SampleRandom(0, torch.arange(2000)), n).mean().item() for n in (2, 10, 100, 0)]
    assert losses[0] > losses[1] > losses[2] > 0.95 * losses[3]
    assert losses[2] == pytest.approx(losses[3], rel=0.1)


def test_stratified_times_lower_the_spread_of_the_loss_and_keep_its_mean():
    model = BFN(ResidualMLP(width=8))  # untrained: the loss depends on the time above all
    x = model.encode([images(64)])
    draws = {}
    with torch.no_grad():
        for stratified in (False, True):
            batches = [SampleRandom(0, torch.arange(i * 64, i * 64 + 64)) for i in range(100)]
            losses = [model.loss(x, random, stratified=stratified, clip=False).mean() for random in batches]
            draws[stratified] = torch.stack(losses)
    assert draws[True].std() < 0.7 * draws[False].std()
    assert draws[True].mean() == pytest.approx(draws[False].mean().item(), abs=4 * draws[False].std().item() / 10)


# Sampling


def test_module_offers_sampling():
    model = make(width=8)
    assert isinstance(model, SupportsSampling)
    assert {"ancestral", "ode2m", "sde2m"} <= set(model.sampler_names)
    for name in model.sampler_names:
        samples = model.sample(torch.arange(3), sampler=name, nfe=4)
        assert samples.images.shape == (3, 1, 8, 8)
        assert samples.nfe == 4
        assert samples.trajectory is None
        assert 0 <= samples.images.min() <= samples.images.max() <= 1


@pytest.mark.parametrize("sampler", ["ode2m", "sde1", "ancestral"])
def test_sample_is_the_same_picture_in_any_batch(sampler):
    model = make()
    together = model.sample(torch.arange(10), seed=3, sampler=sampler).images
    apart = model.sample(torch.tensor([7, 1]), seed=3, sampler=sampler).images
    assert torch.allclose(together[[7, 1]], apart, atol=1e-5)
    assert not torch.allclose(together, model.sample(torch.arange(10), seed=4, sampler=sampler).images, atol=1e-2)


def test_own_solver_is_the_default_and_its_options_carry_over():
    model = make(solver=SDE1(nfe=6, eta=0.2))
    index = torch.arange(3)
    assert model.sample(index).nfe == 6
    assert torch.equal(model.sample(index).images, model.sample(index, sampler="sde1", nfe=6).images)
    assert not torch.equal(model.sample(index).images, make(solver=SDE1(nfe=6)).sample(index).images)
    assert make(solver=BFNSampler(nfe=5)).sample(index).nfe == 5


def test_bad_samplers_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"no sampler 'ode2n'\. Did you mean .*ode2m"):
        model.sample(torch.arange(2), sampler="ode2n")
    with pytest.raises(ValueError, match="ODE2M: nfe=0 must be at least 1"):
        model.sample(torch.arange(2), nfe=0)
    with pytest.raises(ValueError, match="at least 2"):
        model.sample(torch.arange(2), sampler="ancestral", nfe=1)


def test_prediction_holds_what_writers_need(tmp_path: Path):
    model = make(record_trajectory=True)
    data = [{"index": torch.arange(4)}, {"index": torch.arange(4, 6)}]
    batches = trainer(tmp_path).predict(model, DataLoader(data, batch_size=None))
    assert [set(batch) for batch in batches] == [{"index", "images", "trajectory"}] * 2
    assert batches[1]["trajectory"].shape == (2, 10, 1, 8, 8)
    assert torch.equal(batches[0]["trajectory"][:, -1], batches[0]["images"])
    assert torch.equal(batches[0]["images"], model.sample(torch.arange(4)).images)


def test_in_painting_returns_known_pixels_as_they_are(tmp_path: Path):
    model = make()
    picture, mask = images(3), torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    batch = {"index": torch.arange(3), "image": picture, "mask": mask, "path": ["a", "b", "c"]}
    (result,) = trainer(tmp_path).predict(model, DataLoader([batch], batch_size=None))
    assert result["path"] == ["a", "b", "c"]
    assert torch.equal(result["images"][..., :4], picture[..., :4])
    assert not torch.allclose(result["images"][..., 4:], picture[..., 4:], atol=1e-2)
    free = model.sample(torch.arange(3)).images
    assert not torch.allclose(result["images"][..., 4:], free[..., 4:], atol=1e-3)  # the known half is seen


# Training


def test_training_learns_what_can_be_known(tmp_path: Path):
    """One picture only: its likelihood approaches certainty, and all samples become it."""
    torch.manual_seed(0)
    picture = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    data = DataLoader(TensorDataset(picture.expand(256, -1, -1, -1), torch.zeros(256)), batch_size=64)
    model = BFN(
        ResidualMLP(width=64, depth=2, passes=1),
        stratified_time=True,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
    )
    before = trainer(tmp_path).validate(model, data, verbose=False)[0]["val_loss"]
    trainer(tmp_path, max_steps=300).fit(model, data)
    after = trainer(tmp_path).validate(model, data, verbose=False)[0]["val_loss"]
    assert after < before / 3
    assert (model.sample(torch.arange(20)).images - picture).abs().mean() < 0.08


class Scaled(Network):
    """A user's network."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, mu, t):
        return (self.gain * mu)[..., None]


@pytest.mark.parametrize("network", [ResidualMLP(width=8), Scaled(0.25)])
def test_shared_folder_gives_the_same_samples(tmp_path: Path, network):
    model = BFN(network, flow=ContinuousFlow(1e-2), solver=SDE1(nfe=3))
    again = BFN.from_pretrained(model.save_pretrained(tmp_path))
    assert torch.equal(model.sample(torch.arange(2)).images, again.sample(torch.arange(2)).images)
    assert again.solver.init_config == model.solver.init_config


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path: Path, precision):
    model = make()
    run = trainer(tmp_path, precision=precision, max_steps=3)
    run.fit(model, loader())
    assert math.isfinite(run.callback_metrics["train_loss"])
    (result,) = trainer(tmp_path, precision=precision).predict(model, DataLoader([{"index": torch.arange(3)}], batch_size=None))
    assert result["images"].isfinite().all()


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="likelihood_steps"):
        make(likelihood_steps=(-1,))
    with pytest.raises(ValueError, match="likelihood_repeats=0"):
        make(likelihood_repeats=0)
    with pytest.raises(ValueError, match="min_loss_variance=2"):
        make(min_loss_variance=2.0)


def test_clamped_weight_lowers_the_training_loss_and_leaves_the_bound_alone():
    plain, clamped = make(), make(min_loss_variance=0.5)
    clamped.load_state_dict(plain.state_dict())
    x, random = plain.encode((torch.rand(64, 1, 8, 8), None)), SampleRandom(0, torch.arange(64))
    assert torch.equal(clamped.loss(x, random), plain.loss(x, random))
    assert (clamped.loss(x, random, min_variance=0.5) <= plain.loss(x, random)).all()
    batch = (torch.rand(64, 1, 8, 8), torch.zeros(64))
    losses = []
    for module in (plain, clamped):
        module.log = lambda *args, **options: None
        losses.append(module.training_step(batch, 0).item())
    assert losses[1] < losses[0]


def test_draws_of_two_thousand_samples_are_all_different():
    drawn = make().sample(torch.arange(200)).images
    assert len(drawn.flatten(1).unique(dim=0)) == 200
