"""Reward models and critics in the formats in which they are published.

| format | backbone | head | further |
|---|---|---|---|
| DeepSpeed-Chat | ``rwtransformer.*`` | ``v_head`` | |
| APP | ``rm_transformer.*`` | ``v_head`` | |
| OpenRLHF | as the model without output head | ``score``, or ``value_head_prefix`` of ``config.json`` | ``mean``, ``std`` there |
| TRL, transformers | ``model.*`` or ``transformer.*`` | ``score`` | |

Heads are (1, width), without bias.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.base.checkpoint import CONFIG_FILE, check_weights, read_plain
from zoo.base.weight_files import weight_files
from zoo.lm.backbone import Backbone
from zoo.lm.hf_backbone import HFBackbone
from zoo.lm.sources import find_source
from zoo.lm.trained_backbone import trained_backbone

__all__ = ["read_reward_model", "scalar_head_state"]

_BACKBONES = ("rwtransformer.", "rm_transformer.", "model.", "transformer.")
_HEADS = ("v_head", "score", "value_head", "summary")
#: Tables that are computed, not trained.
_COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "position_ids")


def read_reward_model(source: str) -> tuple[Backbone, dict[str, Tensor]]:
    """A trained reward model: its backbone with a scalar head, and ``score_mean`` and ``score_deviation``.

    Args:
        source: As of `TrainedReward`.

    Raises:
        FileNotFoundError: If nothing is found under that name.
        ValueError: If it is no reward model, or weights are missing or unknown.
    """
    moments = {"score_mean": torch.tensor(0.0), "score_deviation": torch.tensor(1.0)}
    found = trained_backbone(source, Backbone)
    if found is not None:
        backbone, state = found
        if backbone.scalar is None:
            raise ValueError(f"{source} has no scalar head: give a trained RewardModel.")
        return backbone, {**moments, **state}
    folder = find_source(source).folder
    config = json.loads((folder / CONFIG_FILE).read_text())
    # A causal model, since its base has the names that all formats share.
    backbone = HFBackbone({**config, "architectures": None}, kind="causal", scalar_head=True, pooling="last")
    published = {name: value for file in weight_files(folder) for name, value in read_plain(file, mmap=True).items()}
    state = scalar_head_state(published, config.get("value_head_prefix"))
    head, base = {"weight": state.pop("scalar.weight")}, backbone.network.base_model
    assert backbone.scalar is not None and isinstance(base, nn.Module)
    for module, weights in ((base, state), (backbone.scalar, head)):
        computed = {name: value for name, value in module.state_dict().items() if name.endswith(_COMPUTED)}
        check_weights(module, {**computed, **weights}, source)
        module.load_state_dict(weights, strict=False)  # a tied tensor is stored once
    for name, key in (("score_mean", "mean"), ("score_deviation", "std")):
        if isinstance(config.get(key), int | float):
            moments[name] = torch.tensor(float(config[key]))
    return backbone, moments


def scalar_head_state(state: Mapping[str, Tensor], head_prefix: str | None = None) -> dict[str, Tensor]:
    """Published weights under common names: those of the base model, and ``scalar.weight``.

    Args:
        state: As published.
        head_prefix: First part of the head's name, beside the known ones.

    Raises:
        ValueError: If there is no head, or it is no map to one number without bias.
    """
    heads = (*_HEADS, head_prefix) if head_prefix else _HEADS
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if first in heads:
            found[f"scalar.{rest}"] = value
        elif not name.endswith(_COMPUTED):
            prefix = next((prefix for prefix in _BACKBONES if name.startswith(prefix)), "")
            found[name.removeprefix(prefix)] = value
    head = found.get("scalar.weight")
    if head is None or head.dim() != 2 or head.shape[0] != 1 or "scalar.bias" in found:
        shape = "no head" if head is None else f"a head of the shape {tuple(head.shape)}"
        raise ValueError(f"These weights have {shape}: a reward model has {', '.join(_HEADS)} with one row and no bias.")
    return found
