"""The examples run as they stand."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from zoo import ZooModule
from zoo.__main__ import main

EXAMPLES = Path(__file__).parent.parent / "examples"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


def test_sampling_in_ten_lines():
    code = (EXAMPLES / "sample.py").read_text()
    exec(compile(code, "sample.py", "exec"), {"__name__": "__main__"})
    assert Image.open("samples.png").size == (8 * 10 + 2, 8 * 10 + 2)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12


def test_a_subclass_with_another_network_and_metric(capsys):
    import my_bfn

    loaded = my_bfn.main(max_steps=8)
    assert type(loaded) is my_bfn.MyBFN
    assert loaded.denoising_time == 0.3
    assert type(loaded.network) is my_bfn.ConvNet
    images = loaded.eval().sample(torch.arange(3), nfe=3).images
    assert images.shape == (3, 1, 8, 8)


def test_the_same_from_the_command_line():
    options = ["--model.network", "my_bfn.ConvNet", "--model.network.channels", "8", "--data", "Digits"]
    steps = ["--trainer.max_steps", "6", "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "5"]
    assert main(["fit", "--model", "my_bfn.MyBFN", *options, *steps, *QUIET]) == 0
    header = Path("runs/mybfn/metrics.csv").read_text().splitlines()[0]
    assert "val_denoising_error" in header
    loaded = ZooModule.load_from_checkpoint("runs/mybfn/checkpoints/last.ckpt")
    assert loaded.hparams_initial["network"]["init_args"]["channels"] == 8


def test_data_of_your_own():
    options = ["--model", "BFN", "--model.network", "ResidualMLP", "--model.network.width", "32", "--data", "my_data.Stripes"]
    assert main(["fit", *options, "--trainer.max_steps", "5", *QUIET]) == 0
    assert Path("runs/bfn/checkpoints/last.ckpt").exists()


def test_a_language_model_of_your_own():
    import my_language_model

    Path("texts").mkdir()
    Path("texts/one.md").write_text("the cat sat on the mat. " * 200)
    Path("texts/two.md").write_text("the dog lay on the log. " * 200)
    for number in range(30):
        Path(f"texts/more_{number}.md").write_text(f"the cat and the dog, number {number}. " * 20)
    text = my_language_model.main("texts", max_steps=6)
    assert text.startswith("The model is ")


def test_chats_to_fine_tune_on():
    import make_chats

    from datamodules import SFT

    titles = [f"Film {number:02d}" for number in range(30)]
    rows = [f"{title}\t{1990 + number % 4}\t{('Comedy', 'War Drama')[number % 2]}" for number, title in enumerate(titles)]
    Path("films.tsv").write_text("\n".join(["movie_title\trelease_year\tclass", *rows]) + "\n")
    make_chats.main("films.tsv", num_train=40, num_held_out=20)
    named = [{title for title in titles if title in Path(f"{name}.jsonl").read_text()} for name in ("chats", "chats_held_out")]
    assert all(named) and not named[0] & named[1], "no film is in both"
    data = SFT(path="chats.jsonl", val_path="chats_held_out.jsonl", batch_size=4)
    assert [len(part) for part in data.splits] == [40, 20]
    for path in (Path("chats.jsonl"), Path("chats_held_out.jsonl")):
        for line in path.read_text().splitlines():
            question, answer = (message["content"] for message in json.loads(line)["messages"])
            for number in (number for number, title in enumerate(titles) if title in question + answer):
                assert set(re.findall(r"19\d\d", answer)) <= {str(1990 + number % 4)}
                assert set(re.findall("Comedy|War|Drama", answer)) <= set(rows[number].split())


def own_strategy(folder, strategy, max_steps):
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    import my_strategy

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    made = my_strategy.LocalSGDStrategy(average_every=2) if strategy == "own" else strategy
    model, norms = my_strategy.main(made, max_steps, default_root_dir=folder, limit_val_batches=0, devices=2, **quiet)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), norms


def test_a_strategy_and_a_callback_of_your_own(pool, tmp_path):
    (first, norms), (second, others) = pool.run(own_strategy, tmp_path, "own", 3)
    assert torch.equal(first, second), "all have the mean at the end"
    assert len(norms) == 3 and norms != others, "each rank judges its own steps"
    (_, norms), (_, others) = pool.run(own_strategy, tmp_path, "ddp", 3)
    assert norms == others, "the same callback, with a strategy of Lightning's"


def test_pictures_to_fill_in(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["half_pictures.py", "digits"])
    exec(compile((EXAMPLES / "half_pictures.py").read_text(), "half_pictures.py", "exec"), {"__name__": "__main__"})
    options = ["--data.predict_images", "digits", "--data.predict_masks", "digits/mask/upper_half.png", "--model.solver.nfe", "2"]
    assert main(["predict", "-c", "bfn/mnist", "--ckpt_path", "bfn-mnist", *options, *QUIET]) == 0
    predictions = Path("runs/bfn/mnist/predictions/images")
    for label in range(10):
        given, filled = (pixels(folder / f"{label}.png") for folder in (Path("digits"), predictions))
        step = 255 / 16  # what is known comes back at the nearest of the model's 16 levels
        assert (given[:14] - filled[:14]).abs().max() <= step
        assert (given[14:] - filled[14:]).abs().max() > step


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.getdata()), dtype=torch.float64).view(image.height, image.width)
