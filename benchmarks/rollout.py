"""Speed of rollouts: weights gathered once against gathered per token, and our loops of generation against transformers'.

``python -m benchmarks.rollout`` (``--device cuda`` on a GPU, for the second part alone) measures

* generation by an actor whose weights are divided over four processes by FSDP2: 16 prompts of 16 tokens, 48 new ones, drawn by
  sample; gathered block by block for each token, as ZeRO-3 does, once for the rollout, or resident copies. All give the same
  tokens, else the benchmark stops;
* greedy decoding of 128 tokens after prompts of 32, batch 16, by a dense Ling of the shipped size (1.4M parameters) and by
  ``generate`` of the library's LLaMA with the same weights, the faster of its growing and its static cache; the benchmark stops
  if tokens differ. On a GPU our step is compiled and captured as a graph;
* the same LLaMA in our loop for models of other libraries against its own ``generate``.

Arms are measured in turns; figures are medians of paired ratios of times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from benchmarks.decode import CACHES, Variant, check_equal, generate_theirs, timed
from benchmarks.gloo_processes import run_group
from benchmarks.placement import CONFIG, PROMPT, SMOKE
from benchmarks.record import Record
from benchmarks.tables import Table
from strategies.placement import PlacementPlan, RankPlacement
from strategies.placement.plan import Gather
from zoo.base.random import SampleRandom
from zoo.ling import LingBackbone, LingConfig, LingForCausalLM
from zoo.lm.generation import Generation, continue_prompts, generate
from zoo.lm.hf_decoder import HFModel
from zoo.rlhf.networks import PolicyNetwork
from zoo.role_placement import Role

RANKS, ROWS, NEW = 4, 16, 48
BATCH, LONG_PROMPT, LONG = 16, 32, 128
GATHERS: tuple[Gather, ...] = ("per_token", "once", "resident")
LING, LOOP = "dense Ling", "LLaMA in our loop"


def of_gathers(folder: str, repetitions: int, smoke: bool) -> list[dict[str, float]]:
    """Seconds of a rollout with each way to gather, slowest rank.

    Raises:
        RuntimeError: If their tokens differ.
    """
    config, new = (SMOKE, 4) if smoke else (CONFIG, NEW)
    placements = {}
    for gather in GATHERS:
        torch.manual_seed(0)
        backbone = LingBackbone(config).eval()
        role = Role(PolicyNetwork(backbone), "actor.", backbone.blocks, trained=True)
        plan = PlacementPlan({"actor": PlacementPlan.flattening("fsdp2").roles["actor"]}, gather=gather)
        placements[gather] = RankPlacement(plan, {"actor": role}, torch.device("cpu"))
        placements[gather].wrap()
    part = ROWS // dist.get_world_size()
    prompts = torch.randint(3, config.vocab_size, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(ROWS)[dist.get_rank() * part :][:part]
    options = Generation(new, 1.0, eos_token_id=None, pad_token_id=0)

    @torch.no_grad()
    def rollout(gather: Gather) -> tuple[float, Tensor]:
        placement = placements[gather]
        dist.barrier()
        begin = time.perf_counter()
        placement.begin()
        network: Any = placement.inference("actor")
        with placement.decoding("actor", network.backbone.decodes()) as model:
            random, agree = SampleRandom(0, rows), placement.agreement("actor")
            mask = torch.ones_like(prompts[rows])
            tokens = continue_prompts(model, prompts[rows], mask, options, random=random, agree=agree).tokens
        taken = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return taken.item(), tokens

    expected = {gather: rollout(gather)[1] for gather in GATHERS}
    if not all(torch.equal(tokens, expected["once"]) for tokens in expected.values()):
        raise RuntimeError("Tokens depend on how weights are gathered: nothing is compared.")
    turns = [GATHERS if repetition % 2 == 0 else GATHERS[::-1] for repetition in range(repetitions)]
    return [{gather: rollout(gather)[0] for gather in turn} for turn in turns]


@torch.no_grad()
def library_model(ours: LingForCausalLM) -> Any:
    """The library's LLaMA that computes what a dense Ling does."""
    config = ours.config
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_width, intermediate_size=config.intermediate_size, rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, bos_token_id=None, eos_token_id=None,
            pad_token_id=0,
        )
    )  # fmt: skip
    rows = [config.num_attention_heads * config.head_width, *[config.num_key_value_heads * config.head_width] * 2]
    state = {
        "model.embed_tokens.weight": ours.model.word_embeddings.weight, "model.norm.weight": ours.model.norm.weight,
        "lm_head.weight": ours.lm_head.effective_weight(),
    }  # fmt: skip
    for number, one in enumerate(ours.model.layers):
        block: Any = one
        query, key, value = block.attention.query_key_value.weight.split(rows)
        found = {
            "input_layernorm": block.input_layernorm.weight, "post_attention_layernorm": block.post_attention_layernorm.weight,
            "self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": value,
            "self_attn.o_proj": block.attention.dense.weight, "mlp.gate_proj": block.mlp.gate_proj.weight,
            "mlp.up_proj": block.mlp.up_proj.weight, "mlp.down_proj": block.mlp.down_proj.weight,
        }  # fmt: skip
        state |= {f"model.layers.{number}.{name}.weight": tensor for name, tensor in found.items()}
    model.load_state_dict(state)
    return model.to(ours.lm_head.weight.device).eval()


def of_generation(record: Record, config: LingConfig, device: str, new: int, repetitions: int) -> dict[str, float]:
    """Add the rows of greedy generation; the median of the paired ratios of times, the library's over ours, of each loop.

    Raises:
        RuntimeError: If tokens differ.
    """
    torch.manual_seed(0)
    ours = LingForCausalLM(config.replace(eos_token_id=None, initializer_range=0.05)).to(device).eval()
    theirs = library_model(ours)
    prompts_BT = torch.randint(3, config.vocab_size, (BATCH, LONG_PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    check_equal(ours, theirs, prompts_BT)
    shape, compiled = (BATCH, LONG_PROMPT + new), device == "cuda"
    arms: dict[str, Callable[[], Tensor]] = {
        LING: lambda: ours.generate(prompts_BT, max_new_tokens=new, compile=compiled),
        LOOP: lambda: generate(HFModel(theirs), prompts_BT, max_new_tokens=new),
        **{cache: lambda c=cache: generate_theirs(theirs, prompts_BT, new, Variant("", c)) for cache in CACHES},  # type: ignore[misc]
    }
    tokens = {name: arm() for name, arm in arms.items()}
    same = {name: float((found == tokens[CACHES[0]])[:, LONG_PROMPT:].double().mean()) for name, found in tokens.items()}
    if device == "cpu" and min(same.values()) < 1:
        raise RuntimeError(f"Greedy tokens differ ({same}): nothing is compared.")
    tries = {cache: min(timed(arms[cache], shape) for _ in range(2)) for cache in CACHES}
    strong = min(CACHES, key=tries.__getitem__)
    ratios: dict[str, list[float]] = {LING: [], LOOP: []}
    for repetition in range(repetitions):
        order = [LING, strong, LOOP] if repetition % 2 == 0 else [LOOP, strong, LING]
        taken = {name: timed(arms[name], shape) for name in order}
        for name, found in ratios.items():
            found.append(taken[strong] / taken[name])
            record.row(
                loop=name, theirs_over_ours=found[-1], ours_ms_per_step=1000 * taken[name] / new, same_tokens=same[name],
                theirs_ms_per_step=1000 * taken[strong] / new, strongest=f"{strong} cache",
            )  # fmt: skip
    return {name: statistics.median(found) for name, found in ratios.items()}


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=11, help="turns of all arms")
    parser.add_argument("--smoke", action="store_true", help="a tiny network and few tokens; the result is not kept")
    options = parser.parse_args(arguments)
    repetitions = 2 if options.smoke else options.repetitions
    tables = [
        Table(f"Rollouts of {ROWS} prompts on {RANKS} ranks that divide the weights", "gather", ["rollout_ms", "over_per_token"]),
        Table(f"Greedy decoding, batch {BATCH}, time of transformers over ours", "loop",
              ["theirs_over_ours", "ours_ms_per_step", "theirs_ms_per_step", "strongest", "same_tokens"]),
    ]  # fmt: skip
    on_gpu = options.device == "cuda"
    record = Record("rollout_gpu" if on_gpu else "rollout", seeds=[0], smoke=options.smoke, tables=tables)
    if not on_gpu:
        found = run_group(RANKS, of_gathers, repetitions, options.smoke)
        for seconds in found:
            for gather in GATHERS:
                record.row(
                    gather=gather, rollout_ms=1000 * seconds[gather], over_per_token=seconds["per_token"] / seconds[gather]
                )
        record.measure("once_over_per_token", statistics.median(each["per_token"] / each["once"] for each in found))
    config, new = (SMOKE, 4) if options.smoke else (CONFIG, LONG)
    ratios = of_generation(record, config, options.device, new, repetitions)
    record.measure("ling_over_transformers", ratios[LING])
    if not on_gpu:
        record.measure("loop_over_transformers", ratios[LOOP])
    return record.save()


if __name__ == "__main__":
    main()
