"""Sampling many images: seeds dealt over classes, written as PNG files or as one `.npz`."""

from .sampled_images import SampledImages, chosen_settings, load_pipeline, weights_sha256
from .seeds import MOST_SEEDS, deal_classes, parse_seeds
from .writers import ImageWriter, image_writer

__all__ = [
    "MOST_SEEDS",
    "ImageWriter",
    "SampledImages",
    "chosen_settings",
    "deal_classes",
    "image_writer",
    "load_pipeline",
    "parse_seeds",
    "weights_sha256",
]
