"""Networks of transformers, built from files or from a plain configuration."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from zoo.base.checkpoint import CONFIG_FILE
from zoo.lm.backbone import BackboneKind
from zoo.lm.sources import PretrainedSource, need_extra

__all__ = ["build_network", "kind_of", "load_network", "read_hf_config"]

# transformers is imported inside of functions: its models take seconds, and `import zoo` must not.


def _check_type(model_type: Any, where: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING_NAMES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "such as llama, qwen2, gpt2, opt, bert or t5."
        raise ValueError(f"{where}: model_type={model_type!r} is not known to transformers: {hint}")


def read_hf_config(source: PretrainedSource | Mapping[str, Any]) -> Any:
    """Configuration of transformers.

    Args:
        source: Files, or plain data with ``model_type``.

    Raises:
        ModuleNotFoundError: If a GGUF file needs a package that is not installed.
        ValueError: If the type of the model is unknown, or an entry does not fit it.
    """
    from transformers import AutoConfig

    if isinstance(source, PretrainedSource):
        if source.gguf is None:
            _check_type(json.loads((source.folder / CONFIG_FILE).read_text()).get("model_type"), str(source.folder))
        else:
            need_extra("gguf", f"The GGUF file {source.gguf}")
        return AutoConfig.from_pretrained(**source.arguments)
    entries = dict(source)
    model_type = entries.pop("model_type", None)
    _check_type(model_type, "HFBackbone: source")
    try:
        return AutoConfig.for_model(model_type, **entries)
    except (TypeError, ValueError) as error:
        raise ValueError(f"HFBackbone: source is no configuration of {model_type}: {str(error).splitlines()[0][:200]}") from error


def kind_of(config: Any) -> BackboneKind:
    """The kind of model that a configuration is usually built as."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.is_encoder_decoder:
        return "encoder_decoder"
    named = (config.architectures or [""])[0]
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    both = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "causal" if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not both else "encoder"


def _auto_class(config: Any, kind: BackboneKind) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if kind == "causal":
        chosen, mapping = transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    elif kind == "encoder_decoder":
        chosen, mapping = transformers.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    elif config.is_encoder_decoder:
        chosen, mapping = transformers.AutoModelForTextEncoding, auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    else:
        chosen, mapping = transformers.AutoModel, auto.MODEL_MAPPING_NAMES
    if config.model_type not in mapping:
        raise ValueError(f"HFBackbone: {config.model_type} is no model of kind {kind}: leave kind out, or take another model.")
    return chosen


def set_dropout(config: Any, probability: float) -> None:
    """Set all probabilities of dropout in a configuration of transformers; those of leaving out whole layers stay.

    Args:
        config: The configuration; changed in place.
        probability: In [0, 1).

    Raises:
        ValueError: If the probability is out of range, or this type of model has no dropout.
    """
    names = [
        name
        for name, value in config.to_dict().items()
        if "drop" in name and "layerdrop" not in name and isinstance(value, float | int) and not isinstance(value, bool)
    ]
    if not 0 <= probability < 1:
        raise ValueError(f"HFBackbone: dropout={probability} must lie in [0, 1).")
    if not names:
        raise ValueError(f"HFBackbone: a model of type {config.model_type} has no dropout: leave dropout={probability} out.")
    for name in names:
        setattr(config, name, probability)


def build_network(config: Any, kind: BackboneKind, dtype: torch.dtype) -> nn.Module:
    """A network with random weights.

    Args:
        config: Configuration of transformers.
        kind: What it is built as.
        dtype: Type of the weights.

    Raises:
        ValueError: If this type of model is not of that kind.
    """
    return cast(nn.Module, _auto_class(config, kind).from_config(config, dtype=dtype))


def load_network(source: PretrainedSource, config: Any, kind: BackboneKind, dtype: torch.dtype) -> nn.Module:
    """A network with the weights of a source; no pickle is read.

    Args:
        source: The files.
        config: What they are the weights of.
        kind: What it is built as.
        dtype: Type of the weights.

    Raises:
        ModuleNotFoundError: If a GGUF file needs a package that is not installed.
        ValueError: If the weights are damaged, or do not fill the network.
    """
    if source.gguf is not None:
        need_extra("accelerate", f"The GGUF file {source.gguf}")
    from transformers.utils import logging

    # Its report lists every weight that was left over, and ours says in a sentence what is missing.
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        network, report = _auto_class(config, kind).from_pretrained(
            **source.arguments, config=config, dtype=dtype, use_safetensors=source.gguf is None or None, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{source.name}: its weights cannot be read as {kind}: {str(error).splitlines()[0][:180]}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    missing = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"{source.name} has no weights for {', '.join(sorted(missing)[:3])}{' and others' if len(missing) > 3 else ''} of a"
            f" model of kind {kind}: give another kind, or the folder of such a model."
        )
    if source.gguf is not None:  # the weights are ordinary numbers now, which can be saved
        network.hf_quantizer = None
        network.is_quantized = False
        network.config.__dict__.pop("quantization_config", None)
    return cast(nn.Module, network)
