"""Speed of generation: ours against transformers on the same function, and continuous batching against static batches.

``python -m benchmarks.decode`` (``--device cuda`` on a GPU) measures

* greedy decoding of 128 tokens after prompts of 32, width 256, for several batch sizes, by `LingForCausalLM.generate` and by
  ``generate`` of two model classes of the transformers library: Mixtral, and Qwen2-MoE, which has a shared expert. The weights
  are copied, with the normalised head's and what else it takes to make both sides the same function of equally many parameters,
  and the benchmark stops if their scores differ. Neither side stops early. All of the library's implementations of experts
  (``eager``, ``grouped_mm``, ``batched_mm``) are tried with its growing and its static cache, and the fastest is what ours is
  compared with, in repetitions that alternate; the figure is the median of the paired ratios of times, theirs over ours. The
  bar of a batch size is set at the lesser of both classes'. On a GPU ours is compiled and captured as a graph, and measured in
  float32 and bfloat16, the bar at the slower gain;
* a queue of prompts of 8 to 64 tokens that ask for 16 to 128 more: the `Engine`, and `generate` on batches in the order of
  arrival, each of which runs until its last sequence has what it asked for; in requested tokens per second;
* greedy decoding by a LLaMA of SmolLM2-135M's shape with random weights: our loop with `HFModel` against the model's own
  ``generate``, the faster of its growing and its static cache, in float32, as paired ratios of times again. This part has a
  result of its own, and ``--only hf`` measures it alone, ``--only ling`` the rest.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.bfn_solvers import now
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.ling import Engine, LingConfig, LingForCausalLM
from zoo.lm.generation import generate
from zoo.lm.hf_decoder import HFModel

CONFIG = LingConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, num_experts=16,
    num_experts_per_tok=4, num_shared_experts=0, moe_intermediate_size=176, intermediate_size=None, rope_theta=10000.0,
    max_position_embeddings=512, initializer_range=0.05, pad_token_id=None, eos_token_id=None,
)  # fmt: skip
TINY = CONFIG.replace(vocab_size=64, hidden_size=32, num_hidden_layers=2, moe_intermediate_size=16)
LLAMA = {
    "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
TINY_LLAMA = LLAMA | {"vocab_size": 64, "hidden_size": 36, "num_hidden_layers": 2, "intermediate_size": 16}
SHARED = {"Mixtral": 0, "Qwen2-MoE": 1}
EXPERTS = ("eager", "grouped_mm", "batched_mm")
CACHES = ("dynamic", "static")
BAR_BATCHES = (1, 8)
BATCHES = (1, 2, 4, 8)
PROMPT, NEW = 32, 128
TOLERANCE = 1e-4
OURS = "ours"
STATIC, CONTINUOUS = "static batches", "engine"


@dataclass(frozen=True)
class Variant:
    """One way in which the library generates.

    Attributes:
        experts: Its implementation of experts.
        cache: Its class of cache.
    """

    experts: str
    cache: str

    @property
    def name(self) -> str:
        """The variant in words."""
        return f"transformers, {self.experts}, {self.cache} cache"


@torch.no_grad()
def library_model(ours: LingForCausalLM, family: str) -> Any:
    """The library's model of a class that computes what ours does.

    Args:
        ours: Without biases, with a NormHead; with shared experts for Qwen2-MoE, without for Mixtral.
        family: The class, a key of `SHARED`.
    """
    config = ours.config
    options: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "num_experts_per_tok": config.num_experts_per_tok, "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    model: Any
    if family == "Mixtral":
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **options, num_local_experts=config.num_experts, intermediate_size=config.moe_intermediate_size
            )
        )
    else:
        model = transformers.Qwen2MoeForCausalLM(
            transformers.Qwen2MoeConfig(
                **options, num_experts=config.num_experts, moe_intermediate_size=config.moe_intermediate_size, qkv_bias=False,
                shared_expert_intermediate_size=config.num_shared_experts * config.moe_intermediate_size,
                norm_topk_prob=True,
            )
        )  # fmt: skip
    rows = [config.num_attention_heads * config.head_width, *[config.num_key_value_heads * config.head_width] * 2]
    state = {
        "model.embed_tokens.weight": ours.model.word_embeddings.weight,
        "model.norm.weight": ours.model.norm.weight,
        "lm_head.weight": ours.lm_head.effective_weight(),
    }
    for number, block in enumerate(ours.model.layers):
        one: Any = block
        query, key, value = one.attention.query_key_value.weight.split(rows)
        found = {
            "input_layernorm.weight": one.input_layernorm.weight,
            "post_attention_layernorm.weight": one.post_attention_layernorm.weight,
            "self_attn.q_proj.weight": query, "self_attn.k_proj.weight": key, "self_attn.v_proj.weight": value,
            "self_attn.o_proj.weight": one.attention.dense.weight,
            "mlp.gate.weight": one.mlp.gate.weight,
            "mlp.experts.gate_up_proj": one.mlp.experts.gate_up_proj,
            "mlp.experts.down_proj": one.mlp.experts.down_proj,
        }  # fmt: skip
        if one.mlp.shared_experts is not None:  # which the library multiplies by a gate of its own: of 1/2 if its weight is 0
            shared = one.mlp.shared_experts
            found |= {
                "mlp.shared_expert.gate_proj.weight": shared.gate_proj.weight,
                "mlp.shared_expert.up_proj.weight": shared.up_proj.weight,
                "mlp.shared_expert.down_proj.weight": 2 * shared.down_proj.weight,
                "mlp.shared_expert_gate.weight": torch.zeros(1, config.hidden_size),
            }
        state |= {f"model.layers.{number}.{name}": tensor for name, tensor in found.items()}
    model.load_state_dict(state)
    return model.to(ours.lm_head.weight.device).eval()


def parameters_of(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def check_equal(ours: LingForCausalLM, theirs: nn.Module, prompts_BT: Tensor) -> float:
    """The largest difference of both models' scores, relative to the largest score.

    Raises:
        RuntimeError: They differ, or their numbers of parameters do by more than a hundredth.
    """
    one, other = ours(prompts_BT).logits, theirs(prompts_BT).logits
    assert one is not None
    apart = float((one - other).abs().max() / one.abs().max())
    if not apart <= TOLERANCE:
        raise RuntimeError(f"The scores of both models differ by {apart:.2g} of the largest: nothing is compared.")
    ratio = parameters_of(theirs) / parameters_of(ours)
    if abs(ratio - 1) > 0.01:
        raise RuntimeError(f"transformers' model has {ratio:.4f} times our parameters: nothing is compared.")
    return apart


def timed(call: Callable[[], Tensor], shape: tuple[int, int]) -> float:
    """Seconds of a generation that gives ids of a shape.

    Raises:
        RuntimeError: It gave another number of tokens.
    """
    begin = now()
    ids = call()
    seconds = now() - begin
    if ids.shape != shape:
        raise RuntimeError(f"A generation gave ids of shape {tuple(ids.shape)} instead of {shape}: nothing is compared.")
    return seconds


def generate_theirs(model: Any, prompts_BT: Tensor, new: int, variant: Variant) -> Tensor:
    """Greedy generation by the library, without an end."""
    options = {} if variant.cache == "dynamic" else {"cache_implementation": variant.cache}
    tokens: Tensor = model.generate(
        prompts_BT, attention_mask=torch.ones_like(prompts_BT), max_new_tokens=new, do_sample=False, use_cache=True, **options
    )
    return tokens


def strongest(record: Record, case: str, model: Any, prompts_BT: Tensor, new: int, trials: int) -> Variant:
    """The library's fastest variant, by the median of a few runs of each; adds a row for every one."""
    shape = (len(prompts_BT), prompts_BT.shape[1] + new)
    variants = [Variant(experts, cache) for experts in EXPERTS for cache in CACHES]
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for trial in range(trials + 1):
        for variant in variants:
            model.set_experts_implementation(variant.experts)
            taken = timed(lambda v=variant: generate_theirs(model, prompts_BT, new, v), shape)  # type: ignore[misc]
            if trial:  # the first one pays for compilation and allocations
                seconds[variant].append(taken)
    for variant in variants:
        record.row(variant=variant.name, variant_case=case, variant_seconds=statistics.median(seconds[variant]))
    return min(variants, key=lambda variant: statistics.median(seconds[variant]))


def measure(record: Record, family: str, ours: LingForCausalLM, theirs: Any, batch: int, new: int, repetitions: int) -> float:
    """Add the rows of one comparison; the median of the paired ratios of times, theirs over ours."""
    device, dtype = ours.lm_head.weight.device, str(ours.lm_head.weight.dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(batch)
    prompts_BT = torch.randint(0, ours.config.vocab_size, (batch, PROMPT), generator=generator).to(device)
    compiled = device.type == "cuda"
    case = f"{family}, {dtype}, batch {batch}"
    variant = strongest(record, case, theirs, prompts_BT, new, max(1, repetitions // 3))
    theirs.set_experts_implementation(variant.experts)
    arms: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours.generate(prompts_BT, max_new_tokens=new, compile=compiled),
        variant.name: lambda: generate_theirs(theirs, prompts_BT, new, variant),
    }
    tokens = {name: arm() for name, arm in arms.items()}
    same = float((tokens[OURS] == tokens[variant.name])[:, PROMPT:].double().mean())
    ratios = []
    for repetition in range(repetitions):
        taken = {}
        for name in list(arms) if repetition % 2 == 0 else list(arms)[::-1]:
            taken[name] = timed(arms[name], (batch, PROMPT + new))
            record.row(series=f"{family}, {dtype}, {OURS if name == OURS else 'transformers'}", batch=batch,
                       tokens_per_second=batch * new / taken[name])  # fmt: skip
        ratios.append(taken[variant.name] / taken[OURS])
        record.row(
            case=case,
            repetition=repetition,
            theirs_over_ours=ratios[-1],
            ours_ms_per_step=1000 * taken[OURS] / new,
            theirs_ms_per_step=1000 * taken[variant.name] / new,
            strongest=variant.name.removeprefix("transformers, "),
            same_tokens=same,
        )
    return statistics.median(ratios)


def queue_of(count: int, vocab_size: int, scale: int) -> list[tuple[list[int], int]]:
    """Prompts and how many tokens each asks for: 8 to 64 and 16 to 128, divided by ``scale``."""
    generator = torch.Generator().manual_seed(0)
    queue = []
    for _ in range(count):
        length, new = (int(torch.randint(low // scale, high // scale + 1, (), generator=generator))
                       for low, high in ((8, 64), (16, 128)))  # fmt: skip
        queue.append((torch.randint(0, vocab_size, (length,), generator=generator).tolist(), new))
    return queue


def in_static_batches(network: LingForCausalLM, queue: Sequence[tuple[list[int], int]], batch: int) -> list[list[int]]:
    """`generate` on the queue's prompts in the order of arrival; tokens beyond those asked for are thrown away."""
    device = network.lm_head.weight.device
    found = []
    for start in range(0, len(queue), batch):
        part = queue[start : start + batch]
        width = max(len(prompt) for prompt, _ in part)
        ids_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in part], device=device)
        mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in part], device=device)
        tokens_BT = network.generate(ids_BT, mask_BT, max_new_tokens=max(new for _, new in part))[:, width:]
        found += [row[:new] for row, (_, new) in zip(tokens_BT.tolist(), part, strict=True)]
    return found


def in_engine(network: LingForCausalLM, queue: Sequence[tuple[list[int], int]], batch: int, max_tokens: int) -> list[list[int]]:
    """The queue's tokens by continuous batching."""
    engine = Engine(network, max_tokens, batch)
    numbers = [engine.submit(prompt, max_new_tokens=new) for prompt, new in queue]
    found = {completion.request: completion.tokens for completion in engine.run()}
    return [found[number] for number in numbers]


def measure_engine(record: Record, network: LingForCausalLM, count: int, scale: int, repetitions: int) -> None:
    """Add the rows of the mixed queue.

    Raises:
        RuntimeError: A request did not get as many tokens as it asked for.
    """
    batch = max(BAR_BATCHES)
    queue = queue_of(count, network.config.vocab_size, scale)
    requested = sum(new for _, new in queue)
    # As much memory as the static batches need at most.
    room = batch * (max(len(prompt) for prompt, _ in queue) + max(new for _, new in queue))
    arms: dict[str, Callable[[], list[list[int]]]] = {
        CONTINUOUS: lambda: in_engine(network, queue, batch, room),
        STATIC: lambda: in_static_batches(network, queue, batch),
    }
    found = {name: arm() for name, arm in arms.items()}
    for tokens in found.values():
        if [len(row) for row in tokens] != [new for _, new in queue]:
            raise RuntimeError("A request of the queue did not get as many tokens as it asked for: nothing is compared.")
    pairs = [pair for rows in zip(*found.values(), strict=True) for pair in zip(*rows, strict=True)]
    same = sum(one == other for one, other in pairs) / requested
    for repetition in range(repetitions):
        taken = {}
        for name in list(arms) if repetition % 2 == 0 else list(arms)[::-1]:
            begin = now()
            arms[name]()
            taken[name] = now() - begin
        for name, seconds in taken.items():
            record.row(queue=name, repetition=repetition, queue_tokens_per_second=requested / seconds, same_tokens=same,
                       speed_over_static=taken[STATIC] / seconds)  # fmt: skip


def measure_library_model(record: Record, model: Any, batch: int, new: int, repetitions: int) -> float:
    """Add the rows of our loop and the library's on one model; the median of the paired ratios of times, theirs over ours."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, PROMPT + new)
    prompts_BT = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=generator).to(model.device)
    arms: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: generate(HFModel(model), prompts_BT, max_new_tokens=new),
        **{cache: lambda c=cache: generate_theirs(model, prompts_BT, new, Variant("", c)) for cache in CACHES},  # type: ignore[misc]
    }
    tokens = {name: arm() for name, arm in arms.items()}
    same = float((tokens[OURS] == tokens["dynamic"])[:, PROMPT:].double().mean())
    tries = {cache: min(timed(arms[cache], shape) for _ in range(2)) for cache in CACHES}
    strong = min(CACHES, key=tries.__getitem__)
    ratios = []
    for repetition in range(repetitions):
        order = [OURS, strong] if repetition % 2 == 0 else [strong, OURS]
        taken = {name: timed(arms[name], shape) for name in order}
        ratios.append(taken[strong] / taken[OURS])
        record.row(
            case=f"LLaMA of SmolLM2's shape, batch {batch}", repetition=repetition, theirs_over_ours=ratios[-1],
            ours_ms_per_step=1000 * taken[OURS] / new, theirs_ms_per_step=1000 * taken[strong] / new,
            strongest=f"{strong} cache", same_tokens=same,
        )  # fmt: skip
    return statistics.median(ratios)


def compare_library_model(device: str, new: int, repetitions: int, smoke: bool) -> Path:
    """Our loop against the library's on a model of its own; returns the path of the result."""
    record = Record(f"decode_hf_{'gpu' if device == 'cuda' else 'cpu'}", seeds=[0], smoke=smoke, tables=tables_of()[0][:1])
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TINY_LLAMA if smoke else LLAMA)))
    model = model.to(device).eval()
    for batch in BAR_BATCHES:
        ratio = measure_library_model(record, model, batch, new, repetitions)
        print(f"LLaMA of SmolLM2's shape, batch {batch}: transformers over ours {ratio:.2f}", flush=True)
        if record.bars:  # of the CPU
            record.measure(f"over_transformers_batch_{batch}", ratio)
    return record.save()


def tables_of() -> tuple[list[Table], list[Plot]]:
    """Tables and plots of the result."""
    return [
        Table("Greedy decoding, time of transformers over ours", "case",
              ["theirs_over_ours", "ours_ms_per_step", "theirs_ms_per_step", "strongest", "same_tokens"]),
        Table("Seconds of transformers by experts and cache", "variant", ["variant_seconds"], columns="variant_case", digits=3),
        Table("A queue of prompts of different lengths, at most 8 at once", "queue",
              ["queue_tokens_per_second", "speed_over_static", "same_tokens"]),
    ], [Plot("Greedy decoding", "batch", "tokens_per_second", "series", log="xy")]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=9, help="pairs of runs for each case")
    parser.add_argument("--smoke", action="store_true", help="a tiny network and few tokens; the result is not kept")
    parser.add_argument("--only", choices=["ling", "hf"], help="one part alone: Ling, or models of transformers")
    options = parser.parse_args(arguments)
    config, new, repetitions, batches = CONFIG, NEW, options.repetitions, BATCHES
    if options.smoke:
        config, new, repetitions, batches = TINY, 4, 2, BAR_BATCHES
    tables, plots = tables_of()
    if options.only != "ling":
        path = compare_library_model(options.device, new, repetitions, options.smoke)
        if options.only == "hf":
            return path
    name = f"decode_{'gpu' if options.device == 'cuda' else 'cpu'}"
    record = Record(name, seeds=[0], smoke=options.smoke, tables=tables, plots=plots)
    dtypes = [torch.float32, torch.bfloat16] if options.device == "cuda" else [torch.float32]
    gains: dict[int, list[float]] = {batch: [] for batch in batches}
    for family, shared in SHARED.items():
        torch.manual_seed(0)
        ours = LingForCausalLM(config.replace(num_shared_experts=shared)).to(options.device).eval()
        theirs = library_model(ours, family)
        apart = check_equal(ours, theirs, torch.arange(2 * PROMPT, device=options.device).view(2, PROMPT))
        record.row(family=family, ours_parameters=parameters_of(ours), theirs_parameters=parameters_of(theirs), apart=apart)
        for dtype in dtypes:
            for batch in batches:
                ratio = measure(record, family, ours.to(dtype), theirs.to(dtype), batch, new, repetitions)
                gains[batch].append(ratio)
                print(f"{family}, {dtype}, batch {batch}: transformers over ours {ratio:.2f}", flush=True)
        if family == "Mixtral":
            measure_engine(record, ours.float(), 4 if options.smoke else 32, 4 if options.smoke else 1, max(2, repetitions // 2))
        del ours, theirs
    for batch in BAR_BATCHES:
        record.measure(f"over_transformers_batch_{batch}", min(gains[batch]))
    return record.save()


if __name__ == "__main__":
    main()
