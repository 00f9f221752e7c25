"""What cannot be measured, or means less than it seems: refusals and warnings."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixeldip import UserError
from pixeldip.cli import main
from pixeldip.evaluation import evaluate
from pixeldip.evaluation.inception import POOL_DIM
from pixeldip.settings import EvaluationOptions

from .conftest import GOOD, run, save_folder, save_npz, statistics


def asymmetric() -> np.ndarray:
    matrix = np.eye(POOL_DIM)
    matrix[0, 1] = 0.1
    return matrix


@pytest.mark.parametrize(
    ("samples", "reference", "arguments", "message"),
    [
        ({"arr_0": GOOD[:1]}, {"arr_0": GOOD}, [], "1 samples; these metrics need at least 4"),
        ({"arr_0": GOOD / 255}, {"arr_0": GOOD}, [], "float64 values, expected uint8"),
        ({"arr_0": GOOD.transpose(0, 3, 1, 2)}, {"arr_0": GOOD}, [], "looks like (N, 3, H, W)"),
        ({"arr_0": GOOD}, {"arr_0": GOOD[:, :16, :16]}, [], "images of 16x16, the samples are 32x32"),
        ({"images": GOOD}, {"arr_0": GOOD}, [], "no array arr_0; it holds images"),
        ({"arr_0": GOOD}, {"x": GOOD}, [], "no images (arr_0) or statistics (mu, sigma) in it; it holds x"),
        ({"arr_0": GOOD}, statistics(), ["--metrics", "recall"], "recall is not available"),
        ({"arr_0": GOOD}, statistics(mu_s=None, sigma_s=None), ["--metrics", "sfid"], "has no mu_s, sigma_s"),
        ({"arr_0": GOOD}, statistics(sigma=None), [], "sigma is missing"),
        ({"arr_0": GOOD}, statistics(mu=np.zeros(64)), [], "mu has shape (64,), expected (2048,)"),
        (
            {"arr_0": GOOD},
            statistics(sigma_s=np.eye(2048)),
            [],
            "sigma_s has shape (2048, 2048), expected (2023, 2023)",
        ),
        ({"arr_0": GOOD}, statistics(sigma=asymmetric()), [], "sigma is not symmetric"),
        (
            {"arr_0": GOOD},
            statistics(mu=np.full(POOL_DIM, np.nan)),
            [],
            "mu holds float64 values that are not all finite",
        ),
        ({"arr_0": GOOD[:3]}, {"arr_0": GOOD}, ["--metrics", "precision"], "at least 4 samples"),
        ({"arr_0": GOOD}, {"arr_0": GOOD[:3]}, ["--metrics", "recall"], "at least 4 reference images"),
        (
            {"arr_0": GOOD, "arr_1": np.array([0, 0, 0, 0, 0, 1])},
            {"arr_0": GOOD},
            ["--require-balanced", "--metrics", "boundary"],
            "2 classes with 1 to 5 samples each",
        ),
        ({"arr_0": GOOD}, {"arr_0": GOOD}, ["--metrics", "fiid"], "no metric 'fiid'; there are fid"),
        ({"arr_0": GOOD}, {"arr_0": GOOD[:1]}, ["--metrics", "kid"], "1 image; a comparison needs at least two"),
        ({"arr_0": GOOD}, {"arr_0": GOOD[:0]}, ["--metrics", "boundary"], "0 image; a comparison needs"),
        ({"arr_0": GOOD}, statistics(mu=None, sigma=None), ["--metrics", "fid"], "fid is not available"),
        ({"arr_0": GOOD[:, :16]}, {"arr_0": GOOD[:, :16]}, [], "squeezed into the squares"),
        (
            {"arr_0": GOOD},
            {"arr_0": GOOD},
            ["--metrics", "boundary", "--patch-size", "32"],
            "no borders of patches of 32",
        ),
    ],
)
def test_refusals(
    samples: dict,
    reference: dict,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    seeded_weights: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    np.savez(tmp_path / "samples.npz", **samples)
    np.savez(tmp_path / "reference.npz", **reference)
    command = ["evaluate", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz"), *arguments]
    assert main([*command, "--inception-weights", str(seeded_weights), "--out", str(tmp_path / "m.json")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "m.json").exists()


def test_labels_of_a_few_classes_and_wild_labels(tmp_path: Path) -> None:
    common = ["--metrics", "boundary", "--patch-size", 8]
    few = save_npz(tmp_path / "few.npz", GOOD, np.array([207, 360] * 3))
    record = run(tmp_path, few, *common, "--require-balanced")
    assert record["samples"]["classes"]["counts"] == {"207": 3, "360": 3}
    assert "samples of 2 classes, though their ids go up to 360" in record["warnings"]
    wild = save_npz(tmp_path / "wild.npz", GOOD, np.array([-1, 10**13, 0, 1, 2, 3]))
    assert run(tmp_path, wild, *common)["samples"]["classes"]["max"] == 1


def test_refused_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = save_npz(tmp_path / "good.npz", GOOD)
    raw = bytearray(Path(good).read_bytes())
    (tmp_path / "cut.npz").write_bytes(raw[: len(raw) // 2])
    raw[len(raw) // 2] ^= 16
    (tmp_path / "flipped.npz").write_bytes(raw)
    mixed = Path(save_folder(tmp_path / "mixed", GOOD))
    Image.fromarray(GOOD[0][:20]).save(mixed / "0002.png")
    broken = Path(save_folder(tmp_path / "broken", GOOD))
    (broken / "0004.png").write_bytes(b"not a picture")
    (tmp_path / "empty").mkdir()
    small = save_folder(tmp_path / "small", GOOD[:, :16, :16])
    cases = {
        (str(tmp_path / "cut.npz"), good): "cut.npz: truncated, or not an npz file",
        (str(tmp_path / "flipped.npz"), good): "flipped.npz: arr_0 is damaged (Bad CRC-32",
        (str(mixed), good): "0002.png is 20x32, the first image 32x32",
        (str(broken), good): "0004.png: not a picture of a kind that is read",
        (str(tmp_path / "empty"), good): "no image, .parquet or .tar files in this folder",
        (str(tmp_path / "nothing"), good): "no such folder or file",
        (good, small): "16x16, smaller than the 32x32 asked for",
    }
    for (samples, reference), message in cases.items():
        assert main(["evaluate", samples, "--reference", reference, "--metrics", "boundary"]) == 2
        assert message in capsys.readouterr().err, (samples, reference)
    for command in ([], ["reference"]):
        assert main(["evaluate", *command, ""]) == 2
        assert "evaluate: the name of the images is empty" in capsys.readouterr().err
    assert main(["evaluate", good]) == 2
    assert "--reference is missing" in capsys.readouterr().err


def test_warnings(tmp_path: Path, seeded_weights: Path) -> None:
    """What does not stop an evaluation is said, and recorded."""
    weights = ["--inception-weights", seeded_weights, "--no-cache"]
    dark = np.tile(GOOD[:4] % 2, (3, 1, 1, 1))
    labels = np.array([0] * 8 + [1] * 2 + [3] * 2)
    path = save_npz(tmp_path / "a.npz", dark, labels)
    copy = shutil.copy(path, tmp_path / "copy.npz")
    record = run(tmp_path, path, "--reference", copy, *weights, "--metrics", "is", "precision", "--is-split", 5)
    warnings = " | ".join(record["warnings"])
    for text in (
        "no pixel is above 1",
        "8 of 12 samples are exact duplicates",
        "3 classes with 2 to 8 samples each",
        "samples of 3 classes, though their ids go up to 3",
        "sorted by class",
        "the last split of the Inception Score has 2 of 5 images",
        "the samples and the reference are the same images",
    ):
        assert text in warnings, text
    shuffled = run(
        tmp_path, path, "--reference", path, *weights, "--metrics", "is", "--is-split", 5, "--is-order", "shuffled"
    )
    assert "sorted by class" not in " ".join(shuffled["warnings"])
    assert "the samples and the reference are the same images" in shuffled["warnings"]  # though they are not measured
    constant = save_npz(tmp_path / "b.npz", np.full((4, 16, 16, 3), 9, np.uint8), np.zeros(3, int))
    real = save_npz(tmp_path / "c.npz", GOOD)
    record = run(
        tmp_path, constant, "--reference", real, "--allow-resolution-mismatch", "--metrics", "kid_efficientnet"
    )
    warnings = " | ".join(record["warnings"])
    for text in ("all pixels have the value 9", "labels left out: ", "images of 32x32, the samples are 16x16"):
        assert text in warnings, text


def test_what_of_a_folder_is_not_measured_is_told_once(
    tmp_path: Path, seeded_weights: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "real" / name).mkdir(parents=True)
        for i, pixels in enumerate(GOOD[:4]):
            Image.fromarray(pixels).save(tmp_path / "real" / name / f"{i}.png")
    real = tmp_path / "real"
    (real / "ant" / "0.png").rename(real / "0.png")
    (real / "bee" / "0.png").rename(real / "bee" / "0.heic")
    passed = f"{real}: files passed over, since they are not named as images that are read (1 .heic); make them PNG or"
    no_classes = f"{real}: no classes, since not all images lie as deep as ant/1.png: 0.png; move them for a class of"
    record = run(tmp_path, real, "--reference", real, "--metrics", "boundary")
    said = capsys.readouterr().out
    for text in (f"{passed} JPEG", f"{no_classes} each folder, unless none is wanted"):
        assert record["warnings"].count(text) == 1 == said.count(f"warning: {text}\n")
    samples = save_npz(tmp_path / "samples.npz", GOOD)  # a reference needs no classes
    warnings = run(tmp_path, samples, "--reference", real, "--metrics", "boundary")["warnings"]
    assert f"{passed} JPEG" in warnings and not any("no classes" in warning for warning in warnings)
    out = tmp_path / "reference.npz"
    command = ["evaluate", "reference", str(real), "--out", str(out), "--inception-weights", str(seeded_weights)]
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"warning: {passed} JPEG\n" in said and "no classes" not in said


def test_broken_real_images_give_their_places_to_others(tmp_path: Path) -> None:
    real = Path(save_folder(tmp_path / "real", GOOD))
    (real / "0004.png").write_bytes(b"not a picture")
    record = run(tmp_path, save_npz(tmp_path / "a.npz", GOOD[:4]), "--reference", real, "--metrics", "boundary")
    (told,) = [warning for warning in record["warnings"] if "cannot be read" in warning]
    assert told.startswith(f"{real}: 1 of {len(GOOD)} images cannot be read") and "0004.png: not a picture" in told


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"is_order": "shufle"}, "is_order: .*'shufle'"),
        ({"pr_distance": "ADM"}, "pr_distance: .*'ADM'"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size: .*found 0"),
        ({"patch_size": -4}, "patch_size: .*found -4"),
    ],
)
def test_options_in_python_are_checked(option: dict, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=GOOD)
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path / "samples.npz", EvaluationOptions(metrics=("boundary",), **option))
    options = EvaluationOptions(metrics=["boundary"], patch_size=8, reference=tmp_path / "samples.npz")
    assert evaluate(tmp_path / "samples.npz", options).metrics["boundary"] > 0
