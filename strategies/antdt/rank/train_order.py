"""The order in which an epoch's samples are handed out, from the training DataLoader and what the user asked for."""

from typing import Any, Literal

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from strategies.antdt.rank.loader import SamplerOrder, SupportsRange
from strategies.antdt.sharding.order import SampleOrder

__all__ = ["Shuffle", "train_order"]

Shuffle = Literal["auto", "global", "shard", "none"]


def train_order(
    strategy: str, loader: DataLoader[Any], seed: int, shuffle: Shuffle | None = None, shard: int = 1
) -> tuple[SampleOrder | SamplerOrder, dict[str, Any]]:
    """The order of samples, and the data set's identity for the service.

    Args:
        strategy: its name, for messages.
        loader: of the training data; its data set and sampler are looked at.
        seed: of an order at random.
        shuffle: what the user has chosen, see `AntDTStrategy`; None: there is no choice, as with ``auto``.
        shard: samples of a block of ``shuffle="shard"``.

    Returns:
        The order, and the fields ``name``, ``n``, ``seed``, ``shuffle`` and ``shard`` of `DatasetSpec`.

    Raises:
        TypeError: a data set without numbers of samples or ranges of them.
        ValueError: the sampler chooses in a way of its own, ranges are to be shuffled, or there are no samples.
    """
    choice = "" if shuffle is None else ", or set shuffle to global, shard or none"
    dataset: Any = loader.dataset
    name = type(getattr(dataset, "dataset", dataset)).__name__
    if isinstance(dataset, IterableDataset):
        if not isinstance(dataset, SupportsRange):
            raise TypeError(
                f"{strategy} hands out samples by number, which {name} (an IterableDataset) does not have: use a map-style"
                " data set, or give it __len__() and __getrange__(lo, hi), which yields the samples lo to hi - 1."
            )
        if shuffle not in ("auto", "none", None):
            raise ValueError(f"{strategy}: shuffle={shuffle} needs single samples, {name} gives ranges: use none.")
        chosen = "none"
    else:
        sampler: Any = loader.sampler
        if loader.batch_size is None and loader.batch_sampler is not None:  # of the user's own
            batches = loader.batch_sampler
            sampler = batches.sampler if type(batches) is BatchSampler else batches
        if shuffle in ("auto", None) and hasattr(sampler, "order"):
            length = int(getattr(sampler, "length", len(dataset)))
            own = int(getattr(sampler, "seed", seed))
            return SamplerOrder(sampler), {"name": name, "n": length, "seed": own, "shuffle": "sampler", "shard": 1}
        if shuffle in ("auto", None):
            whole = type(sampler) is DistributedSampler or (
                type(sampler) in (RandomSampler, SequentialSampler) and len(sampler) == len(dataset)
            )
            if not whole or getattr(sampler, "replacement", False):
                raise ValueError(
                    f"{strategy}: {type(sampler).__name__} chooses samples in its own way, which would be lost: give it a"
                    f" method order(epoch) with the sample indices of an epoch{choice}."
                )
        fixed = isinstance(sampler, SequentialSampler) or not getattr(sampler, "shuffle", True)
        chosen = shuffle if shuffle not in ("auto", None) else "none" if fixed else "global"
    count = len(dataset)
    if count < 1:
        raise ValueError(f"{strategy}: the training set {name} is empty.")
    order = SampleOrder(count, seed, chosen, shard)  # type: ignore[arg-type]
    return order, {"name": name, "n": count, "seed": seed, "shuffle": chosen, "shard": shard}
