"""The room that language-model systems share: backbones, their tuning, generation and fine-tuning."""

from zoo.lm.backbone import Backbone
from zoo.lm.hf_backbone import HFBackbone
from zoo.lm.module import CausalLM, Seq2SeqLM
from zoo.lm.pooling import Pooling
from zoo.lm.preference import DPO
from zoo.lm.tuning import LoRA

__all__ = ["DPO", "Backbone", "CausalLM", "HFBackbone", "LoRA", "Pooling", "Seq2SeqLM"]
