"""How fast training runs, and how much of the device's arithmetic it uses."""

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from zoo.base.anomaly import EWMADetector
from zoo.base.step_interval import crosses_multiple
from zoo.strategy_contract import data_replicas

__all__ = ["PEAK_FLOPS", "CountsFlops", "SpeedMonitor", "peak_flops_of"]

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bfloat16 FLOP/s by the first of these words in the device's name; from the makers' data sheets."""


class CountsFlops(Protocol):
    """A module that knows its arithmetic."""

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward pass per token, recomputation left out, at this length."""


def peak_flops_of(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None if it is not in the table.

    >>> peak_flops_of("NVIDIA H100 80GB HBM3"), peak_flops_of("NVIDIA H100 PCIe"), peak_flops_of("abacus")
    (989000000000000.0, 756000000000000.0, None)
    """
    words = f" {device_name.replace('-', ' ')} "  # "A100-SXM4-40GB"
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


class _Mark:
    """A moment in the device's work (CUDA), which need not have come yet, or on the clock."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._time = time.perf_counter()

    def reached(self) -> bool:
        """Whether the device has come here; asks, does not wait."""
        return self._event is None or self._event.query()

    def seconds_since(self, earlier: "_Mark") -> float:
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1000


@dataclass
class _Step:
    """The optimizer steps of a batch, in manual optimization several, whose time is not known yet."""

    number: int
    count: int
    tokens: int
    seq_len: int
    stretches: list[tuple[_Mark, _Mark]]

    def seconds(self) -> float:
        """Seconds that each of the steps took on average."""
        return sum(end.seconds_since(begin) for begin, end in self.stretches) / self.count


class SpeedMonitor(Callback):
    """Logs tokens per second, step times and MFU, and warns of steps that are far slower than usual.

    A step lasts from the end of the one before to its own end, waiting for data included; validation and saving of checkpoints
    are left out, and so is the first batch, which compiles and allocates. On CUDA the device's own clock is read, late and
    without ever waiting for it. (Lightning has a callback called ThroughputMonitor, hence the name.)

    ============================  ==================================================================================
    name                          meaning
    ============================  ==================================================================================
    throughput/tokens_per_second  elements of ``attention_mask`` or ``input_ids``, of all ranks
    throughput/samples_per_second  instead, for batches without these: samples of all ranks
    throughput/step_seconds       median over the steps since the last log
    throughput/step_seconds_p95   their 95th percentile
    throughput/mfu                share of ``peak_flops`` used by the FLOPs that a module which `CountsFlops` counts
    throughput/slow_steps         steps that were warned of so far
    ============================  ==================================================================================

    Args:
        peak_flops: FLOP/s of one device; None: from `PEAK_FLOPS`, and where it does not list the device, no MFU.
        every_n_steps: optimizer steps between two logs; None: the trainer's ``log_every_n_steps``.
        slow_threshold: standard deviations above the moving average from which a step is slow.
        slow_factor: and how many times as long as the average it must have lasted.
        slow_warmup: steps before any is slow.

    Attributes:
        latest: what was logged last.
        slow_steps: number of slow steps so far.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        peak_flops: float | None = None,
        every_n_steps: int | None = None,
        slow_threshold: float = 4.0,
        slow_factor: float = 2.0,
        slow_warmup: int = 50,
    ) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"SpeedMonitor: peak_flops={peak_flops} must be positive, or null to look it up.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"SpeedMonitor: every_n_steps={every_n_steps} must be at least 1, or null for the trainer's.")
        if slow_factor < 1:
            raise ValueError(f"SpeedMonitor: slow_factor={slow_factor} must be at least 1.")
        self.peak_flops = peak_flops
        self.every_n_steps = every_n_steps
        self.slow_factor = slow_factor
        self.latest: dict[str, float] = {}
        self.slow_steps = 0
        self._detector = EWMADetector(0.05, slow_warmup, slow_threshold, init="first")
        self._peak: float | None = None
        self._open: _Mark | None = None
        self._stretches: list[tuple[_Mark, _Mark]] = []
        self._tokens = 0
        self._unit = "tokens"
        self._seq_len = 0
        self._first = True
        self._seen_step = 0
        self._running: deque[_Step] = deque()
        self._known: list[tuple[_Step, float]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the device."""
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
        self._peak = self.peak_flops or peak_flops_of(name)
        if not hasattr(pl_module, "flops_per_token"):
            rank_zero_info(f"SpeedMonitor: {type(pl_module).__name__} has no flops_per_token(), so MFU is not logged.")
        elif self._peak is None:
            rank_zero_info(f"SpeedMonitor: peak FLOP/s of {name} not known, so MFU is not logged: give peak_flops.")
        self._open, self._stretches, self._tokens, self._first = None, [], 0, True
        self._running.clear()
        self._known.clear()
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on after an interruption."""
        if self._open is None:
            self._open = _Mark(pl_module.device)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out."""
        self._interrupt(pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave saving out."""
        self._interrupt(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Count a micro-batch; note the end of a step, and log if it is time."""
        self._unit, number, self._seq_len = _amount(batch)
        self._tokens += number
        before, now = self._seen_step, trainer.global_step
        if now == before:
            return
        self._seen_step = now
        end = _Mark(pl_module.device)
        if self._open is not None:
            self._stretches.append((self._open, end))
        if not self._first:
            self._running.append(_Step(now - 1, now - before, self._tokens, self._seq_len, self._stretches))
        self._open, self._stretches, self._tokens, self._first = end, [], 0, False
        while self._running and self._running[0].stretches[-1][1].reached():
            self._take(self._running.popleft())
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if crosses_multiple(before, now, every) and self._known:
            self.latest = self._summary(trainer, pl_module)
            for name, value in self.latest.items():
                pl_module.log(name, value)

    def _interrupt(self, pl_module: LightningModule) -> None:
        if self._open is not None:
            self._stretches.append((self._open, _Mark(pl_module.device)))
            self._open = None

    def _take(self, step: _Step) -> None:
        """Add a step whose time is known now, and warn if it was slow."""
        seconds = step.seconds()
        self._known.append((step, seconds))
        usual = self._detector.mean
        if self._detector.is_outlier(seconds) and seconds > self.slow_factor * usual:
            self.slow_steps += 1
            rank_zero_warn(f"SpeedMonitor: step {step.number} took {seconds:.3g} s; usual are {usual:.3g} s.")
        self._detector.update(min(seconds, self._detector.value_limit))

    def _summary(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        seconds = [taken for step, taken in self._known for _ in range(step.count)]
        (replicas, _), total = data_replicas(trainer.strategy), sum(seconds)
        values = {
            f"{self._unit}_per_second": replicas * sum(step.tokens for step, _ in self._known) / total,
            "step_seconds": statistics.median(seconds),
            "step_seconds_p95": statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0],
            "slow_steps": float(self.slow_steps),
        }
        if self._peak is not None and self._unit == "tokens" and hasattr(pl_module, "flops_per_token"):
            module: CountsFlops = pl_module  # type: ignore[assignment]
            flops = replicas * sum(step.tokens * module.flops_per_token(step.seq_len) for step, _ in self._known)
            values["mfu"] = flops / total / (self._peak * trainer.world_size)
        self._known.clear()
        return {f"throughput/{name}": value for name, value in values.items()}


def _amount(batch: Any) -> tuple[str, int, int]:
    """What a batch holds: the unit, how many, and the length of a sequence."""
    if isinstance(batch, Mapping):
        for name in ("attention_mask", "input_ids"):
            if name in batch:
                return "tokens", batch[name].numel(), batch[name].shape[-1]
    while isinstance(batch, Mapping | tuple | list):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return "samples", len(batch) if isinstance(batch, Tensor) else 1, 0
