"""What the backbone knows about classes it was not told (Figs. 4 and 8): its features of labelled images, drawn by
t-SNE, and measured: the accuracy of a linear probe, and the silhouette."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from ..data import NpzFile, Source, open_source
from ..errors import UserError
from ..evaluation.image_sets import SourceImages, read_rows
from ..files import writing
from ..flow import Stream, fold_seed, interpolate, seeded_normal
from ..images import from_uint8
from ..model import DiP
from ..pipeline import DiPPipeline
from ..processes import Processes, autocast, choose_precision
from ..recipe import Recipe, image_size
from ..report import to_svg, write_pages
from .comparison_report import facts, mean_and_spread
from .comparisons import placement
from .folder import RESULT, SETTINGS, read_json
from .study import Contender, Study

FEATURES = Study(
    "features",
    "Features of the backbone",
    "Does the head let the backbone tell classes apart?",
    "Figs. 4 and 8",
    "With the head, clusters of classes are tighter and further apart than without; hybrid injection clusters worse "
    "than the other two placements.",
    placement,
)
TIME = 0.75
"""Where on the path features are taken: most of the image shows, some noise is left, as in training."""
PROBE_IMAGES = 2000
PER_CLASS = 100
BATCH = 64
FILE = "features.npz"


def check_installed() -> None:
    """Raises UserError unless scikit-learn is there."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError("the features study needs scikit-learn: pip install 'pixeldip[studies]'") from error


@torch.no_grad()
def block_features(
    model: DiP, images: Tensor, blocks: Sequence[int], device: torch.device, precision: torch.dtype
) -> dict[int, np.ndarray]:
    """Tokens after so many blocks, averaged over the patches, of images (n, 3, H, W) uint8: (n, D) each.

    The images are noised to t = 0.75, always with the same noise, and the class is withheld.
    """
    found: dict[int, list[np.ndarray]] = {block: [] for block in blocks}
    for start in range(0, len(images), BATCH):
        x = from_uint8(images[start : start + BATCH].to(device))
        noise = seeded_normal([fold_seed(Stream.VALIDATION, start + i) for i in range(len(x))], x.shape[1:], device)
        t = x.new_full((len(x),), TIME)
        y = torch.full((len(x),), model.config.num_classes, device=device)
        for block in blocks:
            with autocast(device, precision):
                _, tokens = model(interpolate(x, noise, t), t, y, tokens_after=block)
            found[block].append(tokens.float().mean(1).cpu().numpy())
    return {block: np.concatenate(parts) for block, parts in found.items()}


def probe_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """The share of test rows whose class a logistic regression on standardised training rows gets right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return float(probe.fit(train, train_labels).score(test, test_labels))


def silhouette(rows: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette of the classes by cosine distance: 1 apart, 0 overlapping, below 0 nearer to another class."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(rows - rows.mean(0), labels, metric="cosine"))


def chosen_rows(labels: np.ndarray, per_class: int) -> np.ndarray:
    """The first rows of each class, at most so many."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]))


def measure_features(
    folder: Path, pipeline: DiPPipeline, recipe: Recipe, held_out: Source, processes: Processes, console: Console
) -> dict[str, Any]:
    """The numbers of one trained model; keeps the features behind them in `features.npz`.

    Clusters are those of the held-out images, and of the training images too where some class has fewer than two
    held-out ones.
    """
    device = processes.device
    return processes.on_main(lambda: _measured(folder, pipeline, recipe, held_out, device, console))


def _measured(
    folder: Path, pipeline: DiPPipeline, recipe: Recipe, held_out: Source, device: torch.device, console: Console
) -> dict[str, Any]:
    size = image_size(recipe.data)
    training = open_source(recipe.data)
    train, train_labels = _labelled(training, size, -(-PROBE_IMAGES // len(training.class_names)))
    test, test_labels = _labelled(held_out, size, PER_CLASS)
    model, precision = pipeline.model, choose_precision(recipe.training.precision, device)
    depth = model.config.depth
    blocks = {"middle": max(1, depth // 2), "last": depth}
    with console.status("features"):
        ours, theirs = (
            block_features(model, images, list(blocks.values()), device, precision) for images in (train, test)
        )
    pixels = [images.flatten(1).numpy().astype(np.float32) for images in (train, test)]
    with_training = np.bincount(test_labels, minlength=len(held_out.class_names)).min() < 2

    def clustered(of_training: np.ndarray, of_held_out: np.ndarray) -> np.ndarray:
        return np.concatenate([of_training, of_held_out]) if with_training else of_held_out

    labels = clustered(train_labels, test_labels)
    numbers = {}
    for name, block in blocks.items():
        numbers[f"probe_{name}"] = probe_accuracy(ours[block], train_labels, theirs[block], test_labels)
        numbers[f"silhouette_{name}"] = silhouette(clustered(ours[block], theirs[block]), labels)
    with writing(folder / FILE):
        np.savez_compressed(folder / FILE, features=clustered(ours[depth], theirs[depth]), labels=labels)
    return {
        "features": numbers,
        "pixels": {
            "probe": probe_accuracy(pixels[0], train_labels, pixels[1], test_labels),
            "silhouette": silhouette(clustered(*pixels), labels),
        },
        "chance": float(np.bincount(test_labels).max() / len(test_labels)),
        "probe_images": len(train_labels),
        "test_images": len(test_labels),
        "clustered_images": len(labels),
        "class_names": list(held_out.class_names),
    }


def _labelled(source: Source, size: tuple[int, int], per_class: int) -> tuple[Tensor, np.ndarray]:
    images = SourceImages(source, "labelled images", size, allow_enlarging=True, skip_broken=True)
    rows = chosen_rows(images.labels, per_class)
    pixels = read_rows(images, rows)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), images.labels[rows]


def write_features_report(study: Study, out: Path, contenders: Sequence[Contender], seeds: int) -> Path:
    """Writes report.html, report.md and figures; returns the HTML page."""
    settings = read_json(out / SETTINGS)
    folders = {c.label: [out / "runs" / f"{c.name}-seed{seed}" for seed in range(seeds)] for c in contenders}
    results = {label: [read_json(folder / RESULT) for folder in runs] for label, runs in folders.items()}
    columns = {
        "probe_middle": "probe, middle block",
        "probe_last": "probe, last block",
        "silhouette_middle": "silhouette, middle block",
        "silhouette_last": "silhouette, last block",
    }
    table = [
        [label, *(mean_and_spread([r["features"][column] for r in runs], 3) for column in columns)]
        for label, runs in results.items()
    ]
    first = next(iter(results.values()))[0]
    probe, silhouette_ = (mean_and_spread([first["pixels"][key]], 3) for key in ("probe", "silhouette"))
    table.append(["pixels themselves", probe, probe, silhouette_, silhouette_])
    table.append(["always the most frequent class", *2 * [mean_and_spread([first["chance"]], 3)], "", ""])
    picture = to_svg(_scatter({label: runs[0] / FILE for label, runs in folders.items()}, first["class_names"]))
    (out / "figures").mkdir(exist_ok=True)
    (out / "figures" / "tsne.svg").write_text(picture, encoding="utf-8")
    flat = [result for runs in results.values() for result in runs]
    content = {
        "study": study,
        "scale": settings["scale"],
        "facts": {
            **facts(settings, flat),
            "Features": f"tokens averaged over patches, images noised to t = {TIME:g}, class withheld; probe trained "
            f"on {first['probe_images']} training images, tested on {first['test_images']} held-out ones; silhouette "
            f"and t-SNE of {first['clustered_images']} {_clustered(first)}",
        },
        "head": ["", *columns.values()],
        "table": table,
        "picture": picture,
        "seeds": seeds,
        "commands": list(dict.fromkeys(result["command"] for result in flat)),
    }
    return write_pages(out, "features", content)


def _clustered(result: dict[str, Any]) -> str:
    alone = result["clustered_images"] == result["test_images"]
    return "held-out images" if alone else "held-out and training images, since some class has only one held-out image"


def _scatter(files: dict[str, Path], class_names: Sequence[str]) -> Figure:
    from sklearn.manifold import TSNE

    columns = min(2, len(files))
    rows = -(-len(files) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.8, 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    for axes, (label, file) in zip(panels, files.items()):
        stored = NpzFile(file)
        features, labels = stored.load("features"), stored.load("labels")
        centred = features - features.mean(0)
        perplexity = min(30.0, (len(features) - 1) / 3)
        places = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(centred)
        for k, name in enumerate(class_names):
            mine = places[labels == k]
            axes.scatter(*mine.T, s=9, color=colours(k % colours.N), label=name, linewidths=0)
        axes.set_title(label, fontsize=10)
        axes.set(xticks=[], yticks=[])
    for axes in panels[len(files) :]:
        axes.set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles[:20], names[:20], loc="outside right center", frameon=False, fontsize=8, markerscale=2)
    return figure
