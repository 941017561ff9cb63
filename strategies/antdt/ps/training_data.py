"""What a training ``DataLoader`` says about the samples of a run, that the data-sharding service hands out in its place."""

from typing import Any, Literal

from torch.utils.data import DataLoader, IterableDataset

from strategies.antdt.rank.train_order import train_order

__all__ = ["TrainingData"]


class TrainingData:
    """The samples of a run: how many, in which order, and how many of them a step takes.

    Args:
        source: the training loader.
        seed: of the order, where the loader's sampler has none.
        global_batch_size: samples of a step of all workers; None: the loader's batch size times the number of workers.
        world_size: W.
        on_drop: whether the samples of a dropped gradient are lost (``lose``) or given back (``requeue``).

    Attributes:
        loader: the training loader.
        order: which sample stands at a position.
        identity: ``{name, n, seed, shuffle, shard}``, see `DatasetSpec`.
        global_batch: samples of a step of all workers.

    Raises:
        TypeError: what is no DataLoader, or has samples without numbers.
        ValueError: the size of batches is not known, or too small; samples are to be given back that are being loaded; or the
            sampler chooses samples in a way of its own.
    """

    def __init__(
        self,
        source: object,
        seed: int,
        global_batch_size: int | None,
        world_size: int,
        on_drop: Literal["lose", "requeue"],
    ) -> None:
        name = "ParameterServerStrategy"
        if not isinstance(source, DataLoader):
            raise TypeError(f"{name} needs a torch DataLoader for training, got {type(source).__name__}.")
        dataset: Any = source.dataset
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{name} hands out samples by number, which {type(dataset).__name__} (an IterableDataset) does not have."
            )
        if source.batch_size is None and global_batch_size is None:
            raise ValueError(f"{name}: the training DataLoader makes batches in its own way: set global_batch_size.")
        self.global_batch = global_batch_size or (source.batch_size or 1) * world_size
        if self.global_batch < world_size:
            raise ValueError(f"{name}: global_batch_size={self.global_batch} gives not each of {world_size} workers a sample.")
        if on_drop == "requeue" and source.num_workers:
            raise ValueError(f"{name}: on_drop=requeue gives back what workers of the DataLoader are loading: set num_workers=0.")
        self.loader: DataLoader[Any] = source
        self._world_size = world_size
        self.order, self.identity = train_order(name, source, seed)

    def share(self, rank: int) -> int:
        """Samples of one worker's batch, as long as the controller has not said otherwise."""
        return self.global_batch // self._world_size + (rank < self.global_batch % self._world_size)
