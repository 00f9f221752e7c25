"""What the pipeline is made with and called with, checked and turned into plain numbers."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..errors import UserError
from ..flow import LARGEST_SEED
from ..model import DiP
from ..settings import LARGEST_SIDE, SamplingSettings, finite_number, whole_number
from .tokens import check_reuse

Generators = torch.Generator | list[torch.Generator]


def names_of_classes(class_names: Iterable[Any] | None, num_classes: int) -> list[str]:
    """As many names as classes, or none at all."""
    if isinstance(class_names, str) or not isinstance(class_names, Iterable | None):
        raise UserError(f"class_names {class_names!r}: give a list of names, one per class")
    names = [] if class_names is None else [str(name) for name in class_names]
    if names and len(names) != num_classes:
        raise UserError(f"class_names: {len(names)} names for {num_classes} classes of the model")
    return names


def training_side(name: str, value: Any) -> int:
    """Pixels of an image's height or width."""
    side = whole_number(name, value)
    if not 1 <= side <= LARGEST_SIDE:
        raise UserError(f"{name} {side}: must be from 1 to {LARGEST_SIDE}")
    return side


def plain_settings(settings: SamplingSettings, model: DiP) -> SamplingSettings:
    """Of plain, finite numbers, and such as the model can be sampled with; steps and solver as they are."""
    return dataclasses.replace(
        settings,
        guidance=finite_number("guidance_scale", settings.guidance),
        guidance_interval=_pair("guidance_interval", settings.guidance_interval),
        time_shift=finite_number("time_shift", settings.time_shift),
        backbone_every=check_reuse(whole_number("backbone_every", settings.backbone_every), model),
    )


def _pair(name: str, values: Any) -> tuple[float, float]:
    try:
        lo, hi = values
    except (TypeError, ValueError):
        raise UserError(f"{name} {values!r}: give two numbers, (lo, hi)") from None
    return finite_number(name, lo), finite_number(name, hi)


def random_source(seeds: Any, generator: Any) -> tuple[list[int] | None, Generators | None]:
    """Seeds, or generators in their place, or neither."""
    seeds, generator = _whole_numbers(seeds), _generators(generator)
    if seeds is not None and generator is not None:
        raise UserError("give seeds or a generator, not both")
    if min(seeds or [0]) < 0:
        raise UserError(f"seeds: {min(seeds)} is below 0")
    if max(seeds or [0]) > LARGEST_SEED:
        raise UserError(f"seeds: {max(seeds)} is above {LARGEST_SEED}, the largest")
    return seeds, generator


def _whole_numbers(seeds: Any) -> list[int] | None:
    try:
        return None if seeds is None else [operator.index(seed) for seed in seeds]
    except TypeError:
        raise UserError(f"seeds {seeds!r}: give a list of whole numbers, one per image") from None


def _generators(generator: Any) -> Generators | None:
    each = list(generator) if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in each):
        raise UserError(f"generator {generator!r}: give a torch.Generator, or a list of them, one per image")
    return each if isinstance(generator, list | tuple) else generator


def labels_of_images(
    class_labels: Sequence[int | str] | int | str | None,
    num_classes: int,
    class_id: Callable[[int | str], int],
    seeds: list[int] | None,
    generator: Generators | None,
) -> list[int]:
    """An id per image; as many images as labels, or as seeds or generators without classes."""
    given = {"seeds": seeds, "generators": generator if isinstance(generator, list) else None}
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if num_classes == 0:
        if class_labels is not None:
            raise UserError("the model was trained without classes: leave class_labels out and give seeds")
        return _at_least_one([0] * next(iter(counts.values()), 1))
    if class_labels is None:
        raise UserError(f"give class_labels: the model has classes 0 to {num_classes - 1}")
    try:
        asked = [class_labels] if isinstance(class_labels, str) else list(class_labels)
    except TypeError:  # a single id, perhaps of numpy or torch
        asked = [class_labels]
    labels = _at_least_one([class_id(label) for label in asked])
    for name, count in counts.items():
        if count != len(labels):
            raise UserError(f"{len(labels)} class labels but {count} {name}: give one per image")
    return labels


def _at_least_one(labels: list[int]) -> list[int]:
    if not labels:
        raise UserError("no image is asked for: give at least one class label, or seed")
    return labels
