"""Every configuration that comes with the package parses, builds, and does its first steps."""

import bisect
import dataclasses
import importlib.util
import sys

import pytest
import torch
import yaml

from datamodules import ZooDataModule
from datamodules.assets.fetch import list_assets
from zoo.__main__ import main
from zoo.base.hyperparameters import build, plain
from zoo.callbacks import BatchSizeWarmup
from zoo.cli.configs import packaged_configs
from zoo.ling import WSD, Ling, LingForCausalLM, preset, save_hf
from zoo.module import ZooModule

CONFIGS = packaged_configs()
WHOLE = [name for name, path in CONFIGS.items() if "model" in yaml.safe_load(path.read_text())]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
ASSETS = {"FashionMNIST": "fashion-mnist"}  # those that `make test` does not fetch
#: Recipes, published but for eMIGM's on CIFAR-10, too large to be stepped here, with the parameters that their networks have.
PUBLISHED = {
    "bfn/cifar10_16c": 30_722_188,
    "bfn/cifar10_16d": 30_722_584,
    "bfn/cifar10_256c": 30_722_188,
    "bfn/cifar10_256d": 30_722_584,
    "bfn/mnist_binarized": 24_808_961,
    "bfn/text8": 170_175_003,
    "ctr/criteo": 41_296_089,
    "emigm/cifar10": 40_051_608,
    "emigm/imagenet256_xsmall": 69_018_848,
    "emigm/imagenet256_small": 96_640_544,
    "emigm/imagenet256_base": 207_924_000,
    "emigm/imagenet256_large": 478_325_280,
    "emigm/imagenet256_huge": 942_401_824,
    "emigm/imagenet512_xsmall": 104_506_624,
    "emigm/imagenet512_small": 132_145_728,
    "emigm/imagenet512_base": 244_150_592,
    "emigm/imagenet512_large": 478_403_136,
    "ling/lite_pretrain": 16_801_974_272,
    "ling/plus_pretrain": 290_602_910_976,
}
#: Recipes that start from a folder of weights in the released format, which is not here.
NEEDS_WEIGHTS = {
    "ling/chat": "data/ling-lite",
    "ling/lite_deepspeed": "data/ling-lite",
    "ling/lite_dpo": "data/ling-lite-sft",
    "ling/lite_dpo_best_of_n": "data/ling-lite-dpo",
    "ling/lite_dpo_format": "data/ling-lite-dpo",
    "ling/lite_pretrain_anneal": "data/ling-stage-2",
    "ling/lite_pretrain_long": "data/ling-stage-1",
    "ling/lite_sft": "data/ling-lite",
    "ling/lite_sft_long": "data/ling-lite-sft",
}


#: Those that need a file that the user brings or large weights, or train nothing.
NEEDS_A_FILE = (
    "bahe/journey",
    "bahe/movielens",
    "bahe/movielens_tiny",
    "bahe/movielens_tokens",
    "bahe/qwen2_1b5_efficiency",
    "kpod/distill_gsm_symbolic",
    "kpod/flan_t5_xl_csqa",
    "kpod/llama_7b_gsm8k",
    "kpod/smollm2_gsm_symbolic",
    "kpod/weighter_flan_t5_xl_csqa",
    "kpod/weighter_llama_7b_gsm8k",
    "kpod/weighter_smollm2_gsm_symbolic",
    "llmrec/amazon_spiao_bert_base",
    "llmrec/amazon_spiao_opt1b3_lora",
    "llmrec/journey_minilm",
    "llmrec/movielens_minilm",
    "llmrec/movielens_popularity",
    "llmrec/movielens_tiny",
    "llmrec/movielens_zero_shot",
    "lm/qwen2_lora",
    "lm/smollm2_dpo",
    "lm/smollm2_full",
    "lm/smollm2_sft",
    "rlhf/llama_7b",
)
#: Two whose strategies have long tests of their own.
BALANCED = ("antdt/flights_dd", "antdt/flights_ps")
#: Those that differ from another in a few numbers: read here, trained by `make test-all`.
LIKE_ANOTHER = ("bfn/digits_k2", "bfn/digits_k4", "bfn/mnist", "ctr/flights_dcn", "ctr/flights_dlrm",
                "emigm/digits_mar", "emigm/digits_maskgit", "emigm/digits_mdm",
                "kpod/sft_gsm_symbolic", "ling/tiny_long", "rlhf/grpo_vader", "rlhf/sft_vader", "rlhf/vader_h100")  # fmt: skip
#: Those that train longer than the others, on data that a method of FIRST reads as well.
LONGER = ("bfn/digits_discretized", "bfn/fashion_mnist", "emigm/fashion_mnist", "metrics/fd_digits_mlp", "metrics/fd_fashion_cnn")
#: One of each method.
FIRST = ("bahe/movielens_ids", "bfn/digits", "ctr/flights", "emigm/digits",
         "kpod/weighter_gsm_symbolic", "ling/tiny", "llmrec/movielens_sasrec",
         "lm/tiny", "rlhf/ppo_vader")  # fmt: skip
#: Of the published ones one of each kind of network; the others differ in sizes.
BUILT = ("bfn/cifar10_16d", "bfn/mnist_binarized", "bfn/text8", "ctr/criteo", "emigm/cifar10", "emigm/imagenet256_xsmall",
         "ling/lite_pretrain")  # fmt: skip
#: Strategies with one method each that is trained so; `make test-all` composes all with all.
COMPOSED = [("ddp", "bfn/digits"), ("antdt", "ctr/flights"), ("deepspeed_stage_2", "ling/tiny"), ("edit", "ling/tiny"),
            ("paro_iig", "emigm/digits"), ("separation", "rlhf/ppo_vader")]  # fmt: skip
FEW = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
STEPPED = [name for name in WHOLE if name not in (*PUBLISHED, *NEEDS_WEIGHTS, *NEEDS_A_FILE, "emigm/cache_latents")]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])


@pytest.mark.parametrize(("name", "num_parameters"), [
    pytest.param(*recipe, marks=[] if recipe[0] in BUILT else [pytest.mark.slow]) for recipe in PUBLISHED.items()
])  # fmt: skip
def test_published_recipes_are_built_whole(name, num_parameters):
    config = yaml.safe_load(CONFIGS[name].read_text())
    if name.startswith("ctr/"):  # whose data know the sizes
        data = build(ZooDataModule, config["data"])
        config["model"]["init_args"] |= {argument: plain(getattr(data, argument)) for argument in data.model_arguments}
    with torch.device("meta"):
        model = build(ZooModule, config["model"])
    assert sum(parameter.numel() for parameter in model.network.parameters()) == num_parameters
    assert model.configure_optimizers() is not None


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_need_the_published_data(name):
    data = yaml.safe_load(CONFIGS[name].read_text())["data"]["init_args"]
    if name.startswith("ling/"):
        assert all(source.startswith("data/") for source in [*data["sources"], data["tokenizer"]])
        return
    assert data["root"].startswith("data/")
    assert data.get("val_fraction") == (0.01 if name.startswith("bfn/") and name != "bfn/text8" else None)


def test_the_default_codec_can_be_shown_and_replaced(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", "bfn/digits", "--model.codec.shape", "[1, 8, 8]", "--model.codec.dynamic_binarization", "false",
              "--print_config"])  # fmt: skip
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["codec"]["init_args"]["shape"] == [1, 8, 8]
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "BFN"])
    assert "object at 0x" not in capsys.readouterr().out


def fit(name):
    config = yaml.safe_load(CONFIGS[name].read_text())
    asset = ASSETS.get(config["data"]["class_path"])
    if asset and not any(state.name == asset and state.state == "ready" for state in list_assets()):
        pytest.skip(f"not measured: zoo assets fetch {asset}")
    assert main(["fit", "-c", name, *FEW, *QUIET]) == 0


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in (*LIKE_ANOTHER, *LONGER) else [])
    for name in STEPPED if name not in (*FIRST, *BALANCED)
])  # fmt: skip
def test_it_trains_and_validates(name):
    fit(name)


@pytest.mark.parametrize("name", [*LIKE_ANOTHER, *NEEDS_A_FILE])
def test_it_is_read(name, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", name, "--print_config"])
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in STEPPED])
def test_it_trains_validates_and_tests(name):
    fit(name)
    without = ["--trainer.callbacks", "null"]  # drawing thousands of samples is the benchmark's business
    assert main(["test", "-c", name, "--ckpt_path", "last", *FEW, *QUIET, *without]) == 0


def says(merged, value):
    """Whether a merged configuration holds what one file says; classes may be named with their package, defaults added."""
    if isinstance(value, dict):
        return all(key in merged and says(merged[key], inner) for key, inner in value.items())
    return merged == value or (isinstance(merged, str) and merged.startswith("strategies.") and merged.endswith(f".{value}"))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("ling/chat", "ling/lite_dpo", "ling/lite_sft") else [pytest.mark.slow])
    for name in NEEDS_WEIGHTS
])  # fmt: skip
def test_recipes_for_released_weights_say_what_is_missing(name, capsys):
    """The data module and the trainer are parsed; the model names the folder that it wants."""
    assert main(["fit" if name != "ling/chat" else "predict", "-c", name, *QUIET]) != 0
    assert f"There is no {NEEDS_WEIGHTS[name]}: give the folder" in capsys.readouterr().err


def test_recipes_for_deepspeed_have_no_spike_guard():
    """DeepSpeed steps by itself, and the guard refuses it."""
    texts = {name: CONFIGS[name].read_text() for name in WHOLE}
    meant = [name for name, text in texts.items() if "deepspeed" in text]
    assert {"ling/lite_deepspeed", "ling/lite_dpo", "ling/lite_sft"} <= set(meant)
    assert not [name for name in meant if "class_path: SpikeGuard" in texts[name]]


def test_one_number_of_an_architecture_can_be_typed(capsys):
    """The recipe spells its preset out: a single number typed beside the preset's name would make a Ling-Lite of it."""
    first_stage = {"rope_theta": 1e4, "max_position_embeddings": 4096}
    plus = preset("ling_plus").replace(**first_stage)
    tiny = preset("ling_tiny")
    for name, known in (("ling/tiny", tiny), ("ling/tiny_long", tiny), ("ling/plus_pretrain", plus)):
        with pytest.raises(SystemExit):
            main(["fit", "-c", name, "--model.config.num_hidden_layers", "2", "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["config"]
        assert config == dataclasses.asdict(known.replace(num_hidden_layers=2))


@pytest.mark.parametrize("name", ["ling/lite_pretrain", "ling/plus_pretrain"])
def test_the_first_stage_has_the_positions_of_short_texts(name):
    config = yaml.safe_load(CONFIGS[name].read_text())
    architecture = config["model"]["init_args"]["config"]
    assert architecture["rope_theta"] == 1e4
    assert architecture["max_position_embeddings"] == config["data"]["init_args"]["seq_len"] - 1 == 4096


@pytest.mark.parametrize("name", ["ling/lite_pretrain", "ling/plus_pretrain"])
def test_the_first_stage_has_its_tokens_and_halves_the_rate_at_60_percent_of_them(name):
    config = yaml.safe_load(CONFIGS[name].read_text())
    (batch,) = [each["init_args"] for each in config["trainer"]["callbacks"] if each["class_path"] == "BatchSizeWarmup"]
    warmup, seq_len = BatchSizeWarmup(**batch), config["data"]["init_args"]["seq_len"]
    assert (warmup.start, warmup.end, warmup.tokens) == (2560, 8960, 0.02 * 9e12)
    sequences = [0.0]
    while len(sequences) <= config["trainer"]["max_steps"]:
        sequences.append(sequences[-1] + warmup.batch_size(round(sequences[-1] * seq_len)))
    assert sequences[-1] * (seq_len - 1) == pytest.approx(9e12, rel=1e-3)
    arguments = config["model"]["init_args"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=arguments["optimizer"]["init_args"]["lr"])
    schedule = WSD(optimizer, **arguments["lr_scheduler"]["init_args"])

    def rate(step: int) -> float:
        schedule.last_epoch = step
        return schedule.get_lr()[0]

    halved = bisect.bisect_left(range(2000, len(sequences)), True, key=lambda step: rate(step) < 2.4e-4) + 2000
    assert (rate(0), rate(2000), rate(halved - 1), rate(halved), rate(len(sequences))) == (0, 2.4e-4, 2.4e-4, 1.2e-4, 1.2e-4)
    assert sequences[halved] / sequences[-1] == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("name", ["ling/lite_dpo", "ling/lite_dpo_best_of_n", "ling/lite_dpo_format"])
def test_preferences_have_the_published_numbers(name):
    config = yaml.safe_load(CONFIGS[name].read_text())
    arguments, trainer = config["model"]["init_args"], config["trainer"]
    assert (arguments["beta"], arguments["nll_weight"], arguments["optimizer"]["init_args"]["lr"]) == (0.1, 0.05, 3e-7)
    assert 8 * config["data"]["init_args"]["batch_size"] * trainer["accumulate_grad_batches"] == 192
    schedule = arguments["lr_scheduler"]["init_args"]
    assert schedule["total_steps"] == trainer["max_steps"] and schedule["halve_at"] == 1


@pytest.mark.parametrize("name", ["ling/lite_pretrain_long", "ling/lite_pretrain_anneal"])
def test_later_stages_have_the_tokens_that_they_name(name):
    text = CONFIGS[name].read_text()
    config = yaml.safe_load(text)
    (batch,) = [each["init_args"] for each in config["trainer"]["callbacks"] if each["class_path"] == "BatchSizeWarmup"]
    assert batch["start"] == batch["end"] == 2240 and "batches of 2240 sequences" in text
    tokens = config["trainer"]["max_steps"] * batch["end"] * (config["data"]["init_args"]["seq_len"] - 1)
    assert tokens == pytest.approx(150e9, rel=1e-3)


@pytest.mark.parametrize("name", ["ling/lite_sft", "ling/lite_sft_long"])
def test_the_schedule_of_fine_tuning_leaves_the_betas_of_its_optimizer(name):
    arguments = yaml.safe_load(CONFIGS[name].read_text())["model"]["init_args"]
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    options = {**arguments["optimizer"]["init_args"], "fused": False}
    optimizer = torch.optim.AdamW(parameters, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, **arguments["lr_scheduler"]["init_args"])
    for _ in range(3):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_the_stage_of_long_texts_changes_the_base_of_the_positions_of_the_one_before(tmp_path):
    arguments = yaml.safe_load(CONFIGS["ling/lite_pretrain_long"].read_text())["model"]["init_args"]
    assert arguments["checkpoint"] == "./data/ling-stage-1"
    before = preset("ling_tiny").replace(num_hidden_layers=1)
    save_hf(LingForCausalLM(before), tmp_path / "stage-1")
    changes = arguments["config_changes"]
    model = Ling(checkpoint=str(tmp_path / "stage-1"), config_changes=changes)
    assert model.config.rope_theta == 6e5 and model.config.max_position_embeddings == 16384
    assert model.config.replace(**{name: getattr(before, name) for name in changes}) == before.replace(head_dim=32)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        pytest.param(name, whole, marks=() if (name.removeprefix("strategies/"), whole) in COMPOSED else pytest.mark.slow)
        for name in CONFIGS
        if name.startswith("strategies/")
        for whole in FIRST  # the trainer is composed
    ],
)
def test_strategies_compose_with_every_method(name, whole, capsys):
    if "deepspeed" in name and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("not measured: pip install lightning-zoo[deepspeed]")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", whole, "-c", name, "--print_config"])
    assert not stop.value.code
    merged = yaml.safe_load(capsys.readouterr().out)
    for key, value in yaml.safe_load(CONFIGS[name].read_text())["trainer"].items():
        assert says(merged["trainer"][key], value), merged["trainer"][key]
    callbacks = yaml.safe_load(CONFIGS[whole].read_text())["trainer"].get("callbacks", [])
    assert len(merged["trainer"]["callbacks"] or []) == len(callbacks)
