"""A Ling that is as naive as its description: released names, one row, one head, one token and one expert at a time."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]

#: Entries of released configurations, small; eos = pad, as released.
LITE = {
    "architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe", "vocab_size": 40, "hidden_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "num_experts": 12, "num_experts_per_tok": 6,
    "num_shared_experts": 2, "moe_intermediate_size": 8, "intermediate_size": 20, "first_k_dense_replace": 0,
    "norm_topk_prob": True, "norm_head": True, "use_bias": False, "use_qkv_bias": False, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "rope_theta": 600000, "rope_scaling": None, "max_position_embeddings": 16384, "hidden_act": "silu",
    "initializer_range": 0.006, "attention_dropout": 0.0, "pad_token_id": 39, "eos_token_id": 39, "torch_dtype": "float64",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "lite-like": LITE,
    "top-4 of two shared": LITE | {"num_experts_per_tok": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "head_dim": 0},
    "biases, head_dim, dense first, YaRN": LITE | {
        "use_bias": True, "use_qkv_bias": True, "head_dim": 10, "first_k_dense_replace": 1, "num_shared_experts": None,
        "num_key_value_heads": 2, "norm_head": False, "num_experts_per_tok": 1, "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
}  # fmt: skip


def shapes(entries: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released tensors, from the description."""
    D, V, width = entries["hidden_size"], entries["vocab_size"], entries["moe_intermediate_size"]
    W = entries.get("head_dim") or D // entries["num_attention_heads"]
    H, K = entries["num_attention_heads"], entries["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (V, D)}

    def swiglu(name: str, inner: int) -> None:
        found[f"{name}gate_proj.weight"] = found[f"{name}up_proj.weight"] = (inner, D)
        found[f"{name}down_proj.weight"] = (D, inner)

    for n in range(entries["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (D,)
        found[f"{layer}attention.query_key_value.weight"] = ((H + 2 * K) * W, D)
        found[f"{layer}attention.dense.weight"] = (D, H * W)
        if entries["use_qkv_bias"]:
            found[f"{layer}attention.query_key_value.bias"] = ((H + 2 * K) * W,)
        if entries["use_bias"]:
            found[f"{layer}attention.dense.bias"] = (D,)
        if n < entries["first_k_dense_replace"]:
            swiglu(f"{layer}mlp.", entries["intermediate_size"])
            continue
        found[f"{layer}mlp.gate.weight"] = (entries["num_experts"], D)
        for e in range(entries["num_experts"]):
            swiglu(f"{layer}mlp.experts.{e}.", width)
        if entries["num_shared_experts"]:
            swiglu(f"{layer}mlp.shared_experts.", entries["num_shared_experts"] * width)
    return found | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def random_weights(entries: dict[str, Any], seed: int = 0) -> Weights:
    """Weights that no part of the network can hide behind: gains differ from 1, biases from 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(entries).items():
        scale = 0.3 if len(shape) == 2 else 0.2
        weights[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        if "norm" in name:
            weights[name] += 1
    return weights


def write_released(folder: Path, entries: dict[str, Any], weights: Weights, num_files: int = 2) -> Path:
    """A released folder, written without our code: the weights dealt to files, and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries))
    if num_files == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = list(weights)
    weight_map = {name: f"model-{i % num_files + 1:05d}-of-{num_files:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: weights[name] for name in names if weight_map[name] == file}, folder / file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def logits_and_routes(weights: Weights, entries: dict[str, Any], ids: list[int]) -> tuple[Tensor, list[list[list[int]]]]:
    """Logits (T, V) of one row without padding, and the experts of each token of each layer with experts, best first."""
    D = entries["hidden_size"]
    H, K = entries["num_attention_heads"], entries["num_key_value_heads"]
    W = entries.get("head_dim") or D // H
    embedding = weights["model.word_embeddings.weight"]
    rows = [embedding[token].detach() if token == entries["pad_token_id"] else embedding[token] for token in ids]
    routes = []
    for n in range(entries["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        normed = [_norm(row, weights[f"{layer}input_layernorm.weight"], entries) for row in rows]
        heads = []
        for t, row in enumerate(normed):
            projected = weights[f"{layer}attention.query_key_value.weight"] @ row
            if entries["use_qkv_bias"]:
                projected = projected + weights[f"{layer}attention.query_key_value.bias"]
            parts = [projected[i * W : (i + 1) * W] for i in range(H + 2 * K)]
            heads.append([_rotate(part, t, entries) for part in parts[: H + K]] + parts[H + K :])
        for t in range(len(rows)):
            outputs = []
            for h in range(H):
                group = h // (H // K)
                scores = [heads[t][h] @ heads[s][H + group] / math.sqrt(W) for s in range(t + 1)]
                share = torch.stack(scores).softmax(0)
                outputs.append(sum(share[s] * heads[s][H + K + group] for s in range(t + 1)))
            update = weights[f"{layer}attention.dense.weight"] @ torch.cat(outputs)
            if entries["use_bias"]:
                update = update + weights[f"{layer}attention.dense.bias"]
            rows[t] = rows[t] + update
        chosen = []
        for t, row in enumerate(rows):
            x = _norm(row, weights[f"{layer}post_attention_layernorm.weight"], entries)
            if n < entries["first_k_dense_replace"]:
                rows[t] = row + _swiglu(x, weights, f"{layer}mlp.")
                continue
            probability = (weights[f"{layer}mlp.gate.weight"] @ x).softmax(0)
            best = sorted(range(entries["num_experts"]), key=lambda e: -probability[e].item())[: entries["num_experts_per_tok"]]
            total = sum(probability[e] for e in best) if entries["norm_topk_prob"] and len(best) > 1 else 1.0
            update = sum(probability[e] / total * _swiglu(x, weights, f"{layer}mlp.experts.{e}.") for e in best)
            if entries["num_shared_experts"]:
                update = update + _swiglu(x, weights, f"{layer}mlp.shared_experts.")
            rows[t] = row + update
            chosen.append(best)
        if chosen:
            routes.append(chosen)
    head = weights["lm_head.weight"]
    if entries["norm_head"]:
        columns = [head[:, j] / (head[:, j].detach().square().sum().sqrt() + 1e-7) for j in range(D)]
        head = torch.stack(columns, dim=1)
    return torch.stack([head @ _norm(row, weights["model.norm.weight"], entries) for row in rows]), routes


def _norm(x: Tensor, gain: Tensor, entries: dict[str, Any]) -> Tensor:
    return gain * x / (x.square().sum() / len(x) + entries["rms_norm_eps"]).sqrt()


def _swiglu(x: Tensor, weights: Weights, name: str) -> Tensor:
    gate = weights[f"{name}gate_proj.weight"] @ x
    return weights[f"{name}down_proj.weight"] @ (gate * gate.sigmoid() * (weights[f"{name}up_proj.weight"] @ x))


def _rotate(x: Tensor, position: int, entries: dict[str, Any]) -> Tensor:
    half, theta, scaling = len(x) // 2, entries["rope_theta"], entries["rope_scaling"]
    scale = 1.0 if scaling is None else 0.1 * math.log(scaling["factor"]) + 1
    first, second = [], []
    for i in range(half):
        frequency = theta ** (-2 * i / len(x))
        if scaling is not None:
            trained = scaling["original_max_position_embeddings"]
            low, high = (len(x) * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta)) for rotations in (32, 1))
            low, high = max(math.floor(low), 0), min(math.ceil(high), len(x) - 1)
            ramp = min(max((i - low) / (high - low if high != low else 0.001), 0), 1)
            frequency = frequency / scaling["factor"] * ramp + frequency * (1 - ramp)
        cos, sin = math.cos(position * frequency) * scale, math.sin(position * frequency) * scale
        first.append(x[i] * cos - x[i + half] * sin)
        second.append(x[i + half] * cos + x[i] * sin)
    return torch.stack(first + second)
