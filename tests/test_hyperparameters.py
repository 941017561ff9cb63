"""What an object was built with survives as plain data, and builds an equal object again."""

import enum
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import MLP, Deep, Net, Tiny, Wider

from zoo.hyperparameters import Configurable, build, class_path, find_class, plain


class Colour(enum.Enum):
    RED = 1


@dataclass
class Sizes:
    width: int
    folder: Path


numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(numbers, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(trees)
def test_plain_data_is_its_own_plain_form(tree):
    assert plain(tree) == tree
    json.dumps(plain(tree))


def test_paths_enums_dataclasses_partials_and_classes_become_plain():
    assert plain(Sizes(3, Path("a/b"))) == {"width": 3, "folder": "a/b"}
    assert plain(Colour.RED) == "RED"
    assert plain((1, {2.5})) == [1, [2.5]]
    stored = plain(functools.partial(torch.optim.SGD, lr=0.1))["init_args"]
    assert (stored["lr"], stored["weight_decay"]) == (0.1, 0)  # complete: gaps would be filled from another class's default
    assert plain(torch.optim.SGD) == {"class_path": "torch.optim.SGD"}


@pytest.mark.parametrize("value", [lambda: 1, torch.nn.Linear(1, 1), object()])
def test_what_no_file_can_hold_is_refused_with_the_arguments_name(value):
    with pytest.raises(TypeError, match="argument width="):
        plain(value, "width")


def test_components_nest_and_defaults_are_filled_in():
    config = Deep([MLP(3), MLP(dropout=0.0)]).init_config
    assert config["init_args"]["scale"] == 1.0
    assert [part["init_args"] for part in config["init_args"]["parts"]] == [
        {"width": 3, "dropout": 0.1},
        {"width": 8, "dropout": 0.0},
    ]
    assert build(Net, config).init_config == config


def test_lambda_defaults_with_tuples_become_plain():
    optimizer = Tiny(MLP()).hparams_initial["optimizer"]
    assert optimizer["class_path"].endswith("AdamW")
    assert list(optimizer["init_args"]["betas"]) == [0.9, 0.99]


def test_arguments_reached_through_kwargs_are_stored():
    stored = Wider(gain=3.0, net=MLP(5), noise=0.2).hparams_initial
    assert (stored["gain"], stored["noise"], stored["net"]["init_args"]["width"]) == (3.0, 0.2, 5)
    assert stored["root"] is None


def test_a_local_class_is_refused_when_stored():
    class Local(Configurable):
        pass

    with pytest.raises(TypeError, match="inside a function"):
        _ = Local().init_config


def test_find_class_refuses_what_is_not_of_the_base():
    assert find_class(class_path(MLP), Net) is MLP
    with pytest.raises(ValueError, match="not a Net"):
        find_class("subprocess.Popen", Net)
    with pytest.raises(ValueError, match="not known here"):
        find_class("some_module_that_nobody_imported.Thing", Net)


def test_components_survive_copy_and_pickle():
    import copy
    import pickle

    net = MLP(3)
    assert copy.deepcopy(net).init_config == net.init_config
    assert pickle.loads(pickle.dumps(net)).init_config == net.init_config  # noqa: S301
