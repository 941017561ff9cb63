"""Lightning DataModules by kind of data."""

from datamodules.base.datamodule import ZooDataModule as ZooDataModule
from datamodules.clicks.click_table import ClickBatch as ClickBatch
from datamodules.clicks.clicks import ClickData as ClickData
from datamodules.clicks.criteo import Criteo
from datamodules.clicks.flights import Flights
from datamodules.conversations.preferences import Preferences
from datamodules.conversations.rated_snippets import RatedSnippets
from datamodules.conversations.rationales import Rationales
from datamodules.conversations.rollout_prompts import RolloutPrompts
from datamodules.conversations.sft import SFT
from datamodules.conversations.sft import ConversationData as ConversationData
from datamodules.conversations.tool_dialogues import ToolDialogues
from datamodules.images.folders import ImageFolder, ImageNet
from datamodules.images.in_memory import CIFAR10, MNIST, Digits, FashionMNIST
from datamodules.images.in_memory import ImageDataModule as ImageDataModule
from datamodules.images.latents import CachedLatents
from datamodules.interactions.interaction_rows import InteractionBatch as InteractionBatch
from datamodules.interactions.interactions import Interactions
from datamodules.tasks.task_sets import TaskBatch as TaskBatch
from datamodules.tasks.tasks import Tasks
from datamodules.text.characters import CharacterText as CharacterText
from datamodules.text.characters import Shakespeare, Text8
from datamodules.text.text import LanguageData as LanguageData
from datamodules.text.text import Text
from datamodules.text.tokenizer import ByteTokenizer as ByteTokenizer
from datamodules.text.tokenizer import load_tokenizer as load_tokenizer
from datamodules.text_histories.history_rows import TextHistoryBatch as TextHistoryBatch
from datamodules.text_histories.text_histories import TextHistories

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
    "Interactions",
    "Preferences",
    "RatedSnippets",
    "Rationales",
    "RolloutPrompts",
    "Shakespeare",
    "Tasks",
    "Text",
    "Text8",
    "TextHistories",
    "ToolDialogues",
]
