"""Checkpoints of strangers, and models from the hub."""

import contextlib
import inspect
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.convert import infer_config, load_release
from pixeldip.saved_model import check_saved_model

from .common import FUZZ, JSON, Payload

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
    with pytest.raises(UserError, match=r"owner/other: no such folder here, and from the hub it cannot be loaded \("):
        DiPPipeline.from_pretrained("owner/other", cache_dir=tmp_path / "cache")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(UserError, match=r"runs/frist: no such folder here \(did you mean runs/first\?\), and from the"):
        DiPPipeline.from_pretrained("runs/frist", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 3}, r"missing: backbone\.blocks\.2\..*, .* and 9 more\)"),
        ({"depth": 1}, r"\(surplus: backbone\.blocks\.1\."),
        ({"num_classes": 2}, r"\(of another shape: backbone\.class_embed\.weight\)"),
    ],
)
def test_weights_of_another_network(changed: dict, message: str, copied: Path) -> None:
    changed_json(copied / "model" / "config.json", **changed)
    with pytest.raises(UserError, match=message):
        DiPPipeline.from_pretrained(copied)


INDEX_KEYS = st.sampled_from(
    ["_class_name", "model", "scheduler", "height", "width", "class_names", "sampling", "more"]
)
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
