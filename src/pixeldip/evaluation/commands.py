"""From flags to an evaluation, or a reference batch."""

from dataclasses import fields

from ..arguments import EvaluateArguments, ReferenceArguments
from ..data import NpzFile
from ..errors import UserError
from ..files import check_writable
from ..processes import choose_precision, start_processes
from ..run_folder import names_a_model
from ..sampling import SampledImages, chosen_settings, image_writer, load_pipeline
from ..settings import SamplingFlags, refuse_flags
from ..terminal import PlainConsole, progress, say, warn
from .extractors import load_together
from .image_sets import open_images
from .reference import write_reference
from .run import evaluate

_OF_A_MODEL = (
    "images",
    "classes",
    "save_images",
    "precision",
    "compile",
    *(field.name for field in fields(SamplingFlags)),
)
"""Flags that mean nothing where images are read."""


def evaluate_command(arguments: EvaluateArguments) -> None:
    """What `pixeldip evaluate` does."""
    with start_processes(arguments.device) as processes:
        if arguments.out:
            processes.on_main(lambda: check_writable(arguments.out))
        samples, writer = arguments.samples, None
        if names_a_model(arguments.samples):
            precision = choose_precision(arguments.precision, processes.device)
            pipeline = load_pipeline(arguments.samples, processes.device, precision, arguments.compile)
            samples = SampledImages(
                pipeline,
                chosen_settings(arguments, pipeline),
                range(arguments.images),
                arguments.classes,
                order_seed=0,
                name=arguments.samples,
            )
            writer = image_writer(samples, arguments.save_images) if arguments.save_images else None
        else:
            why = f"is of the samples of a model; {arguments.samples} holds images: leave it out"
            refuse_flags(arguments, _OF_A_MODEL, why)
        evaluation = evaluate(samples, arguments, processes, writer)
        if arguments.out and processes.is_main:
            evaluation.save(arguments.out)


def reference_command(arguments: ReferenceArguments) -> None:
    """What `pixeldip evaluate reference` does."""
    with start_processes(arguments.device) as processes:
        console = PlainConsole(quiet=not processes.is_main)
        told: list[str] = []
        processes.on_main(lambda: check_writable(arguments.out))
        if arguments.data.endswith(".npz"):
            if arguments.resolution or arguments.split != "train":
                raise UserError(f"{arguments.data}: is measured as it is; leave out --resolution and --split")
            file = NpzFile(arguments.data)
            processes.on_main(file.verify)
            images = file.images()
        else:
            size = (arguments.resolution, arguments.resolution) if arguments.resolution else None
            images = open_images(arguments.data, arguments.split, size, label_column="none")
            told = images.warnings
        extractor = load_together("inception", processes, arguments.inception_weights)
        for warning in [*told, *extractor.warnings]:
            warn(console, warning)
        with progress(console) as start_pass:
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
        say(
            console,
            f"{arguments.out}: statistics of {len(images)} images of {images.height}x{images.width}, "
            f"{min(len(images), arguments.images)} of them in arr_0",
        )
