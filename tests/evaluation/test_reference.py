"""References: statistics in a file, and what is kept of images between evaluations."""

import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixeldip.cli import main
from pixeldip.data import NpzFile, NpzWriter
from pixeldip.evaluation.cache import cache_entry
from pixeldip.evaluation.inception import POOL_DIM, SPATIAL_DIM

from .conftest import GOOD, NO_DOWNLOAD, run, save_folder, save_npz, smooth_images, statistics


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
    few = ["--images", "5", "--out", str(tmp_path / "few.npz"), *weights]  # which are kept singly
    assert main(["evaluate", "reference", str(picture_folder), "--resolution", "32", *few]) == 0
    some, whole = NpzFile(tmp_path / "few.npz"), NpzFile(out)
    kept, pictures = ({image.tobytes() for image in file.images().read(0, 99)} for file in (some, whole))
    assert len(kept) == 5 and kept < pictures
    assert all(np.array_equal(some.load(name), whole.load(name)) for name in ("mu", "sigma", "mu_s", "sigma_s"))
    samples = save_npz(tmp_path / "samples.npz", smooth_images(9, 3))
    one = ["--images", "1", "--out", str(tmp_path / "one.npz"), *weights]  # too few to compare with, but for statistics
    assert main(["evaluate", "reference", str(picture_folder), "--resolution", "32", *one]) == 0
    by_one = run(tmp_path, samples, "--reference", tmp_path / "one.npz", *weights, "--metrics", "fid")
    by_file = run(tmp_path, samples, "--reference", out, *weights)
    by_folder = run(tmp_path, samples, "--reference", picture_folder, *weights)
    assert by_one["metrics"]["fid"] == by_file["metrics"]["fid"]
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
    samples = save_npz(tmp_path / "samples.npz", smooth_images(5, 1))
    folder = Path(save_folder(tmp_path / "real", smooth_images(12, 2)))
    arguments = [samples, "--reference", folder, "--metrics", *NO_DOWNLOAD]
    first, again = run(tmp_path, *arguments), run(tmp_path, *arguments)
    assert not first["reference"]["features_from_cache"] and again["reference"]["features_from_cache"]
    assert first["floors"]["kid_efficientnet"]["size"] == 5  # real images on either side of the floor's comparison
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
    def entry(sha256="a", height=32, width=32, kept=10, name="e", version=1, weights="w", **accepted: bool) -> Path:
        images = types.SimpleNamespace(height=height, width=width, **accepted)
        return cache_entry(
            sha256, images, types.SimpleNamespace(name=name, version=version, weights={"sha256": weights}), kept
        )

    changes = ({"sha256": "b"}, {"height": 64}, {"width": 64}, {"kept": 9}, {"name": "f"}, {"version": 2})
    changes += ({"allow_enlarging": True}, {"skip_broken": True})
    entries = {entry(), entry(), *(entry(**change) for change in changes), entry(weights="v")}
    assert len(entries) == 10


def test_the_cache_does_not_switch_the_check_of_sizes_off(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    samples = save_npz(tmp_path / "samples.npz", smooth_images(6, 1))
    small = save_folder(tmp_path / "small", smooth_images(6, 2, size=16))
    arguments = [samples, "--reference", small, "--metrics", "kid_efficientnet"]
    run(tmp_path, *arguments, "--allow-resolution-mismatch")
    assert main(["evaluate", *arguments]) == 2
    assert "is 16x16, smaller than the 32x32 asked for" in capsys.readouterr().err


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
