"""Released folders: what is read, what is written, and what is said when they do not fit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from ling_reference import CASES, LITE, Weights, random_weights, shapes, write_released
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.__main__ import main
from zoo.base.hyperparameters import build
from zoo.base.weight_files import weight_files
from zoo.ling import Ling, LingConfig, LingForCausalLM, RopeScaling, load_hf, preset, read_hf_config, save_hf, state_dict_adapter
from zoo.ling.official_config import from_hf_config, to_hf_config
from zoo.ling.state_dict_adapter import load_weights, released_tensors

EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
IDS = torch.tensor([[3, 17, 8, 25, 30, 1]])


def bf16_weights(entries: dict[str, Any] = LITE) -> Weights:
    return {name: tensor.bfloat16() for name, tensor in random_weights(entries).items()}


def stored(folder: Path) -> Weights:
    """Every tensor of a folder, read without our code."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one)


# What a released folder holds


@pytest.mark.parametrize(("name", "tensors", "gigabytes", "qkv_rows"), [
    ("ling_lite", 5603, 33.6, 3072), ("ling_plus", 17603, 581, 6912),
])  # fmt: skip
def test_presets_have_the_released_tensors(name, tensors, gigabytes, qkv_rows):
    config = preset(name)
    with torch.device("meta"):
        network = LingForCausalLM(config)
    found = {key: tuple(view.shape) for key, view in released_tensors(network)}
    assert found == shapes(to_hf_config(config))
    assert len(found) == tensors == 200 * config.num_hidden_layers + 3
    assert sum(torch.Size(shape).numel() for shape in found.values()) * 2 / 1e9 == pytest.approx(gigabytes, rel=2e-3)
    assert found["model.layers.0.attention.query_key_value.weight"] == (qkv_rows, config.hidden_size)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_written_again_bit_for_bit(case, tmp_path):
    entries = CASES[case] | {"torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "a.B"}, "norm_softmax": False, "my": [1, None]}
    weights = bf16_weights(entries)
    write_released(tmp_path / "released", entries, weights, num_files=3)
    network = load_hf(tmp_path / "released")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    save_hf(network, tmp_path / "sharded", max_shard_size="8KB")
    save_hf(load_hf(tmp_path / "sharded"), tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir() if path.suffix != ".json"] == ["model.safetensors"]
    assert same(stored(tmp_path / "sharded"), weights) and same(stored(tmp_path / "one"), weights)
    for folder in ("sharded", "one"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        head_dim = entries.get("head_dim") or entries["hidden_size"] // entries["num_attention_heads"]
        wanted = entries | {"head_dim": head_dim, "num_shared_experts": entries["num_shared_experts"] or 0}
        if entries["rope_scaling"]:
            wanted["rope_scaling"] = written["rope_scaling"]
            assert entries["rope_scaling"].items() <= written["rope_scaling"].items()
        assert written == {"bos_token_id": None} | wanted


def test_shards_keep_their_size_and_the_index_knows_them(tmp_path):
    weights = bf16_weights()
    network = load_hf(write_released(tmp_path / "a", LITE, weights))
    save_hf(network, tmp_path / "b", max_shard_size=2000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "b" / file)
        assert all(index["weight_map"][name] == file for name in held)
        assert len(held) == 1 or sum(tensor.numel() * 2 for tensor in held.values()) <= 2000
    save_hf(network, tmp_path / "b", max_shard_size="1MiB")  # the shards of before are gone
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    for size in ("many", "0GB", -1, "5 XB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            save_hf(network, tmp_path / "b", max_shard_size=size)


def test_new_weights_take_the_place_of_all_others_once_they_are_written(tmp_path, monkeypatch):
    weights = bf16_weights()
    folder = write_released(tmp_path / "a", LITE, weights, num_files=2)
    network = load_hf(folder)
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(b"old")
    (folder / "adapter_model.safetensors").write_bytes(b"another's")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="no space left"):
        broken.setattr(state_dict_adapter, "save_file", fail)
        save_hf(network, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_hf(network, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "adapter_model.safetensors"}
    assert same(dict(released_tensors(load_hf(folder))), weights)


def test_what_belongs_to_the_weights_goes_with_them(tmp_path):
    entries = LITE | {"eos_token_id": [39, 38], "my": 3, "torch_dtype": "bfloat16"}
    folder = write_released(tmp_path / "a", entries, bf16_weights())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "notes.py"):
        (folder / name).write_text(name)
    module = Ling(checkpoint=str(folder))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = Ling.load_from_checkpoint(tmp_path / "a.ckpt")
    shared = Ling.from_pretrained(module.save_pretrained(tmp_path / "shared"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer.json").write_text("my own")
    again.to_hf(tmp_path / "b")
    shared.to_hf(tmp_path / "c")
    for other in ("b", "c"):
        written = json.loads((tmp_path / other / "config.json").read_text())
        assert written == {"bos_token_id": None} | entries | {"head_dim": 6}
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in folder.iterdir()} - {
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "notes.py",
    } | {"model.safetensors"}  # fmt: skip
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "my own"
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert str(tmp_path) not in (tmp_path / "shared" / "config.json").read_text()


def test_every_id_that_ends_a_text_ends_it(tmp_path):
    network = load_hf(write_released(tmp_path / "a", LITE, random_weights(LITE)))
    tokens = network.generate(IDS, max_new_tokens=6, eos_token_id=())[0, IDS.shape[1] :].tolist()
    ended = load_hf(tmp_path / "a", config_changes={"eos_token_id": [39, tokens[2]]})
    assert ended.generate(IDS, max_new_tokens=6)[0, IDS.shape[1] :].tolist() == tokens[: tokens.index(tokens[2]) + 1]


def test_a_repository_of_the_hub_is_fetched_as_data_only(tmp_path, monkeypatch):
    folder = write_released(tmp_path / "a", LITE, bf16_weights())
    asked = {}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        if name == "nobody/nothing":
            raise ConnectionError("no network")
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert same(dict(released_tensors(Ling(checkpoint="inclusionAI/Ling-lite").network)), bf16_weights())
    assert asked == {"inclusionAI/Ling-lite": ["*.json", "*.safetensors", "*.jinja", "*.txt"]}
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no local folder and could not be fetched from the hub"):
        load_hf("nobody/nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for local in ("../a/b", "./nobody/nothing", "data/ling-lite"):
        with pytest.raises(FileNotFoundError, match=r"There is no .*: give the folder"):
            load_hf(local)


def test_pickled_files_are_read_without_running_them(tmp_path):
    weights = bf16_weights()
    for folder in ("one", "many", "old", "bad"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(LITE))
    torch.save(weights, tmp_path / "one" / "pytorch_model.bin")
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    names = list(weights)
    torch.save({n: weights[n] for n in names[::2]}, tmp_path / "many" / "a.bin")
    torch.save({n: weights[n] for n in names[1::2]}, tmp_path / "many" / "b.bin")
    weight_map = {n: ("a.bin", "b.bin")[i % 2] for i, n in enumerate(names)}
    (tmp_path / "many" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for folder in ("one", "many", "old"):
        assert same(dict(released_tensors(load_hf(tmp_path / folder))), weights)
    torch.save({"model.norm.weight": Path("x")}, tmp_path / "bad" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code when loaded"):
        load_hf(tmp_path / "bad")
    torch.save([1, 2], tmp_path / "bad" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no dictionary of names and tensors"):
        load_hf(tmp_path / "bad")


class NewBytes(TorchDispatchMode):
    """Counts bytes of tensors that get memory of their own; those of a mapped file come as bytes in a storage, and do not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        mapped = str(func).startswith(("aten.set_", "aten.lift_fresh"))
        if isinstance(result, Tensor) and not result.is_meta and not mapped and result.untyped_storage().data_ptr() not in given:
            self.seen[result.untyped_storage().data_ptr()] = result  # kept, so that no two share an address
        return result

    @property
    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.seen.values())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_loading_takes_the_memory_of_one_model(dtype, tmp_path):
    folder = write_released(tmp_path / "a", LITE, bf16_weights())
    with NewBytes() as memory:
        network = load_hf(folder, dtype=dtype)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype or torch.bfloat16}
    own = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    assert own <= memory.total <= own + 64  # and the statistics of the routers


def test_tables_and_value_heads_are_no_part_of_the_network(tmp_path):
    weights = bf16_weights()
    more = {"model.layers.0.attention.rotary_emb.inv_freq": torch.ones(3), "v_head.summary.weight": torch.ones(1, 24)}
    network = load_hf(write_released(tmp_path / "a", LITE, weights | more))
    assert same(dict(released_tensors(network)), weights)


# What does not fit


def test_all_that_differs_is_listed(tmp_path):
    weights = bf16_weights()
    del weights[EXPERT], weights["model.norm.weight"]
    weights["model.layers.9.extra"] = torch.ones(2)
    weights["lm_head.weight"] = torch.ones(3, 24)
    weights["model.layers.0.mlp.gate.weight"] = torch.ones(12, 24, dtype=torch.int8)
    with pytest.raises(ValueError) as error:
        load_hf(write_released(tmp_path / "a", LITE, weights))
    text = str(error.value)
    assert "2 missing: " in text and EXPERT in text and "model.norm.weight" in text
    assert "1 unknown: model.layers.9.extra" in text
    assert "1 of another shape: lm_head.weight [3, 24] instead of [40, 24]" in text
    assert "1 no floating-point numbers: model.layers.0.mlp.gate.weight" in text


def test_a_folder_with_another_head_is_no_language_model(tmp_path):
    weights = bf16_weights()
    weights["score.weight"] = weights.pop("lm_head.weight")[:1].clone()
    entries = LITE | {"architectures": ["BailingMoeForSequenceClassification"]}
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight; 1 unknown: score\.weight"):
        load_hf(write_released(tmp_path / "a", entries, weights))


def test_missing_and_damaged_files_are_named(tmp_path):
    folder = write_released(tmp_path / "a", LITE, bf16_weights(), num_files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors \(\d+ tensors\)\. Was the download"):
        load_hf(folder)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load_hf(folder)
    shard.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes()[:-7])
    with pytest.raises(ValueError, match="is damaged"):
        load_hf(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        weight_files(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_hf(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"There is no .*config\.json"):
        load_hf(empty)
    (empty / "config.json").write_text(json.dumps(LITE))
    with pytest.raises(FileNotFoundError, match=r"There are no weights in .*model\.safetensors\.index\.json"):
        load_hf(empty)
    (empty / "config.json").write_text("[")
    with pytest.raises(ValueError, match="is no JSON"):
        read_hf_config(empty)


# Configuration


@pytest.mark.parametrize("changes", [{"head_dim": 0}, {"head_dim": None}, {"head_dim": 6}, {}], ids=str)
def test_a_head_without_a_width_is_hidden_size_by_heads(changes):
    assert from_hf_config(LITE | changes).head_width == 6


def test_aliases_nulls_and_unknown_entries():
    renamed = {name: value for name, value in LITE.items() if name not in ("num_experts", "num_shared_experts")}
    renamed |= {"n_routed_experts": 12, "n_shared_experts": 2}
    assert from_hf_config(renamed) == from_hf_config(LITE)
    assert from_hf_config(LITE | {"num_shared_experts": None}) == from_hf_config(LITE | {"num_shared_experts": 0})
    assert from_hf_config(LITE | {"foo": 1, "eos_token_id": [39, 7]}) == from_hf_config(LITE).replace(eos_token_id=[39, 7])
    assert from_hf_config(LITE | {"eos_token_id": []}).eos_token_id is None
    written = to_hf_config(from_hf_config(renamed), renamed)
    assert written["n_routed_experts"] == written["num_experts"] == 12
    assert to_hf_config(from_hf_config(LITE | {"eos_token_id": [39, 7]}), LITE | {"eos_token_id": [39, 7]})["eos_token_id"] == [
        39,
        7,
    ]


@pytest.mark.parametrize("config", [
    preset("ling_lite"), preset("ling_plus"), preset("ling_tiny"),
    LingConfig(head_dim=64, rope_scaling=RopeScaling("yarn", 4.0, 32768), use_bias=True, num_shared_experts=0),
    LingConfig(rope_scaling=RopeScaling("linear", 2.0), norm_head=False),
    LingConfig(rope_scaling=RopeScaling("yarn", 4.0), max_position_embeddings=32768, eos_token_id=[7, 3]),
], ids=range(6))  # fmt: skip
def test_architectures_survive(config):
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config.replace(head_dim=config.head_width)


YARN = {"factor": 4.0, "original_max_position_embeddings": 16384}


@pytest.mark.parametrize(("changes", "same"), [
    ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_theta": 1e4}),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}}, {"rope_theta": 1e4}),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 600000.0, **YARN}, "rope_scaling": {"type": "yarn", **YARN}},
     {"rope_scaling": {"rope_type": "yarn", **YARN}}),
    ({"rope_scaling": {"type": "yarn", "rope_type": "yarn", **YARN}}, {"rope_scaling": {"type": "yarn", **YARN}}),
])  # fmt: skip
def test_rope_parameters_are_base_and_scaling(changes, same):
    config = from_hf_config(LITE | changes)
    assert config == from_hf_config(LITE | same)
    assert from_hf_config(to_hf_config(config, LITE | changes)) == config.replace(head_dim=6)


def test_yarn_keeps_the_trained_length_when_the_context_grows():
    config = from_hf_config(LITE).replace(rope_scaling=RopeScaling("yarn", 4.0))
    longer = config.replace(max_position_embeddings=65536)
    assert longer.rope_scaling == config.rope_scaling == RopeScaling("yarn", 4.0, 16384)


V2 = "only BailingMoeForCausalLM"


@pytest.mark.parametrize(("changes", "words"), [
    ({"architectures": ["BailingMoeV2ForCausalLM"]}, V2),
    ({"model_type": "bailing_moe_v2"}, V2),
    ({"model_type": "bailing_hybrid", "architectures": ["BailingMoeV2_5ForCausalLM"]}, r"Ling 2\.5 or 3\.0"),
    ({"architectures": None, "use_qk_norm": True}, "use_qk_norm=True describes another architecture"),
    ({"architectures": None, "score_function": "sigmoid"}, "score_function='sigmoid' describes another"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"model_type": "llama"}, "model_type='llama' instead of 'bailing_moe'"),
    ({"architectures": ["BailingMoeForTokenClassification"]}, V2),
    ({"n_routed_experts": 8}, "num_experts=12 and n_routed_experts=8 contradict"),
    ({"num_experts_per_tok": 13}, "num_experts_per_tok=13 is more than num_experts=12"),
    ({"num_experts": "12"}, "num_experts='12' must be of type int"),
    ({"use_bias": 0}, "use_bias=0 must be of type bool"),
    ({"vocab_size": 30}, "pad_token_id=39 is outside of the vocabulary of 30"),
    ({"rope_scaling": {"type": "ntk", "factor": 2}}, "rope_scaling.type='ntk'"),
    ({"rope_scaling": {"type": "linear"}}, "needs type and factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "needs original_max_position_embeddings"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "attention_factor": 1}}, "but not attention_factor"),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn", **YARN}}, "type and rope_type .* contradict each other"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor=nan must be a number of at least 1"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' must be of type float"),
    ({"rope_scaling": {"type": "yarn", **YARN, "original_max_position_embeddings": -5}}, "=-5 must be at least 1"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta=600000, .* contradict each other"),
    ({"rope_parameters": {"rope_type": "yarn", **YARN}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "contradict"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.type='llama3'"),
    ({"rope_parameters": "yarn"}, "rope_parameters='yarn' must be entries"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be of type bool"),
    ({"head_dim": "128"}, "head_dim='128' must be of type int or null"),
    ({"eos_token_id": "39"}, "eos_token_id='39' must be of type int"),
    ({"eos_token_id": [39, 40]}, "eos_token_id=40 is outside of the vocabulary of 40"),
])  # fmt: skip
def test_other_architectures_and_contradictions_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        from_hf_config(LITE | changes)


@pytest.mark.parametrize("name", ["use_bias", "norm_head", "num_key_value_heads", "attention_dropout", "rms_norm_eps",
                                  "num_shared_experts"])  # fmt: skip
def test_defaults_of_the_released_class_are_not_relied_on(name):
    with pytest.raises(ValueError, match=rf"config\.json lacks {name}\. Nothing is assumed"):
        from_hf_config({key: value for key, value in LITE.items() if key != name})


# Other engines, other backends, tied weights


def test_export_for_engines_without_norm_head(tmp_path):
    network = load_hf(write_released(tmp_path / "a", LITE, random_weights(LITE)))
    save_hf(network, tmp_path / "b", normalized_head=True)
    again = load_hf(tmp_path / "b")
    assert not again.config.norm_head
    assert torch.equal(again(IDS).logits, network(IDS).logits)
    torch.testing.assert_close(again.lm_head.weight.norm(dim=0), torch.ones(24, dtype=torch.float64), rtol=0, atol=1e-6)
    save_hf(again, tmp_path / "c", normalized_head=True)
    assert same(stored(tmp_path / "c"), stored(tmp_path / "b"))


def test_types_are_cast_on_both_ways(tmp_path):
    network = load_hf(write_released(tmp_path / "a", LITE, random_weights(LITE)), dtype=torch.float32)
    save_hf(network, tmp_path / "b", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same(stored(tmp_path / "b"), bf16_weights() | {
        name: tensor.float().bfloat16() for name, tensor in random_weights(LITE).items()
    })  # fmt: skip


def test_backends_agree_after_a_round_trip(tmp_path):
    entries = LITE | {"torch_dtype": "float32"}
    weights = {name: tensor.float() for name, tensor in random_weights(LITE).items()}
    write_released(tmp_path / "a", entries, weights)
    save_hf(load_hf(tmp_path / "a"), tmp_path / "b")
    grouped, loop = load_hf(tmp_path / "b", experts="grouped"), load_hf(tmp_path / "b", experts="loop")
    torch.testing.assert_close(grouped(IDS).logits, loop(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_one_parameter_and_must_not_differ(tmp_path):
    entries = LITE | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    weights = bf16_weights()
    del weights["lm_head.weight"]
    network = load_hf(write_released(tmp_path / "a", entries, weights))
    assert network.lm_head.weight is network.model.word_embeddings.weight
    save_hf(network, tmp_path / "b")
    assert same(stored(tmp_path / "b"), weights)
    twice = weights | {"lm_head.weight": weights["model.word_embeddings.weight"].clone()}
    assert torch.equal(load_hf(write_released(tmp_path / "c", entries, twice))(IDS).logits, network(IDS).logits)
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.word_embeddings\.weight differ"):
        load_hf(write_released(tmp_path / "d", entries, twice | {"lm_head.weight": torch.zeros(40, 24)}))
    save_hf(network, tmp_path / "e", normalized_head=True)
    untied = load_hf(tmp_path / "e")
    assert not untied.config.tie_word_embeddings and torch.equal(untied(IDS).logits, network(IDS).logits)


def test_a_network_keeps_its_type_and_its_place_when_it_is_filled(tmp_path):
    folder = write_released(tmp_path / "a", LITE, bf16_weights())
    network = LingForCausalLM(read_hf_config(folder)[0])
    before = [parameter.data_ptr() for parameter in network.parameters()]
    load_weights(network, folder)
    assert [parameter.data_ptr() for parameter in network.parameters()] == before
    assert all(torch.equal(view, bf16_weights()[name].float()) for name, view in released_tensors(network))
    with torch.device("meta"):
        nothing = LingForCausalLM(network.config)
    with pytest.raises(ValueError, match="has no weights: load some first"):
        save_hf(nothing, tmp_path / "b")


# As a module of the zoo


def test_a_folder_becomes_ours_and_a_released_folder_again(tmp_path, capsys):
    weights = bf16_weights()
    source = str(write_released(tmp_path / "released", LITE | {"torch_dtype": "bfloat16"}, weights))
    ours, back, file = (str(tmp_path / name) for name in ("ours", "back", "file.safetensors"))
    assert main(["convert", source, ours, "--description", "small"]) == 0
    module = zoo.load(ours)
    assert type(module) is Ling
    assert same(dict(released_tensors(module.network)), weights)
    assert main(["convert", ours, back, "--official"]) == 0
    assert f"wrote {len(weights)} tensors of Ling to {back}" in capsys.readouterr().out
    assert read_hf_config(back)[0] == read_hf_config(source)[0].replace(head_dim=6)
    assert same(stored(Path(back)), weights)
    assert main(["convert", ours, file, "--official"]) == 0
    assert load_file(file).keys() == weights.keys()
    write_released(tmp_path / "later", LITE | {"architectures": ["BailingMoeV2ForCausalLM"]}, weights)
    assert main(["convert", str(tmp_path / "later"), ours]) == 2
    assert V2 in capsys.readouterr().err


def test_a_module_is_built_with_the_stored_type_in_the_memory_of_one_model(tmp_path):
    weights = bf16_weights()
    folder = write_released(tmp_path / "a", LITE, weights)
    with NewBytes() as memory:
        module = Ling.from_official(folder)
    assert same(dict(released_tensors(module.network)), weights) and module.network.training
    assert memory.total < 1.2 * sum(tensor.numel() * 2 for tensor in weights.values())
    arguments = module.init_config
    assert arguments["init_args"]["checkpoint"] is None and build(Ling, arguments).config == module.config
    module.to_hf(tmp_path / "b")
    assert same(stored(tmp_path / "b"), weights)
    assert same(dict(released_tensors(Ling.from_hf(tmp_path / "b", z_coef=0.0).network)), weights)


def test_another_architecture_on_purpose_takes_the_weights_as_well(tmp_path):
    folder = write_released(tmp_path / "a", LITE, bf16_weights())
    longer = to_hf_config(from_hf_config(LITE | {"rope_theta": 1e6}))
    module = Ling.from_official(folder, longer)
    assert module.config.rope_theta == 1e6
    assert all(torch.equal(view, bf16_weights()[name].float()) for name, view in released_tensors(module.network))
    save_file({"model.norm.weight": torch.ones(24)}, tmp_path / "lone.safetensors")
    with pytest.raises(ValueError, match="from which no Ling can be told"):
        Ling.from_official(tmp_path / "lone.safetensors")
    with pytest.raises(ValueError, match=r"\d+ missing: model\.word_embeddings"):
        Ling.from_official(tmp_path / "lone.safetensors", longer)


def test_written_weights_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    model = Ling(checkpoint=str(write_released(tmp_path / "a", LITE, random_weights(LITE))))
    before = os.umask(0o027)
    try:
        folders = [save_hf(model.network, tmp_path / "hf"), model.save_pretrained(tmp_path / "own")]
    finally:
        os.umask(before)
    assert [(folder / "model.safetensors").stat().st_mode & 0o777 for folder in folders] == [0o640] * 2
