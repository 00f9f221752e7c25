import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixeldip.cli import main
from pixeldip.evaluation.inception import POOL_DIM, SPATIAL_DIM, Inception

NO_DOWNLOAD = ["kid_efficientnet", "fd_mid_efficientnet", "boundary"]


@pytest.fixture(scope="session")
def seeded_inception(seeded_weights: Path) -> Inception:
    network = Inception().eval()
    network.load_state_dict(torch.load(seeded_weights, weights_only=True), strict=False)
    return network


def smooth_images(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Random colour gradients, uint8 (count, size, size, 3)."""
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 255, (count, 2, 2, 1, 1, 3))
    y, x = np.meshgrid(*2 * [np.linspace(0, 1, size)], indexing="ij")
    y, x = y[None, ..., None], x[None, ..., None]
    top = corners[:, 0, 0] * (1 - x) + corners[:, 0, 1] * x
    bottom = corners[:, 1, 0] * (1 - x) + corners[:, 1, 1] * x
    return (top * (1 - y) + bottom * y + random.normal(0, 6, (count, size, size, 3))).clip(0, 255).astype(np.uint8)


GOOD = smooth_images(6, 1)


def statistics(**changes: object) -> dict[str, np.ndarray]:
    arrays = {
        "mu": np.zeros(POOL_DIM),
        "sigma": np.eye(POOL_DIM),
        "mu_s": np.zeros(SPATIAL_DIM),
        "sigma_s": np.eye(SPATIAL_DIM),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


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
