"""Weights released with the papers, and ours: files of the published code <-> a `Network`.

The published files are what ``torch.save`` makes of a state dict whose names all begin with ``net.``; behind it stand the
names of our networks. Source: the files' names and formats of the code of arXiv 2308.07037.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.bfn.networks import BFNTransformer, ImprovedUNet, Network, UNetVDM
from zoo.bfn.official_config import read_official_config
from zoo.checkpoint import check_weights, read_plain
from zoo.hyperparameters import class_path

__all__ = [
    "from_official",
    "from_official_config",
    "load_official",
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
        ValueError: entries that are not tensors, or a name that occurs both with and without the prefix.
    """
    foreign = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(
            f"The weights hold entries that are not tensors ({', '.join(map(str, foreign[:5]))}): give the file of the"
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
        ValueError: a network that the published code does not have.
    """
    if not isinstance(network, UNetVDM | BFNTransformer | ImprovedUNet) or getattr(network, "patch_size", 1) > 1:
        described = f"{type(network).__name__} with patches" if hasattr(network, "patch_size") else type(network).__name__
        raise ValueError(
            f"The published code has no {described}, so there is no official format for it; it has UNetVDM, BFNTransformer"
            " and ImprovedUNet without patches."
        )
    return {OFFICIAL_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def read_official_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights: ``*_ema.pt``, ``ema_model.pt``, a Lightning checkpoint, or a ``.safetensors`` file.

    Nothing in the file is run.

    Returns:
        Weights by the names of our networks, as from `from_official`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds code, is damaged, or holds no weights.
    """
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
        ValueError: the file is unsafe or damaged, or its weights are not this network's; what differs is listed.
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
    network.load_state_dict(weights)


def published_files(weights: Mapping[str, Tensor]) -> str | None:
    """Which published files hold weights of these names and shapes; None if none does.

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
    if not ("bayesian_flow" in config or "bayesian_flow" in (config.get("model") or {})):
        return None
    return {"class_path": class_path(cls), "init_args": read_official_config(config).hyperparameters}
