"""Class agreement: real digits and their labels agree, on any number of ranks; pictures of the 50k protocol measure the same."""

import json
import math
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from datamodules import Digits
from zoo.base.samples import Samples, labels_of_samples, to_uint8
from zoo.callbacks import ClassAgreementWriter, ImageGridWriter, SampleQuality
from zoo.metrics import classifier_agreement, feature_distances, folder_distances, statistics_distances, write_statistics

CLASSIFIER = "fd_digits_mlp"


def real_digits() -> tuple[Tensor, Tensor]:
    """Test images (N, 1, 8, 8) in [0, 1], as 8-bit pixels, and their classes."""
    images, labels = Digits().splits.test
    return (images.float() * 255 / 16).round() / 255, labels


class Ids(Dataset[dict[str, Any]]):
    """Sample ids 0 to N-1."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"index": position}


class Data(lightning.LightningDataModule):
    """Asks for samples; has no real images."""

    feature_extractor = CLASSIFIER

    def __init__(self, count: int = 101) -> None:
        super().__init__()
        self.count = count

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=2)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(Ids(self.count), batch_size=16)


class DataWithReference(Data):
    def reference_images(self) -> Tensor:
        return Digits().reference_images()


class Replay(lightning.LightningModule):
    """Draws real digits; every n-th is labelled wrongly."""

    sampler_names = ("replay",)

    def __init__(self, wrong_every: int | None = None, labelled: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images, self.labels = real_digits()
        self.wrong_every, self.labelled = wrong_every, labelled

    def sample(self, index_B: Tensor, *, seed: int = 0, sampler: str | None = None, nfe: int | None = None) -> Samples:
        return Samples(self.images[index_B], nfe or 1)

    def sample_labels(self, index_B: Tensor) -> Tensor | None:
        if not self.labelled:
            return None
        label_B = self.labels[index_B]
        return label_B if self.wrong_every is None else (label_B + (index_B % self.wrong_every == 0)) % 10

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        found = {"index": batch["index"], "images": self.sample(batch["index"]).images}
        label_B = self.sample_labels(batch["index"])
        return found if label_B is None else {**found, "label": label_B}

    def test_step(self, batch: Any, batch_idx: int) -> None: ...


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def predict(folder: Path, callback: Callback, model: Any = None, data: Any = None, **options: Any) -> None:
    trainer_of(folder, callback, **options).predict(model or Replay(), data or Data(), return_predictions=False)


def agreement(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "predictions" / "class_agreement.json").read_text())


def test_real_digits_agree_with_their_labels(tmp_path: Path, capsys) -> None:
    images, labels = real_digits()
    predict(tmp_path, ClassAgreementWriter(), data=Data(180))
    found = agreement(tmp_path)
    expected = classifier_agreement(to_uint8(images), CLASSIFIER, labels)
    assert found["accuracy"] == expected.accuracy and 0.95 < found["accuracy"] <= 1
    assert math.isclose(found["mean_max_probability"], expected.mean_max_probability, rel_tol=1e-12)
    assert (found["classifier"], found["num_samples"]) == (CLASSIFIER, 180)
    counts = {name: entry["num_samples"] for name, entry in found["classes"].items()}
    assert counts == {str(k): int((labels == k).sum()) for k in range(10)}
    mean = sum(entry["num_samples"] * entry["accuracy"] for entry in found["classes"].values()) / 180
    assert math.isclose(mean, found["accuracy"])
    printed = capsys.readouterr().out
    assert f"sees the class asked for in {100 * found['accuracy']:.1f} % of 180 images" in printed
    assert "class_agreement.json" in printed


def test_wrong_labels_are_counted_as_such(tmp_path: Path) -> None:
    predict(tmp_path / "right", ClassAgreementWriter(), Replay(), Data(100))
    predict(tmp_path / "wrong", ClassAgreementWriter(), Replay(wrong_every=4), Data(100))
    right, wrong = agreement(tmp_path / "right"), agreement(tmp_path / "wrong")
    assert abs(right["accuracy"] - wrong["accuracy"] - 0.25) <= 2 * (1 - right["accuracy"]) + 1e-12
    assert right["mean_max_probability"] == wrong["mean_max_probability"]


def _agree_on_ranks(folder: str) -> None:
    predict(Path(folder), ClassAgreementWriter(), Replay(wrong_every=3), devices=2, strategy="ddp")


def test_two_ranks_count_every_image_once(tmp_path: Path, pool) -> None:
    pool.run(_agree_on_ranks, str(tmp_path / "two"), world_size=2)
    predict(tmp_path / "one", ClassAgreementWriter(), Replay(wrong_every=3))
    assert agreement(tmp_path / "one") == agreement(tmp_path / "two")
    assert [p.name for p in (tmp_path / "two" / "predictions").iterdir()] == ["class_agreement.json"]


def test_an_image_predicted_twice_counts_once(tmp_path: Path) -> None:
    class Twice(Data):
        def predict_dataloader(self) -> DataLoader:
            return DataLoader([{"index": i} for i in [*range(20), *range(5)]], batch_size=7)

    predict(tmp_path, ClassAgreementWriter("seen.json", classifier=CLASSIFIER), data=Twice())
    assert json.loads((tmp_path / "predictions" / "seen.json").read_text())["num_samples"] == 20


def test_what_cannot_be_judged_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'Replay to return "label", one for each sample id.*ask for classes'):
        predict(tmp_path, ClassAgreementWriter(), Replay(labelled=False))
    other = Data()
    other.feature_extractor = "inception-v3-compat"  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"Data names inception-v3-compat: pass `classifier`, one of fd_digits_mlp"):
        predict(tmp_path, ClassAgreementWriter(), data=other)
    with pytest.raises(ValueError, match="No classifier 'fd_digit'"):
        predict(tmp_path, ClassAgreementWriter(classifier="fd_digit"))
    with pytest.raises(TypeError, match="this run has no DataModule: pass `classifier`"):
        predict(tmp_path, ClassAgreementWriter(), data=DataLoader(Ids(3)))
    with pytest.raises(ValueError, match="plain file name"):
        ClassAgreementWriter("../a.json")

    class Hundred(Replay):
        def sample_labels(self, index_B: Tensor) -> Tensor | None:
            return index_B + 90

    with pytest.raises(ValueError, match="classes 0 to 9, and the images are meant to show 90 to 105"):
        predict(tmp_path, ClassAgreementWriter(), Hundred())


QUALITY: dict[str, Any] = {"samplers": ["replay"], "nfes": [3], "num_samples": 120, "batch_size": 50}


def quality(folder: Path, callback: SampleQuality, model: Replay, data: Any, **options: Any) -> dict[str, Any]:
    trainer_of(folder, callback, **options).test(model, data, verbose=False)
    return json.loads((folder / "sample_quality.json").read_text())


def test_quality_has_the_class_accuracy_only_of_modules_with_classes(tmp_path: Path, capsys) -> None:
    options = {**QUALITY, "kid_subset_size": 50}
    found = quality(tmp_path, SampleQuality(**options), Replay(), DataWithReference())["rows"][0]
    assert "accuracy" in capsys.readouterr().out
    images, labels = real_digits()
    expected = classifier_agreement(to_uint8(images[:120]), CLASSIFIER, labels[:120])
    assert found["class_accuracy"] == expected.accuracy
    without = quality(tmp_path, SampleQuality(**options), Replay(labelled=False), DataWithReference())["rows"][0]
    assert without == {name: value for name, value in found.items() if name != "class_accuracy"}
    assert "accuracy" not in capsys.readouterr().out


def test_quality_against_statistics_needs_no_images_and_is_the_same(tmp_path: Path, capsys) -> None:
    statistics = tmp_path / "digits.npz"
    write_statistics(statistics, Digits().reference_images(), CLASSIFIER)
    callback = SampleQuality(**QUALITY, statistics=statistics)
    found = quality(tmp_path, callback, Replay(), Data())
    row = found["rows"][0]
    images, labels = real_digits()
    expected = feature_distances(to_uint8(images[:120]), Digits().reference_images(), CLASSIFIER, kid_subset_size=50)
    assert row["frechet_distance"] == pytest.approx(expected.frechet_distance, rel=1e-9)
    assert row["inception_score"] == pytest.approx(expected.inception_score, rel=1e-12)
    seen = classifier_agreement(to_uint8(images[:120]), CLASSIFIER, labels[:120])
    assert (row["class_accuracy"], row["classes"]) == (seen.accuracy, list(seen.classes))
    assert row["mean_max_probability"] == pytest.approx(seen.mean_max_probability, rel=1e-12)
    assert row["kernel_distance"] is None and found["floor"] is None
    assert (found["num_reference"], found["statistics"]) == (1617, str(statistics))
    printed = capsys.readouterr().out
    floor = next(line for line in printed.splitlines() if "floor" in line)
    assert floor.count("–") == 5 and "– not measured" in printed
    scalars = callback._scalars("test", found)
    assert "test/class_accuracy/replay/nfe3" in scalars
    assert not [name for name in scalars if "kernel" in name or "floor" in name]


def _quality_on_ranks(folder: str) -> dict[str, Any] | None:
    callback = SampleQuality(**{**QUALITY, "num_samples": 121}, statistics=Path(folder) / "digits.npz")
    trainer_of(Path(folder) / "two", callback, devices=2, strategy="ddp").test(Replay(), Data(), verbose=False)
    return callback.result


def test_two_ranks_stream_what_one_does(tmp_path: Path, pool) -> None:
    write_statistics(tmp_path / "digits.npz", Digits().reference_images(), CLASSIFIER)
    first, second = pool.run(_quality_on_ranks, str(tmp_path), world_size=2)
    assert first == second
    callback = SampleQuality(**{**QUALITY, "num_samples": 121}, statistics=tmp_path / "digits.npz")
    one = quality(tmp_path / "one", callback, Replay(), Data())["rows"][0]
    two = first["rows"][0]
    assert two["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-9)
    assert two["inception_score"] == pytest.approx(one["inception_score"], rel=1e-12)  # the order of the ids is kept
    assert (two["class_accuracy"], two["classes"]) == (one["class_accuracy"], one["classes"])


def test_statistics_that_do_not_fit_are_found_before_the_run(tmp_path: Path) -> None:
    options = {**QUALITY, "statistics": tmp_path / "imagenet.npz"}
    with pytest.raises(FileNotFoundError, match=r"No statistics at .*imagenet\.npz"):
        trainer_of(tmp_path, SampleQuality(**options)).test(Replay(), Data())
    np.savez(options["statistics"], mu=np.zeros(2048, np.float32), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="hold 2048 features, and the extractor 'fd_digits_mlp' gives 32"):
        trainer_of(tmp_path, SampleQuality(**options)).test(Replay(), Data())
    with pytest.raises(TypeError, match="this run has no DataModule, so pass `extractor`"):
        trainer_of(tmp_path, SampleQuality(**options)).test(Replay(), Data().test_dataloader())
    with pytest.raises(ValueError, match="at least 2 samples, got num_samples=1"):
        SampleQuality(**{**options, "num_samples": 1})


def test_quality_against_statistics_needs_no_datamodule(tmp_path: Path) -> None:
    write_statistics(tmp_path / "digits.npz", Digits().reference_images(), CLASSIFIER)
    callback = SampleQuality(**QUALITY, extractor=CLASSIFIER, statistics=tmp_path / "digits.npz")
    assert quality(tmp_path, callback, Replay(), Data().test_dataloader())["data"] is None


def test_options_are_found_on_the_command_line() -> None:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--callbacks", type=list[Callback])
    quality = {"class_path": "SampleQuality", "init_args": {"samplers": ["a"], "nfes": [5], "statistics": "real.npz"}}
    writer = {"class_path": "ClassAgreementWriter", "init_args": {"classifier": "fd_mnist_cnn"}}
    first, second = made.instantiate_classes(made.parse_object({"callbacks": [quality, writer]})).callbacks
    assert Path(first.statistics) == Path("real.npz")
    assert isinstance(second, ClassAgreementWriter) and second.classifier == "fd_mnist_cnn"


def test_modules_must_name_one_class_for_each_sample() -> None:
    class Wrong(Replay):
        def sample_labels(self, index_B: Tensor) -> Tensor | None:
            return torch.zeros(1)

    with pytest.raises(ValueError, match=r"Wrong\.sample_labels must give int64 of shape \(4,\)"):
        labels_of_samples(Wrong(), torch.arange(4))
    assert labels_of_samples(object(), torch.arange(4)) is None


def test_pictures_of_every_sample_have_the_distance_of_the_stream(tmp_path: Path) -> None:
    statistics = write_statistics(tmp_path / "digits.npz", Digits().reference_images(), CLASSIFIER)
    predict(tmp_path, ImageGridWriter(num_images=10, single_files=True), data=Data(120))
    found = quality(tmp_path, SampleQuality(**QUALITY, statistics=tmp_path / "digits.npz"), Replay(), Data())["rows"][0]
    folder = folder_distances(tmp_path / "predictions" / "images", tmp_path / "digits.npz", CLASSIFIER, batch_size=50)
    assert folder.num_samples == 120
    assert folder.frechet_distance == pytest.approx(found["frechet_distance"], rel=1e-9)
    assert folder.inception_score == pytest.approx(found["inception_score"], rel=1e-12)
    streamed = statistics_distances(to_uint8(real_digits()[0][:120]), statistics, CLASSIFIER, batch_size=50)
    assert streamed == folder


def test_writing_every_sample_keeps_no_more_than_the_grid(tmp_path: Path) -> None:
    writer = ImageGridWriter(num_images=3, single_files=True)
    trainer: Any = type("Here", (), {"default_root_dir": str(tmp_path), "world_size": 1, "global_rank": 0})()
    (tmp_path / "predictions").mkdir()
    writer.open(trainer)
    for start in range(400, 0, -50):  # descending: every batch holds lower ids than all before
        writer.add(trainer, Replay(), {"index": torch.arange(start, start + 50), "images": torch.rand(50, 1, 8, 8)})
        held = {pixels.untyped_storage().data_ptr(): pixels.untyped_storage().nbytes() for pixels in writer._pixels.values()}
        assert sum(held.values()) == 3 * 64
        assert not writer._written
    writer.close(trainer)
    grid, images = writer.merge(trainer, [writer.part(trainer, 0)])
    assert len(list(images.glob("*.png"))) == 400 and grid.name == "grid.png"
