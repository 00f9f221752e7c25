"""Images for training: sources, transforms and an order that is a pure function."""

from .loader import Batch, TrainingImages, batches, check_broken, report_broken
from .npz import NpzFile, NpzImages, NpzWriter
from .order import EpochOrder, PositionSampler
from .sources import Source, class_count, open_source
from .transforms import BrokenImage, centre_crop, decode

__all__ = [
    "Batch",
    "BrokenImage",
    "EpochOrder",
    "NpzFile",
    "NpzImages",
    "NpzWriter",
    "PositionSampler",
    "Source",
    "TrainingImages",
    "batches",
    "centre_crop",
    "check_broken",
    "class_count",
    "decode",
    "open_source",
    "report_broken",
]
