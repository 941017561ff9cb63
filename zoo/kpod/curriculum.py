"""The curriculum inside rationales: their last steps are learned first.

Shape suffixes: B examples, S places of a row, N training examples, E width of the question's vector.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from zoo.kpod.clusters import kmeans, mean_word_vectors
from zoo.kpod.difficulty import Difficulties, step_difficulties
from zoo.kpod.module import KPOD
from zoo.kpod.schedule import Init, ProgressiveSchedule, Schedule
from zoo.lm.backbone import Backbone
from zoo.lm.cross_entropy import IGNORED

__all__ = ["InRationaleCurriculum"]


class InRationaleCurriculum(Callback):
    """Gives the first steps of rationales to a `KPOD`, fewer in each epoch, and none after ``stages`` epochs.

    Before the first step the student as it is reads all training examples once; difficulties of their steps and clusters of
    their questions decide which get harder at each stage. The table is part of checkpoints, so that a continued run has the same.
    It is drawn in ``schedule.png`` of the run's folder, with its numbers in ``schedule.json``.

    Args:
        stages: T, epochs over which steps are given.
        p: As of `ProgressiveSchedule`.
        c0: As of `ProgressiveSchedule`.
        beta: As of `ProgressiveSchedule`.
        clusters: Number of clusters of questions.
        delta_s: As of `ProgressiveSchedule`.
        init: As of `ProgressiveSchedule`.
        difficulty_weights: Whether weights of tokens count in the difficulties.
        embedder: Vectors of questions: a model such as MiniLM, which reads them, or a file of GloVe vectors; None: means of the
            student's input embedding.

    Raises:
        ValueError: If there are more stages than epochs, or a checkpoint has the table of other data.
    """

    def __init__(
        self,
        stages: int,
        p: float = 0.5,
        c0: float = 0.3,
        beta: float = 12.0,
        clusters: int = 5,
        delta_s: int | Literal["auto"] = 1,
        init: Init = "greedy",
        difficulty_weights: bool = True,
        embedder: Backbone | Path | None = None,
    ) -> None:
        self.schedule = ProgressiveSchedule(stages, p, c0, beta, delta_s, init)
        self.clusters, self.difficulty_weights, self.embedder = clusters, difficulty_weights, embedder
        #: Leading steps given at each stage, int16 (T + 1, N).
        self.given: Tensor | None = None
        self._stage: int | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, KPOD) or not hasattr(trainer.datamodule, "ordered_train_dataloader"):  # type: ignore[attr-defined]
            raise ValueError("InRationaleCurriculum needs the module KPOD and the DataModule Rationales.")
        epochs = trainer.max_epochs
        if epochs is not None and 0 <= epochs < self.schedule.stages:
            raise ValueError(
                f"InRationaleCurriculum: stages={self.schedule.stages} are more than trainer.max_epochs={epochs}: the first steps"
                " of rationales would never be learned; lower stages."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, KPOD)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.given is None:
            difficulties, vectors_NE = self._read(trainer, pl_module, data)
            labels = torch.zeros(len(vectors_NE), dtype=torch.int64)
            if self.clusters > 1:
                labels = kmeans(vectors_NE, self.clusters, seed=pl_module.random_seed)
            plan = self.schedule.plan(difficulties, labels)
            self.given = trainer.strategy.broadcast(plan.given)
            if trainer.is_global_zero:
                self._write(plan, Path(trainer.default_root_dir))
        if self.given.shape[1] != len(data.train_questions):
            raise ValueError(
                f"InRationaleCurriculum: the checkpoint has a table of {self.given.shape[1]} examples, the data"
                f" {len(data.train_questions)}: continue with the data of the run, or begin another."
            )
        self._stage = None

    @torch.no_grad()
    def _read(self, trainer: Trainer, module: KPOD, data: Any) -> tuple[Difficulties, Tensor]:
        """Difficulties of all steps and vectors of all questions, by the student as it is."""
        found: dict[int, tuple[list[float], list[float]]] = {}
        was_training = module.training
        module.eval()
        for batch in data.ordered_train_dataloader():
            weights_BS = None
            if self.difficulty_weights and module._weights is not None and int(batch["index"][0]) >= 0:
                weights_BS = module._weights.lookup(batch["index"], batch["step_ids"])
            batch = {name: value.to(module.device) for name, value in batch.items() if isinstance(value, Tensor)}
            losses_BS = torch.nn.functional.pad(_in_rows(module, batch), (1, 0))
            asked_BS = (batch["labels"] == IGNORED) & (batch["attention_mask"] > 0)
            vector_BSE = module.backbone.input_embedding(batch["input_ids"]).float() * asked_BS[..., None]
            vector_BE = (vector_BSE.sum(1) / asked_BS.sum(1, keepdim=True).clamp(min=1)).tolist()
            steps = [] if int(batch["index"][0]) < 0 else step_difficulties(losses_BS, batch["step_ids"], weights_BS)
            for index, row, vector in zip(batch["index"].tolist(), steps, vector_BE, strict=False):
                found[index] = (row.tolist(), vector)
        module.train(was_training)
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, found)
            found = {index: value for part in parts for index, value in part.items()}
        rows = [found[index] for index in range(len(found))]
        vectors_NE = torch.tensor([vector for _, vector in rows], dtype=torch.float64)
        if isinstance(self.embedder, Backbone):
            vectors_NE = self._encoded(data.train_questions, self.embedder.to(module.device))
        elif self.embedder is not None:
            vectors_NE = mean_word_vectors(data.train_questions, self.embedder)
        return Difficulties.of_rows([row for row, _ in rows]), vectors_NE

    @staticmethod
    def _encoded(questions: list[str], embedder: Backbone) -> Tensor:
        parts = []
        for begin in range(0, len(questions), 32):
            batch = embedder.tokenizer(questions[begin : begin + 32], return_tensors="pt", padding=True, truncation=True)
            device = next(embedder.parameters()).device
            parts.append(embedder.pooled(batch["input_ids"].to(device), batch["attention_mask"].to(device)).double().cpu())
        return torch.cat(parts)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        stage = trainer.current_epoch + 1
        if stage == self._stage:
            return
        assert isinstance(pl_module, KPOD) and self.given is not None
        self._stage = stage
        row = self.given[stage] if stage < len(self.given) else torch.zeros_like(self.given[0])
        pl_module.given_steps = row.long()
        pl_module.log("train/given_steps", float(row.float().mean()))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, KPOD)
        pl_module.given_steps = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.given is None else {"given": self.given}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.given = state_dict.get("given")

    def _write(self, plan: Schedule, folder: Path) -> None:
        """Say, draw and write the schedule."""
        rank_zero_info(
            f"InRationaleCurriculum: {plan.given.shape[1]:,} rationales, {len(plan.given) - 1} stages;"
            f" {plan.steps_left} steps are given until after the last one."
        )
        folder.mkdir(parents=True, exist_ok=True)
        mean = plan.given.float().mean(1)
        numbers = {
            "budget": plan.budget.tolist(), "reached": plan.reached.tolist(), "total": float(plan.total),
            "mean_given": mean.tolist(), "budget_term": plan.budget_term.tolist(), "diversity_term": plan.diversity_term.tolist(),
            "steps_left": plan.steps_left,
        }  # fmt: skip
        (folder / "schedule.json").write_text(json.dumps(numbers, indent=1))
        figure = Figure(figsize=(8, 3), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        left.plot(plan.budget / plan.total, label="budget D(t)")
        left.plot(plan.reached / plan.total, "o", label="reached H(t)")
        left.set(xlabel="stage", ylabel="share of all difficulty")
        left.legend()
        right.plot(mean, "o-")
        right.set(xlabel="stage", ylabel="mean number of given steps", ylim=(0, None))
        figure.savefig(folder / "schedule.png", dpi=110)


def _in_rows(module: KPOD, batch: dict[str, Tensor]) -> Tensor:
    """Losses of the tokens at their places in the rows of the batch but the first, (B, S - 1)."""
    loss_BU = module.token_losses(batch).loss_BT
    places_BS = batch["labels"][:, 1:] != IGNORED
    if module.backbone.kind == "causal":
        return loss_BU
    first_BU = torch.arange(loss_BU.shape[1], device=loss_BU.device) < places_BS.sum(1, keepdim=True)
    return loss_BU.new_zeros(places_BS.shape).masked_scatter(places_BS, loss_BU[first_BU])
