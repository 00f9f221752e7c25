"""Sampling many images: seeds dealt over classes, written as PNG files or as one `.npz`."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import reprlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from .arguments import SampleArguments
from .data import NpzWriter
from .errors import UserError
from .files import replacing, write_json, write_text, writing
from .flow import LARGEST_SEED, Stream
from .images import GRID, SETTINGS, display_scale, grid, save_png, to_uint8
from .model import DiP
from .pipeline import PREDICTED, STATE, DiPPipeline
from .processes import Processes, autocast, choose_precision, precision_name, start_processes
from .provenance import made_by
from .settings import SamplingFlags, SamplingSettings
from .terminal import PlainConsole, image_progress, say

GRID_LIMIT = 256
MOST_SEEDS = 10_000_000
OnStep = Callable[[int, float, Tensor, Tensor], None]


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


def load_pipeline(
    model: str, device: torch.device, precision: torch.dtype = torch.float32, compiled: bool = False
) -> DiPPipeline:
    """The pipeline of a run folder, a saved folder or a hub id, on a device, with weights of a precision; its
    modulation is precomputed, and on a CUDA device it samples by CUDA graphs.

    Args:
        precision: int8 is of most products of the backbone, the rest in what "auto" is.
        compiled: with compiled blocks, which is done for each batch size when it first occurs.

    Raises:
        UserError: if there is no model of that name, or it cannot be had from the hub.
    """
    diffusers_logging.disable_progress_bar()  # of loading one component
    pipeline = DiPPipeline.from_pretrained(model).to(device)
    weights = choose_precision("auto", device) if precision == torch.int8 else precision
    if weights != pipeline.dtype:
        pipeline.model.type(weights)  # which, unlike diffusers' to, says nothing about modules to keep in float32
    if precision == torch.int8:
        pipeline.model.quantize_to_int8()
    if compiled:
        pipeline.model.compile_repeated_blocks(dynamic=False)
    if device.type == "cuda":
        pipeline.enable_cuda_graphs()
    else:
        pipeline.enable_precomputed_modulation()
    pipeline.set_progress_bar_config(disable=True)  # commands show their own
    return pipeline


def weights_sha256(model: DiP) -> str:
    """What tells a model from the same one trained further, or computed with in another precision."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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


class SampledImages:
    """The images a model makes of seeds and classes, sampled when they are read.

    Image i has seed i of the list and a class dealt out by `deal_classes`; neither the part read with it nor
    the process that reads it changes which image that is.

    Args:
        classes: names or ids; by default all of the model's.
        order_seed: of the random order of the classes; None: in turn.
        precision: that float32 weights compute in; others compute in their own.
        name: of the model, for records.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self,
        pipeline: DiPPipeline,
        settings: SamplingSettings,
        seeds: Sequence[int],
        classes: Sequence[str | int] = (),
        order_seed: int | None = None,
        precision: torch.dtype = torch.float32,
        height: int | None = None,
        width: int | None = None,
        name: str = "model",
    ):
        self.pipeline, self.settings, self.seeds = pipeline, settings, seeds
        self.cast = precision if pipeline.dtype == torch.float32 else torch.float32  # others as they are
        own = torch.int8 if pipeline.model.in_int8 else pipeline.dtype
        self.precision = precision if own == torch.float32 else own
        self.name = name
        self.height, self.width = height or pipeline.config.height, width or pipeline.config.width
        self.chosen = [pipeline.class_id(c) for c in classes] or list(range(pipeline.model.config.num_classes))
        self.order_seed = order_seed
        self.labels = np.array(deal_classes(self.chosen, len(seeds), order_seed)) if self.chosen else None

    def __len__(self) -> int:
        return len(self.seeds)

    def class_of(self, index: int) -> str | int | None:
        """The name of an image's class, or its id where classes have no names."""
        if self.labels is None:
            return None
        names, label = self.pipeline.config.class_names, int(self.labels[index])
        return names[label] if names else label

    def read(self, start: int, stop: int, on_step: OnStep | None = None) -> np.ndarray:
        """Samples images start ... stop - 1: uint8 (n, H, W, 3).

        Args:
            on_step: called after each step, from 0, with the time and the state (n, C, H, W) it reached, and the image
                that it was heading for.

        Raises:
            UserError: if the model puts out anything that is not a number.
        """

        def reached(_: DiPPipeline, step: int, t: float, tensors: dict[str, Tensor]) -> None:
            on_step(step, t, tensors[STATE], tensors[PREDICTED])

        part = slice(start, stop)
        with autocast(self.pipeline.device, self.cast):
            x = self.pipeline(
                None if self.labels is None else self.labels[part].tolist(),
                seeds=self.seeds[part],
                height=self.height,
                width=self.width,
                output_type="latent",
                callback_on_step_end=on_step and reached,
                callback_on_step_end_tensor_inputs=(STATE, PREDICTED),
                **self.settings.pipeline_arguments(),
            ).images
        broken = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f"{len(broken)} of {len(x)} sampled images hold values that are not finite; the first is "
                f"image {start + broken[0]}, seed {self.seeds[start + broken[0]]}: "
                "use precision fp32, or another checkpoint"
            )
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

    def made_with(self) -> dict[str, Any]:
        """What one needs to know to sample the same images again."""
        which = {"seeds": _ranges(self.seeds), "classes": self.chosen, "class_order_seed": self.order_seed}
        return {**self._how(), **which}

    def one_made_with(self, index: int) -> dict[str, Any]:
        """What one needs to know to sample one of the images again."""
        label = self.class_of(index)
        return {**self._how(), "seed": int(self.seeds[index])} | ({} if label is None else {"class": label})

    def _how(self) -> dict[str, Any]:
        return {
            **made_by(),
            "model": self.name,
            "patch_size": self.pipeline.model.config.patch_size,
            **self.settings.pipeline_arguments(),
            "height": self.height,
            "width": self.width,
            "precision": precision_name(self.precision),
        }


def chosen_settings(flags: SamplingFlags, pipeline: DiPPipeline) -> SamplingSettings:
    """What the flags say, and for the rest the model's own settings; without classes no guidance.

    Raises:
        UserError: if guidance is asked of a model without classes.
    """
    own = pipeline.default_settings
    if not pipeline.model.config.num_classes:
        if flags.guidance not in (None, 1):
            raise UserError("--guidance: the model was trained without classes, there is nothing to guide to")
        own = dataclasses.replace(own, guidance=1.0)
    return flags.settings(own)


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
        advance = stack.enter_context(image_progress(console))("Sampling", len(images))
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

            sampled = processes.collected(processes.together(read))
            processes.together(lambda sampled=sampled: write(sampled))
    seconds = time.perf_counter() - began
    shown = out if out.suffix == ".npz" else out / GRID
    say(console, f"{len(images)} images in {seconds:.1f} s ({len(images) / seconds:.2f} a second): {shown}")


def image_writer(images: SampledImages, out: Path) -> "ImageWriter":
    """The writer for a path: `.npz`, or a folder."""
    return (NpzImageWriter if out.suffix == ".npz" else ImageFolderWriter)(images, out)


class NpzImageWriter(NpzWriter):
    """Sampled images in one `.npz` with their classes; use as a context manager, add images in order."""

    def __init__(self, images: SampledImages, out: Path):
        super().__init__(out, len(images), images.height, images.width, images.made_with())
        self._labels = images.labels

    def finish(self) -> None:
        super().finish(**({} if self._labels is None else {"arr_1": self._labels}))


class ImageFolderWriter:
    """Sampled images as PNG files that say how they were made; use as a context manager, add images in order.

    The folder also gets `settings.json`, `metadata.jsonl` (file, class and seed of each image that is there, as
    Hugging Face's imagefolder reads them) and, once all are there, `grid.png` of the first images. It takes images of
    the same settings and weights only, so that these tell of all of them, whatever ended the block.

    Raises:
        UserError: if nothing can be written there, or it holds images made otherwise.
    """

    def __init__(self, images: SampledImages, out: Path):
        self.images, self.out = images, out
        self._count = 0
        self._first: list[Image.Image] = []

    @functools.cached_property
    def _made_with(self) -> dict[str, Any]:
        """As it is read again, with what tells that a model was trained further, or replaced, since."""
        weights = weights_sha256(self.images.pipeline.model)
        return json.loads(json.dumps({**self.images.made_with(), "weights_sha256": weights}))

    def __enter__(self) -> "ImageFolderWriter":
        with writing(f"out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            self._refuse_images_made_otherwise()
            write_json(self.out / SETTINGS, self._made_with)
        return self

    def add(self, images: np.ndarray) -> None:
        """The next images, uint8 (n, H, W, 3)."""
        for pixels in images:
            i = self._count
            picture = Image.fromarray(pixels)
            save_png(picture, self.out / _image_name(i), self.images.one_made_with(i))
            if i < GRID_LIMIT:
                self._first.append(picture)
            self._count += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # what went wrong first is what counts
        with writing(f"out {self.out}") if kind is None else contextlib.suppress(OSError):
            self._list_images()
            if kind is None and self._first:
                self._summarise()

    def _refuse_images_made_otherwise(self) -> None:
        if not any(re.fullmatch(r"\d{6,}\.png", path.name) for path in self.out.iterdir()):
            return
        try:
            found = json.loads((self.out / SETTINGS).read_bytes())
            differs = {name: found[name] for name in self._made_with if found[name] != self._made_with[name]}
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            why = f"and no {SETTINGS} that tells how they were made"
        else:
            differs.pop("command", None)  # batch size and device make no other images
            if not differs:
                return
            name, value = next(iter(differs.items()))
            why = f"of {name} {reprlib.repr(value)}, not {reprlib.repr(self._made_with[name])}"
        raise UserError(f"out {self.out}: holds images {why}; name another folder, or delete this one first")

    def _list_images(self) -> None:
        rows = []
        for i, seed in enumerate(self.images.seeds):
            name, label = _image_name(i), self.images.class_of(i)
            if (self.out / name).is_file():
                row = {"file_name": name, "seed": int(seed)}
                row |= {} if label is None else {"label": str(label)}
                rows.append(json.dumps(row) + "\n")
        write_text(self.out / "metadata.jsonl", "".join(rows))

    def _summarise(self) -> None:
        chosen = self.images.chosen
        in_turn = self.images.order_seed is None and 1 < len(chosen) <= 16
        across = min(len(self._first), len(chosen) if in_turn else 8)
        with replacing(self.out / GRID) as partial:
            grid(self._first, across, scale=display_scale(self.images.width)).save(partial, "PNG")


ImageWriter = NpzImageWriter | ImageFolderWriter
"""Context managers with `add(images)`, for images uint8 (n, H, W, 3) in order."""


def _image_name(index: int) -> str:
    return f"{index:06d}.png"


def _ranges(seeds: Sequence[int]) -> str:
    """The text `parse_seeds` reads, with runs as first-last."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
