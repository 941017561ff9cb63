"""Loss spikes: their updates are skipped, their samples come back later."""

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, distributed
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from zoo.base.anomaly import EWMADetector, Init
from zoo.strategy_contract import CallbackContract, gradient_norm, replicas_diverge, step_group, tells_gradient_norm

__all__ = ["DescribesSamples", "ReportsLosses", "RetryingLoader", "SpikeGuard"]

PersistAction = Literal["lr", "grad"]
Verdict = Literal["apply", "skip", "reduce"]


class ReportsLosses(Protocol):
    """A module that keeps the losses of its last micro-batch for callbacks.

    Attributes:
        last_losses: detached; ``ce``, the mean cross-entropy in nats, 0-dim; ``weight``, how much it counts in the mean over
            micro-batches and ranks (absent: 1); and, to have it recorded, ``ce_per_sample`` (B,).
    """

    last_losses: Mapping[str, Tensor]


class RetryingLoader(Protocol):
    """A training loader that can bring samples back."""

    def requeue(self, sample_ids: list[int], window: int, seed_key: int) -> None:
        """Put samples at random places of the next batches, each once.

        Args:
            sample_ids: those of all ranks; each rank is given the same list.
            window: among how many of the next batches, of all ranks together, they are spread.
            seed_key: makes the places a pure function of the run's seed and this number.
        """


@runtime_checkable
class DescribesSamples(Protocol):
    """A DataModule that can show its training samples to people."""

    def sample_text(self, index: int) -> str:
        """A sample of the training set, by the number that batches have under ``index``, as text."""
        ...


class SpikeGuard(CallbackContract, Callback):
    """Skips the update of a step whose loss or gradient norm is an outlier, and brings its samples back later.

    Each optimizer step is judged once, after the backward pass and before clipping, by the mean loss ``l`` over its
    micro-batches and ranks and by the norm ``g`` of the whole gradient. With an `EWMADetector` ``D`` for each,

        bad = l or g not finite, or D_l says outlier and l > mean + min_delta,
              or D_g says outlier and g > grad_min_ratio * mean.

    * Not bad: the step is applied, both detectors take the values in; a norm that only ``grad_min_ratio`` excuses is cut at its
      limit, lest the detector be blind to the next one.
    * Not finite: skipped; after ``max_consecutive`` bad steps in a row training stops.
    * Bad, and ``patience`` steps were skipped in a row, or it is bad because of samples that were brought back (without them
      its loss is not): applied with learning rate (or gradients) times ``persist_factor``, and the detectors take in the values
      cut at their limits. So a lasting change of the level is followed.
    * Bad otherwise: skipped.

    A skipped step runs forward and backward, and then changes nothing: weights, optimizer state, schedules that advance per
    step, averages and everything else that follows applied steps stay bit for bit. All ranks take the same decision from one
    reduction. Only ``trainer.global_step`` counts skipped steps, as it counts batches. Buffers that a forward pass itself
    updates (batch normalisation) are not taken back.

    The samples of a skipped batch are put at random places of the next ``retry_window`` batches, once, if batches carry their
    ids as ``index`` (B,) and the training loader is a `RetryingLoader`; this is said at the start where it is not so. The loss
    is ``last_losses["ce"]`` of a module that `ReportsLosses`, else the loss it returns. Where losses of samples are not known,
    a bad step with samples that were brought back is bad because of them.

    Logs ``guard/skipped`` and ``guard/reduced``, the numbers of steps so far, and ``guard/loss_score``, the standard deviations
    by which the loss lies above its mean. Source: arXiv 2503.05139, sections 3.4.4 and 6.1; thresholds are not published.

    Args:
        alpha: weight of a new value in the detectors' averages, in (0, 1].
        warmup: steps before anything finite is an outlier.
        threshold: standard deviations above the mean at which a loss is an outlier.
        min_delta: how far above the mean a loss must lie to be bad, in the loss's unit (nats).
        grad_threshold: as ``threshold``, for the gradient norm, whose distribution has a longer tail: healthy small models reach
            15 at a batch of unusual text. None: the norm has to be finite only.
        grad_min_ratio: how many times its mean a norm must be to be bad, at least 1: such healthy batches reach 3. 1 switches it
            off.
        grad_alpha: as ``alpha``, for the gradient norm; None: the same.
        patience: steps that are skipped in a row because of finite outliers.
        max_consecutive: bad steps in a row after which one that is not finite stops the training.
        persist_action: what is reduced when badness persists: the learning rate of that step, or its gradients before
            clipping (which clipping and Adam nearly undo).
        persist_factor: by how much, in [0, 1).
        retry_window: batches among which the samples of a skipped one are spread.
        init: where the detectors' averages start: at the ``first`` value, or, as in the published detector, at ``zero``, which
            leaves them blind until the jump from 0 is forgotten (at alpha 0.02 some 300 steps).
        record_path: a text file, relative to the run's folder, to which each bad step adds a line: seconds since 1970, step,
            mean loss, losses of all samples, their ids, and, as a JSON string, the text of the sample with the largest loss,
            separated by tabs, the two lists by commas. Empty is what module, batch or DataModule (`DescribesSamples`) do not
            tell.

    Attributes:
        skipped: steps skipped so far.
        reduced: steps applied with reduced learning rate or gradients so far.
        consecutive: steps skipped in a row up to now.
        time_inside: seconds spent in this callback, without ``time_waiting``.
        time_waiting: seconds for which it waited for an accelerator to finish the backward pass.

    Raises:
        ValueError: an argument out of range; or, when training starts, a way of training that it cannot guard: a gradient
            scaler (16-mixed), DeepSpeed, manual optimization, LBFGS, or sharded gradients whose norm the strategy does not tell.
        FloatingPointError: ``max_consecutive`` bad steps in a row.
    """

    def __init__(
        self,
        alpha: float = 0.02,
        warmup: int = 120,
        threshold: float = 4.0,
        min_delta: float = 0.25,
        grad_threshold: float | None = 10.0,
        grad_alpha: float | None = None,
        grad_min_ratio: float = 5.0,
        patience: int = 12,
        max_consecutive: int = 20,
        persist_action: PersistAction = "lr",
        persist_factor: float = 0.1,
        retry_window: int = 200,
        init: Init = "first",
        record_path: Path | None = None,
    ) -> None:
        if min_delta < 0:
            raise ValueError(f"SpikeGuard: min_delta={min_delta} must not be negative; 0 switches it off.")
        if not grad_min_ratio >= 1:
            raise ValueError(f"SpikeGuard: grad_min_ratio={grad_min_ratio} must be at least 1, which switches it off.")
        if not 0 <= patience < max_consecutive or retry_window < 1:
            raise ValueError(
                f"SpikeGuard: patience={patience} must be at least 0 and below max_consecutive={max_consecutive}, and"
                f" retry_window={retry_window} at least 1."
            )
        if persist_action not in get_args(PersistAction):
            raise ValueError(
                f"SpikeGuard: persist_action={persist_action!r} must be one of {', '.join(get_args(PersistAction))}."
            )
        if not 0 <= persist_factor < 1:
            raise ValueError(f"SpikeGuard: persist_factor={persist_factor} must lie in [0, 1).")
        self.min_delta = min_delta
        self.grad_min_ratio = grad_min_ratio
        self.patience = patience
        self.max_consecutive = max_consecutive
        self.persist_action = persist_action
        self.persist_factor = persist_factor
        self.retry_window = retry_window
        self.record_path = None if record_path is None else Path(record_path)
        self.watches_norm = grad_threshold is not None
        self.loss_detector = EWMADetector(alpha, warmup, threshold, init)
        norm_alpha = alpha if grad_alpha is None else grad_alpha
        self.norm_detector = EWMADetector(norm_alpha, warmup, threshold if grad_threshold is None else grad_threshold, init)
        self.skipped = 0
        self.reduced = 0
        self.consecutive = 0
        self.time_inside = 0.0
        self.time_waiting = 0.0
        self._loss_score = 0.0
        self._waiting: dict[int, None] = {}  # ids that shall come back, in order
        self._waiting_ids: Tensor | None = None  # the same, on the device
        self._verdict: Verdict = "apply"
        self._index: Tensor | None = None
        self._losses: list[Tensor] = []
        self._weights: list[Tensor | None] = []
        self._sample_losses: list[Tensor] = []
        self._sample_ids: list[Tensor] = []
        self._returned: list[Tensor] = []
        self._told_of_index = False
        self._unwrap: list[Callable[[], None]] = []

    # The rule

    def judge(self, loss: float, norm: float, rest: float | None = None) -> Verdict:
        """Decide on one step, and take it into the detectors and `consecutive`.

        Args:
            loss: mean loss of the step over micro-batches and ranks, with their weights.
            norm: norm of its gradient before clipping.
            rest: mean loss of the samples that were not brought back; None if none were, -inf if all were or it is not known.

        Returns:
            ``apply``, ``skip``, or ``reduce``: apply with ``persist_factor``.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._loss_score = math.nan
            self.consecutive += 1
            return "skip"
        self._loss_score = self.loss_detector.score(loss)
        norm_is_outlier = self.watches_norm and self.norm_detector.is_outlier(norm)
        is_steep = norm_is_outlier and norm > self.grad_min_ratio * self.norm_detector.mean
        if not (self._is_high(loss) or is_steep):
            self.consecutive = 0
            self.loss_detector.update(loss)
            self.norm_detector.update(min(norm, self.norm_detector.value_limit) if norm_is_outlier else norm)
            return "apply"
        persists = rest is not None and not self._is_high(rest)
        if not persists and self.consecutive < self.patience:
            self.consecutive += 1
            return "skip"
        self.loss_detector.update(min(loss, self.loss_detector.value_limit))
        self.norm_detector.update(min(norm, self.norm_detector.value_limit))
        return "reduce"

    def _is_high(self, loss: float) -> bool:
        return self.loss_detector.is_outlier(loss) and loss > self.loss_detector.mean + self.min_delta

    # What strategies and Lightning call

    def changes_gradients(self) -> bool:
        """Yes: a step is skipped, or its gradients are made smaller."""
        return True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse ways of training in which a step cannot be judged or skipped."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            raise ValueError(
                "SpikeGuard: DeepSpeed clips and steps inside its own engine, so that a step cannot be judged before and left"
                " out: remove SpikeGuard, or choose another strategy."
            )
        if not tells_gradient_norm(strategy):
            raise ValueError(
                f"SpikeGuard: {type(strategy).__name__} shards the gradients and has no gradient_norm() that tells the norm of"
                " the whole: remove SpikeGuard, or use ddp, ModelParallelStrategy or a strategy of the zoo."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"SpikeGuard: precision={trainer.precision} scales the gradients and skips steps by itself: use bf16-mixed,"
                " bf16-true or 32-true, or remove SpikeGuard."
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"SpikeGuard: {type(pl_module).__name__} optimizes manually, so its steps cannot be left out from outside:"
                " remove SpikeGuard."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the guard between Lightning and the optimizer."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError("SpikeGuard: LBFGS runs the model several times in a step: remove SpikeGuard.")
            self._guard_optimizer(optimizer)
        self._guard_schedules(trainer, pl_module)
        self._forget_step()
        if not hasattr(trainer.train_dataloader, "requeue"):
            rank_zero_warn(
                f"SpikeGuard: the training loader ({type(trainer.train_dataloader).__name__}) has no requeue(), so the samples of"
                " a skipped step are recorded but not trained on again: use a DataModule of the zoo that offers it."
            )
        elif replicas_diverge(trainer.strategy):
            rank_zero_info(
                "SpikeGuard: while groups of ranks judge their steps separately, the samples of a skipped step are recorded but"
                " not trained on again."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look up the sample ids."""
        self._index = batch.get("index") if isinstance(batch, Mapping) else None
        if self._index is None and not self._told_of_index:
            self._told_of_index = True
            rank_zero_warn(
                'SpikeGuard: batches have no sample ids under "index" (int64, one a sample), so the samples of a skipped step are'
                " neither named in the record nor trained on again."
            )

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the losses of a micro-batch, on the device."""
        with self._timed():
            reported: Mapping[str, Tensor] = getattr(pl_module, "last_losses", {})
            mean = reported.get("ce")
            # Lightning has divided the loss for the sum over micro-batches.
            value = loss.detach() * trainer.accumulate_grad_batches if mean is None else mean.detach()
            self._losses.append(value)
            self._weights.append(reported.get("weight"))
            if "ce_per_sample" in reported:
                self._sample_losses.append(reported["ce_per_sample"].detach())
            if self._index is not None:
                self._sample_ids.append(self._index)
                if self._waiting:
                    self._returned.append(torch.isin(self._index, self._ids_on(self._index.device)))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step."""
        if not self._losses:  # training_step returned None: Lightning has no gradients either
            return
        with self._timed():
            group = step_group(trainer.strategy)
            if group is not None and self._waiting:  # what all ranks waited for would come back to one of them only
                self._waiting, self._waiting_ids = {}, None
                self._returned.clear()
            loss, norm, rest = self._measure(trainer, optimizer, group)
            self._verdict = self.judge(loss, norm, rest)
            if rest is not None or self._verdict != "apply":
                self._follow(trainer, loss, norm, group)
            if self._verdict == "reduce" and self.persist_action == "grad":
                gradients = [p.grad for each in optimizer.param_groups for p in each["params"] if p.grad is not None]
                torch._foreach_mul_(gradients, self.persist_factor)
            self._forget_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            with self._timed():
                pl_module.log("guard/skipped", float(self.skipped))
                pl_module.log("guard/reduced", float(self.reduced))
                pl_module.log("guard/loss_score", self._loss_score)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave optimizer and module as they were."""
        self._remove()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave optimizer and module as they were."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint, plain data."""
        return {
            "loss_detector": self.loss_detector.state_dict(),
            "norm_detector": self.norm_detector.state_dict(),
            "skipped": self.skipped,
            "reduced": self.reduced,
            "consecutive": self.consecutive,
            "waiting": list(self._waiting),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State from the checkpoint."""
        self.loss_detector.load_state_dict(state_dict["loss_detector"])
        self.norm_detector.load_state_dict(state_dict["norm_detector"])
        self.skipped = state_dict["skipped"]
        self.reduced = state_dict["reduced"]
        self.consecutive = state_dict["consecutive"]
        self._waiting = dict.fromkeys(state_dict["waiting"])
        self._waiting_ids = None

    # A step

    def _measure(
        self, trainer: Trainer, optimizer: Optimizer, group: distributed.ProcessGroup | None
    ) -> tuple[float, float, float | None]:
        """What `judge` wants, the same on all ranks of the group."""
        device = self._losses[0].device
        done = torch.cuda.Event() if device.type == "cuda" else None
        if done is not None:
            done.record()
        norm = gradient_norm(trainer.strategy, optimizer)
        ranks = _world_size(trainer)
        alone = len(self._losses) == 1 and ranks == 1
        if alone:  # whatever it weighs
            terms = [*self._losses, norm.to(device)]
        else:
            pairs = zip(self._losses, self._weights, strict=True)
            weights = torch.stack([torch.ones_like(loss) if weight is None else weight for loss, weight in pairs])
            terms = [torch.stack(self._losses).mul(weights).sum(), norm.to(device), weights.sum()]
        if self._returned:
            returned = torch.cat(self._returned)
            known = len(self._sample_losses) == len(self._returned)
            losses = torch.cat(self._sample_losses).flatten() if known else returned.float()
            terms += [
                returned.sum(),
                torch.where(returned, 0, losses).sum(),
                (~returned).sum() if known else returned.new_zeros(()),
            ]
        sums = torch.stack([term.float() for term in terms])
        if ranks > 1:
            # One sum decides for all: what is not finite on one rank is not finite in the sum. Ranks wait for the same ids, so
            # they have the same terms.
            distributed.all_reduce(sums, group=group)
            ranks = distributed.get_world_size(group)
        if done is not None:
            begin = time.perf_counter()
            done.synchronize()
            waited = time.perf_counter() - begin
            self.time_waiting += waited
            self.time_inside -= waited
        loss, norm_sum, *comeback = sums.tolist()
        weight = 1.0 if alone else comeback.pop(0)
        rest = None
        if comeback and comeback[0] > 0:
            rest = comeback[1] / comeback[2] if comeback[2] > 0 else -math.inf
        return loss / weight if weight else loss, norm_sum / ranks, rest

    def _follow(self, trainer: Trainer, loss: float, norm: float, group: distributed.ProcessGroup | None) -> None:
        """Record a bad step, bring its samples back or cross them off, and stop if it is one too many."""
        ranks = _gather(trainer, (_flat(self._sample_ids), _flat(self._sample_losses)), group)
        ids = [int(number) for of_rank, _ in ranks for number in of_rank]
        # Samples that were brought back are given up if the step is not finite; in a step that others made bad they are not.
        again = {number for number in ids if number not in self._waiting or math.isfinite(loss + norm)}
        for number in ids:
            self._waiting.pop(number, None)
        self._waiting_ids = None
        if self._verdict == "apply":
            return
        step, queued = trainer.global_step, sorted(again)  # in an order that does not depend on the number of ranks
        if self._verdict == "skip":
            self.skipped += 1
            requeue = getattr(trainer.train_dataloader, "requeue", None)
            if requeue is None or group is not None:
                queued = []
            elif queued:
                requeue(queued, self.retry_window, step)
                self._waiting.update(dict.fromkeys(queued))
        else:
            self.reduced += 1
        if self.record_path is not None and (distributed.get_rank(group) if _world_size(trainer) > 1 else 0) == 0:
            losses = [value for _, of_rank in ranks for value in of_rank]
            columns = [
                f"{time.time():.3f}", str(step), repr(loss), ",".join(map(repr, losses)), ",".join(map(str, ids)),
                _worst_sample(trainer, losses, ids),
            ]  # fmt: skip
            path = Path(trainer.default_root_dir) / self.record_path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("\t".join(columns) + "\n")
        rank_zero_info(
            f"SpikeGuard: step {step} has loss {loss:.4g} ({self._loss_score:.1f} standard deviations above"
            f" {self.loss_detector.mean:.4g}) and gradient norm {norm:.4g} (usual {self.norm_detector.mean:.4g}): "
            + (
                f"skipped, {len(queued)} samples come back."
                if self._verdict == "skip"
                else f"applied with {'learning rate' if self.persist_action == 'lr' else 'gradients'} x {self.persist_factor:g}."
            )
        )
        if self._verdict == "skip" and self.consecutive >= self.max_consecutive:
            raise FloatingPointError(
                f"SpikeGuard: {self.consecutive} steps in a row were bad, the last with loss {loss} and gradient norm {norm}. If"
                " the weights themselves are broken, skipping cannot mend them: continue from an earlier checkpoint with a lower"
                " learning rate or gradient clipping, or look at the samples"
                + (f" in {self.record_path}." if self.record_path is not None else " (record_path names them).")
            )

    def _forget_step(self) -> None:
        self._losses, self._weights, self._sample_losses, self._sample_ids, self._returned = [], [], [], [], []

    def _ids_on(self, device: torch.device) -> Tensor:
        if self._waiting_ids is None:
            self._waiting_ids = torch.tensor(list(self._waiting), device=device)
        return self._waiting_ids

    # What stands between Lightning and optimizer and schedules

    def _guard_optimizer(self, optimizer: Optimizer) -> None:
        """Run forward, backward and judgement first, and the optimizer's own step only if it is to be applied."""
        apply: Callable[..., Any] = optimizer.step
        before = vars(optimizer).get("step")

        @functools.wraps(apply)  # a learning-rate schedule looks for its mark on the method
        def step(closure: Callable[[], Any] | None = None, **options: Any) -> Any:
            self._verdict = "apply"
            result = None if closure is None else closure()
            if self._verdict == "skip":
                optimizer.zero_grad()
                return result
            factor = self.persist_factor if self._verdict == "reduce" and self.persist_action == "lr" else None
            with _scaled_lr(optimizer, factor):
                return apply(closure=lambda: result, **options)

        def unwrap() -> None:
            if vars(optimizer).get("step") is step:
                del optimizer.step
                if before is not None:
                    optimizer.step = before  # type: ignore[method-assign]

        optimizer.step = step  # type: ignore[method-assign]
        self._unwrap.append(unwrap)

    def _guard_schedules(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a schedule that advances per step where it is when the step was skipped, whatever the module does."""
        advance = pl_module.lr_scheduler_step

        def lr_scheduler_step(scheduler: Any, metric: Any) -> None:
            per_step = any(each.scheduler is scheduler and each.interval == "step" for each in trainer.lr_scheduler_configs)
            if not (per_step and self._verdict == "skip"):
                advance(scheduler, metric)

        pl_module.lr_scheduler_step = lr_scheduler_step  # type: ignore[method-assign]
        self._unwrap.append(lambda: vars(pl_module).pop("lr_scheduler_step", None))

    def _remove(self) -> None:
        while self._unwrap:
            self._unwrap.pop()()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.time_inside += time.perf_counter() - begin


def _worst_sample(trainer: Trainer, losses: list[float], ids: list[int]) -> str:
    """The text of the sample with the largest loss, as JSON; empty where that is not known."""
    datamodule = getattr(trainer, "datamodule", None)
    if not losses or len(losses) != len(ids) or not isinstance(datamodule, DescribesSamples):
        return ""
    worst = max(range(len(losses)), key=lambda place: (math.isnan(losses[place]), losses[place]))
    return json.dumps(datamodule.sample_text(ids[worst]), ensure_ascii=False)


def _flat(tensors: list[Tensor]) -> list[Any]:
    return torch.cat([tensor.flatten() for tensor in tensors]).tolist() if tensors else []


def _world_size(trainer: Trainer) -> int:
    return trainer.world_size if distributed.is_available() and distributed.is_initialized() else 1


def _gather(trainer: Trainer, value: Any, group: distributed.ProcessGroup | None) -> list[Any]:
    """The value of each rank of the group, in order of rank."""
    if _world_size(trainer) == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


@contextmanager
def _scaled_lr(optimizer: Optimizer, factor: float | None) -> Iterator[None]:
    """Multiply the learning rates for one step, whether they are numbers or tensors."""
    if factor is None:
        yield
        return
    before = [each["lr"].clone() if isinstance(each["lr"], Tensor) else each["lr"] for each in optimizer.param_groups]
    for group, value in zip(optimizer.param_groups, before, strict=True):
        _set_lr(group, value * factor)
    try:
        yield
    finally:
        for group, value in zip(optimizer.param_groups, before, strict=True):
            _set_lr(group, value)


def _set_lr(group: dict[str, Any], value: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(value)
    else:
        group["lr"] = value
