"""Folders, files and addresses as sources of images."""

import io
import json
import re
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

from pixeldip import UserError
from pixeldip.data import BrokenImage, class_count, decode, open_source
from pixeldip.recipe import DataSection

from .conftest import encoded, folder_images, make_picture


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
        ({"ant/0.png": "ant/.0.png", "bee/0.png": "bee/__0.png"}, 11, 2, ()),
        (
            {"ant/0.png": ".hidden/0.png", "bee/0.png": "__bee/0.png", "bee/1.png": "__MACOSX/._1.png"},
            *(9, 2),
            ("folders passed over, since their names begin with . or __ (.hidden, __bee); rename them if their",),
        ),
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


def test_numbers_are_classes_in_the_order_of_numbers(tmp_path: Path) -> None:
    numbers = [10, 2, 0, 11, -1, None, 2]
    pictures = [{"bytes": encoded(make_picture(k)), "path": None} for k in range(len(numbers))]
    columns = {"image": datasets.Image(), "label": datasets.Value("int64"), "name": datasets.Value("string")}
    rows = {"image": pictures, "label": numbers, "name": [f"{number}" for number in numbers]}
    datasets.Dataset.from_dict(rows, datasets.Features(columns)).to_parquet(tmp_path / "x.parquet")
    images = folder_images(tmp_path / "x.parquet")
    assert images.source.class_names == ("0", "2", "10", "11")
    assert [images.source.picture(k)[1] for k in (0, 1, 2, 3, 6)] == [2, 1, 0, 3, 1]
    for none in (4, 5):
        with pytest.raises(BrokenImage, match="class"):
            images.source.picture(none)
    assert (np.asarray(images.source.picture(3)[0]) == np.asarray(make_picture(3))).all()
    names = folder_images(tmp_path / "x.parquet", label_column="name").source.class_names
    assert names == ("-1", "0", "10", "11", "2", "None")


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
