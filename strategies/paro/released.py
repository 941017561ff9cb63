"""Parameters whose values are elsewhere: to use one is an error that says where it may be used, not a crash."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["released_class"]

_VALUES = {"data", "T", "H", "mT", "mH", "real", "imag"}
"""Attributes of a tensor that give its values; all others say what it is, or belong to autograd."""

_METADATA = {
    *(getattr(Tensor, name) for name in (
        "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "is_signed",
        "ndimension", "nelement", "numel", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_",
        "retain_grad", "size", "storage_offset", "stride",
    )),
    torch.is_complex, torch.is_floating_point, torch.numel,
}  # fmt: skip


def released_class(name: str, kind: type[nn.Parameter]) -> type[nn.Parameter]:
    """The class of a parameter while its values are not on this rank.

    Shape, dtype, device, gradient and hooks can be asked for; everything else raises.

    Args:
        name: Name of the parameter, for the message.
        kind: Its class otherwise.
    """

    def refuse(
        cls: type,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "data")  # of a property's getter or setter
        if func in _METADATA or (func.__name__ in ("__get__", "__set__", "__delete__") and attribute not in _VALUES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        raise RuntimeError(
            f"PaRO: {name} was used outside of its block's forward, where this rank does not hold it: for a norm or a penalty use"
            " it inside `with trainer.strategy.summon_full_params():` on all ranks, or return that from the block's forward; for"
            " an L2 penalty set weight_decay."
        )

    return type(kind.__name__, (kind,), {"__torch_function__": classmethod(refuse)})
