"""Between tensors in [-1, 1] and pictures: uint8 conversion, grids, files that say how they were made."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .errors import UserError
from .files import replacing, writing

NOTE = "pixeldip"  # the key of the PNG text chunk that says how a picture was made
SETTINGS = "settings.json"  # beside sampled images, how they were made
GRID = "grid.png"  # beside sampled images, the first of them in one picture


def to_uint8(x: Tensor) -> Tensor:
    """(..., C, H, W) in [-1, 1] -> uint8, as the release rounds: clip((x + 1) * 127.5 + 0.5), truncated."""
    return ((x.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """uint8 (..., C, H, W) -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_pil(x: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] -> B pictures; C is 3 (RGB) or 1 (grey)."""
    array = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in array]


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """Pictures of one size, row by row on white, each pixel `scale` screen pixels wide."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height * scale + gap) - gap, columns * (width * scale + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height * scale + gap), (i % columns) * (width * scale + gap)
        pixels = np.asarray(image.convert("RGB")).repeat(scale, 0).repeat(scale, 1)
        sheet[top : top + height * scale, left : left + width * scale] = pixels
    return Image.fromarray(sheet)


def enlarged(picture: Image.Image, scale: int) -> Image.Image:
    """The picture with each pixel `scale` screen pixels wide."""
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def display_scale(width: int, target: int = 96) -> int:
    """How many times to enlarge pictures of this width so that a person can judge them."""
    return max(1, round(target / width))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; infinite if they are equal."""
    error = np.square(a.astype(np.float64) - b).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def save_png(picture: Image.Image, path: Path, made_with: dict[str, Any]) -> None:
    """Writes or replaces a picture in one step. It says how it was made.

    Raises:
        UserError: if it cannot be written.
    """
    note = PngInfo()
    note.add_text(NOTE, json.dumps(made_with))
    with writing(path), replacing(path) as partial:
        picture.save(partial, "PNG", pnginfo=note)


def read_note(path: Path) -> dict[str, Any]:
    """How a picture that `save_png` wrote was made. Anyone can have written the file: check what comes back.

    Raises:
        UserError: if it is no such picture.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            note = json.loads(picture.info[NOTE])
    except UnidentifiedImageError:
        raise UserError(f"{path.name}: not a PNG file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or error  # without the path, which a page's visitor has not chosen
        raise UserError(f"{path.name}: not a PNG file that can be read ({why})") from None
    except RecursionError:
        raise UserError(f"{path.name}: its note on how it was made is not one of pixeldip's") from None
    except KeyError:
        raise UserError(f"{path.name}: does not say how it was made; pixeldip's own PNG files do") from None
    if not isinstance(note, dict):
        raise UserError(f"{path.name}: its note on how it was made is not one of pixeldip's")
    return note
