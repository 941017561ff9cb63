"""Officially released weights to ours and back: strict, both ways, and through `zoo convert`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import MLP, Tiny
from torch import Tensor

from zoo.__main__ import main
from zoo.base.hyperparameters import build
from zoo.bfn import (
    BFN,
    BFNTransformer,
    ImprovedUNet,
    Network,
    ResidualMLP,
    UNetVDM,
    from_official,
    load_official,
    read_official_weights,
    to_official,
)
from zoo.bfn.state_dict_adapter import published_files
from zoo.module import ZooModule

UNET = {"image_shape": [1, 8, 8], "width": 32, "multipliers": [1, 2], "num_res_blocks": 1, "num_heads": 2}
SMALL: dict[str, Callable[[], Network]] = {
    "UNetVDM": lambda: UNetVDM(image_shape=(3, 4, 4), width=8, depth=2, norm_groups=4),
    "ImprovedUNet": lambda: ImprovedUNet(**UNET),
    "BFNTransformer": lambda: BFNTransformer(5, 5, seq_len=6, width=8, depth=2, num_heads=2),
}


def official(network: Network) -> dict[str, Tensor]:
    """What the published code would store."""
    return {"net." + name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip_through_a_file_keeps_every_number(name, suffix, tmp_path):
    first, second = SMALL[name](), SMALL[name]()
    (save_file if suffix == ".safetensors" else torch.save)(to_official(first), tmp_path / f"weights{suffix}")
    load_official(second, tmp_path / f"weights{suffix}")
    stored = official(first)
    assert stored.keys() == to_official(second).keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in to_official(second).items())


@pytest.mark.parametrize("form", ["official", "raw", "ours", "checkpoint"])
def test_forms_of_a_state_dict(form, tmp_path):
    network = SMALL["ImprovedUNet"]()
    raw = network.state_dict()
    stored: dict[str, Any] = official(network)
    if form != "official":
        stored = {("network." if form != "raw" else "") + name: tensor for name, tensor in raw.items()}
    if form == "checkpoint":
        stored = {"state_dict": stored, "epoch": 3, "hyper_parameters": {"a": 1}}
    torch.save(stored, tmp_path / "weights.pt")
    weights = read_official_weights(tmp_path / "weights.pt")
    assert weights.keys() == raw.keys()
    assert all(torch.equal(weights[name], raw[name]) for name in raw)


def test_all_that_differs_is_said_at_once(tmp_path):
    network = SMALL["UNetVDM"]()
    stored = official(network)
    for name in [name for name in stored if ".net2." in name]:
        del stored[name]
    stored["net.extra"] = torch.zeros(2)
    stored["flow.rate"] = torch.zeros(2)
    stored["net.conv_in.bias"] = torch.zeros(7)
    torch.save(stored, tmp_path / "weights.pt")
    with pytest.raises(ValueError) as caught:
        load_official(network, tmp_path / "weights.pt")
    message = str(caught.value)
    assert "weights.pt do not fit UNetVDM" in message
    assert "of another shape: conv_in.bias (7,) instead of (8,)" in message
    assert "unknown: extra, flow.rate" in message
    # four tensors in each of 2 + 2 + 3 blocks
    assert "missing: down_blocks.0.resnet_block.net2.0.weight" in message and "and 23 more" in message
    assert "those of no published network" in message


@pytest.mark.parametrize(
    ("build", "files"),
    [
        (UNetVDM, "cifar10_256c_ema.pt or cifar10_16c_ema.pt"),
        (lambda: UNetVDM(num_outputs=2), "cifar10_256d_ema.pt or cifar10_16d_ema.pt"),
        (BFNTransformer, "text8_ema.pt"),
        (ImprovedUNet, "mnist_ema.pt"),
        (lambda: ImprovedUNet(num_outputs=2), None),
    ],
)
def test_published_files_are_recognised(build, files):
    with torch.device("meta"):
        weights = build().state_dict()
    assert published_files(weights) == files


def test_published_weights_in_the_wrong_network_say_where_they_belong(tmp_path):
    with torch.device("meta"):
        shapes = {"net." + name: tensor.shape for name, tensor in UNetVDM(num_outputs=2).state_dict().items()}
    zero = torch.zeros(1)
    torch.save({name: zero.expand(shape) for name, shape in shapes.items()}, tmp_path / "cifar10_256d_ema.pt")
    with torch.device("meta"):
        network = UNetVDM()
    with pytest.raises(ValueError, match=r"output_projection.weight \(6, 131\) instead of \(3, 131\).*UNetVDM\(num_outputs=2\)"):
        load_official(network, tmp_path / "cifar10_256d_ema.pt")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_files_that_hold_code_or_no_weights_are_refused(tmp_path):
    torch.save({"net.a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt holds .*system, .*could run code when loaded, so it was refused"):
        read_official_weights(tmp_path / "evil.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"cut\x00")
    with pytest.raises(ValueError, match="is damaged"):
        read_official_weights(tmp_path / "cut.safetensors")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_official_weights(tmp_path / "list.pt")
    torch.save({"net.a": torch.zeros(2), "step": 3}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"not named tensors \(step\)"):
        read_official_weights(tmp_path / "state.pt")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match=r"not named tensors \(0\)"):
        read_official_weights(tmp_path / "numbers.pt")
    with pytest.raises(FileNotFoundError, match=r"is a folder without ema_model\.pt"):
        read_official_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.pt"):
        read_official_weights(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"both with and without the prefix net\.: a"):
        from_official({"net.a": torch.zeros(2), "a": torch.zeros(2)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3])
def test_weights_that_are_no_finite_numbers_are_refused_by_name(value, tmp_path):
    stored = official(SMALL["UNetVDM"]())
    stored["net.conv_in.bias"] = torch.full((8,), value)
    torch.save(stored, tmp_path / "weights.pt")
    network = SMALL["UNetVDM"]()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"not a number \(conv_in\.bias\)"):
        load_official(network, tmp_path / "weights.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("network", "difference"),
    [
        (lambda: ImprovedUNet(**UNET | {"norm_groups": 16}), "ImprovedUNet with norm_groups=16"),
        (lambda: ImprovedUNet(**UNET | {"image_shape": [1, 8, 4]}), "ImprovedUNet for images of 8 x 4"),
        (lambda: UNetVDM((3, 4, 6), width=8, depth=1, norm_groups=4), "UNetVDM for images of 4 x 6"),
        (lambda: UNetVDM((3, 4, 4), width=8, depth=1, norm_groups=4, fourier_exponents=(3, 4)), r"fourier_exponents=\(3, 4\)"),
    ],
)
def test_what_the_published_code_would_build_otherwise_has_no_official_format(network, difference):
    """The names and shapes agree, so that it would load these weights, and compute something else."""
    with pytest.raises(ValueError, match=f"The published code has no .*{difference}"):
        to_official(network())


def test_a_network_without_fourier_features_has_an_official_format():
    assert to_official(UNetVDM((3, 4, 4), width=8, depth=1, norm_groups=4, fourier_exponents=()))


def test_networks_that_the_published_code_lacks_have_no_official_format():
    with pytest.raises(ValueError, match="no ResidualMLP"):
        to_official(ResidualMLP(width=8))
    with pytest.raises(ValueError, match="no ImprovedUNet with patches"):
        to_official(ImprovedUNet(**UNET, patch_size=2))


@pytest.mark.parametrize("name", SMALL)
def test_networks_are_rebuilt_from_plain_data(name):
    network = SMALL[name]()
    again = build(Network, json.loads(json.dumps(network.init_config)))
    assert type(again) is type(network)
    again.load_state_dict(network.state_dict())


# The module's hooks and the command line


def our_config(tmp_path: Path, cls: type = BFN) -> Path:
    model = {"network": {"class_path": "ImprovedUNet", "init_args": UNET}, "solver": {"class_path": "ODE1"}}
    path = tmp_path / "unet.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": model}}))
    return path


def published_config(tmp_path: Path) -> Path:
    """A small one in the layout of the solvers' code."""
    backbone = {"image_size": 8, "in_channels": 2, "model_channels": 32, "out_channels": 32, "num_res_blocks": 1, "num_heads": 2}
    backbone |= {"channel_mult": [1, 2], "project_input": True, "dropout": 0.5}
    net = {
        "name": "UNetModel",
        "backbone": backbone,
        "input_adapter": {
            "name": "FourierImageInputAdapter",
            "input_channels": 1,
            "input_shape": [8, 8],
            "output_height": 2,
            "add_pos_feats": False,
        },
        "output_adapter": {"name": "OutputAdapter", "input_height": 64, "output_channels": 1, "output_height": 1},
    }
    config = {"data": {"dataset": "mnist"}, "net": net, "bayesian_flow": {"min_variance": "1e-6"}}
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_official_weights_become_a_folder_and_official_weights_again(tmp_path, capsys):
    network = SMALL["ImprovedUNet"]()
    torch.save(official(network), tmp_path / "mnist_ema.pt")
    config = str(our_config(tmp_path))
    folder, back = str(tmp_path / "folder"), str(tmp_path / "back" / "weights.pt")
    assert main(["convert", str(tmp_path / "mnist_ema.pt"), folder, "--config", config, "--description", "small"]) == 0
    module = ZooModule.from_pretrained(folder)
    assert type(module) is BFN
    assert all(torch.equal(tensor, module.network.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert main(["convert", folder, back, "--official"]) == 0
    assert "wrote" in capsys.readouterr().out
    weights = torch.load(back, weights_only=True)
    assert weights.keys() == official(network).keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in official(network).items())
    assert main(["convert", folder, back.replace(".pt", ".safetensors"), "--official"]) == 0
    assert load_file(back.replace(".pt", ".safetensors")).keys() == weights.keys()
    assert main(["convert", folder, folder, "--official"]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_configuration_of_the_published_code_serves_as_well(tmp_path):
    network = ImprovedUNet(image_shape=(1, 8, 8), width=32, multipliers=(1, 2), num_res_blocks=1, num_heads=2)
    torch.save(official(network), tmp_path / "weights.pt")
    module = BFN.from_official(tmp_path / "weights.pt", published_config(tmp_path))
    assert type(module) is BFN
    assert module.flow.min_variance == 1e-6
    assert module.head.num_bins == 256
    assert module.network.init_config["init_args"]["dropout"] == 0.5
    assert all(torch.equal(tensor, module.network.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_a_training_folder_is_read_and_what_is_left_out_is_said(tmp_path, capsys):
    network = ImprovedUNet(image_shape=(1, 8, 8), width=32, multipliers=(1, 2), num_res_blocks=1, num_heads=2)
    (tmp_path / "training").mkdir()
    torch.save(official(network), tmp_path / "training" / "ema_model.pt")
    config = published_config(tmp_path)
    parsed = yaml.safe_load(config.read_text())
    parsed["data"] |= {"val_frac": 0.02, "data_dir": "./data"}
    parsed["sampling"] = {"algorithm": "ode_bfnsolver1", "n_steps": 5, "seed": 7, "save_path": "samples"}
    config.write_text(yaml.safe_dump(parsed))
    folder = tmp_path / "folder"
    assert main(["convert", str(tmp_path / "training"), str(folder), "--config", str(config)]) == 0
    module = ZooModule.from_pretrained(folder)
    assert all(torch.equal(tensor, module.network.state_dict()[name]) for name, tensor in network.state_dict().items())
    out = capsys.readouterr().out
    assert f"not taken over from {config}:\n" in out
    assert "data: dataset=mnist, flip=False, val_fraction=0.02\n" in out and "sampling: seed=7\n" in out
    assert "data.data_dir (our own data sets know where they lie)" in out and "sampling.save_path (" in out
    assert main(["convert", str(tmp_path / "training"), str(tmp_path / "out")]) == 2
    assert "is a folder without config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_base_class_knows_every_method(tmp_path):
    """In a new process, where nothing but zoo is imported."""
    torch.save(official(ImprovedUNet(image_shape=(1, 8, 8), width=32, multipliers=(1, 2), num_res_blocks=1, num_heads=2)),
               tmp_path / "weights.pt")  # fmt: skip
    arguments = [str(tmp_path / "weights.pt"), str(published_config(tmp_path))]
    code = "import sys, zoo; assert 'torch' not in sys.modules; zoo.metrics.FeatureDistance"
    code += f"; print(type(zoo.ZooModule.from_official(*{arguments})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "BFN\n", done.stderr


def test_what_cannot_be_converted_is_one_sentence(tmp_path, capsys):
    weights = tmp_path / "weights.pt"
    torch.save(official(SMALL["ImprovedUNet"]()), weights)
    assert main(["convert", str(weights), str(tmp_path / "out")]) == 2
    assert "zoo convert FILE FOLDER --config NAME" in capsys.readouterr().err
    assert main(["convert", str(weights), str(tmp_path / "out"), "--config", "bfn/nothing"]) == 2
    assert "no configuration bfn/nothing" in capsys.readouterr().err
    (tmp_path / "other.yaml").write_text("layers: 3\n")
    assert main(["convert", str(weights), str(tmp_path / "out"), "--config", str(tmp_path / "other.yaml")]) == 2
    assert "neither a configuration of the zoo" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- 3\n")
    assert main(["convert", str(weights), str(tmp_path / "out"), "--config", str(tmp_path / "list.yaml")]) == 2
    assert "is not a configuration" in capsys.readouterr().err
    Tiny(net=MLP()).save_pretrained(tmp_path / "tiny")
    assert main(["convert", str(tmp_path / "tiny"), str(tmp_path / "out.pt"), "--official"]) == 2
    assert "Tiny has no official format" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Tiny has no officially released weights"):
        Tiny(net=MLP()).load_official(weights)
    assert not (tmp_path / "out").exists()
