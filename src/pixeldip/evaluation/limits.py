"""What limits the numbers of an evaluation, as the warnings beside them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..errors import UserError
from ..sampling import SampledImages
from ..settings import EvaluationOptions
from .extractors import Extractor
from .image_sets import ImageSet
from .reference import Reference
from .registry import FULL_SIZE, METRICS
from .stream import Feature, Measured

FULL_REFERENCES = 10_000
"""Reference images behind the precision and recall of papers."""


def label_warnings(images: ImageSet, metrics: Sequence[str], options: EvaluationOptions) -> list[str]:
    """What is wrong with the number, the classes and the order of samples, before they are measured.

    Raises:
        UserError: for classes that are not balanced, if they were required to be.
    """
    found = []
    count, labels = len(images), images.labels
    if count != FULL_SIZE and {"fid", "sfid", "is", "precision", "recall"} & set(metrics):
        found.append(f"{count} samples, where papers use {FULL_SIZE}: not comparable with their numbers")
    last = count % options.is_split
    if "is" in metrics and count > options.is_split and 0 < last < options.is_split / 2:
        found.append(f"the last split of the Inception Score has {last} of {options.is_split} images and counts fully")
    if labels is None:
        return found
    classes, counts = np.unique(labels, return_counts=True)
    if counts.max() - counts.min() > 1:
        message = f"classes are not balanced: {len(classes)} classes with {counts.min()} to {counts.max()} samples each"
        if options.require_balanced:
            raise UserError(f"{images.name}: {message}")
        found.append(message)
    asked = len(set(images.chosen)) if isinstance(images, SampledImages) else 0
    if count < asked:
        found.append(f"{count} samples of {asked} classes: {asked - count} of them have none")
    elif len(classes) <= classes.max():
        found.append(f"samples of {len(classes)} classes, though their ids go up to {classes.max()}")
    sorted_by_class = len(classes) > 1 and (np.diff(labels) >= 0).all()
    if sorted_by_class and "is" in metrics and options.is_order == "file" and count > options.is_split:
        found.append(
            "samples are sorted by class, and the Inception Score is a mean over consecutive splits, each of "
            "which sees few classes: it comes out far too low; --is-order shuffled"
        )
    return found


def pixel_warnings(images: ImageSet, samples: Measured) -> list[str]:
    """What is wrong with the pixels."""
    found = []
    if samples.low == samples.high:
        found.append(f"{images.name}: all pixels have the value {samples.low}")
    elif samples.high <= 1:
        found.append(f"{images.name}: no pixel is above {samples.high}; were images in [0, 1] saved as uint8?")
    duplicates = samples.count - len(set(samples.digests))
    if duplicates > 0.01 * samples.count:
        found.append(f"{duplicates} of {samples.count} samples are exact duplicates of others")
    return found


def reference_warnings(reference: Reference, metrics: Sequence[str], extractors: Mapping[str, Extractor]) -> list[str]:
    """What is wrong with the weights and the number of the reference, once it is measured."""
    found = []
    inception, theirs = extractors.get("inception"), reference.weights_behind()
    if inception and reference.statistics and theirs and theirs != inception.weights["sha256"]:
        found.append(f"{reference.name} was made with other Inception weights, SHA-256 {theirs}")
    found += singular_warnings(metrics, extractors, reference.count_behind, "reference images")
    measured = reference.measured
    if measured is None:
        return found
    kept = len(measured.chosen)
    if kept != FULL_REFERENCES and {"precision", "recall"} & set(metrics):
        found.append(f"precision and recall against {kept} reference images; papers use {FULL_REFERENCES}")
    if kept < measured.count:
        found.append(
            f"{kept} of the {measured.count} reference images, a seeded choice, stand for them "
            "where metrics look at single images"
        )
    return found


def singular_warnings(
    metrics: Sequence[str], extractors: Mapping[str, Extractor], count: Callable[[Feature], int | None], images: str
) -> list[str]:
    """Of the metrics that compare covariances, those with no more images than features.

    Args:
        count: images behind the moments of a feature, None where that is not known.
        images: what they are called.
    """
    found = []
    for name in metrics:
        feature = METRICS[name].moments
        if feature is None:
            continue
        n, dim = count(feature), extractors[feature[0]].outputs[feature[1]]
        if n is not None and n <= dim:
            found.append(
                f"{name}: {n} {images} for {dim} features, the covariance is singular: compare only like with like"
            )
    return found
