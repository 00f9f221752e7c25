"""From an image file's bytes to a picture and its crop."""

import numpy as np
import pytest
from PIL import Image

from pixeldip.data import BrokenImage, centre_crop, decode
from pixeldip.data.transforms import upright_size

from .conftest import encoded, make_picture


def test_greyscale_of_eight_and_sixteen_bits() -> None:
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    assert (np.asarray(decode(encoded(Image.fromarray(ramp)))) == ramp[..., None]).all()
    wide = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    for kind in ("PNG", "TIFF"):
        assert (np.asarray(decode(encoded(wide, kind))) == ramp[..., None]).all()
    for factor in (1, 257):  # 32-bit files hold either
        longer = Image.fromarray(ramp.astype(np.int32) * factor)
        assert (np.asarray(decode(encoded(longer, "TIFF"))) == ramp[..., None]).all()
    for factor in (1, 1 / 255, 257):  # and so do those of fractions
        fractions = Image.fromarray(ramp.astype(np.float32) * np.float32(factor))
        assert (np.asarray(decode(encoded(fractions, "TIFF"))) == ramp[..., None]).all()


def test_palette_and_transparency_end_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(decode(encoded(image))).tolist() == [[[200, 0, 0], [255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 200, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(palette, transparency=1))).tolist() == [[[0, 0, 200], [255, 255, 255]]]
    wide = Image.fromarray(np.array([[1000, 2570]], np.uint16))
    assert np.asarray(decode(encoded(wide, transparency=1000))).tolist() == [[[255, 255, 255], [10, 10, 10]]]
    grey_alpha = Image.new("LA", (1, 1), (0, 0))
    assert np.asarray(decode(encoded(grey_alpha))).tolist() == [[[255, 255, 255]]]


def test_cmyk() -> None:
    red = np.asarray(decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert red[..., 0].min() > 230 and red[..., 1:].max() < 40


def test_exif_rotation() -> None:
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    upright = decode(encoded(image, exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 0, 0)
    assert upright_size(encoded(image, exif=exif)) == (4, 2) and upright_size(encoded(image)) == (2, 4)


def test_what_is_no_picture() -> None:
    whole = encoded(make_picture(0, 200, 200), "JPEG")
    no_number = encoded(Image.fromarray(np.array([[0.5, np.nan]], np.float32)), "TIFF")
    for data in (b"", b"text", whole[: len(whole) // 2], no_number):
        with pytest.raises(BrokenImage):
            decode(data)


def test_a_decompression_bomb_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImage, match="DecompressionBomb"):
        decode(encoded(make_picture(0, 12, 12)))


def test_crop_is_adms() -> None:
    # 68 x 34 -> box-halved once to 34 x 17 (both sides at least twice 16), bicubic to 32 x 16, centre 16 x 16
    image = make_picture(3, 34, 68)
    by_hand = image.resize((34, 17), Image.Resampling.BOX).resize((32, 16), Image.Resampling.BICUBIC)
    assert (centre_crop(image, 16, 16) == np.asarray(by_hand.crop((8, 0, 24, 16)))).all()
    image = make_picture(4, 64, 64)  # a power of two of the target: halved all the way
    for _ in range(2):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    assert (centre_crop(make_picture(4, 64, 64), 16, 16) == np.asarray(image)).all()


def test_of_a_strip_no_more_is_enlarged_than_the_crop_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    strip, sizes, resize = make_picture(3, 3, 2001), [], Image.Image.resize
    whole = strip.resize((64 * 2001 // 3, 64), Image.Resampling.BICUBIC)
    left = (whole.width - 64) // 2

    def watched(image: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    crop = centre_crop(strip, 64, 64)
    differences = np.abs(crop - np.asarray(whole.crop((left, 0, left + 64, 64))).astype(int))
    assert differences.mean() < 0.05  # of 61, their standard deviation: half a pixel, of the 21 that each becomes
    assert centre_crop(strip.transpose(Image.Transpose.ROTATE_90), 64, 64).shape == (64, 64, 3)
    assert max(max(size) for size in sizes) < 20 * 64


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (100, 31)])
@pytest.mark.parametrize("target", [(16, 16), (8, 24)])
def test_crop_has_the_size_asked_for(size: tuple[int, int], target: tuple[int, int]) -> None:
    assert centre_crop(make_picture(0, *size), *target).shape == (*target, 3)
