"""Lightning callbacks of the zoo."""

from zoo.callbacks.antdt_monitor import AntDTMonitor
from zoo.callbacks.batch_size_warmup import BatchSizeWarmup
from zoo.callbacks.choice_eval import ChoiceEval
from zoo.callbacks.class_agreement import ClassAgreementWriter
from zoo.callbacks.ema import EMA
from zoo.callbacks.jsonl import JSONLWriter
from zoo.callbacks.picture_writers import ImageGridWriter, TrajectoryWriter
from zoo.callbacks.run_checkpoint import RunCheckpoint
from zoo.callbacks.sample_grid_logger import SampleGridLogger
from zoo.callbacks.sample_quality import SampleQuality
from zoo.callbacks.speed_monitor import SpeedMonitor
from zoo.callbacks.spike_guard import SpikeGuard
from zoo.callbacks.text_quality import TextQuality
from zoo.callbacks.text_writer import TextWriter
from zoo.callbacks.traffic_monitor import TrafficMonitor

__all__ = [
    "EMA",
    "AntDTMonitor",
    "BatchSizeWarmup",
    "ChoiceEval",
    "ClassAgreementWriter",
    "ImageGridWriter",
    "JSONLWriter",
    "RunCheckpoint",
    "SampleGridLogger",
    "SampleQuality",
    "SpeedMonitor",
    "SpikeGuard",
    "TextQuality",
    "TextWriter",
    "TrafficMonitor",
    "TrajectoryWriter",
]
