"""Callbacks that draw samples: the same ones on any number of ranks, measured, shown and checked before training."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from zoo.base.samples import Samples, to_uint8
from zoo.bfn import BFN, CategoricalHead, DiscreteFlow, ResidualMLP, TextCodec, TextConvNet
from zoo.callbacks import EMA, SampleGridLogger, SampleQuality
from zoo.callbacks.picture import picture_grid
from zoo.metrics import feature_distances, real_data_floor


def stripes(index_B: Tensor) -> Tensor:
    """Stand-in for real data: (B, 1, 8, 8) in [0, 1], a bright row and a bright column of random place and strength."""
    images = torch.zeros(len(index_B), 1, 8, 8)
    for image, index in zip(images, index_B.tolist(), strict=True):
        generator = torch.Generator().manual_seed(index)
        row, column = torch.randint(0, 8, (2,), generator=generator)
        image[0, row] = torch.rand((), generator=generator)
        image[0, :, column] = torch.rand((), generator=generator)
    return images


class Stripes(lightning.LightningDataModule):
    feature_extractor = "fd_digits_mlp"
    num_classes = 10
    image_shape = (1, 8, 8)

    def reference_images(self) -> Tensor:
        return to_uint8(stripes(torch.arange(200)))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=2)

    val_dataloader = test_dataloader = train_dataloader


class Sampler(lightning.LightningModule):
    """Draws stripes with noise that vanishes with the number of network evaluations; `late` costs one more."""

    sampler_names = ("early", "late")

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.drawn: list[int] = []

    def sample(self, index_B: Tensor, *, seed: int = 0, sampler: str | None = None, nfe: int | None = None) -> Samples:
        assert not torch.is_grad_enabled()
        nfe = nfe or 4
        self.drawn += index_B.tolist()
        noise = torch.stack(
            [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(10_000 * seed + i)) for i in index_B.tolist()]
        )
        images = stripes(index_B + 10_000) * (1 - 1 / nfe) + noise / nfe
        return Samples(images.to(self.device), nfe + (sampler == "late"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 0.0)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "log_every_n_steps": 1, **options},
    )


QUALITY: dict[str, Any] = {"num_samples": 150, "batch_size": 64, "kid_subset_size": 50}


def test_quality_is_the_distance_of_the_samples_with_the_floor_beside(tmp_path: Path, capsys) -> None:
    model, data = Sampler(), Stripes()
    callback = SampleQuality(["early", "late"], [2, 20], **QUALITY)
    trainer = trainer_of(tmp_path, callback, logger=CSVLogger(tmp_path, name="", version=""))
    (own,) = trainer.test(model, data, verbose=False)
    found = json.loads((tmp_path / "sample_quality.json").read_text())
    with torch.no_grad():
        images = to_uint8(model.sample(torch.arange(150), sampler="early", nfe=2).images)
    expected = feature_distances(images, data.reference_images(), "fd_digits_mlp", kid_subset_size=50)
    first = found["rows"][0]
    assert (first["sampler"], first["requested_nfe"], first["nfe"]) == ("early", 2, 2)
    assert first["frechet_distance"] == pytest.approx(expected.frechet_distance, rel=1e-12)
    assert [row["nfe"] for row in found["rows"]] == [2, 20, 3, 21]
    assert found["rows"][1]["frechet_distance"] < 0.5 * first["frechet_distance"]
    floor = real_data_floor(data.reference_images(), "fd_digits_mlp", 150, kid_subset_size=50)
    assert found["floor"]["frechet_distance"] == floor.frechet_distance
    assert (found["num_samples"], found["num_reference"], found["floor"]["num_samples"]) == (150, 200, 100)
    assert callback.result == found
    assert list(own) == ["val/loss"]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        logged = next(row for row in csv.DictReader(file) if row["test/frechet_distance/floor"])
    assert float(logged["test/frechet_distance/early/nfe2"]) == first["frechet_distance"]
    assert float(logged["test/frechet_distance/floor"]) == floor.frechet_distance
    printed = capsys.readouterr().out
    assert f"{first['frechet_distance']:.3f}" in printed and "floor" in printed
    assert "sample_quality.json" in printed.replace("\n", "")


def _quality_on_ranks(folder: str) -> tuple[list[int], dict[str, Any] | None]:
    model, callback = Sampler(), SampleQuality(["early"], [5], **{**QUALITY, "num_samples": 151})
    trainer_of(Path(folder), callback, devices=2, strategy="ddp").test(model, Stripes(), verbose=False)
    return model.drawn, callback.result


def test_two_ranks_share_the_samples_and_find_the_same_quality(tmp_path: Path, pool) -> None:
    (drawn_0, result_0), (drawn_1, result_1) = pool.run(_quality_on_ranks, str(tmp_path / "two"), world_size=2)
    assert drawn_0 == list(range(0, 152, 2)) and drawn_1 == list(range(1, 152, 2))
    assert result_0 == result_1
    trainer = trainer_of(tmp_path / "one", SampleQuality(["early"], [5], **{**QUALITY, "num_samples": 151}))
    trainer.test(Sampler(), Stripes(), verbose=False)
    one, two = (json.loads((tmp_path / name / "sample_quality.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_quality_during_training_is_logged_every_nth_epoch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = trainer_of(tmp_path, SampleQuality(["early"], [3], every_n_epochs=2, **QUALITY), logger=logger, max_epochs=5)
    trainer.fit(Sampler(), Stripes())
    column = "val/frechet_distance/early/nfe3"
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index(column)
    epochs = [int(line.split(",")[lines[0].split(",").index("epoch")]) for line in lines[1:] if line.split(",")[place]]
    assert epochs == [1, 3]
    assert column in trainer.callback_metrics
    assert not (tmp_path / "sample_quality.json").exists()


class NoReference(Stripes):
    reference_images = property()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("options", "model", "data", "error", "message"),
    [
        ({"samplers": ["erly"]}, Sampler, Stripes, ValueError, r"no sampler 'erly'; did you mean early\? \(it has early, late\)"),
        ({"nfes": [10, 0]}, Sampler, Stripes, ValueError, "at least 1, got nfe=0"),
        ({"extractor": "fd_digit"}, Sampler, Stripes, ValueError, "no feature extractor 'fd_digit'; did you mean fd_digits_mlp"),
        ({"extractor": "inception-v3-compat", "weights_path": Path("no")}, Sampler, Stripes, ValueError, "No Inception weights"),
        ({}, BoringModel, Stripes, TypeError, "BoringModel does not offer"),
        ({}, Sampler, NoReference, TypeError, "DataModule NoReference without them"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_first_step(
    tmp_path: Path, options: dict[str, Any], model: type, data: type, error: type[Exception], message: str
) -> None:
    callback = SampleQuality(**{"samplers": ["early"], "nfes": [10], **QUALITY, **options})
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, callback, max_epochs=1).fit(model(), data())


def test_quality_without_datamodule_or_validation_is_refused(tmp_path: Path) -> None:
    callback = SampleQuality(["early"], [10], every_n_epochs=1, **QUALITY)
    with pytest.raises(TypeError, match="this run has no DataModule"):
        trainer_of(tmp_path, callback).test(Sampler(), Stripes().test_dataloader())
    with pytest.raises(ValueError, match="every_n_epochs=1 acts in validation, and this run has none"):
        trainer_of(tmp_path, callback, max_epochs=1, limit_val_batches=0).fit(Sampler(), Stripes())


def test_bad_options_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="at least one sampler and one NFE"):
        SampleQuality([], [10])
    with pytest.raises(ValueError, match=r"num_samples=100 must hold a subset .*kid_subset_size=500"):
        SampleQuality(["early"], [10], num_samples=100)
    with pytest.raises(ValueError, match="batch_size and every_n_epochs must be at least 1"):
        SampleQuality(["early"], [10], every_n_epochs=0)
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        SampleGridLogger(num_images=0)


def grid_of(model: Sampler, count: int) -> Image.Image:
    with torch.no_grad():
        return picture_grid(to_uint8(model.sample(torch.arange(count), seed=3).images), 4)


def fit_with_pictures(folder: Path, loggers: list[Logger] | bool, epochs: int = 4) -> Sampler:
    model = Sampler()
    callback = SampleGridLogger(every_n_epochs=2, num_images=6, columns=4, seed=3)
    trainer_of(folder, callback, logger=loggers, max_epochs=epochs).fit(model, Stripes())
    return model


def test_pictures_reach_tensorboard_and_the_folder_unchanged(tmp_path: Path) -> None:
    loggers: list[Logger] = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path, name="", version="")]
    model = fit_with_pictures(tmp_path, loggers)
    expected = np.asarray(grid_of(model, 6))
    files = sorted((tmp_path / "pictures").iterdir())
    assert [f.name for f in files] == ["samples_00000004.png", "samples_00000008.png"]
    assert all(np.array_equal(np.asarray(Image.open(f)), expected) for f in files)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    logged = events.Images("samples")
    assert [event.step for event in logged] == [4, 8]
    path = tmp_path / "logged.png"
    path.write_bytes(logged[0].encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(path).convert("L")), expected)


def test_pictures_need_no_logger(tmp_path: Path) -> None:
    fit_with_pictures(tmp_path, False, epochs=2)
    assert [f.name for f in (tmp_path / "pictures").iterdir()] == ["samples_00000004.png"]


def test_pictures_reach_wandb_through_its_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, Any]] = []

    class Run:
        """A W&B run that keeps what it is told."""

        name = id = "run"

        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            logged.extend((key, value) for key, value in metrics.items() if key == "samples")

    fake = SimpleNamespace(Image=lambda picture, **options: picture, run=None)
    for name, module in {
        "wandb": fake,
        "wandb.sdk": SimpleNamespace(),
        "wandb.sdk.lib": SimpleNamespace(RunDisabled=Run),
        "wandb.wandb_run": SimpleNamespace(Run=Run),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.setattr(WandbLogger, "log_hyperparams", lambda self, params: None)
    model = fit_with_pictures(tmp_path, [WandbLogger(experiment=Run())], epochs=2)  # type: ignore[arg-type]
    ((key, (picture,)),) = logged
    assert key == "samples"
    assert np.array_equal(np.asarray(picture), np.asarray(grid_of(model, 6)))


@pytest.mark.parametrize("ema_first", [True, False])
def test_samples_show_the_averaged_weights_wherever_ema_stands_in_the_list(tmp_path: Path, ema_first: bool) -> None:
    seen: list[float] = []

    class Watched(Sampler):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -self.weight  # each step of SGD adds 0.1

        def sample(self, *args: Any, **options: Any) -> Samples:
            seen.append(self.weight.item())
            return super().sample(*args, **options)

    pictures, ema = SampleGridLogger(num_images=2), EMA(decay=0.5)
    callbacks = (ema, pictures) if ema_first else (pictures, ema)
    trainer_of(tmp_path, *callbacks, max_epochs=1).fit(Watched(), Stripes())
    # Two steps: the weight goes 0, 0.1, 0.2, its average 0, 0.05, 0.125.
    assert seen == pytest.approx([0.125])


class Checked(Sampler):
    """Knows beforehand that `late` costs at least two network evaluations."""

    sample_type: type = Samples

    def check_sampler(self, sampler: str | None = None, nfe: int | None = None) -> None:
        if sampler == "late" and nfe == 1:
            raise ValueError("late wants two.")


def test_pairs_of_sampler_and_nfe_that_the_module_refuses_are_found_before_training(tmp_path: Path) -> None:
    callback = SampleQuality(["early", "late"], [2, 1], every_n_epochs=1, **QUALITY)
    with pytest.raises(ValueError, match=r"SampleQuality: late with nfe=1: late wants two\."):
        trainer_of(tmp_path, callback, max_epochs=1).fit(Checked(), Stripes())
    model = BFN(ResidualMLP(width=8, depth=1))
    with pytest.raises(ValueError, match=r"SampleGridLogger: ancestral with nfe=1: .* must be at least 2"):
        trainer_of(tmp_path, SampleGridLogger(sampler="ancestral", nfe=1), max_epochs=1).fit(model, Stripes())


def test_pictures_of_a_model_of_text_are_refused_before_training(tmp_path: Path) -> None:
    network = TextConvNet(num_classes=27, width=8, depth=1)
    model = BFN(network, flow=DiscreteFlow(27), head=CategoricalHead(), codec=TextCodec(16))
    with pytest.raises(TypeError, match="SampleGridLogger wants images, and BFN draws texts as it is configured"):
        trainer_of(tmp_path, SampleGridLogger(), max_epochs=1).fit(model, Stripes())


def test_quality_of_a_checkpoint_has_the_checkpoint_s_age(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_epochs=3)
    trainer.fit(Sampler(), Stripes())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    age = {name: torch.load(tmp_path / "last.ckpt", weights_only=True)[name] for name in ("epoch", "global_step")}
    assert age["global_step"] == 6
    callback = SampleQuality(["early"], [5], **QUALITY)
    tester = trainer_of(tmp_path, callback, logger=CSVLogger(tmp_path, name="", version=""))
    tester.test(Sampler(), Stripes(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    found = json.loads((tmp_path / "sample_quality.json").read_text())
    assert {name: found[name] for name in age} == age
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["test/frechet_distance/floor"]] == ["6"]
    tester.test(Sampler(), Stripes(), verbose=False)
    assert callback.result is not None and callback.result["global_step"] == 0  # of other weights


def test_pictures_refuse_an_unknown_sampler_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SampleGridLogger: Sampler has no sampler 'lat'; did you mean late"):
        trainer_of(tmp_path, SampleGridLogger(sampler="lat"), max_epochs=1).fit(Sampler(), Stripes())
