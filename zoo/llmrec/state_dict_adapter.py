"""Checkpoints of the published code (WHUIR/LLMRec, ``valid_best.pth``): the trained parameters of one language model.

Names begin with ``llm.``, with low-rank adapters with ``llm.base_model.model.``, and from several processes with ``module.``
before it; what follows is the name in transformers' model without output head. BERT's pooler, which the published code does not
use, is left out.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from zoo.lm.backbone import Backbone

__all__ = ["load_official"]

_PREFIXES = ("module.", "llm.", "base_model.model.")


def load_official(backbone: Backbone, state: Mapping[str, Tensor], name: str) -> None:
    """Load a checkpoint into the parameters that are trained, all of them and no other.

    Args:
        backbone: A model of the same kind, size and tuning.
        state: The checkpoint.
        name: What to call it in an error.

    Raises:
        ValueError: If names or shapes differ.
    """
    found = {_stripped(key): value for key, value in state.items() if ".pooler." not in key}
    own = _trained(backbone)
    missing, unknown = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    other = [key for key in own.keys() & found.keys() if own[key].shape != found[key].shape]
    if missing or unknown or other:
        kinds = {"lacks": missing, "has": unknown, "has in another shape": other}
        examples = "; ".join(f"{kind} {keys[0][:50]}" for kind, keys in kinds.items() if keys)
        raise ValueError(
            f"{name} does not fit the {len(own)} trained weights ({examples}): build the model of its backbone and tuning."
        )
    for key, parameter in own.items():
        parameter.data.copy_(found[key])


def _stripped(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _trained(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Trained parameters by their name in the network without its output head."""
    head = set() if backbone.output_head is None else {id(each) for each in backbone.output_head.parameters()}
    base = f"{getattr(backbone.network, 'base_model_prefix', '')}."
    is_inner = any(name.startswith(base) for name, _ in backbone.network.named_parameters())
    head.discard(id(backbone.input_embedding.weight))
    return {
        name.removeprefix(base) if is_inner else name: parameter
        for name, parameter in backbone.network.named_parameters()
        if parameter.requires_grad and id(parameter) not in head and "pooler." not in name
    }
