"""From flags to images in a file or folder."""

import contextlib
import time
from pathlib import Path

import numpy as np

from ..arguments import SampleArguments
from ..images import GRID
from ..processes import Processes, choose_precision, start_processes
from ..terminal import PlainConsole, progress, say
from .sampled_images import SampledImages, chosen_settings, load_pipeline
from .seeds import parse_seeds
from .writers import image_writer


def sample_command(arguments: SampleArguments) -> None:
    """What `pixeldip sample` does."""
    seeds = parse_seeds(arguments.seeds)
    with start_processes(arguments.device) as processes:
        in_turn = arguments.out.suffix != ".npz"
        precision = choose_precision(arguments.precision, processes.device)
        pipeline = load_pipeline(arguments.model, processes.device, precision, arguments.compile)
        images = SampledImages(
            pipeline,
            chosen_settings(arguments, pipeline),
            seeds,
            arguments.classes,
            order_seed=None if in_turn and arguments.class_order_seed is None else arguments.class_order_seed or 0,
            height=arguments.height,
            width=arguments.width,
            name=arguments.model,
        )
        sample_to_file(images, arguments.out, arguments.batch_size, processes)


def sample_to_file(images: SampledImages, out: Path, batch_size: int, processes: Processes) -> None:
    """Samples all images into a folder (see `ImageFolderWriter`) or, if `out` ends in .npz, one file that ADM's
    evaluator reads. All processes sample; the main one writes.

    Raises:
        UserError: if an argument is out of range or nothing can be written there.
    """
    console = PlainConsole(quiet=not processes.is_main)
    began = time.perf_counter()
    starts = range(0, len(images), batch_size)
    with contextlib.ExitStack() as stack:
        writer = image_writer(images, out)
        processes.on_main(lambda: bool(stack.enter_context(writer)))
        advance = stack.enter_context(progress(console))("Sampling", len(images))
        for first in range(0, len(starts), processes.world_size):
            own = starts[first + processes.rank : first + processes.rank + 1]
            until = min(starts[first] + processes.world_size * batch_size, len(images))
            share = (until - starts[first]) / images.settings.steps

            def read(own: range = own, share: float = share) -> np.ndarray | None:
                return images.read(own[0], own[0] + batch_size, lambda *_: advance(share)) if own else None

            def write(batches: list[np.ndarray | None]) -> None:
                for pixels in batches:
                    if pixels is not None:
                        writer.add(pixels)

            sampled = processes.gather(processes.together(read))
            processes.together(lambda sampled=sampled: write(sampled))
    seconds = time.perf_counter() - began
    shown = out if out.suffix == ".npz" else out / GRID
    say(console, f"{len(images)} images in {seconds:.1f} s ({len(images) / seconds:.2f} a second): {shown}")
