"""The gate of CBML: a soft cluster of tasks decides how much of the shared starting point a task begins with.

Shape suffixes: S samples of support, X numbers of a sample, P = X + 1, C clusters, G gated numbers.
"""

import torch
from torch import Tensor, nn

__all__ = ["ClusterGate"]


class ClusterGate(nn.Module):
    """``phi_0 = g * theta``, ``g = sigmoid(W [p; c] + b)``: p describes the task, c is the mean of the clusters near it.

    ``p = mean over support of [x; y]``, ``c = sum_j w_j c_j``, ``w = softmax(-|p - c_j|^2 / tau)``.
    Source: idea of CBML (Song et al., CIKM 2021); its abstract gives no formulas, these are [derived].

    Args:
        num_features: X.
        num_gated: G.
        num_clusters: C.
        temperature: tau.
    """

    def __init__(self, num_features: int, num_gated: int, num_clusters: int = 8, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.clusters_CP = nn.Parameter(0.1 * torch.randn(num_clusters, num_features + 1))
        self.gate = nn.Linear(2 * (num_features + 1), num_gated)
        nn.init.constant_(self.gate.bias, 3.0)  # training begins near the shared starting point

    def forward(self, x_SX: Tensor, y_S: Tensor, mask_S: Tensor) -> Tensor:
        """Factors (G,) of the starting point of a task.

        Args:
            x_SX: What samples of support look like.
            y_S: Their labels.
            mask_S: Which samples there are.
        """
        weight_S1 = mask_S.to(x_SX.dtype)[:, None] / mask_S.sum().clamp(min=1)
        task_P = (torch.cat([x_SX, y_S.to(x_SX.dtype)[:, None]], dim=1) * weight_S1).sum(0)
        near_C = (-(self.clusters_CP - task_P).square().sum(1) / self.temperature).softmax(0)
        gate_G: Tensor = self.gate(torch.cat([task_P, near_C @ self.clusters_CP])).sigmoid()
        return gate_G
