"""What an object was built with survives as plain data, and builds an equal object again."""

import enum
import functools
import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonargparse._parameter_resolvers as resolvers
import jsonargparse._typehints as hints
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.cli import OptimizerCallable
from tiny import MLP, Deep, Net, Tiny, Wider

from zoo.base.hyperparameters import Configurable, build, check_config, class_path, find_class, plain
from zoo.base.parsing import our_parsing
from zoo.base.sources import definition, derives_from, home_of
from zoo.cli.parser import ZooArgumentParser


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


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a")])
def test_numbers_of_numpy_become_numbers_of_python(value, tmp_path):
    stored = plain({"value": [value]})["value"][0]
    assert stored == value and type(stored) is type(value.item())
    torch.save(stored, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == value


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


class Holder(Configurable):
    """Components, functions and containers of them, in all the ways in which an argument may take them."""

    def __init__(
        self,
        net: Net | None = None,
        nets: list[Net] | None = None,
        kind: type[Net] | None = None,
        call: Callable[[float], float] | None = None,
        optimizer: OptimizerCallable | None = None,
        note: str = "",
    ) -> None:
        self.arguments = (net, nets, kind, call, optimizer, note)


FOREIGN = [
    {"net": {"class_path": "this.Foo"}},
    {"net": "this.Foo"},
    {"net": '{"class_path": "this.Foo"}'},
    {"nets": [{"class_path": "tiny.MLP"}, {"class_path": "this.Foo"}]},
    {"net": {"class_path": "tiny.Deep", "init_args": {"parts": [{"class_path": "this.Foo"}]}}},
    {"kind": "this.Foo"},
    {"call": "this.c"},
    {"optimizer": {"class_path": "this.Foo", "init_args": {"lr": 0.1}}},
]


@pytest.mark.parametrize("arguments", FOREIGN, ids=str)
def test_nothing_is_imported_that_stored_data_name(arguments, capsys):
    sys.modules.pop("this", None)
    config = {"class_path": class_path(Holder), "init_args": arguments}
    for refuse in (build, check_config):
        with pytest.raises(ValueError, match=r"this\.\w+ is not known here: type its name .* import this first"):
            refuse(Holder, config)
    assert "this" not in sys.modules  # which greets whoever imports it
    with pytest.raises(ValueError, match="Cannot build"):
        build(Holder, config, trusted=True)
    with pytest.raises(ValueError, match="Cannot build"):
        check_config(Holder, config, chosen=["this.Foo", "this.c"])
    assert "this" in sys.modules


def test_what_is_at_hand_may_be_named_at_any_depth(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text("from tiny import MLP\nclass Mine(MLP):\n    class Inner(MLP): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"my_nets\.Mine is not known here"):
        build(Holder, {"class_path": class_path(Holder), "init_args": {"net": "my_nets.Mine"}})
    importlib.import_module("my_nets")
    arguments = {
        "net": {"class_path": "my_nets.Mine"},
        "nets": [{"class_path": "MLP"}, {"class_path": "my_nets.Mine.Inner"}],
        "kind": "my_nets.Mine",
        "call": "math.sqrt",
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
        "note": "this.Foo",
    }
    built = build(Holder, {"class_path": class_path(Holder), "init_args": arguments}).arguments
    assert type(built[0]).__name__ == "Mine" and [type(net).__name__ for net in built[1]] == ["MLP", "Inner"]
    assert built[2].__name__ == "Mine" and built[3] is math.sqrt and built[5] == "this.Foo"
    assert isinstance(built[4](torch.nn.Linear(1, 1).parameters()), torch.optim.AdamW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widht": 3}, "unknown option widht of MLP; did you mean width?"),
        ({"width": "wide"}, "width: expected int, got wide"),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments, message):
    with pytest.raises(ValueError) as caught:
        build(Net, {"class_path": "tiny.MLP", "init_args": arguments})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_jsonargparse_is_changed_only_while_our_parser_runs():
    def homes():
        functions = (resolvers.ast_is_constant, resolvers.ast_get_constant_value, hints.import_object,
                     hints.resolve_class_path_by_name)  # fmt: skip
        return [function.__module__ for function in functions]

    before = homes()
    assert all(home.startswith("jsonargparse.") for home in before)
    with our_parsing():
        assert not any(home.startswith("jsonargparse.") for home in homes())
    parser = ZooArgumentParser()
    parser.add_subclass_arguments(Net, "net")
    parser.instantiate_classes(parser.parse_args(["--net", "MLP"]))
    build(Tiny, Tiny(MLP(3)).init_config)
    with pytest.raises(ValueError):
        build(Tiny, {"class_path": "this.Foo"})
    with pytest.raises(SystemExit):
        parser.parse_args(["--net", "MLQ"])
    assert homes() == before


def test_public_names_are_found_in_the_sources():
    assert (home_of("ODE2M"), home_of("Digits"), home_of("Net")) == ("zoo.bfn", "datamodules", None)
    module, statement = definition("strategies", "EDiTStrategy")  # through two packages
    assert (module, statement.name) == ("strategies.edit.strategy", "EDiTStrategy")
    assert derives_from("zoo.ling", "LingDPO", "ZooModule") and not derives_from("zoo.ling", "LingConfig", "ZooModule")


def test_components_survive_copy_and_pickle():
    import copy
    import pickle

    net = MLP(3)
    assert copy.deepcopy(net).init_config == net.init_config
    assert pickle.loads(pickle.dumps(net)).init_config == net.init_config  # noqa: S301
