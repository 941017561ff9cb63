"""Writers: every sample once, in order, pixel by pixel, whatever the ranks, batches and interruptions."""

import json
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.callbacks import ImageGridWriter, JSONLWriter, TrajectoryWriter
from zoo.callbacks.picture import label_margin, tile_corner


def picture_of(index: int, step: int = 3) -> Tensor:
    """The image (3, 4, 4), uint8, that sample `index` shows at a time step."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=generator)


class Painter(lightning.LightningModule):
    """Predicts the picture of each sample id, a trajectory of four steps to it, and a caption."""

    def __init__(self, trajectory: bool = True, score: float = 0.5) -> None:
        super().__init__()
        self.trajectory, self.score = trajectory, score

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        index = batch["index"]
        found: dict[str, Any] = {
            "index": index,
            "images": torch.stack([picture_of(i) for i in index.tolist()]) / 255,
            "text": [f"sample {i}: “é”" for i in index.tolist()],
            "score": torch.full((len(index), 2), self.score),
        }
        if self.trajectory:
            found["trajectory"] = torch.stack([torch.stack([picture_of(i, t) for t in range(4)]) for i in index.tolist()]) / 255
        if "path" in batch:
            found["path"] = batch["path"]
        return found


class Ids(Dataset[dict[str, Any]]):
    """Sample ids, in any order, with file names if wanted."""

    def __init__(self, ids: list[int], paths: list[str] | None = None) -> None:
        self.ids, self.paths = ids, paths

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item: dict[str, Any] = {"index": self.ids[position]}
        return item if self.paths is None else {**item, "path": self.paths[position]}


def predict(folder: Path, callback: Callback, data: Dataset, *, model: Painter | None = None, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.predict(model or Painter(), DataLoader(data, batch_size=4), return_predictions=False)


def tiles(path: Path, count: int, columns: int, scale: int, labels: list[str]) -> list[np.ndarray]:
    pixels = np.asarray(Image.open(path))
    corners = [tile_corner(n, columns, 4, 4, scale, label_margin(labels)) for n in range(count)]
    return [pixels[top : top + 4 * scale : scale, left : left + 4 * scale : scale] for left, top in corners]


def as_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def test_grid_holds_the_first_samples_in_the_order_of_their_ids(tmp_path: Path, capsys) -> None:
    ids = list(range(20, 0, -1))
    predict(tmp_path, ImageGridWriter(num_images=6, columns=4, scale=3), Ids(ids))
    path = tmp_path / "predictions" / "grid.png"
    assert Image.open(path).text["index"] == "1 2 3 4 5 6"
    for index, tile in zip(range(1, 7), tiles(path, 6, 4, 3, ["1", "5"]), strict=True):
        assert np.array_equal(tile, as_array(picture_of(index)))
    assert str(path) in capsys.readouterr().out
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_single_files_are_all_written_and_pixel_exact(tmp_path: Path) -> None:
    predict(tmp_path, ImageGridWriter(num_images=2, single_files=True), Ids(list(range(11))))
    images = tmp_path / "predictions" / "images"
    assert sorted(p.name for p in images.iterdir()) == [f"{i:06d}.png" for i in range(11)]
    for i in range(11):
        assert np.array_equal(np.asarray(Image.open(images / f"{i:06d}.png")), as_array(picture_of(i)))


def test_results_of_the_users_images_keep_their_file_names(tmp_path: Path) -> None:
    predict(tmp_path, ImageGridWriter(), Ids([0, 1, 2], ["cat.png", "mine/dog.jpeg", "/somewhere/else/bird.png"]))
    images = tmp_path / "predictions" / "images"
    for i, name in enumerate(["cat.png", "dog.png", "bird.png"]):
        assert np.array_equal(np.asarray(Image.open(images / name)), as_array(picture_of(i)))
    with pytest.raises(ValueError, match=r"samples 0 and 1 would both be written to images/cat\.png"):
        predict(tmp_path, ImageGridWriter(), Ids([0, 1], ["cat.png", "/a/cat.jpg"]))


def test_single_files_of_an_earlier_run_are_neither_kept_nor_announced(tmp_path: Path, capsys) -> None:
    images = tmp_path / "predictions" / "images"
    predict(tmp_path, ImageGridWriter(single_files=True), Ids([0, 1, 2]))
    assert str(images) in capsys.readouterr().out
    predict(tmp_path, ImageGridWriter(), Ids([7], ["cat.png"]))
    assert [path.name for path in images.iterdir()] == ["cat.png"]
    capsys.readouterr()
    predict(tmp_path, ImageGridWriter(), Ids([0, 1, 2]))
    assert [path.name for path in images.parent.iterdir()] == ["grid.png"]
    assert str(images) not in capsys.readouterr().out


def test_trajectory_shows_the_steps_in_order_as_strip_and_animation(tmp_path: Path) -> None:
    predict(tmp_path, TrajectoryWriter(num_samples=2, num_frames=3, scale=2), Ids([5, 3, 9]))
    path = tmp_path / "predictions" / "trajectory.png"
    found = tiles(path, 6, 3, 2, ["3", "5"])
    expected = [picture_of(index, step) for index in (3, 5) for step in (0, 2, 3)]
    for tile, image in zip(found, expected, strict=True):
        assert np.array_equal(tile, as_array(image))
    animation = Image.open(path.with_suffix(".gif"))
    assert animation.n_frames == 4
    assert animation.size[0] > animation.size[1]


def test_grey_animations_are_pixel_exact(tmp_path: Path) -> None:
    class Grey(Painter):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            found = super().predict_step(batch, batch_idx)
            return {**found, "trajectory": found["trajectory"][:, :, :1]}

    predict(tmp_path, TrajectoryWriter(num_samples=1, scale=1), Ids([2]), model=Grey())
    animation = Image.open(tmp_path / "predictions" / "trajectory.gif")
    for step in range(4):
        animation.seek(step)
        left, top = tile_corner(0, 1, 4, 4, 1)
        pixels = np.asarray(animation.convert("L"))[top : top + 4, left : left + 4]
        assert np.array_equal(pixels, picture_of(2, step)[0].numpy())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_lines_hold_every_sample_once_in_order_without_pictures(tmp_path: Path) -> None:
    predict(tmp_path, JSONLWriter(), Ids([7, 2, 9, 4, 0, 11]))
    found = read_lines(tmp_path / "predictions" / "predictions.jsonl")
    assert [row["index"] for row in found] == [0, 2, 4, 7, 9, 11]
    assert found[1] == {"index": 2, "text": "sample 2: “é”", "score": [0.5, 0.5]}


def _predict_on_ranks(folder: str) -> None:
    for callback in (ImageGridWriter(num_images=5, columns=5, scale=1, single_files=True), JSONLWriter()):
        predict(Path(folder), callback, Ids(list(range(13))), devices=2, strategy="ddp")


def test_two_ranks_write_what_one_writes(tmp_path: Path, pool) -> None:
    pool.run(_predict_on_ranks, str(tmp_path / "two"), world_size=2)
    one, two = tmp_path / "one", tmp_path / "two"
    predict(one, JSONLWriter(), Ids(list(range(13))))
    predict(one, ImageGridWriter(num_images=5, columns=5, scale=1, single_files=True), Ids(list(range(13))))
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(two)) for p in two.rglob("*") if p.is_file())
    assert len(names) == 15
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


class Ranks:
    """Stands for a trainer of several ranks that write to one folder, one after another."""

    def __init__(self, folder: Path, world_size: int, rank: int) -> None:
        self.default_root_dir, self.world_size, self.global_rank = str(folder), world_size, rank


def write_parts(writer: JSONLWriter, folder: Path, shares: list[list[int]]) -> None:
    (folder / "predictions").mkdir(exist_ok=True)
    for rank, share in enumerate(shares):
        trainer: Any = Ranks(folder, len(shares), rank)
        writer.open(trainer)
        for index in share:
            writer.add(trainer, Painter(), {"index": torch.tensor([index]), "text": [f"{index}"]})
        writer.close(trainer)


@pytest.mark.parametrize("shares", [[[0, 2, 4, 5], [1, 3, 5, 0]], [[3], [], [1, 0, 2, 4, 5]]])
def test_parts_with_padding_or_no_sample_at_all_merge_to_every_sample_once(tmp_path: Path, shares: list[list[int]]) -> None:
    writer = JSONLWriter("all.jsonl")
    write_parts(writer, tmp_path, shares)
    trainer: Any = Ranks(tmp_path, len(shares), 0)
    (path,) = writer.merge(trainer, [writer.part(trainer, rank) for rank in range(len(shares))])
    assert read_lines(path) == [{"index": i, "text": f"{i}"} for i in range(6)]


def test_an_interrupted_run_leaves_the_earlier_file_and_no_stale_part(tmp_path: Path) -> None:
    predict(tmp_path, JSONLWriter(), Ids([0, 1]))
    path = tmp_path / "predictions" / "predictions.jsonl"
    before = path.read_bytes()

    class Breaks(Painter):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            if batch_idx == 1:
                raise RuntimeError("power cut")
            return super().predict_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="power cut"):
        predict(tmp_path, JSONLWriter(), Ids(list(range(8))), model=Breaks())
    assert path.read_bytes() == before
    predict(tmp_path, JSONLWriter(), Ids([5]))
    assert [row["index"] for row in read_lines(path)] == [5]
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]


def test_predictions_that_cannot_be_written_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'Painter to return "trajectory".*switch it on'):
        predict(tmp_path, TrajectoryWriter(), Ids([0]), model=Painter(trajectory=False))
    with pytest.raises(ValueError, match=r"sample 3 cannot be written as JSON: Out of range"):
        predict(tmp_path, JSONLWriter(), Ids([3]), model=Painter(score=float("nan")))

    class Wrong(Painter):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            return {"images": torch.zeros(1, 1, 4, 4)}

    with pytest.raises(TypeError, match=r'Wrong to return a dictionary with the sample ids as "index", got \[\'images\'\]'):
        predict(tmp_path, ImageGridWriter(), Ids([0]), model=Wrong())

    class Short(Painter):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            return {"index": batch["index"], "text": ["only one"]}

    with pytest.raises(ValueError, match='"text" must hold one value for each of 2 samples, got 1 values'):
        predict(tmp_path, JSONLWriter(), Ids([0, 1]), model=Short())


def test_bad_options_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="must be a plain file name"):
        JSONLWriter("../predictions.jsonl")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        TrajectoryWriter("way.gif")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ImageGridWriter(num_images=0)
    with pytest.raises(ValueError, match="columns and scale must be at least 1, got 0"):
        ImageGridWriter(columns=0)
