"""The LightningModule: losses of the paper's four methods, training, resume, sharing, sampling, in-painting, precision."""

import functools
import math
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sweep import sweep
from torch.utils.data import DataLoader, TensorDataset

from datamodules import Digits
from zoo.base.checkpoint import read_checkpoint
from zoo.base.hyperparameters import build
from zoo.base.random import SampleRandom
from zoo.base.samples import ChecksSampling, SupportsSampling
from zoo.callbacks import EMA
from zoo.emigm import EMIGM, Architecture, Guidance, Masking, MaskSampler, PixelCodec, WarmUp
from zoo.emigm.mask_schedule import elbo_weight, gamma
from zoo.emigm.patches import patchify

TABLE_1 = {
    "MaskGIT": {"masking": Masking(law="fixed_count", schedule="cosine", t_min=0.0), "cfg_with_mask": False},
    "MAR": {"masking": Masking(law="mar_truncnorm", t_min=0.0), "cfg_with_mask": False},
    "MDM": {
        "masking": Masking(schedule="linear", t_min=0.0, time="sample"),
        "weighting": "elbo",
        "reduction": "sum_over_N",
        "use_mae": False,
        "cfg_with_mask": False,
    },
    "eMIGM": {},
}
SMALL = Architecture(width=16, encoder_depth=1, decoder_depth=1, num_heads=2, head_depth=1, head_width=16)


def make(cls=EMIGM, seed=0, start=False, std=0.1, **options):
    """A tiny model; its weights lie away from the start, where the head answers 0."""
    torch.manual_seed(seed)
    defaults = {
        "codec": PixelCodec((1, 8, 8), mean=0.3052, std=0.3761),
        "architecture": SMALL,
        "num_classes": 10,
        "patch_size": 2,
        "buffer_size": 2,
        "attn_dropout": 0.0,
        "proj_dropout": 0.0,
        "sampler": MaskSampler(num_iter=5, head_steps=3),
        "samples_per_class": 1,
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
    }
    model = cls(**{**defaults, **options})
    if not start:
        for parameter in model.network.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return model


def painter(**options):
    """Samples of random weights are large: with this codec they stay within [0, 1], so that nothing hides behind a clamp."""
    return make(std=0.2, **{"codec": PixelCodec((1, 8, 8), mean=0.5, std=0.0005), **options})


def images(count=32, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def loader(count=32, batch_size=8):
    return DataLoader(TensorDataset(images(count), torch.arange(count) % 10), batch_size=batch_size)


def trainer(folder, **options):
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **{**silent, **options})


def differ(a, b):
    """By more than rounding."""
    return bool((a - b).abs().max() > 1e-6)


def weights(model):
    return {name: value.detach().clone() for name, value in model.network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Loss


def masked_draw(model, random, time=None):
    return model.masking.draw(random, model.network.num_tokens, time)


@pytest.mark.parametrize("reduction", ["masked_mean", "sum_over_N"])
@pytest.mark.parametrize("weighting", ["one", "elbo"])
@pytest.mark.parametrize("use_mae", [True, False])
def test_masked_rows_through_the_head_are_all_rows_and_a_mask(reduction, weighting, use_mae):
    """sum of l w m over sum of m, or over N, of each image: the published reduction, which pushes every row through the head."""
    model = make(reduction=reduction, weighting=weighting, use_mae=use_mae).double().eval()
    random, x = SampleRandom(0, torch.arange(6)), torch.randn(6, 1, 8, 8, dtype=torch.float64)
    label, draw = torch.arange(6), masked_draw(model, random)
    ours = model.token_losses(x, label, draw, random)["loss"].mean()

    batch, tokens, draws, hidden = 6, patchify(x, 2), model.diffusion_batch_mul, draw.order[:, : draw.num_masked]
    num_tokens, channels = tokens.shape[1:]
    step = torch.zeros(batch, num_tokens, draws, dtype=torch.int64)
    drawn = random.integers("diffusion step", 1000, (draw.num_masked, draws))
    step.scatter_(1, hidden[..., None].expand(-1, -1, draws), drawn)
    noise = torch.zeros(batch, num_tokens, draws, channels, dtype=torch.float64)
    drawn = random.normal("diffusion noise", (draw.num_masked, draws, channels), torch.float64)
    noise.scatter_(1, hidden[..., None, None].expand(-1, -1, draws, channels), drawn)
    z = model.network(tokens, model.network.class_emb(label), draw.order[:, draw.num_masked :], draw.mask)
    rows = model.network.diffloss.loss(tokens.flatten(0, 1), z.flatten(0, 1), step.flatten(0, 1), noise.flatten(0, 1))
    row = rows["loss"].mean(1).view(batch, num_tokens) * draw.mask
    weight = elbo_weight("exp", draw.time) if weighting == "elbo" else 1
    expected = (row * weight).sum() / (draw.mask.sum() if reduction == "masked_mean" else batch * num_tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("reduction", ["masked_mean", "sum_over_N"])
def test_own_masks_are_reduced_over_the_batch(reduction):
    model = make(**(TABLE_1["MDM"] | {"reduction": reduction, "label_drop_prob": 0.0})).double().train()
    random, x, label = SampleRandom(0, torch.arange(6)), torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    draw = masked_draw(model, random)
    ours = model.token_losses(x, label, draw, random)["loss"].mean()
    tokens, draws = patchify(x, 2), model.diffusion_batch_mul
    z = model.network(tokens, model.network.class_emb(label), mask_BN=draw.mask)
    step = random.integers("diffusion step", 1000, (16, draws)).flatten(0, 1)
    noise = random.normal("diffusion noise", (16, draws, 4), torch.float64).flatten(0, 1)
    row = model.network.diffloss.loss(tokens.flatten(0, 1), z.flatten(0, 1), step, noise)["loss"].mean(1).view(6, 16)
    weighted = row * draw.mask / draw.time[:, None]  # linear: w = 1/t
    expected = weighted.sum() / (draw.mask.sum() if reduction == "masked_mean" else 6 * 16)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


def test_evaluated_losses_are_unweighted_and_of_each_sample_alone():
    """So that validation neither depends on the batches nor on the weighting of training."""
    model = make(**(TABLE_1["MDM"] | {"reduction": "masked_mean"})).double().eval()
    x, label = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)

    def losses(rows, **options):
        random = SampleRandom(0, rows)
        return model.token_losses(x[rows], label[rows], model.masking.draw(random, 16, 0.6), random, **options)["loss"]

    rows = torch.arange(6)
    torch.testing.assert_close(losses(rows)[4:], losses(rows[4:]), rtol=1e-9, atol=0)
    torch.testing.assert_close(losses(rows), losses(rows, weighted=False) / 0.6, rtol=1e-9, atol=0)  # linear: w = 1/t


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exp", "log"])
def test_bound_of_a_token_that_always_costs_1_is_1(schedule, monkeypatch):
    """Integral of w gamma = gamma(1) - gamma(0), whatever the schedule: each token is paid for once."""
    model = make(
        masking=Masking(schedule=schedule, t_min=0.0, time="sample"), use_mae=False, weighting="elbo", reduction="sum_over_N"
    )
    ones = lambda target, z, step, noise: dict.fromkeys(("loss", "mse", "vb"), torch.ones(step.shape))  # noqa: E731
    monkeypatch.setattr(model.network.diffloss, "loss", ones)
    random = SampleRandom(0, torch.arange(4000))
    loss = model.token_losses(torch.zeros(4000, 1, 8, 8), None, masked_draw(model, random), random)["loss"]
    ends = gamma(schedule, torch.tensor([1e-3, 1.0], dtype=torch.float64))
    expected = ((ends[1] - ends[0]) / 0.999).item()
    assert loss.mean().item() == pytest.approx(expected, abs=4 * loss.std().item() / math.sqrt(4000))


def test_untrained_loss_is_that_of_the_noise():
    """The head answers 0: mean squares of the noise, about 1, for any mask."""
    model, random = make(start=True), SampleRandom(0, torch.arange(64))
    mse = model.token_losses(torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64), masked_draw(model, random), random)[
        "mse"
    ]
    assert mse.mean().item() == pytest.approx(1, abs=0.05)


def test_several_diffusion_times_are_the_mean_of_single_ones(monkeypatch):
    """diffusion_batch_mul = 4 with the draws of four evaluations."""
    random, x, label = SampleRandom(0, torch.arange(4)), torch.randn(4, 1, 8, 8), torch.arange(4)
    four, one = make(diffusion_batch_mul=4).double(), make(diffusion_batch_mul=1).double()
    draw = masked_draw(four, random)
    steps = random.integers("s", 1000, (draw.num_masked, 4))
    noises = random.normal("n", (draw.num_masked, 4, 4), torch.float64)

    def loss(model, part):
        monkeypatch.setattr(SampleRandom, "integers", lambda self, name, high, shape: steps[:, :, part])
        monkeypatch.setattr(SampleRandom, "normal", lambda self, name, shape, dtype: noises[:, :, part])
        return model.token_losses(x.double(), label, draw, random)["loss"]

    singles = [loss(one, slice(i, i + 1)) for i in range(4)]
    torch.testing.assert_close(loss(four, slice(0, 4)), torch.stack(singles).mean(0), rtol=1e-9, atol=0)


def test_classes_are_dropped_in_training_only():
    model, random, x = make(label_drop_prob=0.5), SampleRandom(0, torch.arange(400)), torch.randn(400, 1, 8, 8)
    seen = []
    embed = model.network.class_embedding
    model.network.class_embedding = lambda label, batch, drop=None: seen.append(drop) or embed(label, batch, drop)
    draw = masked_draw(model, random)
    for mode in (True, False):
        model.train(mode).token_losses(x, torch.zeros(400, dtype=torch.int64), draw, random)
    assert seen[0].float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert seen[1] is None


@pytest.mark.parametrize("name", TABLE_1)
def test_methods_of_table_1(name, tmp_path: Path):
    """MaskGIT, MAR, MDM and eMIGM are switches of one class: each is plain data, trains all its weights, and samples."""
    model = make(**TABLE_1[name])
    again = build(EMIGM, model.init_config)
    assert again.init_config == model.init_config
    assert vars(again.masking) == vars(model.masking)
    before = weights(model)
    run = trainer(tmp_path, max_steps=3)
    run.fit(model, loader())
    assert math.isfinite(run.callback_metrics["train_loss"])
    assert [key for key, value in weights(model).items() if torch.equal(value, before[key]) and key != "fake_latent"] == []
    assert model.sample(torch.arange(2)).images.shape == (2, 1, 8, 8)


def test_masks_of_table_1():
    counts = {}
    for name, options in TABLE_1.items():
        model = make(**options)
        draws = [masked_draw(model, SampleRandom(0, torch.arange(8 * i, 8 * i + 8))) for i in range(60)]
        counts[name] = torch.stack([draw.mask.sum(1) for draw in draws]) / 16
    assert (counts["MAR"] >= 0.7).all()
    assert counts["MDM"].float().std(1).mean() > 0.2  # every image has a time of its own
    assert all((counts[name] == counts[name][:, :1]).all() for name in ("MaskGIT", "MAR", "eMIGM"))
    assert counts["MaskGIT"].mean().item() == pytest.approx(0.637, abs=0.12)
    assert counts["eMIGM"].mean().item() == pytest.approx(0.855, abs=0.05)


# Training


def test_weight_decay_spares_vectors_biases_and_the_head():
    """Embeddings, tables and tokens do decay, as published."""
    model = make(optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.02))
    optimizer = model.configure_optimizers()
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    free = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | free == set(names.values())
    assert decayed & free == set()
    tables = {f"{part}_pos_embed_learned" for part in ("encoder", "decoder", "diffusion")}
    linear = {
        f"{part}_blocks.0.{layer}.weight"
        for part in ("encoder", "decoder")
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert decayed == tables | linear | {"fake_latent", "class_emb.weight", "z_proj.weight", "decoder_embed.weight"}


class Ramp(EMIGM):
    """Every weight falls by the learning rate in each step."""

    def training_step(self, batch, batch_idx):
        return sum(parameter.sum() for parameter in self.network.parameters())


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_average_of_a_linear_ramp(rate, tmp_path: Path):
    """w_n = w_0 - n r: the average lags by r d (1 - d^n) / (1 - d); constant weights stay; the tied vector is averaged once."""
    model = make(Ramp, optimizer=functools.partial(torch.optim.SGD, lr=rate)).double()
    start, decay, steps = weights(model), 0.9, 4
    callback = EMA(decay)
    run = trainer(tmp_path, max_steps=steps, callbacks=[callback], precision="64-true")
    run.fit(model, loader())
    lag = rate * decay * (1 - decay**steps) / (1 - decay)
    averaged = weights(model)
    for name, value in averaged.items():
        torch.testing.assert_close(value, start[name] - steps * rate + lag, rtol=1e-9, atol=1e-12)
    assert torch.equal(averaged["mask_token"], averaged["fake_latent"])


def test_averages_in_a_checkpoint_hold_the_tied_vector_under_both_names(tmp_path: Path):
    """Unlike the published code, which stores the raw vector as mask_token."""
    model = make()
    run = trainer(tmp_path, max_steps=3, callbacks=[EMA(0.5)])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = read_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert torch.equal(saved["network.mask_token"], saved["network.fake_latent"])
    assert torch.equal(EMIGM.load_from_checkpoint(tmp_path / "a.ckpt").network.fake_latent, model.network.fake_latent)


class Recording(EMIGM):
    """Keeps the losses of its steps."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.__dict__.setdefault("seen", []).append(loss.item())
        return loss


def train_on_digits(folder, ckpt_path=None):
    model = make(
        Recording,
        start=True,
        attn_dropout=0.1,
        proj_dropout=0.1,
        lr_scheduler=functools.partial(WarmUp, warmup_steps=5),
        optimizer=functools.partial(torch.optim.AdamW, lr=5e-3),
    )
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    callbacks = [EMA(0.9), saver]
    run = trainer(folder, max_steps=12, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0)
    run.fit(model, Digits(batch_size=256), ckpt_path=ckpt_path)
    return model


def test_interrupted_training_continues_exactly(tmp_path: Path):
    """Five batches an epoch, taken up after eight: masks, dropout, order, averages and rates are those of a whole run."""
    whole = train_on_digits(tmp_path)
    rest = train_on_digits(tmp_path, tmp_path / "step=8.ckpt")
    assert rest.seen == whole.seen[8:]
    assert len(set(whole.seen)) == 12
    assert same(weights(rest), weights(whole))


def test_accumulated_halves_are_a_whole(tmp_path: Path):
    """Masks of each sample and the sum over N: two batches of 8 with accumulation step like one of 16."""
    models = []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        model = make(**TABLE_1["MDM"], attn_dropout=0.0, proj_dropout=0.0)
        run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, precision="64-true")
        run.fit(model, loader(batch_size=batch_size))
        assert run.global_step == 4
        models.append(weights(model))
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-8, atol=1e-10)


def test_checkpointed_blocks_train_the_same(tmp_path: Path):
    models = []
    for checkpointing in (False, True):
        model = make(Recording, grad_checkpointing=checkpointing)
        trainer(tmp_path, max_steps=3).fit(model, loader())
        models.append(model)
    assert models[0].seen == models[1].seen
    assert same(weights(models[0]), weights(models[1]))


def test_training_learns_one_picture(tmp_path: Path):
    picture = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    data = DataLoader(TensorDataset(picture.expand(64, -1, -1, -1), torch.zeros(64, dtype=torch.int64)), batch_size=16)
    wide = Architecture(width=16, encoder_depth=1, decoder_depth=1, num_heads=2, head_depth=1, head_width=64)
    model = make(
        start=True,
        architecture=wide,
        codec=PixelCodec((1, 8, 8), mean=0.5, std=0.3),
        samples_per_class=100,
        sampler=MaskSampler(num_iter=4, guidance=Guidance(1.0)),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
    )
    before = trainer(tmp_path).validate(model, data, verbose=False)[0]["val_loss"]
    trainer(tmp_path, max_steps=80, limit_val_batches=0).fit(model, data)
    after = trainer(tmp_path).validate(model, data, verbose=False)[0]["val_loss"]
    assert after < before / 3
    assert (model.sample(torch.arange(5)).images - picture).abs().mean() < 0.1


# Trainer


def test_the_four_verbs_on_real_digits(tmp_path: Path):
    model, data = make(record_trajectory=True), Digits(batch_size=64, predict_samples=12)
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=1, limit_test_batches=2)
    run.fit(model, data)
    assert {"train_loss", "train_mse", "train_vb", "train_mask_ratio", "val_loss", "val_loss_t0_25", "val_loss_t1"} <= set(
        run.callback_metrics
    )
    validation, test = (getattr(run, verb)(model, data, verbose=False)[0] for verb in ("validate", "test"))
    assert validation["val_loss"] == pytest.approx(validation["val_mse"] + validation["val_vb"], rel=1e-5)
    assert test["test/loss"] == pytest.approx(test["test/mse"] + test["test/vb"], rel=1e-5)
    assert test["test/loss/standard_error"] > 0
    (batch,) = run.predict(model, data)
    assert set(batch) == {"index", "images", "label", "nfe", "trajectory"}
    assert batch["images"].shape == (12, 1, 8, 8)
    assert 0 <= batch["images"].min() <= batch["images"].max() <= 1
    assert batch["label"].tolist() == [*range(10), 0, 1]
    assert (batch["nfe"] == batch["nfe"][0]).all()
    torch.testing.assert_close(batch["trajectory"][:, -1], batch["images"])
    assert torch.equal(batch["images"], model.sample(torch.arange(12)).images)


def test_validation_repeats_itself(tmp_path: Path):
    model = make()
    results = [trainer(tmp_path).validate(model, loader(), verbose=False)[0] for _ in range(2)]
    assert results[0] == results[1]
    times = [results[0][f"val_loss_t{name}"] for name in ("0_25", "0_5", "0_75", "1")]
    assert len(set(times)) >= 3  # of 16 tokens all are masked at the two latest
    assert results[0]["val_loss"] == pytest.approx(sum(times) / 4, rel=1e-5)


@pytest.mark.parametrize("name", ["eMIGM", "MaskGIT"])
def test_validation_does_not_depend_on_the_batches(tmp_path: Path, name):
    model = make(**TABLE_1[name])
    results = [trainer(tmp_path).validate(model, loader(batch_size=size), verbose=False)[0] for size in (32, 5)]
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_latents_train_like_the_images_they_come_from(tmp_path: Path):
    """Batches of images and of their latents, as a cache gives them, are the same to the model."""
    model = make()
    random, (image, label) = SampleRandom(0, torch.arange(8)), (images(8), torch.arange(8))
    latents = model.codec.encode(image)
    for batch in ((image, label), {"latents": latents, "labels": label}):
        x, y = model.latents(batch, random)
        assert torch.equal(x, latents)
        assert torch.equal(y, label)
    data = DataLoader([{"latents": latents, "labels": label}], batch_size=None)
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, data, data)
    assert math.isfinite(run.callback_metrics["val_loss"])


# Precision and compilation


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_head_computes_in_full_precision(precision, tmp_path: Path):
    model, seen = make(), {"head": set(), "transformer": set()}
    model.network.diffloss.net.register_forward_hook(lambda module, args, output: seen["head"].add(output.dtype))
    model.network.decoder_blocks[-1].mlp.fc1.register_forward_hook(
        lambda module, args, output: seen["transformer"].add(output.dtype)
    )
    run = trainer(tmp_path, precision=precision, max_steps=2, num_sanity_val_steps=0)
    run.fit(model, loader())
    assert math.isfinite(run.callback_metrics["train_loss"])
    (batch,) = run.predict(model, DataLoader([{"index": torch.arange(3)}], batch_size=None))
    assert batch["images"].isfinite().all()
    full = torch.float64 if precision == "64-true" else torch.float32
    assert seen["head"] == {full}
    assert seen["transformer"] == {torch.bfloat16 if "bf16" in precision else full}


def test_half_precision_changes_the_loss_little(tmp_path: Path):
    losses = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        losses[precision] = trainer(tmp_path, precision=precision).validate(make(), loader(), verbose=False)[0]["val_loss"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.03)
    assert losses["bf16-true"] == pytest.approx(losses["32-true"], rel=0.03)
    assert len(set(losses.values())) == 3


def test_compilation_is_in_place(tmp_path: Path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(function) or function)
    model = make(compile=True)
    names = set(model.state_dict())
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, loader())
    trainer(tmp_path).predict(model, DataLoader([{"index": torch.arange(1)}], batch_size=None))
    assert [function.__self__ for function in seen] == [model.network]
    assert set(model.state_dict()) == names


@pytest.mark.slow
def test_compilation_changes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = make(Recording), make(Recording, compile=True)
    for model in (plain, compiled):
        trainer(tmp_path, max_steps=2).fit(model, loader())
    assert compiled.seen == pytest.approx(plain.seen, rel=1e-5)


# Sharing


class Wider(EMIGM):
    """A user's subclass with an argument of its own."""

    def __init__(self, gain: float = 2.0, **options) -> None:
        super().__init__(**options)
        self.gain = gain


@pytest.mark.parametrize("cfg_with_mask", sweep([True, False]))
def test_shared_weights_give_the_same_samples(tmp_path: Path, cfg_with_mask):
    model = painter(cfg_with_mask=cfg_with_mask)
    images = model.sample(torch.arange(4)).images
    run = trainer(tmp_path, max_steps=0)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for again in (EMIGM.from_pretrained(model.save_pretrained(tmp_path / "b")), EMIGM.load_from_checkpoint(tmp_path / "a.ckpt")):
        assert torch.equal(again.sample(torch.arange(4)).images, images)
        assert (again.network.mask_token is again.network.fake_latent) is cfg_with_mask
        assert again.init_config == model.init_config
        assert vars(again.sampler) == vars(model.sampler)


def test_user_subclass_is_rebuilt(tmp_path: Path):
    model = painter(cls=Wider, gain=3.0)
    again = EMIGM.from_pretrained(model.save_pretrained(tmp_path))
    assert type(again) is Wider
    assert again.gain == 3.0
    assert torch.equal(again.sample(torch.arange(2)).images, model.sample(torch.arange(2)).images)


def test_codec_has_no_part_in_the_weights():
    assert all(name.startswith("network.") for name in painter().state_dict())


def test_weights_of_another_resolution_are_refused(tmp_path: Path):
    """The message lists what differs, with shapes."""
    small = painter()
    run = trainer(tmp_path, max_steps=0)
    run.fit(small, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="diffusion_pos_embed_learned") as caught:
        EMIGM.load_from_checkpoint(tmp_path / "a.ckpt", codec=PixelCodec((1, 16, 16)))
    assert all(shape in str(caught.value) for shape in ("(1, 16, 16)", "(1, 64, 16)"))


# Sampling


def test_module_offers_sampling():
    model = painter()
    assert isinstance(model, SupportsSampling)
    assert isinstance(model, ChecksSampling)
    assert model.sampler_names == ("dpm-solver", "ddpm")
    for name in model.sampler_names:
        samples = model.sample(torch.arange(2), sampler=name, nfe=4)
        assert samples.images.shape == (2, 1, 8, 8)
        assert samples.trajectory is None
        assert samples.nfe <= 4


@pytest.mark.parametrize("use_mae", [True, False])
@pytest.mark.parametrize("head", ["dpm-solver", "ddpm"])
def test_sample_is_the_same_picture_in_any_batch(use_mae, head):
    """Also across the blocks that share the numbers of revealed tokens."""
    how = MaskSampler(num_iter=5, head=head, head_steps=3, head_clip=3.0, count_block=4, guidance=Guidance(2.0, 0.0, 0.7))
    model, index = painter(use_mae=use_mae, sampler=how).double(), torch.arange(10)
    together = model.sample(index, seed=3).images
    assert ((together > 0) & (together < 1)).float().mean() > 0.9
    for part in ([4, 3, 9], [7]):
        torch.testing.assert_close(model.sample(torch.tensor(part), seed=3).images, together[part], rtol=0, atol=1e-6)
    assert not torch.allclose(together, model.sample(index, seed=4).images, atol=1e-3)
    assert len(together.flatten(1).unique(dim=0)) == 10


def test_sampling_leaves_the_mode_alone():
    model = painter(attn_dropout=0.5).train()
    model.network.decoder_norm.eval()
    twice = [model.sample(torch.arange(2)).images for _ in range(2)]
    assert torch.equal(*twice)
    assert model.network.training
    assert not model.network.decoder_norm.training


def test_classes_of_samples():
    model = painter(samples_per_class=3)
    assert model.sample_labels(torch.arange(7)).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert model.sample_labels(torch.tensor([29, 30])).tolist() == [9, 0]
    index = torch.arange(3)
    default, given = model.sample(index).images, model.sample(index, labels=torch.tensor([0, 0, 0])).images
    assert torch.equal(default, given)
    assert differ(default, model.sample(index, labels=torch.tensor([5, 5, 5])).images)
    with pytest.raises(ValueError, match=r"Classes must lie in 0 \.\.\. 9"):
        model.sample(index, labels=torch.tensor([0, 1, 10]))


def test_samples_without_class(tmp_path: Path):
    model = painter(conditional=False)
    assert model.sample_labels(torch.arange(3)) is None
    drawn = model.sample(torch.arange(3))
    assert drawn.nfe <= model.sampler.num_iter  # nothing to guide to
    assert torch.equal(drawn.images, painter().sample(torch.arange(3), labels=None).images)
    (batch,) = trainer(tmp_path).predict(model, DataLoader([{"index": torch.arange(3)}], batch_size=None))
    assert "label" not in batch
    assert torch.equal(batch["images"], drawn.images)


def test_evaluations_without_class():
    model = painter(conditional=False, sampler=MaskSampler(num_iter=6, head_steps=2, guidance=Guidance(3.0, 0.0, 1.0)))
    assert model.nfe == 6
    assert model.sample(torch.arange(2), nfe=8).nfe == 8


def test_more_steps_than_tokens_spend_what_is_reported():
    model = painter(sampler=MaskSampler(num_iter=40, head_steps=2, guidance=Guidance(1.0)))
    samples = model.sample(torch.arange(2), record=True)
    assert samples.nfe == samples.trajectory.shape[1] <= 16 < model.nfe == 40


@pytest.mark.parametrize("nfe", [4, 5, 7, 12])
def test_evaluations_are_at_most_those_asked_for(nfe):
    model, calls = painter(sampler=MaskSampler(num_iter=3, head_steps=2, guidance=Guidance(3.0, 0.1, 0.6))), []
    model.network.decoder_norm.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    samples = model.sample(torch.arange(4), nfe=nfe)
    assert sum(calls) == 4 * samples.nfe
    assert nfe - 2 <= samples.nfe <= nfe


def test_trajectories_of_all_blocks_are_equally_long():
    model = painter(sampler=MaskSampler(num_iter=20, head_steps=2, count_block=1))
    samples = model.sample(torch.arange(6), record=True)
    assert torch.equal(samples.trajectory[:, -1], samples.images)


def test_bad_requests_are_refused():
    model, index = painter(), torch.arange(2)
    with pytest.raises(ValueError, match=r"no sampler 'euler'; it has dpm-solver, ddpm"):
        model.check_sampler("euler")
    with pytest.raises(ValueError, match="nfe=1 is too small"):
        painter(sampler=MaskSampler(guidance=Guidance(2.0, 0.0, 1.0))).check_sampler(nfe=1)
    with pytest.raises(ValueError, match="not both"):
        model.sample(index, sampler=MaskSampler(num_iter=2), nfe=3)
    with pytest.raises(ValueError, match="needs a mask"):
        model.sample(index, image=images(2))


# In-painting and editing


def half():
    mask = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[0, ..., :4] = True  # whole tokens
    mask[1, :, :3] = True  # a row of tokens, and half of the next
    mask[2] = True
    return mask


@pytest.mark.parametrize("use_mae", [True, False])
def test_in_painting_keeps_what_is_known(use_mae):
    """Known pixels are the user's; known tokens are seen from the first step on and never change."""
    model, picture, mask = painter(use_mae=use_mae), images(3), half()
    drawn = model.sample(torch.arange(3), image=picture, mask=mask, record=True)
    known = mask.expand_as(picture)
    assert torch.equal(drawn.images[known], picture[known])
    frames = drawn.trajectory
    always = known[:, None].expand_as(frames)
    assert torch.equal(frames[always], picture[:, None].expand_as(frames)[always])
    assert torch.equal(drawn.images[2], picture[2])
    other = model.sample(torch.arange(3), image=picture.flip(0), mask=mask).images
    assert differ(other[0][~known[0]], drawn.images[0][~known[0]])  # what is known is seen


def test_in_painting_does_not_look_at_what_is_unknown():
    model, picture, mask = painter(), images(3), half()
    mask[1, :, 2] = False  # tokens that are known in part count as unknown, so leave none
    hidden = torch.where(mask, picture, torch.zeros(()))
    drawn = [model.sample(torch.arange(3), image=image, mask=mask).images for image in (picture, hidden)]
    assert torch.equal(*drawn)


def test_in_painting_does_not_depend_on_the_batch():
    model, picture, mask = painter(), images(3), half()
    together = model.sample(torch.arange(3), image=picture, mask=mask).images
    for i in range(3):
        alone = model.sample(torch.tensor([i]), labels=torch.tensor([i]), image=picture[i : i + 1], mask=mask[i : i + 1]).images
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_nothing_known_is_a_plain_sample():
    model = painter()
    drawn = model.sample(torch.arange(3), image=images(3), mask=torch.zeros(3, 1, 8, 8, dtype=torch.bool))
    assert torch.equal(drawn.images, model.sample(torch.arange(3)).images)


def test_prediction_fills_in_and_edits(tmp_path: Path):
    """Without a class the model fills in freely and unguided; with one, the unknown part becomes it."""
    model, picture, mask = (
        painter(sampler=MaskSampler(num_iter=5, head_steps=3, guidance=Guidance(3.0, 0.0, 1.0))),
        images(3),
        half(),
    )
    batch = {"index": torch.arange(3), "image": picture, "mask": mask, "path": ["a", "b", "c"]}
    labels = [None, torch.tensor([7, 7, 7]), torch.tensor([2, 2, 2])]
    data = [batch if label is None else {**batch, "label": label} for label in labels]
    free, seven, two = trainer(tmp_path).predict(model, DataLoader(data, batch_size=None))
    known = mask.expand_as(picture)
    for result, label in zip((free, seven, two), labels, strict=True):
        assert result["path"] == ["a", "b", "c"]
        assert torch.equal(result["images"][known], picture[known])
        assert result["nfe"][2] == 0  # all is known
        assert ("label" in result) is (label is not None)
    assert seven["label"].tolist() == [7, 7, 7]
    assert torch.equal(seven["nfe"], 2 * free["nfe"])
    unknown = {name: result["images"][~known] for name, result in (("free", free), ("seven", seven), ("two", two))}
    assert differ(unknown["seven"], unknown["two"])
    assert differ(unknown["seven"], unknown["free"])


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": None}, "give size .* or an architecture"),
        ({"size": "small"}, "one of the two"),
        ({"architecture": None, "size": "giant"}, "no size 'giant'; there are xsmall"),
        ({"patch_size": 3}, "patch_size=3 must divide the latents' 8 x 8"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"label_drop_prob": 1.0}, r"label_drop_prob=1\.0"),
        ({"attn_dropout": -0.1}, r"attn_dropout=-0\.1"),
        ({"diffusion_batch_mul": 0}, "diffusion_batch_mul=0"),
        ({"samples_per_class": 0}, "samples_per_class=0"),
        ({"val_times": []}, "at least one time"),
        ({"val_times": [0.0]}, r"val_times=\[0\.0\]"),
        ({"weighting": "two"}, "weighting='two' must be one of one, elbo"),
        ({"reduction": "sum"}, "reduction='sum' must be one of masked_mean, sum_over_N"),
        ({"masking": Masking(time="sample")}, "set use_mae to false"),
        ({"masking": Masking(law="mar_truncnorm"), "weighting": "elbo"}, "follows none"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_latents_of_another_shape_are_refused():
    model, random = make(), SampleRandom(0, torch.arange(2))
    with pytest.raises(ValueError, match=r"latents have shape \(4, 8, 8\), but PixelCodec is set up for \(1, 8, 8\)"):
        model.latents({"latents": torch.randn(2, 4, 8, 8), "labels": torch.zeros(2)}, random)
    with pytest.raises(ValueError, match=r"images of shape \(B, 1, 8, 8\), but got \(2, 3, 8, 8\)"):
        model.latents((torch.rand(2, 3, 8, 8), torch.zeros(2)), random)


@pytest.mark.parametrize("scale", [0.0, 0.2325, 4.3, math.nan])
def test_latents_of_another_scale_are_refused(scale, tmp_path: Path):
    batch = {"latents": scale * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(8)}
    with pytest.raises(ValueError, match=r"standard deviation of .*, and the head needs about 1"):
        trainer(tmp_path, max_steps=1).fit(make(), DataLoader([batch], batch_size=None))


def test_labels_out_of_range_are_refused(tmp_path: Path):
    data = DataLoader(TensorDataset(images(8), torch.full((8,), 10)), batch_size=8)
    with pytest.raises(ValueError, match=r"Classes must lie in 0 \.\.\. 9 \(num_classes\), got labels from 10 to 10"):
        trainer(tmp_path, max_steps=1).fit(make(), data)


def test_data_of_more_classes_are_refused_before_the_first_step(tmp_path: Path):
    with pytest.raises(ValueError, match="the data has 10 classes and the model num_classes=4"):
        trainer(tmp_path, max_steps=1).fit(make(num_classes=4), Digits(batch_size=8))


class Cached(Digits):
    """Data that say how their latents are scaled."""

    latent_scale = 0.2325


def test_data_scaled_for_another_codec_are_refused_before_the_first_step(tmp_path: Path):
    model = make()
    assert model.codec.scale != 0.2325
    with pytest.raises(ValueError, match=r"scaled by 0\.2325, but PixelCodec has scale="):
        trainer(tmp_path, max_steps=1).fit(model, Cached(batch_size=8))
