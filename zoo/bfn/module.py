"""BFN: the LightningModule of Bayesian flow networks."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.bfn.bins import bin_centre, bin_index
from zoo.bfn.continuous_flow import ContinuousFlow, Flow
from zoo.bfn.denoiser import Denoiser, Guide, InPainting
from zoo.bfn.heads import DeltaHead, Head, OutputDistribution
from zoo.bfn.losses import bits, continuous_time_loss, discrete_time_loss, predict_from_data, reconstruction_loss
from zoo.bfn.networks import Network
from zoo.bfn.solvers import ODE2M, Solver, solver_names
from zoo.module import ZooModule
from zoo.random import SampleRandom
from zoo.sampling import Samples

__all__ = ["BFN"]


class BFN(ZooModule):
    """Bayesian flow network for images: training, likelihood, and samplers with few network calls.

    Images (B, C, H, W) in [0, 1] are taken to the centres of the head's bins in [-1, 1], channels last.
    Sources: Graves et al., arXiv 2308.07037; samplers: Xue et al., arXiv 2404.15766.

    Args:
        network: estimates the noise from the flow's mean and the time.
        flow: how data become noise.
        head: what the network's output means, and how many levels the data have.
        solver: draws samples; its method and number of network calls can be overridden where samples are drawn.
        image_shape: (channels, height, width).
        stratified_time: spread the times of a batch evenly over [0, 1], which lowers the variance of the loss.
        clip_in_loss: compare the loss's estimate after confining it to the data's range, as the published code does.
        likelihood_steps: numbers of messages for which `test` bounds the likelihood; 0 stands for infinitely many.
        likelihood_repeats: passes over each test image, with new times and noise each.
        record_trajectory: let `predict` return the estimate after each network call too.
        optimizer: makes the optimizer.
        lr_scheduler: makes the learning-rate schedule.
        lr_scheduler_interval: whether it advances per step or epoch.
        compile: compile the network.

    Raises:
        ValueError: flow and head do not belong together, or a number is out of range.
    """

    def __init__(
        self,
        network: Network,
        flow: Flow = ContinuousFlow(min_variance=1.0e-3),  # noqa: B008 (a default that jsonargparse shows; never changed)
        head: Head = DeltaHead(num_bins=16),  # noqa: B008
        solver: Solver = ODE2M(nfe=10),  # noqa: B008
        image_shape: tuple[int, int, int] = (1, 8, 8),
        stratified_time: bool = False,
        clip_in_loss: bool = True,
        likelihood_steps: Sequence[int] = (0,),
        likelihood_repeats: int = 1,
        record_trajectory: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4, betas=(0.9, 0.99), weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        compile: bool = False,
    ) -> None:
        super().__init__(
            optimizer=optimizer, lr_scheduler=lr_scheduler, lr_scheduler_interval=lr_scheduler_interval, compile=compile
        )
        if not isinstance(flow, head.flow_type):
            raise ValueError(
                f"BFN: {type(head).__name__} belongs to a {head.flow_type.__name__}, not to a {type(flow).__name__}:"
                " choose head and flow of the same kind of data."
            )
        if any(steps < 0 for steps in likelihood_steps) or likelihood_repeats < 1:
            raise ValueError(
                f"BFN: likelihood_steps={list(likelihood_steps)} must be positive, or 0 for continuous time, and"
                f" likelihood_repeats={likelihood_repeats} at least 1."
            )
        self.network = network
        self.flow = flow
        self.head = head
        self.solver = solver
        self.image_shape = tuple(image_shape)
        self.stratified_time = stratified_time
        self.clip_in_loss = clip_in_loss
        self.likelihood_steps = list(likelihood_steps)
        self.likelihood_repeats = likelihood_repeats
        self.record_trajectory = record_trajectory
        self.bounds = nn.ModuleDict({name: MeanMetric() for name in ("val_loss", "val_bits_per_dim", *self._test_names())})

    # Data

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """Shape of one image's data, (H, W, C)."""
        channels, height, width = self.image_shape
        return height, width, channels

    def quantize(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] as bin centres (B, H, W, C) in (-1, 1).

        Raises:
            ValueError: the images have another shape than ``image_shape``.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"BFN was built for images of shape {self.image_shape}, but the data has {tuple(images.shape[1:])}:"
                " set model.image_shape (and the network's size) to the data's."
            )
        x = images.movedim(1, -1) * 2 - 1
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        return bin_centre(bin_index(x.to(dtype), self.head.num_bins), self.head.num_bins, dtype)

    def to_images(self, x: Tensor) -> Tensor:
        """Data (..., H, W, C) as images (..., C, H, W) in [0, 1]: the first bin's centre is black, the last one's white."""
        num_bins = self.head.num_bins
        return (x.movedim(-1, -3) * (num_bins / (2 * num_bins - 2)) + 0.5).clamp(0, 1)

    # Losses

    def predict_data(self, x: Tensor, t: Tensor, noise: Tensor) -> OutputDistribution:
        """What the network says of data x (B, H, W, C) that the flow shows at times t (B,) under standard normal noise."""
        return predict_from_data(self.network, self.flow, self.head, x, t, noise)

    def loss(self, x: Tensor, random: SampleRandom, num_steps: int = 0, stratified: bool = False) -> Tensor:
        """Loss of each sample (B,), nats per element of the data, at a time drawn for it.

        Args:
            x: data (B, H, W, C).
            random: the batch's random numbers.
            num_steps: number of messages; 0 for infinitely many.
            stratified: spread the times evenly over the batch; in continuous time only.
        """
        noise = self._noise("noise", x, random)
        if num_steps:
            step = random.integers("step", num_steps) + 1
            prediction = self.predict_data(x, (step - 1).to(x.dtype) / num_steps, noise)
            return discrete_time_loss(self.flow, prediction, x, step, num_steps, random)
        t = (random.stratified if stratified else random.uniform)("time", dtype=x.dtype)
        return continuous_time_loss(self.flow, self.predict_data(x, t, noise), x, t, clip=self.clip_in_loss)

    def reconstruction(self, x: Tensor, random: SampleRandom) -> Tensor:
        """Cost of each sample (B,) once everything is sent, nats per element; with `loss` it bounds -ln p(x)."""
        t = torch.ones(len(x), dtype=x.dtype, device=x.device)
        return reconstruction_loss(self.predict_data(x, t, self._noise("reconstruction noise", x, random)), x)

    def _noise(self, name: str, x: Tensor, random: SampleRandom) -> Tensor:
        return random.normal(name, self.flow.state_shape(self.data_shape), x.dtype)

    # Lightning

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch ``(image (B, C, H, W) in [0, 1], label)`` (Lightning hook)."""
        x = self.quantize(batch[0])
        loss = self.loss(x, self.train_random(len(x)), stratified=self.stratified_time).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss in nats and the likelihood's bound in bits, per element (Lightning hook)."""
        x = self.quantize(batch[0])
        random = self.eval_random(len(x))
        loss = self.loss(x, random)
        self._log_mean("val_loss", loss, prog_bar=True)
        self._log_mean("val_bits_per_dim", bits(loss + self.reconstruction(x, random)))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log bounds of the negative log-likelihood, in bits per element (Lightning hook)."""
        x = self.quantize(batch[0])
        draws = self.eval_random(len(x))
        for repeat in range(self.likelihood_repeats):
            random = SampleRandom(draws.seed, draws.index_B, epoch=-2 - repeat)
            reconstruction = self.reconstruction(x, random)
            for name, num_steps in zip(self._test_names(), self.likelihood_steps, strict=True):
                self._log_mean(name, bits(self.loss(x, random, num_steps) + reconstruction))

    def _test_names(self) -> list[str]:
        return [f"test/bits_per_dim/{f'n={n}' if n else 'continuous'}" for n in self.likelihood_steps]

    def _log_mean(self, name: str, values: Tensor, prog_bar: bool = False) -> None:
        """Log the mean over all samples of all batches and ranks, whatever the sizes of the batches."""
        mean = cast(MeanMetric, self.bounds[name])
        mean.update(values)
        self.log(name, mean, prog_bar=prog_bar)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Draw samples, or fill in the unknown pixels of the user's images (Lightning hook).

        Args:
            batch: ``index`` (B,), the samples' numbers, which are their seeds; for in-painting also ``image``
                (B, C, H, W) in [0, 1], ``mask`` (B, 1, H, W), true where a pixel is known, and ``path``.
            batch_idx: number of the batch.

        Returns:
            ``index``; ``images`` (B, C, H, W) in [0, 1]; ``trajectory`` (B, T, C, H, W) if it is recorded; ``path``.
        """
        options: dict[str, Any] = {"seed": self.random_seed, "record": self.record_trajectory}
        if "image" in batch:
            drawn = self.in_paint(batch["image"], batch["mask"], batch["index"], **options)
        else:
            drawn = self.sample(batch["index"], **options)
        result = {"index": batch["index"], "images": drawn.images}
        if drawn.trajectory is not None:
            result["trajectory"] = drawn.trajectory
        return result | ({"path": batch["path"]} if "path" in batch else {})

    # Sampling

    @property
    def sampler_names(self) -> tuple[str, ...]:
        """Names that `sample` takes."""
        return solver_names()

    def sample(
        self,
        index_B: Tensor,
        *,
        seed: int = 0,
        sampler: str | None = None,
        nfe: int | None = None,
        guide: Guide | None = None,
        record: bool = False,
    ) -> Samples:
        """Draw one image per number; equal numbers and seeds give equal images in any batch.

        Args:
            index_B: (B,) int64, the samples' numbers.
            seed: seed of all samples.
            sampler: method, one of `sampler_names` or a published name; None for the module's own solver.
            nfe: number of network calls; None for the solver's own.
            guide: corrects each estimate (B, H, W, C) of the data; see `Denoiser`.
            record: return the estimate after each network call too, as ``trajectory``.

        Raises:
            ValueError: unknown sampler, or too few network calls for it.
        """
        solver = self.solver if sampler is None and nfe is None else self.solver.rebuilt(sampler, nfe)
        denoiser = Denoiser(self.network, self.flow, self.head, guide)
        random = SampleRandom(seed, index_B.to(self.device))
        drawn = solver.sample(denoiser, self.data_shape, random, record=record)
        trajectory = None if drawn.trajectory is None else self.to_images(drawn.trajectory)
        return Samples(self.to_images(drawn.x), drawn.nfe, trajectory)

    def in_paint(self, image: Tensor, mask: Tensor, index_B: Tensor, **options: Any) -> Samples:
        """Fill in the unknown pixels of images; the known ones are returned as they are.

        Args:
            image: (B, C, H, W) in [0, 1].
            mask: bool (B, 1, H, W), true where a pixel is known.
            index_B: numbers of the samples (B,).
            options: as for `sample`.
        """
        known = InPainting(self.flow.encode(self.quantize(image)), mask.movedim(1, -1))
        drawn = self.sample(index_B, guide=known, **options)
        images = torch.where(mask, image.to(drawn.images.dtype), drawn.images)
        return Samples(images, drawn.nfe, drawn.trajectory)
