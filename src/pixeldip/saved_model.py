"""A saved model's folder, looked through before anything in it is loaded: anyone can have made it."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from .errors import UserError
from .model import DiP
from .run_folder import NETWORK
from .settings import NonNegative, Positive, Side, Steps, explained
from .terminal import some

INDEX, CONFIG = "model_index.json", "config.json"
WEIGHTS = r"diffusion_pytorch_model(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.safetensors"
Depth = Annotated[int, Field(ge=1, le=1000)]


class _Sampling(TypedDict, total=False):
    num_inference_steps: Steps
    solver: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    time_shift: float
    backbone_every: Positive


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
    """Looks at what the folder claims: no code but pixeldip's and diffusers', and the weights that its files hold.

    Raises:
        UserError: naming the file and the value, or the tensors.
    """
    _read(folder / INDEX, _Index)
    config = _read(folder / NETWORK / CONFIG, _Config)
    try:
        with torch.device("meta"):
            model = DiP.from_config(config)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:  # sizes that do not fit, or are beyond any
        reason, _, _ = str(error).partition("\n")
        raise UserError(f"{folder / NETWORK / CONFIG}: describes no network ({reason})") from error
    files = list((folder / NETWORK).glob("*.safetensors"))
    claimed, held = model.num_parameters(), sum(file.stat().st_size for file in files)
    if claimed > held:
        raise UserError(
            f"{folder / NETWORK}: {CONFIG} tells of {claimed:,} weights, and its .safetensors files have {held:,} "
            "bytes: incomplete, or not of one model"
        )
    _compare_tensors(model, files, folder / NETWORK)


def only_variant(folder: Path) -> str | None:
    """The variant that the folder's weights are of, as diffusers has it in the names of their files; None if they are
    of none, or there are such beside it.

    Raises:
        UserError: if there are several, and any may be meant.
    """
    named = (re.fullmatch(WEIGHTS, path.name) for path in (folder / NETWORK).glob("*.safetensors"))
    variants = {found["variant"] for found in named if found}
    if None in variants or not variants:
        return None
    if len(variants) > 1:
        one, *others = sorted(variants)
        raise UserError(
            f"{folder / NETWORK}: holds weights of the variants {one} and {' and '.join(others)}; say in Python which, "
            f'from_pretrained(…, variant="{one}"), or keep the files of one'
        )
    return variants.pop()


def _compare_tensors(model: DiP, files: Iterable[Path], folder: Path) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
    wrong = {
        "missing": [name for name in expected if name not in found],
        "surplus": [name for name in found if name not in expected],
        "of another shape": [name for name in expected if found.get(name, expected[name]) != expected[name]],
    }
    if told := "; ".join(f"{kind}: {some(names, 3)}" for kind, names in wrong.items() if names):
        raise UserError(f"{folder}: its weights are not those of the network that {CONFIG} describes ({told})")


def _read(path: Path, kind: Any) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{path}: not of a model of pixeldip's ({explained(error)})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return values
