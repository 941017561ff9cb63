"""Configurations of the published code: every published variant in both layouts, and what is refused."""

import copy
import inspect
from typing import Any

import pytest
import torch
import yaml
from sweep import sweep

import zoo.bfn
from zoo.base.hyperparameters import build
from zoo.bfn import Flow, Network, Solver, read_official_config

VDM = "{embedding_dim: 128, n_blocks: 32, n_attention_heads: 1, dropout_prob: 0.1, norm_groups: 32, input_channels: 3,\
 use_fourier_features: True, attention_everywhere: False, image_size: 32}"
UNET = "{image_size: 28, in_channels: 2, model_channels: 128, out_channels: 128, num_res_blocks: 2, dropout: 0.5, dims: 2,\
 attention_resolutions: [8,16], channel_mult: [1, 2, 2], conv_resample: True, num_heads: 4, num_heads_upsample: -1,\
 project_input: True, skip: True}"
GPT = "{vocab_size: 27, n_layer: 24, n_head: 12, n_embd: 768, dropout: 0.0, skip: True, bias: True}"
LOADER = "{batch_size: 32, shuffle: True, num_workers: 8, pin_memory: True, drop_last: True}"
RUN = "{checkpoint_interval: 10_000, ema_decay: 0.9999, grad_clip_norm: 5.0, log_interval: 1, n_training_steps: 1_000_000,\
 val_interval: 50_000, val_repeats: 100}"


def part(name: str, parameters: str) -> str:
    return f"{{class_name: {name}, parameters: {parameters}}}"


def base_layout(data: str, model: dict[str, str], optimizer: str) -> dict[str, Any]:
    lines = [f"meta: {{neptune: , debug: False}}\ndata: {data}\ntrain_loader: {LOADER}\nval_loader: {LOADER}\nmodel:"]
    lines += [f"  {name}: {text}" for name, text in model.items()]
    return yaml.safe_load("\n".join([*lines, f"optimizer: {optimizer}\ntraining: {RUN}"]))


def cifar10(bins: int, discretized: bool) -> dict[str, Any]:
    head = part("DiscretizedNormalFactory", f"{{num_bins: {bins}, clip: True}}") if discretized else part("DeltaFactory", "{}")
    adapter = "{input_channels: 3, input_shape: [32, 32], output_height: 3, add_pos_feats: False, add_mask: False}"
    return base_layout(
        f"{{dataset: cifar10, horizontal_flip: False, num_bins: {bins}}}",
        {
            "net": part("UNetVDM", VDM),
            "input_adapter": part("FourierImageInputAdapter", adapter),
            "output_adapter": part(
                "OutputAdapter", f"{{input_height: 131, output_channels: 3, output_height: {1 + discretized}}}"
            ),
            "bayesian_flow": part("CtsBayesianFlow", f"{{min_variance: {'1e-6' if bins == 256 else '1e-3'}}}"),
            "loss": part("CtsBayesianFlowLoss", "{noise_pred: True}"),
            "distribution_factory": head,
        },
        "{lr: 2e-4, betas: [0.9,0.99], weight_decay: 0.01, eps: 1e-8}",
    )


def mnist() -> dict[str, Any]:
    adapter = "{input_channels: 1, input_shape: [28, 28], output_height: 2, add_pos_feats: False}"
    return base_layout(
        "{dataset: bin_mnist}",
        {
            "net": part("UNetModel", UNET),
            "input_adapter": part("FourierImageInputAdapter", adapter),
            "output_adapter": part("OutputAdapter", "{input_height: 256, output_channels: 1, output_height: 1}"),
            "bayesian_flow": part("DiscreteBayesianFlow", "{n_classes: 2, max_sqrt_beta: 3, discretize: False}"),
            "loss": part("DiscreteBayesianFlowLoss", "{}"),
            "distribution_factory": part("BernoulliFactory", "{}"),
        },
        "{lr: 1e-4, betas: [0.9,0.98]}",
    )


def text8() -> dict[str, Any]:
    adapter = "{vocab_size: 27, seq_len: 256, output_size: 768, learn_pos_embedding: False}"
    return base_layout(
        "{dataset: text8, seq_len: 256}",
        {
            "net": part("GPT", GPT),
            "input_adapter": part("TextInputAdapter", adapter),
            "output_adapter": "null",
            "bayesian_flow": part("DiscreteBayesianFlow", "{n_classes: 27, max_sqrt_beta: 0.75}"),
            "loss": part("DiscreteBayesianFlowLoss", "{}"),
            "distribution_factory": part("CategoricalFactory", "{}"),
        },
        "{lr: 1e-4, betas: [0.9, 0.98], weight_decay: 0.01}",
    )


def solver_cifar10() -> dict[str, Any]:
    return yaml.safe_load(f"""
data: {{dataset: cifar10, horizontal_flip: False, num_bins: 256, image_size: 32, image_channels: 3}}
net:
  name: UNetVDM
  backbone: {VDM}
  input_adapter:
    {{name: FourierImageInputAdapter, input_channels: 3, input_shape: [32, 32], output_height: 3, add_pos_feats: False,
      add_mask: False}}
  output_adapter: {{name: OutputAdapter, input_height: 131, output_channels: 3, output_height: 1}}
bayesian_flow: {{min_variance: 1e-6}}
sampling:
  {{last_drop: True, eta: 0.01, seed: 1, algorithm: ode_bfnsolver2_multi_step, initial_dist: zero_mean_and_std, n_steps: 50,
    batch_size: 500, n_samples: 100, save_path: samples, mean_std_path: '', fid_stat: stats.npz}}
""")


def solver_text8() -> dict[str, Any]:
    return yaml.safe_load(f"""
meta: {{neptune: , debug: False}}
data: {{dataset: text8, seq_len: 256, vocab_size: 27}}
net:
  name: GPT
  backbone: {GPT}
  input_adapter: {{name: TextInputAdapter, vocab_size: 27, seq_len: 256, output_size: 768, learn_pos_embedding: False}}
  output_adapter: null
bayesian_flow: {{n_classes: 27, max_sqrt_beta: 0.75}}
sampling:
  {{last_drop: True, cate_samp: False, addi_step: False, eta: 0.001, algorithm: sde_bfnsolver2_multi_step, n_steps: 500,
    initial_dist: optimal_mean_and_std, batch_size: 1000, n_samples: 1000, save_path: samples, mean_std_path: moments.pt}}
""")


def solver_mnist() -> dict[str, Any]:
    """The solvers' code keeps this one in the other layout."""
    config = mnist()
    config["data"] |= {"image_size": 28, "image_channels": 1}
    config["sampling"] = {"last_drop": True, "eta": 0.001, "seed": 1, "algorithm": "bfn", "n_steps": 100, "batch_size": 500}
    config["sampling"] |= {"initial_dist": "zero_mean_and_std", "n_samples": 8, "save_path": "samples", "mean_std_path": ""}
    return config


def arguments(component: dict[str, Any], name: str) -> dict[str, Any]:
    assert component["class_path"] == f"zoo.bfn.{name}"
    return component["init_args"]


def check_against_class(component: dict[str, Any]) -> None:
    """The component's class, where this version has it, takes these arguments."""
    cls = getattr(zoo.bfn, component["class_path"].rpartition(".")[2], None)
    if cls is not None:
        inspect.signature(cls).bind(**component["init_args"])


@pytest.mark.parametrize(
    "config", sweep([cifar10(16, False), cifar10(256, True), mnist(), text8(), solver_cifar10(), solver_text8()], quick=(1, 3))
)
def test_what_is_read_builds_the_published_model(config):
    found = read_official_config(config).hyperparameters
    build(Flow, found["flow"])
    for component in found.values():
        if component["class_path"].startswith("zoo."):
            check_against_class(component)
    with torch.device("meta"):
        network = build(Network, found["network"])
        published = type(network)(**({"num_outputs": 2} if found["head"]["class_path"].endswith("NormalHead") else {}))
    state = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert state == {name: tensor.shape for name, tensor in published.state_dict().items()}


@pytest.mark.parametrize("bins", [16, 256])
@pytest.mark.parametrize("discretized", [False, True])
def test_cifar10(bins, discretized):
    found = read_official_config(cifar10(bins, discretized))
    parts = found.hyperparameters
    assert arguments(parts["flow"], "ContinuousFlow") == {"min_variance": 1e-6 if bins == 256 else 1e-3}
    if discretized:
        head = arguments(parts["head"], "DiscretizedNormalHead")
        assert head == {"num_bins": bins, "clip": True, "min_std": 1e-3, "max_std": 10.0, "min_prob": 1e-5}
    else:
        head = arguments(parts["head"], "DeltaHead")
        assert head == {"clip": 1.0, "num_bins": bins, "reconstruction_std": 1.0 if bins == 256 else 0.7}
    network = arguments(parts["network"], "UNetVDM")
    assert (network["num_outputs"], network["dropout"], network["add_mask"]) == (1 + discretized, 0.1, False)
    assert arguments(parts["codec"], "ImageCodec") == {"shape": [3, 32, 32], "dynamic_binarization": False}
    adamw = {"lr": 2e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01}
    assert parts["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": adamw}
    assert "solver" not in parts and not found.sampling
    assert found.data == {"dataset": "cifar10", "flip": False, "val_fraction": 0.01}
    assert found.training["max_steps"] == 1_000_000
    assert (found.training["ema_decay"], found.training["gradient_clip_val"], found.training["batch_size"]) == (0.9999, 5.0, 32)


def test_binary_mnist():
    parts = read_official_config(mnist()).hyperparameters
    assert arguments(parts["flow"], "DiscreteFlow") == {"num_classes": 2, "max_sqrt_beta": 3.0}
    assert arguments(parts["head"], "BernoulliHead") == {}
    assert arguments(parts["codec"], "ImageCodec") == {"shape": [1, 28, 28], "dynamic_binarization": True}
    network = arguments(parts["network"], "ImprovedUNet")
    assert (network["num_inputs"], network["num_outputs"], network["multipliers"]) == (1, 1, [1, 2, 2])
    assert (network["add_mask"], network["adapter_width"]) == (True, None)
    assert parts["optimizer"]["init_args"]["weight_decay"] == 0.01  # torch's default; the file is silent


def test_text8():
    parts = read_official_config(text8()).hyperparameters
    assert arguments(parts["flow"], "DiscreteFlow") == {"num_classes": 27, "max_sqrt_beta": 0.75}
    assert arguments(parts["head"], "CategoricalHead") == {}
    assert arguments(parts["codec"], "TextCodec") == {"length": 256}


def test_layout_of_the_solvers_code():
    ours, theirs = read_official_config(solver_cifar10()), read_official_config(cifar10(256, False))
    for name in ("network", "flow", "head", "codec"):
        assert ours.hyperparameters[name] == theirs.hyperparameters[name]
    solver = arguments(ours.hyperparameters["solver"], "ODE2M")
    assert solver == {"nfe": 50, "eta": 0.01, "grid": "uniform", "start": "zero", "statistics": None, "last_drop": True}
    assert ours.sampling == {"seed": 1, "num_samples": 100, "batch_size": 500, "fid_statistics": "stats.npz"}
    assert set(ours.not_applicable) == {"sampling.save_path", "sampling.mean_std_path"}

    text = read_official_config(solver_text8())
    assert text.hyperparameters["network"] == read_official_config(text8()).hyperparameters["network"]
    solver = arguments(text.hyperparameters["solver"], "SDE2M")
    assert (solver["nfe"], solver["start"], solver["statistics"]) == (500, "optimal", "moments.pt")
    build(Solver, text.hyperparameters["solver"])


def test_network_calls_are_steps_and_what_the_sampler_adds():
    found = read_official_config(solver_mnist())
    assert arguments(found.hyperparameters["solver"], "BFNSampler") == {"nfe": 101}
    reasons = {name: reason for name, reason in found.not_applicable.items() if name.startswith("sampling")}
    assert set(reasons) == {f"sampling.{name}" for name in ("eta", "last_drop", "initial_dist", "mean_std_path", "save_path")}


def test_every_option_is_mapped_or_named_as_not_applicable():
    """Each option, put to an odd value, changes what is read, is refused, or is listed as not applicable."""
    for config in (cifar10(256, True), mnist(), text8(), solver_text8()):
        config["sampling"] = solver_text8()["sampling"]
        plain = read_official_config(config)
        for path in leaves(config):
            changed = copy.deepcopy(config)
            section = changed
            for key in path[:-1]:
                section = section[key]
            section[path[-1]] = odd(section[path[-1]])
            try:
                found = read_official_config(changed)
            except ValueError:
                continue
            listed = ".".join(path) in found.not_applicable
            assert listed or found != plain, path


def leaves(config: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in config.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return found


def odd(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [17 + i for i in range(len(value))]
    return "odd" if isinstance(value, str) and not value[:1].isdigit() else 17


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.net.class_name", "UNet", "UNet cannot be the net here; there is GPT and UNetModel and UNetVDM"),
        ("model.net.parameters.embeding_dim", 64, "embeding_dim is no option of the published code. Did you mean embedding_dim"),
        ("model.distribution_factory.class_name", "GMMFactory", "GMMFactory cannot be the head"),
        (
            "model.loss.parameters.noise_pred",
            False,
            "noise_pred=False cannot be used here, only True: networks",
        ),
        ("model.loss.class_name", "DiscreteBayesianFlowLoss", "DiscreteBayesianFlowLoss cannot be the loss"),
        ("model.bayesian_flow.parameters.min_variance", "small", "model.bayesian_flow.parameters.min_variance='small' must be"),
        ("model.output_adapter.parameters.output_height", 2, "output_height=2 cannot be used here, only 1"),
        ("model.input_adapter.parameters.mask_res", 64, "mask_res=64 cannot"),
        ("data.num_bins", 16, "num_bins=16 contradicts min_variance=1e-06"),
        ("data.dataset", "imagenet", "data.dataset='imagenet' is not known"),
        ("model.net", None, "model.net.class_name is missing"),
        ("training.warmup", 100, "training.warmup is no option"),
        ("extra", {}, "extra is no option"),
        ("model.net.parameters", [1], "must be a section"),
        ("net", {}, "either a section `model`"),
        ("sampling", {"algorithm": "ode3", "n_steps": 5}, "no sampler 'ode3'"),
        ("sampling", {"algorithm": "ode_bfnsolver1", "n_steps": 0}, "n_steps=0"),
        ("sampling", {"algorithm": "ode_bfnsolver1", "n_steps": 5, "initial_dist": "best"}, "initial_dist='best'"),
    ],
)
def test_what_is_unknown_is_refused_by_its_name(path, value, message):
    config = cifar10(256, False)
    *parents, last = path.split(".")
    section = config
    for key in parents:
        section = section[key]
    section[last] = value
    with pytest.raises(ValueError, match=message):
        read_official_config(config)


def test_numbers_that_yaml_takes_for_text_are_numbers():
    config = cifar10(256, False)
    assert config["model"]["bayesian_flow"]["parameters"]["min_variance"] == "1e-6"
    config["model"]["net"]["parameters"]["n_blocks"] = "4.0"
    parts = read_official_config(config).hyperparameters
    assert parts["network"]["init_args"]["depth"] == 4
    assert isinstance(parts["flow"]["init_args"]["min_variance"], float)


def test_clamped_loss_is_read():
    config = cifar10(256, False)
    config["model"]["loss"]["parameters"]["min_loss_variance"] = 0.01
    assert read_official_config(config).hyperparameters["min_loss_variance"] == 0.01
