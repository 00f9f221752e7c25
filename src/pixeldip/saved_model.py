"""A saved model's folder, looked through before anything in it is loaded: anyone can have made it."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from .errors import UserError
from .model import DiP
from .run_folder import NETWORK
from .settings import NonNegative, Positive, Steps, explained

INDEX, CONFIG = "model_index.json", "config.json"
Side = Annotated[int, Field(ge=1, le=16_384)]
Depth = Annotated[int, Field(ge=1, le=1000)]


class _Sampling(TypedDict, total=False):
    num_inference_steps: Steps
    solver: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    time_shift: float


class _Index(TypedDict):
    _class_name: str  # a list would name a class in a file of the folder
    model: tuple[Literal["pixeldip.model.dip"], Literal["DiP"]]
    scheduler: NotRequired[tuple[Literal["diffusers"], str] | tuple[None, None]]
    height: Side
    width: Side
    class_names: list[str]
    sampling: NotRequired[_Sampling]


class _Config(TypedDict, total=False):
    in_channels: Positive
    patch_size: Positive
    hidden_size: Positive
    depth: Depth
    num_heads: Positive
    mlp_ratio: Annotated[float, Field(gt=0)]
    num_classes: NonNegative
    head: str
    head_width: Positive | None
    head_depth: Depth | None
    placement: str
    prediction: str
    absolute_positions: bool


def check_saved_model(folder: Path) -> None:
    """Looks at what the folder claims: no code but pixeldip's and diffusers', no more weights than its files hold.

    Raises:
        UserError: naming the file and the value.
    """
    _read(folder / INDEX, _Index)
    config = _read(folder / NETWORK / CONFIG, _Config)
    try:
        with torch.device("meta"):
            claimed = DiP.from_config(config).num_parameters()
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:  # sizes that do not fit, or are beyond any
        reason, _, _ = str(error).partition("\n")
        raise UserError(f"{folder / NETWORK / CONFIG}: describes no network ({reason})") from error
    held = sum(file.stat().st_size for file in (folder / NETWORK).glob("*.safetensors"))
    if claimed > held:
        raise UserError(
            f"{folder / NETWORK}: {CONFIG} tells of {claimed:,} weights, and its .safetensors files have {held:,} "
            "bytes: incomplete, or not of one model"
        )


def _read(path: Path, kind: Any) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{path}: not of a model of pixeldip's ({explained(error)})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return values
