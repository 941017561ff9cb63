"""The ``config.json`` released with the weights <-> a `LingConfig`.

Defaults of the released configuration class are not those of the released models (biases on, no NormHead, dropout 0.1), so
whatever shapes the network has to be in the file. Source: files and configuration class of github.com/inclusionAI/Ling.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from zoo.ling.config import LingConfig, RopeScaling

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "check_released", "from_hf_config", "read_hf_config", "to_hf_config"]

ARCHITECTURE = "BailingMoeForCausalLM"
#: Other heads on the same network, and none.
_OTHER_HEADS = ("BailingMoeForSequenceClassification", "BailingMoeModel")
MODEL_TYPE = "bailing_moe"
CONFIG_FILE = "config.json"

#: What must be in the file, and its type.
_REQUIRED: dict[str, type] = {
    "vocab_size": int,
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "num_experts": int,
    "num_experts_per_tok": int,
    "num_shared_experts": int,
    "moe_intermediate_size": int,
    "first_k_dense_replace": int,
    "norm_topk_prob": bool,
    "rope_theta": float,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "norm_head": bool,
    "use_bias": bool,
    "use_qkv_bias": bool,
    "initializer_range": float,
    "attention_dropout": float,
}
#: What may be left out or null: these values mean the same in both codes.
_OPTIONAL: dict[str, Any] = {
    "head_dim": None,
    "intermediate_size": None,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
_NULLABLE = ("num_shared_experts",)
#: Names of the same number in some of the released files.
_ALIASES = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
#: What later models of the name say, and the only value that describes this architecture.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_qk_norm": (False, None),
    "score_function": ("softmax", None),
    "moe_router_enable_expert_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "rotary_dim": (None,),
    "n_group": (0, 1, None),
    "routed_scaling_factor": (1, None),
    "num_nextn_predict_layers": (0, None),
}
_LATER = {
    "bailing_moe_v2": "BailingMoeV2 (Ling 2.0: sigmoid router with bias, normalised queries and keys, partial rotation)",
    "bailing_moe_linear": "Ling 2.0 with linear attention",
    "bailing_hybrid": "Ling 2.5 or 3.0 (linear and latent attention)",
}


def check_released(entries: Mapping[str, Any], source: str) -> None:
    """Refuse what is not the configuration of a Ling of the first generation.

    Args:
        entries: ``config.json``, parsed.
        source: Its name in messages.

    Raises:
        ValueError: it is of another architecture, or an entry that the network depends on is missing or has the wrong type.
    """
    entries = _released_rope(entries, source)
    model_type = entries.get("model_type")
    architectures = [str(name) for name in entries.get("architectures") or []]
    later = _LATER.get(str(model_type)) or next((_LATER["bailing_moe_v2"] for n in architectures if "BailingMoeV" in n), None)
    if later:
        raise ValueError(f"{source} is of {later}, another architecture: only {ARCHITECTURE} (Ling-Lite, Ling-Plus) is known.")
    if model_type != MODEL_TYPE:
        raise ValueError(f"{source} has model_type={model_type!r} instead of {MODEL_TYPE!r}: these are no weights of Ling.")
    if architectures and not {ARCHITECTURE, *_OTHER_HEADS} & set(architectures):
        raise ValueError(f"{source} is of {', '.join(architectures)}: only {ARCHITECTURE} is known.")
    missing = [name for name in _REQUIRED if _value(entries, name, source) is None and name not in _NULLABLE]
    missing += [name for name in _NULLABLE if not any(key in entries for key in _keys(name))]
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(missing)}. Nothing is assumed, because the defaults of the released code are not those of"
            " the released models: add what the weights were trained with."
        )
    for name, kind in _REQUIRED.items():
        value = _value(entries, name, source)
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = {bool: isinstance(value, bool), int: whole, float: whole or isinstance(value, float)}[kind]
        if not fits and not (value is None and name in _NULLABLE):
            raise ValueError(f"{source}: {name}={value!r} must be of type {kind.__name__}.")
    for name, allowed in _FIXED.items():
        if entries.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{source}: {name}={entries[name]!r} describes another architecture: only {allowed[0]!r} is known.")


def from_hf_config(entries: Mapping[str, Any], source: str = "config.json") -> LingConfig:
    """The architecture that a released configuration describes; entries that say nothing about it are left alone.

    ``head_dim`` may be missing, null or 0 (hidden size / heads), shared experts null or 0 (none), ``n_routed_experts`` and
    ``n_shared_experts`` stand for ``num_experts`` and ``num_shared_experts``, ``rope_parameters`` for ``rope_theta`` and
    ``rope_scaling``.

    Args:
        entries: ``config.json``, parsed.
        source: Its name in messages.

    Raises:
        ValueError: see `check_released`; or numbers that do not fit one another.
    """
    check_released(entries, source)
    entries = _released_rope(entries, source)
    found: dict[str, Any] = {name: _value(entries, name, source) for name in _REQUIRED}
    found |= {name: float(found[name]) for name, kind in _REQUIRED.items() if kind is float}
    found |= {name: entries.get(name, default) for name, default in _OPTIONAL.items()}
    found["rope_scaling"] = _scaling(found["rope_scaling"], source)
    found["num_shared_experts"] = found["num_shared_experts"] or 0
    found["head_dim"] = found["head_dim"] or None
    found["tie_word_embeddings"] = found["tie_word_embeddings"] or False
    found["eos_token_id"] = None if found["eos_token_id"] == [] else found["eos_token_id"]
    try:
        return LingConfig(**found)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def to_hf_config(config: LingConfig, kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Entries of a released ``config.json`` for an architecture.

    Args:
        config: the architecture.
        kept: an earlier file's entries; what does not depend on the architecture stays as it is.
    """
    kept = dict(kept or {})
    entries = {"architectures": [ARCHITECTURE], **kept, "model_type": MODEL_TYPE}
    scaling = None
    if config.rope_scaling is not None:
        scaling = {name: value for name, value in asdict(config.rope_scaling).items() if value is not None}
    for name in (*_REQUIRED, *_OPTIONAL):
        entries[name] = getattr(config, name)
    entries["head_dim"] = config.head_width
    entries["rope_scaling"] = scaling
    entries.setdefault("hidden_act", "silu")
    entries.pop("rope_parameters", None)  # said in the released way
    for alias, name in _ALIASES.items():
        if alias in entries:
            entries[alias] = entries[name]
    return entries


def read_hf_config(path: str | Path) -> tuple[LingConfig, dict[str, Any]]:
    """Read the configuration of a released folder.

    Args:
        path: the folder, its ``config.json``, or a file of weights in it.

    Returns:
        The architecture, and all entries as they stand in the file.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it is no JSON, or see `from_hf_config`.
    """
    path = Path(path)
    if not path.exists() and path.name != CONFIG_FILE:
        raise FileNotFoundError(f"There is no {path}: give the folder of released weights, with {CONFIG_FILE} in it.")
    file = path / CONFIG_FILE if path.is_dir() else path.with_name(CONFIG_FILE)
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}: a released folder holds {CONFIG_FILE} beside its weights.")
    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): was the download complete?") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{file} holds no entries, but a {type(entries).__name__}: was the download complete?")
    if "_class_path" in entries:
        raise ValueError(f"{file} was written by save_pretrained of the zoo, not released: load it with from_pretrained.")
    return from_hf_config(entries, str(file)), entries


def _keys(name: str) -> list[str]:
    return [name, *(alias for alias, meant in _ALIASES.items() if meant == name)]


def _value(entries: Mapping[str, Any], name: str, source: str) -> Any:
    """An entry under any of its names."""
    given = {key: entries[key] for key in _keys(name) if entries.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{source}: {' and '.join(f'{k}={v}' for k, v in given.items())} contradict each other: leave one out.")
    return next(iter(given.values()), None)


def _released_rope(entries: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Entries whose ``rope_theta`` and ``rope_scaling`` say what ``rope_parameters``, as transformers 5 writes it, does."""
    given = entries.get("rope_parameters")
    if not given:
        return entries
    if not isinstance(given, Mapping):
        raise ValueError(f"{source}: rope_parameters={given!r} must be entries such as rope_type and rope_theta.")
    theta, before = given.get("rope_theta", entries.get("rope_theta")), entries.get("rope_scaling")
    scaling = {name: value for name, value in given.items() if name != "rope_theta"}
    if entries.get("rope_theta") not in (None, theta) or (before and _scaling(before, source) != _scaling(scaling, source)):
        raise ValueError(
            f"{source}: rope_parameters={given!r} and rope_theta={entries.get('rope_theta')!r}, rope_scaling={before!r}"
            " contradict each other: leave one out."
        )
    return {**entries, "rope_parameters": None, "rope_theta": theta, "rope_scaling": scaling}


def _scaling(value: Any, source: str) -> RopeScaling | None:
    if not value:
        return None
    given = dict(value) if isinstance(value, Mapping) else {}
    kinds = {given.pop(name) for name in ("type", "rope_type") if name in given}
    if len(kinds) > 1:
        raise ValueError(f"{source}: type and rope_type of rope_scaling={value!r} contradict each other: leave one out.")
    kind = next(iter(kinds), None)
    if kind == "default" and set(given) <= {"rope_theta"}:
        return None
    known = [field.name for field in fields(RopeScaling)]
    unknown = [name for name in given if name not in known]
    if kind is None or "factor" not in given or unknown:
        raise ValueError(
            f"{source}: rope_scaling={value!r} needs type and factor, and may have {', '.join(known[2:])}"
            + (f", but not {', '.join(unknown)}." if unknown else ".")
        )
    if kind == "yarn" and given.get("original_max_position_embeddings") is None:
        raise ValueError(
            f"{source}: rope_scaling of type yarn needs original_max_position_embeddings, the length that was trained (the"
            " released code assumes 4096)."
        )
    try:
        return RopeScaling(type=kind, **{name: number for name, number in given.items() if number is not None})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
