"""Samplers compared at numbers of network evaluations: drawn alike, measured, logged, printed and written."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from typing_extensions import override

import zoo
from zoo.base.samples import Samples, TextSamples
from zoo.callbacks.sampling import check_cadence, check_sampling, is_due


class SamplerComparison(Callback, ABC):
    """Base of the callbacks that measure samples, at test and if wanted during training; a subclass knows how.

    At the end of `test`, and of the validation in every n-th epoch of `fit`, each pair of sampler and NFE draws the
    same sample ids; the figures are logged, as `test/<figure>/<sampler>/nfe<n>` and so on. `test` also prints them as a
    table, beside those of real data, writes them to `trainer.default_root_dir`, and keeps them in the attribute
    `result`; its figures go to the loggers only, not into Lightning's own table of results.

    The samples are drawn with the weights that are in the module at that time: the averaged ones where EMA is on.

    Args:
        samplers: Samplers to compare, out of the module's `sampler_names`.
        nfes: Numbers of network function evaluations to compare.
        num_samples: Samples for each pair.
        batch_size: Samples per pass on each rank.
        every_n_epochs: Measure during training too, in the validation of every n-th epoch; None for test only.
        seed: Seed of the samples.

    Raises:
        ValueError: If a list is empty or a number is too small. What depends on module and data is checked in `setup`,
            before the run starts.
    """

    kind: ClassVar[type[Samples] | type[TextSamples]]
    """What the module has to draw."""
    result_file: ClassVar[str]
    """Name of the file that `test` writes."""
    figures: ClassVar[tuple[str, ...]]
    """Names of the figures that are logged."""
    real: ClassVar[str]
    """Name of the entry with the figures of real data."""

    def __init__(
        self,
        samplers: Sequence[str],
        nfes: Sequence[int],
        num_samples: int,
        batch_size: int = 500,
        every_n_epochs: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not samplers or not nfes:
            raise ValueError(f"{name} wants at least one sampler and one NFE, got {samplers} and {nfes}.")
        if num_samples < 1:
            raise ValueError(f"{name}: num_samples must be at least 1, got {num_samples}.")
        if batch_size < 1 or (every_n_epochs is not None and every_n_epochs < 1):
            raise ValueError(f"{name}: batch_size and every_n_epochs must be at least 1, got {batch_size} and {every_n_epochs}.")
        self.samplers = list(samplers)
        self.nfes = list(nfes)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self.result: dict[str, Any] | None = None
        self._loaded: tuple[int, int] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check samplers and NFEs, and what the subclass needs.

        Raises:
            TypeError: If the module offers no samples of the kind, or the DataModule nothing real to compare them with.
            ValueError: If a sampler, an NFE or an option of the subclass is wrong.
        """
        self._loaded = None
        if stage in ("fit", "test"):
            check_sampling(pl_module, self.samplers, self.nfes, type(self).__name__, self.kind)
            self.check(trainer)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the age of the weights that are tested, for Lightning restores its own counts in `fit` only."""
        if trainer.testing:
            self._loaded = checkpoint["epoch"], checkpoint["global_step"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there is a validation to act in."""
        check_cadence(trainer, self.every_n_epochs, type(self).__name__)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log in the validation of every n-th epoch of `fit`."""
        if is_due(trainer, self.every_n_epochs):
            for name, value in self._scalars("val", self.measure(trainer, pl_module)).items():
                pl_module.log(name, value)  # all ranks log the same

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log, print and write."""
        self.result = result = self.measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(self._scalars("test", result), step=result["global_step"])
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / self.result_file
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(result, indent=2) + "\n")
            temporary.replace(path)
            console = Console()
            console.print(self.table(result))
            print(f"{type(self).__name__}: {path}")

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Draw and measure every pair of sampler and NFE.

        Returns:
            On every rank: `rows`, whose figures come with `sampler`, `nfe` (what each sample really cost) and
            `requested_nfe`; the figures of real data, None if they are not measured; and what was measured, on what, when.
        """
        rows: list[dict[str, Any]] = []
        reference = self.reference(trainer) if trainer.is_global_zero else None
        for sampler in self.samplers:
            for nfe in self.nfes:
                samples, spent = self.draw(
                    trainer,
                    pl_module,
                    self.num_samples,
                    batch_size=self.batch_size,
                    seed=self.seed,
                    sampler=sampler,
                    nfe=nfe,
                )
                if trainer.is_global_zero:
                    name = {"sampler": sampler, "nfe": spent, "requested_nfe": nfe}
                    rows.append({**name, **self.score(trainer, samples, reference)})
        result: dict[str, Any] = {}
        if trainer.is_global_zero:
            epoch, global_step = self._loaded or (trainer.current_epoch, trainer.global_step)
            result = {
                "model": type(pl_module).__name__,
                "data": self.data_name(trainer),
                "num_samples": self.num_samples,
                **self.conditions(trainer, reference),
                "seed": self.seed,
                "epoch": epoch,
                "global_step": global_step,
                "zoo_version": zoo.__version__,
                "rows": rows,
                self.real: self.score_real(trainer, reference),
            }
        return trainer.strategy.broadcast(result)

    @staticmethod
    def data_name(trainer: Trainer) -> str | None:
        """Class of the DataModule; None if the run has none."""
        data = getattr(trainer, "datamodule", None)
        return None if data is None else type(data).__name__

    def require(self, trainer: Trainer, method: str, what: str, shape: str) -> None:
        """Make sure that the DataModule has a method that gives real data.

        Args:
            trainer: The trainer.
            method: Name of the method.
            what: What it returns, in the plural, for the message.
            shape: In which form, for the message.

        Raises:
            TypeError: If there is no DataModule, or it lacks the method.
        """
        data = getattr(trainer, "datamodule", None)
        if not hasattr(data, method):
            found = "has no DataModule" if data is None else f"has the DataModule {type(data).__name__} without them"
            raise TypeError(
                f"{type(self).__name__} compares with {what}, and this run {found}: use a DataModule with `{method}()`, {shape}."
            )

    def _scalars(self, stage: str, result: dict[str, Any]) -> dict[str, float]:
        """The figures by the names under which they are logged."""
        rows = {f"{row['sampler']}/nfe{row['requested_nfe']}": row for row in result["rows"]}
        if result[self.real] is not None:
            rows[self.real] = result[self.real]
        return {
            f"{stage}/{name}/{place}": row[name]
            for place, row in rows.items()
            for name in self.figures
            if row.get(name) is not None
        }

    @abstractmethod
    def check(self, trainer: Trainer) -> None:
        """Check, before the run starts, the subclass's options and what it needs of the DataModule."""

    @abstractmethod
    def draw(self, trainer: Trainer, pl_module: LightningModule, num_samples: int, **options: Any) -> tuple[Any, int]:
        """Draw samples on all ranks, as `zoo.callbacks.sampling` does: the samples and what each really cost."""

    @abstractmethod
    def reference(self, trainer: Trainer) -> Any:
        """The real data, on rank 0."""

    @abstractmethod
    def score(self, trainer: Trainer, samples: Any, reference: Any) -> dict[str, Any]:
        """The figures of samples."""

    @abstractmethod
    def score_real(self, trainer: Trainer, reference: Any) -> dict[str, Any] | None:
        """The figures of real data; None if they are not measured."""

    @abstractmethod
    def conditions(self, trainer: Trainer, reference: Any) -> dict[str, Any]:
        """Further settings on which the figures depend."""

    @abstractmethod
    def table(self, result: dict[str, Any]) -> Table:
        """The figures as a table for people."""
