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

    Source: Heusel et al. 2017, Eq. 6. The root's trace is the sum of the singular values of F1^T F2, where F F^T is a
    covariance, from its symmetric eigendecomposition. Eigenvalues of the covariances within rounding of zero count as
    zero, so that singular ones (fewer images than features) give one number, not one per summation order.
    """

    def factor(covariance: np.ndarray) -> np.ndarray:
        """F (D, rank)."""
        values, vectors = np.linalg.eigh(covariance)
        rounding = values.max(initial=0) * len(values) * np.finfo(np.float64).eps
        kept = values > rounding
        return vectors[:, kept] * np.sqrt(values[kept])

    trace = np.linalg.svd(factor(cov1).T @ factor(cov2), compute_uv=False).sum()
    shift = mean1 - mean2
    return float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2 * trace)


def inception_score(pool: Tensor, weight: Tensor, split_size: int = 5000) -> float:
    """Mean over splits of exp(E KL(p(y | x) || p(y))).

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
    return float(np.mean(scores))


def precision_recall(samples: Tensor, references: Tensor, k: int = 3, distance: str = "adm") -> tuple[float, float]:
    """Precision (n) and recall (m) over k-nearest-neighbour balls of squared distances.

    Source: Kynkäänniemi et al. 2019, as ADM computes it. Precision: the fraction of samples inside the ball of some
    reference. Recall: the fraction of references inside the ball of some sample.

    Args:
        samples: (n, D), n > k.
        references: (m, D), m > k.
        distance: "adm", in float16 as ADM's evaluator has it, or "float32".
    """
    radii = [_radii(features, k, distance) for features in (references, samples)]
    covered = [torch.zeros(len(features), dtype=torch.bool) for features in (references, samples)]
    for rows, columns, between in _distance_blocks(references, samples, distance):
        covered[0][rows] |= (between <= radii[1][columns]).any(1).cpu()
        covered[1][columns] |= (between <= radii[0][rows, None]).any(0).cpu()
    recall, precision = (inside.double().mean().item() for inside in covered)
    return precision, recall


def _radii(features: Tensor, k: int, distance: str) -> Tensor:
    """(n,): squared distance of each row to its k-th nearest other row."""
    parts: dict[int, list[Tensor]] = {}
    for rows, _, between in _distance_blocks(features, features, distance):
        # k + 1 of them: the row itself is among the others
        parts.setdefault(rows.start, []).append(between.topk(min(k + 1, between.shape[1]), 1, largest=False).values)
    nearest = torch.cat([torch.cat(parts[start], 1).topk(k + 1, 1, largest=False).values for start in sorted(parts)])
    return nearest[:, k]


def _distance_blocks(u: Tensor, v: Tensor, distance: str) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, squared distances) over all pairs.

    "adm" computes in float16, and in float32 wherever one of ADM's blocks of 10,000 x 10,000 pairs would overflow.
    """
    for us, u_start in _blocks(u, _ADM_BLOCK):
        for vs, v_start in _blocks(v, _ADM_BLOCK):
            columns = slice(v_start, v_start + len(vs))
            half = [_half_distances(part, vs) for part, _ in _blocks(us)] if distance == "adm" else []
            overflows = not all(block.isfinite().all() for block in half)
            for i, (part, start) in enumerate(_blocks(us)):
                between = half[i].float() if half and not overflows else _squared_distances(part, vs)
                yield slice(u_start + start, u_start + start + len(part)), columns, between


def _blocks(rows: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, int]]:
    size = size or _BLOCK
    for start in range(0, len(rows), size):
        yield rows[start : start + size], start


def _squared_distances(u: Tensor, v: Tensor) -> Tensor:
    products = u @ v.T
    return products.mul_(-2).add_(u.square().sum(1)[:, None]).add_(v.square().sum(1)).clamp_(min=0)


def _half_distances(u: Tensor, v: Tensor) -> Tensor:
    """(|u|^2 - 2 u v) + |v|^2 with every intermediate result rounded to float16."""
    u16, v16 = u.half(), v.half()
    products = u16 @ v16.T if u.device.type == "cuda" else (u16.float() @ v16.float().T).half()
    norm_u, norm_v = (x.square().float().sum(1).half() for x in (u16, v16))
    return products.mul_(-2).add_(norm_u[:, None]).add_(norm_v).clamp_(min=0)


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


def nearest_neighbours(rows: Tensor, others: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance of each row (n, D) to the nearest of others (m, D), and that one's index.

    Args:
        own: (n,) for rows that are among the others: the index of each row itself, which is left out.
    """
    distances, indices = [], []
    for part, start in _blocks(rows):
        best = part.new_full((len(part),), math.inf)
        index = torch.zeros(len(part), dtype=torch.long, device=part.device)
        for block, at in _blocks(others, _ADM_BLOCK):
            squared = _squared_distances(part, block)
            if own is not None:
                itself = own[start : start + len(part)].to(part.device) - at
                here = ((itself >= 0) & (itself < len(block))).nonzero().flatten()
                squared[here, itself[here]] = math.inf
            nearer, place = squared.min(1)
            index = torch.where(nearer < best, place + at, index)
            best = torch.minimum(best, nearer)
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

    Returns:
        nan where there are no borders, no inside or no gradients.
    """
    across = np.concatenate([places[patch_size - 1 :: patch_size] for places in (columns, rows)])
    inside = np.concatenate([np.delete(places, np.s_[patch_size - 1 :: patch_size]) for places in (columns, rows)])
    if not (len(across) and inside.any()):
        return math.nan
    return float(across.mean() / inside.mean())
