"""Cached latents: what is drawn from them, in which order, from which layout; and caches that do not fit."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import CachedLatents


def shards(
    root: Path, moments: np.ndarray, mirrored: np.ndarray, labels: list[int], order: list[list[int]], **manifest: Any
) -> Path:
    """Write a cache by hand; `order` says which samples stand in each shard."""
    root.mkdir(exist_ok=True)
    for number, rows in enumerate(order):
        folder = root / f"shard-0000-{number:06d}"
        folder.mkdir()
        arrays = {"moments": moments[rows], "moments_flip": mirrored[rows], "labels": np.array(labels)[rows], "index": rows}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
    listed = [{"name": f"shard-0000-{number:06d}", "num_samples": len(rows)} for number, rows in enumerate(order)]
    found = {"layout": "shards", "kind": "latent", "shape": list(moments.shape[1:]), "scale": 1.0, "flip": True,
             "complete": True, "num_samples": len(moments), "data_samples": len(moments), "classes": None,
             "shards": listed, **manifest}  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(found))
    return root


def files(root: Path, samples: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    for name, (moments, mirrored) in samples.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(root / f"{name}.npz", moments=moments, moments_flip=mirrored)
    return root


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Twenty latents that are their number, mirrored its negative minus a half, in shards in no order."""
    numbers = np.arange(20, dtype=np.float32).reshape(-1, 1, 1, 1).repeat(4, axis=2)
    order = [[5, 19, 3], [0, 1, 2, 4, 6, 7, 8], [18, 17, 16, 15, 14, 13, 12, 11, 10, 9]]
    return shards(tmp_path / "numbered", numbers, -numbers - 0.5, [number % 4 for number in range(20)], order)


def all_of(data: CachedLatents, epoch: int = 0) -> dict[str, Tensor]:
    found = data.latent_set("train")
    found.set_epoch(epoch)
    return found.batch(list(range(len(found))))


def test_samples_come_in_the_order_of_their_numbers(numbered: Path) -> None:
    batch = all_of(CachedLatents(numbered, flip=False))
    assert batch["latents"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    assert batch["latents"].shape == (20, 1, 4, 1) and batch["latents"][:, 0, 2, 0].tolist() == list(range(20))
    assert batch["labels"].tolist() == [number % 4 for number in range(20)]


def test_mirror_image_is_taken_in_half_of_the_epochs(numbered: Path) -> None:
    data = CachedLatents(numbered)
    mirrored = torch.stack([all_of(data, epoch)["latents"][:, 0, 0, 0] < 0 for epoch in range(500)]).float()
    assert abs(mirrored.mean().item() - 0.5) < 5 * 0.5 / 10_000**0.5
    assert ((mirrored.mean(0) - 0.5).abs() < 5 * 0.5 / 500**0.5).all()  # of each sample
    assert (torch.corrcoef(mirrored.T) - torch.eye(20)).abs().max() < 5 / 500**0.5  # one regardless of another


def test_posterior_has_the_stored_mean_and_standard_deviation(tmp_path: Path) -> None:
    mean, log_variance = np.float32([[[1.0, -2.0]]]), np.float32([[[0.5, -3.0]]])
    moments = np.concatenate([mean, log_variance])[None].repeat(200, axis=0)
    root = shards(tmp_path, moments, moments, [0] * 200, [list(range(200))], kind="moments", scale=0.2325)
    data = CachedLatents(root)
    drawn = torch.cat([all_of(data, epoch)["latents"] for epoch in range(100)])
    std = torch.from_numpy(np.exp(log_variance / 2)) * 0.2325
    assert ((drawn.mean(0) - torch.from_numpy(mean) * 0.2325).abs() < 5 * std / 20_000**0.5).all()
    torch.testing.assert_close(drawn.std(0), std, rtol=0.03, atol=0)
    correlation = torch.corrcoef(drawn.flatten(1).T)[0, 1]
    assert correlation.abs() < 5 / 20_000**0.5
    assert data.latent_shape == (1, 1, 2)
    assert data.latent_scale == 0.2325
    wider = CachedLatents(root, scale=1.0)
    assert wider.latent_scale == 1.0
    torch.testing.assert_close(all_of(wider)["latents"] * 0.2325, all_of(data)["latents"])


@pytest.mark.parametrize(("log_variance", "limit"), [(99.0, 20.0), (-99.0, -30.0)])
def test_log_variance_is_limited(tmp_path: Path, log_variance: float, limit: float) -> None:
    pair = [np.float32([0, value]).reshape(1, 2, 1, 1).repeat(4, axis=0) for value in (log_variance, limit)]
    found = [
        all_of(CachedLatents(shards(tmp_path / str(n), moments, moments, [0] * 4, [[0, 1, 2, 3]], kind="moments")))["latents"]
        for n, moments in enumerate(pair)
    ]
    assert torch.equal(*found) and found[0].abs().min() > 0


def test_draws_depend_on_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    moments = np.zeros((40, 2, 2, 2), np.float32)
    root = shards(tmp_path, moments, moments, [0, 1] * 20, [list(range(40))], kind="moments")

    def epoch_of(batch_size: int, num_workers: int, seed: int = 1, epoch: int = 3) -> Tensor:
        data = CachedLatents(root, batch_size=batch_size, num_workers=num_workers, seed=seed)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch["latents"] for batch in loader])

    one = epoch_of(8, 0)
    assert torch.equal(epoch_of(8, 2), one) and torch.equal(epoch_of(4, 0), one)
    for other in (epoch_of(8, 0, seed=2), epoch_of(8, 0, epoch=4)):
        assert not torch.isin(other, one).any()  # neither the same nor the same in another order
    assert one.flatten().unique().numel() == one.numel()
    found = CachedLatents(root, seed=1).latent_set("train")
    assert torch.equal(found.batch([7, 3])["latents"][0], found[7]["latents"])


def test_held_out_samples_are_drawn_the_same_at_each_look(numbered: Path) -> None:
    data = CachedLatents(numbered, val_fraction=0.2, batch_size=3)
    (held_out,) = {tuple(torch.cat([batch["latents"] for batch in data.val_dataloader()])[:, 0, 0, 0].tolist()) for _ in range(3)}
    train, val = data.latent_set("train"), data.latent_set("val")
    assert sorted(train.indices.tolist() + val.indices.tolist()) == list(range(20))
    assert list(held_out) == val.indices.tolist() and sorted(index % 4 for index in held_out) == [0, 1, 2, 3]
    assert len(list(data.test_dataloader())) == 2
    assert CachedLatents(numbered).val_dataloader() == []
    with pytest.raises(ValueError, match="set val_fraction"):
        CachedLatents(numbered).test_dataloader()


@pytest.mark.parametrize("kind", ["moments", "latent"])
def test_published_caches_have_labels_in_the_order_of_their_folders(tmp_path: Path, kind) -> None:
    rng = np.random.default_rng(0)
    names = ["n02/b.JPEG", "n01/z.JPEG", "n10/a.JPEG", "n01/a.JPEG"]
    arrays = {name: rng.normal(size=(2, 32, 16, 16)).astype(np.float32) for name in names}
    for pair in arrays.values():
        pair[:, 16:] -= 100  # no noise: the stored mean can be recognised
    root = files(tmp_path, {name: (pair[0], pair[1]) for name, pair in arrays.items()})
    (root / ".cache").mkdir()
    data = CachedLatents(root, kind=kind, flip=False)
    batch = all_of(data)
    assert batch["labels"].tolist() == [0, 0, 1, 2] and data.num_classes == 3
    stored = torch.from_numpy(np.stack([arrays[name][0] for name in sorted(names)]))
    assert data.latent_shape == ((16, 16, 16) if kind == "moments" else (32, 16, 16))
    expected = stored[:, :16] * 0.2325 if kind == "moments" else stored  # scaled already
    torch.testing.assert_close(batch["latents"], expected, atol=1e-6, rtol=0)
    assert data.latent_scale == (0.2325 if kind == "moments" else None)
    flipped = CachedLatents(root, kind=kind)
    drawn = torch.stack([all_of(flipped, epoch)["latents"] for epoch in range(20)])
    assert 20 < sum(torch.allclose(a, b, atol=1e-6) for row in drawn for a, b in zip(row, expected, strict=True)) < 60


def test_published_caches_do_not_tell_what_they_hold(tmp_path: Path) -> None:
    files(tmp_path, {"a/1.png": (np.zeros((32, 16, 16)), np.zeros((32, 16, 16)))})
    with pytest.raises(ValueError, match=r"\(32, 16, 16\) are: set kind to moments .* or to latent"):
        CachedLatents(tmp_path).setup("fit")


def test_sample_that_two_shards_hold_counts_once(tmp_path: Path) -> None:
    numbers = np.arange(4, dtype=np.float32).reshape(-1, 1, 1, 1)
    root = shards(tmp_path, numbers, numbers, [0] * 4, [[0, 2, 1], [3, 0]])
    assert all_of(CachedLatents(root))["latents"].flatten().tolist() == [0, 1, 2, 3]


def test_workers_are_not_sent_what_is_mapped(tmp_path: Path) -> None:
    moments = np.zeros((4, 8, 64, 64), np.float32)
    found = CachedLatents(shards(tmp_path, moments, moments, [0] * 4, [[0, 1], [2, 3]])).latent_set("train")
    before = found.batch([0, 1, 2, 3])["latents"]
    assert len(pickle.dumps(found)) < 20_000 < moments.nbytes
    assert torch.equal(copy.deepcopy(found).batch([0, 1, 2, 3])["latents"], before)


def test_predict_draws_sample_numbers_without_a_cache(tmp_path: Path) -> None:
    data = CachedLatents(tmp_path / "nowhere", predict_samples=5, batch_size=2)
    data.setup("predict")
    chosen = CachedLatents(tmp_path / "nowhere", predict_samples=5, predict_labels=[7, 2], batch_size=5)
    assert next(iter(chosen.predict_dataloader()))["label"].tolist() == [7, 2, 7, 2, 7]
    assert data.num_classes is None and data.latent_scale is None
    assert [batch["index"].tolist() for batch in data.predict_dataloader()] == [[0, 1], [2, 3], [4]]


def broken(root: Path, how: str) -> None:
    moments, shard = np.zeros((4, 3, 2, 2), np.float32), root / "shard-0000-000000"
    if how == "nothing":
        root.mkdir()
    elif how == "no files":
        (root / "class").mkdir(parents=True)
    elif how in ("text", "one array", "other shape", "flat"):
        files(root, {"a/1": (moments[0], moments[0])})
        if how == "text":
            (root / "a/2.npz").write_bytes((root / "a/1.npz").read_bytes()[:-40])
        elif how == "one array":
            np.savez(root / "a/2.npz", latents=moments[0])
        elif how == "other shape":
            files(root, {"a/2": (moments[0, :1], moments[0, :1])})
        else:
            files(root, {"a/1": (moments[0, 0], moments[0, 0])})
    elif how != "absent":
        shards(root, moments, moments, [0] * 4, [[0, 1, 2, 3]])
        if how == "cut short":
            (shard / "moments.npy").write_bytes((shard / "moments.npy").read_bytes()[:-8])
        elif how == "array missing":
            (shard / "labels.npy").unlink()
        elif how == "manifest missing":
            (root / "manifest.json").unlink()
        else:
            change = {"incomplete": {"complete": False}, "kind": {"kind": "pixels"}, "entry": {"scale": None},
                      "count": {"num_samples": 5}, "odd": {"kind": "moments"}, "shape": {"shape": [4, 2, 2]}}[how]  # fmt: skip
            manifest = json.loads((root / "manifest.json").read_text())
            (root / "manifest.json").write_text(json.dumps({**manifest, **change}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "root=.* does not exist"),
        ("nothing", "holds no latents: give a folder with manifest"),
        ("no files", "holds no latents"),
        ("text", r"a/2\.npz is damaged"),
        ("one array", r"a/2\.npz holds no array moments"),
        ("other shape", r"a/2\.npz holds an array of shape \(1, 2, 2\) instead of \(3, 2, 2\)"),
        ("flat", r"shape \(2, 2\) instead of \(channels, height, width\)"),
        ("cut short", r"moments\.npy is damaged"),
        ("array missing", r"labels\.npy of the cache is missing"),
        ("manifest missing", r"its manifest\.json is missing"),
        ("incomplete", r"is not complete \(4 of 4 samples\): continue"),
        ("kind", "stores kind='pixels'"),
        ("entry", r"manifest\.json is damaged"),
        ("count", "holds 4 samples, but its manifest.json says 5"),
        ("odd", r"\(3, 2, 2\): moments have an even number of channels"),
        ("shape", r"moments\.npy holds samples of shape \(3, 2, 2\) instead of \(4, 2, 2\)"),
    ],
)
def test_caches_that_do_not_fit_are_named(tmp_path: Path, how: str, message: str) -> None:
    broken(tmp_path / "cache", how)
    listed = how in ("text", "one array", "other shape", "flat")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        all_of(CachedLatents(tmp_path / "cache", kind="latent" if listed else "auto", flip=False))


def test_kind_that_the_manifest_denies_is_refused(numbered: Path) -> None:
    with pytest.raises(ValueError, match=r"stores kind='latent'.* not kind='moments'"):
        CachedLatents(numbered, kind="moments").setup("fit")
    with pytest.raises(ValueError, match=r"scaled by 1\.0 already, so scale=0\.5 cannot be"):
        CachedLatents(numbered, scale=0.5).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "both"}, "kind='both'"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"predict_samples": 0}, "predict_samples=0"),
        ({"predict_labels": []}, r"predict_labels=\[\]"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CachedLatents(Path("cache"), **arguments)
