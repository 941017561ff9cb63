"""Image data sets: official formats read as they are, fixed splits, and bad files named."""

import gzip
import io
import os
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules import CIFAR10, MNIST, Digits, FashionMNIST, ImageDataModule, ZooDataModule
from datamodules.images.in_memory import stratified_split
from zoo.base.hyperparameters import build, class_path


def row_set(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80).map(torch.tensor),
    share=st.floats(0, 0.5),
)
def test_a_split_is_a_partition_with_the_same_share_of_each_class(labels, share):
    held_out_size = int(share * len(labels))
    kept, held_out = stratified_split(labels, held_out_size)
    assert len(held_out) == held_out_size
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(len(labels)))
    exact = labels.bincount(minlength=5) * held_out_size / len(labels)
    assert (labels[held_out].bincount(minlength=5) - exact).abs().max() <= 1


@pytest.mark.parametrize(
    ("cls", "sizes", "shape", "levels"),
    [(Digits, (1437, 180, 180), (1, 8, 8), 16), (MNIST, (4000, 500, 500), (1, 28, 28), 255)],
)
def test_the_registry_data_are_whole_and_split_without_overlap(cls, sizes, shape, levels):
    data = cls()
    data.prepare_data()
    data.setup("fit")
    assert tuple(len(labels) for _, labels in data.splits) == sizes
    parts = [row_set(images) for images, _ in data.splits]
    assert all(not a & b for a, b in ((parts[0], parts[1]), (parts[0], parts[2]), (parts[1], parts[2])))
    for _, labels in data.splits:
        share = labels.bincount() / len(labels)
        assert len(share) == data.num_classes
        assert (share - 0.1).abs().max() < 0.015
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, *shape) == (64, *data.image_shape)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal((images * levels).round() / levels, images)
    assert (images.min(), images.max()) == (0, 1)
    reference = data.reference_images()
    assert reference.shape == (sizes[0] + sizes[1], *shape)
    assert (reference.dtype, reference.max()) == (torch.uint8, 255)


def test_a_digit_is_the_digit_it_is_labelled():
    """Nearest-mean classification works, so that images and labels have stayed together."""
    data = Digits()
    (images, labels), _, (test_images, test_labels) = data.splits
    means = torch.stack([images[labels == digit].float().mean(0) for digit in range(10)])
    nearest = torch.cdist(test_images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test_labels).float().mean() > 0.85


def test_the_split_does_not_depend_on_the_seed():
    assert torch.equal(Digits(seed=0).splits.test[0], Digits(seed=1).splits.test[0])


# Official files


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, compress: bool = True, separator: str = "-") -> dict[str, np.ndarray]:
    """Tiny files in the format of MNIST: 40 training and 7 test pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for part, length in (("train", 40), ("t10k", 7)):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (length, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(length, dtype=np.uint8) % 10
    for name, array in arrays.items():
        content = gzip.compress(idx(array)) if compress else idx(array)
        (folder / (name.replace("-idx", f"{separator}idx") + (".gz" if compress else ""))).write_bytes(content)
    return arrays


@pytest.mark.parametrize("cls", [MNIST, FashionMNIST])
@pytest.mark.parametrize(
    ("below", "compress", "separator"), [("", True, "-"), ("", False, "."), ("{}/raw", False, "-"), ("{}/raw", True, "-")]
)
def test_idx_files_are_read_wherever_torchvision_or_the_user_put_them(cls, below, compress, separator, tmp_path):
    arrays = write_idx(tmp_path / below.format(cls.__name__), compress, separator)
    data = cls(root=tmp_path)
    data.prepare_data()
    data.setup("test")
    train, val, test = data.splits
    assert (len(train[0]), len(val[0])) == (36, 4)
    assert row_set(train[0]) | row_set(val[0]) == row_set(torch.from_numpy(arrays["train-images-idx3-ubyte"]))
    assert np.array_equal(test[0][:, 0], arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(test[1], arrays["t10k-labels-idx1-ubyte"])


def spoil(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_bad_idx_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST's file train-images-idx3-ubyte \(or .*gz\) is not in .*download"):
        MNIST(root=tmp_path).setup("fit")
    write_idx(tmp_path, compress=True)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{images} is truncated or damaged"):
        MNIST(root=tmp_path).setup("fit")
    spoil(images, gzip.decompress(whole)[:-5])
    with pytest.raises(ValueError, match=f"{images} is truncated: it holds"):
        MNIST(root=tmp_path).setup("fit")
    spoil(images, b"\x00\x00\x08\x03")
    with pytest.raises(ValueError, match=f"{images} is truncated"):
        MNIST(root=tmp_path).setup("fit")
    spoil(images, b"<html>not found</html>")
    with pytest.raises(ValueError, match=f"{images} is not an idx file .* starts with 3c68746d instead of 00000803"):
        MNIST(root=tmp_path).setup("fit")
    images.write_bytes(whole)
    spoil(labels, idx(np.zeros(3, dtype=np.uint8)))
    with pytest.raises(ValueError, match="3 labels: they are not MNIST's"):
        MNIST(root=tmp_path).setup("fit")
    with pytest.raises(ValueError, match="needs root"):
        MNIST(download=True)


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, and arrays by numpy's old module name, as the official files do."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_string(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(content)

    dispatch[bytes] = save_string

    @classmethod
    def dumps(cls, content: object) -> bytes:
        buffer = io.BytesIO()
        cls(buffer, protocol=2).dump(content)
        return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar(root: Path, binary: bool) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Tiny batches in the format of CIFAR-10: 10 pictures each."""
    folder = root / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    batches = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        data, labels = random.integers(0, 256, (10, 3072), dtype=np.uint8), random.permutation(10).tolist()
        batches[name] = data, labels
        if binary:
            records = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], data], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {b"batch_label": name.encode(), b"labels": labels, b"data": data, b"filenames": [b"a.png"] * 10}
            (folder / name).write_bytes(Python2Pickler.dumps(content))
    return batches


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_is_read_from_its_binary_and_its_pickled_files(binary, inside, tmp_path):
    batches = write_cifar(tmp_path, binary)
    root = tmp_path / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py") if inside else tmp_path
    data = CIFAR10(root=root, batch_size=5)
    data.prepare_data()
    data.setup("fit")
    train, val, test = data.splits
    assert (len(train[0]), len(val[0]), test[0].shape) == (45, 5, (10, 3, 32, 32))
    everything = np.concatenate([batches[f"data_batch_{number}"][0] for number in range(1, 6)])
    assert row_set(train[0]) | row_set(val[0]) == row_set(torch.from_numpy(everything))
    assert np.array_equal(test[0].flatten(1), batches["test_batch"][0])
    assert test[1].tolist() == batches["test_batch"][1]


@pytest.mark.parametrize(("cls", "share"), [(CIFAR10, 0.02), (CIFAR10, 0.33), (MNIST, 0.2), (FashionMNIST, 0.03)])
def test_a_fraction_is_held_out_as_the_published_code_does(cls, share, tmp_path):
    """Its validation set: the end of a permutation with the seed 2147483647, with as many pictures as the share has whole."""
    (write_cifar if cls is CIFAR10 else write_idx)(tmp_path, True)
    train, val, test = cls(root=tmp_path, val_fraction=share).splits
    everything = torch.cat([train[1], val[1]])
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(2147483647))
    kept = len(everything) - int(len(everything) * share)
    original = torch.empty_like(everything)
    original[order] = everything
    assert (len(train[0]), len(val[0])) == (kept, len(everything) - kept)
    stored = torch.cat([part[1] for part in cls(root=tmp_path).splits[:2]])
    assert torch.equal(original.bincount(), stored.bincount())
    if cls is not CIFAR10:
        assert torch.equal(original, torch.arange(40) % 10)  # the files' labels, in the files' order
    assert torch.equal(test[0], cls(root=tmp_path).splits.test[0])


def test_flipping_mirrors_training_pictures_only(tmp_path):
    write_cifar(tmp_path, binary=True)
    data = CIFAR10(root=tmp_path, batch_size=45, flip=True)
    images, labels = next(iter(data.train_dataloader()))
    plain, plain_labels = next(iter(CIFAR10(root=tmp_path, batch_size=45).train_dataloader()))
    assert torch.equal(labels, plain_labels)
    same = (images == plain).flatten(1).all(1)
    mirrored = (images == plain.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 10 < same.sum() < 35
    assert torch.equal(next(iter(data.val_dataloader()))[0] * 255, data.splits.val[0].float())


def test_bad_cifar_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no CIFAR-10: unpack the official cifar-10-binary\.tar\.gz"):
        CIFAR10(root=tmp_path).setup("fit")
    write_cifar(tmp_path, binary=True)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{path} is truncated: 30729 bytes"):
        CIFAR10(root=tmp_path).setup("fit")
    path.write_bytes(b"\x63" + whole[1:])
    with pytest.raises(ValueError, match="has label 99"):
        CIFAR10(root=tmp_path).setup("fit")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing"):
        CIFAR10(root=tmp_path).setup("fit")


class Malicious:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path):
    write_cifar(tmp_path, binary=False)
    path, ran = tmp_path / "cifar-10-batches-py" / "data_batch_2", tmp_path / "ran"
    path.write_bytes(Python2Pickler.dumps({b"data": Malicious(ran), b"labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_2 was refused: it names posix\.mkdir.*cifar-10-binary"):
        CIFAR10(root=tmp_path).setup("fit")
    assert not ran.exists()
    path.write_bytes(b"\x80\x02}q\x00U")
    with pytest.raises(ValueError, match="data_batch_2 is truncated or damaged"):
        CIFAR10(root=tmp_path).setup("fit")
    path.write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match="data_batch_2 is not a batch of CIFAR-10"):
        CIFAR10(root=tmp_path).setup("fit")


def test_a_pickled_array_is_admitted_in_old_and_new_spelling(tmp_path):
    write_cifar(tmp_path, binary=False)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    new = path.read_bytes().replace(b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")
    assert new != path.read_bytes()
    expected = CIFAR10(root=tmp_path).splits.test
    path.write_bytes(new)
    assert torch.equal(CIFAR10(root=tmp_path).splits.test[0], expected[0])


# Hyperparameters


class MyDigits(Digits):
    """As a user writes it."""

    def __init__(self, only: int = 3, folder: Path | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.only = only
        self.folder = folder


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("built", ["python", "plain data"])
@pytest.mark.parametrize("cls", [Digits, MyDigits])
def test_a_checkpoint_holds_the_arguments_as_plain_data(built, cls, tmp_path):
    own = {"only": 5, "folder": str(tmp_path)} if cls is MyDigits else {}
    arguments = {"batch_size": 32, "predict_images": str(tmp_path), **own}
    if built == "python":
        data = cls(**{**arguments, "predict_images": tmp_path})
    else:
        data = build(ZooDataModule, {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": arguments})
    trainer = L.Trainer(default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Model(), datamodule=data)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    assert stored["_class_path"] == class_path(cls)
    assert {name: stored[name] for name in arguments} == arguments
    again = ImageDataModule.load_from_checkpoint(path, num_workers=1)
    assert type(again) is cls
    assert (again.batch_size, again.predict_images, again.num_workers) == (32, tmp_path, 1)


def test_impossible_arguments_are_refused(tmp_path):
    for arguments, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"predict_samples": 0}, "predict_samples is 0"),
        ({"predict_masks": tmp_path}, "needs predict_images"),
    ):
        with pytest.raises(ValueError, match=message):
            Digits(**arguments)
    for cls in (CIFAR10, FashionMNIST):
        with pytest.raises(ValueError, match=r"val_fraction is 1\.0"):
            cls(root=tmp_path, val_fraction=1.0)
    with pytest.raises(ValueError, match="val_fraction divides the official files"):
        MNIST(val_fraction=0.1).setup("fit")
    with pytest.raises(ValueError, match="1437 samples, fewer than one global batch of 2000"):
        Digits(batch_size=2000).train_dataloader()


def test_the_abstract_base_is_not_a_data_set():
    with pytest.raises(TypeError, match="abstract"):
        ImageDataModule()
