"""Arguments of the model that were left out come from the data, below everything else that gives them."""

import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from tiny import TinyClicks, TinyData

from zoo.__main__ import main
from zoo.base.checkpoint import read_checkpoint
from zoo.cli.data_arguments import fill_model_arguments
from zoo.ctr import XDeepFM

CONFIG = {
    "model": {"class_path": "XDeepFM", "init_args": {"embed_dim": 2, "cin": [3], "dnn": [4]}},
    "data": {"class_path": "tiny.TinyClicks"},
    "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
}
LAST = Path("runs/clicks/checkpoints/last.ckpt")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder with clicks.yaml in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    Path("clicks.yaml").write_text(yaml.safe_dump(CONFIG))


def model_of(config: Namespace) -> dict:
    fill_model_arguments(config)
    return config.model.init_args.as_dict()


def options(data: type, **init_args: object) -> Namespace:
    """Options as the parser gives them."""
    model = Namespace(class_path="zoo.ctr.XDeepFM", init_args=Namespace(**init_args))
    return Namespace(model=model, data=Namespace(class_path=f"tiny.{data.__name__}", init_args=Namespace()))


def test_sizes_left_out_train_resume_and_predict_and_are_stored(monkeypatch):
    assert main(["fit", "-c", "clicks.yaml"]) == 0
    stored = read_checkpoint(LAST)["hyper_parameters"]
    assert (stored["field_dims"], stored["num_dense"]) == ([6, 4], 1)
    assert yaml.safe_load(Path("runs/clicks/config.yaml").read_text())["model"]["init_args"]["field_dims"] == [6, 4]
    assert main(["fit", "-c", "clicks.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3"]) == 0
    assert read_checkpoint(LAST)["global_step"] == 3
    monkeypatch.setattr("zoo.cli.data_arguments.build", None)  # the checkpoint knows the sizes
    assert main(["predict", "-c", "clicks.yaml", "--ckpt_path", "last"]) == 0
    assert XDeepFM.load_from_checkpoint(LAST).network.field_dims == (6, 4)


def test_typed_sizes_win_and_are_refused_in_one_sentence_if_they_are_wrong(capsys):
    assert model_of(options(TinyClicks, field_dims=[7, 4], num_dense=None)) == {"field_dims": [7, 4], "num_dense": 1}
    assert main(["fit", "-c", "clicks.yaml", "--model.field_dims", "[7, 4]"]) != 0
    assert "give --model.field_dims '[6, 4]' --model.num_dense 1" in capsys.readouterr().err


def test_models_without_such_arguments_and_data_that_know_none_are_left_alone():
    assert model_of(options(TinyClicks, width=None)) == {"width": None}
    assert model_of(options(TinyData, field_dims=None)) == {"field_dims": None}
    fill_model_arguments(Namespace(model=Namespace(class_path="zoo.ctr.XDeepFM")))


def test_python_asks_for_the_sizes():
    with pytest.raises(ValueError, match="XDeepFM: field_dims is missing"):
        XDeepFM()
    assert XDeepFM([6, 4], cin=(3,), dnn=(4,)).network.num_dense == 0
