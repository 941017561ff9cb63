"""Reinforcement learning from human feedback: reward models, PPO and algorithms without a critic."""

from zoo.rlhf.algorithm import GRPO, PPO, RLOO, Algorithm, DrGRPO, Importance, KLPenalty, ReinforcePP, Targets
from zoo.rlhf.conventions import CONVENTIONS, Convention, ConventionName, Whitening, find_convention
from zoo.rlhf.experience import Experience, answer_mask
from zoo.rlhf.module import RLHF
from zoo.rlhf.ppo import KLCoefficient, kl_sums
from zoo.rlhf.reward_model import RewardModel
from zoo.rlhf.rewards import Reward, TrainedReward, Verifier
from zoo.rlhf.rollout import Rollout, RolloutEngine

__all__ = [
    "CONVENTIONS",
    "GRPO",
    "PPO",
    "RLHF",
    "RLOO",
    "Algorithm",
    "Convention",
    "ConventionName",
    "DrGRPO",
    "Experience",
    "Importance",
    "KLCoefficient",
    "KLPenalty",
    "ReinforcePP",
    "Reward",
    "RewardModel",
    "Rollout",
    "RolloutEngine",
    "Targets",
    "TrainedReward",
    "Verifier",
    "Whitening",
    "answer_mask",
    "find_convention",
    "kl_sums",
]
