"""What `pixeldip evaluate` and `pixeldip evaluate reference` do with their arguments."""

import contextlib
from typing import Any

from rich.console import Console

from ..data import NpzFile
from ..errors import UserError
from ..pipeline import names_a_model
from ..processes import choose_precision, keep_freed_memory, start_processes, stop_processes
from ..sampling import SampledImages, image_writer, load_pipeline
from ..terminal import image_progress
from .extractors import load_extractor
from .image_sets import open_images
from .reference import write_reference
from .run import evaluate


def evaluate_command(arguments: Any) -> None:
    """Args: arguments: the command line's `EvaluateArguments`."""
    keep_freed_memory()
    processes = start_processes(arguments.device)
    try:
        with contextlib.ExitStack() as stack:
            samples, save = arguments.samples, None
            if names_a_model(arguments.samples):
                samples = SampledImages(
                    load_pipeline(arguments.samples, processes.device),
                    arguments,
                    range(arguments.images),
                    arguments.classes,
                    order_seed=0,
                    precision=choose_precision(arguments.precision, processes.device),
                    name=arguments.samples,
                )
                arguments.patch_size = samples.pipeline.model.config.patch_size
                if arguments.save_images:
                    writer = image_writer(samples, arguments.save_images)
                    save = stack.enter_context(writer).add if processes.is_main else _leave_to_main
            elif arguments.save_images:
                raise UserError(f"--save-images keeps the samples of a model; {arguments.samples} is none")
            evaluation = evaluate(samples, arguments, processes, save)
        if arguments.out and processes.is_main:
            evaluation.save(arguments.out)
    finally:
        stop_processes()


def _leave_to_main(_: object) -> None:
    pass


def reference_command(arguments: Any) -> None:
    """Args: arguments: the command line's `ReferenceArguments`."""
    keep_freed_memory()
    processes = start_processes(arguments.device)
    console = Console(quiet=not processes.is_main)
    try:
        if arguments.data.endswith(".npz"):
            file = NpzFile(arguments.data)
            processes.on_main(file.verify)
            images = file.images()
        else:
            size = (arguments.resolution, arguments.resolution) if arguments.resolution else None
            images = open_images(arguments.data, arguments.split, size)
        extractor = load_extractor("inception", processes.device, arguments.inception_weights)
        for warning in extractor.warnings:
            console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
        with image_progress(console) as start_pass:
            write_reference(
                images,
                arguments.out,
                extractor,
                processes,
                arguments.batch_size,
                arguments.images,
                {"data": arguments.data, "split": arguments.split},
                start_pass("Reference", len(images)),
            )
        console.print(
            f"{arguments.out}: statistics of {len(images)} images of {images.height}x{images.width}, "
            f"{min(len(images), arguments.images)} of them in arr_0",
            highlight=False,
            soft_wrap=True,
        )
    finally:
        stop_processes()
