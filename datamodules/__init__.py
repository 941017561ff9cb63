"""Lightning DataModules by kind of data."""

from datamodules.datamodule import ZooDataModule as ZooDataModule
from datamodules.image_folder import ImageFolder, ImageNet
from datamodules.images import CIFAR10, MNIST, Digits, FashionMNIST
from datamodules.images import ImageDataModule as ImageDataModule
from datamodules.latents import CachedLatents
from datamodules.text import CharacterText as CharacterText
from datamodules.text import Shakespeare, Text8

__all__ = [
    "CIFAR10",
    "MNIST",
    "CachedLatents",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "ImageNet",
    "Shakespeare",
    "Text8",
]
