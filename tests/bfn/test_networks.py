"""The published networks: names and sizes of the released weights, and the functions that they compute."""

import math
from collections.abc import Callable

import pytest
import torch
from sweep import sweep_tuples
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.bfn import BFNTransformer, ImprovedUNet, Network, ResidualMLP, UNetVDM
from zoo.bfn.networks import FourierImageInputAdapter, TextInputAdapter
from zoo.bfn.networks.improved_unet import fold, unfold

Shapes = dict[str, tuple[int, ...]]

SMALL: dict[str, Callable[[], Network]] = {
    "UNetVDM": lambda: UNetVDM(image_shape=(3, 4, 6), width=8, depth=2, num_heads=2, norm_groups=4, num_outputs=2),
    "ImprovedUNet": lambda: ImprovedUNet(image_shape=(1, 8, 4), width=8, norm_groups=4, num_heads=2, attention_factors=(2,)),
    "BFNTransformer": lambda: BFNTransformer(num_inputs=5, num_outputs=5, seq_len=6, width=8, depth=2, num_heads=2),
}
SHAPES = {"UNetVDM": (4, 6, 3), "ImprovedUNet": (8, 4, 1), "BFNTransformer": (6, 5)}


def small(name: str, dtype: torch.dtype = torch.float64) -> tuple[Network, Tensor, Tensor]:
    """A small network with random weights everywhere, and inputs for it."""
    torch.manual_seed(0)
    network = SMALL[name]().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    mu = torch.rand(3, *SHAPES[name], dtype=torch.float64)
    if name == "BFNTransformer":
        mu = mu.softmax(-1)
    return network.to(dtype), mu.to(dtype), torch.rand(3, dtype=torch.float64)


# Names and shapes of the released files


def linear(name: str, inputs: int, outputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def cifar10(outputs: int) -> Shapes:
    def block(name: str, inputs: int) -> Shapes:
        found = norm(f"{name}.net1.0", inputs) | linear(f"{name}.net1.2", inputs, 128, 3, 3)
        found |= {f"{name}.cond_proj.weight": (128, 512)}
        found |= norm(f"{name}.net2.0", 128) | linear(f"{name}.net2.3", 128, 128, 3, 3)
        return found | (linear(f"{name}.skip_conv", inputs, 128, 1, 1) if inputs != 128 else {})

    found: Shapes = {"input_adapter.pos_feats": (1024, 258)}
    found |= linear("output_adapter.output_projection", 131, 3 * outputs)
    found |= linear("embed_conditioning.0", 128, 512) | linear("embed_conditioning.2", 512, 512)
    found |= linear("conv_in", 15, 128, 3, 3)
    for i in range(32):
        found |= block(f"down_blocks.{i}.resnet_block", 128)
    found |= block("mid_resnet_block_1", 128) | block("mid_resnet_block_2", 128)
    found |= norm("mid_attn_block.layers.0", 128) | linear("mid_attn_block.layers.1", 128, 384, 1, 1)
    found |= linear("mid_attn_block.layers.3", 128, 128, 1, 1)
    for i in range(33):
        found |= block(f"up_blocks.{i}.resnet_block", 256)
    return found | norm("conv_out.0", 128) | linear("conv_out.2", 128, 128, 3, 3)


def text8() -> Shapes:
    found: Shapes = {"input_adapter.pos_embedding": (256, 768)}
    found |= linear("input_adapter.inp_embedding", 27, 768) | linear("input_adapter.t_embedding", 1, 768)
    for i in range(24):
        name = f"transformer.h.{i}"
        found |= norm(f"{name}.ln_1", 768) | linear(f"{name}.attn.c_attn", 768, 2304) | linear(f"{name}.attn.c_proj", 768, 768)
        found |= norm(f"{name}.ln_2", 768) | linear(f"{name}.mlp.c_fc", 768, 3072) | linear(f"{name}.mlp.c_proj", 3072, 768)
    return found | norm("transformer.ln_f", 768) | linear("lm_head", 1536, 27)


def mnist() -> Shapes:
    def block(name: str, inputs: int, outputs: int) -> Shapes:
        found = norm(f"{name}.in_layers.0", inputs) | linear(f"{name}.in_layers.2", inputs, outputs, 3, 3)
        found |= linear(f"{name}.emb_layers.1", 512, outputs)
        found |= norm(f"{name}.out_layers.0", outputs) | linear(f"{name}.out_layers.3", outputs, outputs, 3, 3)
        return found | (linear(f"{name}.skip_connection", inputs, outputs, 1, 1) if inputs != outputs else {})

    found: Shapes = {"input_adapter.pos_feats": (784, 258)} | linear("output_adapter.output_projection", 256, 1)
    found |= linear("input_projection", 2, 128) | linear("time_embed.0", 128, 512) | linear("time_embed.2", 512, 512)
    found |= linear("input_blocks.0.0", 128, 128, 3, 3)
    for i, (inputs, outputs) in {
        1: (128, 128),
        2: (128, 128),
        4: (128, 256),
        5: (256, 256),
        7: (256, 256),
        8: (256, 256),
    }.items():
        found |= block(f"input_blocks.{i}.0", inputs, outputs)
    found |= linear("input_blocks.3.0.op", 128, 128, 3, 3) | linear("input_blocks.6.0.op", 256, 256, 3, 3)
    found |= block("middle_block.0", 256, 256) | block("middle_block.2", 256, 256)
    found |= norm("middle_block.1.norm", 256) | linear("middle_block.1.qkv", 256, 768, 1)
    found |= linear("middle_block.1.proj_out", 256, 256, 1)
    for i, inputs in enumerate((512, 512, 512, 512, 512, 384)):
        found |= block(f"output_blocks.{i}.0", inputs, 256)
    for i, inputs in enumerate((384, 256, 256), start=6):
        found |= block(f"output_blocks.{i}.0", inputs, 128)
    found |= linear("output_blocks.2.1.conv", 256, 256, 3, 3) | linear("output_blocks.5.1.conv", 256, 256, 3, 3)
    return found | norm("out.0", 128) | linear("out.2", 128, 128, 3, 3)


@pytest.mark.parametrize(
    ("build", "shapes", "tensors", "parameters"),
    [
        (UNetVDM, cifar10(1), 688, 30_722_188),
        (lambda: UNetVDM(num_outputs=2), cifar10(2), 688, 30_722_584),
        (BFNTransformer, text8(), 297, 170_175_003),
        (ImprovedUNet, mnist(), 219, 24_808_961),
    ],
    ids=["cifar10, 1 output", "cifar10, 2 outputs", "text8", "mnist"],
)
def test_defaults_have_the_names_and_shapes_of_the_released_weights(build, shapes, tensors, parameters):
    with torch.device("meta"):
        network = build()
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == shapes
    assert len(shapes) == tensors
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


# The functions, written out from the paper on the released names, with attention as its definition


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(..., T, D), by the definition."""
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Weights(dict):
    """A state dict whose layers can be applied by name."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"].flatten(1), self.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, self[f"{name}.weight"], self[f"{name}.bias"], **options)

    def norm_silu_conv(self, norm: str, conv: str, x: Tensor) -> Tensor:
        return self.conv(conv, F.silu(self.group_norm(norm, x)), padding=1)

    def group_norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 4, self[f"{name}.weight"], self[f"{name}.bias"])

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])


def text_function(w: Weights, probs: Tensor, t: Tensor) -> Tensor:
    a = "input_adapter."
    x = w.linear(a + "inp_embedding", 2 * probs - 1) + w[a + "pos_embedding"]
    x = embedding = x + w.linear(a + "t_embedding", 2 * t[:, None, None] - 1)
    for i in range(2):
        block = f"transformer.h.{i}."
        q, k, v = w.linear(block + "attn.c_attn", w.layer_norm(block + "ln_1", x)).chunk(3, dim=-1)
        heads = [attention(*pair) for pair in zip(q.split(4, -1), k.split(4, -1), v.split(4, -1), strict=True)]
        x = x + w.linear(block + "attn.c_proj", torch.cat(heads, -1))
        h = F.gelu(w.linear(block + "mlp.c_fc", w.layer_norm(block + "ln_2", x)), approximate="tanh")
        x = x + w.linear(block + "mlp.c_proj", h)
    return w.linear("lm_head", torch.cat((w.layer_norm("transformer.ln_f", x), embedding), -1))


def cifar10_function(w: Weights, mu: Tensor, t: Tensor) -> Tensor:
    def block(name: str, x: Tensor, c: Tensor) -> Tensor:
        h = w.norm_silu_conv(f"{name}.net1.0", f"{name}.net1.2", x) + w.linear(f"{name}.cond_proj", c)[:, :, None, None]
        h = w.norm_silu_conv(f"{name}.net2.0", f"{name}.net2.3", h)
        return h + (w.conv(f"{name}.skip_conv", x) if f"{name}.skip_conv.weight" in w else x)

    phase = 1000 * (t + 0.001)[:, None] * torch.logspace(0, -4, 4, dtype=t.dtype)
    c = F.silu(w.linear("embed_conditioning.0", torch.cat((phase.sin(), phase.cos()), 1)))
    c = F.silu(w.linear("embed_conditioning.2", c))
    x = mu.movedim(-1, 1)
    sines = [(2 * math.pi * 2**n * x[:, [i]]).sin() for n in (5, 6) for i in range(3)]
    cosines = [(2 * math.pi * 2**n * x[:, [i]]).cos() for n in (5, 6) for i in range(3)]
    h = w.conv("conv_in", torch.cat((x, *sines, *cosines), 1), padding=1)
    kept = [h]
    for i in range(2):
        h = block(f"down_blocks.{i}.resnet_block", h, c)
        kept.append(h)
    h = block("mid_resnet_block_1", h, c)
    qkv = w.conv("mid_attn_block.layers.1", w.group_norm("mid_attn_block.layers.0", h)).flatten(2).transpose(1, 2)
    heads = [attention(*(qkv[..., start + 4 * i : start + 4 * i + 4] for start in (0, 8, 16))) for i in range(2)]
    h = h + w.conv("mid_attn_block.layers.3", torch.cat(heads, -1).transpose(1, 2).unflatten(2, h.shape[2:]))
    h = block("mid_resnet_block_2", h, c)
    for i in range(3):
        h = block(f"up_blocks.{i}.resnet_block", torch.cat((h, kept.pop()), 1), c)
    out = w.norm_silu_conv("conv_out.0", "conv_out.2", h).movedim(1, -1)
    return w.linear("output_adapter.output_projection", torch.cat((mu, out), -1)).unflatten(-1, (3, 2))


def mnist_function(w: Weights, mu: Tensor, t: Tensor) -> Tensor:
    def block(name: str, x: Tensor) -> Tensor:
        h = w.norm_silu_conv(f"{name}.in_layers.0", f"{name}.in_layers.2", x)
        h = h + w.linear(f"{name}.emb_layers.1", F.silu(time))[:, :, None, None]
        h = w.norm_silu_conv(f"{name}.out_layers.0", f"{name}.out_layers.3", h)
        return h + (w.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in w else x)

    def attend(name: str, x: Tensor) -> Tensor:
        qkv = w.linear(f"{name}.qkv", w.group_norm(f"{name}.norm", x).flatten(2).transpose(1, 2))
        h = torch.cat([attention(*head.chunk(3, -1)) for head in qkv.chunk(2, -1)], -1)
        return x + w.linear(f"{name}.proj_out", h).transpose(1, 2).unflatten(2, x.shape[2:])

    phase = 4000 * t[:, None] * torch.exp(-math.log(10_000) * torch.arange(4, dtype=t.dtype) / 4)
    time = w.linear("time_embed.2", F.silu(w.linear("time_embed.0", torch.cat((phase.cos(), phase.sin()), 1))))
    time_channel = (2 * t - 1)[:, None, None, None].expand_as(mu)
    x = w.linear("input_projection", torch.cat((mu, time_channel), -1))
    h = w.conv("input_blocks.0.0", x.movedim(-1, 1), padding=1)
    kept = [h]
    for i in range(1, 9):
        if f"input_blocks.{i}.0.op.weight" in w:
            h = w.conv(f"input_blocks.{i}.0.op", h, padding=1, stride=2)
        else:
            h = block(f"input_blocks.{i}.0", h)
            h = attend(f"input_blocks.{i}.1", h) if i in (4, 5) else h
        kept.append(h)
    h = block("middle_block.2", attend("middle_block.1", block("middle_block.0", h)))
    for i in range(9):
        h = block(f"output_blocks.{i}.0", torch.cat((h, kept.pop()), 1))
        h = attend(f"output_blocks.{i}.1", h) if i in (3, 4, 5) else h
        if i in (2, 5):
            upsample = f"output_blocks.{i}.{2 if i == 5 else 1}.conv"
            h = w.conv(upsample, h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    out = w.norm_silu_conv("out.0", "out.2", h).movedim(1, -1)
    return w.linear("output_adapter.output_projection", torch.cat((x, out), -1))[..., None]


FUNCTIONS = {"UNetVDM": cifar10_function, "ImprovedUNet": mnist_function, "BFNTransformer": text_function}


@pytest.mark.parametrize("name", SMALL)
def test_network_computes_the_published_function_of_its_weights(name):
    network, mu, t = small(name)
    expected = FUNCTIONS[name](Weights(network.state_dict()), mu, t)
    output = network(mu, t)
    assert output.shape == expected.shape
    assert torch.allclose(output, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert output.std() > 0


# What begins at zero, and what is learned


@pytest.mark.parametrize("name", ["UNetVDM", "ImprovedUNet"])
def test_untrained_unet_is_linear_in_its_input(name):
    torch.manual_seed(0)
    network, (_, mu, _) = SMALL[name]().eval(), small(name, torch.float32)
    zero, t = torch.zeros_like(mu), torch.full((3,), 0.3)
    with torch.no_grad():
        linear_part = network(mu, t) - network(zero, t)
        assert torch.allclose(network(3 * mu, t) - network(zero, t), 3 * linear_part, atol=1e-5)
        assert linear_part.abs().max() > 0.01


def test_weights_that_begin_at_zero():
    vdm, improved = SMALL["UNetVDM"]().state_dict(), SMALL["ImprovedUNet"]().state_dict()
    zero = {name for name, tensor in {**vdm, **improved}.items() if not tensor.any() and name.endswith("weight")}
    blocks = [f"{path}.{i}.resnet_block" for path, count in (("down_blocks", 2), ("up_blocks", 3)) for i in range(count)]
    blocks += ["mid_resnet_block_1", "mid_resnet_block_2"]
    expected = {f"{block}.{layer}.weight" for block in blocks for layer in ("cond_proj", "net2.3")}
    expected |= {"conv_out.2.weight", "mid_attn_block.layers.3.weight", "out.2.weight"}
    expected |= {name for name in improved if name.endswith(("out_layers.3.weight", "proj_out.weight"))}
    assert zero == expected


def test_transformer_begins_with_the_published_spread():
    torch.manual_seed(0)
    network = BFNTransformer(num_inputs=100, width=256, depth=8, num_heads=4)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "ln_" not in name:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name", SMALL)
def test_every_part_learns(name):
    torch.manual_seed(0)
    network, (_, mu, t) = SMALL[name]().train(), small(name, torch.float32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    seen = dict.fromkeys(network.parameters(), False)
    for _ in range(5):
        optimizer.zero_grad()
        output = network(mu, t.float())
        (output - torch.linspace(-1, 1, output.shape[-2])[:, None]).square().mean().backward()
        optimizer.step()
        seen = {parameter: known or bool(parameter.grad.any()) for parameter, known in seen.items()}
    assert all(seen.values())


# Features of position and time


def test_position_code_of_text_keeps_its_quirks():
    code = TextInputAdapter(3, 256, 768).pos_embedding
    p = torch.arange(256.0)
    assert torch.allclose(code[:, 4], (p / 1000 ** (4 / 768)).sin(), atol=1e-5)
    assert torch.allclose(code[:, 5], (p / 1000 ** (5 / 768)).cos(), atol=1e-5)
    assert torch.allclose(code[:, 767], (p / 1000 ** (767 / 768)).cos(), atol=1e-5)
    assert torch.allclose(code[0], torch.tensor([0.0, 1.0]).repeat(384))


def test_position_features_of_images():
    features = FourierImageInputAdapter(1, (28, 14)).pos_feats.unflatten(0, (28, 14))
    row, column = -1 + 2 * 5 / 27, -1 + 2 * 9 / 13
    pixel = features[5, 9].double()
    assert pixel[-2:].tolist() == pytest.approx([row, column], abs=1e-6)
    for axis, (position, size) in enumerate(((row, 28), (column, 14))):
        frequency = math.pi * torch.linspace(1, size / 2, 64).double()
        assert torch.allclose(pixel[64 * axis : 64 * axis + 64], (frequency * position).sin(), atol=1e-5)
        assert torch.allclose(pixel[128 + 64 * axis :][:64], (frequency * position).cos(), atol=1e-5)


def test_adapter_shows_what_it_is_asked_to():
    x, t = torch.rand(2, 28, 14, 3), torch.tensor([0.0, 0.75])
    shown = FourierImageInputAdapter(3, (28, 14))(x, t)
    assert shown.shape == (2, 28, 14, 3 + 1 + 258)
    assert torch.equal(shown[..., :3], x)
    assert torch.equal(shown[..., 3], torch.tensor([-1.0, 0.5])[:, None, None].expand(2, 28, 14))
    bare = FourierImageInputAdapter(3, (28, 14), add_mask=False, add_pos_feats=False, output_height=3)
    assert torch.equal(bare(x, t), x)
    assert list(bare.state_dict()) == ["pos_feats"]
    assert FourierImageInputAdapter(3, (28, 14), output_height=16)(x, t).shape == (2, 28, 14, 16)


# Symmetries


def test_transformer_without_positions_treats_all_positions_alike():
    network, probs, t = small("BFNTransformer")
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert not torch.allclose(network(probs[:, order], t), network(probs, t)[:, order], atol=1e-3)
    network.input_adapter.pos_embedding.zero_()
    assert torch.allclose(network(probs[:, order], t), network(probs, t)[:, order], atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_samples_do_not_see_one_another(name):
    network, mu, t = small(name)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(network(mu[order], t[order]), network(mu, t)[order], atol=1e-9)
    assert not torch.allclose(network(mu, t[order]), network(mu, t), atol=1e-3)


def test_a_shorter_text_is_seen_from_its_first_position():
    network, probs, t = small("BFNTransformer")
    network.transformer["h"] = nn.ModuleList()  # without attention, positions are apart
    assert torch.allclose(network(probs[:, :4], t), network(probs, t)[:, :4], atol=1e-12)


# Patches


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unfold_undoes_fold(patch):
    x = torch.randn(2, 8, 12, 3)
    folded = fold(x, patch)
    assert folded.shape == (2, 8 // patch, 12 // patch, 3 * patch * patch)
    assert torch.equal(unfold(folded[..., None], patch)[..., 0], x)
    assert torch.equal(folded[:, 1, 2, :3], x[:, patch, 2 * patch])


def test_patches_are_channels_of_a_smaller_image():
    torch.manual_seed(0)
    options = {"width": 8, "norm_groups": 4, "multipliers": (1, 2), "num_outputs": 2, "num_inputs": 3}
    folded = ImprovedUNet(image_shape=(8, 4, 6), **options).eval()
    patched = ImprovedUNet(image_shape=(2, 8, 12), patch_size=2, **options).eval()
    for parameter in folded.parameters():
        nn.init.normal_(parameter, std=0.3)
    patched.load_state_dict(folded.state_dict())
    mu, t = torch.randn(2, 8, 12, 2, 3), torch.rand(2)
    small_mu = fold(mu.flatten(3), 2).unflatten(-1, (8, 3))
    assert torch.allclose(patched(mu, t), unfold(folded(small_mu, t), 2), atol=1e-5)


# Precision, compilation


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_weights_and_autocast_stay_near_float32(name):
    network, mu, t = small(name, torch.float32)
    for parameter in network.parameters():
        parameter.data.mul_(0.3)
    exact = network(mu, t.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(mu, t.float())
    assert (mixed.float() - exact).abs().max() < 0.05 * exact.std()
    half = network.bfloat16()(mu, t.float())
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.1 * exact.std()


def test_fourier_features_are_not_rounded_to_bfloat16():
    network, mu, _ = small("UNetVDM", torch.float32)
    shown = network._with_fourier_features(mu.bfloat16())
    assert shown.dtype == torch.float32
    assert torch.allclose(shown[..., 3], (64 * math.pi * mu[..., 0].bfloat16().double()).sin().float(), atol=1e-4)


@pytest.mark.parametrize(
    ("network", "shape"),
    sweep_tuples(
        [
            (lambda: UNetVDM((1, 4, 4), width=8, depth=1, norm_groups=4), (4, 4, 1)),
            (
                lambda: ImprovedUNet((1, 4, 4), width=8, norm_groups=4, multipliers=(1, 1), num_res_blocks=1, patch_size=2),
                (4, 4, 1),
            ),
            (lambda: BFNTransformer(5, 5, seq_len=6, width=8, depth=1, num_heads=2), (6, 5)),
        ]
    ),
    ids=SMALL,
)
def test_compiles_without_a_break_in_the_graph(network, shape):
    torch.manual_seed(0)
    plain, mu, t = network().eval(), torch.rand(3, *shape), torch.rand(3)
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(mu, t), plain(mu, t), atol=1e-5)
    torch._dynamo.reset()


# Kinds of data, weight decay, errors


@pytest.mark.parametrize(
    ("network", "shape", "output"),
    [
        (lambda: UNetVDM(image_shape=(1, 8, 8), width=8, depth=1, norm_groups=4), (8, 8, 1), (8, 8, 1, 1)),
        (
            lambda: UNetVDM((2, 8, 4), num_inputs=5, num_outputs=5, width=8, depth=1, norm_groups=4, attention_everywhere=True),
            (8, 4, 2, 5),
            (8, 4, 2, 5),
        ),
        (
            lambda: UNetVDM((1, 8, 4), width=8, depth=1, norm_groups=4, add_mask=True, add_pos_feats=True, adapter_width=3),
            (8, 4, 1),
            (8, 4, 1, 1),
        ),
        (
            lambda: ImprovedUNet((3, 8, 8), 4, 6, width=8, norm_groups=4, num_heads=2, patch_size=2, add_pos_feats=True),
            (8, 8, 3, 4),
            (8, 8, 3, 6),
        ),
        (lambda: BFNTransformer(1, 1, seq_len=7, width=8, depth=1, num_heads=1, skip=False, bias=False), (7,), (7, 1)),
        (lambda: BFNTransformer(4, 4, seq_len=7, width=8, depth=1, num_heads=1, learned_positions=True), (7, 4), (7, 4)),
    ],
)
def test_output_has_the_numbers_that_the_head_reads_for_each_element(network, shape, output):
    assert network()(torch.randn(2, *shape), torch.rand(2)).shape == (2, *output)


def test_weight_decay_of_text_spares_biases_norms_and_embeddings():
    network = BFNTransformer(4, 4, seq_len=7, width=8, depth=2, num_heads=1, learned_positions=True)
    decayed, spared = network.parameter_groups(weight_decay=0.3)
    assert decayed["weight_decay"] == 0.3 and spared["weight_decay"] == 0
    assert len(decayed["params"]) == 2 * 4 + 3  # four linear maps a block, the embeddings of input and time, the output
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert sum(p.dim() == 2 for p in spared["params"]) == 1  # the positions
    everything = {id(p) for group in (decayed, spared) for p in group["params"]}
    assert everything == {id(p) for p in network.parameters()}
    optimizer = torch.optim.AdamW(network.parameter_groups(), weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("network", [ResidualMLP(num_elements=4, width=8), SMALL["UNetVDM"]()])
def test_other_networks_decay_all_parameters(network):
    (group,) = network.parameter_groups()
    assert len(group["params"]) == len(list(network.parameters()))
    assert "weight_decay" not in group


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UNetVDM(width=100), r"width=100.*norm_groups=32"),
        (lambda: UNetVDM(depth=0), "depth=0"),
        (lambda: UNetVDM(image_shape=(32, 32)), r"image_shape=\(32, 32\) must be \(channels, height, width\)"),
        (lambda: UNetVDM(dropout=1.0), "dropout=1.0"),
        (lambda: ImprovedUNet(image_shape=(1, 30, 28)), r"multiples of 4: choose a smaller patch or fewer multipliers"),
        (lambda: ImprovedUNet(patch_size=2), "multiples of 8"),
        (lambda: ImprovedUNet(num_heads=3), "num_heads=3"),
        (lambda: ImprovedUNet(multipliers=()), r"multipliers=\[\] must not be empty"),
        (lambda: BFNTransformer(width=10, num_heads=4), "width=10 must be a multiple of num_heads=4"),
        (lambda: BFNTransformer(depth=0), "depth=0"),
        (lambda: SMALL["UNetVDM"]()(torch.rand(2, 3, 4, 6), torch.rand(2)), r"\(B, 4, 6, 3\), channels last.*set image_shape"),
        (lambda: SMALL["UNetVDM"]()(torch.rand(2, 4, 6, 3), torch.rand(1)), "one time a sample"),
        (lambda: SMALL["ImprovedUNet"]()(torch.rand(2, 8, 4, 1, 16), torch.rand(2)), "num_inputs to the numbers"),
        (lambda: SMALL["BFNTransformer"]()(torch.rand(2, 9, 5), torch.rand(2)), "set seq_len"),
        (lambda: SMALL["BFNTransformer"]()(torch.rand(2, 6, 27), torch.rand(2)), "set num_inputs"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_argument_to_change(call, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        call()
