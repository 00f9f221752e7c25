"""Images for training: sources, transforms and an order that is a pure function."""

from .fingerprint import changes, fingerprint
from .loader import Batch, Batches, TrainingImages
from .npz import NpzFile, NpzImages
from .npz_writer import NpzWriter
from .order import EpochOrder, PositionSampler
from .sources import Source, class_count, open_source
from .transforms import BrokenImage, centre_crop, decode

__all__ = [
    "Batch",
    "Batches",
    "BrokenImage",
    "EpochOrder",
    "NpzFile",
    "NpzImages",
    "NpzWriter",
    "PositionSampler",
    "Source",
    "TrainingImages",
    "centre_crop",
    "changes",
    "class_count",
    "decode",
    "fingerprint",
    "open_source",
]
