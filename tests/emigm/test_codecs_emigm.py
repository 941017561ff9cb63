"""Latent codecs: nothing is lost in pixels, and a codec's weights are nobody's but its own."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from zoo.base.hyperparameters import build
from zoo.emigm.codecs import DCAE, KLVAE, LatentCodec, PixelCodec
from zoo.emigm.latent_encoder import LatentEncoder


def grey(levels: int, shape: tuple[int, ...]) -> Tensor:
    """Images that show every grey level."""
    return torch.randint(levels, shape, generator=torch.Generator().manual_seed(0)) / (levels - 1)


@pytest.mark.parametrize(("shape", "pad_to", "levels"), [((1, 8, 8), None, 17), ((1, 28, 28), 32, 256), ((3, 5, 8), 11, 256)])
def test_pixels_come_back_exactly(shape: tuple[int, int, int], pad_to: int | None, levels: int) -> None:
    images = grey(levels, (64, *shape))
    codec = PixelCodec(shape, mean=0.2860, std=0.3530, pad_to=pad_to, num_levels=levels)
    latents = codec.encode(images)
    assert tuple(latents.shape[1:]) == codec.latent_shape == (shape if pad_to is None else (shape[0], pad_to, pad_to))
    assert torch.equal(codec.decode(latents), images)
    smooth = PixelCodec(shape, mean=0.2860, std=0.3530, pad_to=pad_to)
    torch.testing.assert_close(smooth.decode(smooth.encode(images)), images)


def test_pixels_are_padded_with_black_on_all_sides_alike() -> None:
    codec = PixelCodec((1, 28, 28), mean=0.25, std=0.5, pad_to=32)
    latents = codec.encode(torch.ones(1, 1, 28, 28))
    assert torch.equal(latents[0, 0, 2:30, 2:30], torch.full((28, 28), 1.5))
    latents[..., 2:30, 2:30] = -0.5
    assert torch.equal(latents, torch.full_like(latents, -0.5))


def test_pixels_of_the_data_have_unit_variance_in_each_channel() -> None:
    images = torch.rand(256, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1)
    std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
    latents = PixelCodec((3, 4, 4), mean=mean.tolist(), std=std.tolist()).encode(images)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_module_in_half_precision_keeps_the_mean() -> None:
    images = grey(256, (4, 1, 8, 8))
    codec = PixelCodec(mean=0.2860, std=0.3530, num_levels=256)
    assert torch.equal(LatentEncoder(codec).to(torch.bfloat16).codec.encode(images), (images - 0.2860) / 0.3530)


def test_samples_beyond_white_and_black_are_clamped_and_rounded() -> None:
    latents = torch.tensor([-9.0, 9.0, 0.01]).view(1, 1, 1, 3)
    assert PixelCodec((1, 1, 3), num_levels=17).decode(latents).flatten().tolist() == [0.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (1, 0, 8)}, "image_shape"),
        ({"mean": [0.1, 0.2]}, "mean=.*1 channels"),
        ({"std": 0.0}, "std=0.0 must be positive"),
        ({"pad_to": 7}, "pad_to=7"),
        ({"num_levels": 1}, "num_levels=1"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCodec(**arguments)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(2, 1, 9, 9), r"shape \(B, 1, 8, 8\), but got \(2, 1, 9, 9\)"),
        (torch.full((2, 1, 8, 8), 2.0), "from 2 to 2"),
        (torch.full((2, 1, 8, 8), torch.nan), r"in \[0, 1\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused(image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCodec().encode(image)
    with pytest.raises(ValueError, match="noise must have the shape"):
        PixelCodec().encode(torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8))


class Held(LatentCodec):
    """Holds a network, as the autoencoders do."""

    image_shape = latent_shape = (1, 2, 2)
    stride = 1

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.freeze(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5)))

    def moments(self, image_BCHW: Tensor) -> Tensor:
        return self._frozen[0](image_BCHW)

    def from_moments(self, moments_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments_BCHW

    decode = moments


def test_frozen_weights_are_no_part_of_the_module_but_follow_it() -> None:
    encoder = LatentEncoder(Held())
    (weight, bias) = encoder.codec._frozen[0].parameters()
    assert not list(encoder.parameters()) and not encoder.state_dict()
    encoder.load_state_dict({})  # strict: nothing is missing
    assert not weight.requires_grad and not bias.requires_grad
    images = torch.rand(4, 1, 2, 2)
    encoder.train()
    assert torch.equal(encoder.codec.encode(images), encoder.codec.encode(images))  # no dropout
    encoder.to(torch.float64)
    assert next(encoder.codec._frozen[0].parameters()).dtype == torch.float64
    encoder.to("meta")
    assert next(encoder.codec._frozen[0].parameters()).device.type == "meta"


def test_fingerprint_tells_weights_apart() -> None:
    assert Held(0).fingerprint() == Held(0).fingerprint() != Held(1).fingerprint()
    assert PixelCodec().fingerprint() == ""


def test_codec_is_rebuilt_from_plain_data(tmp_path: Path) -> None:
    encoder = LatentEncoder(PixelCodec((1, 28, 28), mean=0.286, std=0.353, pad_to=32), flip=False)
    again = build(LatentEncoder, encoder.init_config)
    assert again.init_config == encoder.init_config and again.codec.latent_shape == (1, 32, 32) and not again.flip


def test_encoder_gives_image_and_mirror_image_and_leaves_out_what_is_finished() -> None:
    encoder = LatentEncoder(PixelCodec((1, 2, 2)))
    batch = {"index": torch.tensor([4, 5, 6]), "image": torch.rand(3, 1, 2, 2), "label": torch.tensor([1, 0, 1]),
             "path": ["a", "b", "c"]}  # fmt: skip
    found = encoder.predict_step(batch, 0)
    assert torch.equal(found["moments"], batch["image"] * 2 - 1) and torch.equal(found["moments_flip"], found["moments"].flip(-1))
    encoder.finished = lambda batch: batch["index"] == 5
    found = encoder.predict_step(batch, 0)
    assert found["index"].tolist() == [4, 6] and found["label"].tolist() == [1, 1] and found["path"] == ["a", "c"]
    assert torch.equal(found["moments"], (batch["image"] * 2 - 1)[[0, 2]])
    with pytest.raises(TypeError, match='"index" and "image"'):
        encoder.predict_step((batch["image"], batch["label"]), 0)


def test_dc_ae_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-zoo\[emigm\]'"):
        DCAE("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers")
    codec = DCAE()  # enough to train on cached latents
    assert codec.latent_shape == codec.moments_shape == (32, 16, 16) and codec.cache_kind == "latent"
    for use in (codec.require_weights, lambda: codec.encode(torch.zeros(1, 3, 512, 512))):
        with pytest.raises(ValueError, match="DCAE has no weights: set path"):
            use()
    with pytest.raises(ValueError, match="image_size=500"):
        DCAE(image_size=500)


class StandIn(nn.Module):
    """Behaves as diffusers' AutoencoderDC: 32 channels, stride 32, output objects."""

    dtype = torch.float32
    spatial_compression_ratio = 32
    config = SimpleNamespace(latent_channels=32)
    seen: Tensor

    @classmethod
    def from_pretrained(cls, path: str, use_safetensors: bool) -> "StandIn":
        if path == "nowhere":
            raise OSError("no file named config.json")
        assert use_safetensors
        return cls()

    def encode(self, x: Tensor) -> SimpleNamespace:
        self.seen = x
        return SimpleNamespace(latent=x[:, :1, ::32, ::32].repeat(1, 32, 1, 1))

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=z[:, :3].repeat_interleave(32, 2).repeat_interleave(32, 3))


def test_dc_ae_scales_images_to_minus_one_and_one_and_latents_by_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("diffusers")
    library.AutoencoderDC = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", library)
    codec = DCAE("somewhere", image_size=64)
    image = torch.rand(2, 1, 2, 2).repeat(1, 3, 1, 1).repeat_interleave(32, 2).repeat_interleave(32, 3)
    latents = codec.encode(image)
    torch.testing.assert_close(latents[:, 0], (image[:, 0, ::32, ::32] * 2 - 1) * 0.3189)
    torch.testing.assert_close(codec.decode(latents), image)
    assert torch.equal(codec.moments(image), latents)  # a cache holds them scaled
    with pytest.raises(ValueError, match="'nowhere' holds no autoencoder"):
        DCAE("nowhere")
    monkeypatch.setattr(StandIn, "spatial_compression_ratio", 64)
    with pytest.raises(ValueError, match="32 channels and stride 64"):
        DCAE("somewhere")


@pytest.mark.parametrize("codec", [PixelCodec(), DCAE(), KLVAE(channels=32, image_size=32)])
def test_shapes_agree(codec: LatentCodec) -> None:
    channels, height, width = codec.latent_shape
    assert height == codec.image_shape[1] // codec.stride and width == codec.image_shape[2] // codec.stride
    factor = 2 if codec.cache_kind == "moments" else 1
    assert codec.moments_shape == (factor * channels, height, width)
    assert codec.from_moments(torch.zeros(2, *codec.moments_shape)).shape == (2, *codec.latent_shape)
    with pytest.raises(ValueError, match="must have the shape"):
        codec.from_moments(torch.zeros(2, channels + 1, height, width))
