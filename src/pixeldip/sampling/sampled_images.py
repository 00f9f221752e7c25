"""A model on its device, and the images it makes of seeds."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from ..errors import UserError
from ..images import to_uint8
from ..model import DiP
from ..pipeline import PREDICTED, STATE, DiPPipeline
from ..processes import autocast, choose_precision, precision_name
from ..provenance import made_by
from ..settings import SamplingFlags, SamplingSettings
from .seeds import deal_classes, ranges

OnStep = Callable[[int, float, Tensor, Tensor], None]


def load_pipeline(
    model: str, device: torch.device, precision: torch.dtype = torch.float32, compiled: bool = False
) -> DiPPipeline:
    """The pipeline of a run folder, a saved folder or a hub id, on a device, with weights of a precision; its
    modulation is precomputed, and on a CUDA device it samples by CUDA graphs.

    Args:
        precision: int8 is of most products of the backbone, the rest in what "auto" is.
        compiled: with compiled blocks, which is done when a batch size first occurs, guided or not.

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
        UserError: if an argument is out of range, or the model's images are neither grey nor RGB.
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
        if (channels := pipeline.model.config.in_channels) not in (1, 3):
            raise UserError(f"{name}: makes images of {channels} channels; pictures have 1 or 3")
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
            UserError: if the model's output is not finite.
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
        which = {"seeds": ranges(self.seeds), "classes": self.chosen, "class_order_seed": self.order_seed}
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
