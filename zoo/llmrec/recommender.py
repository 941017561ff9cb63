"""Base of models that score items for users by the product of two vectors: wiring only.

Shape suffixes: B examples, M items of a call, C candidates, N negatives, I items of the catalogue, S items seen, D width.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.llmrec.losses import Similarity, draw_negatives, in_batch_loss, score, softmax_loss
from zoo.metrics.mean_and_error import Mean
from zoo.metrics.ranking import RankingMetrics, full_ranks, sampled_ranks, top_items
from zoo.module import ZooModule

__all__ = ["Loss", "Recommender"]

Loss = Literal["sampled_softmax", "in_batch", "full_domain"]


class Recommender(ZooModule):
    """The base: losses, full and sampled ranking, the best items of a user. A subclass gives the vectors.

    Batches and the catalogue are those of the DataModule Interactions. Validation and test log
    ``<stage>/<protocol>/<metric>@<k>/<domain>``, the mean over all examples without the domain, and rows of the groups ``tail``
    and ``cold``; the table of items is computed once for each, divided among the processes.

    Args:
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the schedule, stepped each step.
        loss: Softmax over the target and items drawn of its domain (the paper's), the other targets of a batch, or all items of
            the domain.
        num_negatives: N of ``sampled_softmax``.
        exclude_history: Whether items of the history are no negatives.
        log_q: Whether ``in_batch`` takes the logarithm of an item's share of targets off its score.
        gather: Whether ``in_batch`` takes the targets of all processes.
        similarity: See `zoo.llmrec.losses.score`.
        temperature: Divides scores.
        ks: Places up to which metrics count.
        scopes: Candidates of full ranking: items of the target's ``domain``, or ``all``. The first names the log.
        exclude_seen: Whether items that a user has are no candidates; not where people buy again.
        item_batch_size: Items encoded at a time.
        top_k: Number of items that ``predict`` gives.
        compile: Compile the networks.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: Loss = "sampled_softmax",
        num_negatives: int = 10,
        exclude_history: bool = False,
        log_q: bool = False,
        gather: bool = False,
        similarity: Similarity = "dot",
        temperature: float = 1.0,
        ks: tuple[int, ...] = (1, 5, 10, 20),
        scopes: tuple[Literal["domain", "all"], ...] = ("domain",),
        exclude_seen: bool = False,
        item_batch_size: int = 256,
        top_k: int = 10,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, compile=compile)
        if num_negatives < 0 or not temperature > 0 or item_batch_size < 1 or top_k < 1 or not ks or min(ks) < 1:
            raise ValueError(
                f"{type(self).__name__}: num_negatives={num_negatives} must not be negative, temperature={temperature} be positive,"
                f" item_batch_size={item_batch_size}, top_k={top_k} and all of ks={ks} at least 1."
            )
        if gather and loss != "in_batch":
            raise ValueError(f"{type(self).__name__}: gather=true takes the targets of all processes: set loss to in_batch.")
        self.loss, self.num_negatives, self.exclude_history, self.log_q, self.gather = (
            loss, num_negatives, exclude_history, log_q, gather,
        )  # fmt: skip
        self.similarity: Similarity = similarity
        self.temperature = temperature
        self.ks, self.scopes, self.exclude_seen = tuple(ks), tuple(scopes), exclude_seen
        self.item_batch_size, self.top_k = item_batch_size, top_k
        self.losses: Any = nn.ModuleDict({"val": Mean(), "test": Mean()})
        self.rankings: Any = nn.ModuleDict()
        self._table: Tensor | None = None

    # Vectors

    def users(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Vectors (B, D) of histories."""
        raise NotImplementedError

    def items(self, number_M: Tensor) -> Tensor:
        """Vectors (M, D) of items of the catalogue."""
        raise NotImplementedError

    @property
    def catalogue(self) -> Any:
        """Items and domains of the data.

        Raises:
            ValueError: If the data have none.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "catalogue"):
            raise ValueError(f"{type(self).__name__} needs a catalogue of items, as the DataModule Interactions has one.")
        return data.catalogue  # type: ignore[union-attr]

    @torch.no_grad()
    def table(self) -> Tensor:
        """Vectors (I, D) of all items in float32, divided among the processes, then put together."""
        offsets = self.catalogue.domain_offsets
        count, world = int(offsets[-1]), self.trainer.world_size
        share = -(-count // world)
        first = min(count, self.trainer.global_rank * share)
        mine = torch.arange(first, min(count, first + share), device=self.device)
        parts = [self.items(part).float() for part in mine.split(self.item_batch_size) if len(part)]
        if world == 1:
            return torch.cat(parts)
        width = self.items(torch.zeros(1, dtype=torch.int64, device=self.device)).shape[-1]
        padded = torch.zeros(share, width, device=self.device)
        padded[: len(mine)] = torch.cat([padded[:0], *parts])
        gathered = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded)
        return torch.cat(gathered)[:count]

    # Training

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse batches of other data.

        Raises:
            ValueError: If they hold no histories.
        """
        if not isinstance(batch, Mapping) or "history" not in batch:
            raise ValueError(
                f"{type(self).__name__} needs batches with history, target and domain, as the DataModule Interactions gives them."
            )
        return batch

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        user_BD = self.users(batch)
        loss = {"sampled_softmax": self._sampled, "in_batch": self._in_batch, "full_domain": self._full_domain}[self.loss]
        value = loss(user_BD, batch)
        self.log("train/loss", value.detach(), prog_bar=True, batch_size=len(user_BD))
        return value

    def _score(self, user_BD: Tensor, item: Tensor) -> Tensor:
        return score(user_BD, item, self.similarity, self.temperature)

    def _bounds(self, domain_B: Tensor) -> tuple[Tensor, Tensor]:
        """Number of the first item, and of items, of domains."""
        offsets = self.catalogue.domain_offsets.to(domain_B.device)
        return offsets[domain_B], offsets[domain_B + 1] - offsets[domain_B]

    def _without_history(self, candidate_BC: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Candidates but the first, -1 in the place of items of the history if they are no negatives."""
        if not self.exclude_history:
            return candidate_BC
        known_BC = (candidate_BC[..., None] == batch["history"][:, None]).any(-1)
        known_BC[:, 0] = False
        return candidate_BC.masked_fill(known_BC, -1)

    def _sampled(self, user_BD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        random = SampleRandom(self.random_seed, batch["index"], epoch=self.trainer.current_epoch)
        negative_BN = draw_negatives(random, *self._bounds(batch["domain"]), self.num_negatives)
        candidate_BC = self._without_history(torch.cat([batch["target"][:, None], negative_BN], 1), batch)
        return softmax_loss(
            self._score(user_BD, self.candidates(candidate_BC.clamp(min=0))), candidate_BC, batch["target"]
        )

    def candidates(self, number_BC: Tensor) -> Tensor:
        """Vectors (B, C, D) of items, of which each distinct one is computed once."""
        distinct_M, place_BC = number_BC.unique(return_inverse=True)
        return self.items(distinct_M)[place_BC]

    def _in_batch(self, user_BD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        target_B, domain_B = batch["target"], batch["domain"]
        distinct_C, place_B = target_B.unique(return_inverse=True)
        item_CD = self.items(distinct_C)
        if self.gather and self.trainer.world_size > 1:
            item_CD = self.all_gather(item_CD[place_B], sync_grads=True).flatten(0, 1)
            distinct_C = self.all_gather(target_B).flatten()
            is_first_C = (distinct_C[:, None] == distinct_C).int().argmax(1) == torch.arange(len(distinct_C), device=self.device)
            distinct_C, item_CD = distinct_C[is_first_C], item_CD[is_first_C]
        offsets = self.catalogue.domain_offsets.to(self.device)
        domain_C = torch.searchsorted(offsets, distinct_C, right=True) - 1
        log_q_C = None
        if self.log_q:
            counts = self.catalogue.counts.to(self.device)
            log_q_C = (counts[distinct_C].clamp(min=1) / counts.sum()).log()
        return in_batch_loss(self._score(user_BD, item_CD), target_B, domain_B, distinct_C, domain_C, log_q_C)

    def _full_domain(self, user_BD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        total = user_BD.new_zeros(())
        for domain in batch["domain"].unique().tolist():
            of_domain_B = batch["domain"] == domain
            first, size = (int(bound) for bound in self._bounds(torch.tensor(domain)))
            number_C = torch.arange(first, first + size, device=self.device)
            score_BC = self._score(user_BD[of_domain_B], self.items(number_C))
            target_B = batch["target"][of_domain_B] - first
            total = total + nn.functional.cross_entropy(score_BC, target_B, reduction="sum")
        return total / len(user_BD)
