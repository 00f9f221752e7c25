"""Which images: seeds, and the classes dealt out to them."""

from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from ..flow import LARGEST_SEED, Stream

MOST_SEEDS = 10_000_000


def parse_seeds(text: str, most: int = MOST_SEEDS) -> list[int]:
    """ "7", "0-15" or "0-7,20" -> a list of seeds.

    Raises:
        UserError: if it is anything else, or they are more than `most`.
    """
    runs = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            runs.append((int(first), int(last if dash else first)))
    except ValueError:
        raise UserError(f"seeds {text!r}: expected numbers and ranges, for instance 0-15 or 3,7,20-29") from None
    if any(last > LARGEST_SEED for _, last in runs):
        raise UserError(f"seeds {text!r}: a seed is at most {LARGEST_SEED}")
    if any(last < first for first, last in runs):
        raise UserError(f"seeds {text!r}: a range is empty; write the smaller number first")
    count = sum(last - first + 1 for first, last in runs)
    if count > most:
        raise UserError(f"seeds {text!r}: {count:,} images, and {most:,} are the most here")
    return [seed for first, last in runs for seed in range(first, last + 1)]


def ranges(seeds: Sequence[int]) -> str:
    """The text `parse_seeds` reads, with runs as first-last."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def deal_classes(classes: Sequence[int], count: int, order_seed: int | None) -> list[int]:
    """The classes of `count` images, as many of each as of any other, or one more.

    They come in turn, or, with a seed, in a random order: the Inception Score is a mean over consecutive
    splits, and means something only if each split holds all classes. Fewer images than classes are, in turn, of the
    first classes, and with a seed of classes spread over all.
    """
    dealt = [classes[i % len(classes)] for i in range(count)]
    if order_seed is not None:
        if count < len(classes):
            dealt = [classes[(2 * i + 1) * len(classes) // (2 * count)] for i in range(count)]
        order = np.random.default_rng((order_seed, Stream.CLASS_ORDER)).permutation(count)
        dealt = [dealt[i] for i in order]
    return dealt
