"""Programs that do what the model does, without it."""

import json
import math
from pathlib import Path

import pytest
import torch

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.cli import main
from pixeldip.export import difference, export_model
from pixeldip.flow import time_grid
from pixeldip.model import HEADS

from .conftest import QUIET, TINY_MODEL, largest_file, opened_up, saved_model


def pipeline_of(**changes) -> DiPPipeline:
    model = opened_up(DiP(**{**TINY_MODEL, "num_classes": 3, **changes}))
    return DiPPipeline(model, height=16, width=24, class_names=["ant", "bee", "cow"])


@pytest.mark.parametrize(
    "changes",
    [
        *({"head": head, "head_width": {"linear": None, "attention": 16}.get(head, 8)} for head in HEADS),
        {"placement": "hybrid", "prediction": "noise"},
        {"prediction": "image"},
    ],
)
def test_onnx_is_the_model(changes: dict, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pipeline = pipeline_of(**changes)
    errors = export_model(pipeline, tmp_path, "onnx", 16, 24, QUIET)
    assert errors.keys() == {"model.onnx"} and errors["model.onnx"] < 1e-4
    record = json.loads((tmp_path / "export.json").read_text())
    assert record["times"] == time_grid(50, objective=pipeline.model.objective)  # not all paths begin at 0


def test_the_command_and_its_torch_programs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = saved_model(tmp_path / "model", 16)
    assert main(["export", str(folder), "--format", "torch", "--out", str(tmp_path / "out"), "--width", "8"]) == 0
    assert "model.pt2: differs from the model by" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (record["height"], record["width"], record["null_class"]) == (16, 8, 3)
    assert record["class_names"] == ["ant", "bee", "cow"] and len(record["times"]) == 51 and record["command"]
    model = DiPPipeline.from_pretrained(folder).model
    assert difference(torch.export.load(tmp_path / "out" / "model.pt2").module(), model, 16, 8) < 1e-5
    if "model.aoti.pt2" in record["differences"]:
        package = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.aoti.pt2"))
        assert difference(package, model, 16, 8) < 1e-4


def test_without_a_compiler_no_earlier_package_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / "model.aoti.pt2").write_text("an earlier one")
    errors = export_model(pipeline_of(), tmp_path, "torch", 16, 16, QUIET)
    assert errors.keys() == {"model.pt2"} and not (tmp_path / "model.aoti.pt2").exists()


def test_a_program_of_another_model_is_told_apart() -> None:
    a, b = (opened_up(DiP(**TINY_MODEL, num_classes=3), seed=seed) for seed in (1, 2))
    assert difference(a, b, 16, 16) > 0.1
    assert math.isnan(difference(lambda x, t, y: x * math.nan, b, 16, 16))


def test_a_program_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("pixeldip.export.TOLERANCE", 0.0)  # which rounding alone is above
    (tmp_path / "model.onnx").write_text("an earlier one")
    with pytest.raises(UserError, match=r"differs from the model by .*; it was not written"):
        export_model(pipeline_of(), tmp_path, "onnx", 16, 16, QUIET)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]


@pytest.mark.parametrize(("format", "name"), [("onnx", "model.onnx"), ("torch", "model.pt2")])
def test_a_full_disk_keeps_the_earlier_export(format: str, name: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    (tmp_path / name).write_text("an earlier one")
    with largest_file(30_000), pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
        export_model(pipeline_of(), tmp_path, format, 16, 16, QUIET)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        export_model(pipeline_of(), tmp_path, "onnx", 12, 16, QUIET)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export_model(pipeline_of(), tmp_path / "file", "torch", 16, 16, QUIET)
    (tmp_path / "model.pt2").mkdir()
    with pytest.raises(UserError, match=r"model.pt2: cannot be written \(a folder has that name\)"):
        export_model(pipeline_of(), tmp_path, "torch", 16, 16, QUIET)
    assert main(["export", "nowhere"]) == 2
