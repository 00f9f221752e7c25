"""`pixeldip sweep`: which settings it makes, what it measures them on, and what its report says."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixeldip import DiP, DiPPipeline
from pixeldip.arguments import SweepArguments
from pixeldip.cli import main
from pixeldip.images import grid
from pixeldip.processes import choose_precision, precision_name
from pixeldip.sampling import SampledImages, load_pipeline
from pixeldip.settings import SamplingSettings
from pixeldip.studies.sweep import ASKED, FirstImages, classes_like, reference_images
from pixeldip.studies.sweep_report import Row, _lines, verdict
from pixeldip.studies.sweep_settings import Setting, combinations

from .conftest import TINY_MODEL, make_picture, opened_up

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    network = opened_up(DiP(**TINY_MODEL, num_classes=2))
    DiPPipeline(network, height=32, width=32, class_names=["ant", "bee"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """Twice as many ants as bees."""
    for name, count in (("ant", 8), ("bee", 4)):
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(count):
            make_picture(i + 100 * count, 32, 32).save(tmp_path / "real" / name / f"{i}.png")
    return tmp_path / "real"


def sweep(*arguments: object) -> int:
    return main(["sweep", *map(str, arguments), "--device", "cpu", "--no-cache"])


def test_every_combination_once() -> None:
    found = combinations(
        SweepArguments(
            model="m",
            solver=("ab2", "heun"),
            evaluations=(10, 11),
            guidance=(1.0, 2.0),
            guidance_interval=((0.0, 1.0), (0.2, 0.8)),
            time_shift=(1.0, 3.0),
            backbone_every=(1, 4),
        ),
        SamplingSettings(),
    )
    ab2 = [s for s in found if s.solver == "ab2"]
    heun = [s for s in found if s.solver == "heun"]
    assert len(ab2) == 2 * 3 * 2 * 2  # three: unguided, and guided in two intervals
    assert len({s.name for s in found}) == len(found)
    assert {s.evaluations for s in ab2} == {10, 11} == {s.sampling.steps for s in ab2}
    # six steps of Heun's would take eleven evaluations, so ten allow five steps, which take nine
    assert {(s.evaluations, s.sampling.steps) for s in heun} == {(9, 5), (11, 6)}
    assert all(s.sampling.guidance_interval == s.interval and s.sampling.guidance == s.guidance for s in found)
    for name, values in {"time_shift": {1, 3}, "backbone_every": {1, 4}}.items():
        assert {getattr(s.sampling, name) for s in found} == values
        assert all(getattr(s.sampling, name) == getattr(s, name) for s in found)


def test_what_is_left_out_is_the_models_own() -> None:
    own = SamplingSettings(
        steps=13, solver="heun", guidance=9.0, guidance_interval=(0.2, 0.8), time_shift=2.0, backbone_every=3
    )
    found = combinations(SweepArguments(model="m", guidance=(3.0,)), own)
    assert found == [Setting("heun", 25, 3.0, (0.2, 0.8), 2.0, 3)] and found[0].sampling.steps == 13


def test_what_one_folder_holds_was_measured_alike() -> None:
    """Each argument varies from setting to setting, must be the same for all, or changes no number but by rounding."""
    changes_nothing = {"out", "device", "precision", "compile", "evaluation_batch_size", "cache", "verify"}
    changes_nothing |= {"require_balanced", "patch_size"}  # the one refuses; the other is the model's
    varies = {"guidance", "guidance_interval", "solver", "evaluations", "time_shift", "backbone_every"}
    every = {field.name for field in dataclasses.fields(SweepArguments)}
    assert every == changes_nothing | varies | set(ASKED)


def test_a_curve_is_of_one_setting() -> None:
    intervals = (0.0, 1.0), (0.2, 0.8)
    asked = SweepArguments(model="m", evaluations=(10, 20), guidance=(1.0, 2.0), guidance_interval=intervals)
    found = combinations(asked, SamplingSettings())
    rows = [Row(setting, {}, Path("x.png")) for setting in found]
    over_evaluations = _lines(rows, "evaluations")
    assert len(over_evaluations) == 3  # unguided, and guided in two intervals
    for line in over_evaluations.values():
        assert [row.setting.evaluations for row in line] == [10, 20]
        assert len({row.setting.guidance for row in line}) == 1
    at_ten = [row for row in rows if row.setting.evaluations == 10]
    over_guidance = _lines(at_ten, "guidance")
    assert {name: [row.setting.guidance for row in line] for name, line in over_guidance.items()} == {
        "0 < t < 1": [1, 2],
        "0.2 < t < 0.8": [1, 2],
    }


def test_without_classes_there_is_nothing_to_guide(tmp_path: Path, real: Path, capsys: pytest.CaptureFixture) -> None:
    DiPPipeline(opened_up(DiP(**TINY_MODEL, num_classes=0)), height=32, width=32).save_pretrained(tmp_path / "model")
    arguments = ["--reference", real, "--images", 4, "--evaluations", 1, "--metrics", "boundary"]
    (real / "ant" / "8.heic").touch()
    assert sweep(tmp_path / "model", *arguments, "--out", tmp_path / "sweep") == 0
    warning = f"{real}: files passed over, since they are not named as images that are read (1 .heic); make them PNG or"
    assert f"\nwarning: {warning}" in capsys.readouterr().out
    assert warning in (tmp_path / "sweep" / "report.md").read_text()
    assert [path.name for path in (tmp_path / "sweep" / "settings").glob("*.json")] == ["euler-1-guidance1.json"]
    sample = ["sample", str(tmp_path / "model"), "--seeds", "0", "--steps", "1", "--out", str(tmp_path / "samples")]
    assert main([*sample, "--guidance", "3"]) == 2
    assert "the model was trained without classes" in capsys.readouterr().err
    assert main(sample) == 0
    assert json.loads((tmp_path / "samples" / "settings.json").read_text())["guidance_scale"] == 1


def test_samples_have_the_classes_of_the_reference(model: Path, real: Path) -> None:
    pipeline = DiPPipeline.from_pretrained(model)
    images = reference_images(SweepArguments(model="m", reference=str(real)), (32, 32))
    classes = classes_like(images, pipeline)
    assert sorted(classes) == [0] * 8 + [1] * 4 and 1 in classes[:6]  # the folder has all ants first
    (real / "ant").rename(real / "cow")
    (real / "bee").rename(real / "ant")
    (real / "cow").rename(real / "bee")
    swapped = reference_images(SweepArguments(model="m", reference=str(real)), (32, 32))
    assert sorted(classes_like(swapped, pipeline)) == [0] * 4 + [1] * 8
    (real / "bee").rename(real / "wasp")
    renamed = reference_images(SweepArguments(model="m", reference=str(real)), (32, 32))
    assert classes_like(renamed, pipeline) == []
    assert classes_like(None, pipeline) == []


def test_a_sweep_and_its_report(model: Path, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "sweep"
    arguments = [model, "--reference", real, "--images", 12, "--evaluations", 2, "--out", out, "--metrics"]
    arguments += ["kid_efficientnet", "boundary", "--guidance-interval", 0, 1]
    assert sweep(*arguments, "--guidance", 1, 3) == 0
    files = {path: path.stat().st_mtime_ns for path in (out / "settings").glob("*.json")}
    assert len(files) == 2
    assert sweep(*arguments, "--guidance", 1, 3, 8) == 0  # one more: the others stay as they are
    assert "1 of 1" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files} == files
    lost = out / "settings" / "euler-2-guidance1.png"
    lost.unlink()
    assert sweep(*arguments, "--guidance", 1, 3, 8) == 0 and lost.is_file()  # made again
    results = [json.loads(path.read_text()) for path in (out / "settings").glob("*.json")]
    assert len({r["metrics"]["kid_efficientnet"] for r in results}) == 3  # guidance changes the samples
    assert {r["precision"] for r in results} == {precision_name(choose_precision("auto", CPU))}
    assert {r["count"] for r in results} == {12} and all(r["seconds_per_image"] > 0 for r in results)
    pipeline = load_pipeline(str(model), CPU, choose_precision("auto", CPU))
    classes = classes_like(reference_images(SweepArguments(model="m", reference=str(real)), (32, 32)), pipeline)
    three = Setting("euler", 2, 3.0, (0.0, 1.0), 1.0)
    samples = SampledImages(pipeline, three.sampling, range(12), classes).read(0, 12)
    sheet = grid([Image.fromarray(pixels) for pixels in samples], 12)
    assert np.array_equal(np.asarray(Image.open(out / "settings" / f"{three.name}.png")), np.asarray(sheet))
    for page in ("report.md", "report.html"):
        text = (out / page).read_text()
        for words in ("guidance 1", "guidance 3", "guidance 8", "real images", "Lowest EfficientNet KD"):
            assert words in text
    assert text.count("data:image/png;base64,") == 3 and text.count("<svg") == 1
    undefined = out / "settings" / "euler-2-guidance1.json"  # as of samples of one grey, which have no borders
    values = json.loads(undefined.read_text())
    del values["metrics"]["boundary"], values["floors"]["boundary"]
    undefined.write_text(json.dumps(values))
    assert sweep(*arguments, "--guidance", 1, 3, 8) == 0
    (row,) = [line for line in (out / "report.md").read_text().splitlines() if "guidance 1 |" in line]
    assert row.count("| – |") == 1 and "Patch boundary ratio" in (out / "report.md").read_text()
    # a smaller report does not take the place of the larger one
    report = (out / "report.html").read_bytes()
    assert sweep(*arguments, "--guidance", 5, 3) == 2
    lost = "euler-2-guidance1, euler-2-guidance8-from0to1"
    assert f"report.html would lose {lost}: ask for these, too, or move" in capsys.readouterr().err
    assert (out / "report.html").read_bytes() == report and len(list((out / "settings").glob("*.json"))) == 3
    make_picture(99, 32, 32).save(real / "ant" / "0.png")  # another image of the same name
    assert sweep(*arguments, "--guidance", 1, 3, 8) == 0  # nothing is measured
    assert sweep(*arguments, "--guidance", 5) == 2
    assert "holds a study with another sweep.reference_sha256 (" in capsys.readouterr().err
    assert sweep(*arguments, "--guidance", 1, 3, 8, "--compile") == 2  # its times would not compare
    assert "holds a study with another sweep.compile (False, now True)" in capsys.readouterr().err
    assert sweep(*arguments, "--guidance", 1, 3, 8, "--patch-size", 4) == 2
    assert "holds a study with another sweep.patch_size (None, now 4)" in capsys.readouterr().err
    assert sweep(model, "--reference", real, "--images", 11, "--out", out) == 2
    assert "holds a study with another sweep.images (12, now 11)" in capsys.readouterr().err


def test_the_verdict_names_the_best_and_the_fastest_as_good() -> None:
    def row(evaluations: int, distance: float, seconds: float) -> Row:
        known = {"samples": distance, "samples_deviation": 0.01, "real": 0.1, "real_deviation": 0.01}
        result = {"metrics": {}, "floors": {"kid_efficientnet": known}, "seconds_per_image": seconds, "count": 9}
        return Row(Setting("ab2", evaluations, 2.0, (0.1, 1.0), 1.0), result, Path("x.png"))

    slow, good, fast, worse = row(100, 0.200, 1.0), row(20, 0.222, 0.2), row(10, 0.240, 0.1), row(50, 0.3, 0.5)
    said = verdict([worse, fast, good, slow], "kid_efficientnet")
    best, fastest = said.split(" The fastest ")
    assert "ab2, 100 evaluations" in best and "200.0 ± 10.0" in best
    assert "ab2, 20 evaluations" in fastest and "1/5.0 of the time" in fastest  # 10 are four deviations away
    alike = row(50, 0.21, 0.95)
    assert verdict([slow, worse], "kid_efficientnet") == verdict([slow, alike], "kid_efficientnet") == best


def test_only_the_first_samples_are_kept() -> None:
    first = FirstImages()
    for _ in range(3):
        first.add(np.zeros((8, 4, 4, 3), np.uint8))
    assert len(first.pictures) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--reference is missing"),
        (["--reference", "nowhere"], "--reference nowhere: no such folder"),
        (["--reference", "{real}", "--metrics", "nearest"], "name them, --train-images"),
        (["--reference", "{real}", "--metrics", "kids"], "no metric 'kids'"),
        (["--reference", "{real}", "--guidance-interval", "0.9", "0.1"], "guidance"),
        (["--reference", "{real}", "--evaluations", "0"], "--evaluations"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, model: Path, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [a.format(real=real) for a in arguments]
    assert sweep(model, *given, "--images", 4, "--out", tmp_path / "sweep") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.glob("sweep/settings/*"))


def test_settings_in_words() -> None:
    setting = Setting("ab2", 20, 2.0, (0.1, 1.0), 1.0)
    assert setting.name == "ab2-20-guidance2-from0.1to1"
    assert setting.sampling.pipeline_arguments()["guidance_interval"] == (0.1, 1.0)
