"""`pixeldip evaluate` from files and models to numbers, warnings and refusals."""

import dataclasses
import functools
import hashlib
import http.server
import json
import math
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.cli import main
from pixeldip.data import NpzFile, NpzWriter
from pixeldip.evaluation import METRICS, ArrayImages, extractors
from pixeldip.evaluation.cache import cache_entry
from pixeldip.evaluation.extractors import load_extractor
from pixeldip.evaluation.inception import POOL_DIM, SPATIAL_DIM, Inception
from pixeldip.evaluation.metrics import kernel_distance, precision_recall
from pixeldip.evaluation.stream import measure
from pixeldip.processes import Processes

from ..conftest import opened_up, saved_model
from .conftest import smooth_images

NO_DOWNLOAD = ["kid_efficientnet", "fd_mid_efficientnet", "boundary"]


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray | None = None, **arrays: np.ndarray) -> str:
    np.savez(path, arr_0=images, **({} if labels is None else {"arr_1": labels}), **arrays)
    return str(path)


def save_folder(folder: Path, images: np.ndarray) -> str:
    folder.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return str(folder)


def run(tmp_path: Path, *arguments: object) -> dict:
    """The JSON of an evaluation that succeeds."""
    out = tmp_path / "metrics.json"
    assert main(["evaluate", *map(str, arguments), "--out", str(out), "--device", "cpu"]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"), 32)


def test_adm_metrics_against_definitions(
    tmp_path: Path, seeded_weights: Path, seeded_inception: Inception, capsys: pytest.CaptureFixture
) -> None:
    """From files to numbers, against numpy on the network's features of whole sets."""
    samples, references = smooth_images(13, 1), smooth_images(11, 2)
    record = run(
        tmp_path,
        save_npz(tmp_path / "samples.npz", samples),
        "--reference",
        save_npz(tmp_path / "reference.npz", references),
        *("--inception-weights", seeded_weights, "--is-split", 5, "--evaluation-batch-size", 4),
        *("--metrics", "fid", "sfid", "is", "precision", "recall", "kid"),
    )
    with torch.no_grad():
        ours, theirs = (seeded_inception(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (samples, references))
    expected = {}
    for name, i in (("fid", 0), ("sfid", 1)):
        a, b = ours[i].double().numpy(), theirs[i].double().numpy()
        root = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T / math.sqrt(12 * 10), compute_uv=False).sum()
        traces = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
        expected[name] = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root
    p = (ours[0] @ seeded_inception.fc.weight.T).detach().double().softmax(1).numpy()
    splits = [p[s : s + 5] for s in (0, 5, 10)]
    expected["is"] = np.mean([np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in splits])
    for name, value in expected.items():
        assert record["metrics"][name] == pytest.approx(value, rel=1e-5), name
    precision, recall = precision_recall(ours[0], theirs[0])
    assert precision != recall
    assert (record["metrics"]["precision"], record["metrics"]["recall"]) == (precision, recall)
    assert record["metrics"]["kid"] == pytest.approx(kernel_distance(ours[0], theirs[0]), rel=1e-4)
    assert record["labels"]["fid"] == "FID-13" and record["labels"]["sfid"] == "sFID-13"
    warnings = " | ".join(record["warnings"])
    for text in (
        "are not the published weights",
        "13 samples, where papers use 50000",
        "against 11 reference images",
        "fid: 13 samples for 2048 features, the covariance is singular",
        "sfid: 13 samples for 2023 features",
    ):
        assert text in warnings
    assert "last split" not in warnings  # 3 of 5 images: more than half
    sha256 = hashlib.sha256(seeded_weights.read_bytes()).hexdigest()
    assert record["extractors"]["inception"]["sha256"] == sha256 and not record["extractors"]["inception"]["published"]
    shown = capsys.readouterr().out
    assert "FID-13" in shown and "warning: 13 samples" in shown


def test_reference_files(tmp_path: Path, seeded_weights: Path, picture_folder: Path) -> None:
    """A file made from pictures stands for the pictures, in our hands and as plain numpy arrays."""
    out = tmp_path / "reference.npz"
    weights = ["--inception-weights", str(seeded_weights)]
    assert main(["evaluate", "reference", str(picture_folder), "--resolution", "32", "--out", str(out), *weights]) == 0
    with np.load(out, allow_pickle=False) as arrays:
        shapes = {name: (arrays[name].shape, str(arrays[name].dtype)) for name in arrays.files}
        assert shapes == {
            "arr_0": ((12, 32, 32, 3), "uint8"),
            "mu": ((POOL_DIM,), "float64"),
            "sigma": ((POOL_DIM, POOL_DIM), "float64"),
            "mu_s": ((SPATIAL_DIM,), "float64"),
            "sigma_s": ((SPATIAL_DIM, SPATIAL_DIM), "float64"),
        }
    assert NpzFile(out).made_with["data"] == str(picture_folder)
    samples = save_npz(tmp_path / "samples.npz", smooth_images(9, 3))
    by_file = run(tmp_path, samples, "--reference", out, *weights)
    by_folder = run(tmp_path, samples, "--reference", picture_folder, *weights)
    for name, value in by_file["metrics"].items():
        assert by_folder["metrics"][name] == pytest.approx(value, rel=1e-9), name
    assert by_file["reference"]["statistics_from_file"] and not by_folder["reference"]["statistics_from_file"]


def test_statistics_are_read_not_recomputed(tmp_path: Path, seeded_weights: Path) -> None:
    """With mu in the file, FID looks at mu and sigma; precision at arr_0. Without arr_0, FID alone is left."""
    samples = save_npz(tmp_path / "samples.npz", smooth_images(9, 3))
    mu, sigma = np.full(POOL_DIM, 5.0), np.eye(POOL_DIM)
    arguments = [samples, "--inception-weights", seeded_weights, "--reference"]
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    statistics_only = run(tmp_path, *arguments, tmp_path / "stats.npz")
    assert set(statistics_only["metrics"]) == {"fid", "is"}
    warnings = " | ".join(statistics_only["warnings"])
    assert "sfid is not available" in warnings and "precision is not available" in warnings
    both = save_npz(tmp_path / "both.npz", smooth_images(8, 4), mu=mu, sigma=sigma)
    with_images = run(tmp_path, *arguments, both)
    assert set(with_images["metrics"]) == {"fid", "is", "precision", "recall"}
    assert with_images["metrics"]["fid"] == statistics_only["metrics"]["fid"]


def test_the_reference_is_cached_by_content_and_weights(
    tmp_path: Path, reference_cache: Path, capsys: pytest.CaptureFixture
) -> None:
    samples = save_npz(tmp_path / "samples.npz", smooth_images(10, 1))
    folder = Path(save_folder(tmp_path / "real", smooth_images(12, 2)))
    arguments = [samples, "--reference", folder, "--metrics", *NO_DOWNLOAD]
    first, again = run(tmp_path, *arguments), run(tmp_path, *arguments)
    assert not first["reference"]["features_from_cache"] and again["reference"]["features_from_cache"]
    assert again["metrics"] == first["metrics"] and again["floors"] == first["floors"]
    assert run(tmp_path, *arguments, "--no-cache")["metrics"] == first["metrics"]
    (entry,) = (p for p in reference_cache.iterdir() if p.stat().st_mtime >= folder.stat().st_mtime)
    raw = bytearray(entry.read_bytes())
    raw[len(raw) // 2] ^= 1
    entry.write_bytes(raw)
    mended = run(tmp_path, *arguments)
    assert mended["metrics"] == first["metrics"] and not mended["reference"]["features_from_cache"]
    assert "damaged cache entry" in capsys.readouterr().out
    Image.fromarray(smooth_images(1, 9)[0]).save(folder / "0003.png")  # one picture changed
    changed = run(tmp_path, *arguments)
    assert not changed["reference"]["features_from_cache"] and changed["metrics"] != first["metrics"]


def test_cache_entries_differ_by_all_that_changes_them() -> None:
    def entry(sha256="a", height=32, width=32, kept=10, name="e", version=1, weights="w") -> Path:
        images = types.SimpleNamespace(height=height, width=width)
        return cache_entry(
            sha256, images, types.SimpleNamespace(name=name, version=version, weights={"sha256": weights}), kept
        )

    changes = ({"sha256": "b"}, {"height": 64}, {"width": 64}, {"kept": 9}, {"name": "f"}, {"version": 2})
    entries = {entry(), entry(), *(entry(**change) for change in changes), entry(weights="v")}
    assert len(entries) == 8


def test_chosen_images_are_kept_and_all_are_summed_up() -> None:
    images, alone = ArrayImages(smooth_images(12, 1)), Processes(0, 1, torch.device("cpu"))
    extractors = [load_extractor("efficientnet", alone.device)]
    whole, part = (measure(images, extractors, alone, 5, chosen=rows) for rows in (None, np.array([1, 4, 7])))
    for feature, rows in whole.kept.items():
        torch.testing.assert_close(part.kept[feature], rows[[1, 4, 7]])
    for feature, moments in whole.moments.items():
        for ours, theirs in zip(part.moments[feature], moments, strict=True):
            assert np.array_equal(ours, theirs)


def test_no_download_metrics_order_what_is_worse(tmp_path: Path) -> None:
    """Blurred and seamed pictures score worse than other clean ones, which lie within the floor."""
    clean, other = smooth_images(120, 1), smooth_images(120, 2)
    blurred = np.stack([np.asarray(Image.fromarray(x).resize((8, 8)).resize((32, 32))) for x in other])
    seamed = other.copy()
    seamed[:, 7::8] //= 2
    real = save_folder(tmp_path / "real", clean)
    results = {
        name: run(
            tmp_path,
            save_npz(tmp_path / f"{name}.npz", images),
            "--reference",
            real,
            "--patch-size",
            8,
            "--metrics",
            *NO_DOWNLOAD,
        )
        for name, images in {"other": other, "blurred": blurred, "seamed": seamed}.items()
    }
    for name in ("kid_efficientnet", "fd_mid_efficientnet"):
        floor = results["other"]["floors"][name]
        margin = 4 * max(floor["real_deviation"], 0.1 * abs(floor["real"]))
        assert abs(floor["samples"] - floor["real"]) < margin
        for worse in ("blurred", "seamed"):
            assert results[worse]["floors"][name]["samples"] > floor["real"] + margin
    boundary = {name: result["metrics"]["boundary"] for name, result in results.items()}
    assert boundary["other"] == pytest.approx(1, abs=0.05) and boundary["seamed"] > 1.5
    assert results["seamed"]["floors"]["boundary"]["real"] == pytest.approx(1, abs=0.05)


def test_metrics_that_need_no_reference(tmp_path: Path, seeded_weights: Path) -> None:
    samples = save_npz(tmp_path / "a.npz", smooth_images(6, 1))
    record = run(tmp_path, samples, "--metrics", "is", "boundary", "--inception-weights", seeded_weights)
    assert set(record["metrics"]) == {"is", "boundary"} and record["reference"] is None and not record["floors"]


def test_nearest_shows_copies(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, held_out = smooth_images(60, 1), smooth_images(40, 2)
    copies = np.concatenate([train[:15] ^ 1, smooth_images(15, 3)])
    arguments = ["--reference", save_folder(tmp_path / "test", held_out), "--metrics", "nearest"]
    train_folder = save_folder(tmp_path / "train", train)
    samples = save_npz(tmp_path / "samples.npz", copies)
    near = run(tmp_path, samples, *arguments, "--train-images", train_folder)["nearest"]
    assert near["closer_than_99_percent_of_real"] == pytest.approx(0.5, abs=0.07)
    assert near["real_is"] == "reference images" and "means copying" in capsys.readouterr().out
    itself = run(tmp_path, samples, "--reference", train_folder, "--metrics", "nearest", "--train-images", train_folder)
    assert itself["floors"]["nearest"]["real"] > 0 and "against the others" in itself["nearest"]["real_is"]
    statistics_only = tmp_path / "statistics.npz"
    np.savez(statistics_only, **statistics())
    for train_images, message in (("", "--train-images"), (statistics_only, "no images (arr_0) in it")):
        assert main(["evaluate", samples, *arguments, "--train-images", str(train_images)]) == 2
        assert message in capsys.readouterr().err


def test_a_model_is_sampled_and_measured(model_folder: Path, tmp_path: Path) -> None:
    """A model, its samples kept as .npz, and its samples kept as a folder give the same numbers."""
    real = save_folder(tmp_path / "real", smooth_images(20, 2))
    common = ["--reference", real, "--metrics", *NO_DOWNLOAD, "--evaluation-batch-size", 8, "--patch-size", 8]
    sampling = ["--steps", 3, "--guidance", 2, "--precision", "fp32"]
    by_model = run(tmp_path, model_folder, *common, *sampling, "--images", 20, "--save-images", tmp_path / "kept.npz")
    kept = NpzFile(tmp_path / "kept.npz")
    assert np.bincount(kept.labels(20)).tolist() == [7, 7, 6] and (np.diff(kept.labels(20)) < 0).any()
    by_npz = run(tmp_path, tmp_path / "kept.npz", *common)
    assert by_npz["metrics"] == by_model["metrics"]
    assert by_npz["samples"]["pixels_sha256"] == by_model["samples"]["pixels_sha256"]
    assert (
        by_npz["samples"]["made_with"]["num_inference_steps"] == 3
        and by_model["samples"]["made_with"]["seeds"] == "0-19"
    )
    sampled = [
        "sample",
        str(model_folder),
        *map(str, sampling),
        "--seeds",
        "0-19",
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ]
    assert main([*sampled, "--out", str(tmp_path / "again.npz")]) == 0
    assert np.array_equal(NpzFile(tmp_path / "again.npz").images().read(0, 20), kept.images().read(0, 20))
    assert main([*sampled, "--out", str(tmp_path / "folder"), "--class-order-seed", "0"]) == 0
    by_folder = run(tmp_path, tmp_path / "folder", *common)  # its grid.png is not counted
    assert by_folder["metrics"] == by_model["metrics"] and sorted(
        by_folder["samples"]["classes"]["counts"].values()
    ) == [6, 7, 7]


def test_a_model_that_puts_out_nan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = opened_up(DiP(patch_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=2, head_width=8))
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    DiPPipeline(model, height=32, width=32).save_pretrained(tmp_path / "model")
    real = save_folder(tmp_path / "real", smooth_images(4, 2))
    arguments = ["--reference", real, "--metrics", *NO_DOWNLOAD, "--images", "4", "--steps", "1"]
    assert main(["evaluate", str(tmp_path / "model"), *arguments, "--save-images", str(tmp_path / "x.npz")]) == 2
    assert (
        "4 of 4 sampled images hold values that are not finite; the first is image 0, seed 0" in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("*x.npz*"))


def test_many_processes_give_the_same_numbers(model_folder: Path, tmp_path: Path, seeded_weights: Path) -> None:
    """Three processes share three batches of references and two of samples: one of them has none."""
    real = save_folder(tmp_path / "real", smooth_images(20, 2))
    metrics = ["sfid", "is", "precision", "recall", "kid", *NO_DOWNLOAD]
    arguments = [str(model_folder), "--reference", real, "--metrics", *metrics, "--images", "13", "--steps", "2"]
    arguments += ["--precision", "fp32", "--device", "cpu", "--evaluation-batch-size", "8", "--no-cache"]
    arguments += ["--inception-weights", str(seeded_weights), "--is-split", "5"]
    records, images = [], []
    for count, launch in (1, []), (3, ["torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m"]):
        out, kept = tmp_path / f"{count}.json", tmp_path / f"{count}.npz"
        command = [sys.executable, "-m", *launch, "pixeldip.cli", "evaluate", *arguments]
        command += ["--out", str(out), "--save-images", str(kept)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
        records.append(json.loads(out.read_text()))
        images.append(NpzFile(kept).images().read(0, 13))
    sampled = tmp_path / "sampled.npz"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pixeldip.cli", "sample"]
    flags = ["--seeds", "0-12", "--batch-size", "8", "--steps", "2", "--precision", "fp32", "--device", "cpu"]
    command = [sys.executable, "-m", *torchrun, str(model_folder), *flags, "--out", str(sampled)]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    assert np.array_equal(NpzFile(sampled).images().read(0, 13), images[0])
    one, three = records
    assert three["environment"]["processes"] == 3 and set(one["metrics"]) == set(metrics)
    for name, value in one["metrics"].items():
        assert three["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert one["samples"]["pixels_sha256"] == three["samples"]["pixels_sha256"]
    assert np.array_equal(*images)


# The table of edge cases: what is refused

GOOD = smooth_images(6, 1)


def statistics(**changes: object) -> dict[str, np.ndarray]:
    arrays = {
        "mu": np.zeros(POOL_DIM),
        "sigma": np.eye(POOL_DIM),
        "mu_s": np.zeros(SPATIAL_DIM),
        "sigma_s": np.eye(SPATIAL_DIM),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


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


def test_statistics_of_other_weights_and_of_few_images(tmp_path: Path, seeded_weights: Path) -> None:
    made_with = {"inception": {"sha256": "another"}, "images": 8}  # as `evaluate reference` records it
    with NpzWriter(tmp_path / "reference.npz", len(GOOD), 32, 32, made_with) as writer:
        writer.add(GOOD)
        writer.finish(**statistics(sigma_s=None))
    samples = save_npz(tmp_path / "samples.npz", smooth_images(5, 2))
    arguments = [samples, "--reference", tmp_path / "reference.npz", "--inception-weights", seeded_weights]
    record = run(tmp_path, *arguments, "--metrics", "fid")  # sigma_s is not needed
    warnings = " | ".join(record["warnings"])
    assert "was made with other Inception weights, SHA-256 another" in warnings
    assert "fid: 8 reference images for 2048 features" in warnings
    assert record["reference"]["made_with"] == made_with


def test_constant_images_have_no_boundary(tmp_path: Path) -> None:
    samples = save_npz(tmp_path / "a.npz", np.full((4, 32, 32, 3), 7, np.uint8))
    record = run(tmp_path, samples, "--metrics", "boundary")
    assert record["metrics"] == {} and "boundary is not defined for these images" in record["warnings"]


def test_samples_outlive_a_failure_after_them(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(_: object) -> float:
        raise UserError("no number today")

    monkeypatch.setitem(METRICS, "boundary", dataclasses.replace(METRICS["boundary"], compute=fails))
    kept = tmp_path / "kept.npz"
    arguments = ["evaluate", str(model_folder), "--images", "5", "--steps", "1", "--metrics", "boundary"]
    assert main([*arguments, "--save-images", str(kept)]) == 2
    assert "no number today" in capsys.readouterr().err and len(NpzFile(kept).images()) == 5
    (tmp_path / "folder.npz").mkdir()
    assert main([*arguments, "--save-images", str(tmp_path / "folder.npz")]) == 2
    assert "a folder has that name" in capsys.readouterr().err
    assert main([*arguments, "--out", str(kept / "below a file.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


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
    assert main(["evaluate", good]) == 2
    assert "--reference is missing" in capsys.readouterr().err


def test_warnings(tmp_path: Path, seeded_weights: Path) -> None:
    """What does not stop an evaluation is said, and recorded."""
    weights = ["--inception-weights", seeded_weights, "--no-cache"]
    dark = np.tile(GOOD[:4] % 2, (3, 1, 1, 1))
    labels = np.array([0] * 8 + [1] * 2 + [3] * 2)
    path = save_npz(tmp_path / "a.npz", dark, labels)
    record = run(tmp_path, path, "--reference", path, *weights, "--metrics", "is", "precision", "--is-split", 5)
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
    constant = save_npz(tmp_path / "b.npz", np.full((4, 16, 16, 3), 9, np.uint8), np.zeros(3, int))
    real = save_npz(tmp_path / "c.npz", GOOD)
    record = run(
        tmp_path, constant, "--reference", real, "--allow-resolution-mismatch", "--metrics", "kid_efficientnet"
    )
    warnings = " | ".join(record["warnings"])
    for text in ("all pixels have the value 9", "labels left out: ", "images of 32x32, the samples are 16x16"):
        assert text in warnings, text


def test_class_sorted_samples_lower_the_inception_score(tmp_path: Path, seeded_weights: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
    labels = np.repeat(np.arange(4), 5)
    images = np.broadcast_to(colours[labels][:, None, None], (20, 16, 16, 3)).copy()
    path = save_npz(tmp_path / "a.npz", images, labels)
    arguments = [path, "--reference", path, "--inception-weights", seeded_weights, "--metrics", "is", "--is-split", 5]
    by_file, shuffled = (
        run(tmp_path, *arguments, "--is-order", order)["metrics"]["is"] for order in ("file", "shuffled")
    )
    assert by_file == pytest.approx(1, abs=1e-6) and shuffled > 1.02


# Weights


def test_missing_weights_say_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = save_npz(tmp_path / "a.npz", GOOD)
    assert main(["evaluate", path, "--reference", path]) == 2
    error = capsys.readouterr().err
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    for text in ("95,628,359 bytes", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", str(place)):
        assert text in error
    place.parent.mkdir(parents=True)
    place.write_bytes(b"half of it")
    assert main(["evaluate", path, "--reference", path]) == 2
    assert "10 bytes, SHA-256" in capsys.readouterr().err and place.exists()


def test_missing_weights_are_fetched_and_checked(
    tmp_path: Path, seeded_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, from a server on this machine, with the seeded file as the published one."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(seeded_weights.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{seeded_weights.name}"
        monkeypatch.setattr(extractors, "INCEPTION_URL", url)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with pytest.raises(UserError, match=r"could not be fetched \(invalid hash value"):
            extractors.load_extractor("inception", torch.device("cpu"))
        assert not list(tmp_path.rglob("*.pth*"))
        digest = extractors.file_sha256(seeded_weights)
        monkeypatch.setattr(extractors, "INCEPTION_SHA256", digest)
        loaded = extractors.load_extractor("inception", torch.device("cpu"))
        server.shutdown()
    assert loaded.weights == {"file": extractors.INCEPTION_FILE, "sha256": digest, "published": True}
    assert (tmp_path / "hub" / "checkpoints" / extractors.INCEPTION_FILE).is_file() and not loaded.warnings


def test_weights_of_another_network(tmp_path: Path, seeded_weights: Path, capsys: pytest.CaptureFixture) -> None:
    state = torch.load(seeded_weights, weights_only=True)
    wrong = {
        "aux": {**state, "AuxLogits.fc.weight": torch.zeros(3)},
        "lacking": {k: v for k, v in state.items() if k != "fc.bias"},
        "shape": {**state, "fc.bias": torch.zeros(1000)},
        "numbers": {0: torch.zeros(3)},
        "nan": {**state, "Conv2d_1a_3x3.bn.bias": torch.full((32,), math.nan)},
    }
    for name, tensors in wrong.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
    (tmp_path / "text.pth").write_text("hello")
    path = save_npz(tmp_path / "a.npz", GOOD)
    for name, message in {
        "aux": "AuxLogits.fc.weight is not a tensor of this network",
        "lacking": "fc.bias is missing",
        "shape": "fc.bias has shape (1000,), expected (1008,)",
        "numbers": "expected a dictionary of tensors by name",
        "text": "not a file of tensors, or a damaged one",
        "none": "no such file",
        "nan": "6 of 6 images have inception features that are not finite, the first is image 0",
    }.items():
        arguments = ["--reference", path, "--inception-weights", str(tmp_path / f"{name}.pth")]
        assert main(["evaluate", path, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_dinov2_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.save_pretrained(tmp_path / "dino")
    samples, references = smooth_images(9, 1), smooth_images(8, 2)
    arguments = [save_npz(tmp_path / "a.npz", samples), "--reference", save_npz(tmp_path / "b.npz", references)]
    record = run(tmp_path, *arguments, "--metrics", "fd_dinov2", "kid_dinov2", "--dinov2", tmp_path / "dino")

    def features(images: np.ndarray) -> np.ndarray:
        pictures = [Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC) for x in images]
        x = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            return model.eval()((x - mean[:, None, None]) / std[:, None, None]).pooler_output.double().numpy()

    a, b = features(samples), features(references)
    root = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T / math.sqrt(8 * 7), compute_uv=False).sum()
    traces = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root
    assert record["metrics"]["fd_dinov2"] == pytest.approx(expected, rel=0.02)  # Pillow rounds to grey levels
    assert "not comparable with published FD-DINOv2" in " ".join(record["warnings"])
    assert main(["evaluate", *arguments, "--metrics", "fd_dinov2", "--dinov2", str(tmp_path / "none")]) == 2
    assert "DINOv2" in capsys.readouterr().err
