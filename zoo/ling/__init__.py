"""Ling: fine-grained mixture-of-experts language models."""

from zoo.ling.backbone import LingBackbone
from zoo.ling.cache import KVCache
from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.config import LingConfig, RopeScaling, preset
from zoo.ling.engine import Completion, Engine
from zoo.ling.experts import Experts
from zoo.ling.head import Head, normalized_weight
from zoo.ling.module import Ling
from zoo.ling.network import LingOutput
from zoo.ling.norm import RMSNorm
from zoo.ling.preference import LingDPO
from zoo.ling.rope import RotaryEmbedding
from zoo.ling.router import Router, Routing, balance_loss, z_loss
from zoo.ling.router_monitor import RouterMonitor
from zoo.ling.scaling_law import compute_of, optimal
from zoo.ling.schedule import WSD, Annealing
from zoo.ling.state_dict_adapter import load_hf, read_hf_config, save_hf
from zoo.lm.cross_entropy import cross_entropy
from zoo.lm.dpo_loss import DPOLoss, dpo_loss, sequence_logps, token_losses
from zoo.lm.generation import Generation, generate, stream
from zoo.lm.token_choice import TokenChoice

__all__ = [
    "WSD",
    "Annealing",
    "Completion",
    "DPOLoss",
    "Engine",
    "Experts",
    "Generation",
    "Head",
    "KVCache",
    "Ling",
    "LingBackbone",
    "LingConfig",
    "LingDPO",
    "LingForCausalLM",
    "LingOutput",
    "RMSNorm",
    "RopeScaling",
    "RotaryEmbedding",
    "Router",
    "RouterMonitor",
    "Routing",
    "TokenChoice",
    "balance_loss",
    "compute_of",
    "cross_entropy",
    "dpo_loss",
    "generate",
    "load_hf",
    "normalized_weight",
    "optimal",
    "preset",
    "read_hf_config",
    "register",
    "save_hf",
    "sequence_logps",
    "stream",
    "token_losses",
    "z_loss",
]


def register() -> None:
    """Make ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM`` and ``AutoModelForSequenceClassification`` of transformers
    know released folders, without remote code. Not done on import, because importing the library's models takes seconds; see
    `zoo.ling.transformers_model`.
    """
    from zoo.ling import transformers_model

    transformers_model.register()
