"""Lightning DataModules by kind of data."""

from datamodules.datamodule import ZooDataModule as ZooDataModule
from datamodules.images import CIFAR10, MNIST, Digits, FashionMNIST
from datamodules.images import ImageDataModule as ImageDataModule

__all__ = ["CIFAR10", "MNIST", "Digits", "FashionMNIST"]
