"""The command line as its users know it: precedence, run folders, discovery, composition, and errors in one sentence."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
import yaml
from lightning import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from PIL import Image
from tiny import MLP, Tiny

import zoo
from zoo.__main__ import main
from zoo.base.checkpoint import read_checkpoint
from zoo.cli.configs import find_config, packaged_configs
from zoo.cli.parser import ZooArgumentParser
from zoo.cli.runs import archive_run, last_checkpoint

CONFIG = {
    "model": {"class_path": "tiny.Tiny", "init_args": {"net": {"class_path": "tiny.MLP", "init_args": {"width": 6}}}},
    "data": {"class_path": "tiny.TinyData"},
    "trainer": {
        "max_steps": 4,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "callbacks": [{"class_path": "EMA", "init_args": {"decay": 0.9}}],
    },
    "checkpoint": {"every_n_steps": 2},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with tiny.yaml in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    Path("tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def stored(path: str = "runs/tiny/checkpoints/last.ckpt") -> dict:
    return read_checkpoint(path)["hyper_parameters"]


def effective(capsys, *argv: str) -> dict:
    """The configuration that a command would run with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--print_config"])
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)


class FractionsFirst(Trainer):
    """Lightning's Trainer as it is where typing has made the unions the other way round."""

    def __init__(
        self,
        limit_val_batches: float | int | None = None,
        limit_test_batches: float | int | None = None,
        val_check_interval: float | int | str | None = None,
    ) -> None:
        super().__init__()


def test_one_batch_is_not_all_of_them_in_whatever_order_lightning_is_imported():
    parser = ZooArgumentParser()
    parser.add_lightning_class_args(FractionsFirst, "trainer")
    for typed, value in {"1": 1, "1.0": 1.0, "0.5": 0.5}.items():
        for option in ("limit_val_batches", "limit_test_batches", "val_check_interval"):
            assert repr(parser.parse_args([f"--trainer.{option}={typed}"]).trainer[option]) == repr(value)


def test_a_run_lives_in_a_stable_folder(folder):
    assert main(["fit", "-c", "tiny.yaml"]) == 0
    assert {"checkpoints", "config.yaml", "metrics.csv"} <= {path.name for path in Path("runs/tiny").iterdir()}
    assert main(["validate", "-c", "tiny.yaml", "--ckpt_path", "last"]) == 0
    assert yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["ckpt_path"] is None  # still that of the training
    assert Path("runs/tiny/validate.yaml").exists()


def test_precedence_is_defaults_config_checkpoint_typed(folder, capsys):
    options = ["--model.net.width", "7", "--model.noise", "0.3"]
    assert main(["fit", "-c", "tiny.yaml", *options]) == 0

    def width_noise_compile(*argv):
        args = effective(capsys, *argv)["model"]["init_args"]
        return args["net"]["init_args"]["width"], args["noise"], args["compile"]

    assert width_noise_compile("fit", "-c", "tiny.yaml") == (6, 0.1, False)  # configuration, default, default
    assert width_noise_compile("test", "-c", "tiny.yaml", "--ckpt_path", "last") == (7, 0.3, False)  # checkpoint wins
    last = ["--ckpt_path", "last", "-c", "tiny.yaml"]
    assert width_noise_compile("test", "--model.noise", "0.5", *last) == (7, 0.5, False)  # typed wins, wherever it stands
    assert width_noise_compile("test", *last, "--model.compile=true") == (7, 0.3, True)


def test_model_and_data_come_from_the_checkpoint_alone(folder, capsys):
    assert main(["fit", "-c", "tiny.yaml", "--data.rows", "48"]) == 0
    path = "runs/tiny/checkpoints/last.ckpt"
    config = effective(capsys, "test", "--ckpt_path", path)
    assert (config["model"]["class_path"], config["data"]["init_args"]["rows"]) == ("tiny.Tiny", 48)
    assert main(["test", "--ckpt_path", path, "--trainer.accelerator", "cpu"]) == 0
    assert Path("runs/tiny/test.yaml").exists()  # in the folder of the checkpoint's run


def test_data_of_the_checkpoint_win_over_configurations_of_the_same_class(folder, capsys):
    assert main(["fit", "-c", "tiny.yaml", "--data.rows", "48", "--data.batch_size", "4"]) == 0

    def data(*argv):
        args = effective(capsys, *argv, "--ckpt_path", "runs/tiny/checkpoints/last.ckpt")["data"]["init_args"]
        return args["rows"], args["batch_size"]

    Path("same.yaml").write_text(yaml.safe_dump({"data": {"class_path": "tiny.TinyData", "init_args": {"rows": 32}}}))
    Path("more.py").write_text("from tiny import TinyData\n\n\nclass More(TinyData):\n    pass\n")
    Path("other.yaml").write_text(yaml.safe_dump({"data": {"class_path": "more.More", "init_args": {"rows": 40}}}))
    assert data("fit", "-c", "tiny.yaml") == (48, 4)
    assert data("fit", "-c", "tiny.yaml", "-c", "same.yaml") == (48, 4)
    assert data("fit", "-c", "tiny.yaml", "--data.rows", "56") == (56, 4)  # typed
    assert data("test", "-c", "tiny.yaml", "--data", "tiny.TinyData") == (64, 8)  # typed class
    assert data("test", "-c", "tiny.yaml", "-c", "other.yaml") == (40, 8)  # another class
    assert data("test", "-c", "other.yaml", "-c", "tiny.yaml") == (48, 4)  # the last one counts


def test_what_a_configuration_says_of_prediction_needs_no_training(folder, capsys):
    source = "from tiny import TinyData\n\n\nclass Asked(TinyData):\n    def __init__(self, predict_rows: int = 3, **kwargs):\n"
    Path("asked.py").write_text(f"{source}        super().__init__(**kwargs)\n")
    assert main(["fit", "-c", "tiny.yaml", "--data", "asked.Asked", "--data.rows", "48"]) == 0
    Path("ask.yaml").write_text(
        yaml.safe_dump({"data": {"class_path": "asked.Asked", "init_args": {"predict_rows": 9, "rows": 8}}})
    )
    path = "runs/tiny/checkpoints/last.ckpt"
    args = effective(capsys, "predict", "-c", "tiny.yaml", "-c", "ask.yaml", "--ckpt_path", path)["data"]["init_args"]
    assert (args["predict_rows"], args["rows"]) == (9, 48)


def test_random_weights_and_lost_predictions_are_announced(folder, capsys):
    for stage in ("validate", "test", "predict"):
        assert main([stage, "-c", "tiny.yaml"]) == 0
        err = capsys.readouterr().err
        assert f"No --ckpt_path: {stage} uses untrained, random weights" in err
        assert ("Nothing will be written" in err) == (stage == "predict")
    Path("writer.py").write_text(
        "from lightning.pytorch.callbacks import BasePredictionWriter\n\n\nclass Writer(BasePredictionWriter):\n"
        "    def __init__(self) -> None:\n        super().__init__('epoch')\n"
        "    def write_on_epoch_end(self, *args) -> None:\n        pass\n"
    )
    Tiny(MLP(3)).save_pretrained("shared")
    capsys.readouterr()
    assert main(["predict", "-c", "tiny.yaml", "--ckpt_path", "shared", "--trainer.callbacks+", "writer.Writer"]) == 0
    err = capsys.readouterr().err
    assert "No --ckpt_path" not in err and "Nothing will be written" not in err
    Path("released.py").write_text(
        "from tiny import Tiny\n\n\nclass Released(Tiny):\n    def __init__(self, checkpoint: str | None = None, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
    )
    released = ["predict", "-c", "tiny.yaml", "--model", "released.Released"]
    assert main([*released, "--model.checkpoint", "folder"]) == 0
    assert "No --ckpt_path" not in capsys.readouterr().err
    assert main(released) == 0
    assert "No --ckpt_path" in capsys.readouterr().err


def test_last_starts_anew_only_for_fit(folder, capsys):
    for stage in ("validate", "test", "predict"):
        assert main([stage, "-c", "tiny.yaml", "--ckpt_path", "last"]) == 2
        assert "runs/tiny holds no checkpoint yet, so there is nothing to" in capsys.readouterr().err
    assert main(["fit", "-c", "tiny.yaml", "--ckpt_path", "last"]) == 0
    assert "a new run starts" in capsys.readouterr().err
    assert main(["fit", "-c", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_steps", "6"]) == 0
    assert read_checkpoint("runs/tiny/checkpoints/last.ckpt")["global_step"] == 6
    assert not Path("runs/tiny/earlier").exists()


def test_a_new_run_never_overwrites_an_earlier_one(folder):
    main(["fit", "-c", "tiny.yaml", "--model.noise", "0.25"])
    main(["fit", "-c", "tiny.yaml"])
    main(["fit", "-c", "tiny.yaml"])
    assert stored("runs/tiny/earlier/0/checkpoints/last.ckpt")["noise"] == 0.25
    assert sorted(path.name for path in Path("runs/tiny/earlier").iterdir()) == ["0", "1"]
    assert stored()["noise"] == 0.1


def test_wrong_input_leaves_an_earlier_run_in_its_place(folder):
    main(["fit", "-c", "tiny.yaml"])
    assert main(["fit", "-c", "tiny.yaml", "--checkpoint.every_n_steps", "0"]) == 2
    assert not Path("runs/tiny/earlier").exists()


def test_an_earlier_run_is_put_back_if_the_next_one_trains_nothing(folder, capsys):
    def entries():
        return {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}

    main(["fit", "-c", "tiny.yaml"])
    before = entries()
    words = ["fit", "-c", "tiny.yaml", "--model", "late.Late", "--model.fails_at"]
    Path("late.py").write_text(
        "import tiny\n\n\nclass Late(tiny.Tiny):\n    def __init__(self, fails_at: int, **kwargs):\n"
        "        super().__init__(**kwargs)\n        self.fails_at = fails_at\n\n"
        "    def training_step(self, batch, batch_idx):\n        if batch_idx == self.fails_at:\n"
        "            raise ValueError('wrong data')\n        return super().training_step(batch, batch_idx)\n"
    )
    with pytest.raises(ValueError, match="wrong data"):
        main([*words, "0"])
    assert "Nothing was trained: the earlier run is back in runs/tiny." in capsys.readouterr().err
    assert entries() == before
    with pytest.raises(ValueError, match="wrong data"):
        main([*words, "1"])
    assert Path("runs/tiny/earlier/0/checkpoints/last.ckpt").exists()
    assert read_checkpoint("runs/tiny/checkpoints/last.ckpt")["global_step"] == 1


def test_a_log_alone_is_a_run_to_move_out_of_the_way(tmp_path):
    for run in ("a", "a/b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.csv").touch()
    assert archive_run(tmp_path / "a") == tmp_path / "a/earlier/0"
    assert (tmp_path / "a/earlier/0/metrics.csv").exists() and (tmp_path / "a/b/metrics.csv").exists()


def test_archiving_leaves_runs_of_other_configurations(tmp_path):
    for run in ("a", "a/b"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "checkpoints/last.ckpt").touch()
    assert archive_run(tmp_path / "a") == tmp_path / "a/earlier/0"
    assert last_checkpoint(tmp_path / "a/b") is not None
    assert last_checkpoint(tmp_path / "a") is None
    assert archive_run(tmp_path / "a") is None


def test_composed_configurations_keep_checkpointing_and_callbacks(folder, capsys):
    Path("add.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": "LearningRateMonitor"}]}}))
    Path("replace.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "LearningRateMonitor"}]}}))

    def callbacks(*files):
        config = effective(capsys, "fit", "-c", "tiny.yaml", *(word for file in files for word in ("-c", file)))
        assert config["checkpoint"]["every_n_steps"] == 2
        return [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]

    assert callbacks("add.yaml") == ["EMA", "LearningRateMonitor"]
    assert callbacks("replace.yaml") == ["LearningRateMonitor"]
    assert main(["fit", "-c", "tiny.yaml", "-c", "replace.yaml"]) == 0
    assert "replaces the callbacks of" in capsys.readouterr().err
    assert last_checkpoint(Path("runs/tiny")) is not None


def test_every_packaged_strategy_configuration_adds_instead_of_replacing():
    for name, path in packaged_configs().items():
        if name.startswith("strategies/"):
            assert "callbacks" not in (yaml.safe_load(path.read_text()).get("trainer") or {}), name


def test_packaged_configurations_are_found_by_name():
    assert find_config("bfn/digits") == packaged_configs()["bfn/digits"]
    assert find_config("configs/bfn/digits.yaml").samefile(packaged_configs()["bfn/digits"])
    with pytest.raises(FileNotFoundError, match="did you mean bfn/digits"):
        find_config("bfn/digit")


def test_a_pretrained_folder_is_a_checkpoint_path(folder, capsys, monkeypatch):
    taken = []
    monkeypatch.setattr(Tiny, "shared_entries", lambda self: {"_steps": 5})
    monkeypatch.setattr(Tiny, "take_shared_entries", lambda self, config: taken.append(config["_steps"]))
    Tiny(MLP(3), noise=0.6).save_pretrained("shared")
    config = effective(capsys, "predict", "-c", "tiny.yaml", "--ckpt_path", "shared")
    assert config["model"]["init_args"]["net"]["init_args"]["width"] == 3
    assert config["ckpt_path"] is None
    assert main(["test", "-c", "tiny.yaml", "--ckpt_path", "shared"]) == 0
    assert main(["fit", "-c", "tiny.yaml", "--ckpt_path", "shared", "--trainer.max_steps", "1"]) == 0
    assert stored()["noise"] == 0.6 and taken == [5, 5]


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--model", "Ling", "--data", "Text"], "ling_tiny"),
        (["-c", "ling/tiny", "--ckpt_path", "ling-tiny"], "ling_tiny"),
        (["-c", "ling/tiny", "--model.config", "ling_lite"], "ling_lite"),
    ],
)
def test_one_entry_of_a_named_architecture_changes_no_other(folder, capsys, argv, name):
    changes = {"max_position_embeddings": 1024, "num_hidden_layers": 2}
    typed = [f"--model.config.{entry}={value}" for entry, value in changes.items()]
    config = effective(capsys, "fit", *argv, *typed)["model"]["init_args"]["config"]
    assert config == {**dataclasses.asdict(zoo.ling.preset(name)), **changes}


def test_values_that_a_checkpoint_replaces_are_named(folder, capsys):
    Tiny(MLP(3), noise=0.6).save_pretrained("shared")
    Path("noise.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"noise": "2e-1", "compile": False}}}))
    command = ["test", "-c", "tiny.yaml", "-c", "noise.yaml", "--ckpt_path", "shared"]
    assert main(command) == 0
    said = "shared wins over the configuration: model.net.width is 3 instead of 6, model.noise is 0.6 instead of 2e-1"
    assert f"{said} (type --model.net.width 6 and so on to keep yours)." in capsys.readouterr().err
    assert main([*command, "--model.net.width=3", "--model.noise", "0.2"]) == 0
    assert "wins over" not in capsys.readouterr().err


def test_a_configuration_of_another_model_than_the_checkpoint_is_refused(folder, capsys):
    Path("kinds.py").write_text(
        "from tiny import Tiny\n\n\nclass Special(Tiny):\n    pass\n\n\nclass More(Tiny):\n"
        "    def __init__(self, more: int = 1, **kwargs):\n        super().__init__(**kwargs)\n"
    )
    for name in ("Special", "More"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"model": {"class_path": f"kinds.{name}"}}))
    special, more = ["-c", "tiny.yaml", "-c", "Special.yaml"], ["-c", "tiny.yaml", "-c", "More.yaml"]
    Tiny(MLP(6)).save_pretrained("shared")

    def model(*argv):
        return effective(capsys, *argv)["model"]["class_path"]

    assert model("fit", *special, "--ckpt_path", "shared") == "kinds.Special"  # a kind of what the checkpoint holds
    assert model("fit", *special, "--ckpt_path", "shared", "--model", "tiny.Tiny") == "tiny.Tiny"
    assert main(["fit", *more]) == 0
    last = "runs/tiny/checkpoints/last.ckpt"
    assert model("test", "-c", "tiny.yaml", "--ckpt_path", last) == "kinds.More"
    assert main(["convert", last, "more"]) == 0
    assert model("test", "-c", "tiny.yaml", "--ckpt_path", "more") == "kinds.More"
    for words, sentence in {
        (
            *special,
            "--ckpt_path",
            last,
        ): f"is of kinds.Special, --ckpt_path {last} of More: give a configuration and a checkpoint",
        ("-c", "tiny.yaml", "--ckpt_path", "more"): "is of tiny.Tiny, --ckpt_path more of More, whose hyperparameters do not fit",
        ("-c", "tiny.yaml", "--ckpt_path", "bfn-mnist"): "is of tiny.Tiny, --ckpt_path bfn-mnist of BFN: give a",
    }.items():
        assert main(["fit", *words]) == 2
        assert sentence in capsys.readouterr().err


def test_tied_weights_are_loaded_from_a_pretrained_folder(folder):
    Path("tied.py").write_text(
        "from tiny import Tiny\n\n\nclass Tied(Tiny):\n    def __init__(self, **kwargs):\n"
        "        super().__init__(**kwargs)\n        self.again = self.net\n"
    )
    tied = ["-c", "tiny.yaml", "--model", "tied.Tied"]
    assert main(["fit", *tied]) == 0
    assert main(["convert", "runs/tiny/checkpoints/last.ckpt", "shared"]) == 0
    assert main(["test", *tied, "--ckpt_path", "shared"]) == 0


def test_convert_writes_the_averaged_weights(folder):
    from zoo import load

    main(["fit", "-c", "tiny.yaml"])
    assert main(["convert", "runs/tiny/checkpoints/last.ckpt", "out"]) == 0
    weights = read_checkpoint("runs/tiny/checkpoints/last.ckpt")["state_dict"]
    for name, tensor in load("out").state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_classes_of_the_current_folder_are_found(folder, capsys):
    Path("mine_in_this_folder.py").write_text("from tiny import Tiny\n\n\nclass Mine(Tiny):\n    '''My model.'''\n")
    assert main(["fit", "-c", "tiny.yaml", "--model", "mine_in_this_folder.Mine"]) == 0
    typed, config = ["--model", "mine_in_this_folder.Mine"], ["-c", "runs/tiny/config.yaml"]
    sys.modules.pop("mine_in_this_folder")
    for checkpoint, named in (("runs/tiny/checkpoints/last.ckpt", typed), ("last", [*typed, "-c", "tiny.yaml"]),
                              ("runs/tiny/checkpoints/last.ckpt", config)):  # fmt: skip
        shown = effective(capsys, "test", "--ckpt_path", checkpoint, *named)
        assert shown["model"]["class_path"] == "mine_in_this_folder.Mine"
        sys.modules.pop("mine_in_this_folder")


def test_a_file_of_the_current_folder_runs_only_if_its_name_is_typed(folder, capsys):
    """A folder that someone sent may hold ``modeling.py`` beside the weights that name it."""
    Path("modeling.py").write_text("from tiny import Tiny, TinyData\nclass Evil(Tiny): ...\nclass Rows(TinyData): ...\n")
    Path("evil.yaml").write_text(yaml.safe_dump({"data": {"class_path": "modeling.Rows"}}))
    assert main(["fit", "-c", "tiny.yaml", "-c", "evil.yaml", "--model", "modeling.Evil"]) == 0
    last = "runs/tiny/checkpoints/last.ckpt"
    assert main(["convert", last, "shared"]) == 0
    sys.modules.pop("modeling")
    sentence = "The class modeling.Evil is not known here: type its name after its option, such as `--model modeling.Evil`,"
    for argv in (["test", "-c", "tiny.yaml", "--ckpt_path", "shared"], ["test", "--ckpt_path", last], ["convert", last, "again"]):
        assert main(argv) == 2
        assert sentence in capsys.readouterr().err
    assert main(["test", "--ckpt_path", last, "--model=modeling.Evil"]) == 0  # now known, with all that is in it
    sys.modules.pop("modeling")
    Path("model.yaml").write_text(yaml.safe_dump({"model": {"class_path": "tiny.Tiny"}}))
    weights = read_checkpoint(last)
    weights["hyper_parameters"]["_class_path"] = "tiny.Tiny"
    torch.save(weights, last)
    assert main(["test", "--ckpt_path", last]) == 2
    assert "such as `--data modeling.Rows`" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"in Python import modeling first\.$"):
        zoo.load("shared")
    assert "modeling" not in sys.modules
    assert main(["convert", "shared", "again", "--model", "modeling.Evil"]) == 0


@pytest.mark.parametrize("start", [["-m", "zoo"], ["-c", "from zoo.__main__ import main; main()"]], ids=["module", "script"])
def test_files_of_the_current_folder_do_not_hide_packages(tmp_path, start):
    for name in ("strategies/__init__.py", "random.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('mine')")
    environment = {**os.environ, "PYTHONPATH": str(Path(zoo.__file__).parents[1])}
    command = [sys.executable, *start, "serve-data", "--help"]  # a verb that needs strategies, and no torch
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_a_foreign_package_of_our_name_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies/__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "strategies", raising=False)
    assert main(["list"]) == 2
    assert f"error: `import strategies` finds {tmp_path}/strategies instead of" in capsys.readouterr().err


PLAIN = """
import torch
from lightning import LightningModule


class Net(LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 4))

    def training_step(self, batch, batch_idx):
        loss = (self.layers(batch[0]) - batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.layers(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


def test_a_plain_module_of_lightning_runs(folder, capsys):
    Path("plain.py").write_text(PLAIN)
    Path("plainer.py").write_text(PLAIN.replace("        self.save_hyperparameters()\n", ""))
    for name in ("plain", "plainer"):
        words = ["--model", f"{name}.Net", "--model.width", "5", "--data", "tiny.TinyData", "--trainer.accelerator", "cpu"]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", f"runs/{name}"]
        assert main(["fit", *words, *quiet, "--trainer.max_steps", "2"]) == 0
        assert main(["fit", *words, *quiet, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
        last = f"runs/{name}/checkpoints/last.ckpt"
        assert read_checkpoint(last)["global_step"] == 3
        for stage in ("validate", "test", "predict"):
            assert main([stage, *words, *quiet, "--ckpt_path", last]) == 0
        capsys.readouterr()
        assert main(["convert", last, "shared", "--model", f"{name}.Net"]) == 2
        assert (
            f"{name}.Net is no ZooModule, which alone can be converted: derive it from zoo.ZooModule." in capsys.readouterr().err
        )
    without = ["--ckpt_path", "runs/plain/checkpoints/last.ckpt", "--model", "plain.Net", *words[4:], *quiet]
    assert effective(capsys, "test", *without)["model"]["init_args"]["width"] == 5  # which the checkpoint stores


def test_small_floats_without_a_point_are_numbers(folder, capsys):
    text = Path("tiny.yaml").read_text().replace("data:", "  # comment\ndata:")
    Path("tiny.yaml").write_text(text)
    assert effective(capsys, "fit", "-c", "tiny.yaml", "--model.noise", "1e-6")["model"]["init_args"]["noise"] == 1e-6
    config = json.loads(json.dumps(CONFIG))
    config["model"]["init_args"]["noise"] = "1e-6"  # what PyYAML makes of 1e-6
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    assert effective(capsys, "fit", "-c", "tiny.yaml")["model"]["init_args"]["noise"] == 1e-6


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model.nett", "3"], "unknown option model.nett of Tiny; did you mean net? (it has net, noise, root, optimizer,"),
        (["--model.net.widht", "3"], "unknown option model.net.widht of MLP; did you mean width?"),
        (["--model.net", "MLQ"], "unknown class MLQ for model.net; did you mean MLP?"),
        (["--model", "Tinny"], "unknown class Tinny for model; did you mean Tiny?"),
        (["--data", "Digit"], "unknown class Digit for data; did you mean Digits"),
        (["--model.optimizer", "AdamX"], "unknown class AdamX for model.optimizer; did you mean Adam"),
        (["--trainer.max_epoch", "3"], "unknown option --trainer.max_epoch; did you mean trainer.max_epochs"),
        (["--trainer.max_epochs", "three"], "option trainer.max_epochs: expected int or null, got three"),
        (["--model.net.width", "wide"], "option model.net.width: expected int, got wide"),
        (["--trainer.callbacks", "EMMA"], "unknown class EMMA for trainer.callbacks; did you mean EMA?"),
        (["--ckpt_path", "no.ckpt"], "--ckpt_path no.ckpt: there is no such checkpoint file"),
        (["--ckpt_path", "bfn-digitz"], "There is no pretrained model 'bfn-digitz'. Did you mean bfn-digits"),
        (["--checkpoint.every_n_steps", "0"], "every_n_steps=0 must be at least 1"),
        (["-c", "bfn/digits", "--model.solver.nfe", "0"], "nfe=0 must be at least 1; it counts the network's calls"),
        (["--trainer.callbacks", "EMA", "--trainer.callbacks.decay", "2"], "decay=2.0 must lie in [0, 1)"),
        (["--data.batch_size", "0"], "batch_size is 0, and must be at least 1"),
        (["--trainer.callbacks", "nowhere.Writer"], "option trainer.callbacks: there is no module nowhere for nowhere.Writer"),
        (
            ["-c", "bfn/digits", "--model.solver.grid", "log"],
            "model.solver.grid: expected one of uniform, logsnr, quadratic, got log",
        ),
        (["--trainer.precision", "12"], "option trainer.precision: expected one of 64, 32, 16, transformer-engine, "),
        (["--model.optimizer.lr", "x"], "option model.optimizer.lr: expected a number, got x\n"),
        (["--model.optimizer.betas", "3"], "option model.optimizer.betas: expected tuple, got 3\n"),
        (["--model.optimizer.betass", "3"], "betass of AdamW; did you mean betas? (it has lr, betas, eps,"),
        (["-c", "bfn/digits", "--model.lr_scheduler.T_mx", "3"], "T_mx of CosineAnnealingLR; did you mean T_max? (it has T_max,"),
        (["--model", "BFN", "--data", "Digits"], "--model.network must be given"),
        (["-c", "bfn/digits", "--model.solver", "ode2m"], "unknown class ode2m for model.solver; did you mean ODE2M or"),
        (["bfn/digits"], "bfn/digits stands alone; did you mean -c bfn/digits?"),
        (["--ckpt_path"], "--ckpt_path needs a value: last, a file, a folder, or a name that `zoo list` shows."),
        (["--ckpt_path="], "--ckpt_path needs a value"),
        (["--ckpt_path", "--model.noise", "0.5"], "--ckpt_path needs a value"),
        (["--ckpt_path", "last", "--ckpt_path=a.ckpt"], "--ckpt_path is given 2 times (last, a.ckpt): leave one of them."),
        (["--ckpt_path", "."], "--ckpt_path . is a folder, but neither a pretrained one"),
        (
            ["-c", "emigm/digits", "--model.size", "tiny"],
            "option model.size: expected one of xsmall, small, base, large, huge, null, got tiny",
        ),
        (["-c", "strategies/dpp"], "There is no configuration strategies/dpp; did you mean strategies/ddp"),
    ],
)
def test_wrong_input_is_one_sentence_before_training(folder, capsys, argv, sentence):
    try:
        status = main(["fit", "-c", "tiny.yaml", *argv])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and sentence in lines[0] + "\n"
    assert "Traceback" not in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--trainer.strategy", "fsdp", "--trainer.accelerator", "cpu"], "these run on CPUs: -c strategies/paro_iig"),
        (["--trainer.strategy", "dpd"], "error: trainer: You selected an invalid strategy name"),
        (["--model.optimizer", "Muon"], "trainable parameters are not matrices: net."),
        (["--model.optimizer", "Muon"], "such as --model.optimizer AdamW"),
        (["--model.optimizer.lr", "-1"], "error: Tiny: the optimizer refuses: Invalid learning rate: -1.0.\n"),
    ],
)
def test_what_lightning_or_the_optimizer_refuses_is_one_sentence(folder, capsys, argv, sentence):
    assert main(["fit", "-c", "tiny.yaml", *argv]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not Path("runs/tiny/checkpoints").exists()


def test_a_class_that_its_module_does_not_have_is_one_sentence(folder, capsys):
    Path("own_kinds.py").write_text("import tiny\n\n\nclass MyTiny(tiny.Tiny):\n    pass\n")
    for option, sentence in {
        ("--model", "own_kinds.MyTinyy"): "error: option model: own_kinds.py has no MyTinyy; did you mean MyTiny?\n",
        ("--data", "own_kinds.Rows"): "error: option data: own_kinds.py has no Rows\n",
        ("--model.optimizer", "torch.optim.AdamWW"): "torch.optim has no AdamWW; did you mean AdamW or Adam",
    }.items():
        with pytest.raises(SystemExit):
            main(["fit", "-c", "tiny.yaml", *option])
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [", "other.yaml is not valid YAML, line 1"),
        ("trainer: 5", "other.yaml: `trainer: 5` must be a section with options of its own, such as `max_steps: 1000`."),
        ("data: [1]", "other.yaml: `data: [1]` must be a section"),
        ("5", "other.yaml is not a configuration"),
        ("model: {bayesian_flow: {}}", "other.yaml is a configuration of the published code: convert the weights with"),
        ("net: {}\nbayesian_flow: {}", "`zoo convert FILE FOLDER --config other.yaml`, then give --ckpt_path FOLDER"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_sentence(folder, capsys, text, sentence):
    Path("other.yaml").write_text(text)
    assert main(["fit", "-c", "tiny.yaml", "-c", "other.yaml"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["lst"], "unknown verb lst; did you mean list"),
        (
            ["--model", "BFN"],
            "unknown verb BFN (a verb comes first: fit, validate, test, predict, list, assets, convert, plan, ",
        ),
        (["fit", "--model.solver.help", "ODE2M"], "such as --model NAME --model.solver.help ODE2M"),
        (["--model.solver.help", "ODE2M"], "such as --model NAME --model.solver.help ODE2M"),
    ],
)
def test_a_misplaced_word_is_one_sentence(folder, capsys, argv, sentence):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_stage_may_stand_behind_its_options(folder, capsys):
    assert effective(capsys, "-c", "tiny.yaml", "fit", "--model.noise", "0.5")["model"]["init_args"]["noise"] == 0.5
    with pytest.raises(SystemExit):
        main(["--model.help", "BFN"])
    assert "--model.network" in capsys.readouterr().out


def test_a_classifier_predicts_only_pictures(folder, capsys):
    assert main(["predict", "--data", "Digits", "--ckpt_path", "fd_digits_mlp", "--trainer.accelerator", "cpu"]) == 2
    assert "FeatureClassifier draws no samples: name the pictures to work on" in capsys.readouterr().err


def test_a_module_that_draws_no_samples_predicts_a_whole_split(folder, capsys):
    for number in range(3):
        path = Path("pictures/train") / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    Path("mine.py").write_text(
        "import tiny\n\n\nclass Reds(tiny.Wider):\n    def predict_step(self, batch, batch_idx):\n"
        "        red = (255 * batch['image'][:, 0, 0, 0]).round().int()\n"
        "        return {'index': batch['index'], 'label': batch['label'], 'red': red}\n"
    )
    words = ["predict", "--model", "mine.Reds", "--model.net", "MLP", "--trainer.accelerator", "cpu", "--trainer.callbacks+",
             "JSONLWriter", "--data", "ImageFolder", "--data.root", "pictures", "--data.image_size", "8"]  # fmt: skip
    assert main(words) == 2
    assert "with --data.predict_images FOLDER or --data.predict_split train." in capsys.readouterr().err
    assert not main([*words, "--data.predict_split", "train"])
    (path,) = Path("runs").rglob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["index"], row["label"], row["red"]) for row in rows] == [(0, 0, 0), (1, 0, 2), (2, 1, 1)]


def test_without_model_and_data_the_way_is_shown(folder, capsys):
    with pytest.raises(SystemExit):
        main(["fit"])
    assert "error: --data and --model must be given, or a configuration that holds them" in capsys.readouterr().err


def test_weights_of_another_shape_are_one_sentence(folder, capsys):
    main(["fit", "-c", "tiny.yaml"])
    capsys.readouterr()
    assert main(["test", "-c", "tiny.yaml", "--ckpt_path", "last", "--model.net.width", "9"]) == 2
    assert "do not fit Tiny (of another shape: net.layers.0.weight (6, 4) instead of (9, 4)" in capsys.readouterr().err


def test_a_checkpoint_that_holds_code_is_one_sentence(folder, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"path": Path("a")}}, "unsafe.ckpt")
    assert main(["test", "-c", "tiny.yaml", "--ckpt_path", "unsafe.ckpt"]) == 2
    assert "which is not a tensor or plain data and could run code when loaded" in capsys.readouterr().err


def test_errors_of_foreign_code_keep_their_traceback(folder):
    Path("broken_module.py").write_text(
        "from tiny import Tiny\nclass Broken(Tiny):\n    def training_step(self, batch, i):\n        raise ValueError('mine')\n"
    )
    with pytest.raises(ValueError, match="mine"):
        main(["fit", "-c", "tiny.yaml", "--model", "broken_module.Broken"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="not measured: torch.compile needs a C++ compiler")
def test_compiling_changes_neither_names_nor_results(folder):
    # A process of its own, as for a user: torch's compiler minds what other tests have imported.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    weights = []
    for compiled in ("false", "true"):
        root = ["--trainer.default_root_dir", f"compile_{compiled}", "--model.net.dropout", "0.0"]
        command = [sys.executable, "-m", "zoo", "fit", "-c", "tiny.yaml", "--model.compile", compiled, *root]
        done = warm_python.run(command, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(read_checkpoint(f"compile_{compiled}/checkpoints/last.ckpt")["current_model_state"])
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-6), name


@pytest.mark.slow
def test_tab_completion_is_printed(folder, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit):
        main(["--print_completion", "shtab-bash"])
    assert "-F _shtab_zoo zoo" in capsys.readouterr().out


def test_list_names_everything(folder, capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("BFN", "FeatureClassifier", "Digits", "bfn/digits", "bfn-digits", "strategies/ddp", "[deepspeed]"):
        assert name in out
    assert "extractor │ fd_digits_mlp" in out


def test_model_help_reads_well(folder, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "BFN"])
    out = capsys.readouterr().out
    assert "--model.network" in out and "--model.solver" in out
    assert "torch.nn.modules" not in out  # components are typed by our own small base classes


def test_shared_folders_import_nothing_that_the_user_did_not_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "trap_module.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    folder = zoo.load("bfn-digits").save_pretrained(tmp_path / "shared")
    config = json.loads((folder / "config.json").read_text())
    config["network"] = {"class_path": "trap_module.Trap", "init_args": {}}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["predict", "-c", "bfn/digits", "--ckpt_path", "shared"]) == 2
    assert "The class trap_module.Trap is not known here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hybrid", "expert_parallel"])
def test_a_strategy_that_nothing_has_imported_is_known_by_its_name(name, monkeypatch, tmp_path, capsys):
    room = f"strategies.{name.removesuffix('_parallel')}"
    for module in (f"{room}.strategy", room):
        found, (whole, _, last) = importlib.import_module(module), module.rpartition(".")
        monkeypatch.setattr(sys.modules[whole], last, found)  # put back afterwards
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(StrategyRegistry, name)
    monkeypatch.chdir(tmp_path)
    words = ["-c", "bfn/digits", "-c", f"strategies/{name}", "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    main(["fit", *words])
    assert "invalid strategy name" not in capsys.readouterr().err
