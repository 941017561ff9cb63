"""One model for all domains against one for each, by text and by ids: full ranking inside the target's group of genres.

``python -m benchmarks.llmrec`` types ``zoo fit``, ``validate`` and ``test`` on all ratings of MovieLens-100K: popularity; the
language model untrained, with histories of all domains and of the target's alone; SASRec and LLM-Rec, one model for all domains
and one for each, whose steps add up to as many. An arm of one model a domain is the mean of its models, weighted by their users.

On a GPU also: MiniLM whole on the last 20 ratings of each user, once and five times the steps, and other backbones.

Claim: arXiv 2310.14304, that one model of all domains is better than one for each where items are texts.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from benchmarks.commands import column, run, run_with_kill, zoo, zoo_here
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Interactions
from zoo.base.hyperparameters import build
from zoo.llmrec import LLMRec
from zoo.lm import HFBackbone
from zoo.lm.loading import read_hf_config
from zoo.lm.sources import find_source

TINY, WHOLE, SASREC, POPULARITY = (f"llmrec/movielens_{name}" for name in ("tiny", "minilm", "sasrec", "popularity"))
NAMES = ("NDCG@10", "Recall@10")
STEPS = {TINY: 120, WHOLE: 785, SASREC: 1200}
BACKBONES = {"MiniLM": ("minilm-l6", "encoder"), "SmolLM2": ("smollm2-135m", "causal")}
NEIGHBOURS = ("Toy Story", "Star Wars", "Alien", "Fargo", "Titanic", "Scream", "Casablanca", "Aladdin", "Clueless", "Psycho")

OF_A_GPU = [
    Table(
        "NDCG@10 on the last 20 ratings of each user, MiniLM whole, by steps (times 785; SASRec 1200)",
        "sparse",
        ["ndcg"],
        "times",
        digits=3,
    ),
    Table("The same by backbone, one model", "backbone", [*NAMES], digits=3),
]


class Arms:
    """Runs of the command line, in this process, which has read the packages already.

    Args:
        folder: Where they lie.
        share: Of the steps.
        last: Ratings of each user; None: all.
    """

    def __init__(self, folder: Path, share: float, last: int | None = None) -> None:
        self.folder, self.share = folder / f"last_{last}", share
        self.options = ["--data.last", json.dumps(last)]
        data = Interactions(tokenizer=None, last=last)
        self.domains = data.catalogue.domains
        domains = [batch["domain"] for batch in data.test_dataloader()]
        self.users = [sum(int((each == number).sum()) for each in domains) for number in range(len(self.domains))]

    def run(self, verb: str, config: str, folder: Path, *more: str) -> None:
        """A command."""
        zoo_here(zoo(verb, config, folder, *more))

    def test(self, name: str, config: str, options: Sequence[str] = (), checkpoint: Path | None = None) -> dict[str, float]:
        """Metrics of the test split."""
        folder = self.folder / name.replace(" ", "_").replace(",", "")
        more = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
        self.run("test", config, folder, *self.options, *options, *more)
        head = (folder / "metrics.csv").read_text().partition("\n")[0].split(",")
        return {key.removeprefix("test/full-domain/"): column(folder, key)[-1][1] for key in head if key.startswith("test/")}

    def trained(
        self, name: str, config: str, seed: int, parts: int = 1, options: Sequence[str] = (), times: int = 1
    ) -> dict[str, float]:
        """Metrics of a model that is trained for its share of the steps."""
        folder = self.folder / f"{name.replace(' ', '_').replace(',', '')}_fit"
        steps = str(max(2, int(STEPS[config] * times * self.share / parts)))
        schedule = [] if config == SASREC else ["--model.init_args.lr_scheduler.init_args.total_steps", steps]
        self.run("fit", config, folder, *self.options, *options, *schedule, "--trainer.max_steps", steps,
                 "--trainer.max_epochs", "-1", "--seed_everything", str(seed), "--trainer.limit_val_batches", "0")  # fmt: skip
        return self.test(name, config, options, folder / "checkpoints" / "last.ckpt")

    def one_each(self, name: str, config: str, seed: int, times: int = 1) -> dict[str, float]:
        """Metrics of one model for each domain."""
        found = {}
        for domain in self.domains:
            own = ["--data.history", "domain", "--data.train_domains", f"[{domain}]", "--data.eval_domains", f"[{domain}]"]
            of_domain = self.trained(f"{name} {domain} {seed}", config, seed, len(self.domains), own, times)
            found |= {f"{key}/{domain}": value for key, value in of_domain.items() if "/" not in key}
        shares = [users / sum(self.users) for users in self.users]
        means = {key: [found[f"{key}/{domain}"] for domain in self.domains] for key in NAMES}
        return found | {key: sum(map(operator.mul, values, shares)) for key, values in means.items()}


def add(record: Record, arms: Arms, arm: str, seed: int, found: Mapping[str, float]) -> float:
    """Rows of an arm; returns its NDCG@10."""
    groups = {name: found.get(f"NDCG@10/{name}", float("nan")) for name in ("tail", "cold")}
    record.row(arm=arm, seed=seed, **{name: found[name] for name in NAMES}, **groups)
    for domain in arms.domains:
        record.row(by_domain=arm, domain=domain, seed=seed, ndcg=found[f"NDCG@10/{domain}"])
    return found["NDCG@10"]


def tiny(record: Record, folder: Path) -> None:
    """``zoo fit -c llmrec/movielens_tiny`` as it is: minutes, loss, validation before and after; killed and continued."""
    run(zoo("validate", TINY, folder / "untrained"))
    options = ["--trainer.log_every_n_steps", "1"]
    minutes = run(zoo("fit", TINY, folder / "tiny", *options)) / 60
    saves = ["--checkpoint.every_n_steps", "5", "--ckpt_path", "last"]
    killed = run_with_kill(zoo("fit", TINY, folder / "cut", *options, *saves), folder / "cut", 60)
    pairs = list(zip(column(folder / "tiny", "train/loss"), column(folder / "cut", "train/loss"), strict=True))
    difference = max(abs(a - b) if step == other else float("inf") for (step, a), (other, b) in pairs)
    before, after = (column(folder / name, "val/full-domain/NDCG@10")[-1][1] for name in ("untrained", "tiny"))
    loss = statistics.mean(value for (_, value), _ in pairs[-20:])
    record.row(fit="movielens_tiny", minutes=minutes, loss=loss, untrained=before, trained=after, killed_at=killed,
               loss_difference=difference)  # fmt: skip
    record.measure("fit_minutes", minutes)
    record.measure("loss_of_last_steps", loss)
    record.measure("trained_over_untrained", after / before)
    record.measure("difference_after_sigkill", difference)
    neighbours(record, folder / "tiny" / "checkpoints" / "last.ckpt")


@torch.no_grad()
def neighbours(record: Record, checkpoint: Path) -> None:
    """The nearest titles of ten titles, by the vectors of items before and after training."""
    data = Interactions(tokenizer="minilm-l6")
    titles = data.catalogue.titles
    trained = LLMRec.load_from_checkpoint(checkpoint).eval()
    untrained = LLMRec(build(HFBackbone, trained.backbone.init_config), pooling=trained.pooling).eval()
    tokens = data.catalogue.tokens(torch.arange(len(titles)))
    vectors = {}
    for arm, module in {"untrained": untrained, "trained": trained}.items():
        module.use_tokenizer(data.tokenizer)
        vectors[arm] = normalize(module.encode(*tokens))
    for title in NEIGHBOURS:
        item = titles.index(title)
        nearest = {arm: (vector_ID @ vector_ID[item]).topk(4).indices[1:].tolist() for arm, vector_ID in vectors.items()}
        record.row(title=title, **{arm: "; ".join(titles[each] for each in found) for arm, found in nearest.items()})


def other_backbones(record: Record, arms: Arms, seeds: Sequence[int]) -> None:
    """Encoder and decoder, pretrained and random, all of it trained, adapters alone, or nothing: one model for all domains."""
    for name, (source, kind) in BACKBONES.items():
        plain = read_hf_config(find_source(source)).to_dict()
        weights = {"pretrained": source, "random": json.dumps({key: plain[key] for key in plain if key != "quantization_config"})}
        for start, where in weights.items():
            for tuning in ("full", "lora", "frozen"):
                backbone = {"source": where, "kind": kind, "tuning": tuning, "tokenizer": source}
                options = [f"--model.init_args.backbone.init_args.{key}={value}" for key, value in backbone.items()]
                options += ["--data.tokenizer", source]
                arm = f"{name}, {start}, {tuning}"
                for seed in seeds if tuning != "frozen" else seeds[:1]:
                    if tuning == "frozen":
                        found = arms.test(f"{arm} {seed}", WHOLE, options)
                    else:
                        found = arms.trained(f"{arm} {seed}", WHOLE, seed, options=options)
                    record.row(backbone=arm, seed=seed, **{key: found[key] for key in NAMES})


def on_a_gpu(record: Record, folder: Path, seeds: Sequence[int], share: float) -> None:
    """Section 8's sparse variant at once and five times the steps, and other backbones."""
    arms = Arms(folder, share, last=20)
    popular = arms.test("popularity", POPULARITY)["NDCG@10"]
    for times in (1, 5):
        found: dict[str, list[float]] = {}
        for seed in seeds:
            for arm, config in (("SASRec", SASREC), ("LLM-Rec", WHOLE)):
                runs = {"one model": arms.trained(f"{arm} mixed {times} {seed}", config, seed, times=times),
                        "one a domain": arms.one_each(f"{arm} {times}", config, seed, times)}  # fmt: skip
                for form, metrics in runs.items():
                    record.row(sparse=f"{arm}, {form}", times=times, seed=seed, ndcg=metrics["NDCG@10"])
                    found.setdefault(f"{arm}, {form}", []).append(metrics["NDCG@10"])
        record.row(sparse="popularity", times=times, seed=0, ndcg=popular)
        if times == 1:
            mixed = statistics.median(found["LLM-Rec, one model"])
            record.measure("mixed_over_single", mixed / statistics.median(found["LLM-Rec, one a domain"]))
            record.measure("mixed_over_sasrec", mixed / statistics.median(found["SASRec, one model"]))
            record.measure("mixed_over_popularity", mixed / popular)
    other_backbones(record, arms, seeds)


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llmrec", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trained arm")
    parser.add_argument("--smoke", action="store_true", help="few steps; the result is not kept")
    parser.add_argument("--gpu-arms", action="store_true", default=torch.cuda.is_available(),
                        help="also the arms that need a GPU; the default where there is one")  # fmt: skip
    options = parser.parse_args(arguments)
    seeds = range(1 if options.smoke else options.seeds)
    share = 0.02 if options.smoke else 1.0
    record = Record("llmrec", seeds=seeds, smoke=options.smoke, tables=[
        Table("Full ranking inside the target's group of genres, all ratings", "arm", [*NAMES, "tail", "cold"], digits=3),
        Table("zoo fit -c llmrec/movielens_tiny: loss of the last 20 steps, NDCG@10 of validation", "fit",
              ["minutes", "loss", "untrained", "trained", "killed_at", "loss_difference"], digits=3),
        Table("The three nearest titles, by the vectors of movielens_tiny", "title", ["untrained", "trained"]),
        *(OF_A_GPU if options.gpu_arms else []),
    ], plots=[Plot("NDCG@10 by group of genres", "domain", "ndcg", "by_domain")])  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny(record, folder)
        arms = Arms(folder, share)
        popular = add(record, arms, "popularity", 0, arms.test("popularity", POPULARITY))
        for history in ("mixed", "domain"):
            found = arms.test(f"untrained {history}", TINY, ["--data.history", history])
            add(record, arms, f"LLM-Rec untrained, {history} history", 0, found)
        sasrec = []
        for seed in seeds:
            for arm, config in (("SASRec", SASREC), ("LLM-Rec", TINY)):
                forms = {"one model": arms.trained(f"{arm} mixed {seed}", config, seed),
                         "one a domain": arms.one_each(arm, config, seed)}  # fmt: skip
                for form, found in forms.items():
                    value = add(record, arms, f"{arm}, {form}", seed, found)
                    sasrec += [value] if arm == "SASRec" else []
        record.measure("sasrec_over_popularity", max(sasrec) / popular)
        if options.gpu_arms:
            on_a_gpu(record, folder, seeds, share)
    return record.save()


if __name__ == "__main__":
    main()
