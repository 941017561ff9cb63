"""Pretrained models are found by name, folder and hub repository; names that are nearly right are corrected."""

import json

import pytest
import torch
from tiny import MLP, Tiny

import zoo
from zoo.hub import list_models, resolve


def test_shipped_models_load_and_are_small():
    models = list_models()
    assert {"bfn-digits", "fd_digits_mlp", "fd_mnist_cnn", "fd_fashion_cnn"} <= {model.name for model in models}
    for model in models:
        module = zoo.load(model.name)
        assert not module.training
        assert model.description and model.num_bytes <= 3 * 2**20
        assert type(module).__name__ == model.class_path.rpartition(".")[2]
    assert sum(model.num_bytes for model in models) <= 32 * 2**20


def test_a_folder_loads_with_overrides(tmp_path):
    Tiny(MLP(3)).save_pretrained(tmp_path / "m")
    assert zoo.load(tmp_path / "m", noise=0.9).noise == 0.9


def test_half_precision_halves_the_file_and_loads_as_before(tmp_path):
    module = Tiny(MLP(64))
    sizes = [
        module.save_pretrained(tmp_path / name, half=half) / "model.safetensors" for name, half in (("a", False), ("b", True))
    ]
    again = zoo.load(tmp_path / "b")
    assert sizes[1].stat().st_size < 0.6 * sizes[0].stat().st_size
    for before, after in zip(module.parameters(), again.parameters(), strict=True):
        assert after.dtype == torch.float32
        assert torch.equal(after, before.half().float())


def test_a_hub_repository_is_fetched_as_data_only(tmp_path, monkeypatch):
    module = Tiny(MLP(3))
    module.save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert torch.equal(zoo.load("someone/model").net.layers[0].weight, module.net.layers[0].weight)
    assert asked == {"someone/model": ["*.json", "*.safetensors", "*.md"]}  # no pickles, no code


def test_without_connection_the_error_says_what_to_do(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched from the hub \(ConnectionError\)"):
        zoo.load("someone/model")


def test_a_name_that_is_nearly_right():
    with pytest.raises(FileNotFoundError, match="Did you mean bfn-digits"):
        resolve("bfn-digit")


@pytest.mark.parametrize("damage", ["no weights", "no json", "no class"])
def test_damaged_folders(tmp_path, damage):
    Tiny(MLP(3)).save_pretrained(tmp_path)
    if damage == "no weights":
        (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    elif damage == "no json":
        (tmp_path / "config.json").write_text("{")
    else:
        (tmp_path / "config.json").write_text(json.dumps({"noise": 1.0}))
    with pytest.raises(ValueError, match=r"is damaged|names no class"):
        zoo.load(tmp_path)


def test_the_package_is_light_to_import():
    assert zoo.__version__
    with pytest.raises(AttributeError):
        _ = zoo.nothing_of_this_name
