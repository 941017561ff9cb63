"""Lightning callbacks of the zoo."""

from zoo.callbacks.data_statistics import DataStatisticsWriter
from zoo.callbacks.ema import EMA
from zoo.callbacks.jsonl import JSONLWriter
from zoo.callbacks.picture_writers import ImageGridWriter, TrajectoryWriter
from zoo.callbacks.run_checkpoint import RunCheckpoint
from zoo.callbacks.sample_grid_logger import SampleGridLogger
from zoo.callbacks.sample_quality import SampleQuality

__all__ = [
    "EMA",
    "DataStatisticsWriter",
    "ImageGridWriter",
    "JSONLWriter",
    "RunCheckpoint",
    "SampleGridLogger",
    "SampleQuality",
    "TrajectoryWriter",
]
