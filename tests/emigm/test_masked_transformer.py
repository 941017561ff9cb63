"""The masked transformer: published sizes, no leak of masked tokens, symmetries, limits of the mask, the published start."""

import itertools
import math

import pytest
import torch
from sweep import sweep_tuples
from torch import nn

from zoo.emigm.network import MaskedTransformer, _Block
from zoo.emigm.sizes import architecture

N, C, D, S, B = 6, 3, 16, 2, 4
MAE = pytest.mark.parametrize("use_mae", [True, False], ids=["visible only", "single encoder"])


def make(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"width": D, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2, "head_depth": 1, "head_width": 8}
    defaults = {"num_classes": 5, "buffer_size": S, "attn_dropout": 0.0, "proj_dropout": 0.0}
    network = MaskedTransformer(N, C, **sizes, **{**defaults, **options}).double()
    for parameter in network.parameters():  # away from the start, where much is 0
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def tokens(seed=0):
    return torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orders(seed=0):
    return torch.rand(B, N, generator=torch.Generator().manual_seed(seed)).argsort(1)


def run(network, x, visible, label=None, picked=None):
    mask = torch.ones(x.shape[:2], dtype=torch.bool).scatter_(1, visible, False)
    label = torch.arange(len(x)) if label is None else label
    return network(x, network.class_embedding(label, len(x)), visible, mask, picked)


def hidden(x, visible, value):
    """The tokens with this value wherever they are masked."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool).scatter_(1, visible, False)
    return x.masked_fill(mask[..., None], value)


# Sizes


def published(size, image_size, **options):
    """As released: 256 tokens, 64 slots, 1000 classes."""
    with torch.device("meta"):
        sizes = vars(architecture(size, image_size))
        return MaskedTransformer(256, 16 if image_size == 256 else 32, **sizes, **options)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "image_size", "millions"),
    sweep_tuples(
        [
            ("xsmall", 256, 69.019),
            ("small", 256, 96.641),
            ("base", 256, 207.924),
            ("large", 256, 478.325),
            ("huge", 256, 942.402),
            ("xsmall", 512, 104.507),
            ("small", 512, 132.146),
            ("base", 512, 244.151),
            ("large", 512, 478.403),
        ],
        quick=(0, 4, 8),
    ),
)
def test_numbers_of_parameters(size, image_size, millions):
    """Those of tables 6 and 7, and to the unit those of the layers as the paper describes them."""
    network = published(size, image_size)
    assert round(count(network) / 1e6, 3) == millions

    a, c = architecture(size, image_size), 16 if image_size == 256 else 32
    width, head = a.width, a.head_width
    block = (width + 1) * 3 * width + (width + 1) * width + (width + 1) * 4 * width + (4 * width + 1) * width + 4 * width
    tables = 2 * (256 + 64) * width + 256 * width + 1000 * width + width
    rest = (c + 1) * width + 3 * 2 * width + (width + 1) * width
    residual = 2 * head + 2 * (head + 1) * head + (head + 1) * 3 * head
    ends = (256 + 1) * head + (head + 1) * head + (width + 1) * head + (c + 1) * head
    final = (head + 1) * 2 * head + (head + 1) * 2 * c
    head_total = a.head_depth * residual + ends + final
    assert count(network) == (a.encoder_depth + a.decoder_depth) * block + tables + rest + head_total
    assert count(published(size, image_size, cfg_with_mask=False)) == count(network) + width


def test_names_of_the_weights():
    """292 of xsmall, 256 pixels: 16 + 12 per block + 8 per block of the head + 12."""
    network = published("xsmall", 256)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == 292 == 16 + 12 * 20 + 8 * 3 + 12
    assert shapes["fake_latent"] == shapes["mask_token"] == (1, 448)
    assert shapes["encoder_pos_embed_learned"] == shapes["decoder_pos_embed_learned"] == (1, 320, 448)
    assert shapes["diffusion_pos_embed_learned"] == (1, 256, 448)
    assert shapes["decoder_blocks.9.attn.qkv.weight"] == (3 * 448, 448)
    assert shapes["diffloss.net.res_blocks.2.adaLN_modulation.1.weight"] == (3072, 1024)
    assert shapes["diffloss.net.final_layer.linear.bias"] == (32,)
    assert published("xsmall", 256, cfg_with_mask=False).state_dict()["mask_token"].shape == (1, 1, 448)


def test_block_is_the_pre_norm_block_of_torch():
    torch.manual_seed(0)
    ours = _Block(D, 4, 0.0, 0.0).double()
    theirs = nn.TransformerEncoderLayer(
        D, 4, 4 * D, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    weights = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    theirs.load_state_dict(weights)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)


# Masked tokens


@MAE
@pytest.mark.parametrize("value", [1e30, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("num_visible", [0, 2, 5])
def test_masked_tokens_do_not_leak(use_mae, value, num_visible):
    network, x, visible = make(use_mae=use_mae), tokens(), orders()[:, :num_visible]
    expected = run(network, x, visible)
    assert torch.equal(run(network, hidden(x, visible, value), visible), expected)
    picked = orders()[:, num_visible:]
    assert torch.equal(run(network, hidden(x, visible, value), visible, picked=picked), run(network, x, visible, picked=picked))


@MAE
def test_masked_tokens_do_not_leak_into_gradients(use_mae):
    """NaN must not be multiplied by 0, forwards or backwards."""
    network, x, visible = make(use_mae=use_mae), tokens(), orders()[:, :3]
    network.train()
    parameters = [p for name, p in network.named_parameters() if "diffloss" not in name]
    plain, poisoned = (
        torch.autograd.grad(run(network, values, visible).sin().sum(), parameters) for values in (x, hidden(x, visible, math.nan))
    )
    for a, b in zip(plain, poisoned, strict=True):
        assert torch.equal(a, b)


@MAE
def test_every_position_sees_every_visible_token_and_the_class(use_mae):
    network, x, visible = make(use_mae=use_mae), tokens(), orders()[:, :3]
    z = run(network, x, visible)
    for i in range(3):
        changed = x.scatter_add(1, visible[:, i, None, None].expand(-1, 1, C), torch.ones(B, 1, C, dtype=torch.float64))
        assert ((run(network, changed, visible) - z).abs().amax(2) > 1e-6).all()
    assert ((run(network, x, visible, label=torch.tensor([4, 0, 4, 0])) - z).abs().amax(2) > 1e-6).all()


@MAE
def test_images_do_not_see_each_other(use_mae):
    network, x, visible = make(use_mae=use_mae), tokens(), orders()[:, :3]
    together = run(network, x, visible)
    alone = run(network, x[2:3], visible[2:3], label=torch.tensor([2]))
    torch.testing.assert_close(alone, together[2:3])


# Symmetries


def test_order_of_the_visible_positions_does_not_matter():
    network, x, visible = make(), tokens(), orders()[:, :4]
    for shuffle in ([3, 1, 0, 2], [1, 2, 3, 0]):
        torch.testing.assert_close(run(network, x, visible[:, shuffle]), run(network, x, visible))


@MAE
def test_permuting_positions_with_their_tables_permutes_the_output(use_mae):
    network, x, visible = make(use_mae=use_mae), tokens(), orders()[:, :3]
    z = run(network, x, visible)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    new_place = order.argsort()
    with torch.no_grad():
        for table, start in (
            (network.encoder_pos_embed_learned, S),
            (network.decoder_pos_embed_learned, S),
            (network.diffusion_pos_embed_learned, 0),
        ):
            table[:, start:] = table[:, start:][:, order]
    torch.testing.assert_close(run(network, x[:, order], new_place[visible]), z[:, order])


@MAE
@pytest.mark.parametrize("num_visible", [0, 2, 5])
def test_picked_positions_are_rows_of_the_whole(use_mae, num_visible):
    network, x, order = make(use_mae=use_mae), tokens(), orders()
    visible, z = order[:, :num_visible], run(network, x, order[:, :num_visible])
    for picked in (order[:, num_visible:], order[:, -1:], order):
        expected = z.gather(1, picked[..., None].expand(-1, -1, D))
        torch.testing.assert_close(run(network, x, visible, picked=picked), expected)


# Limits


@pytest.mark.parametrize("num_visible", [0, 1, 4, N])
def test_encoder_computes_class_slots_and_visible_tokens_only(num_visible):
    network, shapes = make(), []
    for block in network.encoder_blocks:
        block.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    run(network, tokens(), orders()[:, :num_visible])
    assert shapes == [(B, S + num_visible, D)] * 2


@MAE
@pytest.mark.parametrize("num_visible", [0, 3, N])
def test_mask_token_is_used_where_something_is_masked(use_mae, num_visible):
    network = make(use_mae=use_mae, cfg_with_mask=False).train()
    run(network, tokens(), orders()[:, :num_visible]).sin().sum().backward()
    used = network.mask_token.grad is not None and bool((network.mask_token.grad != 0).any())
    assert used is (num_visible < N)
    assert network.fake_latent.grad is None or (network.fake_latent.grad == 0).all()  # nobody lacks a class


def test_single_encoder_masks_carry_no_position_in_its_first_half():
    network, x, visible = make(use_mae=False), tokens(), torch.tensor([[0, 1, 2]] * B)
    z = run(network, x, visible)
    with torch.no_grad():
        network.encoder_pos_embed_learned[:, S + 3 :] *= -1
    assert torch.equal(run(network, x, visible), z)
    with torch.no_grad():
        network.decoder_pos_embed_learned[:, S + 3 :] *= -1
    assert not torch.allclose(run(network, x, visible), z)


def test_without_class_is_expressed_by_the_mask_token():
    """Guidance with mask: one vector, under both names; a fake token of its own otherwise."""
    tied, untied = make(), make(cfg_with_mask=False)
    assert tied.mask_token is tied.fake_latent
    assert len([name for name, _ in tied.named_parameters() if name in ("mask_token", "fake_latent")]) == 1
    assert untied.mask_token.shape == (1, 1, D)
    for network in (tied, untied):
        assert torch.equal(network.class_embedding(None, 3), network.fake_latent.expand(3, D))
    assert not torch.equal(untied.mask_token[0], untied.fake_latent)


def test_dropped_classes_are_no_class():
    network, label, drop = make(), torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False])
    embedded = network.class_embedding(label, 4, drop)
    assert torch.equal(embedded[drop], network.fake_latent.expand(2, D))
    assert torch.equal(embedded[~drop], network.class_emb.weight[[1, 3]])


@MAE
@pytest.mark.parametrize("cfg_with_mask", [True, False])
def test_every_weight_learns(use_mae, cfg_with_mask):
    """No parameter is left out of the graph, so that processes can reduce gradients without a search for unused ones."""
    network = make(use_mae=use_mae, cfg_with_mask=cfg_with_mask).train()
    x, visible, drop = tokens(), orders()[:, :3], torch.tensor([True, False, False, False])
    mask = torch.ones(B, N, dtype=torch.bool).scatter_(1, visible, False)
    z = network(x, network.class_embedding(torch.arange(B), B, drop), visible, mask)
    step, noise = torch.full((B * N, 1), 5), torch.ones(B * N, 1, C, dtype=torch.float64)
    network.diffloss.loss(x.flatten(0, 1), z.flatten(0, 1), step, noise)["loss"].sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@MAE
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(use_mae, dropout):
    gradients = []
    for checkpointing in (False, True):
        network = make(use_mae=use_mae, grad_checkpointing=checkpointing, attn_dropout=dropout, proj_dropout=dropout).train()
        torch.manual_seed(1)
        run(network, tokens(), orders()[:, :3]).sin().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("which", ["attn_dropout", "proj_dropout"])
def test_dropout_in_training_only(which):
    network, x, visible = make(**{which: 0.5}), tokens(), orders()[:, :3]
    assert torch.equal(run(network, x, visible), run(network, x, visible))
    network.train()
    assert not torch.equal(run(network, x, visible), run(network, x, visible))


# Start


def test_start():
    """Tables, tokens and classes N(0, 0.02^2); linear layers xavier, bias 0; norms 1 and 0."""
    torch.manual_seed(0)
    network = MaskedTransformer(64, 4, 64, 1, 1, 4, 1, 32, buffer_size=8)
    for table in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"):
        assert getattr(network, table).std().item() == pytest.approx(0.02, rel=0.05)
    assert network.class_emb.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.fake_latent.std().item() == pytest.approx(0.02, rel=0.4)
    for name, module in network.named_modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all(), name
            if "diffloss" not in name:
                bound = math.sqrt(6 / (module.in_features + module.out_features))
                assert 0.9 * bound < module.weight.abs().max() <= bound, name


# Bad input


def test_wrong_input_is_refused():
    network = make()
    label = network.class_embedding(torch.arange(B), B)
    with pytest.raises(ValueError, match=rf"built for {N} tokens of {C} channels, but the data has \(6, 4\)"):
        network(torch.zeros(B, N, C + 1, dtype=torch.float64), label, orders())
    with pytest.raises(ValueError, match="needs visible_BV"):
        network(tokens(), label)
    with pytest.raises(ValueError, match="single encoder needs mask_BN"):
        make(use_mae=False)(tokens(), label, orders())
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=r"Classes must lie in 0 \.\.\. 4 \(num_classes\)"):
            network.class_embedding(torch.tensor([0, bad]), 2)


@pytest.mark.parametrize(
    "name", ["num_tokens", "width", "encoder_depth", "decoder_depth", "num_heads", "num_classes", "buffer_size"]
)
def test_sizes_below_1_are_refused(name):
    names = ("num_tokens", "token_channels", "width", "encoder_depth", "decoder_depth", "num_heads", "head_depth", "head_width")
    sizes = dict(zip(names, itertools.repeat(1))) | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        MaskedTransformer(**sizes)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=3 must divide width=16"):
        MaskedTransformer(4, 4, 16, 1, 1, 3, 1, 8)


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match="no size 'giant'; there are xsmall, small, base, large, huge"):
        architecture("giant", 256)
