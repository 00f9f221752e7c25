"""An evaluation from beginning to end: check, measure, compare, record."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..data import NpzFile
from ..errors import UserError
from ..processes import Processes, choose_device, exact_matmuls
from ..provenance import environment
from ..recipe import EvaluationOptions
from ..terminal import Advance, image_progress
from .extractors import Extractor, load_extractor
from .image_sets import ImageSet, open_images
from .record import (
    FULL_REFERENCES,
    Evaluation,
    describe_reference,
    describe_samples,
    peak_memory_mib,
    print_evaluation,
    sample_warnings,
)
from .reference import Reference, content_hash, measure_reference, read_statistics
from .registry import DEFAULT, METRICS, Comparison, floor, label
from .stream import Measured, measure


class Evaluator:
    """Reference and feature networks, ready to measure sets of samples of one size.

    Args:
        options: what is measured, against what.
        height, width: of the samples.
        processes: of the command; all of them must make the same calls.

    Raises:
        UserError: if a metric has no such name or cannot be had with this reference, weights are missing, or
            the reference cannot be read, is damaged or has another size.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        height: int,
        width: int,
        processes: Processes,
        console: Console | None = None,
    ):
        self.options, self.processes = options, processes
        self.console = console or Console(quiet=not processes.is_main)
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self.height, self.width = height, width
        self.metrics = _known_metrics(options.metrics)
        began = time.perf_counter()
        if options.reference:
            self.reference, has_stats = self._open(options.reference, options.reference_split)
        elif any(METRICS[name].compares for name in self.metrics):
            raise UserError("--reference is missing: give an ADM reference .npz, or a folder or dataset of real images")
        else:
            self.reference, has_stats = Reference("", "", None), False
        self._check_available(has_stats)
        self.training = self._open_training()
        names = dict.fromkeys(METRICS[m].extractor for m in self.metrics if METRICS[m].extractor)
        self.extractors: dict[str, Extractor] = {name: self._load(name) for name in names}
        self.warnings += [w for e in self.extractors.values() for w in e.warnings]
        with image_progress(self.console) as start_pass:
            self._measure_images(self.reference, self._needed_of_reference(), False, start_pass, "Reference")
            if self.training:
                self._measure_images(self.training, ["efficientnet"], True, start_pass, "Training images")
        self._check_references()
        self.seconds["reference"] = time.perf_counter() - began

    def _open(self, name: str, split: str) -> tuple[Reference, bool]:
        """A reference whose images are not read yet, and whether its statistics came with it."""
        options = self.options
        if Path(name).suffix != ".npz":
            images = open_images(name, split, (self.height, self.width), options.allow_resolution_mismatch)
            return Reference(name, content_hash(images, name, self.processes), images), False
        file = NpzFile(name)
        if options.verify:
            self.processes.on_main(file.verify)
        statistics = read_statistics(file)
        images = file.images() if "arr_0" in file else None
        if images is None and not statistics:
            raise UserError(
                f"{name}: neither images (arr_0) nor statistics (mu, sigma); it holds {', '.join(file.keys)}"
            )
        if images is not None and (images.height, images.width) != (self.height, self.width):
            message = (
                f"reference {name} holds {images.height}x{images.width} images, the samples are "
                f"{self.height}x{self.width}"
            )
            if not options.allow_resolution_mismatch:
                raise UserError(f"{message}; --allow-resolution-mismatch compares them all the same")
            self.warnings.append(message)
        sha256 = content_hash(images, name, self.processes)
        return Reference(name, sha256, images, statistics), bool(statistics)

    def _open_training(self) -> Reference | None:
        if "nearest" not in self.metrics:
            return None
        if not self.options.train_images:
            raise UserError("nearest measures the distance to the training images: name them with --train-images")
        return self._open(self.options.train_images, self.options.train_split)[0]

    def _check_available(self, has_stats: bool) -> None:
        """Leaves out, or if they were asked for by name refuses, metrics the reference cannot give."""
        reference, lacking = self.reference, {}
        for name in self.metrics:
            metric = METRICS[name]
            if has_stats and metric.extractor == "inception" and metric.moments:
                if metric.moments not in reference.statistics:
                    lacking[name] = "mu_s, sigma_s"
            elif reference.images is None and (metric.kept or metric.moments):
                lacking[name] = "images (arr_0)"
        if not lacking:
            return
        keys = ", ".join(NpzFile(reference.name).keys)
        for name, needs in lacking.items():
            message = f"{name} is not available: reference {reference.name} has no {needs}; it holds {keys}"
            if self.options.metrics:
                raise UserError(message)
            self.warnings.append(message)
        self.metrics = [name for name in self.metrics if name not in lacking]

    def _load(self, name: str) -> Extractor:
        def load() -> Extractor:
            return load_extractor(name, self.processes.device, self.options.inception_weights, self.options.dinov2)

        if self.processes.world_size > 1:
            self.processes.on_main(lambda: bool(load()))  # one of them fetches a missing file
        return load()

    def _needed_of_reference(self) -> list[str]:
        """The extractors that must see the reference images: those whose statistics did not come with the file."""
        return list(
            dict.fromkeys(
                metric.extractor
                for metric in (METRICS[name] for name in self.metrics)
                if metric.extractor
                and (metric.kept or (metric.moments and metric.moments not in self.reference.statistics))
            )
        )

    def _measure_images(
        self, reference: Reference, names: list[str], keep_all: bool, start: Callable[[str, int], Advance], title: str
    ) -> None:
        if reference.images is None or not (names or "boundary" in self.metrics):
            return
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
        if reference.from_cache:
            self.console.print(f"{title}: features of {len(reference.images)} images from the cache", highlight=False)

    def _check_references(self) -> None:
        measured = self.reference.measured
        if measured is None:
            return
        kept = len(measured.chosen)
        if kept != FULL_REFERENCES and {"precision", "recall"} & set(self.metrics):
            self.warnings.append(f"precision and recall against {kept} reference images; papers use {FULL_REFERENCES}")
        if kept < measured.count:
            self.warnings.append(
                f"{kept} of the {measured.count} reference images, a seeded choice, stand for them "
                "where metrics look at single images"
            )

    def evaluate(self, images: ImageSet, save: Callable[[np.ndarray], None] | None = None) -> Evaluation:
        """Measures samples of the size given to the constructor.

        Args:
            save: given all images in order, in the main process.

        Raises:
            UserError: in every process.
        """
        began = time.perf_counter()
        if len(images) < 2:
            raise UserError(f"{images.name}: {len(images)} image; a covariance needs at least two")
        with image_progress(self.console) as start_pass:
            samples = measure(
                images,
                list(self.extractors.values()),
                self.processes,
                self.options.evaluation_batch_size,
                advance=start_pass("Samples", len(images)),
                save=save,
            )
        seconds = {**self.seconds, **{f"samples, {k}": v for k, v in samples.seconds.items()}}
        return self.processes.on_main(lambda: self._compare(images, samples, seconds, began))

    def _compare(self, images: ImageSet, samples: Measured, seconds: dict[str, float], began: float) -> Evaluation:
        warnings = self.warnings + sample_warnings(images, samples, self.metrics, self.options)
        reference = self.reference
        if reference.measured and reference.measured.pixels_sha256 == samples.pixels_sha256:
            warnings.append("the samples and the reference are the same images")
        for m in self.metrics:
            feature = METRICS[m].moments
            dim = feature and self.extractors[feature[0]].outputs[feature[1]]
            if dim and samples.count <= dim:
                warnings.append(
                    f"{m}: {samples.count} samples for {dim} features, the covariance is singular: "
                    "compare only with numbers from as many samples"
                )
        device = self.processes.device if self.processes.device.type == "cuda" else torch.device("cpu")
        comparison = Comparison(samples, reference, self.training, self.extractors, self.options, device)
        values, floors = {}, {}
        for m in self.metrics:
            with self.console.status(f"computing {label(m, samples.count)}"), exact_matmuls():
                start = time.perf_counter()
                values[m] = METRICS[m].compute(comparison)
                if (real := floor(m, comparison)) is not None:
                    floors[m] = real
                seconds[m] = time.perf_counter() - start
        seconds["all"] = time.perf_counter() - began + self.seconds["reference"]
        record = {
            "metrics": values,
            "floors": floors,
            **({"nearest": comparison.nearest} if "nearest" in values else {}),
            "labels": {m: label(m, samples.count) for m in values},
            "warnings": warnings,
            "samples": describe_samples(images, samples),
            "reference": describe_reference(reference),
            **({"training_images": describe_reference(self.training)} if self.training else {}),
            "options": _plain_options(self.options),
            "extractors": {n: {**e.weights, "version": e.version} for n, e in self.extractors.items()},
            "environment": environment(self.processes),
            "seconds": {key: round(value, 3) for key, value in seconds.items()},
            "peak_memory_mib": peak_memory_mib(),
        }
        return Evaluation(values, floors, warnings, record)


def evaluate(
    samples: str | Path | ImageSet,
    options: EvaluationOptions,
    processes: Processes | None = None,
    save: Callable[[np.ndarray], None] | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measures samples against a reference.

    Args:
        samples: an image folder or an ADM `.npz`; or any `ImageSet`, for instance `SampledImages` of a model.
        processes: of the command; None: this one, on the device that is there.
        save: given the images in order.

    Raises:
        UserError: for every mistake in the arguments or files, as early as it can be seen.
    """
    processes = processes or Processes(0, 1, choose_device("auto"))
    label_mistake = None
    if isinstance(samples, str | Path):
        samples, label_mistake = open_samples(str(samples), options, processes)
    evaluator = Evaluator(options, samples.height, samples.width, processes, console)
    if label_mistake:
        evaluator.warnings.append(label_mistake)
    evaluation = evaluator.evaluate(samples, save)
    if processes.is_main:
        print_evaluation(evaluation, evaluator.console)
    return evaluation


def open_samples(name: str, options: EvaluationOptions, processes: Processes) -> tuple[ImageSet, str | None]:
    """The images of a folder or `.npz`, and what is wrong with their labels, if anything."""
    if Path(name).suffix != ".npz":
        return open_images(name), None
    file = NpzFile(name)
    images, mistake = file.images(), None
    if options.verify:
        processes.on_main(file.verify)
    try:
        images.labels = file.labels(len(images))
    except UserError as error:
        mistake = f"labels left out: {error}"
    return images, mistake


def _known_metrics(names: tuple[str, ...]) -> list[str]:
    for name in names:
        if name not in METRICS:
            raise UserError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    return list(dict.fromkeys(names or DEFAULT))


def _plain_options(options: EvaluationOptions) -> dict[str, Any]:
    """The options of an evaluation alone, of whatever command's arguments they are part of."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(EvaluationOptions)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
