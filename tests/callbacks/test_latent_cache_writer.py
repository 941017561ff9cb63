"""Caches of latents: what was encoded is what is read, whatever the ranks, and whenever a run was killed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import RankError, RankPool
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from datamodules import CachedLatents, ZooDataModule
from zoo.emigm import LatentCacheWriter
from zoo.emigm.codecs import LatentCodec, PixelCodec
from zoo.emigm.latent_encoder import LatentEncoder

NUM = 11


def picture(index: int) -> Tensor:
    return torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(index))


class Shelf(Dataset[dict[str, Any]]):
    """Labelled pictures of three classes, as read from files."""

    read = 0

    def __init__(self, length: int, labelled: bool, step: int, name: str) -> None:
        self.length, self.labelled, self.step, self.name = length, labelled, step, name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        Shelf.read += 1
        index = place * self.step % self.length
        sample = {"index": index, "image": picture(index)}
        label = index * 3 // self.length
        return (
            {**sample, "label": label, "path": f"/data/{Photos.classes[label]}/{self.name.format(index)}"}
            if self.labelled
            else sample
        )


class Photos(ZooDataModule):
    """Pictures to be encoded."""

    classes = ("ant", "bee", "cat")

    def __init__(
        self, length: int = NUM, labelled: bool = True, step: int = 1, name: str = "{}.JPEG", unreadable: int = -1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.shelf = Shelf(length, labelled, step, name)
        self.unreadable = unreadable

    def predict_dataloader(self) -> Any:
        return self.eval_loader(self.shelf, lambda batch: default_collate([x for x in batch if x["index"] != self.unreadable]))


class Counting(LatentCodec):
    """Mean and log-variance by hand; counts what it encodes, and may be killed while it does."""

    image_shape = (1, 2, 4)
    latent_shape = (2, 1, 2)
    stride = 2
    scale = 0.5
    cache_kind = "moments"
    encoded = 0
    killed_after: int | None = None

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def moments(self, image_BCHW: Tensor) -> Tensor:
        Counting.encoded += len(image_BCHW)
        if Counting.killed_after is not None and Counting.encoded > Counting.killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        # A pixel of each 2 x 2 patch as mean, another one as log-variance.
        return torch.cat([image_BCHW[..., ::2, ::2], image_BCHW[..., 1::2, ::2]], dim=1).repeat_interleave(2, 1) + self.shift

    def from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments_BCHW[:, :2] * self.scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        raise NotImplementedError


def cache(
    folder: Path,
    *,
    codec: LatentCodec | None = None,
    data: ZooDataModule | None = None,
    flip: bool = True,
    devices: int = 1,
    limit: int | None = None,
    **options: Any,
) -> int:
    """Run `zoo predict`'s Trainer; returns how many images the codec was given."""
    Counting.encoded = Shelf.read = 0
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[LatentCacheWriter(folder, **{"shard_size": 3, **options})],
        limit_predict_batches=limit,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    kept = trainer.predict(LatentEncoder(codec or Counting(), flip), datamodule=data or Photos(batch_size=2))
    assert not kept  # the latents of a data set do not fit into memory
    return Counting.encoded


def cache_on_ranks(folder: Path, limit: int | None = None, **options: Any) -> int:
    return cache(folder, devices=2, limit=limit, **options)


def cache_until_killed(folder: Path, place: str, **options: Any) -> None:
    """Be killed by SIGKILL after eight images and their mirror images, or half way through writing the fifth array."""
    if place == "encoding":
        Counting.killed_after = 16
    else:
        for name in ("save", "savez"):
            setattr(np, name, killed_at_the_fifth_call(getattr(np, name)))
    cache(folder, **options)


def killed_at_the_fifth_call(save: Any) -> Any:
    calls = []

    def write(file: Any, *args: Any, **arrays: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(file, *args, **arrays)

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> dict[int, tuple[list[float], list[float], int]]:
    """Moments, those of the mirror image and label of each sample number in the shards."""
    found: dict[int, Any] = {}
    for shard in folder.glob("shard-*"):
        arrays = {path.stem: np.load(path) for path in shard.iterdir()}
        for row, index in enumerate(arrays["index"].tolist()):
            assert index not in found
            found[index] = tuple(arrays[name][row].tolist() for name in ("moments", "moments_flip", "labels"))
    return found


def expected(index: int) -> tuple[list[float], list[float], int]:
    codec, image = Counting(), picture(index)[None]
    return codec.moments(image)[0].tolist(), codec.moments(image.flip(-1))[0].tolist(), index * 3 // NUM


def test_shards_hold_each_sample_its_mirror_image_and_label(tmp_path: Path, capsys) -> None:
    assert cache(tmp_path) == 2 * NUM
    assert samples(tmp_path) == {index: expected(index) for index in range(NUM)}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["num_samples"] for shard in manifest["shards"]] == [3, 3, 3, 2]
    assert manifest["complete"] and manifest["num_samples"] == NUM and manifest["classes"] == ["ant", "bee", "cat"]
    assert (manifest["kind"], manifest["shape"], manifest["scale"]) == ("moments", [4, 1, 2], 0.5)
    assert "11 samples, complete" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["shards", "npz"])
def test_what_is_read_is_what_was_encoded(tmp_path: Path, layout) -> None:
    codec = PixelCodec((1, 2, 4))
    cache(tmp_path, codec=codec, layout=layout)
    data = CachedLatents(tmp_path, flip=False)
    assert data.latent_shape == (1, 2, 4) and data.num_classes == 3
    batch = data.latent_set("train").batch(list(range(NUM)))
    order = list(range(NUM)) if layout == "shards" else [0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9]  # by class and file name
    torch.testing.assert_close(batch["latents"], codec.encode(torch.stack([picture(index) for index in order])))
    assert batch["labels"].tolist() == [index * 3 // NUM for index in order]


def test_published_layout_has_the_published_names_and_arrays(tmp_path: Path) -> None:
    cache(tmp_path, layout="npz")
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npz")} == {
        f"{('ant', 'bee', 'cat')[index * 3 // NUM]}/{index}.JPEG.npz" for index in range(NUM)
    }
    with np.load(tmp_path / "bee" / "5.JPEG.npz") as arrays:
        assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
            "moments": ("float32", (4, 1, 2)),
            "moments_flip": ("float32", (4, 1, 2)),
        }
        assert (arrays["moments"].tolist(), arrays["moments_flip"].tolist(), 1) == expected(5)


@pytest.mark.parametrize("layout", ["shards", "npz"])
@pytest.mark.parametrize("place", ["encoding", "writing"])
def test_killed_run_is_continued_to_the_same_cache(tmp_path: Path, pool: RankPool, layout, place: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cache(whole, layout=layout)
    with pytest.raises(RankError, match="SIGKILL"):
        pool.run(cache_until_killed, killed, place, layout=layout, world_size=1)
    assert not json.loads((killed / "manifest.json").read_text())["complete"]
    with pytest.raises(ValueError, match="is not complete"):
        CachedLatents(killed).setup("fit")
    # Shards of three are written whole or not at all, and the fifth array is the first of the second shard.
    done = {"shards": {"encoding": 6, "writing": 3}, "npz": {"encoding": 8, "writing": 4}}[layout][place]
    assert cache(killed, layout=layout) == 2 * (NUM - done)
    assert contents(killed) == contents(whole)
    assert cache(killed, layout=layout) == 0  # and what is complete stays so
    assert contents(killed) == contents(whole)


def test_two_ranks_share_the_samples_out(tmp_path: Path, pool: RankPool) -> None:
    counts = pool.run(cache_on_ranks, tmp_path / "two", world_size=2)
    assert sum(counts) == 2 * NUM and min(counts) >= NUM - 1
    assert samples(tmp_path / "two") == {index: expected(index) for index in range(NUM)}
    # Another number of processes may continue.
    pool.run(cache_on_ranks, tmp_path / "mixed", 1, world_size=2)
    assert len(samples(tmp_path / "mixed")) == 4
    assert cache(tmp_path / "mixed") == 2 * (NUM - 4)
    assert samples(tmp_path / "mixed") == samples(tmp_path / "two")
    cache(tmp_path / "begun", limit=3)
    counts = pool.run(cache_on_ranks, tmp_path / "begun", world_size=2)
    assert sum(counts) == 2 * (NUM - 6)
    assert samples(tmp_path / "begun") == samples(tmp_path / "two")
    for name in ("two", "mixed", "begun"):
        batch = CachedLatents(tmp_path / name, flip=False, seed=0).latent_set("train").batch([7, 2])
        assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": Counting(shift=1.0)}, "other data or of another codec.*shift"),
        ({"codec": PixelCodec((1, 2, 4))}, "kind is moments, this run has latent"),
        ({"data": Photos(length=12, batch_size=2)}, "data_samples is 11, this run has 12"),
        ({"flip": False}, "flip is True, this run has False"),
        ({"layout": "npz"}, "layout is shards, this run has npz"),
        ({"dtype": "float16"}, "dtype is float32"),
    ],
)
def test_other_latents_in_the_same_folder_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    cache(tmp_path, limit=2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        cache(tmp_path, **options)
    assert contents(tmp_path) == before
    cache(tmp_path, data=Photos(batch_size=3, num_workers=0, seed=5), shard_size=4)  # how data are loaded does not matter


def test_what_is_before_the_first_missing_sample_is_not_read_again(tmp_path: Path) -> None:
    cache(tmp_path, limit=3)
    assert len(samples(tmp_path)) == 6
    cache(tmp_path, data=Photos(batch_size=4))
    assert Shelf.read == NUM - 4  # two of the batch of four that holds the seventh sample are read in vain
    assert samples(tmp_path) == {index: expected(index) for index in range(NUM)}
    other = tmp_path / "other"
    cache(other, data=Photos(step=5, batch_size=2), limit=1)  # the numbers 0, 5: nothing can be left out
    cache(other, data=Photos(step=5, batch_size=2), limit=4)
    assert Shelf.read == 8
    assert cache(other, data=Photos(step=5, batch_size=1)) == 2 * 3
    assert samples(other) == samples(tmp_path)


def test_order_that_is_not_that_of_the_numbers_is_noticed(tmp_path: Path) -> None:
    data = Photos(length=4, step=3, batch_size=2)  # the numbers 0, 3, 2, 1
    cache(tmp_path, data=data, limit=1)
    (tmp_path / "shard-0000-000000" / "index.npy").unlink()
    np.save(tmp_path / "shard-0000-000000" / "index.npy", np.array([0, 1]))  # as if another order had begun
    with pytest.raises(ValueError, match="in another order than it gives them"):
        cache(tmp_path, data=data)


@pytest.mark.parametrize("layout", ["shards", "npz"])
def test_pictures_that_the_data_leaves_out_are_counted(tmp_path: Path, capsys, layout) -> None:
    cache(tmp_path, data=Photos(unreadable=4, batch_size=2), layout=layout)
    assert "10 samples of 11 in the data (the others were not given: unreadable?), complete" in capsys.readouterr().out
    assert len(CachedLatents(tmp_path).latent_set("train")) == 10


def test_images_of_one_name_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 of 11 images have the file name of another one"):
        cache(tmp_path, data=Photos(name="same.png"), layout="npz")


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files, but no manifest\.json"):
        cache(tmp_path)


class NoEncoder(LightningModule):
    """Predicts something else."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""


def test_what_cannot_be_cached_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no labels"):
        cache(tmp_path / "a", data=Photos(labelled=False))
    with pytest.raises(ValueError, match="set flip of the encoder to true"):
        cache(tmp_path / "b", layout="npz", flip=False)
    with pytest.raises(ValueError, match="not finite in float16; set dtype: float32"):
        cache(tmp_path / "c", codec=Counting(shift=1e6), dtype="float16")
    with pytest.raises(ValueError, match="are the codec's weights damaged"):
        cache(tmp_path / "d", codec=Counting(shift=float("nan")))
    with pytest.raises(TypeError, match="not of NoEncoder"):
        Trainer(accelerator="cpu", callbacks=[LatentCacheWriter(tmp_path / "e")], logger=False, enable_progress_bar=False,
                enable_model_summary=False).predict(NoEncoder(), datamodule=Photos())  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "shard_size=0"),
        ({"layout": "zip"}, "layout='zip'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"layout": "npz", "dtype": "float16"}, "npz is float32"),
    ],
)
def test_impossible_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentCacheWriter(Path("cache"), **options)


def test_halves_are_read_as_float32(tmp_path: Path) -> None:
    codec = PixelCodec((1, 2, 4))
    cache(tmp_path, codec=codec, dtype="float16")
    latents = CachedLatents(tmp_path, flip=False).latent_set("train").batch(list(range(NUM)))["latents"]
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, codec.encode(torch.stack(list(map(picture, range(NUM))))), atol=1e-3, rtol=0)
