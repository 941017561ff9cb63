"""RLHF: an actor that is trained by the scores of its own answers, beside a critic, a reference and rewards.

Shape suffixes: R samples of a rollout, P prompt ids, N answer tokens, S = P + N.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from zoo.callbacks import EMA
from zoo.lm.backbone import Backbone
from zoo.lm.batches import check_vocabulary
from zoo.lm.language_module import text_until_end
from zoo.metrics.mean_and_error import Mean
from zoo.module import ZooModule
from zoo.rlhf.algorithm import PPO, Algorithm
from zoo.rlhf.experience import Experience, answer_mask
from zoo.rlhf.learner import Learner
from zoo.rlhf.networks import PolicyNetwork, ValueNetwork
from zoo.rlhf.rewards import Reward
from zoo.rlhf.rollout import Rollout, RolloutEngine, Samples, samples_of
from zoo.role_placement import Fields, FieldSpec, Placement, PlacesRoles, Role

__all__ = ["RLHF"]

_METRICS = ("score", "kl", "length", "ended")


class RLHF(ZooModule):
    """Reinforcement learning from human or verified feedback: PPO and its kin, on any placement of the models.

    A batch of the data, as `RolloutPrompts` and `RatedSnippets` give it, is one rollout: each prompt is answered, answers are
    scored, and the actor (and critic) take ``rollout.minibatches`` steps on them. ``max_steps`` counts the actor's steps. With
    several processes take a strategy of `strategies.placement`; the weights are the same under each. Dropout is off.
    Source: Ouyang et al., arXiv 2203.02155; placement: Xiao et al., arXiv 2312.11819.

    Args:
        actor: The policy, a causal model; what of it is trained is its ``tuning``.
        reward: Scores answers; several are added.
        critic: A model with a scalar head, usually begun from the reward model; for `PPO` only.
        reference: The model from which the KL is measured; None: the actor at the start. Checkpoints hold its weights.
        algorithm: Rewards of tokens, advantages and losses; None: `PPO`.
        rollout: Numbers of a rollout, and options of draws.
        engine: Generates answers; None: `RolloutEngine`.
        max_grad_norm: Bound of the norm of each model's gradient; 0: none.
        ema_decay: Decay of an average of the actor's weights over its steps, such as 0.992, which `LingBackbone` takes from the
            checkpoint; 0: none.
        ptx_weight: Weight of the loss (nats a token) of texts that the actor shall not forget (PPO-ptx; InstructGPT: 27.8): those
            of the column ``text`` of the prompts' rows; 0: none.
        optimizer: Makes the actor's optimizer.
        lr_scheduler: Makes its schedule.
        critic_optimizer: Makes the critic's optimizer.
        critic_lr_scheduler: Makes its schedule.
        kwargs: Arguments of `ZooModule`.

    Raises:
        ValueError: If models and algorithm do not fit.
    """

    def __init__(
        self,
        actor: Backbone,
        reward: Reward | list[Reward],
        critic: Backbone | None = None,
        reference: Backbone | None = None,
        algorithm: Algorithm | None = None,
        rollout: Rollout = Rollout(),  # noqa: B008 (read only)
        engine: RolloutEngine | None = None,
        max_grad_norm: float = 1.0,
        ema_decay: float = 0.0,
        ptx_weight: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=9.65e-6, betas=(0.9, 0.95), weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        critic_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=5e-6, betas=(0.9, 0.95), weight_decay=0.0
        ),
        critic_lr_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, **kwargs)
        self.automatic_optimization = False
        self.algorithm = algorithm or PPO()
        self._check_models(actor, critic, rollout)
        _check_numbers(max_grad_norm, ema_decay, ptx_weight)
        self.actor = actor
        self.critic = critic
        self.rewards = reward if isinstance(reward, list) else [reward]
        self.rollout = rollout
        self.engine = engine or RolloutEngine()
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.ptx_weight = ptx_weight
        self.critic_optimizer, self.critic_lr_scheduler = critic_optimizer, critic_lr_scheduler
        self.is_pretrained = actor.is_pretrained
        if critic is not None:
            critic.freeze_output_head()
        # In lists, so that they are no part of the module: not trained, not in what is shared.
        self._reference = [] if reference is None else [reference.requires_grad_(False)]
        self._scorers = [part for part in self.rewards if isinstance(part, nn.Module)]
        self._reference_state: dict[str, Tensor] = {}
        self.kl_controller = self.algorithm.kl_controller()
        self._placement: Placement | None = None
        self._ema: dict[str, Tensor] = {}
        #: Rollouts that were begun; names the draws of the next one.
        self.rollouts = 0
        self.waiting: list[tuple[Samples, Fields] | None] = []
        self.metrics = nn.ModuleDict({name: Mean() for name in _METRICS})

    def _check_models(self, actor: Backbone, critic: Backbone | None, rollout: Rollout) -> None:
        name = type(self.algorithm).__name__
        if actor.kind != "causal":
            raise ValueError(f"RLHF: the actor is of the kind {actor.kind}: take a causal model, which generates answers.")
        if self.algorithm.needs_critic and (critic is None or critic.scalar is None):
            raise ValueError(f"RLHF: {name} needs a critic with scalar_head=true, such as the reward model's backbone.")
        if critic is not None and not self.algorithm.needs_critic:
            raise ValueError(f"RLHF: {name} has no critic: leave critic out, or take PPO.")
        if critic is not None and critic.vocab_size != actor.vocab_size:
            raise ValueError(
                f"RLHF: the critic has a vocabulary of {critic.vocab_size}, the actor one of {actor.vocab_size}: both must have"
                " one tokenizer."
            )
        if self.algorithm.needs_groups and rollout.samples_per_prompt < 2:
            raise ValueError(f"RLHF: {name} compares answers to a prompt: set rollout.samples_per_prompt to 2 or more.")

    # Roles and their placement

    def roles(self) -> dict[str, Role]:
        """The models by name, see `zoo.role_placement`."""
        found = {"actor": Role(PolicyNetwork(self.actor, self.rollout.temperature), "actor.", self.actor.blocks, trained=True)}
        if self.critic is not None:
            found["critic"] = Role(ValueNetwork(self.critic), "critic.", self.critic.blocks, trained=True)
        if self._reference:
            found["reference"] = Role(PolicyNetwork(self._reference[0], self.rollout.temperature), "", self._reference[0].blocks)
        found["reward"] = Role(nn.ModuleList(self._scorers), "")
        return found

    def drop_role(self, name: str) -> None:
        """Free a model that other ranks hold."""
        if name == "reference":
            self._reference.clear()
        elif name == "reward":
            self._scorers, self.rewards = [], []
        else:
            setattr(self, name, nn.Module())

    def use_placement(self, placement: Placement) -> None:
        """Take the placement by which the module works from here on."""
        self._placement = placement

    @property
    def placement(self) -> Placement:
        """The placement; that of one process before a strategy gives another."""
        if self._placement is None:
            self._placement = Placement(self.roles())
        return self._placement

    @override
    def setup(self, stage: str) -> None:
        """Check the run, and copy the reference before a strategy divides the weights.

        Raises:
            ValueError: If strategy, callbacks, clipping or tokenizer do not fit.
        """
        super().setup(stage)
        self._placement = None
        tokenizer = self.tokenizer()
        self.actor.check_tokenizer(tokenizer)
        for reward in self.rewards:
            reward.check_tokenizer(tokenizer)
        if tokenizer.pad_id == tokenizer.eos_id and self.algorithm.rules.eos_in_mask:
            raise ValueError(
                f"RLHF: the tokenizer pads with its eos ({tokenizer.eos_id}), so that ends look like padding: take a tokenizer"
                " with a pad token of its own, or the convention dschat."
            )
        if stage != "fit":
            return
        self._check_trainer()
        if self.algorithm.needs_reference and not self._reference and not self.actor.has_adapter:
            self._reference.append(copy.deepcopy(self.actor).requires_grad_(False))
        if self._reference and self.trainer.is_global_zero:
            self._reference_state = {name: value.cpu() for name, value in self._reference[0].state_dict().items()}

    def _check_trainer(self) -> None:
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1 and not isinstance(strategy, PlacesRoles):
            raise ValueError(
                f"RLHF: {type(strategy).__name__} does not know several models: take FlatteningStrategy, InterleavingStrategy or"
                " SeparationStrategy (-c strategies/flattening)."
            )
        if self.trainer.gradient_clip_val:
            raise ValueError(
                f"RLHF clips the gradient of each model by itself: leave the Trainer's gradient_clip_val"
                f" ({self.trainer.gradient_clip_val}) out, and set model.max_grad_norm."
            )
        if any(isinstance(callback, EMA) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("RLHF: the callback EMA averages all models after each rollout: leave it out.")

    def tokenizer(self) -> Any:
        """The data's tokenizer.

        Raises:
            ValueError: If there is none.
        """
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("RLHF needs a DataModule with a tokenizer, such as RolloutPrompts or RatedSnippets.")
        return tokenizer

    @override
    def configure_optimizers(self) -> Any:
        """The actor's and the critic's optimizer; on ranks without the model, one that steps and changes nothing."""
        made = [self._optimizer_of("actor", self.optimizer, self.lr_scheduler)]
        if "critic" in self.placement.roles:
            made.append(self._optimizer_of("critic", self.critic_optimizer, self.critic_lr_scheduler))
        return made

    def _optimizer_of(self, role: str, make: OptimizerCallable, scheduler: LRSchedulerCallable | None) -> dict[str, Any]:
        if not self.placement.holds(role):

            def idle(parameters: Any) -> Optimizer:
                return torch.optim.SGD(parameters, lr=0.0)

            return self.optimizer_config(idle, [nn.Parameter(torch.zeros(1))], scheduler)
        parameters = [parameter for parameter in getattr(self, role).parameters() if parameter.requires_grad]
        return self.optimizer_config(make, parameters, scheduler)

    # Batches

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the prompts.

        Raises:
            ValueError: If these are no prompts, or an id is outside of the vocabulary.
        """
        if not isinstance(batch, Mapping) or "input_ids" not in batch or "attention_mask" not in batch:
            raise ValueError(
                "RLHF needs batches of prompts with input_ids and attention_mask, as the DataModules RolloutPrompts and"
                " RatedSnippets (use: prompts) give them."
            )
        if isinstance(self.actor, Backbone):
            check_vocabulary(batch["input_ids"], self.actor.vocab_size)
        return batch

    # Generation and scoring

    def _generation(self) -> Any:
        tokenizer = self.tokenizer()
        return self.rollout.generation([tokenizer.eos_id], tokenizer.pad_id)

    def _fields(self, num_tokens: int) -> FieldSpec:
        """Fields of a sample that is generated and scored."""
        each = ((num_tokens,), torch.float32)
        found: FieldSpec = {"tokens": ((num_tokens,), torch.int64), "logp": each, "score": ((), torch.float32)}
        if self.algorithm.needs_reference:
            found["reference_logp"] = each
        if self.algorithm.needs_critic:
            found["value"] = each
        return found

    @torch.no_grad()
    def collect(self, samples: Samples, rollout: int) -> Fields:
        """Answer prompts and score the answers, on the ranks that infer.

        Args:
            samples: The same on all of these ranks.
            rollout: Number that names the draws.

        Returns:
            Fields of all samples: ``tokens``, ``logp``, ``score``, and ``reference_logp`` and ``value`` where needed.
        """
        place, count, unit = self.placement, len(samples.ids), self.rollout.unit
        generation = self._generation()
        num_tokens, spec = generation.max_new_tokens, self._fields(generation.max_new_tokens)
        self.eval()

        def generate(rows: list[int]) -> Fields:
            backbone = cast(PolicyNetwork, place.inference("actor")).backbone
            with place.decoding("actor", backbone.decodes()) as model:
                agree = place.agreement("actor")
                found = self.engine.answers(model, samples.select(rows), generation, self.random_seed, rollout, agree)
            return {"tokens": found}

        tokens = place.compute("rollout_actor", count, unit, generate, {"tokens": spec["tokens"]}, whole=True)

        def answered(rows: list[int]) -> tuple[Samples, Tensor, Tensor, Tensor]:
            chosen, token_RN = samples.select(rows), tokens.of(rows)["tokens"]
            return chosen, token_RN, *chosen.with_answers(token_RN, self._eos)

        def policy(name: str, role: str, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Any:
            network = place.inference(role)

            def passes(rows: list[int]) -> Fields:
                _, _, ids_RS, mask_RS = answered(rows)
                with context():
                    return {name: network(ids_RS, mask_RS, num_tokens)[0].float()}

            return passes

        def judge(rows: list[int]) -> Fields:
            chosen, token_RN, ids_RS, mask_RS = answered(rows)
            return {"score": self.scores(chosen, ids_RS, mask_RS, token_RN)}

        def value(rows: list[int]) -> Fields:
            _, _, ids_RS, mask_RS = answered(rows)
            return {"value": place.inference("critic")(ids_RS, mask_RS, num_tokens).float()}

        # A rank begins with its own samples, while those of others are on their way.
        jobs = [("rollout_actor", "logp", policy("logp", "actor"))]
        if "reference_logp" in spec and "reference" in place.roles:
            jobs.append(("reference", "reference_logp", policy("reference_logp", "reference")))
        elif "reference_logp" in spec:
            plain = policy("reference_logp", "actor", lambda: self.actor.without_adapter())
            jobs.append(("rollout_actor", "reference_logp", plain))
        jobs.append(("reward", "score", judge))
        if "value" in spec:
            jobs.append(("rollout_critic", "value", value))
        pending = [place.compute(role, count, unit, job, {name: spec[name]}) for role, name, job in jobs]
        found = dict(tokens.wait())
        for part in pending:
            found |= part.wait()
        return found

    @property
    def _eos(self) -> list[int]:
        return [self.tokenizer().eos_id]

    def texts(self, tokens_RN: Tensor) -> list[str]:
        """Answers as text, up to their ends."""
        tokenizer = self.tokenizer()
        return [text_until_end(ids, tokenizer) for ids in tokens_RN.tolist()]

    def scores(self, samples: Samples, ids_RS: Tensor, mask_RS: Tensor, tokens_RN: Tensor) -> Tensor:
        """Sum of the rewards of answers, (R,); override to combine them in another way.

        Args:
            samples: The prompts.
            ids_RS: Prompts with their answers.
            mask_RS: 0 for padding.
            tokens_RN: The answers.

        Raises:
            ValueError: If a score is not finite.
        """
        texts = self.texts(tokens_RN)
        total_R = torch.zeros(len(texts), device=tokens_RN.device)
        for reward in self.rewards:
            score_R = reward.score(ids_RS, mask_RS, samples.texts, texts, samples.rows).to(total_R)
            if not bool(score_R.isfinite().all()):
                row = int((~score_R.isfinite()).nonzero()[0])
                raise ValueError(f"{type(reward).__name__} gives the answer {texts[row][:60]!r} the score {float(score_R[row])}.")
            total_R += reward.weight * score_R
        return total_R

    def experience_of(self, samples: Samples, fields: Fields, version: int) -> Experience:
        """Samples with what `collect` gave for them."""
        mask_RN, ended_R = answer_mask(fields["tokens"], self._eos)
        return Experience(
            samples.ids, samples.mask, fields["tokens"], mask_RN, samples.index, fields["logp"], fields["score"], ended_R,
            reference_logp=fields.get("reference_logp"), value=fields.get("value"), version=version,
        )  # fmt: skip

    # Training

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One rollout, and the steps on it."""
        place, options = self.placement, self.rollout
        samples = samples_of(batch, options.samples_per_prompt)
        place.check(len(samples.ids), options.unit, options.minibatches)
        number, self.rollouts = self.rollouts, self.rollouts + 1
        self.eval()  # no dropout: ratios of the first step are exactly 1
        place.begin()
        learner = Learner(self)
        rows = len(samples.ids) // place.chunks
        chunks = [samples.select(list(range(chunk * rows, (chunk + 1) * rows))) for chunk in range(place.chunks)]
        arriving = place.stream(
            range(place.chunks),
            lambda chunk: self.collect(chunks[chunk], number),
            self._fields(options.max_new_tokens),
            rows,
        )
        while len(self.waiting) + (place.max_lag > 0) > place.max_lag:
            version, kept = self.rollouts - len(self.waiting), self.waiting.pop(0)
            learner.learn([kept[0]] if kept else [], iter([kept[1]] if kept else []), version, older=True)
        if place.max_lag:
            fields = list(arriving)
            whole = {name: torch.cat([part[name] for part in fields]) for name in fields[0]} if fields else None
            self.waiting.append(None if whole is None else (samples, whole))
        else:
            learner.learn(chunks, arriving, self.rollouts)
        self._log(learner.summary())

    @torch.no_grad()
    def average_actor(self) -> None:
        """Take a step of the actor into the average of its weights."""
        if not self.ema_decay or not self.placement.holds("actor"):
            return
        for name, weight in self.actor.named_parameters():
            if weight.requires_grad:
                self._ema[name].lerp_(weight.detach(), 1 - self.ema_decay)

    def _log(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name in ("score", "kl"))

    # Evaluation and answers

    def _move_frozen(self) -> None:
        """Bring reference and rewards to the device, and the reference to the actor's type."""
        types = {parameter.dtype for parameter in self.actor.parameters()}
        for reference in self._reference:
            reference.to(self.device, types.pop() if len(types) == 1 else None)
        for scorer in self._scorers:
            scorer.to(self.device)

    @override
    def on_fit_start(self) -> None:
        self._move_frozen()
        if self.ema_decay and not self._ema and self.placement.holds("actor"):
            trained = {name: weight for name, weight in self.actor.named_parameters() if weight.requires_grad}
            self._ema = {name: weight.detach().clone() for name, weight in trained.items()}

    @override
    def on_validation_start(self) -> None:
        self._move_frozen()
        self.placement.begin()

    @override
    def on_test_start(self) -> None:
        self._move_frozen()

    @override
    def on_predict_start(self) -> None:
        self._move_frozen()

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Score, KL, length and share of answers with an end, for drawn answers to held-out prompts."""
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Mapping[str, Any]) -> None:
        samples = samples_of(batch, 1)
        samples.index = batch["index"].to(samples.index)
        values = torch.zeros(len(samples.ids), len(_METRICS), dtype=torch.float64, device=self.device)
        if self.placement.infers:
            experience = self.experience_of(samples, self.collect(samples, -1), 0)
            kl_R = torch.zeros_like(experience.score)
            if experience.reference_logp is not None:
                kl_R = (experience.logp - experience.reference_logp).masked_fill(~experience.mask, 0).sum(1)
            columns = (experience.score, kl_R, experience.length, experience.ended)
            values = torch.stack([column.double() for column in columns], 1)
        values = self.placement.to_all(values, infers=True)
        weight_R = (batch["index"] >= 0).double().to(values.device)
        for name, column_R in zip(_METRICS, values.unbind(1), strict=True):
            metric = cast(Mean, self.metrics[name])
            metric.update(column_R, weight_R)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=len(weight_R))

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Answer the prompts and score the answers: ``index``, ``prompt``, ``text``, ``score`` for `JSONLWriter`."""
        if int(batch["index"][0]) < 0:
            return {"index": batch["index"][:0], "prompt": [], "text": [], "score": []}
        samples = samples_of(batch, 1)
        samples.index = batch["index"].to(samples.index)
        generation = self._generation()
        token_RN = self.engine.answers(self.actor.decodes(), samples, generation, self.random_seed, -1)
        score_R = self.scores(samples, *samples.with_answers(token_RN, self._eos), token_RN)
        return {"index": batch["index"], "prompt": samples.texts, "text": self.texts(token_RN), "score": score_R.tolist()}

    # Checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of rollouts, the coefficient of the KL, the reference and rollouts that wait for training."""
        super().on_save_checkpoint(checkpoint)
        waiting = [
            {"fields": fields, "ids": samples.ids, "mask": samples.mask, "index": samples.index}
            for samples, fields in filter(None, self.waiting)
        ]
        state = {"rollouts": self.rollouts, "kl": self.kl_controller.state_dict(), "waiting": waiting}
        state["ema"] = {name: self.placement.whole(value) for name, value in self._ema.items()}
        checkpoint["rlhf"] = {**state, "reference": self._reference_state}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` kept."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("rlhf")
        if state is None:
            return
        self.rollouts = state["rollouts"]
        self.kl_controller.load_state_dict(state["kl"])
        if self.placement.holds("actor"):
            weights = dict(self.actor.named_parameters())
            self._ema = {name: self.placement.part(value, weights[name]) for name, value in state["ema"].items()}
        self.waiting = []
        for kept in state["waiting"]:
            rows = len(kept["ids"])
            ids, mask, index = (kept[name].to(self.device) for name in ("ids", "mask", "index"))
            samples = Samples(ids, mask, index, [""] * rows, [{} for _ in range(rows)])
            fields = {name: value.to(self.device) for name, value in kept["fields"].items()}
            self.waiting.append((samples, fields) if self.placement.trains else None)
        if state["reference"]:
            if self._reference:
                self._reference[0].load_state_dict(state["reference"])
            if self._trainer is None or self.trainer.is_global_zero:
                self._reference_state = state["reference"]


def _check_numbers(max_grad_norm: float, ema_decay: float, ptx_weight: float) -> None:
    if max_grad_norm < 0 or ptx_weight < 0:
        raise ValueError(f"RLHF: max_grad_norm={max_grad_norm} and ptx_weight={ptx_weight} must not be negative; 0 is none.")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"RLHF: ema_decay={ema_decay} must be from 0 (no average) to below 1, such as 0.992.")
