"""Small policies that learn to write positively, by the commands of the card, judged by a reward model that training never sees.

``python -m benchmarks.rlhf_vader`` trains a gold reward model on the half of the rated texts that no shipped weights have seen
(``zoo fit -c rlhf/reward_vader --data.part gold``), types ``zoo fit -c rlhf/ppo_vader`` (also ``rlhf/grpo_vader``, and RLOO) for
each seed, and lets every policy continue the same held-out beginnings. Gold scores are in standard deviations of the gold model's
scores of held-out texts. VADER's own rules are a third judge where ``vaderSentiment`` is installed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm_tuning import run, zoo
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import RatedSnippets
from zoo.base.random import SampleRandom
from zoo.ling import LingBackbone
from zoo.lm.generation import Generation, continue_prompts
from zoo.rlhf import TrainedReward, answer_mask
from zoo.rlhf.networks import PolicyNetwork

SFT, REWARD = "rlhf-vader-sft", "rlhf-vader-reward"
ARMS = {
    "PPO": ("rlhf/ppo_vader", []),
    "GRPO": ("rlhf/grpo_vader", []),
    "RLOO": ("rlhf/grpo_vader", ["--model.algorithm", "RLOO", "--model.algorithm.kl.coefficient", "0.05"]),
}
NEW_TOKENS, EVERY = 24, 80


class Judge:
    """Continues held-out beginnings with a policy and scores what it writes.

    Args:
        gold: Checkpoint of the gold reward model.
        prompts: Number of beginnings.
    """

    def __init__(self, gold: Path, prompts: int) -> None:
        data = RatedSnippets(use="prompts", batch_size=prompts)
        self.tokenizer = data.tokenizer
        batch = data.batches(data.splits[1]).batch(list(range(prompts)))
        self.prompt_ids, self.prompt_mask = batch["input_ids"], batch["attention_mask"].long()
        self.gold, self.reward = TrainedReward(str(gold)), TrainedReward(REWARD)
        self.start = PolicyNetwork(LingBackbone(checkpoint=SFT)).eval()
        self.vader = None
        if find_spec("vaderSentiment") is not None:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

            self.vader = SentimentIntensityAnalyzer()

    @torch.no_grad()
    def answers(self, policy: LingBackbone, draw: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of beginnings with what the policy writes."""
        eos, pad = self.tokenizer.eos_id, self.tokenizer.pad_id
        options = Generation(NEW_TOKENS, 1.0, eos_token_id=[eos], pad_token_id=pad)
        random = SampleRandom(1, torch.arange(len(self.prompt_ids)), epoch=draw)
        found = continue_prompts(policy.eval().decodes(), self.prompt_ids, self.prompt_mask, options, random=random).tokens
        tokens = torch.nn.functional.pad(found, (0, NEW_TOKENS - found.shape[1]), value=pad)
        mask = answer_mask(tokens, [eos])[0]
        return torch.cat([self.prompt_ids, tokens], 1), torch.cat([self.prompt_mask, mask.long()], 1)

    @torch.no_grad()
    def measures(self, policy: LingBackbone, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        """Means over all beginnings."""
        answer = mask[:, -NEW_TOKENS:].bool()
        logps = [network(ids, mask, NEW_TOKENS)[0] for network in (PolicyNetwork(policy.eval()), self.start)]
        texts = self.texts(ids, mask)
        pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
        found = {
            "gold": float(self.gold.score(ids, mask, [], [], []).mean()),
            "reward": float(self.reward.score(ids, mask, [], [], []).mean()),
            "kl": float((logps[0] - logps[1]).masked_fill(~answer, 0).sum(1).mean()),
            "length": float(answer.sum(1).double().mean()),
            "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        }
        if self.vader is not None:
            found["vader"] = sum(self.vader.polarity_scores(text)["compound"] for text in texts) / len(texts)
        return found

    def texts(self, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Beginnings with what follows, as text."""
        return [self.tokenizer.decode(row[kept.bool()]) for row, kept in zip(ids, mask, strict=True)]

    def best_of(self, policy: LingBackbone, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers that the shipped reward model likes best among several of each beginning."""
        drawn = [self.answers(policy, draw) for draw in range(number)]
        best = torch.stack([self.reward.score(ids, mask, [], [], []) for ids, mask in drawn]).argmax(0)
        rows = torch.arange(len(best))
        ids, mask = (torch.stack(list(part))[best, rows] for part in zip(*drawn, strict=True))
        return ids, mask


def trained(record: Record, judge: Judge, folder: Path, arm: str, seed: int, more: Sequence[str]) -> dict[str, Any]:
    """One run of an arm; the rows of its path and of its end."""
    config, options = ARMS[arm]
    saves = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={folder / 'steps'}",
             f"--trainer.callbacks.every_n_train_steps={EVERY}", "--trainer.callbacks.save_top_k=-1",
             "--trainer.callbacks.filename={step}", "--trainer.callbacks.auto_insert_metric_name=false"]  # fmt: skip
    seconds = run(zoo("fit", config, folder, "--seed_everything", str(seed), *options, *saves, *more))
    for path in sorted((folder / "steps").glob("*.ckpt"), key=lambda path: int(path.stem)):
        policy = LingBackbone(checkpoint=str(path))
        found = judge.measures(policy, *judge.answers(policy))
        for name in ("gold", "reward"):
            record.row(step=int(path.stem), kl=round(found["kl"], 1), score=found[name], judge=f"{arm}, {name}", seed=seed)
    policy = LingBackbone(checkpoint=str(folder / "checkpoints" / "last.ckpt"))
    ids, mask = judge.answers(policy)
    if seed == 0:
        for text, number in zip(judge.texts(ids, mask)[:4], range(4), strict=True):
            record.row(sample=number, policy=arm, text=text)
    return {"minutes": seconds / 60, **judge.measures(policy, ids, mask)}


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rlhf_vader", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--arms", default="PPO,GRPO,RLOO", help="arms that are trained")
    parser.add_argument("--smoke", action="store_true", help="a few steps; the result is not kept")
    options = parser.parse_args(arguments)
    seeds, prompts = (1, 32) if options.smoke else (options.seeds, 512)
    more = ["--trainer.max_steps", "8"] if options.smoke else []
    values = ["gold", "reward", "kl", "length", "vader", "distinct_2", "minutes"]
    record = Record(
        "rlhf_vader",
        seeds=range(seeds),
        smoke=options.smoke,
        tables=[
            Table("Continuations of held-out beginnings", "policy", values),
            Table("The same beginnings", "sample", ["text"], columns="policy"),
        ],
        plots=[Plot("Scores over the KL from the SFT policy, nats", x="kl", y="score", series="judge")],
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gold = zoo("fit", "rlhf/reward_vader", folder / "gold", "--data.part", "gold")
        run(gold + (["--trainer.max_steps", "4", "--trainer.val_check_interval", "4"] if options.smoke else []))
        judge = Judge(folder / "gold" / "checkpoints" / "last.ckpt", prompts)
        start = LingBackbone(checkpoint=SFT)
        ids, mask = judge.answers(start)
        before = judge.measures(start, ids, mask)
        record.row(policy="SFT", **before)
        for text, number in zip(judge.texts(ids, mask)[:4], range(4), strict=True):
            record.row(sample=number, policy="SFT", text=text)
        record.row(policy="SFT, best of 4", **judge.measures(start, *judge.best_of(start, 4)))
        ends = []
        for arm in options.arms.split(","):
            for seed in range(seeds):
                end = trained(record, judge, folder / f"{arm}{seed}", arm, seed, more)
                record.row(policy=arm, seed=seed, **end)
                ends += [end] if arm == "PPO" else []
    if ends:
        record.measure("gold_gain", min(end["gold"] for end in ends) - before["gold"])
        record.measure("kl", max(end["kl"] for end in ends))
        record.measure("length_change", max(abs(end["length"] / before["length"] - 1) for end in ends))
        record.measure("minutes", max(end["minutes"] for end in ends))
    return record.save()


if __name__ == "__main__":
    main()
