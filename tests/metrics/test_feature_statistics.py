"""Statistics of features: the distance of Gaussians in closed form, files that come back as they went, streams without loss."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from zoo.metrics import (
    FeatureStatistics,
    FeatureStream,
    check_extractor,
    feature_distances,
    folder_distances,
    frechet_distance,
    logits_agreement,
    read_statistics,
    statistics_distances,
    stream_features,
    write_statistics,
)

DIGITS = "fd_digits_mlp"


def random_images(count: int, seed: int, high: int = 256, shape: tuple[int, int, int] = (1, 8, 8)) -> Tensor:
    return torch.randint(0, high, (count, *shape), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def gaussian(seed: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    factor = random.normal(size=(size, size))
    return random.normal(size=size), factor @ factor.T


class Columns(FeatureExtractorBase):
    """Columns of pixels as float32 features, far from zero; no logits."""

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        return (image_BCHW[:, 0, 0].float() + 65536,)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("columns",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "columns"


register_feature_extractor("columns", Columns)


def test_equal_statistics_have_no_distance() -> None:
    mu, sigma = gaussian(0)
    assert abs(frechet_distance(mu, sigma, mu, sigma)) <= 1e-6 * np.trace(sigma)
    assert abs(frechet_distance(mu.astype(np.float32), sigma, mu.astype(np.float32), sigma)) <= 1e-6 * np.trace(sigma)


def test_distance_of_commuting_covariances_is_the_closed_form() -> None:
    # sigma_i = Q diag(a_i) Q^T: |mu_1 - mu_2|^2 + sum (sqrt a_1 - sqrt a_2)^2.
    random = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(random.normal(size=(20, 20)))
    first, second = random.uniform(0, 4, size=(2, 20))
    mu_1, mu_2 = random.normal(size=(2, 20))
    found = frechet_distance(mu_1, rotation * first @ rotation.T, mu_2, rotation * second @ rotation.T)
    expected = ((mu_1 - mu_2) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert math.isclose(found, expected, rel_tol=1e-10)
    assert math.isclose(
        frechet_distance(torch.from_numpy(mu_1), np.diag(first), mu_2, np.diag(first)), ((mu_1 - mu_2) ** 2).sum()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu1": np.zeros((2, 2))}, r"mu1 must have shape \(D,\), got \(2, 2\)"),
        ({"sigma2": np.eye(3)}, r"sigma2 must have shape \(2, 2\) beside mu2 of \(2,\), got \(3, 3\)"),
        ({"sigma1": np.eye(2)[:1]}, r"sigma1 must have shape \(2, 2\)"),
        ({"mu1": np.zeros(3), "sigma1": np.eye(3)}, "Statistics of 3 and of 2 features"),
        ({"mu2": np.array([0, 1])}, "mu2 must be floating point, got int64"),
        ({"sigma1": np.full((2, 2), np.nan)}, "sigma1 holds values that are not finite"),
    ],
)
def test_what_is_no_gaussian_is_refused(change: dict[str, Any], message: str) -> None:
    valid = {"mu1": np.zeros(2), "sigma1": np.eye(2), "mu2": np.zeros(2), "sigma2": np.eye(2)}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**{**valid, **change})


def test_stream_has_the_moments_of_all_features_whatever_the_batches() -> None:
    images = random_images(203, seed=2, high=5)
    features = images[:, 0, 0].double() + 65536  # a mean so large that sums of squares in float32 would lose the variance
    for size in (1, 7, 64, 300):
        found = stream_features(images, "columns", batch_size=size).statistics()
        assert np.allclose(found.mu, features.mean(0), rtol=1e-14)
        assert np.allclose(found.sigma, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
        assert (found.num_images, found.extractor) == (203, "columns")
    empty = FeatureStream("columns")
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        empty.statistics()


def test_distances_from_statistics_are_those_from_the_images(tmp_path: Path) -> None:
    samples, reference = random_images(210, seed=3), random_images(250, seed=4, high=200)
    expected = feature_distances(samples, reference, DIGITS, kid_subset_size=50, kid_subsets=1)
    written = write_statistics(tmp_path / "made" / "real.npz", reference, DIGITS, batch_size=60)
    for source in (written, tmp_path / "made" / "real.npz", str(tmp_path / "made" / "real.npz")):
        found = statistics_distances(samples, source, DIGITS, batch_size=32)
        assert math.isclose(found.frechet_distance, expected.frechet_distance, rel_tol=1e-9)
        assert math.isclose(found.inception_score, expected.inception_score, rel_tol=1e-12)
        assert math.isclose(found.inception_score_std, expected.inception_score_std, rel_tol=1e-9)
        assert (found.num_samples, found.num_reference, found.extractor) == (210, 250, DIGITS)
        assert found.kernel_distance is None and found.kernel_distance_std is None
    batches = (batch for batch in samples.split(17))
    assert statistics_distances(batches, written, DIGITS) == statistics_distances(samples, written, DIGITS, batch_size=17)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["real.npz"]


def test_extractor_without_logits_has_no_inception_score(tmp_path: Path) -> None:
    images = random_images(40, seed=5)
    found = statistics_distances(images, write_statistics(tmp_path / "real.npz", images, "columns"), "columns")
    assert abs(found.frechet_distance) < 1e-6 and found.inception_score is None and found.inception_score_std is None


@pytest.mark.parametrize("mu_type", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("sigma_type", [np.float32, np.float64])
def test_files_in_adm_s_form_are_read_as_float64(tmp_path: Path, mu_type: type, sigma_type: type) -> None:
    mu, sigma = gaussian(2)
    mu, sigma = mu.astype(mu_type), sigma.astype(sigma_type)
    np.savez(tmp_path / "fid_stats.npz", mu=mu, sigma=sigma)
    found = read_statistics(tmp_path / "fid_stats.npz")
    assert found.mu.dtype == found.sigma.dtype == np.float64
    assert np.array_equal(found.mu, mu) and np.array_equal(found.sigma, sigma)
    assert (found.extractor, found.num_images) == (None, None)
    assert abs(frechet_distance(found.mu, found.sigma, mu, sigma)) < 1e-5


def test_adm_s_reference_batch_is_read_without_its_images(tmp_path: Path) -> None:
    mu, sigma = gaussian(3)
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(path, arr_0=np.array([{"never": "unpickled"}]), mu=mu.astype(np.float32), sigma=sigma, mu_s=mu, sigma_s=sigma)
    assert np.array_equal(read_statistics(path).sigma, sigma)


def test_our_files_come_back_as_they_went(tmp_path: Path) -> None:
    for known in ({}, {"extractor": DIGITS, "num_images": 50_000}):
        statistics = FeatureStatistics(*gaussian(4), **known)
        statistics.save(tmp_path / "real.npz")
        found = read_statistics(tmp_path / "real.npz")
        assert np.array_equal(found.mu, statistics.mu) and np.array_equal(found.sigma, statistics.sigma)
        assert (found.extractor, found.num_images) == (statistics.extractor, statistics.num_images)


def write_wrong(path: Path, kind: str) -> None:
    mu, sigma = gaussian(5)
    arrays: dict[str, Any] = {
        "keys": {"m": mu, "s": sigma},
        "shapes": {"mu": mu, "sigma": sigma[:, :3]},
        "integers": {"mu": mu.astype(int), "sigma": sigma},
        "pickled": {"mu": mu.astype(object), "sigma": sigma},
        "infinite": {"mu": mu, "sigma": sigma * np.inf},
    }
    if kind in arrays:
        np.savez(path, **arrays[kind])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"mu": mu, "sigma": sigma}))
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, mu)
    else:
        np.savez(path, mu=mu, sigma=sigma)
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("keys", "lacks mu and sigma and holds m, s"),
        ("shapes", r"sigma must have shape \(12, 12\) beside mu of \(12,\), got \(12, 3\)"),
        ("integers", "mu must be floating point"),
        ("pickled", "allow_pickle=False"),
        ("infinite", "sigma holds values that are not finite"),
        ("pickle", "no file of feature statistics"),
        ("array", "it holds one array"),
        ("cut off", "no file of feature statistics"),
    ],
)
def test_files_of_other_things_are_refused_with_the_reason(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "wrong.npz"
    write_wrong(path, kind)
    with pytest.raises(ValueError, match=rf"wrong\.npz is no file of feature statistics.*{message}|{message}") as caught:
        read_statistics(path)
    assert "write_statistics" in str(caught.value)


def test_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    images = random_images(50, seed=6)
    path = tmp_path / "real.npz"
    write_statistics(path, images, "columns")
    with pytest.raises(ValueError, match=r"real\.npz hold features of the extractor 'columns', not of 'fd_digits_mlp'"):
        statistics_distances(images, path, DIGITS)
    np.savez(path, mu=np.zeros(2048, np.float32), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"hold 2048 features, and the extractor 'fd_digits_mlp' gives 32"):
        statistics_distances(images, path, DIGITS)
    assert check_extractor(DIGITS) == 32
    with pytest.raises(FileNotFoundError, match=r"No statistics at .*none\.npz"):
        statistics_distances(images, tmp_path / "none.npz", DIGITS)
    with pytest.raises(ValueError, match=r"end its name in \.npz"):
        write_statistics(tmp_path / "real.npy", images, DIGITS)
    with pytest.raises(TypeError, match="must be uint8"):
        stream_features(images / 255, DIGITS)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        stream_features(images, DIGITS, batch_size=0)
    with pytest.raises(ValueError, match=r"got \(1, 4, 4\) after \(1, 8, 8\)"):
        stream_features([images, images[:, :, :4, :4]], "columns")


def write_folder(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for index, image_CHW in enumerate(images):
        pixels = image_CHW[0] if len(image_CHW) == 1 else image_CHW.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:06d}.png")
    return folder


def test_folder_has_the_distance_of_its_pictures(tmp_path: Path) -> None:
    samples, reference = random_images(75, seed=7), random_images(90, seed=8, high=200)
    folder = write_folder(tmp_path / "generated", samples)
    real = write_folder(tmp_path / "real", reference)
    statistics = write_statistics(tmp_path / "real.npz", reference, DIGITS, batch_size=16)
    expected = statistics_distances(samples, statistics, DIGITS, batch_size=16)
    for source in (reference, real, statistics, tmp_path / "real.npz"):
        assert folder_distances(folder, source, DIGITS, batch_size=16) == expected


def test_folders_of_colour_are_read_pixel_by_pixel(tmp_path: Path) -> None:
    images = random_images(12, seed=9, shape=(3, 2, 5))
    folder = write_folder(tmp_path / "colour", images)
    assert np.array_equal(stream_features(folder, "columns").statistics().mu, images[:, 0, 0].double().mean(0) + 65536)


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    images = random_images(3, seed=10)
    folder = write_folder(tmp_path / "mixed", images)
    with pytest.raises(FileNotFoundError, match="no PNG files in"):
        folder_distances(tmp_path / "none", images, DIGITS)
    Image.fromarray(images[0, 0].numpy()[:4]).save(folder / "000003.png")
    with pytest.raises(ValueError, match=r"000003\.png has shape \(1, 4, 8\).*000000\.png \(1, 8, 8\)"):
        folder_distances(folder, images, DIGITS)
    Image.fromarray(images[0, 0].numpy()).convert("P").save(folder / "000003.png")
    with pytest.raises(ValueError, match="mode P, neither 8-bit grey"):
        folder_distances(folder, images, DIGITS)


def test_agreement_with_labels_counts_what_the_classifier_sees() -> None:
    logits = torch.eye(4)[[0, 1, 2, 2]] * 9
    assert logits_agreement(logits, torch.tensor([0, 1, 2, 3])).accuracy == 0.75
    assert logits_agreement(logits).accuracy is None
    with pytest.raises(ValueError, match="classes 0 to 3, and the images are meant to show 0 to 4"):
        logits_agreement(logits, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match=r"4 images and labels of shape \(3,\)"):
        logits_agreement(logits, torch.tensor([0, 1, 2]))
