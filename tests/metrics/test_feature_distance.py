"""Facts about feature distances, stated on features whose distance is known in closed form."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from zoo.base.samples import to_uint8
from zoo.metrics import FeatureDistance, feature_distances, real_data_floor
from zoo.metrics import feature_distance as module


class Pixels(FeatureExtractorBase):
    """The pixels themselves as features and as logits."""

    calls = 0

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        Pixels.calls += len(image_BCHW)
        return tuple(image_BCHW.flatten(1).double() / (255 if name == "logits" else 1) for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"


register_feature_extractor("pixels", Pixels)


def random_images(count: int, seed: int, low: int = 0, high: int = 256, shape: tuple[int, int, int] = (1, 2, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, *shape), generator=generator).to(torch.uint8)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    features = images.flatten(1).double()
    return features.mean(0), torch.cov(features.T)


def test_distance_of_a_set_from_itself_is_zero() -> None:
    images = random_images(300, seed=0)
    found = feature_distances(images, images, "pixels", kid_subset_size=100, kid_subsets=2)
    assert abs(found.frechet_distance) < 1e-7 * moments(images)[1].trace().item()


def test_frechet_distance_of_a_scaled_and_shifted_law_is_the_closed_form() -> None:
    # x -> 2x + c gives covariance 4S: |m1 - m2|^2 + tr(S + 4S - 2 (S 4S)^(1/2)) = |m1 - m2|^2 + tr S.
    images = random_images(400, seed=1, high=100)
    shifted = 2 * images + 7
    (mean, covariance), (other_mean, _) = moments(images), moments(shifted)
    expected = (mean - other_mean).square().sum() + covariance.trace()
    found = feature_distances(shifted, images, "pixels", kid_subset_size=100, kid_subsets=2)
    assert math.isclose(found.frechet_distance, expected.item(), rel_tol=1e-10)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_frechet_distance_is_the_gaussian_wasserstein_distance_of_the_moments(seed: int) -> None:
    # With the symmetric root of S1: tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2), an independent way to compute it.
    first, second = random_images(60, seed), random_images(80, seed + 1, high=200)
    (mean_1, cov_1), (mean_2, cov_2) = moments(first), moments(second)
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    expected = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    found = feature_distances(first, second, "pixels", kid_subset_size=20, kid_subsets=1)
    assert math.isclose(found.frechet_distance, expected.item(), rel_tol=1e-9)


def test_frechet_distance_is_symmetric_and_knows_no_order() -> None:
    first, second = random_images(200, seed=2), random_images(250, seed=3, low=50)
    options = {"extractor": "pixels", "kid_subset_size": 50, "kid_subsets": 1}
    distance = feature_distances(first, second, **options).frechet_distance
    shuffled = first[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert math.isclose(feature_distances(shuffled, second, **options).frechet_distance, distance, rel_tol=1e-10)
    assert math.isclose(feature_distances(second, first, **options).frechet_distance, distance, rel_tol=1e-10)


def test_kernel_distance_is_unbiased() -> None:
    # Over many independent pairs of sets of the same law the mean is zero within its standard error, at any set size.
    found = torch.tensor(
        [
            feature_distances(
                random_images(40, 2 * i, high=3),
                random_images(40, 2 * i + 1, high=3),
                "pixels",
                kid_subset_size=40,
                kid_subsets=1,
            ).kernel_distance
            for i in range(60)
        ]
    )
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean()) < 3 * error
    other = feature_distances(
        random_images(40, 0, high=3), random_images(40, 1, high=4), "pixels", kid_subset_size=40, kid_subsets=1
    )
    assert other.kernel_distance > 10 * error


def test_inception_score_lies_between_one_and_the_number_of_classes() -> None:
    # One sure class for each image in equal parts: as many as there are classes; the same image again and again: 1.
    sure = torch.zeros(600, 1, 2, 3, dtype=torch.uint8)
    same = feature_distances(sure, random_images(600, 0), "pixels", kid_subset_size=100, kid_subsets=1)
    assert math.isclose(same.inception_score, 1.0, rel_tol=1e-12)
    spread = feature_distances(random_images(600, 1), random_images(600, 0), "pixels", kid_subset_size=100, kid_subsets=1)
    assert 1.0 < spread.inception_score < 6.0


def test_floor_is_positive_fixed_and_smaller_for_more_data() -> None:
    images = random_images(2000, seed=4)
    options = {"extractor": "pixels", "kid_subset_size": 100, "kid_subsets": 2}
    floor = real_data_floor(images, **options)
    assert floor.num_samples == floor.num_reference == 1000
    assert real_data_floor(images, **options) == floor
    assert 0 < floor.frechet_distance < real_data_floor(images, num_samples=100, **options).frechet_distance
    # More samples than half of the data: halves.
    assert real_data_floor(images, num_samples=1500, **options).num_samples == 1000


def test_reference_features_are_computed_once_for_equal_content() -> None:
    reference, samples = random_images(500, seed=5), random_images(100, seed=6)
    Pixels.calls = 0
    first = feature_distances(samples, reference, "pixels", kid_subset_size=50, kid_subsets=2)
    assert Pixels.calls == 600
    assert feature_distances(samples, reference.clone(), "pixels", kid_subset_size=50, kid_subsets=2) == first
    assert Pixels.calls == 700
    changed = reference.clone()
    changed[0, 0, 0, 0] ^= 1
    feature_distances(samples, changed, "pixels", kid_subset_size=50, kid_subsets=2)
    assert Pixels.calls == 1300


def test_metric_class_agrees_with_the_function_over_batches() -> None:
    samples, reference = random_images(130, seed=7), random_images(150, seed=8)
    metric = FeatureDistance("pixels", kid_subset_size=50, kid_subsets=3)
    for batch in samples.split(40):
        metric.update(batch, real=False)
    for batch in reference.split(60):
        metric.update(batch, real=True)
    expected = feature_distances(samples, reference, "pixels", kid_subset_size=50, kid_subsets=3)
    assert metric.compute() == dataclasses.asdict(expected)
    metric.reset()
    with pytest.raises(ValueError, match="real and generated"):
        metric.compute()


def test_pixels_round_to_the_nearest_level_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(levels.to(dtype) / 255), levels)
    assert to_uint8(torch.tensor([0.49, 0.51, 127.4, 127.6, 254.6]) / 255).tolist() == [0, 1, 127, 128, 255]


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_pixels_outside_the_unit_range_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        to_uint8(torch.tensor([0.5, value]))


def test_bad_input_is_one_clear_sentence() -> None:
    images = random_images(100, seed=9)
    with pytest.raises(ValueError, match=r"fd_digits_mpl.*did you mean fd_digits_mlp"):
        feature_distances(images, images, "fd_digits_mpl")
    with pytest.raises(ValueError, match="100 images, fewer than kid_subset_size=500"):
        feature_distances(images, images, "pixels")
    with pytest.raises(ValueError, match=r"compares 50 of the 100 real images.*kid_subset_size=60"):
        real_data_floor(images, "pixels", kid_subset_size=60)
    with pytest.raises(TypeError, match=r"`samples` must be uint8.*to_uint8"):
        feature_distances(images / 255, images, "pixels", kid_subset_size=10)
    with pytest.raises(ValueError, match=r"\(100, 1, 2, 3\) against a reference of \(100, 1, 3, 2\)"):
        feature_distances(images, images.transpose(2, 3), "pixels", kid_subset_size=10)


def test_key_of_the_cache_depends_on_all_that_matters(tmp_path) -> None:
    images = random_images(10, seed=10)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"a")
    keys = [
        module._content_key(images, "pixels", None),
        module._content_key(images.reshape(10, 1, 3, 2), "pixels", None),
        module._content_key(images, "other", None),
        module._content_key(images, "pixels", weights),
    ]
    weights.write_bytes(b"other")
    keys.append(module._content_key(images, "pixels", weights))
    assert len(set(keys)) == len(keys)
