"""KPOD: keypoint-based progressive chain-of-thought distillation (Feng et al., ICML 2024, arXiv 2405.16064)."""

from zoo.kpod.curriculum import InRationaleCurriculum
from zoo.kpod.module import KPOD
from zoo.kpod.schedule import ProgressiveSchedule
from zoo.kpod.weighter_module import TokenWeighter
from zoo.kpod.weights_writer import TokenWeightsWriter

__all__ = ["KPOD", "InRationaleCurriculum", "ProgressiveSchedule", "TokenWeighter", "TokenWeightsWriter"]
