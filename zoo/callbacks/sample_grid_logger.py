"""Pictures of samples during training, for whatever logger the run has."""

from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from zoo.base.samples import Samples
from zoo.callbacks.picture import picture_grid
from zoo.callbacks.sampling import check_cadence, check_sampling, draw_images, is_due


class SampleGridLogger(Callback):
    """Draws a grid of the same samples in the validation of every n-th epoch, to watch a model learn.

    The picture is written to `trainer.default_root_dir/pictures/samples_<global step>.png`, and handed to every logger
    that takes pictures: those with `log_image` (W&B) and those whose experiment has `add_image` (TensorBoard).

    Args:
        every_n_epochs: Draw in the validation of every n-th epoch.
        num_images: Images in the grid.
        columns: Columns of the grid.
        sampler: Sampler; None for the module's own.
        nfe: Network function evaluations per sample; None for the module's own number.
        seed: Seed of the samples; every grid shows the same ones.
        tag: Name of the picture in the loggers.

    Raises:
        ValueError: If a number is less than 1. The sampler is checked in `setup`, before training starts.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num_images: int = 64,
        columns: int = 8,
        sampler: str | None = None,
        nfe: int | None = None,
        seed: int = 0,
        tag: str = "samples",
    ) -> None:
        super().__init__()
        for name, value in (("every_n_epochs", every_n_epochs), ("num_images", num_images), ("columns", columns)):
            if value < 1:
                raise ValueError(f"SampleGridLogger: {name} must be at least 1, got {value}.")
        self.every_n_epochs = every_n_epochs
        self.num_images = num_images
        self.columns = columns
        self.sampler = sampler
        self.nfe = nfe
        self.seed = seed
        self.tag = tag

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check sampler and NFE, and that the module draws images."""
        if stage == "fit":
            check_sampling(pl_module, [self.sampler], [self.nfe], "SampleGridLogger", Samples)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there is a validation to act in."""
        check_cadence(trainer, self.every_n_epochs, "SampleGridLogger")

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the samples and log them."""
        if not is_due(trainer, self.every_n_epochs):
            return
        images, _ = draw_images(
            trainer,
            pl_module,
            self.num_images,
            batch_size=self.num_images,
            seed=self.seed,
            sampler=self.sampler,
            nfe=self.nfe,
        )
        if not trainer.is_global_zero:
            return
        picture = picture_grid(images, self.columns)
        path = Path(trainer.default_root_dir) / "pictures" / f"{self.tag}_{trainer.global_step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(key=self.tag, images=[picture], step=trainer.global_step)
            elif hasattr(logger, "experiment") and hasattr(logger.experiment, "add_image"):
                pixels_HWC = np.atleast_3d(np.asarray(picture))
                logger.experiment.add_image(self.tag, pixels_HWC, trainer.global_step, dataformats="HWC")
