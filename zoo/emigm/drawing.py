"""Images drawn from numbers, whole or around what the user's images show.

Shape suffixes: B samples, N tokens, C channels, H and W pixels, T steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.base.samples import Samples
from zoo.emigm.codecs import LatentCodec
from zoo.emigm.network import MaskedTransformer
from zoo.emigm.patches import known_positions, patchify, token_mask, unpatchify
from zoo.emigm.sampler import Drawn, MaskSampler, equal_groups, sample_tokens
from zoo.nn import evaluation_mode

__all__ = ["ImageRequest", "draw_images"]


@dataclass(frozen=True)
class ImageRequest:
    """Images to draw.

    Attributes:
        index_B: int64, the samples' numbers.
        seed: Seed of all samples.
        label_B: Their classes; None: without class.
        image_BCHW: For in-painting and editing, images in [0, 1].
        mask_B1HW: True where a pixel is known; needed with images.
        record: Keep the image after each step too.
    """

    index_B: Tensor
    seed: int
    label_B: Tensor | None = None
    image_BCHW: Tensor | None = None
    mask_B1HW: Tensor | None = None
    record: bool = False


def draw_images(
    network: MaskedTransformer, codec: LatentCodec, patch_size: int, sampler: MaskSampler, request: ImageRequest
) -> tuple[Samples, Tensor]:
    """Samples, and the transformer evaluations of each (B,).

    Args:
        network: Transformer and head; in evaluation mode meanwhile.
        codec: Makes images of latents.
        patch_size: Latent positions of a token along each axis.
        sampler: The steps.
        request: The images.

    Raises:
        ValueError: If an image comes without a mask, or a class is out of range.
    """
    device = next(network.parameters()).device
    index_B = request.index_B.to(device)
    label_B = None if request.label_B is None else request.label_B.to(device)
    known_BNC, known_BN = _known(codec, patch_size, request, SampleRandom(request.seed, index_B), network.data_dtype)
    parts: list[tuple[Tensor, Drawn]] = []
    with evaluation_mode(network):
        for row, block in equal_groups(known_BN, index_B // sampler.count_block):
            drawn = sample_tokens(
                network,
                sampler,
                SampleRandom(request.seed, index_B[row]),
                SampleRandom(request.seed, torch.tensor([block])),
                None if label_B is None else label_B[row],
                known_BNC=None if known_BNC is None else known_BNC[row],
                known_BN=None if known_BN is None else known_BN[row],
                record=request.record,
            )
            parts.append((row, drawn))
    order = torch.cat([row for row, _ in parts]).argsort()
    images = _decode(codec, patch_size, torch.cat([drawn.tokens for _, drawn in parts])[order], request)
    trajectory = None
    if request.record:
        length = max(1, *(0 if d.trajectory is None else d.trajectory.shape[1] for _, d in parts))
        frames = torch.cat([_lengthened(drawn, length) for _, drawn in parts])[order]
        trajectory = torch.stack([_decode(codec, patch_size, frame, request) for frame in frames.unbind(1)], dim=1)
    nfe_B = torch.cat([torch.full_like(row, drawn.nfe) for row, drawn in parts])[order]
    return Samples(images, int(nfe_B.max()), trajectory), nfe_B


def _known(
    codec: LatentCodec, patch_size: int, request: ImageRequest, random: SampleRandom, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Tokens of the user's images, and which of them are known."""
    if request.image_BCHW is None:
        return None, None
    if request.mask_B1HW is None:
        raise ValueError("EMIGM: an image needs a mask that says which of its pixels are known (predict_masks).")
    noise = random.normal("posterior", codec.latent_shape, torch.float32).to(dtype)
    latents = codec.encode(request.image_BCHW.to(noise.device, dtype), noise)
    known = known_positions(request.mask_B1HW[:, 0].to(noise.device), *codec.latent_shape[1:])
    return patchify(latents, patch_size), token_mask(known, patch_size)


def _decode(codec: LatentCodec, patch_size: int, x_BNC: Tensor, request: ImageRequest) -> Tensor:
    """Images of tokens; known pixels are kept."""
    images = codec.decode(unpatchify(x_BNC, codec.latent_shape, patch_size)).float()
    if request.image_BCHW is None or request.mask_B1HW is None:
        return images
    return torch.where(request.mask_B1HW.to(images.device), request.image_BCHW.to(images), images)


def _lengthened(drawn: Drawn, length: int) -> Tensor:
    """The trajectory (B, T, N, C), its last state repeated."""
    frames = drawn.tokens[:, None] if drawn.trajectory is None else drawn.trajectory
    return torch.cat([frames, frames[:, -1:].expand(-1, length - frames.shape[1], -1, -1)], dim=1)
