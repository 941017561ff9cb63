"""BFN: the LightningModule of Bayesian flow networks."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from zoo.bfn.bins import bin_centre, bin_index
from zoo.bfn.denoiser import Denoiser, Guide, InPainting
from zoo.bfn.flow import ContinuousFlow, Flow
from zoo.bfn.heads import DeltaHead, Head
from zoo.bfn.losses import bits, continuous_time_loss, discrete_time_loss, predict_from_data, reconstruction_loss
from zoo.bfn.network import Network
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
        self.losses = torch.nn.ModuleDict({stage: MeanMetric() for stage in ("val", *self._test_losses())})

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
        """Data (..., H, W, C) in [-1, 1] as images (..., C, H, W) in [0, 1]."""
        return (x.movedim(-1, -3) / 2 + 0.5).clamp(0, 1)

    # Losses

    def loss(self, x: Tensor, random: SampleRandom) -> Tensor:
        """Continuous-time loss of each sample (B,), nats per element of the data.

        Args:
            x: data (B, H, W, C).
            random: the batch's random numbers.
        """
        t = self._times(random, x.dtype)
        noise = random.normal("noise", self.flow.state_shape(self.data_shape), x.dtype)
        prediction = predict_from_data(self.network, self.flow, self.head, x, t, noise)
        return continuous_time_loss(self.flow, prediction, x, t, clip=self.clip_in_loss)

    def bound(self, x: Tensor, random: SampleRandom, num_steps: int = 0) -> Tensor:
        """Upper bound of -ln p(x) for each sample (B,), nats per element: loss and reconstruction.

        Args:
            x: data (B, H, W, C).
            random: the batch's random numbers.
            num_steps: number of messages; 0 for infinitely many.
        """
        if num_steps:
            step = random.integers("step", num_steps) + 1
            noise = random.normal("noise", self.flow.state_shape(self.data_shape), x.dtype)
            t = (step - 1).to(x.dtype) / num_steps
            prediction = predict_from_data(self.network, self.flow, self.head, x, t, noise)
            loss = discrete_time_loss(self.flow, prediction, x, step, num_steps, random)
        else:
            loss = self.loss(x, random)
        noise = random.normal("reconstruction noise", self.flow.state_shape(self.data_shape), x.dtype)
        final = predict_from_data(self.network, self.flow, self.head, x, torch.ones_like(x[:, 0, 0, 0]), noise)
        return loss + reconstruction_loss(final, x)

    def _times(self, random: SampleRandom, dtype: torch.dtype) -> Tensor:
        t = random.uniform("time", dtype=dtype)
        if not self.stratified_time:
            return t
        # One time in each of as many strata as there are samples: sample i of the global batch takes stratum i.
        strata = max(int(self.trainer.world_size) if self._trainer is not None else 1, 1) * len(t)
        return (random.index_B % strata + t) / strata

    # Lightning

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch ``(image (B, C, H, W) in [0, 1], label)`` (Lightning hook)."""
        x = self.quantize(batch[0])
        loss = self.loss(x, self.train_random(len(x))).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss in nats per element (Lightning hook)."""
        x = self.quantize(batch[0])
        self.losses["val"].update(self.loss(x, self.eval_random(len(x))))
        self.log("val_loss", self.losses["val"], prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log bounds of the negative log-likelihood, in bits per element (Lightning hook)."""
        x = self.quantize(batch[0])
        draws = self.eval_random(len(x))
        for name, steps in zip(self._test_losses(), self.likelihood_steps, strict=True):
            for repeat in range(self.likelihood_repeats):
                random = SampleRandom(draws.seed, draws.index_B, epoch=-2 - repeat)
                self.losses[name].update(bits(self.bound(x, random, steps)))
            self.log(f"test/bits_per_dim/{name}", self.losses[name])

    def _test_losses(self) -> list[str]:
        return [f"n={steps}" if steps else "continuous" for steps in self.likelihood_steps]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Draw samples, or fill in the unknown pixels of the user's images (Lightning hook).

        Args:
            batch: ``index`` (B,), the samples' numbers, which are their seeds; for in-painting also ``image``
                (B, C, H, W) in [0, 1], ``mask`` (B, 1, H, W), true where a pixel is known, and ``path``.
            batch_idx: number of the batch.

        Returns:
            ``index``; ``images`` (B, C, H, W) in [0, 1]; ``trajectory`` (B, T, C, H, W) if it is recorded; ``path``.
        """
        guide = None
        if "image" in batch:
            known = batch["mask"].movedim(1, -1)
            guide = InPainting(self.flow.embed(batch["image"].movedim(1, -1).float() * 2 - 1), known)
        drawn = self._sample(batch["index"], self.random_seed, self.solver, guide, self.record_trajectory)
        result = {"index": batch["index"], "images": drawn.images}
        if drawn.trajectory is not None:
            result["trajectory"] = drawn.trajectory
        return result | ({"path": batch["path"]} if "path" in batch else {})

    # Sampling

    @property
    def sampler_names(self) -> tuple[str, ...]:
        """Names that `sample` takes."""
        return solver_names()

    def sample(self, index_B: Tensor, *, seed: int = 0, sampler: str | None = None, nfe: int | None = None) -> Samples:
        """Draw one image per number; equal numbers and seeds give equal images in any batch.

        Args:
            index_B: (B,) int64, the samples' numbers.
            seed: seed of all samples.
            sampler: method, one of `sampler_names` or a published name; None for the module's own solver.
            nfe: number of network calls; None for the solver's own.

        Raises:
            ValueError: unknown sampler, or too few network calls for it.
        """
        solver = self.solver if sampler is None and nfe is None else self.solver.rebuilt(sampler, nfe)
        return self._sample(index_B, seed, solver, None, False)

    def _sample(self, index_B: Tensor, seed: int, solver: Solver, guide: Guide | None, record: bool) -> Samples:
        denoiser = Denoiser(self.network, self.flow, self.head, guide)
        random = SampleRandom(seed, index_B.to(self.device))
        drawn = solver.sample(denoiser, self.data_shape, random, record=record)
        trajectory = None if drawn.estimates is None else self.to_images(drawn.estimates)
        return Samples(self.to_images(drawn.x), drawn.nfe, trajectory)
