"""The verbs beside fit, validate, test and predict."""

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file
from tiny import MLP, Tiny

import zoo
from zoo.__main__ import main


def test_assets_are_listed(capsys):
    assert main(["assets"]) == 0
    out = capsys.readouterr().out
    assert "digits" in out and "BSD" in out


def test_assets_are_fetched_several_at_once(capsys):
    assert main(["assets", "fetch", "digits", "mnist-5k"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["digits", "mnist-5k"]


def test_an_unknown_asset_is_one_sentence(capsys):
    assert main(["assets", "fetch", "digit"]) == 2
    assert "digits" in capsys.readouterr().err


def test_convert_says_what_is_missing(capsys, tmp_path):
    assert main(["convert", str(tmp_path / "none.ckpt"), str(tmp_path / "out")]) == 2
    assert "There is no checkpoint file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert"])


def refusal(capsys, *words: object) -> str:
    """What ``zoo convert`` says before it ends with status 2."""
    assert main(["convert", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_shipped_model_is_converted_by_its_name(capsys, tmp_path):
    assert main(["convert", "bfn-digits", str(tmp_path / "out")]) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(stored[name], tensor) for name, tensor in zoo.load("bfn-digits").state_dict().items() if name in stored
    )
    assert "Did you mean bfn-digits" in refusal(capsys, "bfn-digit", tmp_path / "other")


def test_targets_that_are_meant_otherwise_are_refused_before_anything_is_read(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "within"):
        assert f"{tmp_path / 'file'} is a file, where a folder is to be written" in refusal(capsys, "bfn-digits", target)
    assert "is a file" in refusal(capsys, "bfn-digits", tmp_path / "file" / "weights.pt", "--official")
    for suffix in ("pt", "pth", "ckpt", "safetensors"):
        assert "name a folder, or add --official" in refusal(capsys, "bfn-digits", tmp_path / f"weights.{suffix}")
    for option in (["--half"], ["--description", "mine"]):
        assert "leave them out with --official" in refusal(capsys, "x", tmp_path / "weights.pt", "--official", *option)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_configuration_does_not_replace_what_a_checkpoint_holds(capsys, tmp_path):
    module = Tiny(MLP(5), noise=0.7)
    module.save_pretrained(tmp_path / "folder")
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for source in ("folder", "a.ckpt"):
        error = refusal(capsys, tmp_path / source, tmp_path / "out", "--config", "bfn/digits")
        assert f"{tmp_path / source} holds its own hyperparameters: leave out --config." in error
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "out")]) == 0
    assert zoo.load(tmp_path / "out").noise == 0.7


def test_a_configuration_that_is_no_yaml_is_one_sentence(capsys, tmp_path):
    torch.save({"net.a": torch.zeros(2)}, tmp_path / "weights.pt")
    for content in ("model: [1\ndata: }", "\tmodel:"):
        (tmp_path / "bad.yaml").write_text(content)
        error = refusal(capsys, tmp_path / "weights.pt", tmp_path / "out", "--config", tmp_path / "bad.yaml")
        assert "bad.yaml is not valid YAML, line " in error


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize(
    "verb", ["list", "assets", "convert", "plan", "plan paro", "plan rlhf", "simulate", "store", "serve-data"]
)
def test_every_verb_explains_itself(capsys, verb, option):
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), option])
    assert end.value.code == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"usage: zoo {verb} ") and not error


@pytest.mark.parametrize(
    ("words", "message"),
    [("plan foo", "error: zoo plan foo: what can be planned is `paro`, `rlhf`"),
     ("plan", "error: zoo plan: what can be planned"),
     ("plan paro", "error: --cluster.num_groups and --cluster.group_size and"),
     ("plan rlhf -c rlhf/plan_llama", "did you mean rlhf/plan_llama_7b"),
     ("plan paro --cluster.num_group 1", "error: unknown option --cluster.num_group; did you mean cluster.num_groups"),
     ("simulate --arm 1", "error: unknown option --arm; did you mean arms?"),
     ("simulate antdt/simulate_1000", "did you mean -c antdt/simulate_1000?"),
     ("assets foo", "invalid choice: 'foo' (choose from"),
     ("store fill", "invalid choice: 'fill' (choose from"),
     ("store build -c ctr/flights", "error: zoo store: XDeepFM knows no store of texts: take BAHE."),
     ("list foo", "unrecognized arguments: foo"),
     ("serve-data --foo", "required: --folder"),
     ("plann", "unknown verb plann; did you mean plan?")],
)  # fmt: skip
def test_wrong_words_are_answered_in_a_line_or_two(capsys, words, message):
    try:
        status = main(words.split())
    except SystemExit as end:
        status = end.code
    out, error = capsys.readouterr()
    assert status == 2 and message in error and error.count("\n") <= 3 and not out


FAKE = """
import torch
from datamodules import TextHistories
from zoo.bahe.atom_store import AtomStore
from zoo.module import ZooModule

class Lengths(ZooModule):
    def __init__(self, store: str, num_features: int | None = None) -> None:
        super().__init__(optimizer=torch.optim.SGD)
        self.store = store

    def fill_store(self, texts, fingerprint):
        try:
            store = AtomStore.open(self.store, {"text": fingerprint})
        except FileNotFoundError:
            store = AtomStore.create(self.store, 1, {"text": fingerprint})
        missing = store.missing(texts)
        store.append(missing, [[float(len(text))] for text in missing] or torch.zeros(0, 1))
        return store
"""


def test_a_store_is_built_once_appended_to_verified_and_described(capsys, tmp_path, monkeypatch):
    (tmp_path / "lengths.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))
    events = tmp_path / "events.csv"
    events.write_text("user_id,item_id,time,text,label\n1,a,1,green tea,1\n1,b,2,black  tea,0\n")
    words = ["--model", "lengths.Lengths", "--model.store", str(tmp_path / "store"), "--data", "TextHistories", "--data.source",
             str(events)]  # fmt: skip

    def said(verb: str) -> str:
        assert main(["store", verb, *words]) == 0
        return capsys.readouterr().out

    assert main(["store", "append", *words]) == 2 and "is empty: fill it" in capsys.readouterr().err
    assert "4 texts, 4 of them new" in said("build") and "4 texts, 0 of them new" in said("build")
    with events.open("a") as file:
        file.write("2,a,3,green tea,1\n2,c,4,milk,1\n")
    assert "6 texts, 2 of them new" in said("append") and "6 texts, rows and index are sound" in said("verify")
    assert "texts: 6\n" in said("stats")
