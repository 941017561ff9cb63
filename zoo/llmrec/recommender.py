"""Base of models that score items for users by the product of two vectors: wiring only.

Shape suffixes: B examples, M items of a call, C candidates, N negatives, I items of the catalogue, S items seen, D width.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.llmrec.losses import Similarity, draw_negatives, in_batch_loss, score, softmax_loss
from zoo.metrics.item_table import ItemTable, Scope
from zoo.metrics.ranking import RankingMetrics
from zoo.module import ZooModule

__all__ = ["Loss", "Recommender"]

Loss = Literal["sampled_softmax", "in_batch", "full_domain"]


class Recommender(ZooModule):
    """The base: losses, full and sampled ranking, the best items of a user. A subclass gives the vectors.

    Batches and the catalogue are those of the DataModule Interactions. Validation and test log
    ``<stage>/<protocol>/<metric>@<k>/<domain>``, without the domain for all examples, and likewise for the groups ``tail`` and
    ``cold``; protocols are ``full-domain``, ``full-all`` and, where the data draw candidates, ``sampled-<number>``. The table of
    items is computed once for each evaluation, divided among the processes, each of which ranks all users in its part.

    Args:
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the schedule, stepped each step.
        loss: Softmax over the target and items drawn of its domain (the paper's), the other targets of a batch, or all items of
            the domain.
        num_negatives: N of ``sampled_softmax``.
        exclude_history: Whether items of the history are no negatives; not of ``in_batch``.
        log_q: Whether ``in_batch`` takes the logarithm of an item's share of targets off its score.
        gather: Whether ``in_batch`` takes the targets of all processes.
        similarity: See `zoo.llmrec.losses.score`.
        temperature: Divides scores.
        ks: Places up to which metrics count.
        scopes: Candidates of full ranking: items of the target's ``domain``, or ``all``.
        exclude_seen: Whether items that a user has are no candidates; not where people buy again.
        item_batch_size: Items encoded at a time.
        top_k: Number of items that ``predict`` gives.
        recommend_domain: Domain that they are taken from; None: that which the data ask for, or all.
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
        scopes: tuple[Scope, ...] = ("domain",),
        exclude_seen: bool = False,
        item_batch_size: int = 256,
        top_k: int = 10,
        recommend_domain: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, compile=compile)
        if num_negatives < 0 or not temperature > 0 or item_batch_size < 1 or top_k < 1 or not ks or min(ks) < 1:
            raise ValueError(
                f"{type(self).__name__}: num_negatives={num_negatives} must not be negative, temperature={temperature} positive,"
                f" item_batch_size={item_batch_size}, top_k={top_k} and all of ks={ks} at least 1."
            )
        if loss not in get_args(Loss) or not set(scopes) <= set(get_args(Scope)):
            raise ValueError(
                f"{type(self).__name__}: loss={loss!r} must be one of {', '.join(get_args(Loss))}, and scopes={list(scopes)} of"
                f" {', '.join(get_args(Scope))}."
            )
        if gather and loss != "in_batch":
            raise ValueError(f"{type(self).__name__}: gather=true takes the targets of all processes: set loss to in_batch.")
        self.loss, self.num_negatives, self.exclude_history, self.log_q, self.gather = (
            loss, num_negatives, exclude_history, log_q, gather,
        )  # fmt: skip
        self.similarity: Similarity = similarity
        self.temperature = temperature
        self.ks, self.scopes, self.exclude_seen = tuple(ks), tuple(scopes), exclude_seen
        self.item_batch_size, self.top_k, self.recommend_domain = item_batch_size, top_k, recommend_domain
        self.rankings: Any = nn.ModuleDict()
        self._table: ItemTable | None = None

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

    def _left_out(self, item_BC: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Marks items that are no negatives: cold ones, and, if asked for, those of the history."""
        left_out_BC = self.catalogue.is_cold.to(item_BC.device)[item_BC.clamp(min=0)]
        if self.exclude_history:
            left_out_BC |= (item_BC[..., None] == batch["history"][:, None]).any(-1)
        return left_out_BC

    def _sampled(self, user_BD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        random = SampleRandom(self.random_seed, batch["index"], epoch=self.trainer.current_epoch)
        negative_BN = draw_negatives(random, *self._bounds(batch["domain"]), self.num_negatives)
        negative_BN = negative_BN.masked_fill(self._left_out(negative_BN, batch), -1)
        candidate_BC = torch.cat([batch["target"][:, None], negative_BN], 1)
        return softmax_loss(self._score(user_BD, self.candidates(candidate_BC.clamp(min=0))), candidate_BC, batch["target"])

    def candidates(self, number_BC: Tensor) -> Tensor:
        """Vectors (B, C, D) of items, of which each distinct one is computed once."""
        distinct_M, place_BC = number_BC.unique(return_inverse=True)
        return F.embedding(place_BC, self.items(distinct_M))  # unlike indexing, its gradient is summed in one order

    def _in_batch(self, user_BD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        target_B, domain_B = batch["target"], batch["domain"]
        distinct_C, place_B = target_B.unique(return_inverse=True)
        item_CD = self.items(distinct_C)
        if self.gather and self.trainer.world_size > 1:
            distinct_C = everywhere(target_B, -1)
            missing = len(distinct_C) // self.trainer.world_size - len(target_B)  # in a last batch that is shorter here
            item_BD = F.pad(item_CD[place_B], (0, 0, 0, missing))
            item_CD = cast(Tensor, self.all_gather(item_BD, sync_grads=True)).flatten(0, 1)
            is_first_C = (distinct_C[:, None] == distinct_C).int().argmax(1) == torch.arange(len(distinct_C), device=self.device)
            is_first_C &= distinct_C >= 0
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
            target_B = batch["target"][of_domain_B] - first
            row = {"history": batch["history"][of_domain_B]}
            left_out_BC = self._left_out(number_C.expand(len(target_B), size), row).scatter(1, target_B[:, None], False)
            score_BC = self._score(user_BD[of_domain_B], self.items(number_C)).masked_fill(left_out_BC, -torch.inf)
            total = total + F.cross_entropy(score_BC, target_B, reduction="sum")
        return total / len(user_BD)

    # Evaluation

    @override
    def setup(self, stage: str) -> None:
        """Make the metrics of the data's domains."""
        super().setup(stage)
        self._table = None
        if stage == "predict":
            return
        catalogue = self.catalogue
        sampled = getattr(self.trainer.datamodule, "eval_negatives", None)  # type: ignore[attr-defined]
        sizes = {"domain": catalogue.domain_offsets.diff().tolist(), "all": [len(catalogue.keys)]}
        protocols = {f"full-{scope}": sizes[scope] for scope in self.scopes}
        if sampled is not None:
            protocols[f"sampled-{sampled}"] = None
        for split in ("val", "test"):
            self.rankings[split] = nn.ModuleList(
                RankingMetrics(self.ks, catalogue.domains, ("tail", "cold"), protocol, num_candidates)
                for protocol, num_candidates in protocols.items()
            )

    @property
    def table(self) -> ItemTable:
        """Vectors of all items, divided among the processes."""
        if self._table is None:
            offsets = self.catalogue.domain_offsets
            share = -(-int(offsets[-1]) // self.trainer.world_size)
            mine = torch.arange(int(offsets[-1]), device=self.device).split(share)
            first = self.trainer.global_rank
            if len(mine) < self.trainer.world_size:
                raise ValueError(
                    f"{int(offsets[-1])} items cannot be divided among {self.trainer.world_size} processes: take fewer."
                )
            with torch.no_grad():
                vectors_ID = torch.cat([self._vectors(self.items(part)) for part in mine[first].split(self.item_batch_size)])
            group = dist.group.WORLD if self.trainer.world_size > 1 else None
            self._table = ItemTable(vectors_ID, offsets.diff().tolist(), group=group, first_row=first * share)
        return self._table

    def _vectors(self, x_MD: Tensor) -> Tensor:
        """Vectors whose product is the score but for the temperature, which changes no rank."""
        x_MD = x_MD.float()
        return F.normalize(x_MD, dim=-1) if self.similarity == "cosine" else x_MD

    @torch.no_grad()
    def _evaluate(self, split: str, batch: Mapping[str, Tensor]) -> None:
        count = len(batch["target"])
        user_BD, target_B = everywhere(self._vectors(self.users(batch)), 0), everywhere(batch["target"], 0)
        seen_BS = everywhere(batch["seen"], -1) if self.exclude_seen else None
        own = slice(self.trainer.global_rank * len(target_B) // self.trainer.world_size, None)
        counts_B = batch["index"] >= 0
        groups = {name: batch[f"is_{name}"][counts_B] for name in ("tail", "cold")}
        for metric in self.rankings[split]:
            if metric.protocol.startswith("full-"):
                rank_B = self.table.ranks(user_BD, target_B, scope=metric.protocol.removeprefix("full-"), seen_BS=seen_BS)
            else:
                rank_B = self.table.sampled_ranks(user_BD, target_B, everywhere(batch["candidates"], -1))
            metric.update(rank_B[own][:count][counts_B], batch["domain"][counts_B], groups)

    def _log_evaluation(self, split: str) -> None:
        for metric in self.rankings[split]:
            for name, value in metric.compute().items():
                self.log(f"{split}/{name}", value, prog_bar=name == f"{metric.protocol}/NDCG@{self.ks[-1]}", sync_dist=False)
            metric.reset()
        self._table = None

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """The best items of each user: ``index``, ``user``, and ``items``, ``titles`` and ``scores``, best first."""
        catalogue, table = self.catalogue, self.table
        user_BD, domain_B = everywhere(self._vectors(self.users(batch)), 0), batch["domain"]
        if self.recommend_domain is not None:
            if self.recommend_domain not in catalogue.domains:
                known = ", ".join(catalogue.domains)
                raise ValueError(f"recommend_domain={self.recommend_domain!r} is none of the data's: {known[:200]}.")
            domain_B = torch.full_like(domain_B, catalogue.domains.index(self.recommend_domain))
        domain_B = everywhere(domain_B, -1)
        seen_BS = everywhere(batch["seen"], -1) if self.exclude_seen else None
        item_BK = domain_B.new_full((len(domain_B), self.top_k), -1)
        score_BK = user_BD.new_zeros(item_BK.shape)
        for domain in domain_B.unique().tolist():
            of_B = (domain_B == domain).nonzero()[:, 0]
            seen = None if seen_BS is None else seen_BS[of_B]
            item_BK[of_B], score_BK[of_B] = table.top_k(
                user_BD[of_B], self.top_k, domain=None if domain < 0 else domain, seen_BS=seen
            )
        first = self.trainer.global_rank * len(domain_B) // self.trainer.world_size
        there = (batch["index"] >= 0).nonzero()[:, 0]
        found = [
            (row[row >= 0].tolist(), scores) for row, scores in zip(item_BK[first + there], score_BK[first + there], strict=True)
        ]
        return {
            "index": batch["index"][there],
            "user": [batch["user"][place] for place in there.tolist()],
            "items": [[catalogue.keys[item] for item in row] for row, _ in found],
            "titles": [[catalogue.titles[item] for item in row] for row, _ in found],
            "scores": [(scores[: len(row)] / self.temperature).tolist() for row, scores in found],
        }


def everywhere(values: Tensor, fill: float) -> Tensor:
    """Rows of all processes, one process after another, each filled up to the largest: (W B, ...)."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    largest = torch.tensor(values.shape, device=values.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    padded = values.new_full(largest.tolist(), fill)
    padded[tuple(slice(size) for size in values.shape)] = values
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)
