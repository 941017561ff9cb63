"""A run prints whole names, epochs that count up, and nothing that a user cannot act on."""

import logging
import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import RichModelSummary, TQDMProgressBar
from lightning.pytorch.utilities.model_summary import summarize
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from tiny import MLP, Tiny

from zoo.cli.display import ParameterSummary, RunProgressBar, display_callbacks, print_results, silence


@pytest.mark.parametrize("columns", [24, 80])
def test_names_of_metrics_are_whole(monkeypatch, capsys, columns):
    monkeypatch.setattr("zoo.cli.display.get_console", lambda: Console(width=columns))
    print_results([{"test/bits_per_dim/continuous": 4.25}], "test")
    lines = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "".join(name.strip() for name, _ in lines) == "test/bits_per_dim/continuous"
    assert "".join(value.strip() for _, value in lines) == "4.25"


@pytest.mark.parametrize(("max_epochs", "shown"), [(-1, "Epoch 3 "), (10, "Epoch 3/9 ")])
def test_a_run_of_steps_has_no_last_epoch(max_epochs, shown):
    bar = RunProgressBar()
    bar._trainer = SimpleNamespace(max_epochs=max_epochs)
    assert bar._get_train_description(3) == shown


def test_the_summary_has_no_column_of_zeros(capsys):
    summary = summarize(Tiny(MLP()))
    modes = {"train": 1, "eval": 0}
    ParameterSummary.summarize(summary._get_summary_data(), 76, 76, 0.1, modes, total_flops=0)
    out = capsys.readouterr().out
    assert "FLOPs" not in out and "76 of 76 parameters are trained" in out


def test_what_the_user_chose_stays():
    kinds = [type(callback) for callback in display_callbacks({"callbacks": []})]
    assert kinds == [RunProgressBar, ParameterSummary]
    assert display_callbacks({"enable_progress_bar": False, "enable_model_summary": False}) == []
    assert display_callbacks({"callbacks": [TQDMProgressBar(), RichModelSummary()]}) == []


def test_advertisements_and_insides_of_libraries_are_silent(caplog):
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
        silence()
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use", FutureWarning, stacklevel=1)
        warnings.warn("The training set is empty", stacklevel=1)
        rank_zero_info("💡 Tip: For seamless cloud logging and experiment tracking")
        rank_zero_info("Restored all states")
    assert [str(warning.message) for warning in caught] == ["The training set is empty"]
    assert "Tip" not in caplog.text and "Restored all states" in caplog.text
