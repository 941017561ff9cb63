"""G-Meta: distributed meta learning for recommenders."""

from zoo.gmeta.adaptation import Adaptation, Variant
from zoo.gmeta.cluster_gate import ClusterGate
from zoo.gmeta.inner_loop import meta_loss, query_logits
from zoo.gmeta.module import GMeta
from zoo.gmeta.task_bias import task_bias
from zoo.gmeta.task_rows import TaskRows, task_rows

__all__ = ["Adaptation", "ClusterGate", "GMeta", "TaskRows", "Variant", "meta_loss", "query_logits", "task_bias", "task_rows"]
