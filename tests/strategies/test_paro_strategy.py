"""Runs of Lightning under PaRO are those of one process: accumulation, clipping, schedules, averages, guards, evaluation."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from datamodules import Digits, Flights
from datamodules.base.datamodule import ZooDataModule
from strategies import PaROStrategy
from zoo.bfn.module import BFN
from zoo.bfn.networks import ResidualMLP
from zoo.callbacks import EMA, SpikeGuard
from zoo.ctr import XDeepFM
from zoo.emigm import EMIGM, Architecture, Masking, MaskSampler, PixelCodec
from zoo.ling import Ling, LingConfig

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
        return DataLoader(self.sequences(5, 4), batch_size=1)


class Recording(Ling):
    """Keeps losses and norms; a prediction takes a number of passes that depends on the sample."""

    def __init__(self, config: LingConfig = CONFIG, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.seen: list[float] = []
        self.norms: list[float] = []
        self.stats: list[dict[str, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, PaROStrategy):
            self.norms.append(float(strategy.gradient_norm()))
            self.stats.append({**strategy.comm_stats(), **strategy.memory_report()})
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            self.norms.append(float(norm))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        for _ in range(1 + int(batch["index"])):
            ids = torch.cat([ids, self.network(ids).logits[:, -1:].argmax(-1)], 1)
        return {"index": batch["index"], "ids": ids}


@dataclass(frozen=True)
class Setting:
    """How a run is done; without a code, in one process."""

    code: str | None = None
    precision: Any = "64-true"
    options: tuple[tuple[str, Any], ...] = ()
    freeze: tuple[str, ...] = ("model.layers.1.mlp.experts.*",)


@dataclass
class Outcome:
    """What one process saw of a run."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    metrics: dict[str, float]
    predictions: dict[int, list[int]]
    applied: int
    stats: list[dict[str, int]]


def run(folder: Path, setting: Setting) -> Outcome:
    """Fit with validation inside, then validate, test and predict."""
    torch.set_default_dtype(torch.float64 if setting.precision == "64-true" else torch.float32)
    seed_everything(3, verbose=False)
    model = Recording(
        aux_scope="global",
        router_warmup_steps=2,
        activation_checkpointing=True,
        freeze=list(setting.freeze),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=partial(CosineAnnealingLR, T_max=8),
    )
    data = Sequences(GLOBAL_BATCH // get_world_size())
    code = setting.code
    trainer = Trainer(
        accelerator="cpu",
        devices=get_world_size(),
        strategy="auto" if code is None else PaROStrategy(code, group_size=2, **dict(setting.options)),
        precision=setting.precision,
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        callbacks=[SpikeGuard(warmup=2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, data)
    inside = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    (validation,) = trainer.validate(model, data, verbose=False)
    (test,) = trainer.test(model, data, verbose=False)
    predictions = trainer.predict(model, data)
    assert predictions is not None
    metrics = {f"inside/{key}": value for key, value in inside.items()} | dict(validation) | dict(test)
    return Outcome(
        losses=model.seen,
        norms=model.norms,
        weights={name: value.detach().clone() for name, value in LightningModule.state_dict(model).items()},
        # How evenly experts are used is a mean over the batches of each process, so it knows how many processes there are.
        metrics={key: value for key, value in metrics.items() if "violation" not in key},
        predictions={int(p["index"]): p["ids"][0].tolist() for p in predictions},
        applied=model.applied_steps,
        stats=model.stats,
    )


def assert_same(ranks: list[Outcome], one: Outcome, tolerance: float) -> None:
    mean_losses = torch.tensor([rank.losses for rank in ranks], dtype=torch.float64).mean(0).tolist()
    assert mean_losses == pytest.approx(one.losses, rel=tolerance)
    for rank in ranks:
        assert rank.norms == pytest.approx(one.norms, rel=tolerance)
        assert rank.weights.keys() == one.weights.keys()
        for name, value in rank.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=tolerance, atol=tolerance, msg=name)
        assert rank.metrics == pytest.approx(one.metrics, rel=tolerance)
        assert rank.applied == one.applied
    assert {k: v for rank in ranks for k, v in rank.predictions.items()} == one.predictions


PREFETCHING = Setting("GGG", options=(("prefetch", 2), ("block_classes", ["Block"])))


@pytest.fixture(scope="module")
def alone(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run of one process, in double precision."""
    found: Outcome = pool.run(run, tmp_path_factory.mktemp("alone"), Setting(), world_size=1)[0]
    assert len(found.losses) == 10 and max(found.norms) > 0.3 and {"inside/val/loss"} & found.metrics.keys()
    return found


@pytest.mark.parametrize("setting", [Setting("IIG"), pytest.param(PREFETCHING, marks=pytest.mark.slow)], ids=["IIG", "GGG"])
def test_a_run_of_ling_is_that_of_one_process(pool: RankPool, tmp_path: Path, alone: Outcome, setting: Setting) -> None:
    assert_same(pool.run(run, tmp_path, setting, world_size=4), alone, 1e-10)


@pytest.mark.slow
def test_whole_parameters_are_those_of_one_process_and_take_more_memory(pool: RankPool, tmp_path: Path, alone: Outcome) -> None:
    settings = [PREFETCHING, Setting("NIG"), Setting("NNN")]
    every = [pool.run(run, tmp_path, setting, world_size=4) for setting in settings]
    for ranks in every[1:]:
        assert_same(ranks, alone, 1e-10)
    sharded, whole = every[0][0].stats[-1], every[2][0].stats[-1]
    assert sharded["gathered"] == 0 and sharded["optimizer"] * 4 == whole["optimizer"]


@pytest.mark.slow
def test_half_precision_with_float32_masters_has_the_same_curve_but_for_rounding(pool: RankPool, tmp_path: Path) -> None:
    (one,) = pool.run(run, tmp_path, Setting(precision="32-true"), world_size=1)
    ranks = pool.run(run, tmp_path, Setting("IIG", "bf16-true"), world_size=4)
    bf16 = torch.tensor([rank.losses for rank in ranks]).mean(0)
    torch.testing.assert_close(bf16, torch.tensor(one.losses), rtol=0.03, atol=0.03)
    assert all(value.dtype != torch.float32 for value in ranks[0].weights.values() if value.is_floating_point())


def bfn() -> LightningModule:
    return BFN(network=ResidualMLP(width=16, depth=2), likelihood_steps=(0, 5), optimizer=partial(torch.optim.AdamW, lr=1e-2))


def emigm() -> LightningModule:
    return EMIGM(
        codec=PixelCodec((1, 8, 8), mean=0.3052, std=0.3761),
        architecture=Architecture(width=16, encoder_depth=1, decoder_depth=2, num_heads=2, head_depth=1, head_width=16),
        num_classes=10,
        patch_size=2,
        buffer_size=2,
        attn_dropout=0.0,
        proj_dropout=0.0,
        masking=Masking(law="fixed_count"),
        sampler=MaskSampler(num_iter=2, head_steps=2),
        samples_per_class=1,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )


@dataclass
class Images:
    """What one process saw of a run of a model of images."""

    weights: dict[str, Tensor]
    metrics: dict[str, float]
    images: dict[int, Tensor]


def trainer_of(folder: Path, code: str | None, **options: Any) -> Trainer:
    """One that trains an epoch in float64 and writes nothing; without a code in this process alone."""
    return Trainer(
        accelerator="cpu",
        devices=get_world_size(),
        strategy="auto" if code is None else PaROStrategy(code, group_size=2),
        precision="64-true",
        max_epochs=1,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def images(folder: Path, make: Callable[[], LightningModule], code: str | None) -> Images:
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    model = make()
    draw = getattr(model, "masking", None) and model.masking.draw
    if draw:  # times are each rank's own otherwise
        model.masking.draw = lambda random, num_tokens, time=None: draw(random, num_tokens, 0.3 if time is None else time)
    trainer = trainer_of(
        folder,
        code,
        limit_train_batches=5,
        limit_val_batches=1,
        limit_test_batches=1,
        accumulate_grad_batches=2,
        callbacks=[EMA(decay=0.9)],
    )
    data = Digits(batch_size=32 // get_world_size(), predict_samples=5)
    trainer.fit(model, data)
    inside = {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name}
    if draw:
        del model.masking.draw
    batches = trainer.predict(model, data)
    assert batches is not None
    return Images(
        {name: value.detach().clone() for name, value in LightningModule.state_dict(model).items()},
        inside,
        {int(index): image for batch in batches for index, image in zip(batch["index"], batch["images"], strict=True)},
    )


@pytest.mark.parametrize(("make", "code"), [(bfn, "IIG"), pytest.param(emigm, "GGG", marks=pytest.mark.slow)])
def test_models_of_images_run_unchanged(pool: RankPool, tmp_path: Path, make: Callable[[], LightningModule], code: str) -> None:
    """Averaged weights, validation of the average inside the run, and samples, one rank with more of them than others."""
    (one,) = pool.run(images, tmp_path, make, None, world_size=1)
    for ours in pool.run(images, tmp_path, make, code, world_size=4):
        assert ours.weights.keys() == one.weights.keys() and one.metrics
        for name, value in ours.weights.items():
            torch.testing.assert_close(value, one.weights[name], rtol=1e-10, atol=1e-10, msg=name)
        assert ours.metrics == pytest.approx(one.metrics, rel=1e-8)
        for index, image in ours.images.items():
            torch.testing.assert_close(image, one.images[index], rtol=1e-8, atol=1e-8)


def clicks(folder: Path, code: str | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights of a model of clicks after a run, and what it has measured in it."""
    torch.set_default_dtype(torch.float64)
    seed_everything(3, verbose=False)
    data = Flights(batch_size=32 // get_world_size(), train_rows=160)
    data.prepare_data()
    data.setup("fit")
    model = XDeepFM(
        list(data.field_dims),
        data.num_dense,
        embed_dim=4,
        cin=(4,),
        dnn=(8,),
        dropout=0.5,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    trainer = trainer_of(folder, code, limit_val_batches=2)
    trainer.fit(model, data)
    weights = trainer.strategy.lightning_module_state_dict()
    return {name: value.detach().clone() for name, value in weights.items()}, {
        name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name
    }


@pytest.mark.slow
def test_models_of_clicks_run_unchanged(pool: RankPool, tmp_path: Path) -> None:
    """Tables of which a batch looks up some rows, dropout that belongs to the sample, and an AUC over all ranks."""
    weights, metrics = pool.run(clicks, tmp_path, None, world_size=1)[0]
    assert {"val/auc", "val/log_loss"} <= metrics.keys()
    ranks = pool.run(clicks, tmp_path, "IIG", world_size=4)
    for _, own in ranks:
        assert own == pytest.approx(metrics, rel=1e-8)
    assert ranks[0][0].keys() == weights.keys()
    for name, value in ranks[0][0].items():
        torch.testing.assert_close(value, weights[name], rtol=1e-10, atol=1e-10, msg=name)


class Stack(LightningModule):
    """Layers that are optimized by hand, in two backward passes a step, and that fail when told to."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.fail_at = fail_at

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == self.fail_at:
            raise ArithmeticError("told to fail")
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self(batch).square().mean())
        self.manual_backward(self(batch).abs().mean())
        optimizer.step()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).square().mean(), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            strategy = self.trainer.strategy
            summoned = strategy.summon_full_params(writeback=True) if isinstance(strategy, PaROStrategy) else nullcontext()
            with summoned:
                self.layers[0].bias.data.add_(0.5)
                copied = copy.deepcopy(self.layers)  # has no hooks, so that nothing is gathered for it
            assert copied[0](batch).shape == batch.shape

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Averaging(WeightAveraging):
    """Reads whole weights, as Lightning's own do."""


def by_hand(folder: Path, code: str | None, fail_at: int, callbacks: int = 0) -> tuple[dict[str, Tensor], float, str]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, said = Stack(fail_at), ""
    strategy: Any = "auto" if code is None else PaROStrategy(code, group_size=1, gather_for_evaluation=False)
    trainer = Trainer(
        accelerator="cpu", devices=get_world_size(), strategy=strategy, precision="64-true", max_steps=8, logger=False,
        callbacks=[Averaging()] * callbacks, default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    data = DataLoader(torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), batch_size=4)
    try:
        trainer.fit(model, data, data)
    except (ArithmeticError, ValueError) as error:
        said = str(error)
    return dict(model.state_dict()), float(trainer.callback_metrics.get("val_loss", 0.0)), said


def several_by_hand(folder: Path, jobs: list[tuple[Any, ...]]) -> list[tuple[dict[str, Tensor], float, str]]:
    return [by_hand(folder, *job) for job in jobs]


def test_manual_optimization_evaluation_by_blocks_and_failures(pool: RankPool, tmp_path: Path) -> None:
    """All ranks see the same samples here, so that the mean over ranks is what one process has."""
    ((one, loss, _),) = pool.run(several_by_hand, tmp_path, [(None, -1)], world_size=1)[0]
    jobs = [("GGG", -1), ("NNG", -1), ("GGG", 2), ("GGG", -1, 1)]
    for rank in pool.run(several_by_hand, tmp_path, jobs):
        for weights, seen, said in rank[:2]:
            assert said == "" and seen == pytest.approx(loss, rel=1e-10)
            for name, value in weights.items():
                torch.testing.assert_close(value, one[name], rtol=1e-10, atol=1e-10, msg=name)
        failed, refused = rank[2:]
        assert failed[2] == "told to fail" and all(value.isnan().all() for value in failed[0].values())
        assert "Averaging" in refused[2]


class Two(BoringModel):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.layer.parameters(), lr=0.1), torch.optim.SGD(self.layer.parameters(), lr=0.1)]


class Quasi(BoringModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.layer.parameters())


def refusals(folder: Path) -> list[str]:
    said = []
    for model, options, precision in (
        (Two(), {}, "32-true"),
        (Quasi(), {}, "32-true"),
        (BoringModel(), {}, "16-true"),
        (BoringModel(), {"group_size": 3}, "32-true"),
        (BoringModel(), {"block_classes": ["Nothing"]}, "32-true"),
    ):
        strategy = PaROStrategy(**{"partition": "IIG", "group_size": 1, **options})
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=strategy, precision=precision, logger=False, default_root_dir=folder,
            enable_checkpointing=False, enable_progress_bar=False, max_steps=1,
        )  # fmt: skip
        with pytest.raises(ValueError) as error:
            trainer.fit(model)
        said.append(str(error.value))
    return said


def test_what_does_not_go_is_refused_by_name(pool: RankPool, tmp_path: Path) -> None:
    said = pool.run(refusals, tmp_path)[0]
    for text, word in zip(said, ("2 optimizers", "LBFGS", "bf16-mixed", "group_size=3", "Nothing"), strict=True):
        assert word in text
    with pytest.raises(ValueError, match="coarser"):
        PaROStrategy("GNN")
    with pytest.raises(ValueError, match="reduce_dtype"):
        PaROStrategy(reduce_dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size"):
        PaROStrategy(group_size=0)
