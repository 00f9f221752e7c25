"""Pictures of strangers, and folders and tables of them."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import features
from rich.console import Console

from pixeldip import UserError
from pixeldip.data import BrokenImage, Source, TrainingImages, decode, fingerprint, open_source
from pixeldip.images import NOTE, read_note
from pixeldip.recipe import DataSection

from ..conftest import make_picture
from .common import FUZZ, HOSTILE_NAMES, JSON, Payload

# pictures


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    make_picture(0, 12, 14).save(buffer, kind)
    return buffer.getvalue()


KINDS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", *(["WEBP"] if features.check("webp") else [])]


@settings(max_examples=300, **FUZZ)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_damaged_pictures_are_pictures_or_broken(data: st.DataObject, kind: str) -> None:
    raw = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    with contextlib.suppress(BrokenImage):
        assert decode(bytes(raw[:cut])).mode == "RGB"


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


BOMB = zlib.compress(bytes(100 * 2**20))


@pytest.mark.parametrize(
    "data",
    [
        png(60_000, 60_000),
        png(13_000, 12_000),
        png(4, 4, (b"zTXt", NOTE.encode() + b"\0\0" + BOMB)),
        png(4, 4, (b"iTXt", NOTE.encode() + b"\0\1\0\0\0" + BOMB)),
        png(4, 4, (b"iCCP", b"x\0\0" + BOMB)),
        png(4, 4, (b"tEXt", NOTE.encode() + b"\0" + b"9" * 5000)),
        png(4, 4, (b"tEXt", NOTE.encode() + b"\0" + b"[" * 100_000)),
    ],
    ids=["pixels", "fewer pixels", "zTXt", "iTXt", "iCCP", "digits", "brackets"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BrokenImage):
        decode(data)
    with pytest.raises(UserError, match=r"a\.png"):
        read_note(tmp_path / "a.png")


@settings(max_examples=200, **FUZZ)
@given(data=st.data(), note=JSON.map(json.dumps) | st.text(max_size=20))
def test_notes_in_pictures(data: st.DataObject, note: str, tmp_path: Path) -> None:
    raw = bytearray(png(4, 4, (b"iTXt", NOTE.encode() + b"\0\0\0\0\0" + note.encode("utf-8", "replace"))))
    for _ in range(data.draw(st.integers(0, 2))):
        raw[data.draw(st.integers(8, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.png").write_bytes(raw)
    with contextlib.suppress(UserError):
        assert isinstance(read_note(tmp_path / "a.png"), dict)


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with pytest.raises(BrokenImage, match="not a picture of a kind that is read"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert not (tmp_path / "ran").exists()


# folders and tables of pictures


def why_broken(source: Source) -> list[str]:
    found = []
    for i in range(len(source)):
        try:
            source.picture(i)
        except BrokenImage as error:
            found.append(str(error))
    return found


def test_links_are_followed_and_those_that_lead_nowhere_are_broken(picture_folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    make_picture(99).save(elsewhere / "x.png")
    (picture_folder / "ant" / "linked.png").symlink_to(elsewhere / "x.png")
    (picture_folder / "cow").symlink_to(elsewhere)
    (picture_folder / "bee" / "up").symlink_to("..")
    source = open_source(DataSection(source=str(picture_folder)))
    assert source.class_names == ("ant", "bee", "cow") and why_broken(source) == []
    assert np.bincount(source.labels()).tolist() == [7, 6, 1]
    (picture_folder / "ant" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (picture_folder / "bee" / "itself.png").symlink_to("itself.png")
    os.mkfifo(picture_folder / "bee" / "pipe.png")
    section = DataSection(source=str(picture_folder), resolution=16)
    source = open_source(section)
    assert len(source) == len(source.labels()) == 17
    assert sorted(why.removeprefix(f"{picture_folder}/") for why in why_broken(source)) == [
        "ant/nowhere.png: a link that leads nowhere",
        "bee/itself.png: a link that leads nowhere",
        "bee/pipe.png: not a file",
    ]
    with pytest.raises(UserError, match=r"3 of 17 images cannot be read, more than data\.max_broken(.|\n)*nowhere"):
        TrainingImages(source, section, seed=0).load_into_memory(Console(quiet=True))


def test_a_split_that_is_a_folder_of_links(picture_folder: Path, tmp_path: Path) -> None:
    for split, name in (("train", "ant"), ("test", "bee")):
        (tmp_path / "data" / split).mkdir(parents=True)
        for copy in ("a", "b"):
            (tmp_path / "data" / split / copy).symlink_to(picture_folder / name)
    for split in ("train", "test"):
        source = open_source(DataSection(source=str(tmp_path / "data"), split=split))
        assert (len(source), source.class_names) == (12, ("a", "b"))
        shutil.copytree(picture_folder, tmp_path / "named" / split)
    with pytest.raises(UserError, match=r"no images of split val; names .* tell the splits train, test; choose"):
        open_source(DataSection(source=str(tmp_path / "named"), split="val"))
    with pytest.raises(UserError, match="no images of split test: no name in it tells a split, so all are of split tr"):
        open_source(DataSection(source=str(picture_folder), split="test"))


def test_names_of_any_kind(picture_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos [2024] *"
    shutil.move(picture_folder, folder)
    for name in HOSTILE_NAMES:
        shutil.copytree(folder / "bee", folder / name)
        (folder / "ant" / f"{name}.png").write_bytes(b"")
    source = open_source(DataSection(source=str(folder)))
    assert set(source.class_names) == {"ant", "bee", *HOSTILE_NAMES}
    broken = why_broken(source)
    assert len(broken) == len(HOSTILE_NAMES) and not any(c in why for why in broken for c in "\n\x1b\x07")


def test_a_name_that_is_not_unicode(picture_folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(picture_folder) + b"/ant/\xff.png"))).write_bytes(encoded("PNG"))
    with pytest.raises(UserError, match=r"utf-8.*surrogates not allowed"):
        open_source(DataSection(source=str(picture_folder)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("name", ["../elsewhere.png", "/etc/hostname"])
def test_metadata_stays_in_its_folder(kind: str, name: str, picture_folder: Path) -> None:
    make_picture(9).save(picture_folder.parent / "elsewhere.png")
    rows = {"jsonl": json.dumps({"file_name": name}), "csv": f"file_name,x\n{name},1"}
    (picture_folder / f"metadata.{kind}").write_text(rows[kind])
    with pytest.raises(UserError, match="file_name"):
        open_source(DataSection(source=str(picture_folder)))


def parquet(path: Path, images: list, labels: list | None = None) -> Path:
    columns = {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    kinds = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        kinds["label"] = {"_type": "ClassLabel", "names": ["a", "b"]}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})
    pq.write_table(table, path)
    return path


def test_tables_that_name_files(tmp_path: Path) -> None:
    good = {"bytes": encoded("PNG"), "path": "esc\x1b[31m.png"}
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**31)
    paths = ["/dev/zero", "/etc/passwd", "/tmp", "\0", str(tmp_path / "sparse"), "http://127.0.0.1:9/x.png"]
    rows = [good, None, {"bytes": None, "path": None}, *({"bytes": None, "path": path} for path in paths)]
    source = open_source(DataSection(source=str(parquet(tmp_path / "a.parquet", rows))))
    broken = why_broken(source)
    assert len(broken) == len(rows) - 1 and "more than 1073741824 bytes" in "".join(broken)
    assert source.picture(0)[2] == "esc\\x1b[31m.png"
    assert fingerprint(source)["images"] == len(rows)


def test_rows_whose_class_is_none(tmp_path: Path) -> None:
    good = {"bytes": encoded("PNG"), "path": None}
    path = parquet(tmp_path / "a.parquet", [good] * 4, [1, -1, None, 2])
    source = open_source(DataSection(source=str(path)))
    assert [why.split(": ")[1] for why in why_broken(source)] == [
        f"class {k}, where there are 2" for k in (-1, None, 2)
    ]
    assert source.labels().tolist() == [1, 0, 0, 0] and source.picture(0)[1] == 1


def test_shards_with_code_in_them(tmp_path: Path) -> None:
    code = pickle.dumps(Payload(tmp_path / "ran"))
    entries = {"../../a.png": encoded("PNG"), "a.pkl": code, "a.pyd": code, "a.pth": code, "a.npy": b"\x93NUMPY" + code}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with contextlib.suppress(UserError):
        why_broken(open_source(DataSection(source=str(tmp_path / "a.tar"))))
    assert not (tmp_path / "ran").exists() and not (tmp_path.parent.parent / "a.png").exists()
