"""What users of the module meet beside the straight road: half precision, dropout, own noise, masks, files of moments."""

import math
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from sweep import sweep
from torch.utils.data import DataLoader, TensorDataset

from datamodules import Digits
from zoo.base.random import SampleRandom
from zoo.bfn import (
    BFN,
    ODE2M,
    SDE1,
    BernoulliHead,
    BFNTransformer,
    CategoricalHead,
    ContinuousFlow,
    DataStatistics,
    DataStatisticsWriter,
    DeltaHead,
    DiscreteFlow,
    ImageCodec,
    Network,
    ResidualMLP,
    TextCodec,
)
from zoo.bfn.bins import truncated_normal
from zoo.bfn.heads.categorical import Categorical
from zoo.bfn.heads.discretized_normal import DiscretizedNormal
from zoo.bfn.losses import discrete_time_loss
from zoo.metrics.mean_and_error import Mean, MeanAndError


def trainer(folder: Path, **options) -> Trainer:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **{**silent, **options})


def eight_bit(num: int) -> DataLoader:
    images = torch.randint(256, (num, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    return DataLoader(TensorDataset(images, torch.zeros(num, dtype=torch.int64)), batch_size=8)


def texts(length: int, dropout: float = 0.0) -> BFN:
    torch.manual_seed(0)
    network = BFNTransformer(seq_len=length, width=16, depth=1, num_heads=2, dropout=dropout)
    return BFN(network, flow=DiscreteFlow(27), head=CategoricalHead(), codec=TextCodec(length)).eval()


def black_and_white(**options) -> BFN:
    codec = ImageCodec((1, 4, 4), dynamic_binarization=True)
    return BFN(ResidualMLP(16, width=8, depth=1), flow=DiscreteFlow(2, 3.0), head=BernoulliHead(), codec=codec, **options)


# Half and double precision


@pytest.mark.parametrize("precision", sweep(["bf16-true", "bf16-mixed", "64-true"]))
def test_scores_do_not_depend_on_the_precision_of_the_weights(tmp_path, precision):
    """An untrained network says exactly 0 in any float type, so the data and the arithmetic around it must agree."""

    def scores(precision: str) -> dict[str, float]:
        model = BFN(ResidualMLP(width=8, depth=1), head=DeltaHead(num_bins=256), likelihood_steps=(0, 10))
        run = trainer(tmp_path, precision=precision)
        return run.validate(model, eight_bit(400), verbose=False)[0] | run.test(model, eight_bit(400), verbose=False)[0]

    expected, found = scores("32-true"), scores(precision)
    for name, value in expected.items():
        # Other float types draw the same noise with more digits.
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_batches_are_converted_again_for_the_next_model(tmp_path):
    run = trainer(tmp_path, precision="bf16-true")
    run.validate(BFN(ResidualMLP(width=8, depth=1)), eight_bit(8), verbose=False)
    assert run.precision_plugin.convert_input(torch.zeros(1)).dtype == torch.bfloat16


@pytest.mark.parametrize("metric", [Mean, MeanAndError])
def test_means_count_beyond_what_bfloat16_resolves(metric):
    holder = torch.nn.ModuleDict({"metric": metric()}).to(torch.bfloat16)
    values = torch.arange(3000, dtype=torch.float64)
    for part in values.split(7):
        holder["metric"].update(part)
    found = holder["metric"].compute()
    assert float(found if metric is Mean else found[0]) == values.mean().item()
    holder["metric"].reset()
    holder["metric"].update(values[:3])
    assert holder["metric"].count.dtype == torch.float64 and holder["metric"].count.item() == 3


class OwnNetwork(Network):
    """A user's network that casts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, mu, t):
        return self.linear(mu[..., None])


def test_networks_of_double_precision_are_sampled_in_it(tmp_path):
    batches = DataLoader([{"index": torch.arange(3)}], batch_size=None)
    (result,) = trainer(tmp_path, precision="64-true").predict(BFN(OwnNetwork()), batches)
    assert result["images"].dtype == torch.float64


def test_float32_bounds_of_many_messages_are_those_of_float64():
    location, std, x = torch.full((64, 8), 0.3), torch.full((64, 8), 0.05), torch.full((64, 8), 170.5 / 128 - 1)
    step, random = torch.full((64,), 2), SampleRandom(0, torch.arange(64))
    bounds = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            prediction = DiscretizedNormal(location.to(dtype), std.to(dtype), 256)
            bounds.append(discrete_time_loss(ContinuousFlow(1e-3), prediction, x.to(dtype), step, 10_000, random).mean().item())
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-3)


# Sampling


def test_dropout_is_off_while_samples_are_drawn_and_on_afterwards():
    model = texts(6, dropout=0.5).train()
    model.network.transformer["ln_f"].eval()  # a part that the user froze
    first, again = (model.sample(torch.arange(4), nfe=3).texts for _ in range(2))
    assert first == again
    assert model.network.training and not model.network.transformer["ln_f"].training


@pytest.mark.parametrize(("length", "batch"), [(27, 1), (27, 27), (2, 1), (6, 6)])
def test_text_is_filled_in_whatever_its_length_and_the_batch(length, batch):
    model, ids = texts(length), torch.arange(batch * length).view(batch, length) % 27
    known = torch.arange(length) % 2 == 0
    filled = model.in_paint({"index": torch.arange(batch), "input_ids": ids, "known": known.expand(batch, -1)}, nfe=3)
    for text, row in zip(filled.texts, ids, strict=True):
        assert [" abcdefghijklmnopqrstuvwxyz".index(c) for c in text[::2]] == row[::2].tolist()


@pytest.mark.parametrize("solver", ["ancestral", "ode2m", "sde2m", "ode2s", "sde_euler"])
def test_observer_sees_every_call(solver):
    model, seen = BFN(ResidualMLP(width=8, depth=1)).eval(), []
    model.sample(torch.arange(2), sampler=solver, nfe=6, observer=lambda *call: seen.append(call[:2]))
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6]
    times = [time for _, time in seen]
    assert times == sorted(times)


def test_noise_of_the_caller_and_guides_reach_the_solver():
    model, asked = BFN(ResidualMLP(width=8, depth=1)).eval(), []

    def silence(number: int, start: float, end: float) -> torch.Tensor:
        asked.append(number)
        return torch.zeros(2, 8, 8, 1)

    images = model.sample(torch.arange(2), sampler="sde1", nfe=4, noise=silence).images
    assert asked == [0, 1, 2, 3]
    assert torch.equal(images[0], images[1])


# What does not fit


class ChannelsFirst(Network):
    def forward(self, mu, t):
        return mu.movedim(-1, 1)[..., None] * 0


def test_outputs_with_moved_axes_are_refused():
    model = BFN(ChannelsFirst(), codec=ImageCodec((3, 8, 8)))
    with pytest.raises(ValueError, match=r"output is \(1, 3, 8, 8, 1\), but must be \(1, 8, 8, 3, 1\)"):
        model.sample(torch.arange(1), nfe=2)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 8, 8, dtype=torch.bool), torch.ones(2, 1, 8, 8)])
def test_in_painting_says_which_mask_it_needs(mask):
    batch = {"index": torch.arange(2), "image": torch.zeros(2, 1, 8, 8)} | ({} if mask is None else {"mask": mask})
    with pytest.raises(ValueError, match=r'"mask" beside "image", bool \(2, 1, 8, 8\)'):
        BFN(ResidualMLP(width=8)).in_paint(batch)
    with pytest.raises(ValueError, match='"known" beside "input_ids"'):
        texts(3).in_paint({"index": torch.arange(2), "input_ids": torch.zeros(2, 3, dtype=torch.int64)})


def test_unknown_pixels_may_hold_anything():
    image, mask = torch.full((1, 1, 8, 8), torch.nan), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    image[..., :4], mask[..., :4] = 0.5, True
    filled = BFN(ResidualMLP(width=8)).in_paint({"index": torch.arange(1), "image": image, "mask": mask})
    assert filled.images.isfinite().all()


def test_impossible_losses_are_refused():
    for options in ({"loss_steps": -1}, {"loss_steps": 5, "stratified_time": True}, {"loss_steps": 5, "min_loss_variance": 0.1}):
        with pytest.raises(ValueError, match="loss_steps"):
            BFN(ResidualMLP(width=8), **options)
    with pytest.raises(ValueError, match="at least one"):
        BFN(ResidualMLP(width=8), likelihood_steps=())


# Losses


def test_training_loss_of_finitely_many_messages():
    model = BFN(ResidualMLP(width=8), loss_steps=7)
    model.log = lambda *args, **options: None
    batch = (torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(16))
    random = model.train_random(16)
    assert model.training_step(batch, 0) == model.loss(model.encode(batch, random), random, 7).mean()


def test_clipping_in_the_training_loss_does_not_change_likelihoods():
    plain, unclipped = BFN(ResidualMLP(width=8)), BFN(ResidualMLP(width=8), clip_in_loss=False)
    x, random = plain.encode((torch.rand(64, 1, 8, 8), None)), SampleRandom(0, torch.arange(64))
    assert torch.equal(plain.loss(x, random), unclipped.loss(x, random))
    assert (unclipped.loss(x, random, clip=False) > plain.loss(x, random)).any()


def test_marginal_receiver_charges_confident_errors_in_full():
    """Each of two classes' coordinates is a mixture; its far component is not lost to rounding."""
    x, alpha = torch.ones(1, 1, dtype=torch.int64), torch.tensor([50.0])
    costs = [
        Categorical(torch.tensor([[[0.0, -40.0]]], dtype=dtype), "marginal", 64)
        .message_kl(x, alpha.to(dtype), SampleRandom(0, torch.arange(1)))
        .item()
        for dtype in (torch.float32, torch.float64)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)
    assert costs[0] > 76  # where 1 - p was rounded to 0 or held at a float's resolution, it was 55 and 75


def test_truncated_draws_stay_beside_a_far_mean():
    mean, std = torch.tensor([0.9, -0.9]), torch.tensor([1e-3, 1e-3])
    assert torch.allclose(truncated_normal(mean, std, torch.zeros(2)), mean, atol=0.02)


# The optimal start


def test_moments_do_not_depend_on_the_batches_and_draw_each_image_anew():
    images, labels = torch.full((2000, 1, 4, 4), 0.5), torch.zeros(2000)
    moments = [
        black_and_white().data_statistics(zip(images.split(size), labels.split(size), strict=True)) for size in (10, 500, 2000)
    ]
    for other in moments[1:]:
        assert torch.allclose(other.mean, moments[0].mean, atol=1e-12)
    assert moments[0].mean.std() < 2 * 0.5 / math.sqrt(2000)


def test_run_writes_the_moments_and_samples_from_them(tmp_path):
    path = tmp_path / "moments.pt"
    model = BFN(ResidualMLP(width=8, depth=1), solver=ODE2M(nfe=2, start="optimal", statistics=path))
    data = Digits(batch_size=64, predict_samples=4)
    before = torch.get_rng_state()
    run = trainer(tmp_path, callbacks=[DataStatisticsWriter(path)])
    (result,) = run.predict(model, datamodule=data)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(data.train_dataloader().dataset) % data.batch_size
    x = model.encode([data.splits.train[0] / 16]).double()  # all, though training leaves out an incomplete last batch
    moments = DataStatistics.load(path)
    assert torch.allclose(moments.mean.double(), x.mean(0), atol=1e-6)
    assert torch.allclose(moments.std.double(), x.std(0, correction=0), atol=1e-6)
    assert result["images"].shape == (4, 1, 8, 8)


def test_missing_or_foreign_moments_are_refused_before_the_first_step(tmp_path):
    model = BFN(ResidualMLP(width=8, depth=1), solver=SDE1(start="optimal", statistics=tmp_path / "none.pt"))
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        trainer(tmp_path, max_steps=1).fit(model, eight_bit(8))
    DataStatistics(torch.zeros(4, 4, 1), torch.ones(4, 4, 1)).save(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"shape \(4, 4, 1\), but the model's data has \(8, 8, 1\)"):
        trainer(tmp_path, max_steps=1).fit(model, eight_bit(8))
