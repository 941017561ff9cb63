"""Released weights of eMIGM and MAR to ours and back: names, tied tokens, unsafe files, sizes read off the shapes."""

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from sweep import sweep_tuples
from torch import Tensor

from zoo.__main__ import main
from zoo.base.hyperparameters import build
from zoo.emigm import (
    EMIGM,
    KLVAE,
    Guidance,
    MaskedTransformer,
    MaskSampler,
    infer_config,
    load_official,
    read_official_weights,
    to_official,
)
from zoo.emigm.sizes import SizeName, architecture
from zoo.module import ZooModule

PUBLISHED = [*((size, 256, 16) for size in get_args(SizeName)), *((size, 512, 32) for size in get_args(SizeName)[:4])]
TINY: dict[str, Any] = {"width": 48, "encoder_depth": 2, "decoder_depth": 1, "num_heads": 4, "head_depth": 2, "head_width": 24}


def tiny(seed: int = 0, **arguments: Any) -> MaskedTransformer:
    """A network whose weights are all different, none of them an initial value."""
    torch.manual_seed(seed)
    sizes = {"num_tokens": 16, "token_channels": 4, "num_classes": 10, "buffer_size": 4}
    network = MaskedTransformer(**{**TINY, **sizes, **arguments})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


def training_file(path: Path, ema: dict[str, Tensor], raw: dict[str, Tensor], **more: Any) -> Path:
    """What the published code saves in training."""
    args = argparse.Namespace(model="emigm_xsmall", lr=4e-4, distributed=True, log_dir=None, betas=(0.9, 0.95))
    content = {"model": raw, "model_ema": ema, "optimizer": {"state": {}}, "epoch": 3, "scaler": {"scale": 1.0}, "args": args}
    torch.save(content | more, path)
    return path


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def meta_network(size: SizeName, image_size: int, channels: int, **arguments: Any) -> MaskedTransformer:
    with torch.device("meta"):
        return MaskedTransformer(256, channels, **vars(architecture(size, image_size)), **arguments)


# Names and sizes


def test_names_and_shapes_are_the_published_ones():
    weights = meta_network("xsmall", 256, 16).state_dict()
    blocks, head_depth = 20, 3
    assert len(weights) == 16 + 12 * blocks + 8 * head_depth + 12 == 292
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {
        "fake_latent": (1, 448),
        "mask_token": (1, 448),
        "encoder_pos_embed_learned": (1, 320, 448),
        "decoder_pos_embed_learned": (1, 320, 448),
        "diffusion_pos_embed_learned": (1, 256, 448),
        "class_emb.weight": (1000, 448),
        "z_proj.weight": (448, 16),
        "z_proj_ln.bias": (448,),
        "encoder_blocks.9.attn.qkv.weight": (1344, 448),
        "decoder_blocks.9.mlp.fc1.weight": (1792, 448),
        "decoder_embed.weight": (448, 448),
        "diffloss.net.time_embed.mlp.0.weight": (1024, 256),
        "diffloss.net.cond_embed.weight": (1024, 448),
        "diffloss.net.input_proj.weight": (1024, 16),
        "diffloss.net.res_blocks.2.adaLN_modulation.1.weight": (3072, 1024),
        "diffloss.net.final_layer.linear.weight": (32, 1024),
        "diffloss.net.final_layer.adaLN_modulation.1.weight": (2048, 1024),
    }
    assert expected.items() <= shapes.items()


@pytest.mark.parametrize(("size", "image_size", "channels"), PUBLISHED)
def test_sizes_are_read_off_the_shapes(size, image_size, channels):
    found = infer_config(meta_network(size, image_size, channels).state_dict())
    assert found.architecture == architecture(size, image_size)
    assert (found.num_tokens, found.token_channels, found.buffer_size, found.num_classes) == (256, channels, 64, 1000)
    assert found.cfg_with_mask


def test_what_shapes_do_not_say_can_be_given():
    weights = tiny(cfg_with_mask=False).state_dict()
    with pytest.warns(UserWarning, match="num_heads=16 is taken for width=48"):
        assert infer_config(weights).architecture.num_heads == 16
    found = infer_config(weights, num_heads=4)
    assert vars(found.architecture) == TINY
    assert (found.num_tokens, found.buffer_size, found.num_classes, found.cfg_with_mask) == (16, 4, 10, False)
    with pytest.raises(ValueError, match="num_heads=5 must divide the weights' width=48"):
        infer_config(weights, num_heads=5)
    for name in ("z_proj.weight", "class_emb.weight"):
        with pytest.raises(ValueError, match=f"hold no {name}"):
            infer_config({key: tensor for key, tensor in weights.items() if key != name}, num_heads=4)


# Tied tokens


def test_where_tied_tokens_differ_the_mask_token_is_taken_as_the_published_code_does(tmp_path):
    raw, ema = to_official(tiny(0)), to_official(tiny(1))
    ema["mask_token"] = raw["mask_token"]  # as the published average is stored
    path = training_file(tmp_path / "a.pth", ema, raw)
    network = tiny(2)
    with pytest.warns(UserWarning, match="tied_token_source='fake_latent' takes the other"):
        load_official(network, path)
    assert torch.equal(network.fake_latent, raw["mask_token"]) and network.mask_token is network.fake_latent
    # That is what torch itself does with the file: of two names of a parameter the later one wins.
    reference = tiny(3)
    reference.load_state_dict(ema)
    assert equal(reference.state_dict(), network.state_dict())
    with pytest.warns(UserWarning, match="fake_latent is taken"):
        load_official(network, path, tied_token_source="fake_latent")
    assert torch.equal(network.fake_latent, ema["fake_latent"])
    with pytest.raises(ValueError, match="tied_token_source='both' must be one of mask_token, fake_latent"):
        load_official(network, path, tied_token_source="both")


def test_tokens_that_agree_are_loaded_without_a_word(tmp_path):
    torch.save(to_official(tiny()), tmp_path / "a.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_official(tiny(1), tmp_path / "a.pth")


# Forms of files


def test_a_training_file_holds_average_and_last_step(tmp_path):
    raw, ema = to_official(tiny(0)), to_official(tiny(1))
    path = training_file(tmp_path / "a.pth", ema, raw)
    assert equal(read_official_weights(path), ema)
    assert equal(read_official_weights(path, which="raw"), raw)
    with pytest.raises(ValueError, match="which='last' must be one of ema, raw"):
        read_official_weights(path, which="last")


def test_reading_admits_the_namespace_for_this_reading_only(tmp_path):
    path = training_file(tmp_path / "a.pth", to_official(tiny()), to_official(tiny()))
    read_official_weights(path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("form", ["model_ema", "model", "bare", "safetensors", "tied safetensors"])
def test_forms_of_a_file(form, tmp_path):
    network, path = tiny(), tmp_path / ("a.safetensors" if "safetensors" in form else "a.pth")
    weights = to_official(network)
    match form:
        case "safetensors":
            save_file(weights, path)
        case "tied safetensors":
            save_model(network, str(path))  # stores one of the tied names
        case _:
            torch.save(weights if form == "bare" else {form: weights}, path)
    if form == "model":
        with pytest.warns(UserWarning, match="no averaged weights"):
            read_official_weights(path)
        again = tiny(1)
        load_official(again, path, which="raw")
    else:
        again = tiny(1)
        load_official(again, path)
    assert equal(to_official(again), weights)
    if form == "model_ema":
        with pytest.raises(ValueError, match="averaged weights only"):
            read_official_weights(path, which="raw")


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("hidden", ["entry", "namespace"])
def test_a_file_that_would_run_code_is_refused_in_words(hidden, tmp_path, capsys):
    planted = Planted(tmp_path / "ran")
    more = {"args": argparse.Namespace(hook=planted)} if hidden == "namespace" else {"hook": planted}
    path = training_file(tmp_path / "a.pth", to_official(tiny()), to_official(tiny()), **more)
    for read in (read_official_weights, EMIGM.from_official):
        with pytest.raises(ValueError, match=r"holds posix\.system, which is not a tensor .* so it was refused"):
            read(path)
    for config in ([], ["--config", "emigm/digits"]):
        assert main(["convert", str(path), str(tmp_path / "out"), *config]) == 2
        assert "refused" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_files_without_weights_are_refused(tmp_path):
    for content in ({"model": {"encoder.conv_in.weight": torch.zeros(1)}}, {}, [1], {"a": torch.zeros(1)}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="holds no weights of eMIGM or MAR"):
            read_official_weights(tmp_path / "a.pth")
    torch.save({"model_ema": {**to_official(tiny()), "step": 3}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="not named tensors: step"):
        read_official_weights(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="There is no"):
        read_official_weights(tmp_path / "none.pth")


# Strictness


def test_all_that_differs_is_said_at_once_and_nothing_is_loaded(tmp_path):
    weights = to_official(tiny())
    del weights["encoder_norm.weight"]
    weights["diffloss.extra"] = torch.zeros(2)
    weights["z_proj.bias"] = torch.zeros(7)
    torch.save(weights, tmp_path / "a.pth")
    network = tiny(1)
    before = to_official(network)
    with pytest.raises(ValueError) as error:
        load_official(network, tmp_path / "a.pth")
    for part in (r"z_proj.bias (7,) instead of (48,)", "missing: encoder_norm.weight", "unknown: diffloss.extra"):
        assert part in str(error.value)
    assert equal(to_official(network), before)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"num_tokens": 64}, r"num_tokens=64 \(the network: 16\)\. The position tables and tokens are those of another resol"),
        ({"token_channels": 8}, r"token_channels=8 \(the network: 4\)\. The position tables .* 256 of 32 channels DC-AE at 512"),
        ({"cfg_with_mask": False}, r"MAR's weights need cfg_with_mask=false"),
        ({"width": 24, "num_classes": 5}, r"width=24 \(the network: 48\), num_classes=5 \(the network: 10\)\.$"),
    ],
)
def test_a_misfit_says_what_the_weights_are(other, said, tmp_path):
    torch.save(to_official(tiny(**other)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=said):
        load_official(tiny(), tmp_path / "a.pth")


def test_weights_of_a_diverged_training_are_refused(tmp_path):
    weights = to_official(tiny())
    weights["z_proj.bias"][3] = torch.nan
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"infinite or not a number \(z_proj.bias\)"):
        load_official(tiny(), tmp_path / "a.pth")


# Round trips


@pytest.mark.parametrize("tied", [True, False])
def test_round_trips_are_exact_both_ways(tied, tmp_path):
    network = tiny(cfg_with_mask=tied)
    weights = to_official(network)
    assert torch.equal(weights["mask_token"].flatten(), weights["fake_latent"].flatten()) == tied
    assert weights["mask_token"].shape == ((1, 48) if tied else (1, 1, 48))
    torch.save({"model_ema": weights}, tmp_path / "a.pth")
    again = tiny(1, cfg_with_mask=tied)
    load_official(again, tmp_path / "a.pth")
    assert equal(again.state_dict(), network.state_dict())
    assert equal(to_official(again), weights)


# Whole modules


def published_like(tmp_path: Path, tied: bool = True, channels: int = 16) -> tuple[Path, dict[str, Tensor]]:
    """A file of few, narrow blocks for 16 tokens, whose codec and heads can be told."""
    network = tiny(cfg_with_mask=tied, token_channels=channels, num_heads=16)
    weights = to_official(network)
    return training_file(tmp_path / "a.pth", weights, to_official(tiny(1, cfg_with_mask=tied, token_channels=channels))), weights


@pytest.mark.parametrize(("channels", "codec", "image_size"), [(16, "KLVAE", 64), (32, "DCAE", 128)])
def test_a_module_is_built_from_the_file_alone(channels, codec, image_size, tmp_path):
    path, weights = published_like(tmp_path, channels=channels)
    with pytest.warns(UserWarning, match="num_heads=16 is taken"):
        module = EMIGM.from_official(path)
    assert type(module) is EMIGM and type(module.codec).__name__ == codec
    assert module.codec.image_shape == (3, image_size, image_size)
    assert module.num_classes == 10 and module.network.buffer_size == 4
    assert equal(to_official(module.network), weights)
    module.load_official(path, which="raw")
    assert not equal(to_official(module.network), weights)


def test_arguments_can_be_replaced(tmp_path):
    path, _ = published_like(tmp_path)
    with pytest.warns(UserWarning, match="num_heads=16 is taken"):
        module = EMIGM.from_official(path, architecture=TINY, sampler={"num_iter": 3}, codec=KLVAE(image_size=64, scale=0.5))
    assert module.network.encoder_blocks[0].attn.num_heads == 4
    assert (module.sampler.num_iter, module.codec.scale) == (3, 0.5)


def test_weights_of_mar_load_as_they_are(tmp_path):
    path, weights = published_like(tmp_path, tied=False)
    with pytest.warns(UserWarning, match="num_heads=16 is taken"):
        module = EMIGM.from_official(path)
    assert not module.network.cfg_with_mask and module.masking.law == "mar_truncnorm"
    assert equal(to_official(module.network), weights)
    assert module.to_official()["mask_token"].shape == (1, 1, 48)


def inferred(network: MaskedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be told from a file of a network's weights, which need no memory here."""
    content = {"model_ema": network.state_dict()}
    monkeypatch.setattr("zoo.emigm.state_dict_adapter.read_plain", lambda path, map_location: content)
    (tmp_path / "a.pth").touch()
    found = EMIGM.infer_official_config(tmp_path / "a.pth")
    assert found is not None and found["class_path"] == "zoo.emigm.EMIGM"
    return found


@pytest.mark.parametrize(("size", "image_size", "channels"), sweep_tuples(PUBLISHED, quick=(0, 4, 8)))
def test_published_files_give_their_published_size_codec_and_sampler(size, image_size, channels, tmp_path, monkeypatch):
    found = inferred(meta_network(size, image_size, channels), tmp_path, monkeypatch)
    with torch.device("meta"):
        module = build(EMIGM, found)
    assert module.init_config["init_args"]["size"] == size
    assert type(module.codec).__name__ == {256: "KLVAE", 512: "DCAE"}[image_size]
    assert module.codec.image_shape == (3, image_size, image_size)
    assert module.network.state_dict().keys() == meta_network(size, image_size, channels).state_dict().keys()
    window = (0.15, 0.35) if image_size == 512 else (0.2, 0.4) if size == "huge" else (0.1, 0.3)
    assert (module.sampler.guidance.t_min, module.sampler.guidance.t_max) == window
    assert (module.sampler.num_iter, module.sampler.head_steps, module.nfe) == (16, 8, 19)


@pytest.mark.parametrize(("size", "scale"), [("base", 2.9), ("large", 3.0), ("huge", 3.2)])
def test_files_of_mar_give_its_sampler(size, scale, tmp_path, monkeypatch):
    arguments = inferred(meta_network(size, 256, 16, cfg_with_mask=False), tmp_path, monkeypatch)["init_args"]
    assert (arguments["size"], arguments["cfg_with_mask"]) == (size, False)
    sampler = MaskSampler(**{**arguments["sampler"], "guidance": Guidance(**arguments["sampler"]["guidance"])})
    assert (sampler.count_law, sampler.head, sampler.head_steps, sampler.nfe) == ("mar", "ddpm", 100, 512)
    assert sampler.guidance.scale_at(1.0) == scale and sampler.guidance.scale_at(0.0) == 1


def test_tokens_of_no_known_codec_need_a_configuration(tmp_path):
    torch.save(to_official(tiny()), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="num_heads=16"), pytest.raises(ValueError, match="16 tokens of 4 channels"):
        EMIGM.from_official(tmp_path / "a.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    assert EMIGM.infer_official_config(tmp_path / "other.pth") is None
    with pytest.raises(ValueError, match="from which no EMIGM can be told: give config"):
        EMIGM.from_official(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        EMIGM.from_official(tmp_path / "none.pth")


@pytest.mark.filterwarnings("ignore:The number of attention heads")
@pytest.mark.parametrize("suffix", ["pth", pytest.param("safetensors", marks=pytest.mark.slow)])
def test_convert_needs_no_configuration_and_gives_back_what_it_was_given(suffix, tmp_path, capsys):
    path, weights = published_like(tmp_path)
    if suffix == "safetensors":
        path = tmp_path / "a.safetensors"
        save_file(weights, path)
    folder, back = tmp_path / "folder", tmp_path / f"back.{suffix}"
    assert main(["convert", str(path), str(folder)]) == 0
    assert "wrote EMIGM to" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["_class_path"] == "zoo.emigm.EMIGM"
    module = ZooModule.from_pretrained(folder)
    assert type(module) is EMIGM and equal(to_official(module.network), weights)
    assert main(["convert", str(folder), str(back), "--official"]) == 0
    if suffix == "safetensors":
        assert equal(load_file(back), weights)
        return
    content = torch.load(back, weights_only=True)
    assert content.keys() == {"model", "model_ema"}  # where the published code looks
    assert all(equal(found, weights) for found in content.values())
    assert back.stat().st_size < 1.5 * sum(tensor.nbytes for tensor in weights.values())  # but stored once


def test_a_training_file_and_a_configuration_make_a_folder(tmp_path):
    sizes = "{width: 48, encoder_depth: 2, decoder_depth: 1, num_heads: 4, head_depth: 2, head_width: 24}"
    codec = "{class_path: PixelCodec, init_args: {image_shape: [1, 8, 8]}}"
    arguments = f"{{codec: {codec}, architecture: {sizes}, num_classes: 10, patch_size: 2, buffer_size: 4}}"
    (tmp_path / "own.yaml").write_text(f"model: {{class_path: EMIGM, init_args: {arguments}}}\n")
    weights = to_official(tiny())
    path = training_file(tmp_path / "a.pth", weights, to_official(tiny(1)))
    assert main(["convert", str(path), str(tmp_path / "out"), "--config", str(tmp_path / "own.yaml")]) == 0
    assert equal(ZooModule.from_pretrained(tmp_path / "out").to_official(), weights)
