"""Distillation of chains of thought with keypoint weights and a curriculum inside the rationale."""
