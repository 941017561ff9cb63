"""Progress of Lightning's loops, put back to the last optimizer step that was completed.

What interrupts training does so anywhere: in a forward pass, in a validation, between two epochs. The loops can go on from few
places. This module turns their counters, as they stand when the interruption is noticed, into those of the nearest place before:
after the last completed step, or where the validation or the end of an epoch that were under way begin. Plain dictionaries in and
out, those of ``trainer.fit_loop.state_dict()``.
"""

import copy
from dataclasses import dataclass
from typing import Any

__all__ = ["Reached", "before_interruption", "is_before_first_batch"]


@dataclass(frozen=True)
class Reached:
    """Progress of training.

    Attributes:
        epoch: of the last completed step.
        steps: completed steps of that epoch.
        complete: whether these are all steps of the epoch.
        validation: whether a validation is under way, or due once the epoch's steps are complete.
    """

    epoch: int
    steps: int
    complete: bool
    validation: bool


def before_interruption(loops: dict[str, Any], reached: Reached) -> dict[str, Any]:
    """Counters with which the loops go on.

    Args:
        loops: ``trainer.fit_loop.state_dict()`` at the interruption; stays as it is.
        reached: what training had come to.

    Returns:
        For ``trainer.fit_loop.load_state_dict``; see `is_before_first_batch`.
    """
    state = copy.deepcopy(loops)
    epochs, batches = state["epoch_progress"], state["epoch_loop.batch_progress"]
    next_has_begun = reached.complete and epochs["current"]["started"] > reached.epoch + 1
    if next_has_begun:
        reached = Reached(reached.epoch + 1, 0, complete=False, validation=False)
    _put_back(epochs, reached.epoch)
    all_batches = batches["total"]["completed"]
    if not next_has_begun:  # else the counts may still be those of the epoch before
        all_batches += reached.steps - batches["current"]["completed"]
    all_steps = _put_steps(state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"], reached.steps)
    _set(batches["total"], all_batches)
    _set(batches["current"], reached.steps)
    batches["is_last_batch"] = reached.complete
    stepped = all_steps - 1  # Lightning adds one when it goes on
    if reached.validation:
        _validation_begins(state["epoch_loop.val_loop.batch_progress"])
    elif reached.complete:
        stepped = all_steps
    elif reached.steps:  # at the end of a batch, which Lightning completes
        for name in ("total", "current"):
            batches[name]["completed"] -= 1
    else:  # in the midst of the first batch, which Lightning begins anew
        for name in ("total", "current"):
            for event in ("ready", "started"):
                batches[name][event] += 1
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = stepped
    return state


def is_before_first_batch(batches: dict[str, Any]) -> bool:
    """Whether ``batch_progress``, once loaded, stands in the midst of the first batch of an epoch.

    Lightning begins that batch anew, and counts it twice in all: put its ``total`` counts ``ready`` and ``started`` back to
    ``completed`` once the loop has seen where it stands (in ``on_train_start``).
    """
    return bool(batches["current"]["started"] > batches["current"]["processed"] == 0)


def _put_back(epochs: dict[str, Any], epoch: int) -> None:
    """This epoch is under way."""
    beyond = epochs["current"]["ready"] - (epoch + 1)
    for counts in (epochs["total"], epochs["current"]):
        counts["ready"] -= beyond
        counts["started"] = counts["ready"]
        counts["processed"] = counts["completed"] = counts["ready"] - 1


def _put_steps(optimizer: dict[str, Any], steps: int) -> int:
    """So many steps of the epoch are done; returns those of all epochs."""
    total = int(optimizer["step"]["total"]["completed"])
    for progress in optimizer.values():
        _set(progress["total"], total)
        _set(progress["current"], steps)
    return total


def _validation_begins(batches: dict[str, Any]) -> None:
    done = batches["total"]["completed"]
    batches["total"].update(ready=done + 1, started=done + 1, processed=done)
    batches["current"].update(ready=1, started=1, processed=0, completed=0)
    batches["is_last_batch"] = False


def _set(counts: dict[str, int], number: int) -> None:
    for event in counts:
        counts[event] = number
