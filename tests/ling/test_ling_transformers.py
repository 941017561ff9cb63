"""Ling behind the interface of transformers: the same files, the same numbers, and what other libraries do with it."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from ling_reference import CASES, LITE, logits_and_routes, random_weights, write_released
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
)
from transformers.utils import logging

from zoo.ling import LingForCausalLM, balance_loss, load_hf
from zoo.ling.transformers_model import BailingMoeConfig, BailingMoeForCausalLM, BailingMoeModel, slice_logits

logging.disable_progress_bar()
PAD = 39
IDS = torch.tensor([[PAD, PAD, PAD, 5, 5, 21, 12], [3, 17, 8, 25, 30, 1, 2]])
MASK = (IDS != PAD).long()
LABELS = IDS.masked_fill(IDS == PAD, -100)


@pytest.fixture(params=CASES, scope="module")
def folder(request, tmp_path_factory) -> Path:
    entries = CASES[request.param] | {"auto_map": {"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"}, "my": 3}
    return write_released(tmp_path_factory.mktemp("released"), entries, random_weights(entries))


@pytest.fixture(scope="module")
def lite(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("lite"), LITE, random_weights(LITE))


def loaded(folder: Path, **options: object) -> BailingMoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# Files


def test_a_released_folder_loads_without_remote_code_and_is_written_again(folder, tmp_path):
    model, report = loaded(folder, output_loading_info=True)
    assert type(model) is BailingMoeForCausalLM and model.dtype == torch.float64
    assert not any(report.values())
    model.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    written, before = stored(tmp_path / "again"), stored(folder)
    assert written.keys() == before.keys() and all(torch.equal(written[name], before[name]) for name in before)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    entries = json.loads((tmp_path / "again" / "config.json").read_text())
    released = json.loads((folder / "config.json").read_text())
    same = set(released) - {"head_dim", "torch_dtype", "rope_scaling", "num_shared_experts"}
    assert {name: entries[name] for name in same} == {name: released[name] for name in same}
    one, other = load_hf(folder), load_hf(tmp_path / "again")
    assert one.config == other.config.replace(head_dim=one.config.head_dim)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_is_no_part_of_the_network_is_left_out(lite, tmp_path):
    more = {"model.layers.0.attention.rotary_emb.inv_freq": torch.ones(3), "v_head.summary.weight": torch.ones(1, 24)}
    _, report = loaded(write_released(tmp_path / "a", LITE, stored(lite) | more), output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize(("changes", "words"), [
    ({"architectures": ["BailingMoeV2ForCausalLM"]}, "only BailingMoeForCausalLM"),
    ({"use_bias": None}, "lacks use_bias"),
])  # fmt: skip
def test_configurations_that_do_not_say_enough_are_refused(changes, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in (LITE | changes).items() if v is not None}))
    with pytest.raises(ValueError, match=words):
        AutoConfig.from_pretrained(tmp_path)


def test_a_configuration_survives_and_resolves_quirks():
    config = BailingMoeConfig(**{k: v for k, v in LITE.items() if k != "num_experts"} | {"n_routed_experts": 12, "head_dim": 0})
    assert config.head_dim == 6 and config.num_experts == 12 and config.pad_token_id == PAD
    again = BailingMoeConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict() and again.ling == config.ling
    assert BailingMoeConfig().ling.num_parameters() == pytest.approx(16.802e9, rel=1e-3)
    with pytest.raises(ValueError, match="num_experts_per_tok=9 is more than num_experts=4"):
        BailingMoeConfig(num_experts=4, num_experts_per_tok=9)


def test_rope_parameters_of_the_library_are_read_and_may_be_set(lite, tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16384}
    entries = {name: value for name, value in LITE.items() if name not in ("rope_theta", "rope_scaling")}
    config = AutoConfig.from_pretrained(write_released(tmp_path / "a", entries | {"rope_parameters": rope}, {}, num_files=1))
    assert config.ling.rope_theta == 1e4 and config.ling.rope_scaling.factor == 4
    assert rope.items() <= config.rope_parameters.items()
    config.save_pretrained(tmp_path / "b")
    assert AutoConfig.from_pretrained(tmp_path / "b").ling == config.ling
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}
    assert config.ling.rope_theta == 5e3 and config.ling.rope_scaling.type == "linear"
    assert loaded(lite, config=config).model.rotary.theta == 5e3
    config.rope_parameters = {"rope_type": "default", "rope_theta": 6e5}
    assert config.ling == AutoConfig.from_pretrained(lite).ling
    with pytest.raises(ValueError, match="contradict"):
        BailingMoeConfig(**LITE | {"rope_parameters": rope})


def test_new_weights_are_those_of_our_initialization(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BailingMoeConfig(**LITE | {"initializer_range": 0.1, "hidden_size": 96}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all()), name
        else:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.05), name
    assert bool((model.model.word_embeddings.weight[PAD] == 0).all())
    names = set(model.state_dict())
    assert not any("running" in name for name in names) and "lm_head.weight" in names


def test_importing_the_method_does_not_import_the_models_of_the_library(lite):
    code = (
        "import sys, zoo.ling; assert 'transformers.modeling_utils' not in sys.modules; zoo.ling.register();"
        f"import transformers; print(type(transformers.AutoConfig.from_pretrained({str(lite)!r})).__name__)"
    )
    done = warm_python.run([sys.executable, "-c", code])
    assert done.stdout.strip() == "BailingMoeConfig", done.stderr


# Numbers


def test_logits_loss_and_gradients_are_ours(folder):
    model, ours = loaded(folder).train(), load_hf(folder).train()
    output = model(IDS, attention_mask=MASK, labels=LABELS)
    expected = ours(IDS, attention_mask=MASK, labels=LABELS, with_logits=True)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=0, atol=1e-6)
    output.loss.backward()
    expected.loss.backward()
    for (name, one), other in zip(model.named_parameters(), ours.parameters(), strict=True):
        scale = max(1.0, other.grad.abs().max().item())
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6 * scale, msg=name)


def test_fused_losses_that_multiply_by_the_head_themselves_are_right(lite):
    """As trl does: the output of the inner model times the stored weight, whatever NormHead is."""
    model = loaded(lite).train()
    logits = model(IDS, attention_mask=MASK).logits
    inner = model.base_model(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear) and head.bias is None
    torch.testing.assert_close(inner @ head.weight.T, logits)
    assert not torch.allclose(AutoModel.from_pretrained(lite)(IDS).last_hidden_state @ head.weight.T, logits)


def test_a_copy_divides_by_its_own_norms(lite):
    model = loaded(lite)
    expected = model(IDS).logits.detach()
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        other.lm_head.weight.mul_(torch.linspace(0.5, 3, 24))
    torch.testing.assert_close(other(IDS).logits, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(IDS).logits, expected, rtol=0, atol=1e-5)
        other.lm_head.weight.mul_(3)
        torch.testing.assert_close(other(IDS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_evaluation_follows_an_optimizer_that_counts_no_version(compiled, lite):
    model = loaded(lite, dtype=torch.float32).train()
    run = torch.compile(model, backend="eager") if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        run(IDS, labels=LABELS).loss.backward()
        with torch.no_grad():
            model(IDS)
        optimizer.step()
        optimizer.zero_grad()
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, fresh.eval()(IDS).logits)


def test_a_reference_that_is_synchronised_through_data_has_the_models_logits(lite):
    model = loaded(lite)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        reference(IDS)
        model.lm_head.weight.mul_(torch.linspace(0.5, 2, 24)).add_(0.1)
        for old, new in zip(reference.parameters(), model.parameters(), strict=True):
            old.data.copy_(new.data)
        torch.testing.assert_close(reference(IDS).logits, model(IDS).logits)


def test_norms_of_the_head_are_computed_once_a_generation(lite, monkeypatch):
    model = loaded(lite)
    norms = []
    compute = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **kwargs: norms.append(1) or compute(*args, **kwargs))
    options = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    before = model.generate(IDS, **options)
    assert len(norms) == 1
    model.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    after = model.generate(IDS, **options)
    assert len(norms) == 2 and not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(model).generate(IDS, **options))


def test_packed_documents_do_not_see_one_another(lite):
    model, ids = loaded(lite), IDS[1:]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    packed = model(ids, position_ids=positions).logits
    torch.testing.assert_close(packed[:, 3:], model(ids[:, 3:]).logits)
    torch.testing.assert_close(packed[:, :3], model(ids[:, :3]).logits)


def test_positions_without_a_mask_are_compiled_whole(lite):
    model, positions = loaded(lite), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    torch.compiler.reset()
    run = torch.compile(model, backend="eager", fullgraph=True)
    for position_ids in (positions, torch.arange(7)[None]):
        found = run(IDS[1:], position_ids=position_ids, use_cache=False).logits
        torch.testing.assert_close(found, model(IDS[1:], position_ids=position_ids).logits)


def test_masks_of_any_type_and_one_for_all_rows(lite):
    model = loaded(lite)
    ids = IDS[1:].expand(2, 7)
    expected = model(ids).logits
    seen = torch.ones(7, 7).tril()[None, None]
    for mask in (seen.bool(), seen.long(), torch.zeros(1, 1, 7, 7, dtype=torch.float64).masked_fill(seen == 0, -1e9)):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    both = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    one = model(ids, attention_mask=both, output_router_logits=True)
    two = model(ids, attention_mask=both.expand(2, 7), output_router_logits=True)
    assert torch.equal(one.aux_loss, two.aux_loss)


def test_a_reward_model_is_a_layer_on_the_last_token(lite, tmp_path):
    model, report = AutoModelForSequenceClassification.from_pretrained(lite, num_labels=1, output_loading_info=True)
    assert report["missing_keys"] == {"score.weight"} and report["unexpected_keys"] == {"lm_head.weight"}
    right = torch.cat([IDS[:, 3:], torch.full((2, 2), PAD)], dim=1)
    rewards = model(right, attention_mask=(right != PAD).long()).logits
    last = AutoModel.from_pretrained(lite)(IDS[:, 3:]).last_hidden_state[:, -1]
    torch.testing.assert_close(rewards, last @ model.score.weight.T)
    rewards.sum().backward()
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(again(right, attention_mask=(right != PAD).long()).logits, rewards)
    AutoModel.from_pretrained(lite).save_pretrained(tmp_path / "b")
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "b")(IDS[:, 3:]).last_hidden_state[:, -1], last)


def test_hidden_states_router_logits_and_balance_loss(lite):
    model, ours = loaded(lite).train(), load_hf(lite)
    output = model(IDS, attention_mask=MASK, labels=LABELS, output_router_logits=True, output_hidden_states=True)
    routings = ours(IDS, attention_mask=MASK).routings
    for logits, routing in zip(output.router_logits, routings, strict=True):
        torch.testing.assert_close(logits, routing.logits_NE)
    valid = MASK.reshape(-1).bool()
    expected = sum(balance_loss(r.probs_NE, r.ids_Nk, valid) for r in routings)
    torch.testing.assert_close(output.aux_loss, expected)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.hidden_states[0], model.model.word_embeddings(IDS))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    model.config.router_aux_loss_coef = 0.5
    weighted = model(IDS, attention_mask=MASK, labels=LABELS, output_router_logits=True)
    torch.testing.assert_close(weighted.loss - output.loss, 0.5 * expected, rtol=0, atol=1e-5)


def test_activation_checkpointing_changes_nothing(lite):
    gradients = []
    for enable in (False, True):
        model = loaded(lite).train()
        if enable:
            model.activation_checkpointing_enable()
            assert model.model.activation_checkpointing
        output = model(IDS, attention_mask=MASK, labels=LABELS)
        output.loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    model.activation_checkpointing_disable()
    assert not model.model.activation_checkpointing
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_loss_is_divided_by_the_items_of_all_micro_batches(lite):
    model = loaded(lite)
    count = int((LABELS[:, 1:] != -100).sum())
    mean = model(IDS, attention_mask=MASK, labels=LABELS).loss
    torch.testing.assert_close(model(IDS, attention_mask=MASK, labels=LABELS, num_items_in_batch=3 * count).loss, mean / 3)


# Generation


def test_generation_is_greedy_search_of_the_description(folder):
    entries, weights = json.loads((folder / "config.json").read_text()), stored(folder)
    model = loaded(folder)
    options = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = []
    for ids, mask in zip(IDS.tolist(), MASK.tolist(), strict=True):
        row = [token for token, real in zip(ids, mask, strict=True) if real]
        for _ in range(4):
            row.append(int(logits_and_routes(weights, entries, row)[0][-1].argmax()))
        expected.append(row[-4:])
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert model.generate(IDS, **options, **more)[:, IDS.shape[1] :].tolist() == expected


def test_caches_of_the_library_continue_a_sequence(lite):
    model = loaded(lite)
    full = model(IDS, attention_mask=MASK).logits
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=12)):
        parts = [
            model(IDS[:, a:b], attention_mask=MASK[:, :b], past_key_values=cache).logits for a, b in ((0, 3), (3, 6), (6, 7))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1)[1], full[1])
        torch.testing.assert_close(torch.cat(parts, dim=1)[0, 3:], full[0, 3:])


@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_given_cache_is_always_read_and_extended(training, use_cache, lite):
    model = loaded(lite)
    full = model(IDS).logits
    cache = DynamicCache()
    model(IDS[:, :4], past_key_values=cache)
    output = model.train(training)(IDS[:, 4:], past_key_values=cache, use_cache=use_cache)
    torch.testing.assert_close(output.logits, full[:, 4:])
    assert cache.get_seq_length() == 7
    assert getattr(model(IDS, use_cache=False), "cache", None) is None


def test_activation_checkpointing_and_a_cache_exclude_one_another(lite):
    model = loaded(lite).train()
    model.activation_checkpointing_enable()
    full = model(IDS, use_cache=True)
    assert getattr(full, "past_key_values", None) is None and getattr(full, "cache", None) is None
    with pytest.raises(ValueError, match="would be cached twice: leave out the cache"):
        model(IDS, past_key_values=DynamicCache())
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), loaded(lite).generate(IDS, **options))


def test_beams_and_sampling_run(lite):
    model = loaded(lite)
    torch.manual_seed(0)
    for options in ({"num_beams": 3}, {"do_sample": True, "top_p": 0.8, "temperature": 0.7}):
        assert model.generate(IDS, attention_mask=MASK, max_new_tokens=3, min_new_tokens=3, **options).shape == (2, 10)


def test_only_the_logits_that_are_wanted(lite):
    model = loaded(lite)
    full = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])
    places = torch.tensor([[0, 2], [5, 6]])
    torch.testing.assert_close(slice_logits(full, places), torch.stack([full[0, [0, 2]], full[1, [5, 6]]]))
    torch.testing.assert_close(slice_logits(full, MASK.bool()), full[MASK.bool()])


# Switches


def test_backends_are_chosen_by_the_librarys_names_and_ours(lite):
    def backend(**options: object) -> str:
        return loaded(lite, **options).model.layers[0].mlp.experts.backend

    assert backend() == "auto" and backend(experts_implementation="eager") == backend(experts_implementation="loop") == "loop"
    with pytest.raises(ValueError, match="experts_implementation='fast' must be one of auto, grouped, loop, batched"):
        backend(experts_implementation="fast")
    with pytest.raises(ValueError, match="Flash Attention"):
        loaded(lite, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="leave out output_attentions"):
        loaded(lite)(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        loaded(lite)()


def test_a_resized_vocabulary_keeps_the_norm_head(lite, tmp_path):
    model = loaded(lite)
    model.resize_token_embeddings(48)
    logits = model(IDS).logits
    assert logits.shape[-1] == 48 and model.config.vocab_size == 48
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_hf(tmp_path)(IDS).logits, logits)


def test_tied_weights_stay_tied(lite, tmp_path):
    weights = stored(lite)
    del weights["lm_head.weight"]
    write_released(tmp_path / "a", LITE | {"tie_word_embeddings": True}, weights)
    model = loaded(tmp_path / "a")
    assert model.lm_head.weight is model.model.word_embeddings.weight
    model.save_pretrained(tmp_path / "b")
    assert stored(tmp_path / "b").keys() == weights.keys()
    torch.testing.assert_close(load_hf(tmp_path / "b")(IDS).logits, model(IDS).logits)


def test_half_precision_and_autocast_are_near(lite):
    exact = loaded(lite)(IDS).logits
    half = loaded(lite, dtype=torch.bfloat16)
    assert half(IDS).logits.dtype == torch.float32
    assert (half(IDS).logits - exact).abs().mean() < 0.1 * exact.std()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loaded(lite, dtype=torch.float32)(IDS, labels=LABELS)
    mixed.loss.backward()
    assert (mixed.logits - exact).abs().mean() < 0.1 * exact.std()


# Other libraries


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="not measured: peft is not installed")


@needs_peft
@pytest.mark.parametrize("targets", [["query_key_value", "dense"], "all-linear"], ids=str)
def test_lora_learns_is_stored_and_is_merged(targets, lite, tmp_path):
    import peft

    torch.manual_seed(0)
    start = loaded(lite, dtype=torch.float32)
    before = start(IDS).logits.detach()
    model = peft.get_peft_model(start, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    model.eval()
    after = model(input_ids=IDS).logits
    assert not torch.allclose(after, before, atol=1e-2)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(loaded(lite, dtype=torch.float32), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, after)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, after, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_hf(tmp_path / "merged")(IDS).logits, after, rtol=1e-4, atol=1e-4)


@needs_peft
def test_a_learned_prefix_is_seen_in_training(lite, tmp_path):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(loaded(lite), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    loss = model.train()(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    loss.backward()
    (prefix,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert prefix.grad.abs().min() > 0
    assert model.eval()(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.item() == pytest.approx(loss.item())


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="not measured: accelerate is not installed")
def test_a_head_that_is_not_in_memory_is_normalised(lite, tmp_path):
    from accelerate import cpu_offload, disk_offload

    expected = loaded(lite)(IDS).logits.detach()
    device_map = {"model": "cpu", "lm_head": "disk"}
    models = [
        loaded(lite, device_map=device_map, offload_folder=tmp_path / "a"),
        cpu_offload(loaded(lite), execution_device="cpu"),
        loaded(lite),
    ]
    disk_offload(models[2], tmp_path / "b", execution_device="cpu")
    for model in models:
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, expected)
        assert model.lm_head.weight.is_meta


@needs_peft
def test_the_head_is_trained_whole_or_not(lite):
    import peft

    model = loaded(lite)
    whole = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["dense"], modules_to_save=["lm_head"]))
    before = whole(input_ids=IDS).logits.detach()
    with torch.no_grad():
        whole.base_model.model.lm_head.modules_to_save["default"].weight.mul_(torch.linspace(0.5, 3, 24))
    torch.testing.assert_close(whole(input_ids=IDS).logits, before, rtol=0, atol=1e-5)
    adapted = peft.get_peft_model(loaded(lite), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="leave lm_head out of target_modules"):
        adapted(input_ids=IDS)


def test_experts_are_stacked_as_ours(lite):
    model, ours = loaded(lite), load_hf(lite)
    assert isinstance(model.model, BailingMoeModel) and isinstance(ours, LingForCausalLM)
    names = [name for name, _ in ours.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))


def test_a_missing_weight_is_reported(lite, tmp_path):
    weights = stored(lite)
    del weights["model.norm.weight"]
    _, report = loaded(write_released(tmp_path / "a", LITE, weights, num_files=1), output_loading_info=True)
    assert report["missing_keys"] == {"model.norm.weight"}
