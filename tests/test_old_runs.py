"""Runs and checkpoints written before packages were divided into rooms are continued and loaded.

``data/old_run`` was written by commit 180a222: two steps of a tiny Ling with `RouterMonitor`, which was in `zoo.callbacks` then.
"""

import shutil
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningDataModule

import zoo
from zoo.__main__ import main
from zoo.base.checkpoint import read_checkpoint
from zoo.base.hyperparameters import find_class

OLD = Path(__file__).parent / "data" / "old_run"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The run's folder, in the current folder, with the text that it read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))
    Path("texts.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    folder = Path("runs/old")
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD / "config.yaml", folder)
    shutil.copy(OLD / "last.ckpt", folder / "checkpoints")
    return folder


def test_an_old_run_is_continued(run):
    assert main(["fit", "-c", "runs/old/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3"]) == 0
    before, after = read_checkpoint(OLD / "last.ckpt"), read_checkpoint(run / "checkpoints/last.ckpt")
    assert (before["global_step"], after["global_step"]) == (2, 3)
    assert before["callbacks"].keys() <= after["callbacks"].keys() and before["state_dict"].keys() == after["state_dict"].keys()
    model = zoo.ZooModule.load_from_checkpoint(OLD / "last.ckpt")
    assert type(model).__name__ == "Ling" and model.applied_steps == 2


@pytest.mark.parametrize(
    ("old", "new", "base"),
    [
        ("zoo.callbacks.RouterMonitor", "zoo.ling", Callback),
        ("zoo.callbacks.LatentCacheWriter", "zoo.emigm", Callback),
        ("zoo.callbacks.data_statistics.DataStatisticsWriter", "zoo.bfn", Callback),
        ("datamodules.image_folder.ImageNet", "datamodules", LightningDataModule),
        ("datamodules.images.Digits", "datamodules", LightningDataModule),
    ],
)
def test_classes_are_found_by_the_paths_that_they_had(old, new, base):
    name = old.rpartition(".")[2]
    assert find_class(old, base) is find_class(f"{new}.{name}", base)
    with pytest.raises(ValueError, match="is not known here"):
        find_class(f"{new}.{name}s", base)
