"""Floating-point types of the weights that are trained."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from zoo.strategy_contract import keeps_float32_weights

__all__ = ["settle_types"]


def settle_types(network: nn.Module, trainer: Trainer) -> None:
    """Turn parameters of half precision into float32 unless the training is in true half precision.

    An optimizer that adds small updates needs float32; true half precision without it gets a warning.
    """
    precision = str(trainer.precision)
    small = [p for p in network.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    if small and (precision == "32-true" or precision.endswith("-mixed")):
        rank_zero_info(
            f"{len(small)} parameters of half precision are trained in float32, as precision={precision} says;"
            " bf16-true trains them as they are."
        )
        for parameter in small:
            parameter.data = parameter.data.float()
    if precision == "bf16-true" and not keeps_float32_weights(trainer.strategy):
        rank_zero_warn(
            "With precision=bf16-true the optimizer adds its updates to bfloat16 weights, which do not notice small"
            " ones (at a learning rate of 1e-5, nearly all): use bf16-mixed, or a strategy that keeps float32 weights"
            " beside them, such as DeepSpeed and PaRO."
        )
