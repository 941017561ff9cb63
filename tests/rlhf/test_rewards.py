"""Rewards of answers: published formats, verifiers, tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.text.tokenizer import ByteTokenizer
from zoo.base.weight_files import weight_files
from zoo.lm import HFBackbone
from zoo.rlhf import RewardModel, TrainedReward, Verifier
from zoo.rlhf.reward_loss import last_values

IDS = torch.tensor([[5, 9, 33, 4, 2, 0], [7, 8, 9, 2, 0, 0]])
MASK = (IDS != 0).long()
TOKENS = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}


def _config(model_type: str) -> Any:
    import transformers

    if model_type == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.LlamaConfig(**sizes, **TOKENS)
    if model_type == "gpt2":
        return transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **TOKENS)
    # As OPT-350M, its embedding is narrower than its blocks.
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 8}
    return transformers.OPTConfig(**sizes, max_position_embeddings=32, **TOKENS)


def _write(model: Any, folder: Path, form: str) -> None:
    """Write a model of sequence classification in a published format."""
    config, core, head = model.config.to_dict(), model.base_model.state_dict(), model.score.weight.data
    if form == "trl":
        model.save_pretrained(folder)
        return
    prefix, name = {
        "dschat": ("rwtransformer.", "v_head"),
        "app": ("rm_transformer.", "v_head"),
        "openrlhf": ("", "value_head"),
    }[form]
    if form == "openrlhf":
        config.update(mean=0.5, std=2.0, value_head_prefix="value_head")
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({**{prefix + key: value for key, value in core.items()}, f"{name}.weight": head}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("form", ["trl", "dschat", "app", "openrlhf"])
def test_published_reward_models_score_as_in_transformers(model_type: str, form: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(_config(model_type)).eval()
    _write(model, tmp_path, form)
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits[:, 0]
    if form == "openrlhf":
        expected = (expected - 0.5) / 2.0
    found = TrainedReward(str(tmp_path)).score(IDS, MASK, [], [], [])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_unknown_and_missing_weights_are_named(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(_config("llama"))
    _write(model, tmp_path, "dschat")
    state = torch.load(weight_files(tmp_path)[0], weights_only=True)
    state["rwtransformer.extra"] = state.pop("rwtransformer.norm.weight")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing: norm.weight; unknown: extra") as caught:
        TrainedReward(str(tmp_path))
    assert len(str(caught.value)) <= 300
    torch.save({k: v for k, v in state.items() if not k.startswith("v_head")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no head"):
        TrainedReward(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TrainedReward("./nowhere")


class Count(Verifier):
    """Verifies with given numbers."""

    def __init__(self, numbers: list[float]) -> None:
        super().__init__()
        self.numbers = numbers

    def verify(self, prompts: Any, answers: Any, rows: Any) -> list[float]:
        return self.numbers


def test_verifiers_must_give_one_finite_number_for_each_answer() -> None:
    answers = ["a", "b"]

    def score(numbers: list[float]) -> Tensor:
        return Count(numbers).score(IDS, MASK, answers, answers, [{}, {}])

    assert score([1, 0.5]).tolist() == [1.0, 0.5]
    for numbers in ([1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="one finite number for each answer"):
            score(numbers)


def test_scores_do_not_depend_on_padding() -> None:
    backbone = HFBackbone({"model_type": "llama", **_config("llama").to_diff_dict()}, kind="causal", scalar_head=True)
    backbone = backbone.double().eval()
    plain = last_values(backbone.values(IDS[1:, :4]), MASK[1:, :4])
    ids, mask = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)
    ids[0, 3:7], mask[0, 3:7] = IDS[1, :4], 1
    torch.testing.assert_close(last_values(backbone.values(ids, mask), mask), plain, rtol=1e-5, atol=1e-6)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model = RewardModel(HFBackbone({"model_type": "llama", **_config("llama").to_diff_dict()}, kind="causal", scalar_head=True))
    model.tokenizer_mark.fill_(1)
    model.save_pretrained(tmp_path)
    reward = TrainedReward(str(tmp_path))
    with pytest.raises(ValueError, match="another tokenizer"):
        reward.check_tokenizer(ByteTokenizer())
