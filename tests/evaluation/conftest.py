from pathlib import Path

import numpy as np
import pytest
import torch

from pixeldip.evaluation.inception import Inception


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
