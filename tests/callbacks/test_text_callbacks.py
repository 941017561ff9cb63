"""Callbacks for text: the same texts on any number of ranks, scored beside real text, written in order."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from zoo.base.samples import Samples, TextSamples
from zoo.callbacks import JSONLWriter, SampleQuality, TextQuality, TextWriter
from zoo.metrics import TextScores, text_scores, vocabulary

RIGHT = ["the", "house", "of", "the", "king", "is", "old", "and", "full", "of", "light", "and", "there", "we", "sit"]
WRONG = ["thx", "huose", "ov", "qing", "lihgt", "xq"]


def sentence(index: int, seed: int, wrong: int) -> str:
    """Text of a sample id: eight words, the more of them wrong, the higher `wrong` is; length varies."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    draws = torch.randint(0, 12, (8, 2), generator=generator).tolist()
    return " ".join(WRONG[word % len(WRONG)] if chance < wrong else RIGHT[word] for chance, word in draws)


class Novel(lightning.LightningDataModule):
    alphabet = " abcdefghijklmnopqrstuvwxyz"

    def reference_text(self) -> list[str]:
        return [sentence(index, 99, wrong=1) for index in range(30)]

    def train_text(self) -> str:
        return " ".join(RIGHT[:6] * 2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=2)

    val_dataloader = test_dataloader = train_dataloader


class Writer(lightning.LightningModule):
    """Draws sentences that are spelled better with more network evaluations; `late` costs one more."""

    sampler_names = ("early", "late")

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.drawn: list[int] = []

    def sample(self, index_B: Tensor, *, seed: int = 0, sampler: str | None = None, nfe: int | None = None) -> TextSamples:
        assert not torch.is_grad_enabled()
        nfe = nfe or 4
        self.drawn += index_B.tolist()
        texts = [sentence(index, seed, wrong=12 // nfe) for index in index_B.tolist()]
        return TextSamples(texts, nfe + (sampler == "late"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 0.0)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "log_every_n_steps": 1, **options},
    )


# Quality


def test_quality_is_the_score_of_the_samples_with_held_out_text_beside(tmp_path: Path, capsys) -> None:
    data, callback = Novel(), TextQuality(["early", "late"], [2, 12], num_samples=20, batch_size=6)
    trainer_of(tmp_path, callback, logger=CSVLogger(tmp_path, name="", version="")).test(Writer(), data, verbose=False)
    found = json.loads((tmp_path / "text_quality.json").read_text())
    assert callback.result == found
    assert [(row["sampler"], row["nfe"], row["requested_nfe"]) for row in found["rows"]] == [
        ("early", 2, 2),
        ("early", 12, 12),
        ("late", 3, 2),
        ("late", 13, 12),
    ]
    known = vocabulary(data.train_text())
    for row in found["rows"]:
        expected = text_scores([sentence(i, 0, 12 // row["requested_nfe"]) for i in range(20)], known)
        assert {name: row[name] for name in vars(expected)} == vars(expected)
    poor, good = (row["spelling_accuracy"] for row in found["rows"][:2])
    assert poor < 0.7 < 0.85 < good < 1
    # As many lines as samples, evenly spaced over the held-out text.
    lines = [data.reference_text()[i] for i in (0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25, 27, 28)]
    assert TextScores(**found["held_out"]) == text_scores(lines, known)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        logged = next(row for row in csv.DictReader(file) if row["test/spelling_accuracy/held_out"])
    assert float(logged["test/spelling_accuracy/early/nfe2"]) == poor
    assert float(logged["test/duplicates/held_out"]) == found["held_out"]["duplicates"]
    printed = capsys.readouterr().out
    assert f"{100 * poor:.1f} %" in printed and "held-out text" in printed
    assert "text_quality.json" in printed.replace("\n", "")


def _quality_on_ranks(folder: str) -> tuple[list[int], dict[str, Any] | None]:
    model, callback = Writer(), TextQuality(["early"], [3], num_samples=13, batch_size=4)
    trainer_of(Path(folder), callback, devices=2, strategy="ddp").test(model, Novel(), verbose=False)
    return model.drawn, callback.result


def test_two_ranks_share_the_samples_and_find_the_same_quality(tmp_path: Path, pool) -> None:
    (drawn_0, result_0), (drawn_1, result_1) = pool.run(_quality_on_ranks, str(tmp_path / "two"), world_size=2)
    assert drawn_0 == list(range(0, 14, 2)) and drawn_1 == list(range(1, 14, 2))
    assert result_0 == result_1
    trainer = trainer_of(tmp_path / "one", TextQuality(["early"], [3], num_samples=13, batch_size=50))
    trainer.test(Writer(), Novel(), verbose=False)
    one, two = (json.loads((tmp_path / name / "text_quality.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_quality_during_training_is_logged_every_nth_epoch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    callback = TextQuality(["early"], [3], num_samples=5, every_n_epochs=2)
    trainer = trainer_of(tmp_path, callback, logger=logger, max_epochs=5)
    trainer.fit(Writer(), Novel())
    column = "val/spelling_accuracy/early/nfe3"
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file) if row[column]] == [1, 3]
    assert column in trainer.callback_metrics
    assert not (tmp_path / "text_quality.json").exists()


def test_texts_of_no_length_and_beyond_ascii_are_gathered_as_they_are(tmp_path: Path) -> None:
    class Strange(Writer):
        def sample(self, index_B: Tensor, **options: Any) -> TextSamples:
            return TextSamples(["", "é  ", " “ü”"][: len(index_B)] if self.strange else [""] * len(index_B), 1)

    for strange in (True, False):
        seen = []

        class Watched(TextQuality):
            def score(self, trainer: Trainer, samples: list[str], reference: Any, seen=seen) -> dict[str, Any]:
                seen.append(samples)
                return super().score(trainer, samples, reference)

        model = Strange()
        model.strange = strange
        trainer_of(tmp_path, Watched(["early"], [1], num_samples=3)).test(model, Novel(), verbose=False)
        assert seen[0] == (["", "é  ", " “ü”"] if strange else ["", "", ""])


class NoReference(Novel):
    reference_text = property()  # type: ignore[assignment]


class Painter(Writer):
    def sample(self, index_B: Tensor, **options: Any) -> Samples:  # type: ignore[override]
        return Samples(torch.zeros(len(index_B), 1, 8, 8), 1)


def test_mistakes_are_found_with_their_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="TextQuality: Writer has no sampler 'lat'; did you mean late"):
        trainer_of(tmp_path, TextQuality(["lat"], [1]), max_epochs=1).fit(Writer(), Novel())
    with pytest.raises(TypeError, match=r"held-out lines of text, .*NoReference without them: .*reference_text\(\)"):
        trainer_of(tmp_path, TextQuality(["late"], [1]), max_epochs=1).fit(Writer(), NoReference())
    with pytest.raises(TypeError, match="Texts are wanted, and the module's `sample` gave Samples"):
        trainer_of(tmp_path, TextQuality(["late"], [1])).test(Painter(), Novel(), verbose=False)

    class Both(Novel):
        feature_extractor = "fd_digits_mlp"

        def reference_images(self) -> Tensor:
            return torch.zeros(40, 1, 8, 8, dtype=torch.uint8)

    images = SampleQuality(["late"], [1], num_samples=10, kid_subset_size=5)
    with pytest.raises(TypeError, match="Images are needed, but the module's `sample` gave TextSamples"):
        trainer_of(tmp_path, images).test(Writer(), Both(), verbose=False)
    for options, message in (
        ({"samplers": []}, "TextQuality wants at least one sampler"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size and every_n_epochs must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TextQuality(**{"samplers": ["late"], "nfes": [1], **options})

    def missing() -> None:
        raise ImportError("pip install 'lightning-zoo[eval]'")

    monkeypatch.setattr("zoo.callbacks.text_quality.english_dictionary", missing)
    with pytest.raises(ImportError, match="eval"):  # before the first step
        trainer_of(tmp_path, TextQuality(["late"], [1], every_n_epochs=1), max_epochs=1).fit(Writer(), Novel())
    with pytest.raises(ImportError, match="eval"):
        trainer_of(tmp_path, TextQuality(["late"], [1])).test(Writer(), Novel(), verbose=False)
    trainer_of(tmp_path, TextQuality(["late"], [1]), max_epochs=1).fit(Writer(), Novel())  # where nothing is measured


# Writers


class Ids(Dataset[dict[str, Any]]):
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"index": self.ids[position]}


class Teller(lightning.LightningModule):
    """Predicts a text for each sample id, and if wanted its three steps."""

    def __init__(self, trajectory: bool = False, end: str = "") -> None:
        super().__init__()
        self.trajectory, self.end = trajectory, end

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        ids = batch["index"].tolist()
        found: dict[str, Any] = {"index": batch["index"], "text": [f" tale {i} é {self.end}" for i in ids]}
        if self.trajectory:
            found["trajectory"] = [[f"{i} step {step}" for step in range(12)] for i in ids]
        return found


def predict(folder: Path, callback: Callback, ids: list[int], model: Teller | None = None, **options: Any) -> Path:
    loader = DataLoader(Ids(ids), batch_size=4)
    trainer_of(folder, callback, **options).predict(model or Teller(), loader, return_predictions=False)
    return folder / "predictions"


def test_texts_are_lines_in_the_order_of_their_ids(tmp_path: Path, capsys) -> None:
    folder = predict(tmp_path, TextWriter(), [7, 2, 9, 4, 0, 11])
    assert (folder / "samples.txt").read_text(encoding="utf-8") == "".join(f" tale {i} é \n" for i in (0, 2, 4, 7, 9, 11))
    assert [path.name for path in folder.iterdir()] == ["samples.txt"]
    assert str(folder / "samples.txt") in capsys.readouterr().out
    folder = predict(tmp_path, TextWriter("some.txt", num_samples=2), [7, 2, 9, 4, 0, 11])
    assert (folder / "some.txt").read_text(encoding="utf-8").splitlines() == [" tale 0 é ", " tale 2 é "]


def test_trajectories_are_blocks_of_numbered_steps(tmp_path: Path) -> None:
    folder = predict(tmp_path, TextWriter(num_samples=2, trajectory=True), [5, 3, 8], Teller(trajectory=True))
    blocks = (folder / "trajectory.txt").read_text().split("\n\n")
    assert blocks[0].splitlines() == ["sample 3", *(f"{step + 1:2} 3 step {step}" for step in range(12))]
    assert blocks[1].startswith("sample 5\n 1 5 step 0\n") and blocks[2:] == [""]
    assert len((folder / "samples.txt").read_text(encoding="utf-8").splitlines()) == 2


def test_json_lines_hold_text_without_its_trajectory(tmp_path: Path) -> None:
    folder = predict(tmp_path, JSONLWriter(), [1, 0], Teller(trajectory=True))
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"index": 0, "text": " tale 0 é "}, {"index": 1, "text": " tale 1 é "}]


def _predict_on_ranks(folder: str) -> None:
    predict(Path(folder), TextWriter(trajectory=True), list(range(13)), Teller(trajectory=True), devices=2, strategy="ddp")


def test_two_ranks_write_what_one_writes(tmp_path: Path, pool) -> None:
    pool.run(_predict_on_ranks, str(tmp_path / "two"), world_size=2)
    one = predict(tmp_path / "one", TextWriter(trajectory=True), list(range(13)), Teller(trajectory=True))
    two = tmp_path / "two" / "predictions"
    assert sorted(path.name for path in two.iterdir()) == ["samples.txt", "trajectory.txt"]
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()
    assert len((one / "samples.txt").read_text(encoding="utf-8").splitlines()) == 13


def test_predictions_that_cannot_be_written_as_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'Teller to return "trajectory".*switch it on in the module'):
        predict(tmp_path, TextWriter(trajectory=True), [0])
    for end in ("\nb", "\n", "\r"):
        with pytest.raises(ValueError, match="sample 3 has a line break: use JSONLWriter"):
            predict(tmp_path, TextWriter(), [3], Teller(end=end))

    class Silent(Teller):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            return {"index": batch["index"]}

    with pytest.raises(ValueError, match=r'Silent to return "text", .*\[\'index\'\]: drop this writer'):
        predict(tmp_path, TextWriter(), [0], Silent())
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        TextWriter(num_samples=0)
    with pytest.raises(ValueError, match="plain file name"):
        TextWriter("../samples.txt")
    with pytest.raises(ValueError, match=r"'trajectory\.txt' is the trajectories' file"):
        TextWriter("trajectory.txt", trajectory=True)
