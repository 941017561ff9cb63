"""Backbones are the library's own models: the same vectors and logits, whole, in halves, tuned, saved and loaded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Trainer, seed_everything
from lm_models import TINY
from torch import Tensor
from torch.distributed import get_world_size

from datamodules import ZooDataModule
from strategies import EDiTStrategy, PaROStrategy
from zoo import ZooModule
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import EMA
from zoo.ling import LingBackbone, LingForCausalLM
from zoo.lm import Backbone, HFBackbone, LoRA, Pooling

CAUSAL = ("llama", "qwen2", "gpt2", "opt")
PASSES_FLOAT32 = ("llama", "qwen2")  # RMSNorm and rotary angles, in the library


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(family: str, **options: Any) -> HFBackbone:
    return HFBackbone(dict(TINY[family]), **options)


def batch(rows: int = 2) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 40, (rows, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


# Passes


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_are_those_of_the_library(family: str) -> None:
    backbone, (ids, mask) = tiny(family).eval(), batch()
    assert backbone.kind == "causal" and backbone.vocab_size == 40 and len(backbone.blocks) == 3
    theirs = backbone.network(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(backbone.logits(backbone(ids, mask)), theirs, rtol=0, atol=0)


def test_encoder_decoder_and_its_encoder_alone() -> None:
    whole, alone, (ids, mask) = tiny("t5").eval(), tiny("t5", kind="encoder").eval(), batch()
    theirs = whole.network(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4]).logits
    torch.testing.assert_close(whole.logits(whole(ids, mask, decoder_ids_BT=ids[:, :4])), theirs, rtol=0, atol=0)
    alone.network.load_state_dict(whole.network.state_dict(), strict=False)
    torch.testing.assert_close(alone(ids, mask), whole(ids, mask), rtol=0, atol=0)


@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
def test_halves_are_the_whole_wherever_it_is_cut(family: str) -> None:
    backbone, (ids, mask) = tiny(family).eval(), batch()
    whole = backbone(ids, mask)[mask.bool()]
    for n in range(4):
        low, high = backbone.split(n)
        torch.testing.assert_close(high(low(ids, mask), mask)[mask.bool()], whole, rtol=0, atol=1e-12)
    held = {id(parameter) for half in (low, high) for parameter in half.parameters()}
    own = [p for name, p in backbone.network.base_model.named_parameters() if "pooler" not in name]
    assert held == {id(parameter) for parameter in own}
    with pytest.raises(ValueError, match=r"n=4 must lie in 0 \.\.\. 3"):
        backbone.split(4)


@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
def test_documents_of_a_row_do_not_see_each_other(family: str) -> None:
    backbone, (ids, _) = tiny(family).eval(), batch()
    packed = backbone(ids[:1], position_ids_BT=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    apart = torch.cat([backbone(ids[:1, :3]), backbone(ids[:1, 3:])], 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-6 if family in PASSES_FLOAT32 else 1e-12)


def test_ling_is_a_backbone() -> None:
    seed_everything(0, verbose=False)
    backbone, (ids, mask) = LingBackbone(scalar_head=True).eval(), batch()
    assert isinstance(backbone, Backbone) and isinstance(backbone.network, LingForCausalLM)
    torch.testing.assert_close(backbone.logits(backbone(ids, mask)), backbone.network(ids, mask).logits, check_dtype=False)
    assert backbone.scores(ids, mask).shape == (2,)
    with pytest.raises(ValueError, match="cannot be split"):
        backbone.split(1)


# Pooling and the scalar head


def test_pooling_ignores_padding_on_either_side() -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    texts = [hidden[0, :3], hidden[1, 1:]]
    for kind, of in (("mean", lambda t: t.mean(0)), ("last", lambda t: t[-1]), ("cls", lambda t: t[0])):
        torch.testing.assert_close(Pooling(kind, 4)(hidden, mask), torch.stack([of(text) for text in texts]))  # type: ignore[arg-type,no-untyped-call]
    learned = Pooling("learned", 4)
    torch.testing.assert_close(learned(hidden, mask), Pooling("mean", 4)(hidden, mask))
    torch.nn.init.normal_(learned.query)  # type: ignore[arg-type]
    weights = [(text @ learned.query / 2).softmax(0) for text in texts]
    torch.testing.assert_close(learned(hidden, mask), torch.stack([w @ t for w, t in zip(weights, texts, strict=True)]))


def test_score_is_the_value_of_the_last_token() -> None:
    backbone, (ids, mask) = tiny("llama", pooling="last", scalar_head=True).eval(), batch()
    values = backbone.values(ids, mask)
    torch.testing.assert_close(backbone.scores(ids, mask), torch.stack([values[0, 6], values[1, 4]]))


def test_weights_are_those_of_the_seed() -> None:
    a, b, c = (tiny("gpt2", scalar_head=True, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["scalar.weight"], c["scalar.weight"])


# Tuning


@pytest.mark.parametrize(("options", "trained"), [
    ({"tuning": "last_n", "last_n": 1}, {"layers.2", "norm"}),
    ({"tuning": "lora", "lora": LoRA(targets=["q_proj"])}, {"lora"}),
    ({"tuning": "frozen"}, set()),
])  # fmt: skip
def test_only_what_is_tuned_has_a_gradient(options: dict[str, Any], trained: set[str]) -> None:
    backbone, (ids, mask) = tiny("llama", scalar_head=True, activation_checkpointing=True, **options), batch()
    backbone.scores(ids, mask).sum().backward()
    names = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert names == {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert {part for part in trained if any(part in name for name in names)} == trained
    assert all(name == "scalar.weight" or any(part in name for part in trained) for name in names)
    assert backbone.network.training == (options["tuning"] != "frozen")


def adapted(folder: Path) -> HFBackbone:
    """A LLaMA of a folder with an adapter that is not zero."""
    tiny("llama").save_pretrained(folder)
    backbone = HFBackbone(str(folder), tuning="lora", lora=LoRA(rank=2, alpha=4)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    return backbone


def test_adapter_is_read_by_peft_and_merges_exactly(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    backbone, (ids, mask) = adapted(tmp_path / "base"), batch()
    ours = backbone.logits(backbone(ids, mask))
    backbone.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    assert not torch.allclose(base(ids, mask).logits, ours)
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(by_peft(ids, mask).logits, ours, rtol=0, atol=0)
    again = HFBackbone.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(again.logits(again(ids, mask)), ours, rtol=0, atol=0)
    backbone.save_pretrained(tmp_path / "merged", merged=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(merged(ids, mask).logits, ours, rtol=0, atol=1e-6)


def test_folder_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    from transformers import AutoModel

    backbone, (ids, mask) = tiny("bert", pooling="learned", scalar_head=True).eval(), batch()
    torch.nn.init.normal_(backbone.pooling.query)  # type: ignore[arg-type]
    backbone.save_pretrained(tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(theirs(ids, attention_mask=mask).last_hidden_state, backbone(ids, mask), rtol=0, atol=0)
    again = HFBackbone.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again.scores(ids, mask), backbone.scores(ids, mask), rtol=0, atol=0)


# Runs


class Numbers(ZooDataModule):
    """Sequences in which every second token follows from the one before."""

    def train_dataloader(self) -> Any:
        ids = torch.randint(40, (32, 6), generator=torch.Generator().manual_seed(1))
        ids[:, 1::2] = ids[:, ::2] * 5 % 40
        return self.train_loader([{"input_ids": row, "index": torch.tensor(i)} for i, row in enumerate(ids)])


class NextToken(ZooModule):
    """The least module on a backbone."""

    def __init__(self, backbone: Backbone, **kwargs: Any) -> None:
        super().__init__(optimizer=partial(torch.optim.AdamW, lr=1e-2), **kwargs)
        self.backbone = backbone

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = batch["input_ids"]
        logits = self.backbone.logits(self.backbone(ids[:, :-1]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def fit(
    backbone: Backbone,
    folder: Path,
    strategy: Any = "auto",
    precision: Any = "64-true",
    steps: int = 3,
    ckpt: Path | None = None,
    average: bool = False,
) -> NextToken:
    seed_everything(3, verbose=False)
    module, world = NextToken(backbone), get_world_size() if torch.distributed.is_initialized() else 1
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision=precision, max_steps=steps,
        callbacks=[EMA(0.5)] if average else [],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, Numbers(8 // world), ckpt_path=None if ckpt is None else str(ckpt))
    if world == 1:
        trainer.save_checkpoint(folder / "run.ckpt")
    return module


@pytest.mark.parametrize("tuning", ["lora", "last_n"])
def test_frozen_weights_are_named_and_restored_bit_for_bit(tuning: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    module = fit(HFBackbone(str(tmp_path / "base"), tuning=tuning), tmp_path, average=True)
    stored = read_checkpoint(tmp_path / "run.ckpt")
    (entry,) = stored["zoo_named_weights"]
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert entry["name"] == str(tmp_path / "base") and len(entry["sha256"]) == 64
    assert set(entry["weights"]) >= frozen and not frozen & set(stored["state_dict"])
    assert len(stored["optimizer_states"][0]["state"]) == len(list(module.parameters())) - len(frozen)
    again = NextToken.load_from_checkpoint(tmp_path / "run.ckpt").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in module.state_dict().items())
    assert (
        fit(
            HFBackbone(str(tmp_path / "base"), tuning=tuning), tmp_path, steps=4, ckpt=tmp_path / "run.ckpt", average=True
        ).applied_steps
        == 4
    )
    HFBackbone(dict(TINY["llama"]), seed=9).save_pretrained(tmp_path / "base")  # the same name, other weights
    with pytest.raises(ValueError, match=rf"leaves the frozen weights of backbone to .*base \(SHA-256 {entry['sha256'][:12]}\)"):
        NextToken.load_from_checkpoint(tmp_path / "run.ckpt")


def test_other_weights_in_frozen_places_are_stored(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    module, other = NextToken(HFBackbone(str(tmp_path / "base"), tuning="frozen")), NextToken(tiny("llama", seed=5))
    module.load_state_dict(other.state_dict())
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert "zoo_named_weights" not in checkpoint and len(checkpoint["state_dict"]) == len(other.state_dict())


def test_checkpoint_of_full_tuning_needs_no_source(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "base")
    module = fit(HFBackbone(str(tmp_path / "base")), tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    again = NextToken.load_from_checkpoint(tmp_path / "run.ckpt").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in module.state_dict().items())


def on_ranks(folder: Path, tuning: Any, strategy: Any) -> dict[str, Tensor]:
    torch.set_default_dtype(torch.float64)
    module = fit(tiny("gpt2", tuning=tuning), folder, strategy() if callable(strategy) else strategy)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("tuning", "strategy"), [
    pytest.param("lora", "ddp", id="ddp"),
    pytest.param("lora", partial(PaROStrategy, "IIG", group_size=2), id="paro"),
    pytest.param("last_n", partial(EDiTStrategy, sync_interval=3, warmup_steps=9), id="edit"),
])  # fmt: skip
def test_two_ranks_are_one_process(pool: RankPool, tmp_path: Path, tuning: Any, strategy: Callable[[], Any] | str) -> None:
    (one,) = pool.run(on_ranks, tmp_path, tuning, "auto", world_size=1)
    for rank in pool.run(on_ranks, tmp_path, tuning, strategy):
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-9, atol=1e-10, msg=name)


def on_shards() -> float:
    from torch.distributed.fsdp import fully_shard

    torch.set_default_dtype(torch.float64)
    plain, sharded, (ids, mask) = tiny("llama"), tiny("llama"), batch()
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    plain(ids, mask).square().sum().backward()
    sharded(ids, mask).square().sum().backward()
    return max(
        float((a.grad - b.grad.full_tensor()).abs().max())  # type: ignore[operator,union-attr]
        for (name, a), b in zip(plain.named_parameters(), sharded.parameters(), strict=True)
        if a.grad is not None
    )


def test_shards_of_fsdp_have_the_gradients_of_the_whole(pool: RankPool) -> None:
    assert max(pool.run(on_shards)) < 1e-6


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(precision: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    module = fit(tiny("llama", tuning="lora", activation_checkpointing=True), tmp_path, precision=precision)
    assert module.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


@pytest.mark.slow
def test_compiled_blocks_are_the_plain_ones() -> None:
    backbone, (ids, mask) = tiny("llama").eval(), batch()
    plain = backbone(ids, mask)
    for block in backbone.blocks:
        block.compile()
    # The library computes norms and rotary angles in float32.
    torch.testing.assert_close(backbone(ids, mask), plain, rtol=1e-5, atol=1e-5)


# Bad input


def refused(kind: type[Exception], words: str, build: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=words) as caught:
        build()
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_bad_sources_are_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    refused(FileNotFoundError, "has no config.json", lambda: HFBackbone(str(tmp_path)))
    refused(FileNotFoundError, "did you mean the asset smollm2-135m", lambda: HFBackbone("smolm2-135m"))
    refused(ValueError, "did you mean llama", lambda: HFBackbone({"model_type": "lama"}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(FileNotFoundError, "could not be fetched from the hub", lambda: HFBackbone("nobody/nothing"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("zoo.lm.sources.find_spec", lambda package: None)
    refused(ModuleNotFoundError, r"gguf, .*lightning-zoo\[llm\]", lambda: HFBackbone(str(tmp_path / "model.gguf")))
    refused(ModuleNotFoundError, r"peft, .*lightning-zoo\[llm\]", lambda: tiny("llama", tuning="lora"))


def test_bad_options_are_refused_in_a_sentence(tmp_path: Path) -> None:
    ids, mask = batch()
    refused(ValueError, "nearest are q_proj", lambda: tiny("llama", tuning="lora", lora=LoRA(targets=["q_prj"])))
    refused(ValueError, r"last_n=4 must lie in 1 \.\.\. 3", lambda: tiny("llama", tuning="last_n", last_n=4))
    refused(ValueError, "pad on the right", lambda: tiny("gpt2")(ids, mask.flip(1)))
    refused(ValueError, "an encoder generates no text", lambda: tiny("bert").logits(tiny("bert")(ids, mask)))
    refused(ValueError, "41 ids, the model a vocabulary of 40", lambda: tiny("llama").check_tokenizer([0] * 41))
    refused(ValueError, "no model of kind encoder_decoder", lambda: tiny("llama", kind="encoder_decoder"))
    refused(ValueError, "scalar_head=True", lambda: tiny("llama").values(ids, mask))
    refused(ValueError, "save it merged", lambda: tiny("llama", tuning="lora").save_pretrained(tmp_path))
    tiny("bert", kind="encoder").save_pretrained(tmp_path / "bert")
    refused(ValueError, "has no weights for cls", lambda: HFBackbone(str(tmp_path / "bert"), kind="causal"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_first_blocks_are_those_of_the_whole(family: str) -> None:
    whole, short, (ids, mask) = tiny(family).eval(), tiny(family, first_n=2).eval(), batch()
    assert len(short.blocks) == 2
    kept = short.network.state_dict()
    assert all(torch.equal(value, whole.network.state_dict()[name]) for name, value in kept.items())
    assert short(ids, mask).shape == whole(ids, mask).shape
    refused(ValueError, "first_n=4 must lie in 1 ... 3", lambda: tiny(family, first_n=4))


def test_dropout_of_all_layers_is_one_option() -> None:
    ids, mask = batch()
    for family in ("bert", "gpt2", "opt", "t5"):
        without = tiny(family, dropout=0.0).train()
        assert torch.equal(without(ids, mask), without(ids, mask)), family
        torch.testing.assert_close(without(ids, mask), tiny(family).eval()(ids, mask))
    refused(ValueError, "dropout=1.5 must lie in", lambda: tiny("bert", dropout=1.5))


@pytest.mark.slow
def test_assets_load() -> None:
    torch.set_default_dtype(torch.float32)
    encoder = HFBackbone("minilm-l6", tuning="frozen")
    texts = encoder.tokenizer(["a small cat", "a tiny kitten", "stock market crash"], padding=True, return_tensors="pt")
    near, far = torch.nn.functional.cosine_similarity(
        (vectors := encoder.pooled(texts["input_ids"], texts["attention_mask"]))[:1], vectors[1:]
    )
    assert near > 0.7 > 0.3 > far
    decoder = HFBackbone("smollm2-135m", tuning="lora").eval()
    ids = decoder.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert decoder.tokenizer.decode(decoder.logits(decoder(ids))[0, -1].argmax()) == " Paris"
