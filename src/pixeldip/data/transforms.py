"""From an image file's bytes to a uint8 crop of the training size."""

import io
import math
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Image.init()
FORMATS = [
    name
    for name in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
    if name in Image.OPEN  # some are optional parts of Pillow
]
"""Of the kinds Pillow reads, those that pictures come in; EPS would start Ghostscript."""

_LONGEST = 16
"""Of a picture that is resized, its length in that of the crop: beyond that a small file would fill the memory."""


class BrokenImage(Exception):
    """A picture that cannot be read; the message says why."""


def decode(data: bytes) -> Image.Image:
    """An upright 8-bit RGB picture from the bytes of an image file.

    Greyscale, palette, CMYK and 16-bit pictures are converted, EXIF rotation is applied, and
    transparency is put on white. Of an animation the first frame is taken.

    Raises:
        BrokenImage: if the bytes are not a complete picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:  # its own message names a buffer, not the file
        raise BrokenImage(f"not a picture of a kind that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise BrokenImage(f"{type(error).__name__}: {error}") from error


def upright_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) that `decode` will return, by the file's header alone; None if that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # as in `decode`, which tells
        return None
    return image.size if on_its_side else (image.height, image.width)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB, transparency on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit greyscale, scaled, where convert() would clip; 32-bit files (mode "I") hold numbers of 16 bits or of 8
        pixels = np.asarray(image).clip(0, 65535)
        scale = 1 if image.mode == "I" and pixels.max() <= 255 else 257
        if image.mode != "I" and "transparency" in image.info:
            pixels = np.where(pixels == image.info["transparency"], 65535, pixels)
        return Image.fromarray((pixels / scale + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise ValueError("holds values that are not finite")
        scale = next((255 / white for white in (1, 255) if pixels.max() <= white), 255 / 65535)
        return Image.fromarray((pixels * scale + 0.5).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """ADM's crop: box-halve while both sides stay at least twice the target, then bicubic, then the centre.

    Returns:
        uint8 (height, width, 3). A picture smaller than the target is enlarged.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    kept = [min(whole, math.ceil(_LONGEST * side / scale)) for whole, side in zip(image.size, (width, height))]
    if image.size != tuple(kept):  # a strip, a few pixels high: its ends are cut off before they are enlarged, too
        image = ImageOps.crop(image, tuple((whole - part) // 2 for whole, part in zip(image.size, kept)))
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
