"""Configurations of the published code as hyperparameters of ours.

Two layouts exist. The code of arXiv 2308.07037 has ``data, train_loader, val_loader, model, optimizer, training``, with
``class_name`` and ``parameters`` for each part of the model; that of arXiv 2404.15766 has ``data, net, bayesian_flow,
sampling``, with ``name`` and the parameters side by side. A ``sampling`` section is read in both.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from zoo.base.hyperparameters import class_path
from zoo.bfn.config_section import ConfigSection
from zoo.bfn.solvers import Solver, find_solver

__all__ = ["OfficialConfig", "read_official_config"]


@dataclass(frozen=True)
class OfficialConfig:
    """Content of a configuration of the published code.

    Args:
        hyperparameters: arguments of `BFN` as plain data: ``network``, ``flow``, ``head``, ``codec``; ``solver`` if the
            file has a ``sampling`` section, ``optimizer`` if it has one of that name.
        data: the ``dataset`` and how it is prepared, by the names of our DataModule's options.
        training: what it says of the run, by the names of our trainer's options where there are any.
        sampling: how many samples are drawn, with which seed, and what they are compared with.
        not_applicable: options without a counterpart here: dotted name and reason.
    """

    hyperparameters: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    sampling: dict[str, Any]
    not_applicable: dict[str, str]


class _Part(NamedTuple):
    """A part of the model: the name of its class, and its parameters."""

    name: str
    options: ConfigSection


class _Parts(NamedTuple):
    """All parts; without loss and head (in the solvers' code, which only samples) they follow from the flow."""

    net: _Part
    input_adapter: _Part
    output_adapter: _Part | None
    flow: _Part
    loss: _Part | None
    head: _Part | None


class _Kind(NamedTuple):
    """Numbers per element that networks take and give, and bins or classes, for a flow and a head."""

    num_inputs: int
    num_outputs: int
    num_levels: int
    continuous: bool
    min_loss_variance: float | None = None


def read_official_config(config: Mapping[str, Any]) -> OfficialConfig:
    """Read a configuration of the published code, of either layout.

    Args:
        config: the YAML file, parsed. Numbers like ``1e-6``, which YAML 1.1 takes for text, are read as numbers.

    Raises:
        ValueError: a class or an option that the published code does not have or that we do not, or values that
            contradict one another.
    """
    root = ConfigSection("", config, {})
    if ("model" in root) == ("net" in root):
        raise ValueError(
            "This is no configuration of the published Bayesian flow networks: it must have either a section `model`"
            " (nnaisense/bayesian-flow-networks) or a section `net` (ML-GSAI/BFN-Solver)."
        )
    data = root.section("data")
    parts = _base_layout(root) if "model" in root else _solver_layout(root)
    flow, head, kind = _flow_and_head(parts, data)
    network, shape = _network(parts, kind)
    codec, prepared = _data(data, shape, kind)
    hyperparameters: dict[str, Any] = {"network": network, "flow": flow, "head": head, "codec": codec}
    if kind.min_loss_variance is not None:
        hyperparameters["min_loss_variance"] = kind.min_loss_variance
    sampling: dict[str, Any] = {}
    if "sampling" in root:
        hyperparameters["solver"], sampling = _sampling(root.section("sampling"))
    if "optimizer" in root:
        hyperparameters["optimizer"] = _optimizer(root.section("optimizer"))
    training = _training(root)
    root.section("meta").leave("it concerns a logging service")
    root.close()
    return OfficialConfig(hyperparameters, prepared, training, sampling, root.not_applicable)


def _base_layout(root: ConfigSection) -> _Parts:
    model = root.section("model")

    def part(key: str) -> _Part | None:
        section = model.section(key)
        name, options = section.take("class_name", None), section.section("parameters")
        section.close()
        return None if name is None else _Part(str(name), options)

    def required(key: str) -> _Part:
        found = part(key)
        if found is None:
            raise ValueError(f"model.{key}.class_name is missing in the configuration.")
        return found

    parts = _Parts(
        required("net"),
        required("input_adapter"),
        part("output_adapter"),
        required("bayesian_flow"),
        required("loss"),
        required("distribution_factory"),
    )
    model.close()
    return parts


def _solver_layout(root: ConfigSection) -> _Parts:
    net = root.section("net")
    name = str(net.take("name"))
    input_adapter, output_adapter = net.section("input_adapter"), net.section("output_adapter")
    output_name = output_adapter.take("name", None)
    flow = root.section("bayesian_flow")
    parts = _Parts(
        _Part(name, net.section("backbone")),
        _Part(str(input_adapter.take("name")), input_adapter),
        None if output_name is None else _Part(str(output_name), output_adapter),
        _Part("DiscreteBayesianFlow" if "n_classes" in flow else "CtsBayesianFlow", flow),
        None,
        None,
    )
    net.close()
    return parts


# Flow and head


def _flow_and_head(parts: _Parts, data: ConfigSection) -> tuple[dict[str, Any], dict[str, Any], _Kind]:
    if _known(parts.flow, "bayesian_flow", "CtsBayesianFlow", "DiscreteBayesianFlow") == "CtsBayesianFlow":
        return _continuous(parts, data.integer("num_bins", 256))
    data.leave("discrete data have classes, not bins", "num_bins")
    return _discrete(parts)


def _continuous(parts: _Parts, num_bins: int) -> tuple[dict[str, Any], dict[str, Any], _Kind]:
    min_variance = parts.flow.options.number("min_variance", 1e-6)
    parts.flow.options.close()
    min_loss_variance = None
    if parts.loss is not None:
        _known(parts.loss, "loss", "CtsBayesianFlowLoss")
        parts.loss.options.require("noise_pred", True, "networks predict the noise")
        least = parts.loss.options.number("min_loss_variance", -1)
        min_loss_variance = None if least == -1 else least
        parts.loss.options.close()
    flow = _component("ContinuousFlow", min_variance=min_variance)
    if parts.head is None or _known(parts.head, "head", "DeltaFactory", "DiscretizedNormalFactory") == "DeltaFactory":
        # The published code scores the reconstruction by these bins, whatever the data are quantised to.
        scored, reconstruction_std = (16, 0.7) if min_variance == 1e-3 else (256, 1.0)
        if num_bins != scored:
            raise ValueError(
                f"data.num_bins={num_bins} contradicts min_variance={min_variance}, with which the published code scores"
                f" {scored} bins: use num_bins {scored}, or another min_variance (1e-3 for 16 bins, 1e-6 for 256)."
            )
        clip = 1.0
        if parts.head is not None:
            clip = parts.head.options.number("clip_range", 1.0)
            parts.head.options.close()
        head = _component("DeltaHead", clip=clip, num_bins=num_bins, reconstruction_std=reconstruction_std)
        return flow, head, _Kind(1, 1, num_bins, True, min_loss_variance)
    options = parts.head.options
    options.require("num_bins", num_bins, f"the data have data.num_bins={num_bins}")
    options.require("log_dev", True, "the network gives the logarithm of the standard deviation")
    head = _component(
        "DiscretizedNormalHead",
        num_bins=num_bins,
        clip=options.flag("clip", True),
        min_std=options.number("min_std_dev", 1e-3),
        max_std=options.number("max_std_dev", 10),
        min_prob=options.number("min_prob", 1e-5),
    )
    options.close()
    return flow, head, _Kind(1, 2, num_bins, True, min_loss_variance)


def _discrete(parts: _Parts) -> tuple[dict[str, Any], dict[str, Any], _Kind]:
    options = parts.flow.options
    classes = options.integer("n_classes")
    flow = _component("DiscreteFlow", num_classes=classes, max_sqrt_beta=options.number("max_sqrt_beta", 1))
    options.require("discretize", False, "discrete data are class numbers")
    options.leave("the belief is kept as logits, which need no such bound", "min_sqrt_beta", "epsilon")
    options.close()
    if parts.loss is not None:
        _known(parts.loss, "loss", "DiscreteBayesianFlowLoss")
        parts.loss.options.close()
    name = "BernoulliFactory" if classes == 2 else "CategoricalFactory"
    if parts.head is not None:
        name = _known(parts.head, "distribution_factory", "BernoulliFactory", "CategoricalFactory")
        parts.head.options.close()
    if name == "BernoulliFactory" and classes != 2:
        raise ValueError(f"BernoulliFactory is for two classes, but bayesian_flow.n_classes={classes}.")
    num_inputs = 1 if classes == 2 else classes
    num_outputs = 1 if name == "BernoulliFactory" else classes
    head = _component(name.replace("Factory", "Head"))
    return flow, head, _Kind(num_inputs, num_outputs, classes, False)


# Networks


def _network(parts: _Parts, kind: _Kind) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The network, and the shape of the data: (channels, height, width) or (length,)."""
    name = _known(parts.net, "net", "GPT", "UNetModel", "UNetVDM")
    network = {"GPT": _transformer, "UNetModel": _improved_unet, "UNetVDM": _unet_vdm}[name](parts, kind)
    for part in (parts.net, parts.input_adapter, parts.output_adapter):
        if part is not None:
            part.options.close()
    return network


def _transformer(parts: _Parts, kind: _Kind) -> tuple[dict[str, Any], tuple[int, ...]]:
    net, adapter = parts.net.options, parts.input_adapter.options
    _known(parts.input_adapter, "input_adapter", "TextInputAdapter")
    if parts.output_adapter is not None:
        raise ValueError("output_adapter must be null with the network GPT, which gives the outputs itself.")
    width = net.integer("n_embd", 768)
    net.require("vocab_size", kind.num_outputs, "the head reads that many numbers")
    net.require("is_causal", False, "every position sees all others")
    adapter.require("vocab_size", kind.num_inputs, "the flow shows that many numbers")
    adapter.require("output_size", width, "it must be the network's n_embd", default=256)
    length = adapter.integer("seq_len")
    network = _component(
        "BFNTransformer",
        num_inputs=kind.num_inputs,
        num_outputs=kind.num_outputs,
        seq_len=length,
        width=width,
        depth=net.integer("n_layer", 12),
        num_heads=net.integer("n_head", 12),
        dropout=net.number("dropout", 0),
        bias=net.flag("bias", True),
        skip=net.flag("skip", False),
        learned_positions=adapter.flag("learn_pos_embedding", False),
    )
    return network, (length,)


def _unet_vdm(parts: _Parts, kind: _Kind) -> tuple[dict[str, Any], tuple[int, ...]]:
    net = parts.net.options
    width = net.integer("embedding_dim", 128)
    shape, adapter, features = _image_adapters(parts, kind, width)
    net.require("input_channels", features, "the input adapter gives that many", default=3)
    net.require("image_size", shape[1], "it must be that of input_adapter.input_shape", default=32)
    network = _component(
        "UNetVDM",
        image_shape=list(shape),
        num_inputs=kind.num_inputs,
        num_outputs=kind.num_outputs,
        width=width,
        depth=net.integer("n_blocks", 32),
        num_heads=net.integer("n_attention_heads", 1),
        attention_everywhere=net.flag("attention_everywhere", False),
        dropout=net.number("dropout_prob", 0.1),
        norm_groups=net.integer("norm_groups", 32),
        fourier_exponents=[5, 6] if net.flag("use_fourier_features", True) else [],
        **adapter,
    )
    return network, shape


def _improved_unet(parts: _Parts, kind: _Kind) -> tuple[dict[str, Any], tuple[int, ...]]:
    net = parts.net.options
    width = net.integer("model_channels", 128)
    shape, adapter, features = _image_adapters(parts, kind, width)
    net.require("in_channels", features, "the input adapter gives that many", default=3)
    net.require("image_size", shape[1], "it must be that of input_adapter.input_shape", default=32)
    net.require("out_channels", width, "it must be model_channels", default=128)
    heads = net.integer("num_heads", 4)
    if net.integer("num_heads_upsample", -1) not in (-1, heads):
        raise ValueError(f"{net.where('num_heads_upsample')} must be -1 or num_heads={heads}: all attention has as many heads.")
    for key, value, default in (
        ("project_input", True, False),
        ("skip", True, True),
        ("conv_resample", True, True),
        ("dims", 2, 2),
        ("num_classes", None, None),
        ("use_scale_shift_norm", False, False),
    ):
        net.require(key, value, "the published models have no other", default=default)
    net.leave("it trades time for memory, not results", "use_checkpoint")
    network = _component(
        "ImprovedUNet",
        image_shape=list(shape),
        num_inputs=kind.num_inputs,
        num_outputs=kind.num_outputs,
        width=width,
        multipliers=net.integers("channel_mult", [1, 2, 2, 2]),
        num_res_blocks=net.integer("num_res_blocks", 3),
        num_heads=heads,
        attention_factors=net.integers("attention_resolutions", [8, 16]),
        dropout=net.number("dropout", 0),
        **adapter,
    )
    return network, shape


def _image_adapters(parts: _Parts, kind: _Kind, width: int) -> tuple[tuple[int, ...], dict[str, Any], int]:
    """Shape of the images, the network's arguments that concern the adapters, and the features that the first one gives."""
    _known(parts.input_adapter, "input_adapter", "FourierImageInputAdapter")
    if parts.output_adapter is None:
        raise ValueError("output_adapter is missing in the configuration; networks for images need OutputAdapter.")
    _known(parts.output_adapter, "output_adapter", "OutputAdapter")
    options, output = parts.input_adapter.options, parts.output_adapter.options
    channels = output.integer("output_channels")
    output.require("output_height", kind.num_outputs, "the head reads that many numbers per element")
    options.require("input_channels", channels * kind.num_inputs, "the flow shows that many numbers per pixel", default=3)
    options.require("learn_pos_feats", False, "features of the position are fixed")
    options.require("mask_res", -1, "the time is shown as one number")
    options.require("n_freq_bands", 64, "features of the position have that many frequencies")
    options.leave("the published code does not use it", "value_res", "pos_embed_size", "init_scale")
    mask, positions = options.flag("add_mask", True), options.flag("add_pos_feats", True)
    all_features = channels * kind.num_inputs + mask + 258 * positions
    features = options.integer("output_height", 256)
    beside = features if parts.net.name == "UNetVDM" else width
    output.require("input_height", width + beside, "it sees the network's output and input")
    height, breadth = options.integers("input_shape")
    adapter = {"add_mask": mask, "add_pos_feats": positions, "adapter_width": None if features == all_features else features}
    return (channels, height, breadth), adapter, features


# Data, sampling, training


def _data(data: ConfigSection, shape: tuple[int, ...], kind: _Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    dataset = data.take("dataset")
    if dataset not in ("cifar10", "mnist", "bin_mnist", "text8"):
        raise ValueError(f"data.dataset={dataset!r} is not known; there are cifar10, mnist, bin_mnist and text8.")
    prepared = {"dataset": dataset}
    data.leave("our own data sets know where they lie", "data_dir")
    if dataset == "text8":
        data.require("vocab_size", kind.num_levels, "it must be bayesian_flow.n_classes")
        data.require("seq_len", shape[0], "it must be that of the input adapter")
        codec = _component("TextCodec", length=shape[0])
    else:
        data.require("image_size", shape[1], "it must be that of input_adapter.input_shape")
        data.require("image_channels", shape[0], "it must be output_adapter.output_channels")
        prepared["flip"] = data.flag("horizontal_flip", False)
        prepared["val_fraction"] = data.number("val_frac", 0.01)
        codec = _component("ImageCodec", shape=list(shape), dynamic_binarization=dataset == "bin_mnist")
        if (dataset == "bin_mnist") == kind.continuous:
            raise ValueError(f"data.dataset={dataset!r} does not go with this bayesian_flow: bin_mnist is discrete, others not.")
    data.close()
    return codec, prepared


def _sampling(options: ConfigSection) -> tuple[dict[str, Any], dict[str, Any]]:
    """The solver, and how samples are drawn."""
    solver = find_solver(str(options.take("algorithm")))
    known = inspect.signature(solver).parameters
    arguments: dict[str, Any] = {}
    if "eta" in known:
        start, moments = _start(options)
        arguments = {"eta": options.number("eta", 1e-5), "grid": "uniform", "start": start, "statistics": moments}
        arguments["last_drop"] = options.flag("last_drop", True)
    else:
        reason = f"{solver.__name__} has a start and an end of its own"
        options.leave(reason, "eta", "last_drop", "initial_dist", "mean_std_path")
    for option, argument in (("cate_samp", "categorical"), ("addi_step", "extra_step")):
        if not options.flag(option, False):
            continue
        if argument not in known:
            raise ValueError(f"{options.where(option)}=True cannot be used here: {solver.__name__} has no such variant.")
        arguments[argument] = True
    steps = options.integer("n_steps")
    if steps < 1:
        raise ValueError(f"{options.where('n_steps')}={steps} must be at least 1.")
    arguments = {"nfe": _network_calls(solver, steps, arguments), **arguments}
    sampling = {"seed": options.take("seed", None), "num_samples": options.take("n_samples", None)}
    sampling |= {"batch_size": options.take("batch_size", None), "fid_statistics": options.take("fid_stat", None)}
    options.leave("samples are written to the run's folder", "save_path")
    options.close()
    solver_config = {"class_path": class_path(solver), "init_args": arguments}
    return solver_config, {name: value for name, value in sampling.items() if value is not None}


def _network_calls(solver: type[Solver], steps: int, arguments: dict[str, Any]) -> int:
    """Network calls of so many steps, which may be more: the published code counts steps, ours calls."""
    for nfe in range(steps + solver.extra_calls, 2 * steps + 2):
        if solver(**{**arguments, "nfe": nfe}).num_steps == steps:
            return nfe
    raise ValueError(f"{solver.__name__} cannot take sampling.n_steps={steps} steps.")


def _start(options: ConfigSection) -> tuple[str, str | None]:
    """The draw of the first state, and the file of the data's moments."""
    names = {"zero_mean_and_std": "zero", "optimal_mean_and_std": "optimal"}
    name = options.take("initial_dist", "zero_mean_and_std")
    if name not in names:
        raise ValueError(f"{options.where('initial_dist')}={name!r} is not known; there are {' and '.join(names)}.")
    if names[name] == "optimal":
        return "optimal", str(options.take("mean_std_path"))
    options.leave("it is read for optimal_mean_and_std only", "mean_std_path")
    return "zero", None


def _optimizer(options: ConfigSection) -> dict[str, Any]:
    betas = options.take("betas", [0.9, 0.999])
    arguments = {
        "lr": options.number("lr", 1e-3),
        "betas": [float(beta) for beta in betas],
        "eps": options.number("eps", 1e-8),
        "weight_decay": options.number("weight_decay", 0.01),
    }
    options.close()
    return {"class_path": "torch.optim.AdamW", "init_args": arguments}


def _training(root: ConfigSection) -> dict[str, Any]:
    """The sections `train_loader`, `val_loader` and `training`."""
    found: dict[str, Any] = {}
    for key, name in (("train_loader", "batch_size"), ("val_loader", "val_batch_size")):
        loader = root.section(key)
        if "batch_size" in loader:
            found[name] = loader.integer("batch_size")
        loader.leave(
            "the DataModule's own options say how batches are loaded",
            *("shuffle", "num_workers", "pin_memory", "drop_last", "persistent_workers", "prefetch_factor"),
        )
        loader.close()
    options = root.section("training")
    for option, name in (
        ("n_training_steps", "max_steps"),
        ("accumulate", "accumulate_grad_batches"),
        ("val_interval", "val_check_interval"),
        ("val_repeats", "val_repeats"),
        ("max_val_batches", "limit_val_batches"),
        ("log_interval", "log_every_n_steps"),
        ("checkpoint_interval", "checkpoint_every_n_steps"),
        ("seed", "seed_everything"),
    ):
        if option in options and (value := options.take(option)) is not None:
            number = ConfigSection(options.name, {option: value}, {}).integer(option)
            if number >= 0:  # -1 stands for none
                found[name] = number
    for option, name in (("ema_decay", "ema_decay"), ("grad_clip_norm", "gradient_clip_val")):
        if option in options and (rate := options.number(option)) > 0:
            found[name] = rate
    options.leave("runs lie in their own folders, and continue with --ckpt_path last", "checkpoint_dir", "start_step")
    options.close()
    return found


def _known(part: _Part, role: str, *names: str) -> str:
    """The part's class.

    Raises:
        ValueError: it is none of ``names``.
    """
    if part.name not in names:
        raise ValueError(f"{part.name} cannot be the {role} here; there is {' and '.join(names)}.")
    return part.name


def _component(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"zoo.bfn.{name}", "init_args": arguments}
