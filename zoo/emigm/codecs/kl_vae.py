"""KL-16: the variational autoencoder of MAR, stride 16 and 16 channels, with the names of its released weights.

Source: section 3.4 and appendix D of arXiv 2503.07197; names, sizes and order of layers of the file ``kl16.ckpt`` that the
code of arXiv 2406.11838 (MAR) reads, which go back to the latent diffusion models of arXiv 2112.10752.

Shape suffixes: B samples, C channels, H height, W width, L positions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.base.checkpoint import check_weights, read_plain
from zoo.emigm.codecs.codec import LatentCodec, check_scale

__all__ = ["KLVAE", "KLAutoencoder"]

#: Names of a file that are no part of the autoencoder: its training loss (discriminator, LPIPS) is saved with it.
IGNORED_PREFIXES = ("loss.",)

_MULTIPLIERS = (1, 1, 2, 2, 4)
_NUM_GROUPS = 32


class KLVAE(LatentCodec):
    """KL-16: 16 channels at a sixteenth of the resolution, of an image scaled to [-1, 1].

    The posterior is normal with a mean and a log-variance (limited to [-30, 20]) for each element; a latent is
    ``(mean + std * noise) * scale``. A cache holds mean and log-variance side by side, unscaled.

    Args:
        path: file of the weights: MAR's ``kl16.ckpt`` (a dictionary with the entry ``model``), a bare state dict, or
            ``.safetensors``. Its names ``loss.*`` are passed over; any other difference is an error. Without a file the
            weights are random, and `encode` and `decode` refuse to work: enough to train on cached latents. On the meta
            device the file is not read.
        image_size: side of the images, a multiple of 16.
        scale: brings latents to unit variance.
        channels: width of the first level, 128 in the released weights, a multiple of 32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an argument out of range, or weights that are unsafe, damaged, or not this network's.
    """

    stride: Literal[16] = 16
    cache_kind: ClassVar[Literal["moments", "latent"]] = "moments"

    def __init__(self, path: Path | None = None, image_size: int = 256, scale: float = 0.2325, channels: int = 128) -> None:
        super().__init__()
        if image_size < self.stride or image_size % self.stride:
            raise ValueError(f"KLVAE: image_size={image_size} must be a multiple of {self.stride}.")
        if channels < _NUM_GROUPS or channels % _NUM_GROUPS:
            raise ValueError(f"KLVAE: channels={channels} must be a multiple of {_NUM_GROUPS}; the released weights have 128.")
        self.scale = check_scale("KLVAE", scale)
        self.path = None if path is None else Path(path)
        self.image_shape = (3, image_size, image_size)
        self.latent_shape = (16, image_size // self.stride, image_size // self.stride)
        self._has_weights = self.path is not None and torch.empty(0).device.type != "meta"
        if self.path is None or not self._has_weights:
            self.freeze(KLAutoencoder(channels))
            return
        with torch.device("meta"):  # what is read takes the place of weights that need not be drawn first
            autoencoder = KLAutoencoder(channels)
        autoencoder.load_state_dict(read_kl_weights(self.path, autoencoder), assign=True)
        self.freeze(autoencoder)

    @property
    def autoencoder(self) -> "KLAutoencoder":
        """The frozen network."""
        return self._frozen[0]  # type: ignore[return-value]

    def require_weights(self) -> None:
        """See `LatentCodec`."""
        if not self._has_weights:
            raise ValueError(
                "KLVAE has random weights, so its latents and images would mean nothing: set path to the file kl16.ckpt that MAR"
                " released."
            )

    def moments(self, image_BCHW: Tensor) -> Tensor:
        """Mean and log-variance (B, 32, H / 16, W / 16), unscaled and as the network gives them; see `LatentCodec`."""
        self.require_weights()
        self._check_images(image_BCHW)
        return self.autoencoder.encode(self._as_weights(image_BCHW * 2 - 1)).float()

    def from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """``(mean + std * noise) * scale``; see `LatentCodec`."""
        self._check_latents(moments_BCHW, "moments")
        self._check_noise(noise, len(moments_BCHW))
        mean_BCHW, log_variance_BCHW = moments_BCHW.float().chunk(2, dim=1)
        if noise is None:
            return mean_BCHW * self.scale
        return (mean_BCHW + (0.5 * log_variance_BCHW.clamp(-30, 20)).exp() * noise.to(mean_BCHW)) * self.scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """See `LatentCodec`."""
        self.require_weights()
        self._check_latents(latents_BCHW)
        image_BCHW = self.autoencoder.decode(self._as_weights(latents_BCHW / self.scale))
        return (image_BCHW.float() / 2 + 0.5).clamp(0, 1)

    def _as_weights(self, x: Tensor) -> Tensor:
        return x.to(self.autoencoder.quant_conv.weight.dtype)


def read_kl_weights(path: Path, autoencoder: nn.Module) -> dict[str, Tensor]:
    """Read a file of the autoencoder's weights; all names and shapes are compared first.

    Args:
        path: a file as `KLVAE` takes it.
        autoencoder: the network that the weights are for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds code, is damaged, holds no weights, or those of another network; names and shapes are listed.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"KLVAE: path={path} does not exist: give the file kl16.ckpt that MAR released, or leave path out where images are"
            " neither read nor made."
        )
    content = read_plain(path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds no weights of an autoencoder: it must be a dictionary of names and tensors, or one whose entry"
            " `model` is."
        )
    weights = {name: tensor for name, tensor in content.items() if not name.startswith(IGNORED_PREFIXES)}
    check_weights(autoencoder, weights, str(path))
    useless = [name for name, tensor in weights.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if useless:
        raise ValueError(f"{path} holds weights that are no finite numbers ({', '.join(useless[:5])}): it was damaged.")
    return {name: tensor.float() for name, tensor in weights.items()}


class KLAutoencoder(nn.Module):
    """Encoder and decoder of KL-16, with the names of the released weights.

    Args:
        channels: width of the first level.
        latent_channels: channels of the latents.
    """

    def __init__(self, channels: int = 128, latent_channels: int = 16) -> None:
        super().__init__()
        widths = [channels * factor for factor in _MULTIPLIERS]
        self.encoder = _Encoder(widths, 2 * latent_channels)
        self.decoder = _Decoder(widths, latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Mean and log-variance (B, 32, H / 16, W / 16) of images (B, 3, H, W) in [-1, 1]."""
        return self.quant_conv(self.encoder(image_BCHW))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images (B, 3, 16 H, 16 W), about in [-1, 1], of unscaled latents (B, 16, H, W)."""
        return self.decoder(self.post_quant_conv(latents_BCHW))


class _Encoder(nn.Module):
    """Two residual blocks a level; attention in the last one and in the middle."""

    def __init__(self, widths: Sequence[int], out_channels: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Level(width_in, width, num_blocks=2, attention=level == last, resample="downsample" if level < last else None)
            for level, (width_in, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))


class _Decoder(nn.Module):
    """Three residual blocks a level, the coarsest level last in the list; attention in the middle only."""

    def __init__(self, widths: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList(
            _Level(width_in, width, num_blocks=3, attention=False, resample="upsample" if level else None)
            for level, (width_in, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(x_BCHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class _Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if wanted, then the change of resolution."""

    def __init__(
        self,
        width_in: int,
        width: int,
        num_blocks: int,
        attention: bool,
        resample: Literal["downsample", "upsample"] | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResidualBlock(width if block else width_in, width) for block in range(num_blocks))
        self.attn = nn.ModuleList(_Attention(width) for _ in range(num_blocks if attention else 0))
        if resample == "downsample":
            self.downsample = _Downsample(width)
        elif resample == "upsample":
            self.upsample = _Upsample(width)
        self.resample = resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[number](x_BCHW)
        return x_BCHW if self.resample is None else getattr(self, self.resample)(x_BCHW)


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = _ResidualBlock(width, width)
        self.attn_1 = _Attention(width)
        self.block_2 = _ResidualBlock(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class _ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.nin_shortcut(x_BCHW) + self.conv2(F.silu(self.norm2(h_BCHW)))


class _Attention(nn.Module):
    """Full attention over all positions, one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q_BLC, k_BLC, v_BLC = (layer(h_BCHW).flatten(2).mT for layer in (self.q, self.k, self.v))
        h_BLC = F.scaled_dot_product_attention(q_BLC, k_BLC, v_BLC)
        return x_BCHW + self.proj_out(h_BLC.mT.reshape(x_BCHW.shape))


class _Downsample(nn.Module):
    """Half the resolution; the image is padded at its right and lower side alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(_NUM_GROUPS, width, eps=1e-6)
