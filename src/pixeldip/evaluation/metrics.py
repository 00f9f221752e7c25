"""The numbers, as pure functions of features.

Symbols: n samples, m references, D feature dimension.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2000
_ADM_BLOCK = 10_000
_MERGE_ROWS = 1024


class Moments:
    """Mean and covariance of a stream of feature rows, in float64.

    Rows are gathered into blocks, and each block is merged by Chan's formula: no difference of large sums, and
    the same result however the rows were cut into batches, up to 1e-13.
    """

    def __init__(self, dim: int):
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._waiting: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Adds rows (B, D)."""
        self._waiting.append(rows.to("cpu", torch.float64))
        if sum(map(len, self._waiting)) >= _MERGE_ROWS:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        rows, self._waiting = torch.cat(self._waiting), []
        total = self.count + len(rows)
        mean = rows.mean(0)
        centred = rows - mean
        shift = mean - self._mean
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(rows) / total)
        self._mean += shift * (len(rows) / total)
        self.count = total

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(D,) and (D, D), the unbiased covariance (n - 1). Needs at least two rows."""
        self._merge()
        return self._mean.numpy(), (self._scatter / (self.count - 1)).numpy()


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), in float64.

    Source: Heusel et al. 2017, Eq. 6. The root's trace is that of (r cov2 r)^(1/2) with r = cov1^(1/2), by
    symmetric eigendecompositions. Eigenvalues within rounding of zero count as zero, so that singular
    covariances (fewer images than features) give one number, not one per summation order.
    """
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(_without_rounding(values))) @ vectors.T
    product = root @ cov2 @ root
    trace = np.sqrt(_without_rounding(np.linalg.eigvalsh((product + product.T) / 2))).sum()
    shift = mean1 - mean2
    return float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2 * trace)


def _without_rounding(eigenvalues: np.ndarray) -> np.ndarray:
    threshold = eigenvalues.max(initial=0) * len(eigenvalues) * np.finfo(np.float64).eps
    return np.where(eigenvalues > threshold, eigenvalues, 0)


def inception_score(pool: Tensor, weight: Tensor, split_size: int = 5000) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(E KL(p(y | x) || p(y))).

    Source: Salimans et al. 2016, as ADM computes it: consecutive splits in the order of the rows, the last
    shorter one counted like the others.

    Args:
        pool: (n, 2048) features.
        weight: (classes, 2048) of the classifier, whose bias is left out.
    """
    scores = []
    for rows in pool.split(split_size):
        logits = torch.cat([part @ weight.T for part in rows.split(_BLOCK)])
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)
        log_marginal = torch.where(marginal > 0, marginal, 1.0).log()  # 0 log 0 = 0
        scores.append(torch.where(p > 0, p * (log_p - log_marginal), 0.0).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(samples: Tensor, references: Tensor, k: int = 3, distance: str = "adm") -> tuple[float, float]:
    """Precision (n) and recall (m) over k-nearest-neighbour balls of squared distances.

    Source: Kynkäänniemi et al. 2019, as ADM computes it. Precision: the fraction of samples inside the ball of some
    reference. Recall: the fraction of references inside the ball of some sample.

    Args:
        samples: (n, D), n > k.
        references: (m, D), m > k.
        distance: "adm", in float16 as ADM's evaluator has it, or "float32".
    """
    squared = {"adm": _squared_distances_adm, "float32": _squared_distances}[distance]
    radii = [_radii(features, k, squared) for features in (samples, references)]
    inside = [torch.zeros(len(features), dtype=torch.bool) for features in (samples, references)]
    for rows, start in _blocks(samples):
        here = slice(start, start + len(rows))
        for others, at in _blocks(references, _ADM_BLOCK):
            there = slice(at, at + len(others))
            between = squared(rows, others)
            inside[0][here] |= (between <= radii[1][there]).any(1).cpu()
            inside[1][there] |= (between <= radii[0][here, None]).any(0).cpu()
    return inside[0].double().mean().item(), inside[1].double().mean().item()


def _radii(features: Tensor, k: int, squared) -> Tensor:
    """(n,): squared distance of each row to its k-th nearest other row."""
    radii = []
    for rows, _ in _blocks(features):
        nearest = None
        for others, _ in _blocks(features, _ADM_BLOCK):
            # k + 1 of them: the row itself is among the others
            found = squared(rows, others).topk(min(k + 1, len(others)), 1, largest=False).values
            nearest = found if nearest is None else torch.cat([nearest, found], 1)
        radii.append(nearest.topk(k + 1, 1, largest=False).values[:, k])
    return torch.cat(radii)


def _blocks(rows: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, int]]:
    size = size or _BLOCK
    for start in range(0, len(rows), size):
        yield rows[start : start + size], start


def _squared_distances(u: Tensor, v: Tensor) -> Tensor:
    products = u @ v.T
    return products.mul_(-2).add_(u.square().sum(1)[:, None]).add_(v.square().sum(1)).clamp_(min=0)


def _squared_distances_adm(u: Tensor, v: Tensor) -> Tensor:
    """|u|^2 - 2 u v + |v|^2 with every intermediate result rounded to float16; float32 if one of them overflows."""
    u16, v16 = u.half(), v.half()
    if u.device.type == "cuda":
        products = u16 @ v16.T
    else:
        products = (u16.float() @ v16.float().T).half()
    norm_u, norm_v = (x.square().float().sum(1).half() for x in (u16, v16))
    distances = ((norm_u[:, None] - 2 * products) + norm_v).clamp_(min=0).float()
    return distances if distances.isfinite().all() else _squared_distances(u, v)


def kernel_distance(samples: Tensor, references: Tensor) -> float:
    """KID: the unbiased squared maximum mean discrepancy under the kernel (x y / D + 1)^3, over all rows.

    Source: Bińkowski et al. 2018, Eq. 4, without their subsets: the mean over subsets estimates this number.
    Zero in expectation for two samples of one distribution, so it can come out slightly negative.
    """
    n, m = len(samples), len(references)

    def kernel_sum(a: Tensor, b: Tensor) -> float:
        return sum(
            (rows @ others.T).double().div_(a.shape[1]).add_(1).pow_(3).sum().item()
            for rows, _ in _blocks(a)
            for others, _ in _blocks(b, _ADM_BLOCK)
        )

    def own(x: Tensor) -> float:
        diagonal = x.double().square().sum(1).div(x.shape[1]).add(1).pow(3).sum().item()
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    return own(samples) + own(references) - 2 * kernel_sum(samples, references) / (n * m)


def nearest_neighbours(rows: Tensor, others: Tensor, leave_out_self: bool = False) -> tuple[Tensor, Tensor]:
    """Distance of each row (n, D) to the nearest of others (m, D), and that one's index.

    Args:
        leave_out_self: for rows that are the others: the nearest one but the row itself.
    """
    distances, indices = [], []
    for part, start in _blocks(rows):
        squared = torch.cat([_squared_distances(part, block) for block, _ in _blocks(others, _ADM_BLOCK)], 1)
        if leave_out_self:
            squared[torch.arange(len(part)), torch.arange(start, start + len(part))] = math.inf
        index = squared.argmin(1)
        distances.append((part - others[index]).double().norm(dim=1))  # exact where the difference is small
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


def border_gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over images (B, 3, H, W) of the absolute step to the next pixel: by column (W - 1,), by row (H - 1,)."""
    x = images.float()
    return x.diff(dim=3).abs().sum((0, 1, 2), dtype=torch.float64), x.diff(dim=2).abs().sum(
        (0, 1, 3), dtype=torch.float64
    )


def boundary_ratio(columns: np.ndarray, rows: np.ndarray, patch_size: int) -> float:
    """Mean gradient across the borders of patches over the mean gradient inside them; about 1 without seams.

    Args:
        columns, rows: mean gradients by place, (W - 1,) and (H - 1,).
    """
    across = [places[patch_size - 1 :: patch_size] for places in (columns, rows)]
    inside = [np.delete(places, np.s_[patch_size - 1 :: patch_size]) for places in (columns, rows)]
    total = np.concatenate(inside).mean()
    return float(np.concatenate(across).mean() / total) if total else math.nan
