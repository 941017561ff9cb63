"""The part of EMIGM that draws images: samplers, classes, and network calls of a sample."""

from typing import Any, Literal, get_args

from torch import Tensor

from zoo.base.samples import Samples
from zoo.emigm.codecs import LatentCodec
from zoo.emigm.drawing import ImageRequest, draw_images
from zoo.emigm.guidance import Guidance, nfe_of, num_iter_of
from zoo.emigm.head import HeadSampler
from zoo.emigm.network import MaskedTransformer
from zoo.emigm.sampler import MaskSampler

__all__ = ["EMIGMSampling"]


class EMIGMSampling:
    """A part of `zoo.emigm.EMIGM`, whose arguments it reads."""

    network: MaskedTransformer
    codec: LatentCodec
    patch_size: int
    num_classes: int
    sampler: MaskSampler
    samples_per_class: int
    conditional: bool

    @property
    def nfe(self) -> int:
        """Transformer evaluations of a sample under the module's sampler."""
        return nfe_of(self.sampler.num_iter, self._guidance(self.conditional), self.sampler.eps)

    @property
    def sampler_names(self) -> tuple[str, ...]:
        """Samplers of the head."""
        return get_args(HeadSampler)

    def sample_labels(self, index_B: Tensor) -> Tensor | None:
        """Class (B,) that each sample shows unless another is asked for; None if the model draws without."""
        return index_B // self.samples_per_class % self.num_classes if self.conditional else None

    def check_sampler(self, sampler: str | None = None, nfe: int | None = None) -> None:
        """Check the arguments of `sample`.

        Raises:
            ValueError: If the sampler is unknown, or the network calls are too few.
        """
        self._sampler(sampler, nfe)

    @property
    def sample_type(self) -> type[Samples]:
        """Images."""
        return Samples

    def _sampler(self, head: str | None, nfe: int | None, guided: bool | None = None) -> MaskSampler:
        """The module's sampler with another head or number of transformer evaluations.

        Args:
            head: sampler of the head; None for the module's own.
            nfe: evaluations that each image may cost; None for the module's own number of steps.
            guided: whether samples have a class to be guided to; None: as the module draws by itself.
        """
        options: dict[str, Any] = dict(vars(self.sampler))
        if nfe is not None:
            guidance = self._guidance(self.conditional if guided is None else guided)
            options["num_iter"] = num_iter_of(nfe, guidance, self.sampler.eps)
        if head is not None and head != self.sampler.head:
            options |= {"head": head, "head_steps": {"dpm-solver": 8, "ddpm": 100}.get(head, 1)}
        return MaskSampler(**options)

    def _guidance(self, guided: bool) -> Guidance:
        """The sampler's guidance, or none where there is no class to guide to."""
        return self.sampler.guidance if guided else Guidance(scale=1.0)

    def sample(
        self,
        index_B: Tensor,
        *,
        seed: int = 0,
        sampler: str | MaskSampler | None = None,
        nfe: int | None = None,
        labels: Tensor | Literal["default"] | None = "default",
        image: Tensor | None = None,
        mask: Tensor | None = None,
        record: bool = False,
    ) -> Samples:
        """Draw one image per number; equal numbers and seeds give equal ones in any batch.

        Args:
            index_B: (B,) int64, the samples' numbers.
            seed: seed of all samples.
            sampler: ``dpm-solver`` or ``ddpm`` for the head, or a whole `MaskSampler`; None for the module's own.
            nfe: transformer evaluations for each image, guided steps counting twice; the most steps that spend no more are
                taken. None for the sampler's own.
            labels: classes (B,); None: without class; by default those of `sample_labels`.
            image: for in-painting and editing, images (B, C, H, W) in [0, 1].
            mask: true where ``image`` is known (B, 1, H, W); a token counts as known where all its pixels are, and known pixels
                are kept as they are.
            record: return the image after each step too, as ``trajectory``.

        Raises:
            ValueError: If the sampler is unknown, the network calls are too few, or a class is out of range.
        """
        if isinstance(sampler, MaskSampler) and nfe is not None:
            raise ValueError("EMIGM.sample: give a whole MaskSampler or nfe, not both; num_iter says how many steps it takes.")
        label_B = self.sample_labels(index_B) if isinstance(labels, str) else labels
        chosen = sampler if isinstance(sampler, MaskSampler) else self._sampler(sampler, nfe, guided=label_B is not None)
        return self._draw(chosen, ImageRequest(index_B, seed, label_B, image, mask, record))[0]

    def _draw(self, sampler: MaskSampler, request: ImageRequest) -> tuple[Samples, Tensor]:
        self.codec.require_weights()
        return draw_images(self.network, self.codec, self.patch_size, sampler, request)
