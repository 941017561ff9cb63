"""The order of the data is a pure function of (seed, epoch); ranks divide it, workers and resuming do not change it."""

import json
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweep import sweep
from torch.utils.data import DataLoader, Dataset

from datamodules.base.datamodule import ZooDataModule
from datamodules.base.loader import EpochOrder, ResumableLoader
from datamodules.images.in_memory import LabelledImages


class Places(Dataset):
    """A data set whose samples are (index, epoch it was told)."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, self.epoch


def datamodule(batch_size=4, rank=0, world=1, epoch=0, **options) -> ZooDataModule:
    module = ZooDataModule(batch_size=batch_size, **options)
    module.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": world, "rank": rank},
        current_epoch=epoch,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return module


def batches(loader: ResumableLoader) -> list[list[int]]:
    return [indices.tolist() for indices, _ in loader]


@given(length=st.integers(1, 60), world=st.integers(1, 4), batch_size=st.integers(1, 5), epoch=st.integers(0, 3))
def test_ranks_see_the_global_batches_of_one_process(length, world, batch_size, epoch):
    if length < world * batch_size:
        with pytest.raises(ValueError, match="lower batch_size"):
            datamodule(batch_size, 0, world).train_loader(Places(length))
        return
    ranks = [batches(datamodule(batch_size, rank, world, epoch).train_loader(Places(length))) for rank in range(world)]
    one = batches(datamodule(batch_size * world, epoch=epoch).train_loader(Places(length)))
    interleaved = [[index for column in zip(*parts, strict=True) for index in column] for parts in zip(*ranks, strict=True)]
    assert interleaved == one
    seen = [index for batch in one for index in batch]
    assert len(set(seen)) == len(seen) == length - length % (batch_size * world)


@given(length=st.integers(1, 200), world=st.integers(1, 5), batch_size=st.integers(11, 70))
def test_evaluation_gives_every_sample_to_one_rank_and_each_rank_as_many_batches(length, world, batch_size):
    if length < world:
        with pytest.raises(ValueError, match=f"at most {length} device"):
            datamodule(batch_size, 0, world).eval_loader(Places(length))
        return
    ranks = [batches(datamodule(batch_size, rank, world).eval_loader(Places(length))) for rank in range(world)]
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(length))
    assert len({len(rank) for rank in ranks}) == 1
    assert all(0 < len(batch) <= batch_size for rank in ranks for batch in rank)
    assert all(batch == sorted(batch) for rank in ranks for batch in rank)


class Blanks(Places):
    """A data set that can make batches in which nothing counts: (None, None)."""

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, None]:
        return torch.tensor(indices), None

    def blank(self) -> tuple[torch.Tensor, None]:
        return torch.tensor([-1]), None


@given(length=st.integers(1, 60), world=st.integers(1, 8), batch_size=st.integers(1, 7))
def test_a_rank_that_lacks_a_batch_gets_one_in_which_nothing_counts(length, world, batch_size):
    loaders = [datamodule(batch_size, rank, world).eval_loader(Blanks(length)) for rank in range(world)]
    ranks = [batches(loader) for loader in loaders]
    most = math.ceil(math.ceil(length / world) / batch_size)
    assert {len(rank) for rank in ranks} == {len(loader) for loader in loaders} == {most}
    assert sorted(index for rank in ranks for batch in rank for index in batch if index >= 0) == list(range(length))
    blank = [batch for rank in ranks for batch in rank if -1 in batch]
    assert all(batch == [-1] for batch in blank), "it is a batch of its own"
    assert all([-1] not in rank[:-1] for rank in ranks)


def test_seeds_and_epochs_give_unrelated_orders():
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            order = EpochOrder(range(50), train=True, seed=seed)
            order.set_epoch(epoch)
            orders[seed, epoch] = tuple(order)
            assert list(order) == list(orders[seed, epoch])
    assert len(set(orders.values())) == 9


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_set_after_iter_counts_and_reaches_the_data_in_the_workers(num_workers):
    loader = ZooDataModule(4, num_workers).train_loader(Places(12))
    passing = iter(loader)
    loader.sampler.set_epoch(3)
    seen = list(passing)
    order = EpochOrder(range(12), train=True)
    order.set_epoch(3)
    assert [index for indices, _ in seen for index in indices.tolist()] == list(order)
    assert all((epochs == 3).all() for _, epochs in seen)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", sweep([0, 2, 5], quick=(0, 1)))
def test_a_position_holds_for_its_epoch_and_any_number_of_workers(num_workers, done):
    whole, first = ZooDataModule(4).train_loader(Places(22)), ZooDataModule(4).train_loader(Places(22))
    whole.sampler.set_epoch(1)
    first.sampler.set_epoch(1)
    expected = batches(whole)
    passing = iter(first)
    for _ in range(done):
        next(passing)
    state = json.loads(json.dumps(first.state_dict()))

    second = ZooDataModule(4, num_workers).train_loader(Places(22))
    second.load_state_dict(state)
    iter(second)  # Lightning does, before it sets the epoch
    assert second.state_dict() == state
    second.sampler.set_epoch(1)
    assert batches(second) == expected[done:]
    assert batches(second) == expected, "a position is used once"

    third = ZooDataModule(4, num_workers).train_loader(Places(22))
    third.load_state_dict(state)
    third.sampler.set_epoch(2)
    whole.sampler.set_epoch(2)
    assert batches(third) == batches(whole), "a position does not leak into another epoch"


@pytest.mark.parametrize(("world", "batch_size"), [(1, 8), (4, 2), (2, 4), (1, 4)])
def test_the_position_of_rank_0_serves_every_rank_and_another_number_of_ranks(world, batch_size):
    loader = datamodule(4, 0, 2).train_loader(Places(50))
    passing = iter(loader)
    one = [index for batch in batches(datamodule(1).train_loader(Places(50))) for index in batch]
    next(passing), next(passing)
    ranks = []
    for rank in range(world):
        resumed = datamodule(batch_size, rank, world).train_loader(Places(50))
        resumed.load_state_dict(loader.state_dict())
        ranks.append([index for batch in batches(resumed) for index in batch])
    interleaved = [index for column in zip(*ranks, strict=True) for index in column]
    assert interleaved == one[16 : 16 + len(interleaved)]
    assert len(interleaved) == 32


def test_a_position_that_does_not_fit_is_refused():
    loader = ZooDataModule(4).train_loader(Places(22))
    for _ in zip(range(3), loader, strict=False):
        state = loader.state_dict()
    assert state == {"epoch": 0, "samples": 12, "length": 22}
    with pytest.raises(ValueError, match="epoch over 22 samples, this run's training set has 30"):
        ZooDataModule(4).train_loader(Places(30)).load_state_dict(state)
    with pytest.raises(ValueError, match="12 samples of epoch 0, which is no whole number of global batches of 5"):
        ZooDataModule(5).train_loader(Places(22)).load_state_dict(state)
    with pytest.raises(ValueError, match="another kind of loader"):
        loader.load_state_dict({"_num_yielded": 3})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(num_workers):
    state = torch.get_rng_state()
    batches(ZooDataModule(4, num_workers).train_loader(Places(12)))
    assert torch.equal(torch.get_rng_state(), state)


def flipped_epochs(num_workers: int) -> torch.Tensor:
    images = torch.arange(2, dtype=torch.uint8).expand(40, 1, 1, 2)
    loader = ZooDataModule(8, num_workers).train_loader(LabelledImages(images, torch.arange(40), flip_seed=0))
    flips = torch.zeros(12, 40)
    for epoch in range(12):
        loader.sampler.set_epoch(epoch)
        for image, label in loader:
            flips[epoch, label] = image[:, 0, 0, 0] * 255
    return flips


def test_augmentation_is_a_function_of_seed_epoch_and_index_with_any_number_of_workers():
    flips = flipped_epochs(0)
    assert torch.equal(flips, flipped_epochs(2))
    assert 0.4 < flips.mean() < 0.6
    assert (flips.std(dim=0) > 0).all(), "every image is mirrored in some epochs and not in others"


def test_a_data_set_that_makes_whole_batches_gives_what_stacked_samples_give():
    data = LabelledImages(torch.arange(96, dtype=torch.uint8).reshape(6, 1, 4, 4), torch.arange(6), flip_seed=1)
    whole = list(ZooDataModule(4).eval_loader(data))
    stacked = list(DataLoader(data, 4))
    assert all(torch.equal(a, b) for one, two in zip(whole, stacked, strict=True) for a, b in zip(one, two, strict=True))


class Shown(L.LightningModule):
    """Records what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.shown: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.shown.append(batch[0].tolist())
        return self.layer(batch[0].float().unsqueeze(1)).mean()

    def test_step(self, batch, batch_idx):
        self.shown.append(batch[0].tolist())

    def predict_step(self, batch, batch_idx):
        return batch[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class PlaceData(ZooDataModule):
    def train_dataloader(self):
        return self.train_loader(Places(13))

    def test_dataloader(self):
        return self.eval_loader(Places(13))

    predict_dataloader = test_dataloader


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_lightning_keeps_the_loader_in_every_stage(strategy, tmp_path):
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, data = Shown(), PlaceData(4)
    trainer.fit(module, datamodule=data)
    assert isinstance(trainer.train_dataloader, ResumableLoader)
    assert isinstance(trainer.train_dataloader.sampler, EpochOrder)
    order = EpochOrder(range(13), train=True)
    expected = list(order)[:12]
    order.set_epoch(1)
    assert [index for batch in module.shown for index in batch] == expected + list(order)[:12]
    in_order = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    module.shown.clear()
    trainer.test(module, datamodule=data)
    assert module.shown == in_order
    assert [batch.tolist() for batch in trainer.predict(module, datamodule=data)] == in_order


def test_overfit_batches_repeats_the_first_batches(tmp_path):
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        overfit_batches=2,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Shown()
    trainer.fit(module, datamodule=PlaceData(4))
    assert module.shown == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
