"""One model for all domains against one for each, by text and by ids: full ranking inside the target's group of genres.

``python -m benchmarks.llmrec`` types ``zoo fit`` and ``zoo test`` on MovieLens-100K, the last 20 ratings of each user:
popularity; the language model untrained, with histories of all domains and of the target's alone; SASRec and LLM-Rec, one model
for all domains and one for each, whose steps add up to as many. Then popularity and SASRec on all ratings. An arm of one model a
domain is the mean of its models, weighted by their users.

Claim: arXiv 2310.14304, that one model of all domains is better than one for each where items are texts.
"""

from __future__ import annotations

import argparse
import operator
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.commands import column, run, zoo
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Interactions

TINY, SASREC, POPULARITY = "llmrec/movielens_tiny", "llmrec/movielens_sasrec", "llmrec/movielens_popularity"
NAMES = ("NDCG@10", "Recall@10")
STEPS = {TINY: 120, SASREC: 1200}


class Arms:
    """Runs of the command line.

    Args:
        folder: Where they lie.
        options: Options of all commands.
        share: Of the steps.
    """

    def __init__(self, folder: Path, options: Sequence[str], share: float) -> None:
        self.folder, self.options, self.share = folder, list(options), share
        data = Interactions(tokenizer=None, last=20)
        self.domains = data.catalogue.domains
        domains = [batch["domain"] for batch in data.test_dataloader()]
        self.users = [sum(int((each == number).sum()) for each in domains) for number in range(len(self.domains))]

    def test(self, name: str, config: str, options: Sequence[str], checkpoint: Path | None = None) -> dict[str, float]:
        """Metrics of the test split."""
        folder = self.folder / name.replace(" ", "_").replace(",", "")
        more = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
        run(zoo("test", config, folder, *self.options, *options, *more))
        head = (folder / "metrics.csv").read_text().partition("\n")[0].split(",")
        return {key.removeprefix("test/full-domain/"): column(folder, key)[-1][1] for key in head if key.startswith("test/")}

    def trained(self, name: str, config: str, seed: int, parts: int, options: Sequence[str] = ()) -> dict[str, float]:
        """Metrics of a model that is trained for its share of the steps."""
        folder = self.folder / f"{name.replace(' ', '_').replace(',', '')}_fit"
        steps = ["--trainer.max_steps", str(max(1, int(STEPS[config] * self.share / parts))), "--trainer.max_epochs", "-1"]
        run(zoo("fit", config, folder, *self.options, *options, *steps, "--seed_everything", str(seed),
                "--trainer.limit_val_batches", "0"))  # fmt: skip
        return self.test(name, config, options, folder / "checkpoints" / "last.ckpt")

    def one_each(self, name: str, config: str, seed: int) -> dict[str, float]:
        """Metrics of one model for each domain."""
        found = {}
        for domain in self.domains:
            own = ["--data.history", "domain", "--data.train_domains", f"[{domain}]", "--data.eval_domains", f"[{domain}]"]
            found |= {
                f"{key}/{domain}": value
                for key, value in self.trained(f"{name} {domain} {seed}", config, seed, len(self.domains), own).items()
                if "/" not in key
            }
        shares = [users / sum(self.users) for users in self.users]
        means = {key: [found[f"{key}/{domain}"] for domain in self.domains] for key in NAMES}
        return found | {key: sum(map(operator.mul, values, shares)) for key, values in means.items()}


def add(record: Record, arms: Arms, arm: str, seed: int, found: Mapping[str, float]) -> None:
    """Rows of an arm."""
    record.row(arm=arm, seed=seed, **{name: found[name] for name in NAMES}, tail=found.get("NDCG@10/tail", float("nan")))
    for number, domain in enumerate(arms.domains, start=1):
        record.row(by_domain=arm, domain=number, name=domain, seed=seed, ndcg=found[f"NDCG@10/{domain}"])


def tiny(record: Record, folder: Path) -> None:
    """``zoo fit -c llmrec/movielens_tiny`` as it is: minutes, the loss of the last 20 steps, validation before and after."""
    run(zoo("validate", TINY, folder / "untrained"))
    minutes = run(zoo("fit", TINY, folder / "tiny", "--trainer.log_every_n_steps", "1")) / 60
    losses = [value for _, value in column(folder / "tiny", "train/loss")]
    before, after = (column(folder / name, "val/full-domain/NDCG@10")[-1][1] for name in ("untrained", "tiny"))
    loss = statistics.mean(losses[-20:])
    record.row(fit="movielens_tiny", minutes=minutes, loss=loss, untrained=before, trained=after)
    record.measure("fit_minutes", minutes)
    record.measure("loss_of_last_steps", loss)
    record.measure("trained_over_untrained", after / before)


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llmrec", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trained arm")
    parser.add_argument("--smoke", action="store_true", help="few steps; the result is not kept")
    options = parser.parse_args(arguments)
    seeds = range(1 if options.smoke else options.seeds)
    columns = [*NAMES, "tail"]
    record = Record("llmrec", seeds=seeds, smoke=options.smoke, tables=[
        Table("zoo fit -c llmrec/movielens_tiny: loss of the last 20 steps, NDCG@10 of validation", "fit",
              ["minutes", "loss", "untrained", "trained"], digits=3),
        Table("Full ranking inside the target's group of genres, the last 20 ratings of each user", "arm", columns, digits=3),
        Table("The same on all ratings", "arm_of_all", [*NAMES], digits=3),
    ], plots=[
        Plot("NDCG@10 by group of genres (1 to 5: Action, Comedy, Dark, Drama, Family)", "domain", "ndcg", "by_domain"),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arms = Arms(Path(folder), [], 0.02 if options.smoke else 1.0)
        tiny(record, Path(folder))
        add(record, arms, "popularity", 0, arms.test("popularity", POPULARITY, []))
        for history in ("mixed", "domain"):
            found = arms.test(f"untrained {history}", TINY, ["--data.history", history])
            add(record, arms, f"LLM-Rec untrained, {history} history", 0, found)
        for seed in seeds:
            for arm, config in (("SASRec", SASREC), ("LLM-Rec", TINY)):
                add(record, arms, f"{arm}, one model", seed, arms.trained(f"{arm} mixed {seed}", config, seed, 1))
                add(record, arms, f"{arm}, one a domain", seed, arms.one_each(arm, config, seed))
        whole = ["--data.last", "null"]
        popular = arms.test("popularity of all", POPULARITY, whole)
        record.row(arm_of_all="popularity", seed=0, **{name: popular[name] for name in NAMES})
        best = []
        for seed in seeds:
            found = arms.trained(f"SASRec all {seed}", SASREC, seed, 1, whole)
            record.row(arm_of_all="SASRec", seed=seed, **{name: found[name] for name in NAMES})
            best.append(found["NDCG@10"] / popular["NDCG@10"])
        record.measure("sasrec_over_popularity", max(best))
    return record.save()


if __name__ == "__main__":
    main()
