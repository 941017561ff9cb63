"""Facts about the classifiers: their networks, augmentation and training."""

import lightning
import pytest
import torch
from distributed import RankPool
from torch.utils.data import DataLoader, TensorDataset

from datamodules import ZooDataModule
from zoo.metrics import FeatureClassifier, FeatureCNN, FeatureMLP
from zoo.metrics.feature_network import FeatureNetwork, random_affine


@pytest.mark.parametrize("network", [FeatureMLP(), FeatureCNN(channels=(8, 16), num_features=12)], ids=["mlp", "cnn"])
def test_logits_are_linear_in_the_features(network: FeatureNetwork) -> None:
    images = torch.rand(5, *network.image_shape, generator=torch.Generator().manual_seed(0))
    found = network(images)
    assert found.features.shape == (5, network.num_features)
    assert torch.allclose(found.logits, network.classify(found.features))
    with pytest.raises(ValueError, match=r"got \(3, 9, 9\)"):
        network(torch.zeros(2, 3, 9, 9))


def test_an_untouched_image_stays_and_a_mirrored_one_is_mirrored() -> None:
    images = torch.rand(4, 2, 7, 9, generator=torch.Generator().manual_seed(0))
    centre = torch.full((4, 5), 0.5)
    assert torch.allclose(random_affine(images, torch.rand(4, 5)), images, atol=1e-6)
    assert torch.allclose(random_affine(images, centre, rotation=30, shift=0.2, scale=0.3, flip=True), images, atol=1e-6)
    mirror = centre.clone()
    mirror[:, 4] = 0.0
    assert torch.allclose(random_affine(images, mirror, flip=True), images.flip(-1), atol=1e-6)


def test_shift_moves_by_whole_pixels_and_quarter_turns_turn() -> None:
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    right = torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.9]])
    moved = random_affine(images, right, shift=0.25)  # reads two pixels further to the right
    assert torch.allclose(moved[..., :6], images[..., 2:], atol=1e-6)
    assert torch.allclose(moved[..., 6:], torch.zeros(1, 1, 8, 2), atol=1e-6)
    turned = random_affine(images, torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.9]]), rotation=90)
    assert torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-5)  # counter-clockwise


def test_training_learns_and_holds_the_scale_of_the_features(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 3
    images = torch.rand(256, 1, 8, 8, generator=generator) * 0.2
    images[torch.arange(256), 0, labels] += 0.8  # the label is the bright row
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)
    lightning.seed_everything(0, verbose=False)
    model = FeatureClassifier(FeatureMLP(widths=[16], num_classes=3), shift=0.01, rotation=2.0)
    trainer = lightning.Trainer(
        max_epochs=40,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    (measures,) = trainer.test(model, loader, verbose=False)
    assert measures["test/accuracy"] > 0.99
    with torch.no_grad():
        assert 0.8 < model.network(images).features.square().mean() < 1.2
    (found,) = trainer.predict(model, DataLoader([{"index": 3, "image": images[3], "path": "a.png"}], batch_size=1))
    assert found["label"].tolist() == [labels[3]] and found["path"] == ["a.png"] and 0.5 < found["probability"] <= 1


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="number of classes must be at least 1, got 0"):
        FeatureMLP(num_classes=0)
    with pytest.raises(ValueError, match="`widths` must name at least one"):
        FeatureMLP(widths=[])
    with pytest.raises(ValueError, match="multiples of 8"):
        FeatureCNN(channels=(7,))


class SevenImages(ZooDataModule):
    """Of which two processes have four and three."""

    def val_dataloader(self):
        images = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return self.eval_loader(TensorDataset(images, torch.tensor([0, 1, 2, 0, 1, 2, 1])))

    test_dataloader = val_dataloader


def evaluate(folder, world_size: int) -> dict[str, float]:
    lightning.seed_everything(0, verbose=False)
    model = FeatureClassifier(FeatureMLP(widths=[16], num_classes=3))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SevenImages(batch_size=2)
    return {**trainer.validate(model, data, verbose=False)[0], **trainer.test(model, data, verbose=False)[0]}


def test_evaluations_of_processes_with_unequally_many_images_are_those_of_one(pool: RankPool, tmp_path) -> None:
    expected = evaluate(tmp_path, 1)
    assert expected.keys() == {"val/loss", "val/accuracy", "test/loss", "test/accuracy"}
    assert (7 * expected["val/accuracy"]) == pytest.approx(round(7 * expected["val/accuracy"]), abs=1e-5)
    assert expected["val/accuracy"] not in (0.0, 1.0)
    for found in pool.run(evaluate, tmp_path, 2, world_size=2, timeout=60.0):
        assert found == pytest.approx(expected, rel=1e-6)
