"""What strangers send: whatever the bytes, the answer is a UserError or the right thing, and no code of theirs runs."""

import base64
import contextlib
import inspect
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import features
from rich.console import Console
from safetensors.torch import save_file

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.cli import main
from pixeldip.convert import infer_config, load_release
from pixeldip.data import BrokenImage, Source, TrainingImages, decode, open_source
from pixeldip.images import NOTE, read_note
from pixeldip.processes import start_processes, stop_processes
from pixeldip.provenance import command, environment
from pixeldip.recipe import DataSection, Recipe, load_recipe, parse_recipe, recipe_values, save_recipe
from pixeldip.run_folder import checkpoints, preview_files, read_evaluations, read_metrics, resolve_model, step_of
from pixeldip.sampling import MOST_SEEDS, parse_seeds
from pixeldip.saved_model import check_saved_model
from pixeldip.terminal import PlainConsole, printable, warn
from pixeldip.training import train

from .conftest import make_picture, saved_model, tiny_recipe

FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
HOSTILE_NAMES = ["new\nline", "esc\x1b[31mred\x1b]0;title\x07", "[bold]", "emoji \U0001f600", ":fire:", "a b #1?"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = recipe_values(Recipe())
KNOWN_KEYS = st.fixed_dictionaries(
    {},
    optional={
        name: st.fixed_dictionaries({}, optional={key: st.just(default) | JSON for key, default in section.items()})
        | JSON
        if isinstance(section, dict)
        else st.just(section) | JSON
        for name, section in SECTIONS.items()
    },
)


class Payload:
    """Unpickled by a reader that runs code, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return open, (str(self.mark), "w")


# recipes


@settings(max_examples=300, **FUZZ)
@given(values=KNOWN_KEYS | JSON)
def test_a_recipe_is_one_or_is_refused(values: object, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        recipe = load_recipe(str(path))
    except UserError as error:
        assert len(str(error)) < 20_000
        return
    save_recipe(recipe, path)
    assert load_recipe(str(path)) == recipe == parse_recipe(recipe_values(recipe))


LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))])


@settings(max_examples=200, **FUZZ)
@example(text=b"\xff\xfe\x00")
@example(text=b"out: !!python/object/apply:os.abort []")
@example(text=f"{LAUGHS}\nout: *a8".encode())
@example(text=b"out: &a [*a]")
@example(text=b"[" * 20_000)
@example(text=b"training: {seed: " + b"9" * 5000 + b"}")
@example(text=b"training: {steps: 0x" + b"f" * 5000 + b"}")
@example(text=b"optimizer: {lr: .inf}")
@given(text=st.binary(max_size=60) | st.text("{}[]:-&*!?|>'\"%@`,# \nabc019.~", max_size=40).map(str.encode))
def test_text_that_is_no_recipe(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text)
    try:
        recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    except UserError as error:
        assert len(str(error)) < 20_000
        return
    assert recipe == Recipe()  # nothing, or comments


# flags


@settings(max_examples=300, **FUZZ)
@example("9" * 5000)
@example("0-" + "9" * 30)
@example("5--3")
@given(st.text("0123456789-, \t+_x", max_size=12) | st.text(max_size=12))
def test_seeds_are_a_short_list_or_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        seeds = parse_seeds(text, 1000)
        assert 1 <= len(seeds) <= 1000 and all(0 <= seed < 2**63 for seed in seeds)


@settings(max_examples=100, **FUZZ)
@given(st.lists(st.tuples(st.integers(0, 2**63 - 60), st.integers(0, 50)), min_size=1, max_size=5))
def test_seed_ranges(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in runs)
    assert parse_seeds(text) == [seed for first, more in runs for seed in range(first, first + more + 1)]
    with pytest.raises(UserError, match="the most here"):
        parse_seeds(f"{text},0-{MOST_SEEDS}")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("strangers") / "model", 16)


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> DiPPipeline:
    return DiPPipeline.from_pretrained(model_folder)


@settings(max_examples=200, **FUZZ)
@example(label="9" * 5000)
@example(label="-1")
@example(label=True)
@given(label=st.text(max_size=8) | st.integers() | st.floats() | st.sampled_from(["ant", "bee", "cow", "0", "2"]))
def test_classes_are_the_models_or_refused(label: object, pipeline: DiPPipeline) -> None:
    names = pipeline.config.class_names
    try:
        index = pipeline.class_id(label)
    except UserError:
        assert label not in names
        return
    assert 0 <= index < 3 and (label not in names or names[index] == label)


# run folders

STEP = st.fixed_dictionaries(
    {"step": st.integers(0, 50), "loss": st.floats(0, 9), "images_per_second": st.floats(1, 9)}
)
KEYS = st.sampled_from(["step", "loss", "images_per_second", "event", "metrics", "floors"])
GARBAGE = (
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b""))
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(KEYS, JSON)
    .filter(lambda d: "step" not in d or not isinstance(d["step"], int))
    .map(lambda value: json.dumps(value).encode())
    | st.sampled_from(
        [
            b"[" * 100_000,
            b'{"step": ' + b"9" * 5000 + b"}",
            b"\0" * 99,
            b'{"event": "evaluation", "step": 1}',
            b'{"step": 1, "loss": "x", "images_per_second": 1}',
        ]
    )
)


@settings(max_examples=200, **FUZZ)
@given(lines=st.lists(st.tuples(STEP, GARBAGE), max_size=5))
def test_garbage_in_the_log_is_passed_over(lines: list[tuple[dict, bytes]], tmp_path: Path) -> None:
    raw = [part for entry, garbage in lines for part in (json.dumps(entry).encode(), garbage)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(raw))
    expected = {entry["step"]: entry for entry, _ in lines}
    assert read_metrics(tmp_path) == [expected[step] for step in sorted(expected)]
    assert read_evaluations(tmp_path) == []


@settings(max_examples=60, **FUZZ)
@given(
    steps=st.sets(st.integers(0, 10**12), min_size=1, max_size=5),
    others=st.lists(st.text("0123456789-.~ \nabc", max_size=12), max_size=4),
)
def test_copies_beside_checkpoints_are_none(steps: set[int], others: list[str], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    for place in ("checkpoints", "previews"):
        names = [f"step-{step:08d}" for step in steps]
        for name in [*names, *(f"step-{other}x" for other in others), f"{names[0]}-copy", f"{names[0]}.bak"]:
            path = tmp_path / "run" / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if place == "checkpoints" else path.with_name(f"{name}.png").touch()
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == sorted(steps)
    assert [step_of(path) for path in preview_files(tmp_path / "run")] == sorted(steps)


@settings(max_examples=200, **FUZZ)
@example("a\0b")
@example("../../etc/passwd")
@given(st.text(max_size=12) | st.text("./~a\\:", max_size=8))
def test_a_models_name_is_a_folder_a_hub_id_or_refused(name: str) -> None:
    with contextlib.suppress(UserError):
        found = resolve_model(name)
        assert Path(found).is_dir() or found.count("/") == 1


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
    with pytest.raises(UserError):
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


# checkpoints

SIZES = {
    "s_embedder.proj.weight": (32, 192),
    "local_decoder.enc1.0.weight": (8, 3, 3, 3),
    "blocks.0.mlp.w1.weight": (85, 32),
    "blocks.0.attn.q_norm.weight": (16,),
    "y_embedder.embedding_table.weight": (4, 32),
}
SHAPE = st.lists(st.sampled_from([0, 1, 2, 3, 4, 16, 32, 10**4]), max_size=4).map(tuple)


@settings(max_examples=300, **FUZZ)
@given(st.dictionaries(st.sampled_from([*SIZES, "x_embedder.embedder.0.weight"]), SHAPE, min_size=1, max_size=2))
def test_shapes_tell_sizes_or_are_refused(changed: dict[str, tuple]) -> None:
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in (SIZES | changed).items()}
        with contextlib.suppress(UserError):
            DiP(**infer_config(tensors))


@settings(max_examples=100, **FUZZ)
@given(data=st.data(), suffix=st.sampled_from([".ckpt", ".safetensors"]))
def test_damaged_checkpoints(data: st.DataObject, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    tensors = {name: torch.zeros(shape) for name, shape in SIZES.items()}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, path)
    raw = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, min(len(raw) - 9, 2000)))
    raw[start : start + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    with pytest.raises(UserError):  # it is no whole network either
        load_release(path)


def zipped(path: Path, code: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/version", "3\n")


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    code = Payload(tmp_path / "ran")
    for new in (True, False):
        state = {"state_dict": {"a": code}, "hyper_parameters": code, "callbacks": [code]}
        torch.save(state, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
        with pytest.raises(UserError):
            load_release(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(code))
    sets_an_attribute = b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(N}(X\x07\x00\x00\x00patchedK\x01utb."
    zipped(tmp_path / "c.ckpt", pickle.dumps(code))
    zipped(tmp_path / "d.ckpt", sets_an_attribute)
    for name in ("b.ckpt", "c.ckpt", "d.ckpt"):
        with pytest.raises(UserError):
            load_release(tmp_path / name)
    assert not (tmp_path / "ran").exists() and not hasattr(torch._utils._rebuild_tensor_v2, "patched")


def test_tensors_larger_than_their_file(tmp_path: Path) -> None:
    torch.save({name: torch.zeros(1).expand(10_000, *shape) for name, shape in SIZES.items()}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"claims [\d,]+ bytes of tensors, and the file has [\d,]+"):
        load_release(tmp_path / "a.ckpt")
    claim = json.dumps({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    for header in (len(claim).to_bytes(8, "little") + claim, (10**10).to_bytes(8, "little") + b"{}"):
        (tmp_path / "a.safetensors").write_bytes(header)
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            load_release(tmp_path / "a.safetensors")


# models from the hub


def changed_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copied"))


def evil(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n"


def code_beside_a_part(folder: Path, code: str, part: str) -> None:
    (folder / part / "evil.py").write_text(code)
    changed_json(folder / "model_index.json", **{part: ["evil", "Evil"]})


def code_of_the_pipeline(folder: Path, code: str) -> None:
    (folder / "evil.py").write_text(code)
    changed_json(folder / "model_index.json", _class_name=["evil", "Evil"])


def pickled_weights(folder: Path, code: str) -> None:
    (folder / "model" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Payload(folder.parent / "ran")}, folder / "model" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    "attack",
    [
        lambda folder, code: (folder / "None.py").write_text(code),
        code_of_the_pipeline,
        lambda folder, code: code_beside_a_part(folder, code, "model"),
        lambda folder, code: code_beside_a_part(folder, code, "scheduler"),
        lambda folder, code: changed_json(folder / "model_index.json", model=["subprocess", "Popen"]),
        pickled_weights,
    ],
    ids=["None.py", "pipeline", "model", "scheduler", "subprocess", "pickle"],
)
def test_code_in_a_models_folder_does_not_run(attack, copied: Path, tmp_path: Path) -> None:
    attack(copied, evil(tmp_path / "ran"))
    with pytest.raises(UserError):
        DiPPipeline.from_pretrained(copied)
    assert not (tmp_path / "ran").exists()


def test_a_hub_repository_is_looked_through_before_it_is_loaded(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "cache" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(copied, snapshot)
    loaded = DiPPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache")
    assert loaded.config.class_names == ["ant", "bee", "cow"]
    changed_json(snapshot / "model" / "config.json", hidden_size=80_000)
    with pytest.raises(UserError, match=r"config\.json tells of [\d,]+ weights"):
        DiPPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="owner/other: cannot be loaded"):
        DiPPipeline.from_pretrained("owner/other", cache_dir=tmp_path / "cache")


INDEX_KEYS = st.sampled_from(["_class_name", "model", "scheduler", "height", "width", "class_names", "more"])
CONFIG_KEYS = st.sampled_from([*inspect.signature(DiP).parameters, "more"])
SMALL = st.integers(-1, 70) | st.sampled_from(["unet", "mlp", "hybrid", "image", 10**9, 2**70, 1e300]) | JSON


@settings(max_examples=150, **FUZZ)
@example(index={}, config={"depth": 10**9})
@example(index={}, config={"head": "mlp", "head_depth": 10**9})
@example(index={}, config={"hidden_size": 2**70})
@example(index={}, config={"mlp_ratio": float("inf")})
@given(
    index=st.dictionaries(INDEX_KEYS, JSON, max_size=1),
    config=st.dictionaries(CONFIG_KEYS, SMALL, max_size=2),
)
def test_configurations_of_strangers(index: dict, config: dict, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    changed_json(folder / "model_index.json", **index)
    changed_json(folder / "model" / "config.json", **config)
    try:
        check_saved_model(folder)
    except UserError:
        return
    with contextlib.suppress(UserError):  # other weights than the configuration asks for
        DiPPipeline.from_pretrained(folder)


@settings(max_examples=60, **FUZZ)
@example(name="model_index.json", data=b"[" * 100_000)
@example(name="model/config.json", data=b'{"depth": ' + b"9" * 5000 + b"}")
@given(
    name=st.sampled_from(["model_index.json", "model/config.json", "scheduler/scheduler_config.json"]),
    data=st.binary(max_size=30),
)
def test_damaged_files_of_a_model(name: str, data: bytes, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data)
    with contextlib.suppress(UserError):
        DiPPipeline.from_pretrained(folder)


def test_an_encoder_with_code_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from pixeldip.vision_models import load_vision_model

    (tmp_path / "evil.py").write_text(evil(tmp_path / "ran"))
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="alignment"):
        load_vision_model(str(tmp_path), "alignment")
    assert not (tmp_path / "ran").exists()


# terminal and records


@settings(max_examples=200, **FUZZ)
@given(st.text(max_size=20) | st.sampled_from(HOSTILE_NAMES))
def test_what_is_printed_steers_no_terminal(text: str) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=10**6, force_terminal=False)
    console.print(text, soft_wrap=True)
    warn(console, text)
    printed = file.getvalue()
    assert printable(text) in printed
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in printed.replace("\n", ""))


def test_a_run_on_hostile_names(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in HOSTILE_NAMES:
        shutil.copytree(picture_folder / "ant", picture_folder / name)
    run = tmp_path / "run [/x]"
    train(tiny_recipe(run, picture_folder, training={"steps": 1}))
    second = {"pretrained": str(run), "patch_size": None, "hidden_size": None, "depth": None, "num_heads": None}
    shutil.rmtree(picture_folder / "ant")
    shutil.copytree(picture_folder / "bee", picture_folder / "\x1b[2Jnew [red]")
    (picture_folder / "bee" / "cut\x1b[1m\n.png").write_bytes(b"")
    recipe = tiny_recipe(tmp_path / "2", picture_folder, training={"steps": 1}, model=second, data={"max_broken": 0.5})
    recipe.model.head_width = None
    train(recipe)
    assert main(["sample", str(run), "--classes", "[/x]\x1b[1m", "--out", str(tmp_path / "out")]) == 2
    printed = "".join(capsys.readouterr())
    lines = printed.splitlines()
    assert [line for line in lines if "\x1b" in line] == [] and "\\x1b[2Jnew [red]" in printed


def test_no_secret_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = base64.b16encode(os.urandom(20)).decode()
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    flags = ["--hf-token", secret, f"--wandb.api_key={secret}", "--steps", "3", f"hf_{secret}", f"--x=hf_{secret}"]
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", *flags, f"https://me:{secret}@host/x", "--last", "2"])
    assert command() == (
        "train.py --hf-token '***' '--wandb.api_key=***' --steps 3 '***' '--x=***' 'https://***@host/x' --last 2"
    )
    processes = start_processes("cpu")
    try:
        assert secret not in json.dumps(environment(processes))
    finally:
        stop_processes()
