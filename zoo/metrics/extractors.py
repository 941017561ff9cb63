"""Feature extractors for torch-fidelity: our shipped classifiers, a user's own classifier, and Inception.

Importing this module registers them. Each takes uint8 images (B, C, H, W) and gives float64 features, so that the
statistics taken of them carry no rounding that could be seen in a distance.
"""

import pickle
import urllib.error
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from zoo.base.nearest import nearest
from zoo.metrics.classifier import FeatureClassifier
from zoo.metrics.feature_network import FeatureNetwork

SHIPPED_EXTRACTORS = ("fd_digits_mlp", "fd_mnist_cnn", "fd_fashion_cnn")
OWN_CLASSIFIER = "feature-classifier"
INCEPTION = "inception-v3-compat"
WEIGHTS_FOLDER = Path(__file__).parent / "weights"

# torch-fidelity's own entry of this name gives float32 features and unpickles weights unchecked; ours wraps it.
_REGISTERED_NAME = {INCEPTION: f"{INCEPTION}-float64"}


def load_classifier(name: str | Path) -> FeatureNetwork:
    """Load a shipped classifier by name, or a user's own from its folder.

    Args:
        name: One of `SHIPPED_EXTRACTORS`, or a folder written by `FeatureClassifier.save_pretrained`.

    Returns:
        The network in evaluation mode, float32, on the CPU, without gradients.

    Raises:
        ValueError: If it is neither a shipped name nor a folder.
    """
    folder = WEIGHTS_FOLDER / name if name in SHIPPED_EXTRACTORS else Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"No classifier {str(name)!r}: neither one of the shipped {', '.join(SHIPPED_EXTRACTORS)} "
            "nor a folder written by FeatureClassifier.save_pretrained."
        )
    return FeatureClassifier.from_pretrained(folder).network.requires_grad_(False).eval()


class ClassifierExtractor(FeatureExtractorBase):
    """Features and logits of a small classifier, in float64 from the first layer on.

    Args:
        name: A shipped extractor, or `OWN_CLASSIFIER`.
        features_list: Which of "features" and "logits" to give, in this order.
        feature_extractor_weights_path: Folder of a user's classifier; only with `OWN_CLASSIFIER`.

    Raises:
        ValueError: If the folder is missing or superfluous.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(name, features_list)
        if (name == OWN_CLASSIFIER) != (feature_extractor_weights_path is not None):
            raise ValueError(
                f"Feature extractor {name!r} "
                + (
                    "wants weights_path, a folder written by FeatureClassifier.save_pretrained."
                    if name == OWN_CLASSIFIER
                    else f"ships with its weights; for your own pass {OWN_CLASSIFIER!r} with weights_path."
                )
            )
        self.network = load_classifier(feature_extractor_weights_path or name).double()

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images (B, C, H, W), one float64 tensor for each name asked for."""
        found = self.network(image_BCHW.double() / 255)._asdict()
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the features on offer."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The logits for the inception score, the penultimate features for every distance."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """Not worth it at this size."""
        return False


class InceptionExtractor(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception v3 with float64 features, grey images repeated to RGB, and weights loaded safely.

    Args:
        name: Registered name.
        features_list: Inception layers to give.
        feature_extractor_weights_path: Weights file of torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`);
            None for torch hub's cache, filled by torch-fidelity's own download where that can be reached.

    Raises:
        ValueError: If the weights file is missing, holds more than tensors, or fits no Inception v3.
        ConnectionError: If the weights must be downloaded and cannot be.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: object,
    ) -> None:
        path = Path(feature_extractor_weights_path) if feature_extractor_weights_path else _download_inception()
        if not path.is_file():
            raise ValueError(f"No Inception weights at {path}: pass weights_path, the file that {URL_INCEPTION_V3} gives.")
        try:  # torch-fidelity loads with weights_only=False, so the file is admitted only if this passes
            torch.load(path, map_location="meta", weights_only=True)
            super().__init__(name, features_list, feature_extractor_weights_path=str(path), **kwargs)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} does not hold torch-fidelity's Inception v3 weights (only tensors, from {URL_INCEPTION_V3}): "
                f"{str(error).splitlines()[0]}"
            ) from error

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images (B, 1 or 3, H, W), one float64 tensor for each name asked for."""
        if image_BCHW.shape[1] == 1:
            image_BCHW = image_BCHW.expand(-1, 3, -1, -1)
        return tuple(feature.double() for feature in super().forward(image_BCHW))


def _download_inception() -> Path:
    """Path of torch-fidelity's Inception weights, downloaded and verified on the first call."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        except (urllib.error.URLError, OSError) as error:
            raise ConnectionError(
                f"Inception weights are not on this machine and {URL_INCEPTION_V3} cannot be reached ({error}): "
                "fetch that file where you are online and pass it as weights_path, "
                f"or use a shipped extractor ({', '.join(SHIPPED_EXTRACTORS)})."
            ) from error
    return path


for _name in (*SHIPPED_EXTRACTORS, OWN_CLASSIFIER):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, ClassifierExtractor)
if _REGISTERED_NAME[INCEPTION] not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(_REGISTERED_NAME[INCEPTION], InceptionExtractor)


def registered_name(extractor: str) -> str:
    """The name under which torch-fidelity knows an extractor.

    Args:
        extractor: `SHIPPED_EXTRACTORS`, `OWN_CLASSIFIER`, `INCEPTION`, or a name that you registered yourself with
            `torch_fidelity.register_feature_extractor`.

    Raises:
        ValueError: If nothing is registered under that name; the nearest names are given.
    """
    name = _REGISTERED_NAME.get(extractor, extractor)
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = (*SHIPPED_EXTRACTORS, INCEPTION, OWN_CLASSIFIER)
        raise ValueError(
            f"There is no feature extractor {extractor!r}{nearest(extractor, FEATURE_EXTRACTORS_REGISTRY)} "
            f"(the zoo has {', '.join(known)})."
        )
    return name


def check_extractor(extractor: str, weights_path: str | Path | None = None) -> int | None:
    """Make sure, before anything expensive starts, that an extractor exists and that its weights load.

    Args:
        extractor: Name of the extractor.
        weights_path: The weights that go with it, if it wants any.

    Returns:
        The number of features of its Fréchet distance; None for an extractor that is not the zoo's.

    Raises:
        ValueError: If the name is unknown or the weights are missing or wrong.
        ConnectionError: If the weights must be downloaded and cannot be.
    """
    extractor_class = FEATURE_EXTRACTORS_REGISTRY[registered_name(extractor)]
    if issubclass(extractor_class, ClassifierExtractor | InceptionExtractor):
        layer = extractor_class.get_default_feature_layer_for_metric("fid")
        made = extractor_class(extractor, [layer], str(weights_path) if weights_path else None, verbose=False)
        return made.network.num_features if isinstance(made, ClassifierExtractor) else int(layer)  # "2048"
    return None
