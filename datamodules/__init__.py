"""Lightning DataModules by kind of data."""

from datamodules.chat import SFT
from datamodules.click_table import ClickBatch as ClickBatch
from datamodules.clicks import ClickData as ClickData
from datamodules.criteo import Criteo
from datamodules.datamodule import ZooDataModule as ZooDataModule
from datamodules.flights import Flights
from datamodules.image_folder import ImageFolder, ImageNet
from datamodules.images import CIFAR10, MNIST, Digits, FashionMNIST
from datamodules.images import ImageDataModule as ImageDataModule
from datamodules.language import LanguageData as LanguageData
from datamodules.language import Text
from datamodules.latents import CachedLatents
from datamodules.preferences import Preferences
from datamodules.text import CharacterText as CharacterText
from datamodules.text import Shakespeare, Text8
from datamodules.tokenizer import ByteTokenizer as ByteTokenizer
from datamodules.tokenizer import load_tokenizer as load_tokenizer

__all__ = [
    "CIFAR10",
    "MNIST",
    "SFT",
    "CachedLatents",
    "Criteo",
    "Digits",
    "FashionMNIST",
    "Flights",
    "ImageFolder",
    "ImageNet",
    "Preferences",
    "Shakespeare",
    "Text",
    "Text8",
]
