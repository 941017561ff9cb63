"""The classes of what predict draws: cycled over sample numbers, refused where there is no such class."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import CIFAR10, Digits, ImageFolder
from zoo.base.hyperparameters import build
from zoo.bfn import BFN


def batches(data) -> list[dict]:
    data.setup("predict")
    return list(data.predict_dataloader())


def test_labels_are_cycled_over_the_sample_numbers():
    drawn = batches(Digits(predict_samples=7, batch_size=3, predict_labels=[4, 0, 9, 9]))
    assert [batch["index"].tolist() for batch in drawn] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch["label"].tolist() for batch in drawn] == [[4, 0, 9], [9, 4, 0], [9]]
    assert all(batch["label"].dtype == torch.int64 for batch in drawn)
    (one,) = batches(Digits(predict_samples=3, predict_labels=0))
    assert one["label"].tolist() == [0, 0, 0]


def write_pictures(folder: Path, count: int, size: int = 8) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((size, size), 10 * number, np.uint8)).save(folder / f"{number}.png")
    return folder


def test_the_user_s_pictures_carry_labels_too(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 3)
    (labelled,) = batches(Digits(predict_images=pictures, predict_labels=[7, 2]))
    (plain,) = batches(Digits(predict_images=pictures))
    assert labelled.pop("label").tolist() == [7, 2, 7]
    assert labelled.keys() == plain.keys() == {"index", "image", "mask", "path"}
    assert labelled["path"] == plain["path"]
    assert all(torch.equal(labelled[name], plain[name]) for name in ("index", "image", "mask"))
    write_pictures(tmp_path / "train" / "a", 1)
    write_pictures(tmp_path / "train" / "b", 1)
    (batch,) = batches(ImageFolder(tmp_path, image_size=8, predict_images=pictures, predict_labels=1))
    assert (batch["label"].tolist(), batch["image"].shape) == ([1, 1, 1], (3, 3, 8, 8))


def test_without_labels_nothing_changes():
    (batch,) = batches(Digits(predict_samples=2))
    assert batch.keys() == {"index"}


@pytest.mark.parametrize("label", [-1, 10])
def test_a_class_that_there_is_not_is_refused_before_the_run(label, tmp_path):
    for data in (Digits(predict_labels=[3, label]), CIFAR10(root=tmp_path, predict_labels=label)):
        with pytest.raises(ValueError, match=rf"predict_labels holds {label}, and the classes of \w+ are 0 to 9"):
            data.setup("predict")
    with pytest.raises(ValueError, match="predict_labels is an empty list"):
        Digits(predict_labels=[])
    write_pictures(tmp_path / "train" / "a", 1)
    with pytest.raises(ValueError, match="predict_labels holds 1, and the classes of ImageFolder are 0 to 0"):
        ImageFolder(tmp_path, predict_labels=1).setup("predict")


def test_labels_are_stored_as_plain_data():
    data = build(Digits, {"class_path": "datamodules.Digits", "init_args": {"predict_labels": [1, 2]}})
    assert data.hparams["predict_labels"] == [1, 2]
    assert build(Digits, {"class_path": "datamodules.Digits", "init_args": {"predict_labels": 5}}).predict_labels == [5]
    assert Digits().hparams["predict_labels"] is None


def test_a_model_without_classes_takes_no_notice(tmp_path):
    bfn = BFN.from_pretrained("bfn-digits")
    for options in ({"predict_samples": 2}, {"predict_images": write_pictures(tmp_path / "pictures", 2)}):
        (plain,), (labelled,) = batches(Digits(**options)), batches(Digits(predict_labels=[1, 2], **options))
        with torch.no_grad():
            expected, found = bfn.predict_step(plain, 0), bfn.predict_step(labelled, 0)
        assert found.keys() == expected.keys()
        assert torch.equal(found["images"], expected["images"])
