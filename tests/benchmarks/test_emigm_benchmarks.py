"""The benchmarks of eMIGM: the loop sampler gives ours' tokens, bars come from the right rows, and runs from end to end."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import emigm_design_space as design
from benchmarks import emigm_sampling as sampling
from benchmarks.emigm_design_space import (
    AT,
    DPM_8,
    FULL,
    HEADS,
    LATE,
    MDM,
    OWN,
    RECIPE,
    STUDIES,
    VARIANTS,
    WINDOWS,
    Bench,
    Run,
    draw,
    earlier,
    judge_design,
    settings_of,
)
from benchmarks.record import Record
from zoo.base.random import SampleRandom
from zoo.cli.command import ZooCLI
from zoo.emigm import EMIGM, Architecture, Guidance, Masking, MaskSampler, PixelCodec, sample_tokens

TINY = Architecture(width=16, encoder_depth=1, decoder_depth=2, num_heads=2, head_depth=1, head_width=16)


def tiny(**options: object) -> EMIGM:
    torch.manual_seed(0)
    model = EMIGM(
        PixelCodec((1, 8, 8)), architecture=TINY, num_classes=10, patch_size=2, buffer_size=2, **options  # type: ignore[arg-type]
    )  # fmt: skip
    for parameter in model.network.diffloss.parameters():
        if not parameter.any() and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


@pytest.mark.parametrize(("num_iter", "window"), [
    pytest.param(num_iter, window, marks=[] if num_iter == quick else [pytest.mark.slow])
    for quick, window in ((5, Guidance(1.0)), (16, Guidance(4.0, 0.1, 0.5)), (1, Guidance(2.0, 0.0, 1.0, "linear")))
    for num_iter in (1, 5, 16, 40)
])  # fmt: skip
def test_loop_sampler_gives_the_same_tokens_from_the_same_draws(window: Guidance, num_iter: int) -> None:
    network = sampling.random_network(sampling.TINY, 16, 4, "cpu")
    sampler, index_B = MaskSampler(num_iter, guidance=window), torch.tensor([3, 1, 8])
    drawn = [
        one(network, sampler, SampleRandom(2, index_B), SampleRandom(2, torch.tensor([0])), index_B)
        for one in (sample_tokens, sampling.loop_sample)
    ]
    assert drawn[0].nfe == drawn[1].nfe
    assert drawn[0].tokens.std() > 0.1
    assert sampling.difference(*drawn) < sampling.TOLERANCE
    other = sampling.loop_sample(network, sampler, SampleRandom(2, index_B), SampleRandom(2, torch.tensor([0])), index_B + 1)
    assert sampling.difference(drawn[0], other) > 1e-2  # the same noise: what is compared depends on the transformer
    again = sampling.loop_sample(network, sampler, SampleRandom(3, index_B), SampleRandom(3, torch.tensor([0])), index_B)
    assert sampling.difference(drawn[0], again) > 1e-2


def test_a_sampler_that_draws_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = sampling.random_network(sampling.TINY, 16, 4, "cpu")
    honest = sampling.loop_sample

    def wrong(*arguments: object) -> object:
        drawn = honest(*arguments)  # type: ignore[arg-type]
        return dataclasses.replace(drawn, tokens=drawn.tokens.flip(0))

    monkeypatch.setattr(sampling, "loop_sample", wrong)
    with pytest.raises(RuntimeError, match="the two samplers differ"):
        sampling.measure_speed(Record("emigm_sampling_cpu", seeds=[0]), sampling.CASES["cpu"][0], network, 1, ["float32"])


def test_design_space_draws_what_the_module_draws() -> None:
    model = tiny(sampler=MaskSampler(4, count_block=8))
    drawing = draw(model, model.sampler, 20, seed=5)
    expected = model.sample(torch.arange(20), seed=5)
    assert torch.allclose(drawing.images, expected.images, atol=1e-6)
    assert drawing.labels is not None and drawing.labels.tolist() == [0] * 10 + [1] * 10
    assert drawing.nfe <= model.nfe


def test_samples_that_are_no_numbers_have_diverged_and_can_be_judged() -> None:
    model = tiny()
    torch.nn.init.constant_(model.network.diffloss.net.final_layer.linear.bias, float("nan"))
    drawing = draw(model, MaskSampler(2), 8, seed=0)
    assert drawing.diverged == 1.0 and bool(drawing.images.isfinite().all())


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_trains_and_differs_from_the_recipe_in_its_switches_only(name: str) -> None:
    options = {"masking": dict(vars(Masking()))}
    for switch, value in VARIANTS[name].switches.items():
        group, _, inner = switch.rpartition(".")
        target = options[group] if group else options
        assert inner in (vars(Masking()) if group else EMIGM.__init__.__annotations__)
        target[inner] = value
    model = tiny(**{**options, "masking": Masking(**options["masking"])}).train()
    batch = (torch.rand(8, 1, 8, 8), torch.arange(8))
    random = SampleRandom(0, torch.arange(8))
    x, labels = model.latents(batch, random)
    loss = model.token_losses(x, labels, model.masking.draw(random, 16), random)["loss"]
    assert loss.shape == (8,) and bool(loss.isfinite().all())
    assert {name for name in VARIANTS if VARIANTS[name].switches == VARIANTS[RECIPE].switches} == {RECIPE}
    MaskSampler(AT, **VARIANTS[name].own)


def test_switches_are_read_by_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    switches = [f"--model.init_args.{name}={value}" for name, value in VARIANTS[MDM].switches.items()]
    cli = ZooCLI(["fit", "-c", "emigm/digits", "--trainer.max_steps=0", "--trainer.logger=false", *switches])
    model = cli.model
    assert isinstance(model, EMIGM)
    assert (model.weighting, model.reduction, model.network.use_mae) == ("elbo", "sum_over_N", False)
    assert (model.masking.schedule, model.masking.t_min, model.masking.time) == ("linear", 0.0, "sample")


def record_of(distances: dict[int, dict[str, float]]) -> Record:
    """A record with the rows that the bars need."""
    record = Record("emigm_design_space", seeds=list(distances))
    for seed, figures in distances.items():
        at = f"K = {AT}"
        record.row(seed=seed, trained_as=RECIPE, setting=at, distance=figures["emigm"])
        record.row(seed=seed, trained_as=MDM, setting=at, distance=figures["mdm"])
        record.row(seed=seed, trained_as=MDM, setting=OWN, distance=figures["mdm own"])
        for window, nfe in ((LATE, 10.0), (FULL, 16.0)):
            record.row(seed=seed, guidance=window, iterations="K = 4", distance=1.0, nfe=1.0)
            record.row(seed=seed, guidance=window, iterations=at, distance=figures[window], nfe=nfe)
        for head in HEADS:
            record.row(seed=seed, head=head, distance=figures.get(head, 100.0))
    return record


def test_bars_are_medians_of_ratios_within_a_seed_against_the_best_baseline() -> None:
    one = {"emigm": 2.0, "mdm": 14.0, "mdm own": 8.0, LATE: 2.0, FULL: 10.0, DPM_8: 2.2, "DDPM, 100 steps": 2.0}
    one["DDPM, 100 steps, clipped"] = 0.5  # shown, but the bar is against the published sampler
    seeds = {0: one, 1: {**one, "mdm": 6.0}, 2: {**one, "emigm": 1.0, LATE: 20.0, DPM_8: 4.0}}
    record = record_of(seeds)
    judge_design(record, [0, 1, 2])
    assert {row["against"] for row in record.rows if "against" in row} == {head for head in HEADS if head.startswith("DDPM")}
    values = {bar["name"]: bar["value"] for bar in record.certificate()["bars"]}
    assert values == {
        "fair_mdm_over_emigm": 4.0,  # of 4, 3 and 8
        "late_guidance_over_full_distance": 0.2,  # of 0.2, 0.2 and 2
        "late_guidance_over_full_nfe": 0.625,
        "dpm_8_over_ddpm_100": pytest.approx(1.1),  # of 1.1, 1.1 and 2
    }
    with pytest.raises(ValueError, match="measure everything before judging"):
        judge_design(record, [0, 3])


def test_learning_rate_of_the_baseline_is_the_best_of_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = STUDIES["digits"]
    asked: list[Run] = []

    def measured(run: Run, *_: object) -> dict[str, object]:
        asked.append(run)
        distance = 10 + abs(run.rate - 1e-3) if run.variant == MDM else 1.0
        distance += 0.1 * abs(run.rate - 1e-3) * (run.variant == RECIPE)
        row = {"table": "setting", "arm": f"K = {AT}", "iterations": AT, "distance": distance}
        return {"training_seconds": 1.0, "rows": [row, {**row, "arm": OWN, "distance": distance + 1}]}

    monkeypatch.setattr(design, "measure_run", measured)
    bench = Bench(study, tmp_path, [], jobs=1)
    assert bench.all([0, 1, 2]) == 1e-3
    assert len(asked) == len(set(asked)) == 3 * len(VARIANTS) + 2 * (len(study.rates) - 1)
    assert {run.rate for run in asked if run.variant == MDM and run.seed > 0} == {1e-3}
    assert {run.rate for run in asked if run.variant not in (MDM, RECIPE)} == {study.rate}


@pytest.mark.parametrize("data", list(STUDIES))
def test_sweep_holds_the_rate_of_the_configuration(data: str) -> None:
    assert STUDIES[data].rates[2] == STUDIES[data].rate > 0


def test_sweep_goes_on_while_the_best_rate_lies_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(run: Run, *_: object) -> dict[str, object]:
        distance = abs(run.rate - (1.5e-2 if run.variant == MDM else 1.0))
        row = {"table": "setting", "arm": f"K = {AT}", "iterations": AT, "distance": distance}
        return {"training_seconds": 1.0, "rows": [row]}

    monkeypatch.setattr(design, "measure_run", measured)
    bench = Bench(STUDIES["digits"], tmp_path, [], jobs=1)
    assert bench.all([0]) == 1.6e-2
    assert bench.rates[MDM][5:] == [1.6e-2, 3.2e-2]
    assert bench.rates[RECIPE][5:] == [1.6e-2, 3.2e-2, 6.4e-2, 0.128]  # and no further
    assert len(bench.found) == bench.total


def test_figures_of_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    run, study = Run(RECIPE, 2e-3, 0), STUDIES["digits"]
    assert earlier(run, study, tmp_path, True) is None
    (tmp_path / f"{run.file_name}.json").write_text(json.dumps({"settings": settings_of(run, study, True), "steps": 7}))
    found = earlier(run, study, tmp_path, True)
    assert found is not None and found["steps"] == 7
    for other in (dataclasses.replace(study, count=9), dataclasses.replace(study, options=("--trainer.max_steps=9",))):
        assert earlier(run, other, tmp_path, True) is None


@pytest.mark.slow
def test_smoke_runs_measure_everything_and_keep_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # restored afterwards: seed_everything sets them for the whole process
    monkeypatch.setattr(
        design, "HEADS", {name: {**o, "head_steps": min(10, o.get("head_steps", 8))} for name, o in HEADS.items()}
    )
    monkeypatch.setattr(design, "ITERATIONS", (4, AT))
    monkeypatch.setattr(design, "SCHEDULES", ("linear", "exp"))
    path = design.main(["--smoke", "--steps", "4", "--folder", "kept"])
    assert path == Path("runs/benchmarks/emigm_design_space.json")
    result = json.loads(path.read_text())
    assert {row["variant"] for row in result["rows"] if "variant" in row} == {RECIPE, MDM, design.FLOOR}
    assert {row["head"] for row in result["rows"] if "head" in row} == set(HEADS)
    assert {row["guidance"] for row in result["rows"] if "guidance" in row} == {*WINDOWS, design.FLOOR}
    rows = [row for row in result["rows"] if row.get("iterations") == f"K = {AT}" and row.get("guidance") in WINDOWS]
    calls = {row["guidance"]: row["nfe"] for row in rows}
    assert list(calls.values()) == [8, 10, 12, 16]
    assert [bar["name"] for bar in result["bars"] if bar["value"] is None] == []
    weights = Path("kept") / Run(RECIPE, STUDIES["digits"].rate, 0).file_name

    monkeypatch.setattr(design, "train", None)  # what is in the folder needs no training
    assert design.main(["--smoke", "--steps", "4", "--folder", "kept"]) == path

    digits = json.loads(design.main(["--smoke", "--digits-only", "--checkpoint", str(weights)]).read_text())
    assert [bar["value"] is None for bar in digits["bars"]] == [True, False]

    monkeypatch.setattr(sampling, "EMIGM_ARMS", dict(list(sampling.EMIGM_ARMS.items())[:1]))
    speed = json.loads(sampling.main(["--smoke", "--checkpoint", str(weights)]).read_text())
    assert {row["closer"] for row in speed["rows"] if "closer" in row} <= {"eMIGM", "BFN"}
    assert all(bar["value"] > 0 for bar in speed["bars"])
