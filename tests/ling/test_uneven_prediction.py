"""Prompts are answered as by one process, also where ranks whose forward passes wait for one another have unequal work."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import distributed
from torch.distributed.fsdp import fully_shard

from datamodules import Text
from strategies import EDiTShardedStrategy, ExpertParallelStrategy, PaROStrategy
from zoo.callbacks import JSONLWriter
from zoo.ling import Ling, LingConfig
from zoo.lm.generation import Generation
from zoo.strategy_contract import forwards_are_collective

CONFIG = LingConfig(
    vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=8, initializer_range=0.3, pad_token_id=None,
    eos_token_id=257,
)  # fmt: skip


class ShardedLing(Ling):
    """Sharded by FSDP2 where Lightning's ModelParallelStrategy asks for it."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for block in self.network.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.network.lm_head, mesh=mesh)
            fully_shard(self.network, mesh=mesh)


class DeepSpeedOfTwo(DeepSpeedStrategy):
    """Two processes, without the library."""

    world_size = 2


def predict(
    folder: Path, prompts: int, strategy: Any, num_devices: int, temperature: float, trains: bool = False
) -> list[dict[str, Any]]:
    """The lines of predictions; with two processes, as the first sees them."""
    seed_everything(3, verbose=False)
    model = ShardedLing(CONFIG, generation=Generation(max_new_tokens=9, temperature=temperature))
    with torch.no_grad():  # the end of a text comes after different numbers of tokens
        model.network.lm_head.weight[257] *= 4
    file = folder / "prompts.txt"
    if not distributed.is_initialized():
        folder.mkdir()
        file.write_text("".join("".join(map(chr, range(97 + n, 99 + 3 * n))) + "\n" for n in range(prompts)))
    made = strategy() if callable(strategy) else strategy
    trainer = Trainer(
        default_root_dir=folder / str(num_devices), accelerator="cpu", devices=num_devices, strategy=made, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_steps=2, callbacks=[JSONLWriter()],
    )  # fmt: skip
    data = Text(predict_prompts=file, batch_size=2, sources={str(folder): 1.0}, val_fraction=0.0, seq_len=9)
    trainer.predict(model, data, return_predictions=False)
    if trains:
        trainer.fit(model, data)
    path = folder / str(num_devices) / "predictions" / "predictions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "expert": ExpertParallelStrategy,
    "edit_sharded": partial(EDiTShardedStrategy, shard_size=2),
    "fsdp2": ModelParallelStrategy,
    "paro": partial(PaROStrategy, partition="GGG", gather_for_evaluation=False),
}


@pytest.mark.parametrize(("prompts", "temperature", "strategy"), [
    *(pytest.param(5, 0.0, each, marks=[pytest.mark.slow] if each in ("fsdp2", "paro") else []) for each in STRATEGIES),
    *(pytest.param(1, 1.0, each, marks=[] if each in ("fsdp2", "paro") else [pytest.mark.slow]) for each in STRATEGIES),
])  # fmt: skip
def test_every_prompt_is_answered_once_as_by_one_process(
    pool: RankPool, tmp_path: Path, strategy: str, prompts: int, temperature: float
) -> None:
    folder = tmp_path / "run"
    expected = predict(folder, prompts, "auto", 1, temperature)
    assert [line["index"] for line in expected] == list(range(prompts))
    if prompts > 1:
        assert len({len(line["text"]) for line in expected}) > 2, "texts of unequal lengths"
    for found in pool.run(predict, folder, prompts, STRATEGIES[strategy], 2, temperature, world_size=2, timeout=40.0):
        assert found == expected


def test_a_sharded_model_that_has_predicted_can_be_trained(pool: RankPool, tmp_path: Path) -> None:
    predict(tmp_path / "run", 5, "auto", 1, 0.0)
    pool.run(predict, tmp_path / "run", 5, STRATEGIES["edit_sharded"], 2, 0.0, True, world_size=2, timeout=40.0)


@pytest.mark.parametrize(("stage", "expected"), [(1, False), (3, True)])
def test_of_deepspeed_only_stage_3_gathers_weights_for_each_pass(stage: int, expected: bool) -> None:
    strategy = DeepSpeedOfTwo.__new__(DeepSpeedOfTwo)
    strategy.config = {"zero_optimization": {"stage": stage}}
    assert forwards_are_collective(strategy) is expected


def test_a_compiled_step_does_not_wait_for_other_processes() -> None:
    with pytest.raises(ValueError, match="leave compile out"):
        Ling(CONFIG).network.generate(torch.tensor([[1, 2]]), compile=True, agree=lambda here: here)
