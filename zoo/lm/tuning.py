"""Parameters of a pretrained network that are trained: all, the last blocks, low-rank adapters, or none."""

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from zoo.lm.sources import need_extra

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["LoRA", "Tuning", "add_adapter", "blocks_of", "linear_names", "train_last"]

Tuning = Literal["full", "lora", "last_n", "frozen"]


@dataclass
class LoRA:
    """Low-rank adapters: a layer ``W x`` becomes ``W x + (alpha / rank) B A x``, of which A and B are trained.

    Source: "LoRA", arXiv 2106.09685.

    Attributes:
        rank: Rows of A.
        alpha: Numerator of the scale.
        dropout: Probability, in training, on the adapters' inputs.
        targets: Last parts of the names of the layers that get adapters, such as ``q_proj``; None: all linear layers but the
            output's.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"LoRA: rank={self.rank} must be at least 1, alpha={self.alpha} positive and dropout={self.dropout} in [0, 1)."
            )


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Transformer blocks in the order of the forward pass: the entries of the outermost lists of modules."""
    found: list[nn.Module] = []
    for child in network.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def keep_first(network: nn.Module, n: int) -> None:
    """Take the blocks behind the first n out of an encoder or a causal model, in place.

    Args:
        network: A model of transformers.
        n: Number of blocks, at least 1.

    Raises:
        ValueError: If it has fewer blocks, or an encoder and a decoder.
    """
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) and m[0] is blocks_of(network)[0]]
    if len(lists) != 1 or not 1 <= n <= len(lists[0]) or len(blocks_of(network)) != len(lists[0]):
        raise ValueError(f"first_n={n} must lie in 1 ... {len(blocks_of(network))}, the number of blocks of one stack.")
    del lists[0][n:]
    network.config.num_hidden_layers = n  # type: ignore[union-attr]


def train_last(network: nn.Module, n: int) -> None:
    """Freeze a network but for its last blocks and the norm after them.

    Args:
        network: A pretrained network.
        n: Number of blocks, at least 1.

    Raises:
        ValueError: If it has fewer blocks.
    """
    blocks = blocks_of(network)
    if not 1 <= n <= len(blocks):
        raise ValueError(f"last_n={n} must lie in 1 ... {len(blocks)}, the number of blocks of this model.")
    network.requires_grad_(False)
    for block in blocks[-n:]:
        block.requires_grad_(True)
    inside = {id(module) for block in blocks for module in block.modules()}
    norms = [m for m in network.modules() if "norm" in type(m).__name__.lower() and id(m) not in inside]
    if norms and type(norms[-1]) is not nn.Identity and _comes_after(network, norms[-1], blocks[-1]):
        norms[-1].requires_grad_(True)


def _comes_after(network: nn.Module, module: nn.Module, block: nn.Module) -> bool:
    """Whether a norm belongs to the end: it is a sibling of the list of blocks (norms of embeddings are not)."""
    for parent in network.modules():
        children = list(parent.children())
        if any(child is module for child in children):
            return any(isinstance(child, nn.ModuleList) and block in child for child in children)
    return False


def linear_names(network: nn.Module) -> list[str]:
    """Last parts of the names of linear layers."""
    kinds = ("Linear", "Conv1D")
    return list(dict.fromkeys(name.rpartition(".")[2] for name, m in network.named_modules() if type(m).__name__ in kinds))


def add_adapter(network: nn.Module, lora: LoRA, folder: Path | None = None, trained: bool = True) -> "PeftModel":
    """Put low-rank adapters into the layers of a network, in place, and freeze everything else.

    Args:
        network: A model of transformers.
        lora: Options; not used where an adapter is loaded.
        folder: An adapter in peft's format to start from; None: a new one, which changes nothing yet.
        trained: Whether the adapters are trained.

    Returns:
        peft's view of the same network, which saves adapters in its own format and merges them.

    Raises:
        ModuleNotFoundError: If peft is not installed.
        ValueError: If no layer has a name of ``lora.targets``.
    """
    need_extra("peft", "tuning='lora'")
    from peft import LoraConfig, PeftModel, get_peft_model

    if folder is not None:
        with _quiet():
            return PeftModel.from_pretrained(network, str(folder), is_trainable=trained)
    known = linear_names(network)
    for target in lora.targets or ():
        if not any(name == target or name.endswith(f".{target}") for name, _ in network.named_modules()):
            near = difflib.get_close_matches(target, known, n=3, cutoff=0.3) or known[:3]
            raise ValueError(f"LoRA: targets={target!r} matches no layer of this model: nearest are {', '.join(near)}.")
    options: dict[str, Any] = {"target_modules": lora.targets or "all-linear"}
    if getattr(network, "pooler", None) is not None:
        options["exclude_modules"] = r"pooler\..*"  # not part of the forward pass
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, **options)
    with _quiet():
        return get_peft_model(network, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore what peft and transformers tell one another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
