"""ZooModule: checkpoints and folders rebuild the module, whoever built it, and refuse what does not fit."""

import functools
import json
import os
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from tiny import MLP, Net, Renamed, Tiny, TinyData, Wider

from zoo import ZooModule
from zoo.base.checkpoint import check_weights, read_checkpoint
from zoo.base.hyperparameters import build


def train(module: ZooModule, folder, **kwargs) -> Trainer:
    options = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(default_root_dir=folder, **{**options, "enable_checkpointing": False, **kwargs})
    trainer.fit(module, TinyData())
    return trainer


def built_by(way: str) -> Tiny:
    if way == "python":
        return Tiny(MLP(5), noise=0.3, optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    if way == "subclass":
        return Wider(gain=1.5, net=MLP(5))
    init_args = {"net": {"class_path": "tiny.MLP", "init_args": {"width": 5}}}
    return ZooModule._build({"_class_path": "tiny.Tiny", **init_args}, {})


@pytest.mark.parametrize("way", ["python", "subclass", "configuration"])
@pytest.mark.parametrize("through", ["own class", "base class"])
def test_load_from_checkpoint_needs_only_the_path(tmp_path, way, through):
    module = built_by(way)
    train(module, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    cls = type(module) if through == "own class" else ZooModule
    loaded = cls.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(loaded) is type(module)
    assert loaded.hparams_initial == module.hparams_initial
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    group = loaded.configure_optimizers().defaults
    assert group["lr"] == module.configure_optimizers().defaults["lr"]


@pytest.mark.parametrize("way", ["python", "subclass", "configuration"])
def test_pretrained_folder_round_trip(tmp_path, way):
    module = built_by(way)
    module.save_pretrained(tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert {name: config[name] for name in module.hparams_initial} == module.hparams_initial
    loaded = ZooModule.from_pretrained(tmp_path / "m")
    assert type(loaded) is type(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_checkpoint_hyperparameters_and_config_json_are_the_same(tmp_path):
    module = built_by("python")
    train(module, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("zoo_version")
    assert read_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"] == config


def test_overrides_replace_arguments_and_are_stored(tmp_path):
    built_by("python").save_pretrained(tmp_path)
    assert Tiny.from_pretrained(tmp_path, noise=0.7).hparams_initial["noise"] == 0.7
    swapped = Tiny.from_pretrained(tmp_path, net=MLP(5, dropout=0.0))
    assert swapped.hparams_initial["net"]["init_args"]["dropout"] == 0.0


def test_weights_of_another_shape_are_named(tmp_path):
    built_by("python").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another shape: .*net\.layers\.0\.weight \(5, 4\) instead of \(9, 4\)"):
        Tiny.from_pretrained(tmp_path, net=MLP(9))


def test_missing_and_unknown_weights_are_named():
    module = built_by("python")
    weights = dict(module.state_dict())
    weights["net.foreign"] = weights.pop("net.layers.0.bias")
    with pytest.raises(ValueError, match=r"missing: net\.layers\.0\.bias; unknown: net\.foreign"):
        module.load_state_dict(weights)


def test_a_checkpoint_of_another_class_is_refused(tmp_path):
    train(built_by("python"), tmp_path).save_checkpoint(tmp_path / "a.ckpt")

    class Other(ZooModule):
        pass

    with pytest.raises(ValueError, match="holds a Tiny, which is not a Other"):
        Other.load_from_checkpoint(tmp_path / "a.ckpt")


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_checkpoint_that_holds_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": {"x": Payload()}}, "evil.ckpt")
    with pytest.raises(ValueError, match="could run code when loaded, so it was refused"):
        ZooModule.load_from_checkpoint("evil.ckpt")
    (tmp_path / "plain_pickle.ckpt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"refused|damaged"):
        ZooModule.load_from_checkpoint("plain_pickle.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_cannot_name_a_foreign_class(tmp_path):
    stored = {"_class_path": "subprocess.Popen", "args": ["true"]}
    torch.save({"state_dict": {}, "hyper_parameters": stored, "pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="refusing to build"):
        ZooModule.load_from_checkpoint(tmp_path / "a.ckpt")


def test_a_folder_cannot_name_a_foreign_module_within(tmp_path):
    built_by("python").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["net"] = {"class_path": "antigravity.Net"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"antigravity\.Net is not known here"):
        ZooModule.from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules


def test_numbers_of_numpy_survive_a_checkpoint(tmp_path):
    module = Tiny(MLP(), noise=np.float64(0.25))
    train(module, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert Tiny.load_from_checkpoint(tmp_path / "a.ckpt").noise == 0.25


def test_missing_weights_are_named_on_the_meta_device_too():
    with torch.device("meta"):
        module = built_by("python")
    weights = dict(module.state_dict())
    check_weights(module, weights, "a file")
    del weights["net.layers.0.bias"]
    with pytest.raises(ValueError, match=r"missing: net\.layers\.0\.bias"):
        check_weights(module, weights, "a file")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_are_stored_once(device):
    with torch.device(device):
        module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    weights = dict(module.state_dict())
    del weights["1.weight"]
    check_weights(module, weights, "a file")


@pytest.mark.parametrize(
    "head", [b"version https://git-lfs.github.com/spec/v1\noid sha256:", b"<!DOCTYPE html>\n<html>", b"Not found"]
)
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_text_in_place_of_weights_is_called_text(tmp_path, head, name):
    (tmp_path / name).write_bytes(head)
    with pytest.raises(ValueError, match=r"is not a file of weights \(it begins with .*Git LFS pointer or a web page"):
        ZooModule.load_from_checkpoint(tmp_path / name)
    built_by("python").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(head)
    with pytest.raises(ValueError, match="is not a file of weights"):
        ZooModule.from_pretrained(tmp_path)


def test_bare_weights_are_no_checkpoint(tmp_path):
    torch.save({"state_dict": built_by("python").state_dict()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="it has no pytorch-lightning_version"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_damaged_and_missing_checkpoints(tmp_path):
    train(built_by("python"), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    data = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Tiny.load_from_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        Tiny.load_from_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="weights_only=True only"):
        Tiny.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=0)


def test_a_renamed_argument_is_read_with_a_warning(tmp_path):
    Renamed(MLP()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sigma"] = 0.25
    del config["noise"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="'sigma' of the checkpoint is called 'noise' now"):
        assert Renamed.from_pretrained(tmp_path).noise == 0.25


def test_each_checkpoint_names_the_version(tmp_path):
    import zoo

    train(built_by("python"), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["zoo_version"] == zoo.__version__


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = built_by("python")
        trainer = train(module, tmp_path, precision=precision)
    assert trainer.global_step == 2
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


def test_training_draws_depend_on_epoch_and_position_only():
    module = built_by("python")
    whole = module.train_random(6).normal("noise", (4,))
    assert torch.equal(whole[:2], module.train_random(2).normal("noise", (4,)))
    assert not torch.equal(whole, module.eval_random(6).normal("noise", (4,)))


def test_built_components_may_be_given_to_build():
    net = MLP(3)
    assert build(Tiny, {"class_path": "tiny.Tiny", "init_args": {"net": net}}).net is net


def test_push_to_hub_uploads_the_pretrained_folder(monkeypatch):
    seen = {}

    class Hub:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, **kwargs):
            seen["repo"] = (repo_id, kwargs)

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert built_by("python").push_to_hub("me/model", private=True, token="secret") == "address"
    assert seen["files"] == ["config.json", "model.safetensors"]
    assert seen["repo"] == ("me/model", {"private": True, "exist_ok": True})
    assert issubclass(MLP, Net)
