"""The weighter trains, resumes exactly, leaves out a fold, sees a collapse, and writes weights that the loss can look up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from small_llama import LLAMA, QUIET
from torch import Tensor

from zoo.kpod.artefacts import TokenWeights
from zoo.kpod.weighter_module import TokenWeighter
from zoo.kpod.weights_writer import TokenWeightsWriter
from zoo.lm import HFBackbone
from zoo.lm.backbone import Backbone

PRINTS = {"data": "dd", "tokenizer": "tt"}


class Bytes:
    """A tokenizer of single bytes."""

    vocab_size, eos_id = 259, 257

    def decode(self, ids: Any) -> str:
        return "".join(chr(i) for i in ids if i < 256)


class Sums(LightningDataModule):
    """Sixteen examples of one digit more."""

    def __init__(self, marked: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.fingerprint = Bytes(), PRINTS

    def batch(self, index: int) -> dict[str, Tensor]:
        question, rationale, answer = f"Q{index % 8}", f"so {index % 8}+1={index % 8 + 1}", f"{index % 8 + 1}"
        ids = torch.tensor([*(question + rationale + answer).encode(), 257])
        steps, labels = torch.full_like(ids, -1), ids.clone()
        steps[2 : 2 + len(rationale)], labels[:2] = 0, -100
        return {"input_ids": ids, "labels": labels, "step_ids": steps, "attention_mask": torch.ones_like(ids),
                "index": torch.tensor(index)}  # fmt: skip

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([self.batch(i) for i in range(16)], batch_size=4)

    val_dataloader = predict_dataloader = train_dataloader


def student(**options: Any) -> HFBackbone:
    return HFBackbone(dict(LLAMA), **options)


def weighter(**options: Any) -> TokenWeighter:
    torch.manual_seed(0)
    options = {"warmup_steps": 2, "ramp_steps": 2, "heads": 2, "on_collapse": "warn", **options}
    return TokenWeighter(student(), **options)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(default_root_dir=folder, num_sanity_val_steps=0, **{**QUIET, "max_epochs": 2, **options})


@pytest.fixture(autouse=True)
def no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield


def test_trains_and_logs_and_continues_exactly(tmp_path: Path) -> None:
    whole, run = weighter(), trainer(tmp_path)
    frozen = whole.learner.embedding.weight.clone()
    run.fit(whole, Sums())
    logged = run.callback_metrics
    assert {"val/gap", "val/mean_weight", "val/auc", "val/answer_loss_hard", "train/kept"} <= logged.keys()
    torch.testing.assert_close(logged["val/gap"], logged["val/answer_loss_masked"] - logged["val/answer_loss_kept"])
    assert torch.equal(whole.learner.embedding.weight, frozen)
    first = trainer(tmp_path, max_epochs=1)
    first.fit(weighter(), Sums())
    first.save_checkpoint(tmp_path / "half.ckpt")
    continued = weighter()
    trainer(tmp_path).fit(continued, Sums(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in continued.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    run.save_checkpoint(tmp_path / "whole.ckpt")
    again = TokenWeighter.load_from_checkpoint(tmp_path / "whole.ckpt")
    assert torch.equal(again.learner.mask_embedding, whole.learner.mask_embedding)


def test_predictions_of_the_folds_are_looked_up_for_every_example(tmp_path: Path) -> None:
    data, files = Sums(), []
    for fold in range(2):
        module, run = weighter(fold=fold, folds=2), trainer(tmp_path / str(fold), callbacks=[TokenWeightsWriter()])
        run.predict(module, data, return_predictions=False)
        files.append(tmp_path / str(fold) / "predictions" / "token_weights.safetensors")
    weights = TokenWeights.read(files, "tt", "dd")
    for index in range(16):
        example = data.batch(index)
        found = weights.lookup(example["index"][None], example["step_ids"][None])[0]
        assert torch.equal(found > 0, example["step_ids"] >= 0)
    page = files[0].with_suffix(".html").read_text()
    assert "example 0" in page and "example 1<" not in page and ">+</span>" in page


def test_fold_is_not_trained_on(tmp_path: Path) -> None:
    modules = []
    for change in (False, True):
        data = Sums()
        batch = data.batch
        if change:  # other answers in the fold that is left out

            def changed(i: int, batch: Any = batch) -> Any:
                made = batch(i)
                of_answer = (made["step_ids"] < 0) & (made["labels"] >= 0)
                return made | {"labels": made["labels"].masked_fill(of_answer, 99)} if i % 2 else made

            data.batch = changed  # type: ignore[method-assign]
        module = weighter(fold=1, folds=2)
        trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, data)
        modules.append(module.state_dict())
    assert all(torch.equal(one, modules[1][name]) for name, one in modules[0].items())


def test_collapse_is_an_error_a_warning_or_weights_of_one(tmp_path: Path) -> None:
    paths = tmp_path / "predictions" / "token_weights.safetensors"
    for treatment in ("error", "warn", "uniform"):
        module = weighter(on_collapse=treatment)
        module.learner.head.perceptron[-1].bias.data.fill_(-9.0)
        run = trainer(tmp_path, callbacks=[TokenWeightsWriter()])
        if treatment == "error":
            with pytest.raises(ValueError, match=r"collapsed, the mean weight is 0\.000: lower alpha"):
                run.predict(module, Sums(), return_predictions=False)
            assert not paths.exists()
            with pytest.raises(ValueError, match="collapsed"):
                trainer(tmp_path).fit(module, Sums())
            continue
        with pytest.warns(UserWarning, match="collapsed"):
            run.predict(module, Sums(), return_predictions=False)
        values = TokenWeights.read(paths, "tt", "dd").values
        assert bool((values == 1).all()) == (treatment == "uniform")


def test_lagrange_multiplier_moves_against_the_excess(tmp_path: Path) -> None:
    for ratio, sign in ((0.05, 1), (0.99, -1)):
        module = weighter(keep_ratio=ratio, warmup_steps=0)
        trainer(tmp_path, limit_val_batches=0).fit(module, Sums())
        assert module.multiplier is not None and sign * float(module.multiplier) > 0


class Narrow(HFBackbone):
    """A predictor whose tokenizer knows no plus sign."""

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        class Words:
            eos_token_id = 2

            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                return {"input_ids": [ord(c) - 40 for c in text if c.isdigit()]}

            def decode(self, ids: list[int]) -> str:
                return "".join(chr(i + 40) for i in ids)

        return Words()


def test_answers_are_written_in_the_vocabulary_of_the_predictor_or_refused(tmp_path: Path) -> None:
    module = weighter(predictor=Narrow({**LLAMA, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))
    module.trainer = trainer(tmp_path)
    module.trainer.datamodule = Sums()  # type: ignore[attr-defined]
    answers = module._own_answers(torch.tensor([[ord("7"), 257], [ord("3"), 257]]))
    assert answers.tolist() == [[ord("7") - 40, 2], [ord("3") - 40, 2]]
    with pytest.raises(ValueError, match=r"cannot write the answer '\+7'") as error:
        module._own_answers(torch.tensor([[ord("+"), ord("7"), 257]]))
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"tau": 0.0}, {"prefix_samples": 0}, {"keep_ratio": 1.0}, {"fold": 5}])
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"TokenWeighter: {next(iter(options))} must"):
        weighter(**options)


def test_student_is_any_backbone() -> None:
    assert isinstance(weighter().learner.predictor.backbone, Backbone)
