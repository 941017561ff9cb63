"""Training with divided experts is training in one process: losses, gradients, weights, averages, metrics, checkpoints."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from sweep import sweep
from torch import Tensor
from torch.distributed import get_rank, get_world_size
from torch.utils.data import DataLoader

from datamodules.base.datamodule import ZooDataModule
from strategies import ExpertParallelStrategy
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import EMA, RunCheckpoint
from zoo.ling import Ling, LingConfig, LingDPO
from zoo.ling.multiple_choice import loglikelihoods
from zoo.module import ZooModule
from zoo.strategy_contract import gradient_norm

GLOBAL_BATCH, LENGTH = 8, 6
CONFIG = LingConfig(
    vocab_size=24,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=4,
    num_experts_per_tok=2,
    num_shared_experts=1,
    moe_intermediate_size=8,
    intermediate_size=16,
    first_k_dense_replace=1,
    initializer_range=0.3,
    pad_token_id=None,
    eos_token_id=None,
)


class Sequences(ZooDataModule):
    """Random sequences in which the next token depends on the last."""

    def __init__(self, batch_size: int, num_predict: int = 5) -> None:
        super().__init__(batch_size=batch_size)
        self.num_predict = num_predict

    def sequences(self, number: int, key: int) -> list[dict[str, Tensor]]:
        ids = torch.randint(CONFIG.vocab_size, (number, LENGTH), generator=torch.Generator().manual_seed(key))
        ids[:, 1::2] = ids[:, ::2] * 5 % CONFIG.vocab_size
        return [{"input_ids": row, "index": torch.tensor(i)} for i, row in enumerate(ids)]

    def train_dataloader(self) -> Any:
        return self.train_loader(self.sequences(5 * GLOBAL_BATCH, 1))

    def val_dataloader(self) -> Any:
        return self.eval_loader(self.sequences(18, 2))

    def test_dataloader(self) -> Any:
        return self.eval_loader(self.sequences(14, 3))

    def predict_dataloader(self) -> Any:
        """One sample a batch: some ranks have more batches than others, as Lightning shares them out."""
        return DataLoader(self.sequences(self.num_predict, 4), batch_size=1)


class Recording(Ling):
    """Keeps losses and norms; a prediction takes a number of passes that depends on the sample."""

    def __init__(self, config: LingConfig = CONFIG, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.seen: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(float(gradient_norm(self.trainer.strategy, optimizer)))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        for _ in range(1 + int(batch["index"])):
            ids = torch.cat([ids, self.network(ids).logits[:, -1:].argmax(-1)], 1)
        return {"index": batch["index"], "ids": ids}


@dataclass(frozen=True)
class Setting:
    """How a run is done, whatever the number of processes."""

    dtype: torch.dtype = torch.float64
    precision: Any = "64-true"
    experts: str = "auto"
    accumulate: int = 1
    clip: float | None = None
    average: bool = False
    recompute: bool = False
    warmup: int = 0
    steps: int = 6
    freeze: tuple[str, ...] = ()
    writes_beside: bool = False


@dataclass
class Outcome:
    """What one process saw of a run."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)
    predictions: dict[int, list[int]] = field(default_factory=dict)


def strategy_of(name: str) -> Strategy | str:
    """``one``, ``ddp``, or a number of ranks that divide the experts."""
    return ExpertParallelStrategy(int(name)) if name.isdigit() else {"one": "auto", "ddp": "ddp"}[name]


def trainer_of(folder: Path, strategy: str, setting: Setting, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=get_world_size(),
        strategy=strategy_of(strategy),
        precision=setting.precision,
        max_steps=setting.steps // setting.accumulate,
        accumulate_grad_batches=setting.accumulate,
        gradient_clip_val=setting.clip,
        callbacks=[EMA(decay=0.8)] if setting.average else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=AsyncCheckpointIO() if setting.writes_beside else None,
        **options,
    )


def model_of(setting: Setting) -> Recording:
    torch.set_default_dtype(setting.dtype)
    seed_everything(3, verbose=False)
    return Recording(
        experts=setting.experts,
        aux_scope="global",
        router_warmup_steps=setting.warmup,
        activation_checkpointing=setting.recompute,
        freeze=list(setting.freeze),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )


def weights_of(model: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in LightningModule.state_dict(model).items()}


def run(folder: Path, strategy: str, setting: Setting, resume: str | None = None, save: str | None = None) -> Outcome:
    """Fit, and save or evaluate."""
    model, data = model_of(setting), Sequences(GLOBAL_BATCH // get_world_size())
    trainer = trainer_of(folder, strategy, setting)
    if save:
        trainer.callbacks.append(RunCheckpoint(every_n_steps=3, minutes=None, folder=folder / save))
    trainer.fit(model, data, ckpt_path=resume and folder / resume)
    outcome = Outcome(model.seen, model.norms, weights_of(model))
    if save:
        return outcome
    (validation,) = trainer.validate(model, data, verbose=False)
    (test,) = trainer.test(model, data, verbose=False)
    predictions = trainer.predict(model, data)
    assert predictions is not None
    # How evenly experts are used is a mean over the batches of each process, so it knows how many processes there are.
    outcome.metrics = {k: v for k, v in {**validation, **test}.items() if "violation" not in k}
    outcome.predictions = {int(p["index"]): p["ids"][0].tolist() for p in predictions}
    assert weights_of(model).keys() == outcome.weights.keys()
    assert all(torch.equal(value, outcome.weights[name]) for name, value in weights_of(model).items())
    return outcome


def assert_same(ranks: list[Outcome], one: Outcome, tolerance: float) -> None:
    mean_losses = torch.tensor([rank.losses for rank in ranks], dtype=torch.float64).mean(0).tolist()
    assert mean_losses == pytest.approx(one.losses, rel=tolerance)
    for rank in ranks:
        assert rank.norms == pytest.approx(one.norms, rel=tolerance)
        assert rank.weights.keys() == one.weights.keys()
        for name, value in rank.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=tolerance, atol=tolerance, msg=name)
        assert rank.metrics == pytest.approx(one.metrics, rel=tolerance)
    assert {k: v for rank in ranks for k, v in rank.predictions.items()} == one.predictions


# fmt: off
SETTINGS = {
    "plain": Setting(),
    "accumulated, clipped, averaged, recomputed, noisy": Setting(accumulate=2, clip=0.3, average=True, recompute=True, warmup=2),
    "frozen experts": Setting(freeze=("model.layers.1.mlp.experts.*",), clip=0.3),
    "experts alone": Setting(
        freeze=(
            "model.word_embeddings*", "model.norm*", "lm_head*", "*.attention.*", "*layernorm*", "*.mlp.gate.*",
            "*.shared_experts.*", "model.layers.0.mlp.*",
        ),
        accumulate=2, clip=0.1,
    ),
    "32 bit, each rank as its number of tokens wants": Setting(torch.float32, "32-true", "auto", clip=0.3),
}
# fmt: on


QUICK = [("accumulated, clipped, averaged, recomputed, noisy", 2)]


@pytest.mark.parametrize(("name", "world_size"), [
    pytest.param(name, size, marks=[] if (name, size) in QUICK else [pytest.mark.slow]) for name in SETTINGS for size in (2, 4)
])  # fmt: skip
def test_divided_experts_train_as_in_one_process(pool: RankPool, tmp_path: Path, name: str, world_size: int) -> None:
    setting = SETTINGS[name]
    tolerance = 1e-10 if setting.dtype == torch.float64 else 2e-3
    (one,) = pool.run(run, tmp_path, "one", setting, world_size=1)
    assert len(one.losses) >= 5 and len(set(one.losses)) == len(one.losses)
    assert setting.clip is None or max(one.norms) > setting.clip
    assert_same(pool.run(run, tmp_path, "2", setting, world_size=world_size), one, tolerance)


RESUMED = Setting(steps=6, clip=0.3, average=True)


@pytest.fixture(scope="module")
def interrupted(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Checkpoints in the middle of an epoch, by one process, by two groups of two ranks, and a whole run."""
    folder = tmp_path_factory.mktemp("interrupted")
    half = replace(RESUMED, steps=3)
    (one,) = pool.run(run, folder, "one", RESUMED, world_size=1)
    pool.run(run, folder, "one", half, save="one", world_size=1)
    pool.run(run, folder, "2", half, save="divided", world_size=4)
    return folder, one


@pytest.fixture(scope="module")
def beside(pool: RankPool, interrupted: tuple[Path, Outcome]) -> None:
    """A checkpoint that is written while training goes on."""
    pool.run(run, interrupted[0], "2", replace(RESUMED, steps=3, writes_beside=True), save="beside", world_size=4)


def test_checkpoints_are_those_of_one_process(interrupted: tuple[Path, Outcome]) -> None:
    compare_checkpoints(interrupted[0], "divided")


@pytest.mark.slow
@pytest.mark.usefixtures("beside")
def test_checkpoints_written_beside_training_are_those_of_one_process(interrupted: tuple[Path, Outcome]) -> None:
    compare_checkpoints(interrupted[0], "beside")


def compare_checkpoints(folder: Path, written: str) -> None:
    one, divided = (read_checkpoint(folder / name / "last.ckpt") for name in ("one", written))

    def compare(a: Any, b: Any, where: str) -> None:
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=where)
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}/{key}")
        elif isinstance(a, list):
            for number, pair in enumerate(zip(a, b, strict=True)):
                compare(*pair, f"{where}/{number}")

    assert divided["state_dict"]["network.model.layers.1.mlp.experts.down_proj"].shape == (4, 8, 8)
    assert {"current_model_state", "averaging_state"} <= divided.keys()
    for key in ("state_dict", "current_model_state", "optimizer_states", "callbacks"):
        compare(one[key], divided[key], key)


@pytest.mark.parametrize(
    ("saved", "strategy", "world_size"),
    [
        ("one", "2", 2),
        pytest.param("divided", "2", 4, marks=pytest.mark.slow),
        pytest.param("divided", "4", 4, marks=pytest.mark.slow),
        pytest.param("divided", "ddp", 2, marks=pytest.mark.slow),
        ("divided", "one", 1),
    ],
)
def test_a_run_continues_under_any_strategy(
    pool: RankPool, interrupted: tuple[Path, Outcome], saved: str, strategy: str, world_size: int
) -> None:
    folder, one = interrupted
    ranks = pool.run(run, folder, strategy, RESUMED, f"{saved}/last.ckpt", world_size=world_size)
    one = replace(one, losses=one.losses[3:], norms=one.norms[3:])
    assert len(ranks[0].losses) == 3
    if strategy == "ddp":  # whose gradients are reduced, but of which this test asks no whole norm
        one = replace(one, norms=ranks[0].norms)
    assert_same(ranks, one, 1e-10)


def share(folder: Path) -> tuple[list[str], list[int], float]:
    """Save the weights when training has ended; test a checkpoint; count parameters that the optimizer has."""
    setting = Setting(steps=2)
    model, data = model_of(setting), Sequences(GLOBAL_BATCH // get_world_size())
    trainer = trainer_of(folder, "2", setting)
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "end.ckpt")
    if trainer.is_global_zero:
        model.save_pretrained(folder / "pretrained")
    trainer.strategy.barrier()
    shapes = [len(p) for g in trainer.optimizers[0].param_groups for p in g["params"] if p.dim() == 3]
    whole = ZooModule.from_pretrained(folder / "pretrained") if trainer.is_global_zero else model
    same = [name for name, value in LightningModule.state_dict(whole).items() if not torch.equal(value, model.state_dict()[name])]
    fresh = model_of(setting)
    (tested,) = trainer_of(folder, "2", setting).test(fresh, data, ckpt_path=folder / "end.ckpt", verbose=False)
    (again,) = trainer.test(model, data, verbose=False)
    assert tested == again
    return same, shapes, tested["test/loss"]


def test_weights_are_shared_whole(pool: RankPool, tmp_path: Path) -> None:
    for different, lengths, loss in pool.run(share, tmp_path, world_size=2):
        assert different == [] and lengths == [4] * 4 and loss > 0
    loaded = Recording.load_from_checkpoint(tmp_path / "end.ckpt")
    saved = ZooModule.from_pretrained(tmp_path / "pretrained")
    assert type(saved) is Recording
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in loaded.state_dict().items())


class Pairs(ZooDataModule):
    """Random answers to prefer and to avoid."""

    def train_dataloader(self) -> Any:
        ids = torch.randint(CONFIG.vocab_size, (24, 4, LENGTH), generator=torch.Generator().manual_seed(5))
        names = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
        return self.train_loader([dict(zip(names, rows[[0, 0, 1, 1]], strict=True)) for rows in ids])


def prefer(folder: Path, strategy: str, resume: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Preference training, whose reference is a copy made when experts are divided; its weights at the start and end."""
    setting = Setting(steps=4 if resume else 2)
    torch.set_default_dtype(setting.dtype)
    seed_everything(3, verbose=False)
    model = LingDPO(config=CONFIG, aux_scope="global", optimizer=partial(torch.optim.AdamW, lr=1e-2))
    start = {name: value.clone() for name, value in model.network.state_dict().items()}
    trainer = trainer_of(folder, strategy, setting)
    trainer.callbacks.append(RunCheckpoint(every_n_steps=2, minutes=None, folder=folder))
    trainer.fit(model, Pairs(GLOBAL_BATCH // get_world_size()), ckpt_path=folder / "last.ckpt" if resume else None)
    if not resume:  # the reference is whole again in every process, as the module is
        assert all(torch.equal(value, start[name]) for name, value in model._reference[0].state_dict().items())
    return start, weights_of(model)


def test_a_reference_model_is_divided_and_kept(pool: RankPool, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("one", "divided")}
    ((start, _),) = pool.run(prefer, folders["one"], "one", world_size=1)
    pool.run(prefer, folders["divided"], "2", world_size=2)
    reference = read_checkpoint(folders["divided"] / "last.ckpt")["ling_reference"]
    assert reference.keys() == start.keys() and all(torch.equal(value, start[name]) for name, value in reference.items())
    ((_, one),) = pool.run(prefer, folders["divided"], "one", True, world_size=1)
    for _, divided in pool.run(prefer, folders["one"], "2", True, world_size=2):
        for name, value in divided.items():
            torch.testing.assert_close(value, one[name], rtol=1e-10, atol=1e-10, msg=name)


class Uneven(Callback):
    """Runs the network in a hook of rank 1 alone."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with trainer.strategy.uneven_forwards():
            if trainer.global_rank == 1:
                self.logits = pl_module.network(torch.ones(2, 3, dtype=torch.int64)).logits
        trainer.strategy.barrier()


def uneven(folder: Path, precisions: list[Any]) -> list[tuple[list[float], dict[str, float]]]:
    return [uneven_in(folder, precision) for precision in precisions]


def uneven_in(folder: Path, precision: Any) -> tuple[list[float], dict[str, float]]:
    """Ranks with unequally many batches of validation, in two loaders, and passes outside of steps."""
    setting = Setting(torch.float32, precision, steps=4)
    model, data = model_of(setting), Sequences(GLOBAL_BATCH // get_world_size())
    rank = get_rank()
    loaders = [DataLoader(data.sequences(count, rank), batch_size=1) for count in ([3, 1][rank], [2, 4][rank])]
    trainer = trainer_of(folder, "2", setting, num_sanity_val_steps=1, use_distributed_sampler=False, val_check_interval=2,
                         limit_val_batches=3)  # fmt: skip
    trainer.callbacks.append(Uneven())
    trainer.fit(model, data.train_dataloader(), loaders)
    return model.seen, {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("precisions", sweep([["32-true"], ["32-true", "bf16-true"], ["32-true", "bf16-mixed"]]))
def test_ranks_may_have_unequally_many_batches_of_evaluation(pool: RankPool, tmp_path: Path, precisions: list[str]) -> None:
    whole: list[float] = []
    for first, second in zip(*pool.run(uneven, tmp_path, precisions, world_size=2), strict=True):
        assert first[1]["val/loss"] == second[1]["val/loss"]
        losses = [sum(pair) / 2 for pair in zip(first[0], second[0], strict=True)]
        whole = whole or losses
        assert losses == pytest.approx(whole, rel=0.02)


class Scoring(Callback):
    """Scores texts of a length that differs between ranks."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        length = 1 + 5 * trainer.global_rank
        pairs = [([1, 2], [3] * length), ([4], [5, 6])]
        self.found = loglikelihoods(pl_module.network, pairs, 1, logit_tokens=2, agree=pl_module._largest).logp_N.tolist()


def score(folder: Path, strategy: str) -> list[float]:
    setting, scoring = Setting(), Scoring()
    trainer = trainer_of(folder, strategy, setting)
    trainer.callbacks.append(scoring)
    trainer.validate(model_of(setting), Sequences(GLOBAL_BATCH // get_world_size()), verbose=False)
    return scoring.found


def test_ranks_may_score_texts_of_different_lengths(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(score, tmp_path, "2", world_size=2)
    ((whole, common),) = pool.run(score, tmp_path, "one", world_size=1)
    assert first == pytest.approx([whole, common], rel=1e-10)
    assert second[1] == pytest.approx(common, rel=1e-10) and second[0] < whole


def refusals(folder: Path, kinds: list[str]) -> list[str]:
    return [refuse(folder, kind) for kind in kinds]


def refuse(folder: Path, kind: str) -> str:
    setting = Setting(torch.float32, "16-mixed" if kind == "16-mixed" else "32-true")
    model: LightningModule = BoringModel() if kind == "no experts" else model_of(setting)
    if kind == "experts":
        model = Recording(CONFIG.replace(num_experts=3))
    trainer = trainer_of(folder, "3" if kind == "processes" else "2", setting)
    if kind == "16-mixed":
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu")
    try:
        trainer.fit(model, Sequences(GLOBAL_BATCH // 2))
    except ValueError as error:
        return str(error)
    return ""


def test_what_does_not_fit_is_said_before_the_first_step(pool: RankPool, tmp_path: Path) -> None:
    messages = {
        "processes": "expert_parallel_size=3 does not divide the 2 processes",
        "experts": "expert_parallel_size=2 does not divide the 3 experts",
        "no experts": "BoringModel has no experts to divide",
        "16-mixed": "use bf16-mixed",
    }
    for said in pool.run(refusals, tmp_path, list(messages)):
        for found, message in zip(said, messages.values(), strict=True):
            assert message in found


def test_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="expert_parallel_size=0"):
        ExpertParallelStrategy(0)
