"""An evaluation from beginning to end: check, measure, compare, record."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..data import NpzFile
from ..errors import UserError
from ..processes import Processes, choose_device, exact_matmuls
from ..provenance import environment
from ..sampling import ImageWriter
from ..settings import EvaluationOptions, check_values
from ..terminal import PlainConsole, StartPass, printable, progress, say
from .extractors import Extractor, load_together
from .image_sets import ImageSet, SourceImages, open_samples
from .limits import label_warnings, pixel_warnings, reference_warnings, singular_warnings
from .record import Evaluation, describe_reference, describe_samples, made_with, peak_memory_mib, print_evaluation
from .reference import STATISTICS, Reference, measure_reference, open_reference, reference_of
from .registry import DEFAULT, METRICS, NEIGHBOURS, MetricInputs, floor, label
from .stream import Measured, measure

PATCH_SIZE = 16


class Evaluator:
    """Reference and feature networks, ready to measure sets of samples of one size.

    Args:
        options: what is measured, against what.
        height, width: of the samples.
        processes: of the command; all of them must make the same calls.
        own_images: stand for the reference, and for the training images, where the options name none; what their
            source warns of is shown by whoever opened it.

    Raises:
        UserError: if an option is out of range, a metric has no such name or cannot be had with this reference,
            weights are missing, or the reference cannot be read, is damaged or has another size.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        height: int,
        width: int,
        processes: Processes,
        console: Console | None = None,
        own_images: SourceImages | None = None,
    ):
        options = self.options = check_values(_spelled(options), str)
        self.processes, self.own_images = processes, own_images
        self.console = console or PlainConsole(quiet=not processes.is_main)
        self.height, self.width = height, width
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        began = time.perf_counter()
        self.metrics = _known_metrics(options.metrics)
        self.reference = self._open(options.reference, options.reference_split, "reference", ())
        self._check_available()
        if options.patch_size:
            self._check_borders(options.patch_size)
        of_training = [name for name in self.metrics if METRICS[name].of_training]
        self.training = None
        if of_training:
            self.training = self._open(options.train_images, options.train_split, "training images", of_training)
        self._check_shape()
        names = dict.fromkeys(METRICS[m].extractor for m in self.metrics if METRICS[m].extractor)
        self.extractors: dict[str, Extractor] = {
            name: load_together(name, processes, options.inception_weights, options.dinov2) for name in names
        }
        self.warnings += [w for e in self.extractors.values() for w in e.warnings]
        with progress(self.console) as start_pass:
            if self.reference:
                self._measure(self.reference, self._needed_of_reference(), False, start_pass)
            if self.training:
                needed = dict.fromkeys(METRICS[name].extractor for name in of_training)
                self._measure(self.training, [name for name in needed if name], True, start_pass)
        if self.reference:
            self.warnings += reference_warnings(self.reference, self.metrics, self.extractors)
        self.seconds["reference"] = time.perf_counter() - began

    def _open(self, name: str, split: str, role: str, only_for: Sequence[str]) -> Reference | None:
        """Real images, not read yet, or their statistics; None where no metric asks for them.

        Args:
            only_for: the metrics that do, if they are images alone.
        """
        size = self.height, self.width
        if name:
            with self.console.status(escape(f"opening {printable(name)}")):
                reference = open_reference(name, split, role, size, self.options, self.processes)
        elif self.own_images is not None:
            reference = reference_of(self.own_images, role, self.processes)
        elif only_for:
            raise UserError(f"{only_for[0]} measures the distance to the training images: name them, --train-images")
        elif any(METRICS[metric].compares for metric in self.metrics):
            raise UserError("--reference is missing: give an ADM reference .npz, or real images (folder, dataset)")
        else:
            return None
        images = reference.images
        if images is None and only_for:
            raise UserError(f"{role} {name}: no images (arr_0) in it")
        if images is not None and (images.height, images.width) != size:
            found = f"images of {images.height}x{images.width}, the samples are {self.height}x{self.width}"
            if not self.options.allow_resolution_mismatch:
                raise UserError(f"{role} {name}: {found}; --allow-resolution-mismatch compares them all the same")
            self.warnings.append(f"{role} {name}: {found}")
        if name and isinstance(images, SourceImages):
            self.tell(images.warnings)
        return reference

    def tell(self, warnings: Iterable[str]) -> None:
        """Adds those that are not among the warnings yet: one folder may be two of the sets."""
        self.warnings += [warning for warning in warnings if warning not in self.warnings]

    def _check_available(self) -> None:
        """Leaves out, or if they were asked for by name refuses, metrics the reference cannot give."""
        reference = self.reference
        if reference is None:
            return
        lacking = {}
        for name in self.metrics:
            metric = METRICS[name]
            if reference.statistics and metric.extractor == "inception" and metric.moments:
                if metric.moments not in reference.statistics:
                    lacking[name] = ", ".join(STATISTICS[metric.moments[1]])
            elif metric.compares and reference.images is None:
                lacking[name] = "images (arr_0)"
            elif name in ("precision", "recall") and len(reference.images) <= NEIGHBOURS:
                raise UserError(
                    f"{name} needs at least {NEIGHBOURS + 1} reference images, {reference.name} has "
                    f"{len(reference.images)}"
                )
        for name, needs in lacking.items():
            message = f"{name} is not available: reference {reference.name} has no {needs}"
            if self.options.metrics:
                raise UserError(f"{message}; it holds {', '.join(NpzFile(reference.name).keys)}")
            self.warnings.append(message)
        self.metrics = [name for name in self.metrics if name not in lacking]

    def lacks_borders(self, patch_size: int) -> bool:
        """Whether borders of such patches are asked for, and the samples have none."""
        return "boundary" in self.metrics and patch_size >= max(self.height, self.width)

    def _check_borders(self, patch_size: int) -> None:
        if self.lacks_borders(patch_size):
            size = f"{self.height}x{self.width}"
            raise UserError(f"boundary: {size} images show no borders of patches of {patch_size}; give --patch-size")

    def _check_shape(self) -> None:
        extractors = {METRICS[name].extractor for name in self.metrics} - {None}
        if self.height != self.width and extractors:
            message = f"samples of {self.height}x{self.width} are squeezed into the squares that the networks see"
            if not self.options.allow_resolution_mismatch:
                raise UserError(f"{message}; --allow-resolution-mismatch measures them all the same")
            self.warnings.append(message)

    def _needed_of_reference(self) -> list[str]:
        """The extractors that must see the reference images: those whose statistics did not come with the file."""
        metrics = [METRICS[name] for name in self.metrics]
        read = [m for m in metrics if m.kept or (m.moments and m.moments not in self.reference.statistics)]
        return list(dict.fromkeys(metric.extractor for metric in read))

    def _measure(self, reference: Reference, names: list[str], keep_all: bool, start: StartPass) -> None:
        if reference.images is None or not (names or any(METRICS[name].of_pixels for name in self.metrics)):
            return
        title = f"Real images, {reference.name}"
        measure_reference(
            reference,
            [self.extractors[name] for name in names],
            self.processes,
            self.options.evaluation_batch_size,
            self.options.cache,
            keep_all,
            lambda: start(title, len(reference.images)),
            self.console,
        )
        if isinstance(reference.images, SourceImages) and reference.images is not self.own_images:
            self.tell(reference.images.unreadable(self.processes))
        if reference.from_cache:
            say(self.console, f"{title}: features of {len(reference.images)} from the cache")

    def evaluate(self, images: ImageSet, writer: ImageWriter | None = None) -> Evaluation:
        """Measures samples of the size given to the constructor.

        Args:
            writer: gets all images in order, in the main process, and is closed before the numbers are computed.

        Raises:
            UserError: in every process.
        """
        began = time.perf_counter()
        warnings = list(self.warnings)
        needed = NEIGHBOURS + 1 if {"precision", "recall"} & set(self.metrics) else 2
        if len(images) < needed:
            raise UserError(f"{images.name}: {len(images)} samples; these metrics need at least {needed} samples")
        warnings += label_warnings(images, self.metrics, self.options)
        recorded = made_with(images).get("patch_size")
        known = self.options.patch_size or (recorded if isinstance(recorded, int) and recorded > 1 else None)
        patch_size = known or PATCH_SIZE
        self._check_borders(patch_size)
        if "boundary" in self.metrics and not known:
            warnings.append(
                f"boundary: no patch size is recorded with {images.name}, taken as {PATCH_SIZE}; else give --patch-size"
            )
        with contextlib.ExitStack() as stack:
            if writer:
                self.processes.on_main(lambda: bool(stack.enter_context(writer)))
            samples = measure(
                images,
                list(self.extractors.values()),
                self.processes,
                self.options.evaluation_batch_size,
                advance=stack.enter_context(progress(self.console))("Samples", len(images)),
                save=writer and writer.add,
            )
        return self.processes.on_main(lambda: self._compare(images, samples, patch_size, warnings, began))

    def _compare(
        self, images: ImageSet, samples: Measured, patch_size: int, warnings: list[str], began: float
    ) -> Evaluation:
        warnings += pixel_warnings(images, samples)
        if self.reference and self._same_images(images, samples):
            warnings.append("the samples and the reference are the same images")
        warnings += singular_warnings(self.metrics, self.extractors, lambda _: samples.count, "samples")
        device = self.processes.device if self.processes.device.type == "cuda" else torch.device("cpu")
        inputs = MetricInputs(samples, self.reference, self.training, self.extractors, self.options, patch_size, device)
        values, floors = {}, {}
        seconds = {**self.seconds, **{f"samples, {name}": value for name, value in samples.seconds.items()}}
        for name in self.metrics:
            with self.console.status(f"computing {label(name, samples.count)}"), exact_matmuls():
                start = time.perf_counter()
                value, real = METRICS[name].compute(inputs), floor(name, inputs)
                seconds[name] = time.perf_counter() - start
            if math.isnan(value):
                warnings.append(f"{name} is not defined for these images")
                continue
            values[name] = value
            if real and not any(map(math.isnan, real.values())):
                floors[name] = real
        seconds["all"] = time.perf_counter() - began + self.seconds["reference"]
        record = {
            "metrics": values,
            "floors": floors,
            **({"nearest": inputs.nearest} if "nearest" in values else {}),
            "labels": {name: label(name, samples.count) for name in values},
            "warnings": warnings,
            "samples": describe_samples(images, samples),
            "reference": self.reference and describe_reference(self.reference),
            **({"training_images": describe_reference(self.training)} if self.training else {}),
            "options": {**_plain_options(self.options), "patch_size": patch_size, "neighbours": NEIGHBOURS},
            "extractors": {name: {**e.weights, "version": e.version} for name, e in self.extractors.items()},
            "environment": environment(self.processes),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "peak_memory_mib": peak_memory_mib(),
        }
        return Evaluation(values, floors, warnings, record)

    def _same_images(self, images: ImageSet, samples: Measured) -> bool:
        paths = images.name, self.reference.name
        if all(map(os.path.exists, paths)) and os.path.samefile(*paths):
            return True
        measured = self.reference.measured
        return measured is not None and measured.pixels_sha256 == samples.pixels_sha256


def evaluate(
    samples: str | Path | ImageSet,
    options: EvaluationOptions,
    processes: Processes | None = None,
    writer: ImageWriter | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measures samples against a reference and prints the table.

    Args:
        samples: an image folder or an ADM `.npz`; or any `ImageSet`, for instance `SampledImages` of a model.
        processes: of the command; None: this one, on the device that is there.
        writer: gets the images in order.

    Raises:
        UserError: for every mistake in the arguments or files, as early as it can be seen.
    """
    processes = processes or Processes(0, 1, choose_device("auto"))
    console = console or PlainConsole(quiet=not processes.is_main)
    told: list[str] = []
    if isinstance(samples, str | Path):
        with console.status(escape(f"opening {printable(str(samples))}")):
            samples, told = open_samples(str(samples), options, processes)
    evaluator = Evaluator(options, samples.height, samples.width, processes, console)
    evaluator.tell(told)
    evaluation = evaluator.evaluate(samples, writer)
    if processes.is_main:
        print_evaluation(evaluation, console)
    return evaluation


def _known_metrics(names: tuple[str, ...]) -> list[str]:
    for name in names:
        if name not in METRICS:
            raise UserError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    return list(dict.fromkeys(names or DEFAULT))


def _spelled(options: EvaluationOptions) -> EvaluationOptions:
    """With paths of images as the text that also names a dataset."""
    names = {name: getattr(options, name) for name in ("reference", "train_images")}
    return dataclasses.replace(options, **{k: str(v) if isinstance(v, Path) else v for k, v in names.items()})


def _plain_options(options: EvaluationOptions) -> dict[str, Any]:
    """The options of an evaluation alone, of whatever command's arguments they are part of."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(EvaluationOptions)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
