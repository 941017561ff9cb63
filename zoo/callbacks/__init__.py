"""Lightning callbacks of the zoo."""

from zoo.callbacks.jsonl import JSONLWriter
from zoo.callbacks.picture_writers import ImageGridWriter, TrajectoryWriter
from zoo.callbacks.sample_grid_logger import SampleGridLogger
from zoo.callbacks.sample_quality import SampleQuality

__all__ = ["ImageGridWriter", "JSONLWriter", "SampleGridLogger", "SampleQuality", "TrajectoryWriter"]
