"""KL-16: names, shapes and sizes of the released file, the posterior, and files that do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.emigm.codecs import KLVAE
from zoo.emigm.codecs.kl_vae import KLAutoencoder


def released() -> dict[str, tuple[int, ...]]:
    """Names and shapes of kl16.ckpt, written out from the description of the architecture."""
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, width_in: int, width: int) -> None:
        layer(f"{name}.norm1", width_in)
        layer(f"{name}.conv1", width, width_in, 3, 3)
        layer(f"{name}.norm2", width)
        layer(f"{name}.conv2", width, width, 3, 3)
        if width_in != width:
            layer(f"{name}.nin_shortcut", width, width_in, 1, 1)

    def attention(name: str, width: int) -> None:
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    widths = [128, 128, 256, 256, 512]
    for side, first, last in (("encoder", 3, 32), ("decoder", 16, 3)):
        layer(f"{side}.conv_in", 128 if side == "encoder" else 512, first, 3, 3)
        block(f"{side}.mid.block_1", 512, 512)
        attention(f"{side}.mid.attn_1", 512)
        block(f"{side}.mid.block_2", 512, 512)
        layer(f"{side}.norm_out", 512 if side == "encoder" else 128)
        layer(f"{side}.conv_out", last, 512 if side == "encoder" else 128, 3, 3)
    for level, width in enumerate(widths):
        before = widths[level - 1] if level else 128
        above = widths[level + 1] if level < 4 else 512
        for number in range(2):
            block(f"encoder.down.{level}.block.{number}", width if number else before, width)
        for number in range(3):
            block(f"decoder.up.{level}.block.{number}", width if number else above, width)
        if level < 4:
            layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
        if level:
            layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    for number in range(2):
        attention(f"encoder.down.4.attn.{number}", 512)
    layer("quant_conv", 32, 32, 1, 1)
    layer("post_quant_conv", 16, 16, 1, 1)
    return found


def test_names_shapes_and_size_are_those_of_the_released_file() -> None:
    with torch.device("meta"):
        codec = KLVAE(Path("not/read/on/the/meta/device"))
    weights = codec.autoencoder.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == released()
    assert sum(tensor.numel() for tensor in weights.values()) == 66_456_019  # 266 MB in float32, as the file


def test_pictures_of_256_become_16_channels_of_16() -> None:
    with torch.device("meta"):
        codec = KLVAE()
        assert codec.image_shape == (3, 256, 256) and codec.latent_shape == (16, 16, 16) and codec.moments_shape == (32, 16, 16)
        assert codec.autoencoder.encode(torch.empty(2, *codec.image_shape)).shape == (2, *codec.moments_shape)
        assert codec.autoencoder.decode(torch.empty(2, *codec.latent_shape)).shape == (2, *codec.image_shape)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return KLAutoencoder(channels=32).state_dict()


@pytest.fixture
def codec(weights: dict[str, Tensor], tmp_path: Path) -> KLVAE:
    torch.save({"model": weights, "epoch": 3}, tmp_path / "kl16.ckpt")
    return KLVAE(tmp_path / "kl16.ckpt", image_size=32, channels=32)


def test_codec_is_the_network_between_scalings(codec: KLVAE) -> None:
    image = torch.rand(2, 3, 32, 32)
    moments = codec.autoencoder.encode(image * 2 - 1)
    assert torch.equal(codec.moments(image), moments)
    torch.testing.assert_close(codec.encode(image), moments[:, :16] * 0.2325)
    latents = torch.randn(2, 16, 2, 2) * 0.2325
    expected = (codec.autoencoder.decode(latents / 0.2325) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.decode(latents), expected)
    codec.autoencoder.decoder.conv_out.bias.data = torch.tensor([-9.0, 9.0, 0.0])
    assert codec.decode(latents)[:, 0].eq(0).all() and codec.decode(latents)[:, 1].eq(1).all()


def test_posterior_has_the_stored_mean_and_standard_deviation() -> None:
    codec = KLVAE(image_size=32, channels=32)
    mean, log_variance = torch.randn(16, 2, 2), torch.randn(16, 2, 2)
    moments = torch.cat([mean, log_variance]).expand(20_000, 32, 2, 2)
    noise = torch.randn(20_000, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = codec.from_moments(moments, noise)
    std = (log_variance / 2).exp() * 0.2325
    assert ((latents.mean(0) - mean * 0.2325).abs() < 5 * std / 20_000**0.5).all()
    torch.testing.assert_close(latents.std(0), std, rtol=0.03, atol=0)
    assert torch.equal(codec.from_moments(moments[:1])[0], mean * 0.2325)


@pytest.mark.parametrize(("log_variance", "limit"), [(100.0, 20.0), (-100.0, -30.0)])
def test_log_variance_is_limited(log_variance: float, limit: float) -> None:
    codec = KLVAE(image_size=16, channels=32)
    moments = torch.cat([torch.zeros(1, 16, 1, 1), torch.full((1, 16, 1, 1), log_variance)], dim=1)
    found = codec.from_moments(moments, torch.ones(1, 16, 1, 1))
    torch.testing.assert_close(found, torch.full_like(found, torch.tensor(limit / 2).exp().item() * 0.2325))


def test_resolution_is_halved_from_the_upper_left_corner() -> None:
    layer = KLAutoencoder(channels=32).encoder.down[0].downsample
    x = torch.randn(1, 32, 6, 6)
    for tap, expected in ((0, x[..., ::2, ::2]), (2, torch.nn.functional.pad(x, (0, 1, 0, 1))[..., 2::2, 2::2])):
        nn.init.zeros_(layer.conv.weight)
        nn.init.zeros_(layer.conv.bias)
        with torch.no_grad():
            layer.conv.weight[range(32), range(32), tap, tap] = 1
        torch.testing.assert_close(layer(x), expected)


def test_attention_alone_mixes_all_positions() -> None:
    """With constant queries, attention is the mean over the positions."""
    layer = KLAutoencoder(channels=32).encoder.mid.attn_1
    nn.init.zeros_(layer.q.weight)
    nn.init.zeros_(layer.q.bias)
    x = torch.randn(2, 128, 3, 5)
    mean = layer.v(layer.norm(x)).mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(layer(x), x + layer.proj_out(mean), atol=1e-5, rtol=1e-4)


def test_each_form_of_file_is_read_and_the_training_loss_passed_over(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": {**weights, "loss.discriminator.main.0.weight": torch.zeros(3)}}, tmp_path / "kl16.ckpt")
    torch.save(weights, tmp_path / "bare.pt")
    save_file(weights, tmp_path / "kl16.safetensors")
    fingerprints = {KLVAE(tmp_path / name, channels=32).fingerprint() for name in ("kl16.ckpt", "bare.pt", "kl16.safetensors")}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_conv.bias": None}, r"missing: quant_conv\.bias"),
        ({"quant_conv.bias": torch.zeros(8)}, r"of another shape: quant_conv\.bias \(8,\) instead of \(32,\)"),
        ({"encoder.extra": torch.zeros(1)}, r"unknown: encoder\.extra"),
        ({"quant_conv.bias": torch.full((32,), torch.nan)}, r"no finite numbers \(quant_conv\.bias\)"),
        ({"quant_conv.bias": "text"}, "holds no weights"),
    ],
)
def test_weights_that_do_not_fit_are_listed(weights, tmp_path: Path, change, message: str) -> None:
    changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
    torch.save({"model": changed}, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match=message):
        KLVAE(tmp_path / "kl16.ckpt", channels=32)


def test_files_that_hold_code_or_are_not_there_are_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match="could run code"):
        KLVAE(tmp_path / "kl16.ckpt")
    with pytest.raises(FileNotFoundError, match=r"path=.*nowhere\.ckpt does not exist: give the file kl16\.ckpt"):
        KLVAE(tmp_path / "nowhere.ckpt")


def test_random_weights_neither_encode_nor_decode() -> None:
    codec = KLVAE(image_size=16, channels=32)
    for use in (
        codec.require_weights,
        lambda: codec.encode(torch.zeros(1, 3, 16, 16)),
        lambda: codec.decode(torch.zeros(1, 16, 1, 1)),
    ):
        with pytest.raises(ValueError, match=r"random weights.*set path"):
            use()


@pytest.mark.parametrize(("arguments", "message"), [({"image_size": 40}, "image_size=40"), ({"channels": 48}, "channels=48"),
                                                    ({"scale": 0.0}, "scale=0.0")])  # fmt: skip
def test_impossible_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLVAE(**arguments)
