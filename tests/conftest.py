import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: no test may reach for the network
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of tests are here
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; OpenMP's threads would wait for each other, spinning
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose kernels then run here, too

import contextlib
import dataclasses
import io
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from pixeldip import DiP, DiPPipeline
from pixeldip.data import TrainingImages, open_source
from pixeldip.recipe import DataSection, Recipe, load_recipe, parse_recipe, save_recipe
from pixeldip.run_folder import newest_checkpoint, step_of

QUIET = Console(quiet=True)
PATIENCE = 300  # seconds; a busy machine ends late
TINY_MODEL = {"patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "head_width": 8}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Initial weights are the same whichever tests ran before in this process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="session", autouse=True)
def reference_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the tests off the user's cache of reference features."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("references")
    patch.setenv("PIXELDIP_CACHE", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="session")
def seeded_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception weights of the published file's names and shapes, but seeded numbers."""
    from pixeldip.evaluation.inception import Inception

    from .evaluation.make_fixtures import seeded_state

    shapes = {k: tuple(v.shape) for k, v in Inception().state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("weights") / "seeded.pth"
    torch.save({name: torch.from_numpy(values) for name, values in seeded_state(shapes).items()}, path)
    return path


def make_picture(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    """A smooth random picture, so that JPEG hardly changes it."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The picture as an image file of Pillow's format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Two classes of six pictures."""
    folder = tmp_path / "pictures"
    for k, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            make_picture(10 * k + i).save(folder / name / f"{i}.png")
    return folder


def gaussian_velocity(mean: float, std: float) -> Callable[[torch.Tensor, float, float], torch.Tensor]:
    """The exact velocity E[x - eps | x_t] for data N(mean, std^2), along which x_t = t mean + s_t z for a fixed z."""

    def velocity(x: torch.Tensor, t: float, _: float) -> torch.Tensor:
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def folder_images(folder: Path, **section) -> TrainingImages:
    """A folder as training reads it, at 16 x 16 pixels."""
    settings = DataSection(source=str(folder), resolution=16, **section)
    return TrainingImages(open_source(settings), settings, seed=0)


def tiny_recipe(out: Path, source: Path | str, **sections: dict) -> Recipe:
    """A recipe that trains in a second on one core, in fp32 on the CPU."""
    values: dict = {
        "out": str(out),
        "data": {"source": str(source), "resolution": 16},
        "model": TINY_MODEL,
        "training": {
            "steps": 6,
            "batch_size": 4,
            "precision": "fp32",
            "device": "cpu",
            "log_every": 1,
            "save_every": 3,
            "ema_decay": 0.9,
        },
        "preview": {"every": 0},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_recipe(values)


def tiny_study_recipe(path: Path) -> Path:
    """What studies train on a laptop, but of a tiny network; for `--recipe`."""
    recipe = load_recipe("study-laptop")
    recipe.model = dataclasses.replace(recipe.model, **TINY_MODEL)
    save_recipe(recipe, path)
    return path


def saved_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer state and step of a checkpoint that is not sharded, by name."""
    return load_file(checkpoint / "state" / "state.safetensors")


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: weights, optimizer state and averaged weights."""
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    tensors = saved_state(checkpoint)
    ema = DiPPipeline.from_pretrained(str(run)).model.state_dict()
    return tensors | {f"ema.{name}": value for name, value in ema.items()}


def assert_same_state(a: Path, b: Path) -> None:
    ours, theirs = state_of(a), state_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def newest_step(run: Path) -> int:
    checkpoint = newest_checkpoint(run)
    return step_of(checkpoint) if checkpoint else 0


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk: no file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def opened_up(model: DiP, seed: int = 0) -> DiP:
    """The model with every parameter moved off its initial value: no gate closed, no output vanishing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved_model(folder: Path, size: int, sampling: dict | None = None, **changes: object) -> Path:
    """A pipeline of three named classes, its weights moved off their initial values."""
    model = opened_up(DiP(**{**TINY_MODEL, **changes}, num_classes=3))
    names = ["ant", "bee", "cow"]
    DiPPipeline(model, height=size, width=size, class_names=names, sampling=sampling).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `saved_model` makes, of 16 x 16 pixels."""
    return saved_model(tmp_path_factory.mktemp("model"), 16)


@pytest.fixture
def pipeline(model_folder: Path) -> DiPPipeline:
    """That model, which each test may change."""
    pipeline = DiPPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
