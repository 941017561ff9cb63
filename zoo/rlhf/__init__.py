"""Reinforcement learning from human feedback: the mathematics of PPO and of algorithms without a critic."""

from zoo.rlhf.algorithm import GRPO, PPO, RLOO, Algorithm, DrGRPO, Importance, KLPenalty, ReinforcePP, Targets
from zoo.rlhf.conventions import CONVENTIONS, Convention, ConventionName, Whitening, find_convention
from zoo.rlhf.experience import Experience, answer_mask
from zoo.rlhf.ppo import AdaptiveKL, FixedKL, kl_sums

__all__ = [
    "CONVENTIONS",
    "GRPO",
    "PPO",
    "RLOO",
    "AdaptiveKL",
    "Algorithm",
    "Convention",
    "ConventionName",
    "DrGRPO",
    "Experience",
    "FixedKL",
    "Importance",
    "KLPenalty",
    "ReinforcePP",
    "Targets",
    "Whitening",
    "answer_mask",
    "find_convention",
    "kl_sums",
]
