"""LLM-Rec: one language model recommends in every domain, from titles alone (Tang et al., TOIS 2025, arXiv 2310.14304)."""

from zoo.llmrec.item_index import ExportItemIndex
from zoo.llmrec.module import LLMRec
from zoo.llmrec.sasrec import Popularity, SASRec

__all__ = ["ExportItemIndex", "LLMRec", "Popularity", "SASRec"]
