"""The shipped feature extractors: how well they classify what they never saw, and the floor of the distances they give.

``python -m benchmarks.feature_extractors`` judges the weights that come with the package. With ``--train`` it first
trains them anew from ``configs/metrics/*.yaml`` and puts them in their place, with accuracy and origin in ``config.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.record import Record, command
from benchmarks.tables import Table
from datamodules import MNIST, Digits, FashionMNIST, ImageDataModule
from zoo.base.samples import to_uint8
from zoo.cli.command import ZooCLI
from zoo.metrics import NUM_SAMPLES, SHIPPED_EXTRACTORS, classifier_agreement, load_classifier, real_data_floor
from zoo.metrics.extractors import WEIGHTS_FOLDER

DATA: dict[str, type[ImageDataModule]] = {"fd_digits_mlp": Digits, "fd_mnist_cnn": MNIST, "fd_fashion_cnn": FashionMNIST}


def train(name: str, folder: Path) -> None:
    """Train an extractor as ``zoo fit -c metrics/<name>`` does, and ship it."""
    cli = ZooCLI(["fit", "-c", f"metrics/{name}", "--trainer.default_root_dir", str(folder)])
    cli.model.save_pretrained(WEIGHTS_FOLDER / name)


def held_out(name: str) -> tuple[torch.Tensor, torch.Tensor, ImageDataModule]:
    """Test images (N, C, H, W) uint8 and labels of an extractor's data set, none of which it was trained on."""
    data = DATA[name]()
    data.prepare_data()
    data.setup("test")
    images, labels = zip(*data.test_dataloader(), strict=True)
    return to_uint8(torch.cat(images)), torch.cat(labels), data


def judge(name: str, record: Record) -> float:
    """Add the row of an extractor and return its test accuracy."""
    images, labels, data = held_out(name)
    network = load_classifier(name)
    seen = classifier_agreement(images, name, labels)
    reference = data.reference_images()
    with torch.no_grad():
        features = torch.cat([network(batch / 255).features for batch in reference.split(1000)])
    floor = real_data_floor(reference, name, NUM_SAMPLES)
    assert seen.accuracy is not None
    record.row(
        extractor=name,
        data=type(data).__name__,
        features=network.num_features,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        test_images=len(images),
        test_accuracy=seen.accuracy,
        mean_max_probability=seen.mean_max_probability,
        feature_mean_square=features.square().mean().item(),
        floor_images=floor.num_samples,
        floor_reference=floor.num_reference,
        frechet_floor=floor.frechet_distance,
        kernel_floor=floor.kernel_distance,
    )
    return seen.accuracy


def describe(name: str, accuracy: float, test_images: int) -> None:
    """Write accuracy and origin of newly trained weights into their ``config.json``."""
    path = WEIGHTS_FOLDER / name / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "_description": f"Feature extractor for {DATA[name].__name__}: {100 * accuracy:.2f} % of {test_images} held-out images",
        "_data": DATA[name].__name__,
        "_seed": 0,
        "_command": command(),
        "_test_images": test_images,
        "_test_accuracy": accuracy,
    }
    path.write_text(json.dumps(config, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feature_extractors", description=__doc__)
    parser.add_argument("--train", action="store_true", help="train the weights anew and ship them")
    parser.add_argument("--only", choices=SHIPPED_EXTRACTORS, action="append", help="a trial with some of the extractors")
    options = parser.parse_args(arguments)
    columns = ["test_images", "test_accuracy", "mean_max_probability", "features", "parameters"]
    record = Record(
        "feature_extractors",
        seeds=[0],
        tables=[
            Table("Classifiers on images they never saw", "extractor", columns, digits=4),
            Table("Floor: real images against real images", "extractor",
                  ["floor_images", "floor_reference", "frechet_floor", "kernel_floor"], digits=4),
        ],
        smoke=bool(options.only),
    )  # fmt: skip
    for name in options.only or SHIPPED_EXTRACTORS:
        if options.train:
            with tempfile.TemporaryDirectory() as folder:
                train(name, Path(folder))
        accuracy = judge(name, record)
        if options.train:
            describe(name, accuracy, int(str(record.rows[-1]["test_images"])))
    return record.save()


if __name__ == "__main__":
    main()
