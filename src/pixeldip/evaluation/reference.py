"""What samples are compared with: statistics from a file, features of real images, and a cache of these."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..data import NpzFile, NpzWriter
from ..errors import UserError
from ..flow import Stream
from ..processes import Processes
from ..provenance import made_by
from ..terminal import Advance
from .extractors import Extractor, file_sha256
from .image_sets import ImageSet, SourceImages
from .inception import POOL_DIM, SPATIAL_DIM
from .stream import Feature, Measured, measure

KEPT_IMAGES = 10_000
"""Of a larger folder or dataset, a seeded choice of this many stands for it where metrics look at single images,
as ADM's reference batches hold this many."""
FORMAT = 1
"""Raised when the same files would give another cache entry."""

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""The arrays of an ADM reference file by feature."""

Moments = tuple[np.ndarray, np.ndarray]


@dataclass
class Reference:
    """Real images, or what is known of them.

    Attributes:
        images: None if the file holds statistics alone.
        statistics: moments read from the file, which then stand for all images it was made from.
        measured: what a pass over the images has found.
        made_with: what the file says of itself, if pixeldip wrote it.
    """

    name: str
    sha256: str
    images: ImageSet | None
    statistics: dict[Feature, Moments] = field(default_factory=dict)
    measured: Measured | None = None
    from_cache: bool = False
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def moments(self, feature: Feature) -> Moments | None:
        if feature in self.statistics:
            return self.statistics[feature]
        return self.measured.moments.get(feature) if self.measured else None

    def count_behind(self, feature: Feature) -> int | None:
        """The number of images behind the moments of a feature; None if the file does not say."""
        if feature in self.statistics:
            images = self.made_with.get("images")
            return images if isinstance(images, int) else None
        return self.measured.count if self.measured else None

    def weights_behind(self) -> str | None:
        """SHA-256 of the Inception weights of the statistics, if the file says."""
        weights = self.made_with.get("inception")
        return weights.get("sha256") if isinstance(weights, dict) else None

    def kept(self, feature: Feature) -> torch.Tensor | None:
        return self.measured.kept.get(feature) if self.measured else None


def read_statistics(file: NpzFile) -> dict[Feature, Moments]:
    """The Inception statistics of an ADM reference file; empty if it has no `mu`.

    Raises:
        UserError: if there are some, but not means and covariances of these features.
    """
    found: dict[Feature, Moments] = {}
    if ("mu" in file) != ("sigma" in file):
        missing = "sigma" if "mu" in file else "mu"
        raise UserError(f"{file.path}: {missing} is missing; it holds {', '.join(file.keys)}")
    for output, (mean_key, covariance_key) in STATISTICS.items():
        if mean_key not in file or covariance_key not in file:
            continue
        dim = {"pool": POOL_DIM, "spatial": SPATIAL_DIM}[output]
        mean, covariance = file.load(mean_key, (dim,)), file.load(covariance_key, (dim, dim))
        for key, array in ((mean_key, mean), (covariance_key, covariance)):
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise UserError(f"{file.path}: {key} holds {array.dtype} values that are not all finite floats")
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
        if abs(covariance - covariance.T).max() > 1e-6 * abs(covariance).max():
            raise UserError(f"{file.path}: {covariance_key} is not symmetric, so not a covariance")
        found["inception", output] = mean, covariance
    return found


def chosen_images(count: int, limit: int = KEPT_IMAGES) -> np.ndarray:
    """Increasing indices of at most `limit` images, a choice that depends on the numbers alone."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng((0, Stream.REFERENCE_CHOICE)).permutation(count)[:limit])


def measure_reference(
    reference: Reference,
    extractors: Sequence[Extractor],
    processes: Processes,
    batch_size: int,
    use_cache: bool,
    keep_all: bool,
    start: Callable[[], Advance],
    console: Console,
) -> None:
    """Fills in `measured`, from the cache where the same images met the same network before.

    Args:
        keep_all: keep the features of every image, not only of a choice of `KEPT_IMAGES`.
        start: called if there are images to measure; returns what is told the number done.
    """
    images = reference.images
    keep_all = keep_all or not isinstance(images, SourceImages)
    chosen = np.arange(len(images)) if keep_all else chosen_images(len(images))
    paths = {e.name: _cache_path(reference, e, len(chosen)) for e in extractors}
    measured = Measured(len(images), images.height, images.width, chosen=chosen)
    missing: list[Extractor] = []
    for extractor in extractors:
        found = processes.on_main(lambda e=extractor: use_cache and _from_cache(paths[e.name], measured, e, console))
        if not found:
            missing.append(extractor)
    if missing or not extractors:
        fresh = measure(images, missing, processes, batch_size, chosen, start())
        if processes.is_main:
            for extractor in missing:
                if use_cache:
                    _to_cache(paths[extractor.name], fresh, extractor, console)
            fresh.moments |= measured.moments
            fresh.kept |= measured.kept
            measured = fresh
    reference.measured, reference.from_cache = measured, bool(extractors) and not missing


def _cache_path(reference: Reference, extractor: Extractor, kept: int) -> Path:
    images = reference.images
    key = {
        "format": FORMAT,
        "images": reference.sha256,
        "size": [images.height, images.width],
        "kept": kept,
        "extractor": [extractor.name, extractor.version, extractor.weights["sha256"]],
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return cache_folder() / f"{extractor.name}-{digest[:32]}.npz"


def cache_folder() -> Path:
    """Where features of reference images are kept: $PIXELDIP_CACHE, or pixeldip/references in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PIXELDIP_CACHE") or Path(base) / "pixeldip" / "references").expanduser()


def _to_cache(path: Path, measured: Measured, extractor: Extractor, console: Console) -> None:
    arrays: dict[str, np.ndarray] = {
        "columns": measured.columns,
        "rows": measured.rows,
        "digests": np.frombuffer(b"".join(measured.digests), np.uint8),
        "range": np.array([measured.low, measured.high]),
    }
    for output in extractor.outputs:
        feature = extractor.name, output
        if feature in measured.moments:
            arrays[f"{output}.mean"], arrays[f"{output}.covariance"] = measured.moments[feature]
        if feature in measured.kept:
            arrays[f"{output}.kept"] = measured.kept[feature].numpy()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        console.print(f"reference features not cached in {path.parent}: {error.strerror}", style="yellow")


def _from_cache(path: Path, measured: Measured, extractor: Extractor, console: Console) -> bool:
    if not path.is_file():
        return False
    try:
        file = NpzFile(path)
        arrays = {name: file.load(name) for name in file.keys}
    except UserError as error:
        console.print(f"a damaged cache entry is made anew: {error}", style="yellow", highlight=False)
        return False
    for output in extractor.outputs:
        feature = extractor.name, output
        if f"{output}.mean" in arrays:
            measured.moments[feature] = arrays[f"{output}.mean"], arrays[f"{output}.covariance"]
        if f"{output}.kept" in arrays:
            measured.kept[feature] = torch.from_numpy(arrays[f"{output}.kept"])
    digests = arrays["digests"].tobytes()
    measured.digests = [digests[i : i + 16] for i in range(0, len(digests), 16)]
    measured.columns, measured.rows = arrays["columns"], arrays["rows"]
    measured.low, measured.high = arrays["range"].tolist()
    return True


def content_hash(images: ImageSet | None, path: str, processes: Processes) -> str:
    """SHA-256 of a file, or of the files of a folder or dataset."""
    return processes.on_main(
        lambda: images.content_hash() if isinstance(images, SourceImages) else file_sha256(Path(path))
    )


def write_reference(
    images: ImageSet,
    out: Path,
    extractor: Extractor,
    processes: Processes,
    batch_size: int,
    limit: int,
    made_with: Mapping[str, object],
    advance: Advance,
) -> Measured:
    """Writes a reference batch that ADM's evaluator reads: statistics of all images, and at most `limit` of them.

    Raises:
        UserError: if there are fewer than two images, or the file cannot be written.
    """
    if len(images) < 2:
        raise UserError(f"{len(images)} image: a covariance needs at least two")
    chosen = chosen_images(len(images), limit)
    measured = measure(images, [extractor], processes, batch_size, chosen, advance)
    if processes.is_main:
        weights = {"inception": dict(extractor.weights)}
        note = {**made_by(), **made_with, **weights, "images": len(images), "pixels_sha256": measured.pixels_sha256}
        with NpzWriter(out, len(chosen), images.height, images.width, note) as writer:
            for index in chosen:
                writer.add(images.read(int(index), int(index) + 1))
            (mu, sigma), (mu_s, sigma_s) = (measured.moments["inception", o] for o in ("pool", "spatial"))
            writer.finish(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    return measured
