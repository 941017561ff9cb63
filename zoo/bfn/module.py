"""BFN: the LightningModule of Bayesian flow networks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.base.samples import Samples, to_uint8
from zoo.bfn.codecs import Codec, ImageCodec
from zoo.bfn.continuous_flow import ContinuousFlow, Flow
from zoo.bfn.data_statistics_writer import DataStatisticsWriter
from zoo.bfn.heads import DeltaHead, Head, OutputDistribution
from zoo.bfn.likelihood_bounds import LikelihoodBounds
from zoo.bfn.losses import continuous_time_loss, discrete_time_loss, predict_from_data, reconstruction_loss
from zoo.bfn.networks import Network
from zoo.bfn.sampling import BFNSampling
from zoo.bfn.solvers import ODE2M, Solver
from zoo.bfn.state_dict_adapter import from_official_config, load_official, official_leftovers, to_official
from zoo.bfn.statistics import DataStatistics
from zoo.metrics.mean_and_error import Mean
from zoo.module import ZooModule
from zoo.sample_positions import global_positions

__all__ = ["BFN"]


class BFN(BFNSampling, ZooModule):
    """Bayesian flow network: training, likelihood, and samplers with few network calls, for images and text.

    Flow and head fit the kind of data: `ContinuousFlow` with `DeltaHead` (continuous) or `DiscretizedNormalHead`
    (discretised), `DiscreteFlow` with `CategoricalHead` or, for two classes, `BernoulliHead` (discrete).
    Sources: Graves et al., arXiv 2308.07037; samplers: Xue et al., arXiv 2404.15766.

    Args:
        network: Predicts the data from the flow's view of them, and the time.
        flow: Turns data into noise.
        head: Meaning of the network's output.
        solver: Draws samples; its method and number of network calls can be overridden where samples are drawn.
        codec: Turns batches into the flow's data, and samples into images or text.
        stratified_time: Spread the times of a batch evenly over [0, 1], which lowers the variance of the loss.
        loss_steps: Number of messages of the training loss; 0, as published, for infinitely many.
        clip_in_loss: Compare the training loss's estimate after confining it to the data's range, as the published code does.
            It concerns `DeltaHead` alone; likelihoods always confine.
        min_loss_variance: For continuous data, hold the training loss's weight where the belief's variance has fallen to this,
            in (0, 1]; None, as published: do not.
        likelihood_steps: Numbers of messages for which `test` bounds the likelihood; 0 stands for infinitely many.
        likelihood_repeats: Passes over each test sample, with new times and noise each.
        record_trajectory: Let `predict` return the estimate after each network call too.
        optimizer: Makes the optimizer.
        kwargs: Arguments of `ZooModule`.

    Raises:
        ValueError: If flow and head do not belong together, or a number is out of range.
    """

    exact_batches = True

    def __init__(
        self,
        network: Network,
        flow: Flow = ContinuousFlow(min_variance=1.0e-3),  # noqa: B008 (a default that jsonargparse shows; never changed)
        head: Head = DeltaHead(num_bins=16),  # noqa: B008
        solver: Solver = ODE2M(nfe=10),  # noqa: B008
        codec: Codec = ImageCodec(shape=(1, 8, 8)),  # noqa: B008
        stratified_time: bool = False,
        loss_steps: int = 0,
        clip_in_loss: bool = True,
        min_loss_variance: float | None = None,
        likelihood_steps: Sequence[int] = (0,),
        likelihood_repeats: int = 1,
        record_trajectory: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4, betas=(0.9, 0.99), weight_decay=0.01),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        head.check(flow)
        codec.check(head.num_levels(flow))
        if not likelihood_steps or any(steps < 0 for steps in likelihood_steps) or likelihood_repeats < 1:
            raise ValueError(
                f"BFN: likelihood_steps={list(likelihood_steps)} must hold at least one number, positive, or 0 for continuous"
                f" time, and likelihood_repeats={likelihood_repeats} must be at least 1."
            )
        if loss_steps < 0 or (loss_steps and (stratified_time or min_loss_variance is not None)):
            raise ValueError(
                f"BFN: loss_steps={loss_steps} must be positive, or 0 for continuous time; stratified_time and"
                " min_loss_variance belong to continuous time."
            )
        if min_loss_variance is not None and not (isinstance(flow, ContinuousFlow) and 0 < min_loss_variance <= 1):
            raise ValueError(
                f"BFN: min_loss_variance={min_loss_variance} must be null, or lie in (0, 1] with a ContinuousFlow, not a"
                f" {type(flow).__name__}."
            )
        self.network = network
        self.flow = flow
        self.head = head
        self.solver = solver
        self.codec = codec
        self.stratified_time = stratified_time
        self.loss_steps = loss_steps
        self.clip_in_loss = clip_in_loss
        self.min_loss_variance = min_loss_variance
        self.likelihood_steps = list(likelihood_steps)
        self.likelihood_repeats = likelihood_repeats
        self.record_trajectory = record_trajectory
        names = ["val_loss", *(f"val_{unit}" for unit in self.codec.units())]
        self.bounds = nn.ModuleDict({name: Mean() for name in names})
        self.test_bounds = LikelihoodBounds(self.codec.units(), self.likelihood_steps)

    # Data

    def encode(self, batch: Any, random: SampleRandom | None = None) -> Tensor:
        """A batch as the flow's data (B, *data shape): bin centres in (-1, 1), or class numbers.

        Args:
            batch: ``(image (B, C, H, W) in [0, 1], label)``, or ``{"input_ids": (B, L)}``.
            random: the batch's random numbers, for data that are drawn (dynamic binarisation).

        Raises:
            ValueError: If the data have another shape than the codec, or values outside their range.
        """
        random = self.eval_random(self._batch_size(batch)) if random is None else random
        levels = self.codec.encode(batch, self.num_levels, random).to(self.device)
        return self.flow.from_levels(levels, self.num_levels, self.data_dtype)

    def data_statistics(self, batches: Iterable[Any], reduce: Callable[[Tensor], Tensor] = lambda total: total) -> DataStatistics:
        """Moments of the data, for the solvers' optimal start.

        Args:
            batches: this process's share of the data, batches as `encode` takes them.
            reduce: sums a tensor over all processes.
        """
        return DataStatistics.of(self._encoded(batches), reduce)

    def _encoded(self, batches: Iterable[Any]) -> Iterator[Tensor]:
        """Batches as certain estimates; draws (dynamic binarisation) depend on the sample's number."""
        start = 0
        for batch in batches:
            size = self._batch_size(batch)
            random = SampleRandom(self.random_seed, global_positions(self, size, start, nominal=1), epoch=-1)
            start += size
            yield self.flow.encode(self.encode(batch, random))

    def quantize(self, images: Tensor) -> Tensor:
        """Real images, uint8 (N, C, H, W), at the levels of samples, to compare samples with.

        Levels that are drawn (dynamic binarisation) depend on an image's place among the N.
        """
        random = SampleRandom(0, torch.arange(len(images)))
        levels = self.codec.encode([images / 255], self.num_levels, random)
        samples = self.codec.samples(levels, 0, None, self.num_levels)
        assert isinstance(samples, Samples)
        return to_uint8(samples.images)

    @staticmethod
    def _batch_size(batch: Any) -> int:
        return len(batch["input_ids"] if isinstance(batch, dict) else batch[0])

    @override
    def setup(self, stage: str) -> None:
        """Refuse data and statistics that do not fit the model, before the first step.

        Raises:
            ValueError: If some of the model's levels never occur in the data, or the statistics are of other data.
            FileNotFoundError: If the solver starts from statistics that do not exist, and no callback will write them.
        """
        super().setup(stage)
        self._check_statistics()
        levels = getattr(self.trainer.datamodule, "num_levels", None)  # type: ignore[attr-defined]
        if levels is not None and levels < self.num_levels:
            raise ValueError(
                f"{type(self.head).__name__} and {type(self.flow).__name__} are made for {self.num_levels} levels, but the"
                f" data has only {levels}: the others would never occur. Use {levels} or fewer (bins or classes)."
            )

    def _check_statistics(self) -> None:
        path = self.solver.statistics
        if path is None or (
            not Path(path).is_file()
            and any(
                isinstance(callback, DataStatisticsWriter) and callback.path == Path(path)
                for callback in self.trainer.callbacks  # type: ignore[attr-defined]
            )
        ):
            return
        self.solver.load_statistics(self.flow.state_shape(self.data_shape))

    # Losses

    def predict_data(self, x: Tensor, t: Tensor, noise: Tensor) -> OutputDistribution:
        """Output distribution for data x (B, *data shape) that the flow shows at times t (B,) under standard normal noise."""
        return predict_from_data(self.network, self.flow, self.head, x, t, noise)

    def loss(
        self,
        x: Tensor,
        random: SampleRandom,
        num_steps: int = 0,
        stratified: bool = False,
        clip: bool = True,
        min_variance: float | None = None,
    ) -> Tensor:
        """Loss of each sample (B,), nats per element of the data, at a time drawn for it.

        Args:
            x: data (B, *data shape).
            random: the batch's random numbers.
            num_steps: number of messages; 0 for infinitely many.
            stratified: spread the times evenly over the batch; in continuous time only.
            clip: see `continuous_time_loss`.
            min_variance: likewise.
        """
        noise = self._noise("noise", random)
        if num_steps:
            step = random.integers("step", num_steps) + 1
            prediction = self.predict_data(x, (step - 1).to(noise.dtype) / num_steps, noise)
            return discrete_time_loss(self.flow, prediction, x, step, num_steps, random)
        t = (random.stratified if stratified else random.uniform)("time", dtype=noise.dtype)
        return continuous_time_loss(self.flow, self.predict_data(x, t, noise), x, t, clip, min_variance)

    def reconstruction(self, x: Tensor, random: SampleRandom) -> Tensor:
        """Cost of each sample (B,) once everything is sent, nats per element; with `loss` it bounds -ln p(x)."""
        noise = self._noise("reconstruction noise", random)
        t = torch.ones(len(x), dtype=noise.dtype, device=x.device)
        return reconstruction_loss(self.predict_data(x, t, noise), x)

    def _noise(self, name: str, random: SampleRandom) -> Tensor:
        return random.normal(name, self.flow.state_shape(self.data_shape), self.data_dtype)

    # Lightning

    @override
    def parameter_groups(self) -> Iterable[Any]:
        """All parameters, except from weight decay those that the network exempts."""
        return self.network.parameter_groups()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch; see `encode`."""
        random = self.train_random(self._batch_size(batch))
        x = self.encode(batch, random)
        options = {"clip": self.clip_in_loss, "min_variance": self.min_loss_variance}
        loss = self.loss(x, random, self.loss_steps, self.stratified_time, **options).mean()  # type: ignore[arg-type]
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss in nats and the likelihood's bound in bits, per element."""
        random = self.eval_random(self._batch_size(batch))
        x = self.encode(batch, random)
        loss = self.loss(x, random)
        bound = loss + self.reconstruction(x, random)
        for name, values in {"loss": loss, **{unit: bound * factor for unit, factor in self.codec.units().items()}}.items():
            mean = cast(Mean, self.bounds[f"val_{name}"])
            mean.update(values)
            self.log(f"val_{name}", mean, prog_bar=name == "loss")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure bounds of the negative log-likelihood, the mean of the repeats for each sample."""
        draws = self.eval_random(self._batch_size(batch))
        bounds: dict[int | None, Tensor] = {}
        for repeat in range(self.likelihood_repeats):
            random = SampleRandom(draws.seed, draws.index_B, epoch=-2 - repeat)
            x = self.encode(batch, random)
            reconstruction = self.reconstruction(x, random)
            costs: dict[int | None, Tensor] = {None: reconstruction}
            for num_steps in self.likelihood_steps:
                costs[num_steps] = self.loss(x, random, num_steps) + reconstruction
            for part, cost in costs.items():
                bounds[part] = bounds.get(part, 0) + cost / self.likelihood_repeats
        self.test_bounds.add(bounds)

    @override
    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.test_bounds.compute().items()})

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Draw samples, or fill in the unknown parts of the user's images or texts.

        Args:
            batch: ``index`` (B,), the samples' numbers, which are their seeds. For in-painting also ``image``
                (B, C, H, W) in [0, 1] and ``mask`` (B, 1, H, W), true where a pixel is known, or ``input_ids`` (B, L)
                and ``known`` (B, L). ``path`` is passed on.
            batch_idx: number of the batch.

        Returns:
            ``index``; ``images`` (B, C, H, W) in [0, 1], or ``text``, B of them; ``trajectory``, if it is recorded:
            (B, T, C, H, W), or B lists of T texts; ``path``.
        """
        drawn = self.in_paint(batch, seed=self.random_seed, record=self.record_trajectory)
        result = {"index": batch["index"], **self.codec.prediction(drawn, batch)}
        return result | ({"path": batch["path"]} if "path" in batch else {})

    # Official weights

    @override
    def load_official(self, path: str | Path) -> None:
        """Read a released weights file into the network; see `ZooModule.from_official`."""
        load_official(self.network, path)

    @override
    def to_official(self) -> dict[str, Tensor]:
        """The network's weights under the released files' names."""
        return to_official(self.network)

    @classmethod
    @override
    def from_official_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Our hyperparameters from a configuration of the published code."""
        return from_official_config(cls, config)

    @classmethod
    @override
    def official_leftovers(cls, config: Mapping[str, Any]) -> list[str]:
        """Entries of a published configuration on data, training and sampling, and those without a counterpart."""
        return official_leftovers(config)
