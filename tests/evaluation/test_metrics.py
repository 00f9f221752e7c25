"""Each metric against a closed form or a float64 definition written here, and proof that these checks can fail."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixeldip.evaluation import inception, metrics
from pixeldip.evaluation.extractors import load_extractor
from pixeldip.evaluation.metrics import (
    Moments,
    border_gradients,
    boundary_ratio,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
)

from .make_fixtures import SIZES, images, torch_fidelity_features

HERE = Path(__file__).parent
TORCH_FIDELITY = importlib.util.find_spec("torch_fidelity")


def gaussian_rows(count: int, dim: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((count, dim)) @ random.standard_normal((dim, dim)) / math.sqrt(dim) + shift


def moments_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0), np.cov(rows, rowvar=False)


# Checks: run as tests, and again with each planted fault, when they must fail


def check_moments() -> None:
    rows = gaussian_rows(2500, 12, shift=100.0).astype(np.float32)
    moments = Moments(12)
    for part in np.array_split(rows, [1, 64, 900, 901, 2300]):
        moments.update(torch.from_numpy(part))
    mean, covariance = moments.mean_and_covariance()
    expected = moments_of(rows.astype(np.float64))
    np.testing.assert_allclose(mean, expected[0], rtol=1e-12)
    np.testing.assert_allclose(covariance, expected[1], atol=1e-10)


def check_frechet() -> None:
    a, b = gaussian_rows(400, 20, 1), gaussian_rows(300, 20, 2, shift=0.3)
    (m1, s1), (m2, s2) = moments_of(a), moments_of(b)
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-10)


def check_inception_score() -> None:
    random = np.random.default_rng(3)
    pool, weight = random.standard_normal((25, 6)), random.standard_normal((9, 6))
    scores = []
    for start in (0, 10, 20):
        logits = pool[start : start + 10] @ weight.T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    score = inception_score(torch.from_numpy(pool).float(), torch.from_numpy(weight).float(), split_size=10)
    assert score == pytest.approx(np.mean(scores), rel=1e-5)


def check_precision_recall() -> None:
    samples, references = gaussian_rows(60, 4, 4) * 0.8, gaussian_rows(45, 4, 5, shift=0.5)

    def radius(rows: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(rows - rows[i], axis=1))[3]  # place 0 is the row itself

    def inside(rows: np.ndarray, others: np.ndarray) -> float:
        radii = [radius(others, j) for j in range(len(others))]
        return float(np.mean([any(np.linalg.norm(others - row, axis=1) <= radii) for row in rows]))

    expected = inside(samples, references), inside(references, samples)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and abs(expected[0] - expected[1]) > 0.05
    features = torch.from_numpy(samples).float(), torch.from_numpy(references).float()
    assert precision_recall(*features, distance="float32") == pytest.approx(expected, abs=1e-12)


def check_spatial_features(network: inception.Inception) -> None:
    expected = np.load(HERE / "inception.npz")
    with torch.no_grad():
        pool, spatial = network(torch.from_numpy(images()))
    scale = abs(expected["pool"]).max()
    np.testing.assert_allclose(spatial.numpy(), expected["spatial"], atol=1e-5 * abs(expected["spatial"]).max())
    np.testing.assert_allclose(pool.numpy(), expected["pool"], atol=1e-5 * scale)
    logits = (pool @ network.fc.weight.T).detach().numpy()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5 * abs(expected["logits"]).max())


def check_resize() -> None:
    expected = np.load(HERE / "tf1_resize.npz")
    for size, target in SIZES:
        x = torch.from_numpy(expected[f"x{size}"]).float()
        assert np.array_equal(inception.resize_tf1(x, target, 5).numpy(), expected[f"y{size}"]), size


@pytest.mark.parametrize(
    "check", [check_moments, check_frechet, check_inception_score, check_precision_recall, check_resize]
)
def test_against_definitions(check: Callable[[], None]) -> None:
    check()


def test_inception_against_torch_fidelity(seeded_inception: inception.Inception) -> None:
    check_spatial_features(seeded_inception)


def test_efficientnet_knows_what_it_sees() -> None:
    """Its ImageNet classifier on the very features that the distances are computed from."""
    network = load_extractor("efficientnet", torch.device("cpu")).network
    for name, label in (("bison", 347), ("macaw", 88), ("red_panda", 387)):
        pixels = np.array(Image.open(HERE / "photos" / f"{name}.jpg"))
        pool, mid = network(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        p = network._fc(pool).softmax(1)[0]
        assert p.argmax() == label and p[label] > 0.9
        assert mid.shape == (1, 224) and (mid[:, 112:] > 0).all()  # deviations


@pytest.mark.skipif(TORCH_FIDELITY is None, reason="torch-fidelity is not installed")
@pytest.mark.parametrize("size", [32, 256, 512])
def test_other_sizes_against_torch_fidelity(
    size: int, seeded_weights: Path, seeded_inception: inception.Inception
) -> None:
    """Runs where the package is there (`pip install --no-deps torch-fidelity`); without it, the fixture stands in."""
    x = np.random.default_rng(size).integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    expected = torch_fidelity_features(TORCH_FIDELITY.submodule_search_locations[0], seeded_weights, x)
    with torch.no_grad():
        pool, spatial = seeded_inception(torch.from_numpy(x))
    np.testing.assert_allclose(spatial.numpy(), expected["spatial"], atol=1e-5 * abs(expected["spatial"]).max())
    np.testing.assert_allclose(pool.numpy(), expected["pool"], atol=1e-5 * abs(expected["pool"]).max())


def _biased(self: Moments) -> tuple[np.ndarray, np.ndarray]:
    self._merge()
    return self._mean.numpy(), (self._scatter / self.count).numpy()


def _half_pixel(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(x[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]


_score, _pr, _radii = metrics.inception_score, metrics.precision_recall, metrics._radii
_forward = inception.Inception.forward


def _channels_first(self: inception.Inception, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pool, spatial = _forward(self, x)
    return pool, spatial.unflatten(1, (17, 17, 7)).permute(0, 3, 1, 2).flatten(1)


FAULTS = {
    "covariance over n": (Moments, "mean_and_covariance", _biased, check_moments),
    "half-pixel resize": (inception, "resize_tf1", _half_pixel, check_resize),
    "k - 1": (metrics, "_radii", lambda f, k, d: _radii(f, k - 1, d), check_precision_recall),
    "k + 1": (metrics, "_radii", lambda f, k, d: _radii(f, k + 1, d), check_precision_recall),
    "precision and recall swapped": (
        None,
        "precision_recall",
        lambda *a, **k: _pr(*a, **k)[::-1],
        check_precision_recall,
    ),
    "last split dropped": (
        None,
        "inception_score",
        lambda pool, weight, split_size: _score(pool[: len(pool) // split_size * split_size], weight, split_size),
        check_inception_score,
    ),
    "channels first": (inception.Inception, "forward", _channels_first, check_spatial_features),
    "eight channels": (inception, "SPATIAL_CHANNELS", 8, check_spatial_features),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_see_planted_faults(
    fault: str, monkeypatch: pytest.MonkeyPatch, seeded_inception: inception.Inception
) -> None:
    place, name, wrong, check = FAULTS[fault]
    if place is None:  # a function this module has imported
        monkeypatch.setitem(globals(), name, wrong)
    else:
        monkeypatch.setattr(place, name, wrong)
    with pytest.raises(AssertionError):
        check(seeded_inception) if check is check_spatial_features else check()


def test_frechet_closed_forms() -> None:
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.standard_normal((30, 30)))[0]
    a, b = random.uniform(0.1, 4, 30), random.uniform(0.1, 4, 30)
    m1, m2 = random.standard_normal(30), random.standard_normal(30)
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()  # covariances that commute
    assert frechet_distance(m1, basis * a @ basis.T, m2, basis * b @ basis.T) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_singular_covariances() -> None:
    a, b = gaussian_rows(15, 60, 1), gaussian_rows(12, 60, 2)
    (m1, s1), (m2, s2) = moments_of(a), moments_of(b)
    # tr (s1 s2)^(1/2) is the sum of the singular values of the product of the centred rows
    root = np.linalg.svd((a - m1) / math.sqrt(14) @ ((b - m2) / math.sqrt(11)).T, compute_uv=False).sum()
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
    value = frechet_distance(m1, s1, m2, s2)
    assert value == pytest.approx(expected, rel=1e-9)
    noise = 1e-15 * np.random.default_rng(0).standard_normal(s1.shape)  # what another order of summation does
    assert frechet_distance(m1, s1 + noise + noise.T, m2, s2) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-6)


def test_frechet_of_ill_conditioned_covariances() -> None:
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.standard_normal((200, 200)))[0]
    a, b = np.geomspace(10, 1e-6, 200), np.geomspace(8, 1e-7, 200)
    mean = np.zeros(200)
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mean, basis * a @ basis.T, mean, basis * b @ basis.T) == pytest.approx(expected, rel=1e-7)


def test_inception_score_limits() -> None:
    weight = torch.eye(8) * 2000
    assert inception_score(torch.eye(8), weight) == pytest.approx(8)  # sure and diverse; p log p of 0 is 0
    assert inception_score(torch.ones(8, 8), weight) == pytest.approx(1)


def test_precision_recall_by_hand() -> None:
    references = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # k = 1: every radius is 1
    samples = torch.tensor([[0.5], [4.0], [9.0], [9.5]])  # inside, on the border, outside, outside
    assert precision_recall(samples, references, k=1, distance="float32") == (0.5, 1.0)


def test_adm_distances_are_rounded_to_half_precision() -> None:
    u = torch.rand(50, 2048, generator=torch.Generator().manual_seed(0)) * 0.9
    v = torch.rand(40, 2048, generator=torch.Generator().manual_seed(1)) * 0.9
    ((rows, columns, distances),) = metrics._distance_blocks(u, v, "adm")
    assert (rows, columns) == (slice(0, 50), slice(0, 40))
    exact = torch.cdist(u.double(), v.double()).square()
    assert torch.equal(distances, distances.half().float())
    assert 0.05 < (distances - exact).abs().max() < 2
    # (|u|^2 - 2 u v) is rounded before |v|^2 is added: rows and columns are not alike
    long, short = u * 1.3, v * 0.1
    ((_, _, one),) = metrics._distance_blocks(long, short, "adm")
    ((_, _, other),) = metrics._distance_blocks(short, long, "adm")
    assert not torch.equal(one, other.T) and (one - other.T).abs().max() <= 1
    # one value too large for float16: the whole block is computed in float32
    u[0] = 300
    ((_, _, fallback),) = metrics._distance_blocks(u, v, "adm")
    assert torch.equal(fallback, metrics._squared_distances(u, v))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, references = (torch.from_numpy(gaussian_rows(n, 5, n)).float() for n in (70, 50))
    whole = (
        precision_recall(samples, references),
        kernel_distance(samples, references),
        nearest_neighbours(samples, references)[1].tolist(),
    )
    monkeypatch.setattr(metrics, "_BLOCK", 16)
    monkeypatch.setattr(metrics, "_ADM_BLOCK", 21)
    parts = precision_recall(samples, references), kernel_distance(samples, references)
    assert parts[0] == whole[0] and parts[1] == pytest.approx(whole[1], rel=1e-6)
    assert nearest_neighbours(samples, references)[1].tolist() == whole[2]


def test_kernel_distance_against_its_definition() -> None:
    x, y = gaussian_rows(20, 6, 1), gaussian_rows(15, 6, 2, shift=0.4)

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        values = [(p @ q / 6 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return float(np.mean(values))

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    random = torch.Generator().manual_seed(0)
    values = [
        kernel_distance(torch.randn(30, 4, generator=random), torch.randn(20, 4, generator=random)) for _ in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(300)


def test_nearest_neighbours() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    distances, indices = nearest_neighbours(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), rows)
    assert distances.tolist() == [0, 1] and indices.tolist() == [1, 0]
    distances, indices = nearest_neighbours(rows, rows, own=torch.arange(3))
    assert distances.tolist() == [5, 5, pytest.approx(math.sqrt(65))] and indices.tolist() == [1, 0, 1]


def test_boundary_ratio_sees_seams() -> None:
    def ratio(pixels: np.ndarray) -> float:
        columns, rows = border_gradients(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        return boundary_ratio(columns.numpy(), rows.numpy(), 8)

    pixels = np.random.default_rng(0).integers(0, 200, (30, 32, 32, 3), dtype=np.uint8)
    assert ratio(pixels) == pytest.approx(1, abs=0.02)
    shifted = pixels.copy()
    shifted[:, 8:16] += 50  # one row of patches is brighter
    assert ratio(shifted) > 1.02
    assert boundary_ratio(np.array([1.0, 5.0, 1.0]), np.array([2.0, 3.0, 2.0]), 2) == pytest.approx(4 / 1.5)
    assert math.isnan(ratio(np.zeros((2, 16, 16, 3), np.uint8)))
