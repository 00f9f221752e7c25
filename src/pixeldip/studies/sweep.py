"""How a model is best sampled: every combination of some settings, measured on the same seeds and classes."""

import copy
import dataclasses
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ..arguments import SweepArguments
from ..errors import UserError
from ..evaluation import Evaluator
from ..evaluation.image_sets import SourceImages, open_images
from ..evaluation.registry import METRICS
from ..images import grid
from ..pipeline import DiPPipeline, check_reuse
from ..processes import Processes, choose_precision, start_processes
from ..provenance import environment
from ..sampling import SampledImages, deal_classes, load_pipeline, weights_sha256
from ..terminal import PlainConsole, say, warn
from .folder import check_report, claim, write_result
from .sweep_report import SHOWN, is_there, result_file, settings_there, write_sweep_report
from .sweep_settings import Setting, combinations

ASKED = (
    "model",
    "reference",
    "reference_split",
    "label_column",
    "images",
    "metrics",
    "train_images",
    "train_split",
    "inception_weights",
    "dinov2",
    "pr_distance",
    "is_split",
    "is_order",
    "allow_resolution_mismatch",
    "patch_size",
    "compile",
)
"""Arguments that must be the same for all that one folder holds."""


class FirstImages:
    """Keeps the first samples that go past."""

    def __init__(self) -> None:
        self.pictures: list[Image.Image] = []

    def __enter__(self) -> "FirstImages":
        return self

    def add(self, images: np.ndarray) -> None:
        self.pictures += [Image.fromarray(pixels) for pixels in images[: SHOWN - len(self.pictures)]]

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        pass


def sweep_command(arguments: SweepArguments) -> int:
    """What `pixeldip sweep` does; what is in the folder already is not measured again.

    Raises:
        UserError: for every mistake in the arguments or files.
    """
    with start_processes(arguments.device) as processes:
        console = PlainConsole(quiet=not processes.is_main)
        precision = choose_precision(arguments.precision, processes.device)
        pipeline = load_pipeline(arguments.model, processes.device, precision, arguments.compile)
        if not pipeline.model.config.num_classes:  # there is nothing to guide to
            arguments = dataclasses.replace(arguments, guidance=(1.0,))
        settings = combinations(arguments, pipeline.default_settings)
        for setting in settings:
            check_reuse(setting.backbone_every, pipeline.model)
        size = pipeline.config.height, pipeline.config.width
        real = reference_images(arguments, size)
        classes = classes_like(real, pipeline)
        patch_size = arguments.patch_size or pipeline.model.config.patch_size
        options = dataclasses.replace(arguments, reference="" if real else arguments.reference, patch_size=patch_size)
        of_training = [name for name in options.metrics if name in METRICS and METRICS[name].of_training]
        if of_training and not options.train_images:
            raise UserError(f"{of_training[0]} measures the distance to the training images: name them, --train-images")
        asked = ((name, getattr(arguments, name)) for name in ASKED)
        facts = {name: str(value) if isinstance(value, Path) else value for name, value in asked}
        facts |= {"device": processes.device.type, "weights": weights_sha256(pipeline.model)}
        missing = [s for s in settings if not processes.on_main(lambda s=s: is_there(arguments.out, s))]
        evaluator = Evaluator(options, *size, processes, console, real) if missing else None
        if evaluator:  # what is measured now stands beside what was: the same images must be behind both
            images = {"reference": evaluator.reference, "train_images": evaluator.training}
            facts |= {f"{name}_sha256": opened.sha256 for name, opened in images.items() if opened}
            evaluator.tell([*real.warnings, *real.unreadable(processes)] if real else [])
            for warning in evaluator.warnings:
                warn(console, warning)
        processes.on_main(lambda: claim(arguments.out, {"sweep": facts, "classes_as_reference": bool(classes)}))
        asked_for = {setting.name for setting in settings}
        processes.on_main(lambda: check_report(arguments.out, settings_there(arguments.out), asked_for))
        for number, setting in enumerate(missing, start=1):
            console.rule(f"{number} of {len(missing)}: {setting.in_words}", align="left")
            samples = SampledImages(
                pipeline,
                setting.sampling,
                range(arguments.images),
                classes,
                order_seed=None if classes else 0,
                name=arguments.model,
            )
            if arguments.compile or processes.device.type == "cuda":
                _warm_up(samples, arguments.evaluation_batch_size)
            first = FirstImages()
            evaluation = evaluator.evaluate(samples, first)
            processes.on_main(lambda s=setting, f=first, e=evaluation: _keep(arguments.out, s, f, e.record, processes))
        page = processes.on_main(lambda: write_sweep_report(arguments.out, settings))
        say(console, f"done; open {page}")
    return 0


def reference_images(arguments: SweepArguments, size: tuple[int, int]) -> SourceImages | None:
    """The real images, with classes; None for an `.npz`, which the evaluator opens itself."""
    if arguments.reference.endswith(".npz"):
        return None
    if not arguments.reference:
        raise UserError("--reference is missing: name images that were not trained on")
    try:
        return open_images(
            arguments.reference,
            arguments.reference_split,
            size,
            arguments.allow_resolution_mismatch,
            arguments.label_column,
            skip_broken=True,
        )
    except UserError as error:
        raise UserError(f"--reference {error}") from error


def classes_like(real: SourceImages | None, pipeline: DiPPipeline) -> list[int]:
    """The class of each real image, found by name, so that samples have every class as often; in a random order, so
    that few samples do, too. Empty if some class is none of the model's: samples then have all equally often."""
    ids = {name: k for k, name in enumerate(pipeline.config.class_names or ())}
    if real is None or real.labels is None or not ids:
        return []
    classes = [ids.get(real.source.class_names[label]) for label in real.labels]
    return [] if None in classes else deal_classes(classes, len(classes), order_seed=0)


def _warm_up(samples: SampledImages, batch_size: int) -> None:
    """Samples a batch of each size that will occur, its first step without guidance and its second with it, so that
    compiling counts as no setting's time."""
    first = copy.copy(samples)
    first.settings = dataclasses.replace(samples.settings, steps=2, guidance_interval=(1e-6, 1.0))
    for count in {min(batch_size, len(samples)), len(samples) % batch_size} - {0}:
        first.read(0, count)


def _keep(out: Path, setting: Setting, first: FirstImages, record: dict[str, Any], processes: Processes) -> None:
    path = result_file(out, setting)
    path.parent.mkdir(exist_ok=True)
    sampling_seconds = record["seconds"]["samples, images"]
    grid(first.pictures, len(first.pictures)).save(path.with_suffix(".png"))
    write_result(
        path,
        {
            "setting": dataclasses.asdict(setting),
            "precision": record["samples"]["made_with"]["precision"],
            "metrics": record["metrics"],
            "floors": record["floors"],
            "warnings": record["warnings"],
            "count": record["samples"]["count"],
            "seconds_per_image": sampling_seconds / record["samples"]["count"] * processes.world_size,
            "environment": environment(processes),
        },
    )
