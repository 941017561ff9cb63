"""Folders of shards are read without running what a file holds, and genuine ones are read as torch reads them."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from strategies.paro.checkpoint import read_sharded
from zoo.__main__ import main
from zoo.base.shard_reader import ShardReader, check_folder


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.made,)


class Plain:
    """An object of a class that is not torch's."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as FSDP and ModelParallel write it: tensors, and numbers of the optimizer beside them."""
    state = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "optimizer_0": {"lr": 0.1, "betas": (0.9, 0.95)}}
    dcp.save(state, checkpoint_id=tmp_path / "folder", no_dist=True)
    torch.save({"paro_units": [], "paro_numbers": {}, "state_dict": {}, "epoch": 3}, tmp_path / "folder" / "meta.pt")
    return tmp_path / "folder"


def test_genuine_checkpoints_are_read(folder: Path) -> None:
    check_folder(folder)
    state: dict[str, Any] = {"model": {"weight": torch.zeros(2, 3)}}
    dcp.load(state, storage_reader=ShardReader(folder), no_dist=True)
    torch.testing.assert_close(state["model"]["weight"], torch.arange(6.0).view(2, 3))
    assert read_sharded(folder)["epoch"] == 3


def plant_metadata(folder: Path, harmful: Any) -> str:
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=harmful)))
    return ".metadata"


def plant_metadata_of_a_rank(folder: Path, harmful: Any) -> str:
    """torch falls back to it where the common one is missing."""
    (folder / ".metadata").unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(harmful))
    return "__0.metadata"


def plant_entry(folder: Path, harmful: Any) -> str:
    """An entry that is not a tensor, which torch unpickles."""
    metadata = ShardReader(folder).read_metadata()
    metadata.state_dict_metadata["model.weight"] = BytesStorageMetadata()
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "model.weight")
    torch.save(harmful, folder / "entry")
    place.relative_path, place.offset, place.length = "entry", 0, (folder / "entry").stat().st_size
    metadata.storage_data = {MetadataIndex("model.weight"): place}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return ".metadata"


def plant_meta(folder: Path, harmful: Any) -> str:
    torch.save({"paro_units": harmful}, folder / "meta.pt")
    return "meta.pt"


def plant_shard_of_deepspeed(folder: Path, harmful: Any) -> str:
    (folder / "checkpoint").mkdir()
    torch.save({"module": harmful}, folder / "checkpoint" / "mp_rank_00_model_states.pt")
    return "mp_rank_00_model_states.pt"


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PLANTS = [plant_metadata, plant_metadata_of_a_rank, plant_entry, plant_meta, plant_shard_of_deepspeed]


@pytest.mark.parametrize("plant", PLANTS)
def test_what_could_run_code_is_refused_and_not_run(folder: Path, plant: Callable[[Path, Any], str]) -> None:
    made = folder.parent / "made"
    name = plant(folder, Harmful(made))
    readers = [check_folder]
    if plant in (plant_metadata, plant_entry, plant_meta):
        readers.append(read_sharded)
    for read in readers:
        with pytest.raises(ValueError, match=rf"{name}.*could run code when loaded") as refusal:
            read(folder)
        assert len(str(refusal.value)) - len(str(folder)) < 300
    assert not made.exists()


def test_other_classes_and_damaged_metadata_are_refused(folder: Path) -> None:
    plant_metadata(folder, Plain())
    with pytest.raises(ValueError, match=r"it names .*test_shard_reader\.Plain"):
        check_folder(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04}q\x00U")
    with pytest.raises(ValueError, match="is damaged or of another format"):
        read_sharded(folder)


def test_objects_of_deepspeed_are_admitted_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("deepspeed.runtime.fp16.loss_scaler")
    module.LossScaler = type("LossScaler", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    scaler = module.LossScaler()
    scaler.cur_scale = 1.0
    (tmp_path / "checkpoint").mkdir()
    torch.save({"loss_scaler": scaler}, tmp_path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("checkpoint")
    check_folder(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match="names a folder outside of the checkpoint"):
        check_folder(tmp_path)


def test_the_command_line_refuses_such_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_metadata(folder, Harmful(folder.parent / "made"))
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["fit", "-c", "bfn/digits", "--ckpt_path", str(folder)]) == 2
    assert ".metadata was refused" in capsys.readouterr().err
    assert not (folder.parent / "made").exists()
