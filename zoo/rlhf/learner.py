"""The steps of actor and critic on the samples of a rollout.

Shape suffixes: R samples, N answer tokens, S prompt and answer ids, T ids of a text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.rlhf.algorithm import Targets
from zoo.rlhf.experience import Experience
from zoo.rlhf.ppo import kl_sums
from zoo.rlhf.rollout import Samples
from zoo.role_placement import Fields

__all__ = ["Learner"]


class Learner:
    """The steps on the samples of one training step.

    Args:
        module: An `RLHF`; its placement says what this rank does; ranks that do not train count the same steps.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.place, self.options = module, module.placement, module.rollout
        optimizers = module.optimizers()
        self.optimizers: list[Any] = optimizers if isinstance(optimizers, list) else [optimizers]
        self.sums: dict[str, Tensor] = {}
        self.texts: list[Tensor] = []

    def learn(self, chunks: Sequence[Samples], arriving: Iterator[Fields], version: int, older: bool = False) -> None:
        """Train on the chunks of a rollout as they come, then ``epochs`` - 1 times on all.

        Args:
            chunks: Prompts of the rollout; none where nothing is trained.
            arriving: Their fields.
            version: Number of the weights that generated.
            older: Whether these are older than those of now; log-probabilities are then computed again first.
        """
        minibatches = self.options.minibatches // max(1, len(chunks))
        self.texts = self._texts([row for samples in chunks for row in samples.rows])
        if self.module.algorithm.needs_whole_rollout and len(chunks) > 1:
            raise ValueError(
                "RLHF: advantages are whitened over the rollout, which needs it whole: set chunks of the plan to 1, or"
                " algorithm.whiten to minibatch."
            )
        parts: list[tuple[Experience, Targets]] = []
        for samples, fields in zip(chunks, arriving, strict=False):
            if self.place.trains:
                experience = self.module.experience_of(samples, fields, version)
                if older:
                    experience.behaviour_logp, experience.logp = experience.logp, self._logp_now(experience)
                parts.append(self._targets(experience))
                self._pass(*parts[-1], minibatches)
        if not self.place.trains:
            list(arriving)  # generates and sends
            self._idle(self.options.minibatches * self.options.epochs)
            return
        self._epochs(parts)

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Ids of the text of each sample's row, int64, for the loss of PPO-ptx; none without it."""
        if not self.module.ptx_weight or not self.place.trains:
            return []
        tokenizer = self.module.tokenizer()
        if missing := sum(not isinstance(row.get("text"), str) or not row["text"] for row in rows):
            raise ValueError(
                f"RLHF: ptx_weight needs a column text in the prompts' rows, which {missing} of {len(rows)} have not: add one, or"
                " set ptx_weight to 0."
            )
        return [torch.tensor([*tokenizer.encode(row["text"]), tokenizer.eos_id], device=self.module.device) for row in rows]

    def _text_loss(self, index_R: Tensor, count: int) -> Tensor:
        """Cross-entropy of the texts of some samples, divided by the tokens of all texts of the minibatch."""
        texts = [self.texts[index] for index in index_R.tolist()]
        ids_RT = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask_RT = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        logp_RT, _ = self.place.network("actor")(ids_RT, mask_RT, ids_RT.shape[1] - 1)
        return -logp_RT.masked_fill(mask_RT[:, 1:] == 0, 0).sum() / count

    @torch.no_grad()
    def _logp_now(self, experience: Experience) -> Tensor:
        ids_RS, mask_RS = experience.ids_and_mask()
        network, unit = self.place.network("actor"), self.options.unit
        found_RN = torch.zeros_like(experience.logp)
        with self.place.gathered("actor"):
            for number in self.place.share("actor", range(len(ids_RS) // unit)):
                rows = slice(number * unit, (number + 1) * unit)
                found_RN[rows] = network(ids_RS[rows], mask_RS[rows], experience.tokens.shape[1])[0].float()
        return self.place.total("actor", found_RN)

    def _targets(self, experience: Experience) -> tuple[Experience, Targets]:
        module = self.module
        targets = module.algorithm.targets(experience, self.options.samples_per_prompt, module.kl_controller.coefficient)
        kl, _ = kl_sums(targets.kl, experience.mask)
        measured, sequences = kl_sums(targets.kl, experience.mask, module.algorithm.kl.measure)
        self._add(
            samples=len(experience), score=experience.score.sum(), kl=kl, length=experience.length.sum(),
            ended=experience.ended.sum(), reward=targets.reward.sum(), measured_kl=measured, sequences=sequences,
        )  # fmt: skip
        return experience, targets

    def _epochs(self, parts: list[tuple[Experience, Targets]]) -> None:
        """Later passes over a rollout, in an order of their own; then the KL coefficient follows."""
        rows = sum(len(experience) for experience, _ in parts)
        if self.options.epochs > 1:
            (experience, targets), *rest = parts
            experience, targets = experience.joined([one for one, _ in rest]), targets.joined([one for _, one in rest])
            for epoch in range(1, self.options.epochs):
                generator = torch.Generator().manual_seed(hash((self.module.random_seed, self.module.rollouts, epoch)) % 2**63)
                order = torch.randperm(rows, generator=generator).to(experience.tokens.device)
                self._pass(experience.select(order), targets.select(order), self.options.minibatches)
        self.module.kl_controller.update(float(self.sums["measured_kl"] / self.sums["sequences"]), rows)

    def _pass(self, experience: Experience, targets: Targets, minibatches: int) -> None:
        """One step of each model on each minibatch, in order."""
        rows = len(experience) // minibatches
        for number in range(minibatches):
            part = slice(number * rows, (number + 1) * rows)
            with self.place.learning():
                self._step(experience.select(part), targets.select(part))

    def _step(self, experience: Experience, targets: Targets) -> None:
        algorithm, unit = self.module.algorithm, self.options.unit
        mask_RN = algorithm.action_mask(experience)
        advantage_RN = algorithm.minibatch_advantage(targets, mask_RN)
        ids_RS, mask_RS = experience.ids_and_mask()
        num_tokens, with_entropy = experience.tokens.shape[1], bool(algorithm.entropy_weight)
        text_tokens = sum(len(self.texts[index]) - 1 for index in experience.index.tolist()) if self.texts else 0

        def actor_loss(rows: slice) -> Tensor:
            logp_RN, entropy_RN = self.place.network("actor")(ids_RS[rows], mask_RS[rows], num_tokens, with_entropy)
            loss, sums = algorithm.policy_loss(
                logp_RN, entropy_RN if with_entropy else None, experience.select(rows), advantage_RN[rows], mask_RN.sum(),
                len(experience), self.module.kl_controller.coefficient,
            )  # fmt: skip
            self._add(loss=loss.detach(), **{f"actor/{name}": value for name, value in sums.items()})
            if self.texts:
                text_loss = self._text_loss(experience.index[rows], text_tokens)
                self._add(**{"actor/text": text_loss.detach()})
                loss = loss + self.module.ptx_weight * text_loss
            return loss

        def critic_loss(rows: slice) -> Tensor:
            assert targets.returns is not None
            value_RN = self.place.network("critic")(ids_RS[rows], mask_RS[rows], num_tokens)
            count = algorithm.value_mask(experience).sum()
            loss, _ = algorithm.value_loss(value_RN, experience.select(rows), targets.returns[rows], count)
            self._add(value_loss=loss.detach())
            return loss

        units = range(len(experience) // unit)
        for place, (role, loss_of) in enumerate({"actor": actor_loss, "critic": critic_loss}.items()):
            if role not in self.place.roles:
                continue
            optimizer = self.optimizers[place]
            optimizer.zero_grad()
            mine = self.place.share(role, units)
            for number in mine:
                with self.place.accumulate(role, last=number == mine[-1]):
                    loss = loss_of(slice(number * unit, (number + 1) * unit))
                    self.module.manual_backward(loss * self.place.replicas(role))
            if mine and self.module.max_grad_norm:
                parameters = [each for group in optimizer.param_groups for each in group["params"]]
                self.place.clip(role, parameters, self.module.max_grad_norm)
            self._take(place)
        self._add(steps=1)

    def _idle(self, steps: int) -> None:
        """As many steps as the ranks take that train."""
        for _ in range(steps):
            for place in range(len(self.optimizers)):
                self._take(place)

    def _take(self, place: int) -> None:
        """A step; only the actor's counts in ``global_step``."""
        optimizer = self.optimizers[place]
        if place == 0:
            optimizer.step()
            self.module.average_actor()
        else:
            optimizer.optimizer.step()

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.module.device)
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value

    def summary(self) -> dict[str, float]:
        """Means of the rollout, the same on all ranks; empty where nothing was trained."""
        names = ("samples", "score", "kl", "length", "ended", "reward", "steps")
        sums = ("tokens", "clipped", "old_kl", "ratio", "entropy", "weight", "text")
        of_actor = ["loss", *(f"actor/{name}" for name in sums)]
        zero = torch.zeros((), dtype=torch.float64, device=self.module.device)
        known = torch.stack([self.sums.get(name, zero) for name in names])
        actor = self.place.total("actor", torch.stack([self.sums.get(name, zero) for name in of_actor]))
        critic = self.place.total("critic", self.sums.get("value_loss", zero)[None].clone())
        if "critic" in self.place.roles and not self.place.holds("critic"):
            critic = critic * torch.nan
        everything = self.place.to_all(torch.cat([known, actor, critic])).tolist()
        found = dict(zip((*names, *of_actor, "value_loss"), everything, strict=True))
        if not found["samples"]:
            return {}
        steps, tokens = max(found["steps"], 1), max(found["actor/tokens"], 1)
        values = {name: found[name] / found["samples"] for name in ("score", "kl", "length", "ended", "reward")}
        values |= {"loss": found["loss"] / steps, "kl_coefficient": self.module.kl_controller.coefficient}
        values |= {name: found[f"actor/{name}"] / tokens for name in ("clipped", "old_kl", "ratio")}
        if self.module.algorithm.entropy_weight:
            values["entropy"] = found["actor/entropy"] / tokens
        if self.module.ptx_weight:
            values["text_loss"] = found["actor/text"] / steps
        if found["actor/weight"]:
            values["importance_weight"] = found["actor/weight"] / tokens
        if "critic" in self.place.roles and found["value_loss"] == found["value_loss"]:
            values["value_loss"] = found["value_loss"] / steps
        return values
