"""Whether the forward passes of a model wait for those of other processes."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

__all__ = ["forwards_are_collective"]


def forwards_are_collective(strategy: Strategy) -> bool:
    """Whether, without gradients, all processes must run the network equally often.

    So it is where a process holds parts of the weights, which are gathered for each pass: FSDP, `ModelParallelStrategy`,
    DeepSpeed's stage 3, and strategies that say so by an attribute ``collective_forwards``.

    Args:
        strategy: as it is set up for a run.
    """
    if getattr(strategy, "world_size", 1) == 1:
        return False
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "collective_forwards", False)
