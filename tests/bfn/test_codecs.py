"""Codecs: batches become levels, levels become images or text; nothing is lost between, and misfits are refused."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from zoo.base.random import SampleRandom
from zoo.base.samples import Samples, TextSamples, as_sampled
from zoo.bfn import (
    BFN,
    SDE1,
    BFNTransformer,
    CategoricalHead,
    ContinuousFlow,
    DeltaHead,
    DiscreteFlow,
    ImageCodec,
    ResidualMLP,
    TextCodec,
)

ALPHABET = " abcdefghijklmnopqrstuvwxyz"


def four_levels(**options):
    torch.manual_seed(0)
    model = BFN(
        ResidualMLP(num_inputs=4, num_outputs=4, width=16, depth=1),
        flow=DiscreteFlow(4, 1.5),
        head=CategoricalHead(),
        codec=ImageCodec((1, 8, 8)),
        **options,
    )
    torch.nn.init.normal_(model.network.output.weight, std=0.1)
    return model.eval()


def text_model(length=12, **options):
    torch.manual_seed(0)
    network = BFNTransformer(seq_len=length, width=16, depth=1, num_heads=2)
    torch.nn.init.normal_(network.lm_head.weight, std=0.3)
    return BFN(network, flow=DiscreteFlow(27, 0.75), head=CategoricalHead(), codec=TextCodec(length), **options).eval()


def ids(*texts):
    return torch.tensor([[ALPHABET.index(character) for character in text] for text in texts])


def trainer(folder, **options):
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **{**silent, **options})


# Levels


@settings(max_examples=25, deadline=None)
@given(num_levels=st.integers(2, 256), seed=st.integers(0, 1000))
def test_levels_survive_both_kinds_of_data(num_levels, seed):
    """Levels -> data -> levels is the identity, exactly for classes and to rounding for bin centres."""
    levels = torch.randint(num_levels, (3, 4), generator=torch.Generator().manual_seed(seed))
    for flow in (ContinuousFlow(1e-3), DiscreteFlow(num_levels)):
        data = flow.from_levels(levels, num_levels, torch.float64)
        assert torch.equal(flow.to_levels(data, num_levels).round().long(), levels)
        assert (flow.to_levels(data, num_levels) - levels).abs().max() < 1e-12


def test_grey_levels_become_classes_of_equal_width():
    model = four_levels()
    pixels = torch.tensor([0.0, 0.2, 0.25, 0.49, 0.5, 0.74, 0.75, 1.0]).repeat(8).view(1, 1, 8, 8)
    assert model.encode([pixels])[0, 0, :, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    shown = model.codec.samples(torch.arange(4).repeat(16).view(1, 8, 8, 1), 1, None, 4).images
    assert shown[0, 0, 0, :4].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_dynamic_binarisation_draws_each_pixel_with_its_own_probability():
    codec = ImageCodec((1, 1, 3), dynamic_binarization=True)
    images = torch.tensor([0.0, 0.3, 1.0]).expand(4000, 1, 1, 3)
    drawn = [codec.encode([images], 2, SampleRandom(0, torch.arange(4000), epoch=epoch)) for epoch in (0, 1)]
    assert drawn[0].shape == (4000, 1, 3, 1)
    assert drawn[0].float().mean((0, 1, 3)).tolist() == pytest.approx([0, 0.3, 1], abs=0.03)
    assert not torch.equal(drawn[0], drawn[1])  # anew in each epoch
    again = codec.encode([images], 2, SampleRandom(0, torch.arange(4000)))
    assert torch.equal(drawn[0], again)


def test_real_images_are_compared_at_the_levels_of_samples():
    model = four_levels()
    images = torch.randint(256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shown = as_sampled(model, images)
    assert set(shown.unique().tolist()) <= {0, 85, 170, 255}
    assert (shown.float() - images.float()).abs().max() <= 64
    assert torch.equal(as_sampled(object(), images), images)


def test_text_becomes_ids_and_back():
    codec = TextCodec(5)
    batch = {"input_ids": ids("to be", "or no")}
    assert codec.samples(codec.encode(batch, 27, None), 3, None, 27) == TextSamples(["to be", "or no"], 3)


# Models of discrete data


@pytest.mark.parametrize("sampler", ["ancestral", "sde1", "sde2m", "ode1", "ode2m", "sde_euler", "ode_euler"])
def test_discrete_images_are_sampled_by_every_method(sampler):
    model = four_levels(record_trajectory=True)
    samples = model.sample(torch.arange(6), sampler=sampler, nfe=5, record=True)
    assert isinstance(samples, Samples)
    assert samples.images.shape == (6, 1, 8, 8)
    assert samples.trajectory.shape == (6, 5, 1, 8, 8)
    assert {round(3 * value, 4) for value in samples.images.unique().tolist()} <= {0, 1, 2, 3}
    apart = model.sample(torch.tensor([4, 2]), sampler=sampler, nfe=5)
    assert torch.equal(apart.images, samples.images[[4, 2]])


def test_text_is_sampled_by_number():
    model = text_model(solver=SDE1(nfe=6, last_drop=False))  # an untrained network tells samples apart by their noise only
    together = model.sample(torch.arange(4), record=True)
    assert isinstance(together, TextSamples)
    assert [len(text) for text in together.texts] == [12] * 4
    assert len(set(together.texts)) == 4
    assert model.sample(torch.tensor([2])).texts == [together.texts[2]]
    assert [way[-1] for way in together.trajectory] == together.texts
    assert {len(way) for way in together.trajectory} == {7}


@pytest.mark.parametrize("sampler", ["ancestral", "sde2m", "ode2m"])
def test_known_characters_stay(sampler, tmp_path):
    model = text_model()
    given_ids = ids("hello world ", "hello worlds")
    known = torch.zeros(2, 12, dtype=torch.bool)
    known[:, :5] = True
    batch = {"index": torch.arange(2), "input_ids": given_ids, "known": known}
    filled = model.in_paint(batch, sampler=sampler, nfe=8).texts
    assert [text[:5] for text in filled] == ["hello", "hello"]
    (result,) = trainer(tmp_path).predict(model, DataLoader([batch], batch_size=None))
    assert [text[:5] for text in result["text"]] == ["hello", "hello"]


def test_likelihood_of_classes_is_bounded_and_carries_its_error(tmp_path):
    """An untrained model with uniform output costs ln K of reconstruction, and beta (K - 1) / 2 of messages."""
    network = BFNTransformer(seq_len=12, width=16, depth=1, num_heads=2)
    torch.nn.init.zeros_(network.lm_head.weight)
    model = BFN(network, flow=DiscreteFlow(27, 0.75), head=CategoricalHead(), codec=TextCodec(12), likelihood_repeats=50)
    data = [{"input_ids": ids("hello world ", "to be or not")}] * 3
    result = trainer(tmp_path).test(model, DataLoader(data, batch_size=None), verbose=False)[0]
    expected = (math.log(27) + 0.75**2 * 26 / 2) / math.log(2)
    error = result["test/bits_per_char/continuous/standard_error"]
    assert result["test/bits_per_char/continuous"] == pytest.approx(expected, abs=5 * error)
    assert 0 < error < 0.5


def test_training_on_text_learns_it(tmp_path):
    torch.manual_seed(0)
    model = BFN(
        BFNTransformer(seq_len=6, width=32, depth=1, num_heads=2, skip=False),
        flow=DiscreteFlow(27, 1.5),
        head=CategoricalHead(),
        codec=TextCodec(6),
        stratified_time=True,
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3),
    )
    data = DataLoader([{"input_ids": ids(*["banana"] * 16)}] * 150, batch_size=None)
    trainer(tmp_path, max_steps=150).fit(model, data)
    texts = model.eval().sample(torch.arange(20), nfe=10).texts
    assert sum(text == "banana" for text in texts) >= 12


# Misfits


def test_networks_with_another_number_of_outputs_are_refused():
    model = BFN(ResidualMLP(num_inputs=4, num_outputs=3, width=8), flow=DiscreteFlow(4), head=CategoricalHead())
    for call in (lambda: model.sample(torch.arange(2)), lambda: model.loss(model.encode([torch.rand(2, 1, 8, 8)]), draws(2))):
        with pytest.raises(ValueError, match=r"gives 3 numbers per element, but CategoricalHead reads 4: set .*num_outputs"):
            call()


def draws(num):
    return SampleRandom(0, torch.arange(num))


class Data(LightningDataModule):
    num_levels = 17

    def train_dataloader(self):
        return DataLoader([(torch.rand(2, 1, 8, 8), torch.zeros(2))], batch_size=None)


def test_bins_that_do_not_fit_the_data_are_refused_before_training(tmp_path):
    model = BFN(ResidualMLP(width=8), head=DeltaHead(num_bins=256))
    with pytest.raises(ValueError, match="made for 256 levels, but the data has only 17: the others would never occur"):
        trainer(tmp_path, max_steps=1).fit(model, datamodule=Data())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BFN(ResidualMLP(), flow=DiscreteFlow(4)), "DeltaHead"),
        (lambda: BFN(ResidualMLP(), head=CategoricalHead()), "CategoricalHead"),
        (lambda: BFN(ResidualMLP(), flow=DiscreteFlow(26), head=CategoricalHead(), codec=TextCodec(8)), "27 characters.*26"),
        (lambda: BFN(ResidualMLP(), codec=ImageCodec((1, 8, 8), dynamic_binarization=True)), "gives 2 levels"),
        (lambda: ImageCodec((0, 8, 8)), "at least 1"),
        (lambda: TextCodec(0), "length=0"),
        (lambda: TextCodec(8, "abca"), "each once"),
    ],
)
def test_misfits_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_data_outside_their_range_are_refused():
    with pytest.raises(ValueError, match=r"images in \[0, 1\], but the data reaches from 0 to 255"):
        four_levels().encode([torch.full((1, 1, 8, 8), 255.0) * torch.eye(8)])
    with pytest.raises(ValueError, match="holds the id 27, but the alphabet"):
        text_model(5).encode({"input_ids": torch.tensor([[0, 1, 2, 3, 27]])})
    with pytest.raises(ValueError, match=r"texts of 12 characters, but the data has \(5,\)"):
        text_model(12).encode({"input_ids": ids("to be")})
