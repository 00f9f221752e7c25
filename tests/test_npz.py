"""Files of images: what is written is read back, and nothing damaged gets through."""

import contextlib
import io
import json
import math
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixeldip import UserError
from pixeldip.data import NpzFile, NpzWriter

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(7) % 3


def write(path: Path, **arrays: np.ndarray) -> Path:
    with NpzWriter(path, 7, 6, 5, {"seed": 3}) as writer:
        writer.add(IMAGES[:4])
        writer.add(IMAGES[4:])
        writer.finish(**arrays)
    return path


def test_round_trip_and_numpy_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "new folder" / "a.npz", arr_1=LABELS, mu=np.arange(4.0))
    with np.load(path, allow_pickle=False) as theirs:
        assert sorted(theirs.files) == ["arr_0", "arr_1", "mu"]
        assert np.array_equal(theirs["arr_0"], IMAGES) and np.array_equal(theirs["arr_1"], LABELS)
    file = NpzFile(path)
    file.verify()
    assert np.array_equal(file.images().read(2, 5), IMAGES[2:5]) and np.array_equal(
        file.images().read(5, 99), IMAGES[5:]
    )
    assert np.array_equal(file.labels(7), LABELS) and np.array_equal(file.load("mu", (4,)), np.arange(4.0))
    assert file.made_with == {"seed": 3} and [p.name for p in path.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(save, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", IMAGES, LABELS)
    file = NpzFile(tmp_path / "a.npz")
    images = file.images()
    assert (len(images), images.height, images.width) == (7, 6, 5) and file.made_with == {}
    for start, stop in ((0, 2), (2, 3), (5, 7), (1, 4)):  # skipping on, and back
        assert np.array_equal(images.read(start, stop), IMAGES[start:stop])
    assert np.array_equal(file.labels(7), LABELS)


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz")
    before = path.read_bytes()
    with pytest.raises(RuntimeError), NpzWriter(path, 7, 6, 5) as writer:
        writer.add(IMAGES)
        raise RuntimeError
    with pytest.raises(ValueError, match="4 images were added, expected 7"), NpzWriter(path, 7, 6, 5) as writer:
        writer.add(IMAGES[:4])
        writer.finish()
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot be written"):
        NpzWriter(path / "below a file.npz", 7, 6, 5).__enter__()


def npz_with(path: Path, data: bytes, name: str = "arr_0.npy") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


def header(text: str, version: int = 1) -> bytes:
    data = text.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(data).to_bytes(2 if version == 1 else 4, "little") + data


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 64, 64, 3)}\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(IMAGES / 255), "float64 values, expected uint8"),
        (npy(IMAGES.astype(np.int64)), "int64 values, expected uint8"),
        (npy(IMAGES.transpose(0, 3, 1, 2)), r"looks like \(N, 3, H, W\)"),
        (npy(IMAGES[..., 0]), r"shape \(7, 6, 5\), expected"),
        (npy(np.zeros((2, 4, 4, 4), np.uint8)), r"expected \(N, H, W, 3\)"),
        (npy(np.asfortranarray(IMAGES)), "Fortran order"),
        (npy(np.array([{"a": 1}], dtype=object)), "Python objects, which are never loaded"),
        (npy(IMAGES)[:-1], "damaged"),
        (npy(IMAGES) + b"more", "damaged"),
        (header(HUGE), "damaged"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 2, 2, 3)}\n"), "damaged"),
        (header("__import__('os').abort()\n"), "damaged"),
        (header("(" * 5000), "damaged"),
        (header("-" * 9000 + "1"), "damaged"),
        (header("{[]: 1}"), "damaged"),
        (header("{1: 1, 'a': 2}"), "damaged"),
        (header("{'descr': ('|u1',), 'fortran_order': False, 'shape': (1, 2, 2, 3)}"), "damaged"),
        (header(" " * 20_000), "a header of 20000 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "a header of 4294967295 bytes"),
        (header(HUGE, version=3), "damaged"),
        (pickle.dumps(IMAGES), "damaged"),
        (b"", "damaged"),
    ],
)
def test_what_is_not_images_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        NpzFile(npz_with(tmp_path / "a.npz", data)).images()


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    for name, data in (
        ("text.npz", b"hello"),
        ("empty.npz", b""),
        ("cut.npz", write(tmp_path / "a.npz").read_bytes()[:-60]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: truncated, or not an npz file"):
            NpzFile(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        NpzFile(tmp_path / "none.npz")
    with pytest.raises(UserError, match="no array arr_0; it holds mu"):
        NpzFile(npz_with(tmp_path / "b.npz", npy(IMAGES), "mu.npy")).images()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_numpy_does_not_pack_is_not_unpacked(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", npy(np.zeros((1, 4000, 4000, 3), np.uint8)))
    with pytest.raises(UserError, match=r"arr_0 claims 48000128 bytes, more than numpy packs into \d+: damaged"):
        NpzFile(tmp_path / "a.npz")


def lying_npz(path: Path, data: bytes, claimed: int, name: str = "arr_0.npy") -> Path:
    """A member whose directory entry claims more bytes than it unpacks to; its checksum is right."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.rfind(b"PK\x01\x02") + 24, min(claimed, 2**32 - 2))
    path.write_bytes(raw)
    return path


def test_directories_that_lie(tmp_path: Path) -> None:
    start = header("{'descr': '|u1', 'fortran_order': False, 'shape': (50, 4, 4, 3)}\n")
    file = NpzFile(lying_npz(tmp_path / "a.npz", start + bytes(100), len(start) + 50 * 48))
    with pytest.raises(UserError, match="arr_0 is damaged"):
        file.images().read(0, 3)
    with pytest.raises(UserError, match="arr_0 is damaged"):
        file.load("arr_0")
    with pytest.raises(UserError, match=r"claims 3000000000 bytes, more than numpy packs into \d+: damaged"):
        NpzFile(lying_npz(tmp_path / "b.npz", start, 3_000_000_000))


@given(
    shape=st.lists(st.integers(0, 2**70) | st.integers(0, 9), max_size=70),
    descr=st.sampled_from(["|u1", "<f8", "<i8", "|S3", "<U2", "|V4", "<M8[s]", "|b1"]),
    data=st.binary(max_size=200),
    honest=st.booleans(),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_header_costs_more_than_the_file_could_hold(
    shape: list[int], descr: str, data: bytes, honest: bool, tmp_path: Path
) -> None:
    start = header(repr({"descr": descr, "fortran_order": False, "shape": tuple(shape)}))
    claimed = len(start) + (len(data) if honest else np.dtype(descr).itemsize * math.prod(shape))
    path = lying_npz(tmp_path / "a.npz", start + data, claimed)
    for use in (lambda file: file.load("arr_0").nbytes, lambda file: file.images().read(0, 10**9).nbytes):
        with contextlib.suppress(UserError):
            assert use(NpzFile(path)) <= 1032 * path.stat().st_size


@pytest.mark.parametrize(
    ("labels", "kind"), [(LABELS[:5], r"int64 \(5,\)"), (LABELS / 2, r"float64 \(7,\)"), (LABELS > 0, r"bool \(7,\)")]
)
def test_labels_that_are_none(labels: np.ndarray, kind: str, tmp_path: Path) -> None:
    file = NpzFile(write(tmp_path / "a.npz", arr_1=labels))
    with pytest.raises(UserError, match=rf"arr_1 is {kind}, expected one integer class id per image \(7\)"):
        file.labels(7)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npz")
    write(folder / "stored.npz", arr_1=LABELS, mu=np.arange(5.0))
    np.savez_compressed(folder / "packed.npz", arr_0=IMAGES, arr_1=LABELS, mu=np.arange(5.0))
    return folder


def assert_refused_or_unharmed(path: Path) -> None:
    """A damaged file gives a UserError or, where what was hit means nothing, the very same arrays."""
    try:
        file = NpzFile(path)
        file.verify()
        images = file.images()
        pixels = np.concatenate([images.read(0, 3), images.read(3, 7)])
        labels, mu = file.labels(7), file.load("mu", (5,))
    except UserError as error:
        assert path.name in str(error)
        return
    assert np.array_equal(pixels, IMAGES) and np.array_equal(mu, np.arange(5.0))
    assert labels is None or np.array_equal(labels, LABELS)  # a flip in arr_1's name makes it another array


@given(data=st.data(), kind=st.sampled_from(["stored", "packed"]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bits(data: st.DataObject, kind: str, good: Path, tmp_path: Path) -> None:
    raw = bytearray((good / f"{kind}.npz").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "a.npz").write_bytes(raw)
    assert_refused_or_unharmed(tmp_path / "a.npz")


@given(data=st.data(), kind=st.sampled_from(["stored", "packed"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_and_overwritten_files(data: st.DataObject, kind: str, good: Path, tmp_path: Path) -> None:
    raw = (good / f"{kind}.npz").read_bytes()
    start = data.draw(st.integers(0, len(raw) - 1))
    (tmp_path / "a.npz").write_bytes(raw[:start] + data.draw(st.binary(max_size=40)))
    assert_refused_or_unharmed(tmp_path / "a.npz")


def test_made_with_is_json_in_the_comment(tmp_path: Path) -> None:
    with zipfile.ZipFile(write(tmp_path / "a.npz")) as archive:
        assert json.loads(archive.comment) == {"seed": 3}
    with NpzWriter(tmp_path / "long.npz", 1, 8, 8, {"seeds": "1," * 40_000, "patch_size": 8}) as writer:
        writer.add(np.zeros((1, 8, 8, 3), np.uint8))
    assert NpzFile(tmp_path / "long.npz").made_with == {"patch_size": 8, "too_long": ["seeds"]}
