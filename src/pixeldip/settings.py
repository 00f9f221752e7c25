"""Settings that commands, recipes and the page share, typed and checked: how images come from noise, what is measured.

This module imports no torch, so that every command's --help answers at once.
"""

import dataclasses
import math
import operator
import os
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from .errors import UserError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def strict(cls: type) -> type:
    """A dataclass that takes no other keys than its fields, and no numbers that are not finite."""
    cls.__pydantic_config__ = _STRICT
    return cls


_ALTERNATIVE = re.compile(r"constrained-\w+|\w+\[.*\]")  # how pydantic names the types of a union in a path
_LARGEST = 2**63 - 1
Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=_LARGEST)]
LARGEST_SIDE = 16_384
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
"""Pixels of an image's height or width."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=1, le=100_000)]


_PIPELINE_ARGUMENTS = {
    "num_inference_steps": "steps",
    "solver": "solver",
    "guidance_scale": "guidance",
    "guidance_interval": "guidance_interval",
    "time_shift": "time_shift",
    "backbone_every": "backbone_every",
}


Solver = Literal["euler", "heun", "ab2", "ddim", "ancestral"]
"""The names of `flow.SOLVERS`."""
Device = Literal["auto", "cpu", "cuda", "mps"]
FloatPrecision = Literal["auto", "bf16", "fp32"]
"""What a model trains in. auto: bf16 or fp32, as `choose_precision` finds."""
Precision = Literal["auto", "bf16", "fp32", "int8"]
"""What it samples in, likewise; int8 is of most products of its backbone, and the rest in auto."""


@strict
@dataclass
class SamplingSettings:
    """How images come from noise."""

    steps: Steps = 50
    solver: Solver = "euler"
    guidance: float = 4.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[Fraction, Fraction] = (0.1, 1.0)
    """Times between which steps are guided; 0 is noise, 1 is the image."""
    time_shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 takes more of the steps at noisy times."""
    backbone_every: Positive = 1
    """K: the backbone is computed at one evaluation of the network in K; at the others the head alone."""

    def pipeline_arguments(self) -> dict[str, Any]:
        """The keywords `DiPPipeline.__call__` knows these settings by."""
        return {keyword: getattr(self, name) for keyword, name in _PIPELINE_ARGUMENTS.items()}

    @classmethod
    def from_pipeline_arguments(cls, values: Mapping[str, Any]) -> "SamplingSettings":
        """The other way round; what is not there takes the default.

        Raises:
            UserError: naming a keyword that is none of these, or a value that is out of range.
        """
        if unknown := sorted(values.keys() - _PIPELINE_ARGUMENTS):
            raise UserError(f"sampling settings: {unknown[0]!r} is none of {', '.join(_PIPELINE_ARGUMENTS)}")
        settings = cls(**{_PIPELINE_ARGUMENTS[keyword]: value for keyword, value in values.items()})
        return check_values(settings, lambda name: f"sampling settings: {name}")


@strict
@dataclass
class SamplingFlags:
    """How images come from noise. What is left out is as the model was saved to be sampled; of a run, as its previews
    are."""

    steps: Steps | None = None
    solver: Solver | None = None
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[Fraction, Fraction] | None = None
    """Times between which steps are guided; 0 is noise, 1 is the image."""
    time_shift: Annotated[float, Field(gt=0)] | None = None
    """Above 1 takes more of the steps at noisy times."""
    backbone_every: Positive | None = None
    """K: the backbone is computed at one evaluation of the network in K; at the others the head alone."""

    def settings(self, own: SamplingSettings) -> SamplingSettings:
        """What was given, and for the rest the model's own settings."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingFlags)}
        return dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})


@strict
@dataclass
class EvaluationOptions:
    """What is measured, against what, and how."""

    reference: str = ""
    """An ADM reference .npz (mu, sigma, mu_s, sigma_s, arr_0), or real images: a folder, parquet file or hub id."""
    reference_split: str = "train"
    metrics: tuple[str, ...] = ()
    """Of fid sfid is precision recall kid (Inception), fd_dinov2 kid_dinov2, kid_efficientnet
    fd_mid_efficientnet fd_pool_efficientnet (no download), boundary, nearest."""
    train_images: str = ""
    """The training images, for nearest: how near samples come to them."""
    train_split: str = "train"
    inception_weights: Path | None = None
    """weights-inception-2015-12-05-6726825d.pth; None: in torch's cache, fetched if it is not there."""
    dinov2: str = "facebook/dinov2-large"
    """Hub id or folder of the DINOv2 model."""
    pr_distance: Literal["adm", "float32"] = "adm"
    """Precision and recall: float16 distances as in ADM's evaluator, or float32."""
    is_split: Positive = 5000
    """Images per split of the Inception Score."""
    is_order: Literal["file", "shuffled"] = "file"
    """Splits of consecutive images, as in ADM, or of images in a seeded random order."""
    patch_size: Annotated[int, Field(ge=2)] | None = None
    """For boundary: pixels between the borders looked at; None: that of the model the samples come from, else 16."""
    evaluation_batch_size: Positive = 64
    """Images through the feature networks at once."""
    allow_resolution_mismatch: bool = False
    require_balanced: bool = False
    """Refuse samples whose classes differ in number."""
    verify: bool = True
    """Compare the checksums of .npz files before anything else."""
    cache: bool = True
    """Keep the features of reference images for the next time."""


@dataclass
class PlanOptions:
    """What `pixeldip train --plan` reckons with."""

    devices: tuple[Positive, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of devices, with one process of DistributedDataParallel each."""
    device: str = "H100"
    """H100, H200, A100, L40S, "RTX 4090" or "H100 PCIe": speed and memory of its data sheet."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of that speed, in bf16, which the FLOPs of a step reach. Llama 3's training reached 0.38 to 0.43 on H100s
    (Grattafiori et al. 2024, Table 4)."""
    price: Annotated[float, Field(gt=0)] | None = None
    """Of one device for one hour; None: no cost."""
    classes: NonNegative | None = None
    """None: those that data.source's folders or schema show, or ImageNet's 1000."""


def check_flags(arguments: Any) -> None:
    """Checks a command's arguments, a dataclass, against the ranges of their types, and puts the user's folder in place
    of ~, as shells do where it is not quoted or behind an =.

    Raises:
        UserError: naming the flags.
    """
    check_values(arguments, lambda name: f"--{name.replace('_', '-')}")
    for field in dataclasses.fields(arguments):
        setattr(arguments, field.name, _expanded(getattr(arguments, field.name)))


def _expanded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


def refuse_flags(arguments: Any, foreign: Collection[str], why: str) -> None:
    """Refuses those of a command's arguments, a dataclass, that mean nothing to what it is to do.

    Args:
        why: the rest of the sentence that begins with the flag.

    Raises:
        UserError: naming the first of them that differs from its default.
    """
    for field in dataclasses.fields(arguments):
        if field.name in foreign and getattr(arguments, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} {why}")


def check_values(settings: Any, spelling: Callable[[str], str]) -> Any:
    """A dataclass checked against the ranges of its types, its values turned into them.

    Args:
        spelling: a field's name as the user knows it.

    Raises:
        UserError: naming the values that are out of range.
    """
    try:
        return TypeAdapter(type(settings)).validate_python(vars(settings))
    except ValidationError as error:
        found: dict[str, str] = {}
        for e in error.errors():  # one each: a list whose values are refused counts as empty, too
            found.setdefault(spelling(str(e["loc"][0])), _found(e))
        raise UserError("; ".join(f"{name}: {why}" for name, why in found.items())) from None


def whole_number(name: str, value: Any) -> int:
    """An argument in Python, perhaps of numpy or torch, as a plain number; UserError unless it is whole."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} {value!r}: give a whole number") from None


def finite_number(name: str, value: Any) -> float:
    """Likewise; UserError unless it is finite."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of tensors
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} {value!r}: give a finite number")
    return number


def explained(error: ValidationError) -> str:
    """Each value that was refused: where, why, and what was found."""
    return "; ".join(where_and_why(e) for e in error.errors())


def where_and_why(error: Any) -> str:
    """One of a ValidationError's errors()."""
    parts = [str(part) for part in error["loc"]]
    path = [part for part in parts if not _ALTERNATIVE.fullmatch(part)] or ["all of it"]
    return f"{'.'.join(path)}: {_found(error)}"


class _Shortened(reprlib.Repr):
    """Of what was found, at most some 200 characters."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < 10**100 else "a number of more than 100 digits"


def _found(error: Any) -> str:
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {_Shortened().repr(error['input'])}"
