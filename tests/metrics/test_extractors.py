"""Extractors: shipped classifiers, a user's own, and Inception with weights that are read safely."""

import json
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity import feature_extractor_inceptionv3 as fidelity_inception

from datamodules import MNIST, Digits, FashionMNIST, ImageDataModule
from datamodules.assets.fetch import list_assets
from zoo.metrics import (
    SHIPPED_EXTRACTORS,
    FeatureClassifier,
    FeatureMLP,
    check_extractor,
    classifier_agreement,
    feature_distances,
    load_classifier,
)
from zoo.metrics.extractors import WEIGHTS_FOLDER, ClassifierExtractor, InceptionExtractor


@pytest.mark.parametrize("name", SHIPPED_EXTRACTORS)
def test_shipped_classifiers_load_and_are_small(name: str) -> None:
    network = load_classifier(name)
    assert network.num_classes == 10
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert (WEIGHTS_FOLDER / name / "model.safetensors").stat().st_size <= 2**20


@pytest.mark.parametrize("name", SHIPPED_EXTRACTORS)
def test_features_are_float64_functions_of_single_images(name: str) -> None:
    extractor = ClassifierExtractor(name, ["logits", "features"])
    shape = extractor.network.image_shape
    images = torch.randint(0, 256, (8, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits, features = extractor(images)
    assert features.dtype == logits.dtype == torch.float64
    assert logits.shape == (8, 10)
    assert features.shape == (8, extractor.network.num_features)
    assert torch.allclose(extractor(images[3:4])[1], features[3:4], rtol=1e-12, atol=1e-12)


def test_own_classifier_serves_as_extractor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = FeatureClassifier(FeatureMLP(image_shape=(1, 4, 4), widths=[7], num_classes=3))
    own.save_pretrained(tmp_path)
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    other = torch.randint(0, 128, (40, 1, 4, 4), dtype=torch.uint8)
    found = feature_distances(images, other, "feature-classifier", weights_path=tmp_path, kid_subset_size=20, kid_subsets=2)
    assert found.frechet_distance > 0
    assert torch.equal(load_classifier(tmp_path)(images / 255).logits, own.network(images / 255).logits)


def test_agreement_counts_classes_confidence_and_accuracy(tmp_path: Path) -> None:
    # A linear classifier built by hand: the class is the brightest of three pixels, and surer the brighter it is.
    own = FeatureClassifier(FeatureMLP(image_shape=(1, 1, 3), widths=[3], num_classes=3))
    linear = own.network.layers[1]
    for layer in (linear, own.network.classify):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    own.save_pretrained(tmp_path)
    images = torch.tensor([[255, 0, 0], [0, 255, 0], [255, 0, 0]], dtype=torch.uint8).view(3, 1, 1, 3)
    found = classifier_agreement(images, tmp_path, torch.tensor([0, 1, 2]), batch_size=2)
    assert found.classes == (0, 1)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.mean_max_probability == pytest.approx(torch.tensor([1.0, 0, 0]).double().softmax(0)[0].item())
    assert classifier_agreement(images, tmp_path).accuracy is None
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        classifier_agreement(images, tmp_path, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="at least one image"):
        classifier_agreement(images[:0], tmp_path)
    with pytest.raises(TypeError, match="uint8"):
        classifier_agreement(images / 255, tmp_path)


def test_missing_or_superfluous_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"feature-classifier.*wants weights_path"):
        check_extractor("feature-classifier")
    with pytest.raises(ValueError, match=r"fd_mnist_cnn.*ships with its weights"):
        check_extractor("fd_mnist_cnn", tmp_path)
    with pytest.raises(ValueError, match=r"No classifier .*nowhere.*FeatureClassifier\.save_pretrained"):
        check_extractor("feature-classifier", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"No Inception weights at .*nowhere\.pth.*weights_path"):
        check_extractor("inception-v3-compat", tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="did you mean inception-v3-compat"):
        check_extractor("inception-v3")
    check_extractor("fd_digits_mlp")


def test_images_of_another_shape_are_refused() -> None:
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"FeatureMLP was made for images of shape \(1, 8, 8\), got \(1, 28, 28\)"):
        feature_distances(images, images, "fd_digits_mlp", kid_subset_size=10)


class RunsCode:
    """What a malicious weights file would hold."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_inception_weights_that_hold_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": RunsCode()}, path)
    with pytest.raises(ValueError, match=r"does not hold torch-fidelity's Inception v3 weights"):
        check_extractor("inception-v3-compat", path)
    path.write_bytes(pickle.dumps([1, 2, 3])[:5])
    with pytest.raises(ValueError, match=r"does not hold torch-fidelity's Inception v3 weights"):
        check_extractor("inception-v3-compat", path)
    assert "code ran" not in capsys.readouterr().out


def test_inception_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ConnectionError, match=r"cannot be reached .*no route to host.*weights_path.*fd_digits_mlp"):
        check_extractor("inception-v3-compat")


def test_inception_gives_float64_features_of_grey_and_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights in the real architecture: the file format, the channels and the dtype are what is tested.
    monkeypatch.setattr(fidelity_inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "weights.pth"
    torch.save(inception.state_dict(), path)
    ours = InceptionExtractor("inception-v3-compat", ["2048"], str(path))
    grey = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    (features,) = ours(grey)
    assert features.dtype == torch.float64
    assert features.shape == (1, 2048)
    assert torch.equal(features.float(), inception(grey.repeat(1, 3, 1, 1))[0])


@pytest.mark.parametrize(
    ("name", "data_class", "asset"),
    [
        ("fd_digits_mlp", Digits, "digits"),
        ("fd_mnist_cnn", MNIST, "mnist-5k"),
        ("fd_fashion_cnn", FashionMNIST, "fashion-mnist"),
    ],
)
def test_shipped_classifiers_reach_their_stated_accuracy_on_unseen_images(
    name: str, data_class: type[ImageDataModule], asset: str
) -> None:
    if next(state for state in list_assets() if state.name == asset).state == "missing":
        pytest.skip(f"not measured: zoo assets fetch {asset}")
    data = data_class()
    images, labels = data.splits.test
    stated = json.loads((WEIGHTS_FOLDER / name / "config.json").read_text())
    assert stated["_test_images"] == len(images)
    images = (images.float() * 255 / data.largest).round().to(torch.uint8)
    found = classifier_agreement(images[:2000], name, labels[:2000])
    # Fashion-MNIST is judged on its first 2000 test images, to within three standard errors of a proportion.
    accuracy = stated["_test_accuracy"]
    margin = 0 if len(images) <= 2000 else 3 * (accuracy * (1 - accuracy) / 2000) ** 0.5
    assert found.accuracy == pytest.approx(accuracy, abs=margin + 1e-9)
    assert found.classes == tuple(range(10))
