"""Sources, decoding, crops, order, broken files."""

import io
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pixeldip import UserError
from pixeldip.data import (
    Batches,
    BrokenImage,
    EpochOrder,
    PositionSampler,
    TrainingImages,
    centre_crop,
    class_count,
    decode,
    open_source,
)
from pixeldip.data.order import is_flipped
from pixeldip.data.transforms import upright_size
from pixeldip.recipe import DataSection

from .conftest import QUIET, make_picture


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
    for factor in (1, 1 / 255):  # and so do those of fractions
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
    for data in (b"", b"text", whole[: len(whole) // 2]):
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


def test_pictures_that_are_enlarged_are_told(picture_folder: Path) -> None:
    def told(resolution: int | tuple[int, int]) -> list[str]:
        section = DataSection(source=str(picture_folder), resolution=resolution)
        return TrainingImages(open_source(section), section, seed=0).warnings()

    make_picture(0, 8, 60).save(picture_folder / "ant" / "small.png")
    (picture_folder / "bee" / "broken.png").write_bytes(b"no picture")
    (warning,) = told(40)
    assert "1 of 13 images are smaller than 40x40 (one is 8x60); they are enlarged" in warning
    assert "12 of 13 images" in told((8, 56))[0] and not told((8, 48))


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order() -> None:
    order = EpochOrder(50, seed=1)
    epochs = [[order[50 * e + i] for i in range(50)] for e in range(2)]
    for e, epoch in enumerate(epochs):
        assert {number for number, _ in epoch} == {e}
        assert sorted(index for _, index in epoch) == list(range(50))
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert EpochOrder(50, seed=1)[77] == order[77] and EpochOrder(50, seed=2)[77] != order[77]


def test_processes_share_a_batch_without_overlap() -> None:
    whole = [p for part in PositionSampler(8, 3, 5, 1, 0, 1) for p in part]
    assert whole == list(range(24, 40))
    shares = [list(PositionSampler(8, 3, 5, 2, rank, 2)) for rank in range(2)]
    assert all(len(share) == len(PositionSampler(8, 3, 5, 2, 0, 2)) == 4 for share in shares)
    assert sorted(p for share in shares for part in share for p in part) == whole


def folder_images(folder: Path, **section) -> TrainingImages:
    settings = DataSection(source=str(folder), resolution=16, **section)
    return TrainingImages(open_source(settings), settings, seed=0)


def test_folder_with_classes(picture_folder: Path) -> None:
    source = open_source(DataSection(source=str(picture_folder)))
    assert source.class_names == ("ant", "bee") and len(source) == 12
    assert [source.read(i)[1] for i in (0, 11)] == [0, 1]
    assert open_source(DataSection(source=str(picture_folder), label_column="none")).class_names == ()


def test_folder_without_classes(picture_folder: Path) -> None:
    source = open_source(DataSection(source=str(picture_folder / "ant")))
    assert source.class_names == () and len(source) == 6


@pytest.mark.parametrize(
    ("moved", "used", "classes", "told"),
    [
        ({}, 12, 2, ()),
        ({"ant/0.png": ".hidden/0.png", "bee/0.png": "bee/__0.png"}, 11, 2, ()),
        ({"ant/0.png": "ant/test.txt"}, 11, 2, ()),
        (
            {"ant/0.png": "cover.png"},
            *(12, 0),
            ("no classes, since not all images lie as deep as ant/1.png: cover.png; move them for a class",),
        ),
        (
            {"ant": "train/ant", "bee": "test/bee"},
            *(6, 0),
            ("6 of its 12 images are used, those of split train: names of its folders or files tell splits",),
        ),
        ({"ant": "a steam train"}, 6, 0, ("6 of its 12 images are used",)),
        (
            {"bee/0.png": "bee/0.avif", "bee/1.png": "bee/1.HEIC", "bee/2.png": "bee/2"},
            *(9, 2),
            ("files passed over, since they are not named as images that are read (1 without an ext", "1 .avif, 1 .h"),
        ),
    ],
)
def test_what_is_not_used_of_a_folder_is_told(
    picture_folder: Path, moved: dict[str, str], used: int, classes: int, told: tuple[str, ...]
) -> None:
    for old, new in moved.items():
        (picture_folder / new).parent.mkdir(exist_ok=True)
        (picture_folder / old).rename(picture_folder / new)
    section = DataSection(source=str(picture_folder))
    source = open_source(section)
    assert (len(source), len(source.class_names), class_count(section)) == (used, classes, classes)
    assert len(source.warnings) == bool(told) and all(text in source.warnings[0] for text in told)
    section.label_column = "none"
    assert not any("no classes" in warning for warning in open_source(section).warnings)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_images_that_a_metadata_file_does_not_name_are_told(picture_folder: Path, kind: str) -> None:
    rows = [{"file_name": f"{i}.png", "label": str(i % 3)} for i in range(6)]
    lines = map(json.dumps, rows) if kind == "jsonl" else (",".join(row) for row in [rows[0], *map(dict.values, rows)])
    (picture_folder / "ant" / f"metadata.{kind}").write_text("\n".join(lines))
    section = DataSection(source=str(picture_folder))
    source = open_source(section)
    assert (len(source), len(source.class_names), class_count(section)) == (6, 3, 3)
    left_out = ", ".join(f"bee/{i}.png" for i in range(6))
    (warning,) = source.warnings
    assert f"ant/metadata.{kind} names 6 of 12 images, and the others are left out: {left_out}; name them" in warning
    assert not open_source(DataSection(source=str(picture_folder / "ant"))).warnings


def test_a_folder_of_files_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image, .parquet or .tar files in this folder; .*\(1 .heic\); make them"):
        open_source(DataSection(source=str(tmp_path)))


def test_parquet_and_webdataset_hold_the_same(picture_folder: Path, tmp_path: Path) -> None:
    parquet, tar = tmp_path / "p" / "x.parquet", tmp_path / "w" / "x.tar"
    for path in (parquet, tar):
        path.parent.mkdir()
    datasets.load_dataset("imagefolder", data_dir=str(picture_folder), split="train").to_parquet(parquet)
    with tarfile.open(tar, "w") as archive:
        for k, path in enumerate(sorted(picture_folder.rglob("*.png"))):
            archive.add(path, f"{k:03d}.png")
            label = str(int(path.parent.name == "bee")).encode()
            entry = tarfile.TarInfo(f"{k:03d}.cls")
            entry.size = len(label)
            archive.addfile(entry, io.BytesIO(label))
    folder = folder_images(picture_folder)
    for path in (parquet, tar.parent):
        other = folder_images(path)
        assert len(other.source.class_names) == 2
        for position in range(12):
            (a, label_a, *_), (b, label_b, *_) = folder[position], other[position]
            assert (a == b).all() and label_a == label_b


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/training/a.parquet", "data/eval/b.parquet"),
        ("test-drawings/a.parquet", "test-drawings/b_test.parquet"),
        ("a.parquet", "test/a.parquet"),
    ],
)
@pytest.mark.parametrize("far", [False, True])
def test_shards_are_of_the_split_they_are_named_after(
    names: tuple[str, str], far: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    folder = tmp_path / "train-my-test"  # what is above says nothing
    store = fsspec.filesystem("memory")
    for name, split in zip(names, ("train", "test")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        open_source(DataSection(source="emoji", split=split)).rows.to_parquet(folder / name)
        store.pipe(f"{folder}/{name}", (folder / name).read_bytes())
    source = f"memory://{folder}" if far else str(folder)
    expected = {"train": 40, "test": 10}
    if "test-drawings" in names[0]:
        names, expected = (names[1],), {"test": 50}
    for split, count in expected.items():
        assert len(open_source(DataSection(source=source, split=split))) == count
    with pytest.raises(UserError, match="Unknown split"):
        open_source(DataSection(source=source, split="validation"))


def test_shards_in_an_object_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """fsspec's store in memory is read as those behind a network are."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    bundled = open_source(DataSection(source="emoji"))
    half = len(bundled) // 2
    store = fsspec.filesystem("memory")
    for name, rows in {"b": range(half, len(bundled)), "a": range(half)}.items():
        bundled.rows.select(rows).to_parquet(tmp_path / name)
        store.pipe(f"/bucket/shards/{name}.parquet", (tmp_path / name).read_bytes())
    far = open_source(DataSection(source="memory://bucket/shards"))
    assert far.class_names == bundled.class_names
    assert [far.read(i)[:2] for i in range(len(far))] == [bundled.read(i)[:2] for i in range(len(bundled))]
    (one,) = {len(open_source(DataSection(source=f"memory://bucket/shards/{name}.parquet"))) for name in "ab"}
    assert one == half
    for source, message in {
        "memory://bucket/empty": "no .parquet or .tar files there",
        "teapot://bucket/shards": "cannot be reached (Protocol not known: teapot)",
        "gs://bucket/shards": "gcsfs",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            open_source(DataSection(source=source))


def test_bundled_pictures() -> None:
    train, test = (open_source(DataSection(source="emoji", split=split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (40, 10) and train.class_names == test.class_names
    assert np.bincount(train.labels()).tolist() == [4] * 10 and sorted(test.labels()) == list(range(10))
    assert decode(train.read(0)[0]).size == (128, 128)
    assert not {train.read(i)[0] for i in range(40)} & {test.read(i)[0] for i in range(10)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the name of the images is empty"),
        ("./nowhere", "no such folder"),
        ("{tmp}/empty", "no image, .parquet or .tar files"),
        ("{tmp}", r"holds \.parquet and pictures; give a folder that holds one kind"),
        ("{tmp}/notes.txt", "neither .parquet nor .tar"),
        ("{tmp}/fake.parquet", "fake.parquet"),
        ("someone/never-cached", "someone/never-cached"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "fake.parquet").write_text("x")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_source(DataSection(source=source.format(tmp=tmp_path)))


def shard(path: Path, entry: bytes) -> None:
    """Two pictures with a .cls entry each."""
    with tarfile.open(path, "w") as archive:
        for name, data in {"0.png": encoded(make_picture(0)), "0.cls": b"1", "1.png": b"", "1.cls": entry}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def table(path: Path, **columns: list) -> None:
    pq.write_table(pa.table({"image": [encoded(make_picture(i)) for i in range(2)], **columns}), path)


@pytest.mark.parametrize(
    ("write", "good", "bad", "message"),
    [
        (shard, {"entry": b"0"}, {"entry": b"ant"}, r"b'ant'; a .cls entry is the number .*: --data.label-column txt$"),
        (table, {"label": [0, 1]}, {"label": ["a", "b"]}, "; all shards must have the same columns, of the same types"),
        (table, {"label": [0, 1]}, {"kind": [0, 1]}, "; all shards must have the same columns, of the same types"),
        (table, {}, None, "Parquet file size is 0 bytes"),
    ],
)
def test_the_shard_that_cannot_be_read_is_named(
    write: Callable, good: dict, bad: dict | None, message: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    first, second = (tmp_path / f"{name}.{'tar' if write is shard else 'parquet'}" for name in "ab")
    write(first, **good)
    second.touch() if bad is None else write(second, **bad)
    with pytest.raises(UserError, match=f"^{tmp_path}: {second}: .*{message}"):
        open_source(DataSection(source=str(tmp_path)))
    assert "Failed" not in capfd.readouterr().err


def test_columns_of_bytes_are_images_by_choice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table(path, label=["ant", "bee"])
    with pytest.raises(UserError, match=r"no column of images; .*; if image holds images' files: --data.image-col"):
        open_source(DataSection(source=str(path)))
    source = open_source(DataSection(source=str(path), image_column="image"))
    assert source.class_names == ("ant", "bee") and source.picture(1)[:2] == (make_picture(1), 1)


def test_columns_that_are_not_there(picture_folder: Path) -> None:
    with pytest.raises(UserError, match="no column of images called pic; its columns are image, label"):
        open_source(DataSection(source=str(picture_folder), image_column="pic"))
    with pytest.raises(UserError, match="label column kind: no such column"):
        open_source(DataSection(source=str(picture_folder), label_column="kind"))


@pytest.fixture
def damaged_folder(picture_folder: Path) -> Path:
    """The twelve pictures and four files that are none."""
    whole = encoded(make_picture(0, 200, 200), "JPEG")
    (picture_folder / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (picture_folder / "ant" / "empty.png").write_bytes(b"")
    (picture_folder / "bee" / "text.png").write_text("not a picture")
    shutil.copy(picture_folder / "bee" / "0.png", picture_folder / "bee" / "cut.png")
    with (picture_folder / "bee" / "cut.png").open("r+b") as file:
        file.truncate(60)
    return picture_folder


@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_files_are_named_and_replaced(damaged_folder: Path, in_memory: bool) -> None:
    images = folder_images(damaged_folder, max_broken=0.5, in_memory=in_memory, workers=0)
    if in_memory:
        images.load_into_memory(QUIET)
    broken: dict[int, str] = {}
    for batch in Batches(images, PositionSampler(4, 0, 4, 1, 0, 1), pin_memory=False):
        assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.uint8
        broken |= batch.broken
    assert sorted(Path(why.split(": ")[0]).name for why in broken.values()) == [
        "cut.jpg",
        "cut.png",
        "empty.png",
        "text.png",
    ]


def test_a_worker_that_finds_too_many_broken_says_it_in_one_message(damaged_folder: Path) -> None:
    images = folder_images(damaged_folder, max_broken=0, in_memory=False, workers=1)
    with pytest.raises(UserError, match=r"^data.source .*: 1 of 16 images cannot be read, more than .*\n[^\n]*$"):
        list(Batches(images, PositionSampler(4, 0, 4, 1, 0, 1), pin_memory=False))


def test_where_nothing_can_be_read_the_search_ends(damaged_folder: Path) -> None:
    for path in (damaged_folder / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="8 of 8 images cannot be read"):
        folder_images(damaged_folder / "bee", max_broken=1.0)[0]


def test_what_is_too_large_for_the_memory_is_not_kept_there(picture_folder: Path) -> None:
    def kept(resolution: int, in_memory: bool | None = None) -> bool:
        section = DataSection(source=str(picture_folder), resolution=resolution, in_memory=in_memory)
        return TrainingImages(open_source(section), section, seed=0).fits_in_memory()

    assert kept(16) and not kept(8192)  # twelve images: 9 kB and 2.4 GB
    assert kept(8192, in_memory=True) and not kept(16, in_memory=False)


def test_in_memory_or_not_the_run_is_the_same(damaged_folder: Path) -> None:
    kept, read = (folder_images(damaged_folder, max_broken=0.5, flip=True) for _ in range(2))
    kept.load_into_memory(QUIET)
    for position in range(40):
        a, b = kept[position], read[position]
        assert (a[0] == b[0]).all() and a[1:] == b[1:]


def test_flips_change_between_epochs_and_are_fair(picture_folder: Path) -> None:
    plain, flipped = folder_images(picture_folder), folder_images(picture_folder, flip=True)
    mirrored = [not (plain[p][0] == flipped[p][0]).all() for p in range(240)]
    assert 80 < sum(mirrored) < 160
    shown = {(flipped.order[position][1], was) for position, was in enumerate(mirrored)}
    assert len(shown) == 2 * 12  # each picture, as it is and mirrored
    assert mirrored != [is_flipped(1, *flipped.order[position]) for position in range(240)]  # by another seed
    for position, was in enumerate(mirrored):
        if was:
            assert (plain[position][0][:, ::-1] == flipped[position][0]).all()


@pytest.mark.parametrize("in_memory", [True, False])
def test_too_many_broken_files_stop_the_run(damaged_folder: Path, in_memory: bool) -> None:
    images = folder_images(damaged_folder, max_broken=0.05, in_memory=in_memory)
    with pytest.raises(UserError, match=r"cannot be read, more than data.max_broken = 0.05 allows(.|\n)*\.(jpg|png)"):
        if in_memory:
            images.load_into_memory(QUIET)
        for position in range(16):
            images[position]


def test_worker_processes_give_the_same_batches(picture_folder: Path) -> None:
    alone, helped = (folder_images(picture_folder, flip=True, workers=w, in_memory=False) for w in (0, 1))
    sampler = PositionSampler(4, 2, 5, 1, 0, 1)
    for a, b in zip(Batches(alone, sampler, False), Batches(helped, sampler, False), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.positions == b.positions
