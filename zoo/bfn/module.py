"""The LightningModule of Bayesian flow networks.

Shape suffixes: B samples, C channels, H height, W width, T network calls of a trajectory.
"""

import math
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.bfn.bins import bin_centre, bin_index, check_num_bins
from zoo.bfn.denoiser import Denoiser, Guide, InPainting
from zoo.bfn.flow import ContinuousFlow, Flow
from zoo.bfn.heads import DeltaHead, Head
from zoo.bfn.losses import bits, continuous_time_loss, discrete_time_loss, predict_from_data, reconstruction_loss
from zoo.bfn.network import Network, ResidualMLP
from zoo.bfn.solvers import ODE2M, Solver, solver_names
from zoo.module import ZooModule
from zoo.random import SampleRandom
from zoo.sampling import Samples

__all__ = ["BFN"]


class BFN(ZooModule):
    """Bayesian flow network: learns images by predicting them from beliefs of growing accuracy, samples in few calls.

    Batches are ``(image, label)`` with image (B, C, H, W) in [0, 1]; labels are not used. Images are quantised here, to the
    centres of ``num_bins`` bins in [-1, 1], channels last.
    Sources: Graves et al., arXiv 2308.07037; samplers: Xue et al., arXiv 2404.15766.

    Args:
        network: predicts; default is a `ResidualMLP` for images of ``image_shape``.
        flow: how beliefs sharpen; default is a `ContinuousFlow` for 16 levels.
        head: what the network's output means; default is a `DeltaHead`.
        solver: the sampler; default is `ODE2M` with 10 network calls.
        image_shape: channels, height, width.
        num_bins: levels of a pixel: 16 for grey digits, 256 for 8-bit images.
        stratified_time: spread the training times evenly over each batch; less noise in the loss, same mean.
        clip_in_loss: compare with estimates confined to the data's range, where no gradient flows (as published).
        likelihood_steps: numbers of messages for which ``test`` gives the likelihood; 0 is the limit of infinitely many.
        likelihood_repeats: Monte-Carlo draws per image for it.
        predict_trajectory: let ``predict`` return the estimate of each network call too.
        optimizer: makes the optimizer; the published one by default.
        lr_scheduler: makes the learning-rate schedule.
        lr_scheduler_interval: whether the schedule advances per optimizer step or per epoch.
        compile: compile the network with ``torch.compile``.

    Raises:
        ValueError: components that do not fit one another, or an argument out of range.
    """

    def __init__(
        self,
        network: Network | None = None,
        flow: Flow | None = None,
        head: Head | None = None,
        solver: Solver | None = None,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        num_bins: int = 16,
        stratified_time: bool = False,
        clip_in_loss: bool = True,
        likelihood_steps: tuple[int, ...] = (0, 10),
        likelihood_repeats: int = 1,
        predict_trajectory: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4, betas=(0.9, 0.99)),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_scheduler_interval, compile)
        check_num_bins(num_bins, "BFN")
        if likelihood_repeats < 1 or any(steps < 0 for steps in likelihood_steps):
            raise ValueError(
                f"BFN: likelihood_repeats={likelihood_repeats} must be at least 1, and likelihood_steps={likelihood_steps}"
                " at least 0, which stands for infinitely many."
            )
        channels, height, width = image_shape
        self.data_shape = (height, width, channels)
        self.num_bins = num_bins
        self.flow = flow or ContinuousFlow()
        self.head = head or DeltaHead(num_bins=num_bins)
        self.solver = solver or ODE2M()
        self.network = network or ResidualMLP(num_elements=math.prod(image_shape))
        if not isinstance(self.flow, self.head.flow_type):
            raise ValueError(
                f"BFN: {type(self.head).__name__} needs a {self.head.flow_type.__name__}, not {type(self.flow).__name__}."
            )
        if self.head.num_bins != num_bins:
            raise ValueError(
                f"BFN: num_bins={num_bins}, but {type(self.head).__name__} was given num_bins={self.head.num_bins}:"
                " set both to the data's number of levels."
            )
        self.stratified_time = stratified_time
        self.clip_in_loss = clip_in_loss
        self.likelihood_steps = tuple(likelihood_steps)
        self.likelihood_repeats = likelihood_repeats
        self.predict_trajectory = predict_trajectory
        names = [f"val/{name}" for name in _likelihood_names((0,))]
        names += [f"test/{name}" for name in _likelihood_names(self.likelihood_steps)]
        self.means = nn.ModuleDict({name: MeanMetric() for name in names})

    # Images and data

    def quantise(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] as data: bin centres (B, H, W, C) in [-1, 1], float32 or float64.

        Raises:
            ValueError: the images have another shape than the model.
        """
        height, width, channels = self.data_shape
        if image.shape[1:] != (channels, height, width):
            raise ValueError(
                f"BFN was built for images of {channels} x {height} x {width}, the data gives"
                f" {' x '.join(map(str, image.shape[1:]))}: set image_shape and the network to the data's shape."
            )
        image = image.to(torch.promote_types(image.dtype, torch.float32)).movedim(-3, -1)
        return bin_centre(bin_index(2 * image - 1, self.num_bins), self.num_bins, image.dtype)

    def to_image(self, x: Tensor) -> Tensor:
        """Data (..., H, W, C) as images (..., C, H, W) in [0, 1]: the first bin is 0, the last is 1."""
        return (x * (self.num_bins / (2 * self.num_bins - 2)) + 0.5).clamp(0, 1).movedim(-1, -3)

    # Training and likelihood

    def predict_data(self, x: Tensor, t: Tensor, random: SampleRandom, name: str) -> Any:
        """What the network says of the data x, shown at the times t (B,) with noise that is drawn under ``name``."""
        noise = random.normal(name, self.flow.state_shape(self.data_shape), x.dtype)
        return predict_from_data(self.network, self.flow, self.head, x, t, noise)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Continuous-time loss of a batch (Lightning hook)."""
        x = self.quantise(batch[0])
        random = self.train_random(len(x))
        draw = random.stratified if self.stratified_time else random.uniform
        t = draw("time", dtype=x.dtype)
        prediction = self.predict_data(x, t, random, "noise")
        loss = continuous_time_loss(self.flow, prediction, x, t, self.clip_in_loss).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Likelihood in continuous time (Lightning hook)."""
        self._log_likelihood("val", self.quantise(batch[0]), steps=(0,), repeats=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Likelihood for each of ``likelihood_steps`` (Lightning hook)."""
        self._log_likelihood("test", self.quantise(batch[0]), self.likelihood_steps, self.likelihood_repeats)

    def _log_likelihood(self, stage: str, x: Tensor, steps: tuple[int, ...], repeats: int) -> None:
        random = self.eval_random(len(x))
        for repeat in range(repeats):
            reconstruction = self.reconstruction(x, random, repeat)
            values = [reconstruction]
            for num_steps in steps:
                loss = self.loss(x, random, num_steps, repeat)
                values += [loss, bits(loss + reconstruction)]
            for name, value in zip(_likelihood_names(steps), values, strict=True):
                mean = cast(MeanMetric, self.means[f"{stage}/{name}"])
                mean.update(value)
                self.log(f"{stage}/{name}", mean, prog_bar=stage == "val", batch_size=len(x))

    def loss(self, x: Tensor, random: SampleRandom, num_steps: int = 0, repeat: int = 0) -> Tensor:
        """One draw of the loss of data x, in nats per element, (B,).

        Args:
            x: data (B, H, W, C), from `quantise`.
            random: the batch's random numbers.
            num_steps: number of messages; 0 for infinitely many.
            repeat: which draw.
        """
        name = f"likelihood {num_steps} {repeat}"
        if num_steps == 0:
            t = random.uniform(f"{name} time", dtype=x.dtype)
            return continuous_time_loss(self.flow, self.predict_data(x, t, random, name), x, t)
        step = random.integers(f"{name} step", num_steps)
        prediction = self.predict_data(x, step.to(x.dtype) / num_steps, random, name)
        return discrete_time_loss(self.flow, prediction, x, step + 1, num_steps, random)

    def reconstruction(self, x: Tensor, random: SampleRandom, repeat: int = 0) -> Tensor:
        """One draw of the reconstruction loss of data x, in nats per element, (B,); arguments as for `loss`."""
        t = torch.ones(len(x), dtype=x.dtype, device=x.device)
        return reconstruction_loss(self.predict_data(x, t, random, f"reconstruction {repeat}"), x)

    # Sampling

    @property
    def sampler_names(self) -> tuple[str, ...]:
        """Names of all samplers, users' own included."""
        return solver_names()

    @torch.no_grad()
    def sample(
        self,
        index_B: Tensor,
        *,
        seed: int = 0,
        sampler: str | None = None,
        nfe: int | None = None,
        guide: Guide | None = None,
        trajectory: bool = False,
    ) -> Samples:
        """Draw images.

        Args:
            index_B: numbers of the samples (B,); a sample depends on its number and ``seed`` alone.
            seed: seed of all samples.
            sampler: one of `sampler_names`, or a name in the papers; default is the module's solver.
            nfe: number of network calls; default is the solver's.
            guide: corrects each estimate (B, H, W, C) of the data; see `Denoiser`.
            trajectory: return the estimate of each network call too.

        Returns:
            Images (B, C, H, W) in [0, 1], and what they cost.

        Raises:
            ValueError: unknown sampler, or a number of network calls that it cannot make.
        """
        solver = self.solver if sampler is None and nfe is None else self.solver.rebuilt(sampler, nfe)
        denoiser = Denoiser(self.network, self.flow, self.head, guide)
        random = SampleRandom(seed, index_B.to(self.device))
        drawn = solver.sample(denoiser, self.data_shape, random, record=trajectory)
        path = None if drawn.trajectory is None else self.to_image(drawn.trajectory)
        return Samples(self.to_image(drawn.x), drawn.nfe, path)

    def in_paint(self, image: Tensor, mask: Tensor, index_B: Tensor, **options: Any) -> Samples:
        """Fill in the unknown pixels of images.

        Args:
            image: (B, C, H, W) in [0, 1].
            mask: bool (B, 1, H, W), true where a pixel is known.
            index_B: numbers of the samples (B,).
            options: as for `sample`.

        Returns:
            Images whose known pixels are exactly the given ones.
        """
        guide = InPainting(self.flow.encode(self.quantise(image)), mask.movedim(-3, -1))
        samples = self.sample(index_B, guide=guide, **options)
        images = torch.where(mask, image.to(samples.images.dtype), samples.images)
        return Samples(images, samples.nfe, samples.trajectory)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Draw images, or fill in the user's own (Lightning hook).

        Args:
            batch: ``{"index"}`` or ``{"index", "image", "mask", "path"}``.
            batch_idx: number of the batch.

        Returns:
            ``{"index", "images"}`` and, if they are there, ``trajectory`` (B, T, C, H, W) and ``path``.
        """
        index_B = batch["index"]
        options: dict[str, Any] = {"seed": self.random_seed, "trajectory": self.predict_trajectory}
        if "image" in batch:
            samples = self.in_paint(batch["image"], batch["mask"], index_B, **options)
        else:
            samples = self.sample(index_B, **options)
        result = {"index": index_B, "images": samples.images}
        if samples.trajectory is not None:
            result["trajectory"] = samples.trajectory
        return result | ({"path": batch["path"]} if "path" in batch else {})


def _likelihood_names(steps: tuple[int, ...]) -> list[str]:
    """What is logged: nats per element, and bits per element of the whole; of n messages with ``/n`` behind."""
    suffixes = [f"/n{num_steps}" if num_steps else "" for num_steps in steps]
    return ["reconstruction", *(f"{name}{suffix}" for suffix in suffixes for name in ("loss", "bits_per_dim"))]
