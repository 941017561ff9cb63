"""The benchmark of generation: both sides are one function, what differs is not timed, and it runs from end to end."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode
from benchmarks.record import Record
from zoo.ling import LingForCausalLM


def ours_of(family: str) -> LingForCausalLM:
    torch.manual_seed(0)
    return LingForCausalLM(decode.TINY.replace(num_shared_experts=decode.SHARED[family])).eval()


@pytest.mark.parametrize("family", decode.SHARED)
def test_both_models_are_one_function_and_write_the_same_tokens(family: str) -> None:
    ours = ours_of(family)
    theirs = decode.library_model(ours, family)
    prompts = torch.arange(12).view(3, 4)
    assert decode.check_equal(ours, theirs, prompts) < 1e-5
    expected = ours.generate(prompts, max_new_tokens=9)
    for experts in decode.EXPERTS:
        theirs.set_experts_implementation(experts)
        for cache in decode.CACHES:
            assert torch.equal(decode.generate_theirs(theirs, prompts, 9, decode.Variant(experts, cache)), expected)


def test_models_that_differ_are_not_compared() -> None:
    ours = ours_of("Mixtral")
    theirs = decode.library_model(ours, "Mixtral")
    theirs.model.layers[1].mlp.gate.weight.data.neg_()
    with pytest.raises(RuntimeError, match="nothing is compared"):
        decode.check_equal(ours, theirs, torch.arange(8).view(2, 4))
    with pytest.raises(RuntimeError, match=r"shape \(2, 7\) instead of \(2, 8\): nothing is compared"):
        decode.timed(lambda: torch.zeros(2, 7), (2, 8))


def test_parameters_of_the_real_sizes_are_equal() -> None:
    for shared in decode.SHARED.values():
        config = decode.CONFIG.replace(num_shared_experts=shared)
        with torch.device("meta"):
            assert decode.parameters_of(LingForCausalLM(config)) == config.num_parameters()


@pytest.mark.slow
def test_engine_and_static_batches_write_the_same_tokens() -> None:
    network = ours_of("Mixtral").double()
    queue = decode.queue_of(7, network.config.vocab_size, 4)
    assert {len(prompt) for prompt, _ in queue} != {len(queue[0][0])}
    batched = decode.in_static_batches(network, queue, 3)
    assert [len(row) for row in batched] == [new for _, new in queue]
    assert decode.in_engine(network, queue, 3, 100) == batched


def test_smoke_run_measures_every_bar_and_keeps_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decode, "EXPERTS", ("grouped_mm",))
    path = decode.main(["--smoke", "--only", "ling"])
    assert path == Path("runs/benchmarks/decode_cpu.json")
    result = json.loads(path.read_text())
    cases = {}
    for row in result["rows"]:
        if "case" in row:
            cases.setdefault(row["case"], []).append(row["theirs_over_ours"])
    assert len(cases) == 4
    values = {bar["name"]: bar["value"] for bar in result["bars"]}
    for batch in decode.BAR_BATCHES:
        medians = [torch.tensor(cases[f"{family}, float32, batch {batch}"]).double().mean() for family in decode.SHARED]
        assert values[f"over_transformers_batch_{batch}"] == pytest.approx(float(min(medians)))
    assert {row["queue"] for row in result["rows"] if "queue" in row} == {decode.STATIC, decode.CONTINUOUS}
    assert Record("decode_gpu", seeds=[0]).bars == ("over_transformers_batch_1", "over_transformers_batch_8")


def test_smoke_run_on_a_model_of_the_library_measures_both_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = json.loads(decode.main(["--smoke", "--only", "hf"]).read_text())
    assert {bar["name"] for bar in result["bars"]} == {f"over_transformers_batch_{batch}" for batch in decode.BAR_BATCHES}
    assert all(bar["value"] > 0 for bar in result["bars"]) and all(row["same_tokens"] == 1 for row in result["rows"])
