"""`pixeldip evaluate` from files and models to numbers."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.cli import main
from pixeldip.data import NpzFile
from pixeldip.evaluation import METRICS, ArrayImages
from pixeldip.evaluation.extractors import load_extractor
from pixeldip.evaluation.inception import Inception
from pixeldip.evaluation.metrics import kernel_distance, precision_recall
from pixeldip.evaluation.registry import Metric, MetricInputs
from pixeldip.evaluation.stream import measure
from pixeldip.processes import Processes, exact_matmuls
from pixeldip.sampling import deal_classes

from ..conftest import opened_up, saved_model
from .conftest import NO_DOWNLOAD, run, save_folder, save_npz, smooth_images, statistics


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


def test_metrics_that_need_no_reference(tmp_path: Path, seeded_weights: Path, capsys: pytest.CaptureFixture) -> None:
    samples = save_npz(tmp_path / "a.npz", smooth_images(6, 1))
    record = run(tmp_path, samples, "--metrics", "is", "boundary", "--inception-weights", seeded_weights)
    assert set(record["metrics"]) == {"is", "boundary"} and record["reference"] is None and not record["floors"]
    assert f"boundary: no patch size is recorded with {samples}, taken as 16" in " ".join(record["warnings"])
    assert "Patch boundary ratio, P = 16" in capsys.readouterr().out
    known = run(tmp_path, samples, "--metrics", "boundary", "--patch-size", 8)
    assert not known["warnings"] and "Patch boundary ratio, P = 8" in capsys.readouterr().out


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


def test_real_images_are_of_the_split_that_is_named(tmp_path: Path) -> None:
    """Of 40 pictures to train on and 10 others."""
    samples = save_npz(tmp_path / "samples.npz", smooth_images(4, 3))
    arguments = ["--reference", "emoji", "--train-images", "emoji", "--metrics", "nearest", "--patch-size", 8]
    for splits in (("test", "train"), ("train", "test")):
        record = run(tmp_path, samples, *arguments, "--reference-split", splits[0], "--train-split", splits[1])
        counts = {"train": 40, "test": 10}
        assert record["reference"]["images"] == counts[splits[0]]
        assert record["training_images"]["images"] == counts[splits[1]]


def test_a_model_is_sampled_and_measured(model_folder: Path, tmp_path: Path) -> None:
    """A model, its samples kept as .npz, and its samples kept as a folder give the same numbers."""
    real = save_folder(tmp_path / "real", smooth_images(20, 2))
    common = ["--reference", real, "--metrics", *NO_DOWNLOAD, "--evaluation-batch-size", 8, "--patch-size", 8]
    sampling = ["--steps", 3, "--guidance", 2, "--precision", "fp32"]
    by_model = run(tmp_path, model_folder, *common, *sampling, "--images", 20, "--save-images", tmp_path / "kept.npz")
    kept = NpzFile(tmp_path / "kept.npz")
    assert np.bincount(kept.labels(20)).tolist() == [7, 7, 6] and (np.diff(kept.labels(20)) < 0).any()
    assert not any("balanced" in warning for warning in by_model["warnings"])  # 7, 7 and 6 is as near as it gets
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
    assert not any("grid.png" in warning for warning in by_folder["warnings"])


def test_fewer_samples_than_classes_are_spread_over_them(model_folder: Path, tmp_path: Path) -> None:
    arguments = ["--metrics", "boundary", "--steps", 1, "--images", 2]
    record = run(tmp_path, model_folder, *arguments)
    assert record["samples"]["classes"]["counts"] == {"0": 1, "2": 1}
    assert "2 samples of 3 classes: 1 of them have none" in record["warnings"]
    assert record["options"]["patch_size"] == 8 and not any("patch size" in told for told in record["warnings"])
    chosen = run(tmp_path, model_folder, *arguments, "--classes", "bee", 2)
    assert chosen["samples"]["classes"]["counts"] == {"1": 1, "2": 1}
    assert sorted(deal_classes(range(1000), 4, order_seed=0)) == [125, 375, 625, 875]
    assert deal_classes(range(1000), 4, order_seed=None) == [0, 1, 2, 3]
    dealt = [1, 0, 2, 2, 1, 0, 3, 3]  # ever since: records hold the seed alone
    assert deal_classes(range(4), 8, order_seed=0) == dealt


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


def test_metrics_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is enough, alone too: of pixels, of samples and the reference, or of the training images."""
    contrast = Metric(
        "Contrast",
        None,
        lambda m: float(m.samples.columns.mean()),
        "as real",
        real=lambda m: float(m.reference.measured.columns.mean()),
    )
    pool = "efficientnet", "pool"

    def seen_again(m: MetricInputs) -> float:
        return torch.cdist(m.samples.kept[pool], m.training.kept(pool)).min(1).values.lt(1e-2).double().mean().item()

    again = Metric("Seen again", "efficientnet", seen_again, "lower", kept=pool, of_training=True)
    for name, metric in {"contrast": contrast, "again": again}.items():
        monkeypatch.setitem(METRICS, name, metric)
    images = smooth_images(8, 1)
    samples, half = save_npz(tmp_path / "a.npz", images), save_npz(tmp_path / "half.npz", images[:4])
    record = run(tmp_path, samples, "--reference", half, "--metrics", "contrast")
    assert record["metrics"]["contrast"] == pytest.approx(record["floors"]["contrast"]["real"], rel=0.3)
    record = run(tmp_path, samples, "--reference", half, "--train-images", half, "--metrics", "again")
    assert record["metrics"]["again"] == 0.5
    assert main(["evaluate", samples, "--reference", half, "--metrics", "again"]) == 2


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


def test_products_are_exact_whatever_a_process_has_set() -> None:
    cudnn = torch.backends.cudnn
    parts = torch.backends.cuda.matmul, cudnn.conv
    before, by_time = [part.fp32_precision for part in parts], cudnn.benchmark
    try:
        cudnn.benchmark = True
        for part in parts:
            part.fp32_precision = "tf32"
        with exact_matmuls():
            assert [part.fp32_precision for part in parts] == ["ieee", "ieee"] and not cudnn.benchmark
        assert [part.fp32_precision for part in parts] == ["tf32", "tf32"] and cudnn.benchmark
    finally:
        cudnn.benchmark = by_time
        for part, precision in zip(parts, before):
            part.fp32_precision = precision
