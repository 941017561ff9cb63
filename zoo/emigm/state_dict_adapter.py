"""Weights released with the papers, of eMIGM and of MAR, and ours: files of the published code <-> a `MaskedTransformer`.

Our networks carry the published names, so what differs is the wrapping. The published code saves a dictionary with ``model``,
``model_ema``, the optimizer's state and an ``argparse.Namespace``. Where mask token and fake token are one parameter, it averages
the parameter under ``fake_latent`` only and leaves the raw one under ``mask_token``; as the later of two names wins when it
loads, its own results are those of the raw vector. Source: names, shapes and formats of the code of arXiv 2503.07197.
"""

import argparse
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zoo.base.checkpoint import check_weights, read_plain
from zoo.base.hyperparameters import class_path
from zoo.emigm.network import MaskedTransformer
from zoo.emigm.sizes import Architecture, SizeName, architecture

__all__ = [
    "OfficialConfig",
    "TiedTokenSource",
    "Which",
    "infer_config",
    "infer_official_config",
    "load_official",
    "read_official_weights",
    "to_official",
]

Which = Literal["ema", "raw"]
TiedTokenSource = Literal["mask_token", "fake_latent"]

_TOKENS = ("mask_token", "fake_latent")
_ENTRIES = {"ema": "model_ema", "raw": "model"}
#: Names that no other weights have: by them a file is known.
_MARKS = ("diffusion_pos_embed_learned", "decoder_pos_embed_learned", "diffloss.net.input_proj.weight")
_HEADS = {448: 8, 512: 8, 768: 12, 1024: 16, 1280: 16}
#: Codec, pixels for each latent position and axis: by the number of channels.
_CODECS = {16: ("zoo.emigm.KLVAE", 16), 32: ("zoo.emigm.DCAE", 32)}
#: Window of guidance at 16 steps, by the image size: arXiv 2503.07197, appendix D; ``huge`` has its own.
_WINDOWS = {256: (0.1, 0.3), 512: (0.15, 0.35)}
_HUGE_WINDOW = (0.2, 0.4)
#: Scale of guidance of MAR's models, by their size.
_MAR_SCALES = {"base": 2.9, "large": 3.0, "huge": 3.2}


@dataclass
class OfficialConfig:
    """Sizes of the network, read from the shapes of a state dict.

    Attributes:
        architecture: sizes of transformer and head.
        num_tokens: number of tokens.
        token_channels: channels of a token.
        buffer_size: slots that carry the class.
        num_classes: number of classes.
        cfg_with_mask: whether mask token and "no class" are one vector.
    """

    architecture: Architecture
    num_tokens: int
    token_channels: int
    buffer_size: int
    num_classes: int
    cfg_with_mask: bool


def infer_config(state_dict: Mapping[str, Tensor], num_heads: int | None = None) -> OfficialConfig:
    """Read a network's sizes off the shapes of its weights.

    Args:
        state_dict: names and tensors, on any device.
        num_heads: attention heads, which leave no trace in the shapes. None: those that the published models of this width
            have, 8 for 448 and 512, 12 for 768, else 16, with a warning where there is none.

    Raises:
        ValueError: names that a network has are missing, a tensor has an odd number of dimensions, or ``num_heads`` is wrong.
    """
    class_emb = _shape(state_dict, "class_emb.weight", 2)
    num_tokens = _shape(state_dict, "diffusion_pos_embed_learned", 3)[1]
    num_slots = _shape(state_dict, "encoder_pos_embed_learned", 3)[1] - num_tokens
    width, token_channels = _shape(state_dict, "z_proj.weight", 2)
    head_width = _shape(state_dict, "diffloss.net.input_proj.weight", 2)[0]
    if num_heads is None:
        num_heads = _HEADS.get(width, 16)
        if width not in _HEADS:
            warnings.warn(
                f"The number of attention heads cannot be read off the weights; num_heads={num_heads} is taken for"
                f" width={width}, which no published model has. Give num_heads, or an architecture, if there are others.",
                stacklevel=2,
            )
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"infer_config: num_heads={num_heads} must divide the weights' width={width}: give num_heads.")
    sizes = Architecture(
        width=width,
        encoder_depth=_depth(state_dict, "encoder_blocks"),
        decoder_depth=_depth(state_dict, "decoder_blocks"),
        num_heads=num_heads,
        head_depth=_depth(state_dict, "diffloss.net.res_blocks"),
        head_width=head_width,
    )
    # Of tied tensors, a safetensors file holds one.
    tied = "mask_token" not in state_dict or state_dict["mask_token"].dim() == 2
    return OfficialConfig(sizes, num_tokens, token_channels, num_slots, class_emb[0], tied)


def _shape(state_dict: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in state_dict:
        raise ValueError(f"The weights hold no {name}, so they are not those of an eMIGM or MAR: was the file cut?")
    shape = tuple(state_dict[name].shape)
    if len(shape) != dims:
        raise ValueError(f"{name} has shape {shape} instead of {dims} dimensions: the weights are not an eMIGM's or MAR's.")
    return shape


def _depth(state_dict: Mapping[str, Tensor], blocks: str) -> int:
    """Number of blocks; one that is missing in between is found when the weights are loaded."""
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    numbers = [int(match[1]) for name in state_dict if (match := pattern.match(name))]
    if not numbers:
        raise ValueError(f"The weights hold no {blocks}.*, so they are not those of an eMIGM or MAR: was the file cut?")
    return 1 + max(numbers)


# Reading


def read_official_weights(
    path: str | Path, which: Which = "ema", tied_token_source: TiedTokenSource = "mask_token"
) -> dict[str, Tensor]:
    """Read a file of weights of eMIGM or MAR: ``*.pth`` of the published code, a bare state dict, or ``.safetensors``.

    Nothing in the file is run; of all classes, only ``argparse.Namespace`` is admitted, a record without behaviour.

    Args:
        path: the file.
        which: of a training file the averaged weights (``ema``) or those of the last step (``raw``).
        tied_token_source: the name that is believed where mask token and fake token are one vector but the file holds two
            values: ``mask_token``, as the published code does, or ``fake_latent``, which of averaged weights is the averaged
            one.

    Returns:
        Names and tensors; where the two tokens are tied, both are there and equal.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds code, is damaged, or does not hold the weights.
    """
    for name, value, kinds in (("which", which, Which), ("tied_token_source", tied_token_source, TiedTokenSource)):
        if value not in get_args(kinds):
            raise ValueError(f"read_official_weights: {name}={value!r} must be one of {', '.join(get_args(kinds))}.")
    content = _read(path)
    weights = _weights(content, which, path)
    if weights is None:
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} holds no weights of eMIGM or MAR ({held or 'it is empty'}): give a file of the published code with"
            " model_ema or model, or a dictionary of names and tensors."
        )
    foreign = [name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if foreign:
        raise ValueError(f"{path}: these weights are not named tensors: {', '.join(map(str, foreign[:5]))}.")
    mask, fake = (weights.get(name, weights.get(other)) for name, other in (_TOKENS, _TOKENS[::-1]))
    if mask is not None and fake is not None and mask.shape == fake.shape:  # tied; of such, safetensors stores one
        if not torch.equal(mask, fake):
            other = next(source for source in get_args(TiedTokenSource) if source != tied_token_source)
            warnings.warn(
                f"{path}: mask_token and fake_latent are one vector in this model, but the file holds two (the published code"
                f" averages fake_latent only). {tied_token_source} is taken; tied_token_source={other!r} takes the other."
                " Published results are those of mask_token.",
                stacklevel=2,
            )
        chosen = mask if tied_token_source == "mask_token" else fake
        weights |= {"mask_token": chosen, "fake_latent": chosen}
    return weights


def _read(path: str | Path, map_location: str = "cpu") -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return read_plain(path, map_location)


def _weights(content: Any, which: Which, path: str | Path) -> dict[str, Any] | None:
    """The weights within a file's content; None if it is another kind of file.

    Raises:
        ValueError: it is such a file, but has only averaged weights, and others are asked for.
    """
    if not isinstance(content, Mapping):
        return None
    if _is_marked(content):
        return dict(content)
    found = {which: content[entry] for which, entry in _ENTRIES.items() if _is_marked(content.get(entry))}
    if which in found or not found:
        return dict(found[which]) if found else None
    if which == "raw":
        raise ValueError(f"{path} holds averaged weights only (model_ema): which='raw' must be 'ema'.")
    warnings.warn(f"{path} holds no averaged weights (model_ema), so those of the last step (model) are taken.", stacklevel=3)
    return dict(found["raw"])


def _is_marked(content: Any) -> bool:
    """Whether this is a state dict of eMIGM or MAR, perhaps not a whole one."""
    return isinstance(content, Mapping) and any(name in content for name in _MARKS)


# Loading and writing


def load_official(
    network: MaskedTransformer,
    path: str | Path,
    which: Which = "ema",
    tied_token_source: TiedTokenSource = "mask_token",
) -> None:
    """Load a file of `read_official_weights` into a network, after comparing all names and shapes.

    Args:
        network: MAR's weights need one with ``cfg_with_mask=False``.
        path: the file.
        which: see `read_official_weights`.
        tied_token_source: see `read_official_weights`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unsafe or damaged, its weights are not this network's (what differs is listed), or some are
            no finite numbers.
    """
    weights = read_official_weights(path, which, tied_token_source)
    try:
        check_weights(network, weights, str(path))
    except ValueError as error:
        raise ValueError(f"{error}{_differences(weights, network)}") from None
    useless = [name for name, tensor in weights.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if useless:
        raise ValueError(
            f"{path} holds weights that are whole numbers, infinite or not a number ({', '.join(useless[:5])}): it was damaged,"
            " or the training that wrote it had diverged."
        )
    network.load_state_dict(weights)


def _differences(weights: Mapping[str, Tensor], network: MaskedTransformer) -> str:
    """Differences between the sizes, in words; empty if there are none."""
    try:
        theirs, ours = (_flat(infer_config(found, num_heads=1)) for found in (weights, network.state_dict()))
    except ValueError:
        return ""
    differing = [name for name in theirs if theirs[name] != ours[name]]
    if not differing:
        return ""
    said = ", ".join(f"{name}={theirs[name]} (the network: {ours[name]})" for name in differing)
    hints = []
    if {"num_tokens", "token_channels"} & set(differing):
        hints.append(
            "The position tables and tokens are those of another resolution, patch_size or codec: 256 tokens of 16 channels are"
            " KL-16 at 256 pixels, 256 of 32 channels DC-AE at 512."
        )
    if "cfg_with_mask" in differing:
        hints.append("MAR's weights need cfg_with_mask=false, those released of eMIGM cfg_with_mask=true.")
    return " ".join([f" The weights have {said}.", *hints])


def _flat(config: OfficialConfig) -> dict[str, Any]:
    fields = asdict(config)
    return {**fields.pop("architecture"), **fields}


def to_official(network: MaskedTransformer) -> dict[str, Tensor]:
    """The state dict of the published code, on the CPU; tied tokens stand under both names, with the same value."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if network.cfg_with_mask:
        weights["mask_token"] = weights["fake_latent"].clone()  # safetensors stores no tensor twice
    return weights


# A whole module


def infer_official_config(cls: type, path: str | Path, num_heads: int | None = None) -> dict[str, Any] | None:
    """The ``{"class_path", "init_args"}`` of the EMIGM that a file's weights are of; None if it is another kind of file.

    The codec is known by the tokens' channels, 16 for KL-16 and 32 for DC-AE, and has no weights yet. Published models come
    with their published sampler, at 16 steps; MAR's with MAR's.

    Args:
        cls: the class to build.
        path: the file.
        num_heads: see `infer_config`.

    Raises:
        ValueError: it is unsafe or damaged, its weights are cut, or their tokens are those of no known codec.
    """
    path = Path(path)
    if not path.is_file():
        return None
    with warnings.catch_warnings():  # those on what is read belong to the loading
        warnings.simplefilter("ignore")
        content = _read(path, "cpu" if path.suffix == ".safetensors" else "meta")
        weights = _weights(content, "ema", path)
    if weights is None:
        return None
    config = infer_config(weights, num_heads)
    side = isqrt(config.num_tokens)
    if config.token_channels not in _CODECS or side**2 != config.num_tokens:
        raise ValueError(
            f"{path} has {config.num_tokens} tokens of {config.token_channels} channels, from which the codec cannot be told (16"
            " channels are KL-16, 32 are DC-AE, in a square): give a configuration."
        )
    codec, stride = _CODECS[config.token_channels]
    image_size = side * stride
    names = (name for name in get_args(SizeName) if architecture(name, image_size) == config.architecture)
    size: SizeName | None = next(names, None)
    arguments: dict[str, Any] = {
        "codec": {"class_path": codec, "init_args": {"image_size": image_size}},
        **({"size": size} if size else {"architecture": asdict(config.architecture)}),
        "num_classes": config.num_classes,
        "buffer_size": config.buffer_size,
        "cfg_with_mask": config.cfg_with_mask,
    }
    if sampler := _published_sampler(config, size, image_size):
        arguments["sampler"] = sampler
    if not config.cfg_with_mask:
        arguments["masking"] = {"law": "mar_truncnorm"}
    return {"class_path": class_path(cls), "init_args": arguments}


def _published_sampler(config: OfficialConfig, size: SizeName | None, image_size: int) -> dict[str, Any] | None:
    if size is None:
        return None
    if config.cfg_with_mask:
        if image_size not in _WINDOWS:
            return None
        t_min, t_max = _HUGE_WINDOW if size == "huge" else _WINDOWS[image_size]
        return {"num_iter": 16, "head_steps": 8, "guidance": {"scale": 4.0, "t_min": t_min, "t_max": t_max}}
    if size not in _MAR_SCALES:
        return None
    guidance = {"scale": _MAR_SCALES[size], "t_min": 0.0, "t_max": 1.0, "ramp": "linear"}
    return {"num_iter": 256, "count_law": "mar", "head": "ddpm", "head_steps": 100, "guidance": guidance}
