"""Weights released with the papers, and ours: files of the published code <-> a `Network`.

The published files are what ``torch.save`` makes of a state dict whose names all begin with ``net.``; behind it stand the
names of our networks. Source: the files' names and formats of the code of arXiv 2308.07037.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.base.checkpoint import check_weights, read_plain
from zoo.base.hyperparameters import class_path
from zoo.bfn.networks import BFNTransformer, ImprovedUNet, Network, UNetVDM
from zoo.bfn.official_config import read_official_config

__all__ = [
    "from_official",
    "from_official_config",
    "load_official",
    "official_leftovers",
    "published_files",
    "read_official_weights",
    "to_official",
]

OFFICIAL_PREFIX = "net."
OUR_PREFIX = "network."

#: The published files and the networks that they hold.
PUBLISHED: dict[str, tuple[type[Network], dict[str, Any]]] = {
    "cifar10_256c_ema.pt or cifar10_16c_ema.pt": (UNetVDM, {"num_outputs": 1}),
    "cifar10_256d_ema.pt or cifar10_16d_ema.pt": (UNetVDM, {"num_outputs": 2}),
    "text8_ema.pt": (BFNTransformer, {}),
    "mnist_ema.pt": (ImprovedUNet, {}),
}


def from_official(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights for a `Network` from a state dict of the published code, of a BFN of ours, or of a bare network.

    The prefix ``net.`` (published) or ``network.`` (ours) is taken off. Names without it stay as they are, for the
    comparison with the network to find.

    Raises:
        ValueError: entries that are not named tensors, or a name that occurs both with and without the prefix.
    """
    foreign = [name for name, value in state_dict.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if foreign:
        raise ValueError(
            f"The weights hold entries that are not named tensors ({', '.join(map(str, foreign[:5]))}): give the file of the"
            " weights alone, such as mnist_ema.pt or ema_model.pt."
        )
    prefix = next((p for p in (OFFICIAL_PREFIX, OUR_PREFIX) if any(name.startswith(p) for name in state_dict)), "")
    weights = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    if len(weights) < len(state_dict):
        twice = [name for name in weights if prefix and name in state_dict and prefix + name in state_dict]
        raise ValueError(f"The weights hold names both with and without the prefix {prefix}: {', '.join(twice[:5])}.")
    return weights


def to_official(network: Network) -> dict[str, Tensor]:
    """The state dict that the published code loads: names with ``net.`` before them, tensors on the CPU.

    Raises:
        ValueError: a network that the published code does not have; what differs is said.
    """
    if other := _unpublished(network):
        raise ValueError(
            f"The published code has no {type(network).__name__}{other}, so there is no official format for it; it has UNetVDM,"
            " BFNTransformer and ImprovedUNet without patches, for square images, with 32 norm groups in ImprovedUNet and"
            " fourier_exponents (5, 6) or none in UNetVDM."
        )
    return {OFFICIAL_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def _unpublished(network: Network) -> str:
    """Parts of this network that the published code cannot build although the names agree; empty if there are none."""
    if isinstance(network, BFNTransformer):
        return ""
    if not isinstance(network, UNetVDM | ImprovedUNet):
        return " at all"
    _, height, width = network.image_shape
    if height != width:
        return f" for images of {height} x {width}"
    if isinstance(network, UNetVDM):
        exponents = network.fourier_exponents
        return "" if exponents in ((), (5, 6)) else f" with fourier_exponents={exponents}"
    if network.patch_size > 1:
        return " with patches"
    groups = next(layer.num_groups for layer in network.modules() if isinstance(layer, nn.GroupNorm))
    return "" if groups == 32 else f" with norm_groups={groups}"


def read_official_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights: ``*_ema.pt``, ``ema_model.pt``, a Lightning checkpoint, or a ``.safetensors`` file.

    Nothing in the file is run. A folder of the published code's training is read by its ``ema_model.pt``.

    Returns:
        Weights by the names of our networks, as from `from_official`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds code, is damaged, or holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ema_model.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} is a folder without {path.name}: give the file of the weights.")
    content = read_plain(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no weights: it must be a dictionary of names and tensors.")
    return from_official(content)


def load_official(network: Network, path: str | Path) -> None:
    """Load a file of `read_official_weights` into a network, after comparing all names and shapes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unsafe or damaged, its weights are not this network's (what differs is listed), or some are
            no finite numbers.
    """
    weights = read_official_weights(path)
    try:
        check_weights(network, weights, str(path))
    except ValueError as error:
        files = published_files(weights)
        if files is None:
            raise ValueError(f"{error} They are those of no published network.") from None
        cls, arguments = PUBLISHED[files]
        call = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise ValueError(f"{error} They are those of {files}: {cls.__name__}({call}).") from None
    useless = [name for name, tensor in weights.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if useless:
        raise ValueError(
            f"{path} holds weights that are whole numbers, infinite or not a number ({', '.join(useless[:5])}): it was damaged,"
            " or the training that wrote it had diverged."
        )
    network.load_state_dict(weights)


def published_files(weights: Mapping[str, Tensor]) -> str | None:
    """Published files that hold weights of these names and shapes; None if there are none.

    Args:
        weights: as from `from_official`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return next((files for files in PUBLISHED if _shapes(files) == shapes), None)


@cache
def _shapes(files: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in published files."""
    cls, arguments = PUBLISHED[files]
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in cls(**arguments).state_dict().items()}


def from_official_config(cls: type, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A BFN's ``{"class_path", "init_args"}`` from a configuration of the published code; None if it is another file.

    Args:
        cls: the class to build.
        config: the file, parsed.

    Raises:
        ValueError: names or values in it that we do not have.
    """
    if not _is_published(config):
        return None
    return {"class_path": class_path(cls), "init_args": read_official_config(config).hyperparameters}


def official_leftovers(config: Mapping[str, Any]) -> list[str]:
    """Entries of a published configuration beside the model, a line each; none for another file.

    Args:
        config: the file, parsed.

    Raises:
        ValueError: names or values in it that we do not have.
    """
    if not _is_published(config):
        return []
    found = read_official_config(config)
    lines = [
        f"{name}: {', '.join(f'{option}={value}' for option, value in options.items())}"
        for name, options in (("data", found.data), ("training", found.training), ("sampling", found.sampling))
        if options
    ]
    for reason in dict.fromkeys(found.not_applicable.values()):
        options = [option for option, why in found.not_applicable.items() if why == reason]
        lines.append(f"{', '.join(options)} ({reason})")
    return lines


def _is_published(config: Mapping[str, Any]) -> bool:
    return "bayesian_flow" in config or "bayesian_flow" in (config.get("model") or {})
