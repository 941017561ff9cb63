"""The part of BFN that draws samples, whole or around known parts."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.base.samples import Samples, TextSamples
from zoo.bfn.codecs import Codec
from zoo.bfn.continuous_flow import Flow
from zoo.bfn.denoiser import Denoiser, Guide, InPainting
from zoo.bfn.heads import Head
from zoo.bfn.networks import Network
from zoo.bfn.solvers import Noise, Observer, Solver, solver_names
from zoo.nn import evaluation_mode

if TYPE_CHECKING:
    from zoo.module import ZooModule as Base
else:
    Base = object

__all__ = ["BFNSampling"]


class BFNSampling(Base):
    """A part of `zoo.bfn.BFN`, whose arguments it reads."""

    network: Network
    flow: Flow
    head: Head
    solver: Solver
    codec: Codec

    @property
    def num_levels(self) -> int:
        """Number of values that each element of the data can have."""
        return self.head.num_levels(self.flow)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one sample's data, (H, W, C) or (L,)."""
        return self.codec.data_shape

    @property
    def data_dtype(self) -> torch.dtype:
        """Float type of data, noise and losses."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def sampler_names(self) -> tuple[str, ...]:
        """Names that `sample` takes."""
        return solver_names()

    @property
    def sample_type(self) -> type[Samples] | type[TextSamples]:
        """Type of the codec's samples."""
        return type(self.codec.samples(torch.zeros(1, *self.data_shape), 0, None, self.num_levels))

    def check_sampler(self, sampler: str | None = None, nfe: int | None = None) -> None:
        """Check the arguments of `sample`.

        Raises:
            ValueError: If the sampler is unknown, or the network calls are too few for it.
        """
        self.solver.rebuilt(sampler, nfe)

    def sample(
        self,
        index_B: Tensor,
        *,
        seed: int = 0,
        sampler: str | None = None,
        nfe: int | None = None,
        guide: Guide | None = None,
        noise: Noise | None = None,
        observer: Observer | None = None,
        record: bool = False,
    ) -> Samples | TextSamples:
        """Draw one image or text per number; equal numbers and seeds give equal ones in any batch.

        Dropout is off meanwhile, whatever mode the module is in.

        Args:
            index_B: (B,) int64, the samples' numbers.
            seed: seed of all samples.
            sampler: method, one of `sampler_names` or a published name; None for the module's own solver.
            nfe: number of network calls; None for the solver's own.
            guide: corrects each estimate of the data; see `Denoiser`.
            noise: replaces the drawn noise by the caller's own; see `Solver.sample`.
            observer: is shown time, state and estimate at each network call; see `Solver.sample`.
            record: return the estimate after each network call too, as ``trajectory``.

        Raises:
            ValueError: If the sampler is unknown, or the network calls are too few for it.
        """
        solver = self.solver if sampler is None and nfe is None else self.solver.rebuilt(sampler, nfe)
        denoiser = Denoiser(self.network, self.flow, self.head, guide)
        random = SampleRandom(seed, index_B.to(self.device))
        with evaluation_mode(self.network):
            drawn = solver.sample(
                denoiser, self.data_shape, random, noise=noise, observer=observer, record=record, dtype=self.data_dtype
            )
        trajectory = None if drawn.trajectory is None else self.flow.to_levels(drawn.trajectory, self.num_levels)
        return self.codec.samples(self.flow.to_levels(drawn.x, self.num_levels), drawn.nfe, trajectory, self.num_levels)

    def in_paint(self, batch: dict[str, Any], **options: Any) -> Samples | TextSamples:
        """Samples that agree with the known parts of a batch; without any, free ones.

        Args:
            batch: as for `predict_step`.
            options: as for `sample`.
        """
        known = self.codec.known(batch, self.num_levels)
        if known is None:
            return self.sample(batch["index"], **options)
        levels, mask = (part.to(self.device) for part in known)
        truth = self.flow.encode(self.flow.from_levels(levels, self.num_levels, self.data_dtype))
        mask = mask.unsqueeze(-1) if truth.dim() > mask.dim() else mask  # of classes, all or none are known
        return self.sample(batch["index"], guide=InPainting(truth, mask), **options)
