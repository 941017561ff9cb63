"""BAHE: click prediction over long textual histories, with the lower half of the language model paid once."""

from zoo.bahe.aggregator import Aggregator
from zoo.bahe.atom_store import AtomStore
from zoo.bahe.baselines import IDClicks, TokenCTR
from zoo.bahe.click_rates import ClickRates
from zoo.bahe.flops import BlockSize
from zoo.bahe.history_clicks import ClickHead
from zoo.bahe.history_clicks import HistoryClicks as HistoryClicks
from zoo.bahe.module import BAHE
from zoo.bahe.refresh import AtomStoreRefresh

__all__ = [
    "BAHE",
    "Aggregator",
    "AtomStore",
    "AtomStoreRefresh",
    "BlockSize",
    "ClickHead",
    "ClickRates",
    "IDClicks",
    "TokenCTR",
]
