"""Samples during a run: whose, of what weights, and how they are read again."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pixeldip import DiP, DiPPipeline
from pixeldip.recipe import PreviewSection
from pixeldip.settings import SamplingFlags, SamplingSettings
from pixeldip.training import train
from pixeldip.training.ema import EMA
from pixeldip.training.preview import preview_classes, read_previews, save_preview

from .conftest import QUIET, TINY_MODEL, opened_up, tiny_recipe


def test_a_run_is_sampled_as_its_previews_are(tmp_path: Path, picture_folder: Path) -> None:
    own = SamplingSettings(3, "heun", 1.5, (0.2, 0.9), 2.0)
    preview = {"every": 6, "images": 4, **dataclasses.asdict(own)}
    train(tiny_recipe(tmp_path / "run", picture_folder, preview=preview), QUIET)
    pipeline = DiPPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.default_settings == own
    ((step, found),) = read_previews(tmp_path / "run", (16, 16), 4).items()
    images = pipeline(preview_classes(4, 2)[1], seeds=range(4)).images
    assert step == 6 and all(np.array_equal(a, np.asarray(b)) for a, b in zip(found, images, strict=True))
    assert SamplingFlags(steps=7).settings(own) == dataclasses.replace(own, steps=7)


@pytest.mark.parametrize(
    ("images", "num_classes", "columns", "rows"),
    [
        (80, 10, 8, list(range(10))),
        (20, 10, 4, list(range(0, 10, 2))),
        (96, 32, 9, list(range(0, 32, 3))),
        (32, 10, 4, [0, 1, 2, 3, 5, 6, 7, 8]),
        (99, 99, 9, list(range(0, 99, 9))),
        (64, 1000, 8, list(range(0, 1000, 125))),
        (4, 1, 4, [0]),
    ],
)
def test_a_preview_shows_classes_in_order_and_is_no_strip(
    images: int, num_classes: int, columns: int, rows: list[int]
) -> None:
    across, labels = preview_classes(images, num_classes)
    assert across == columns and [labels[i] for i in range(0, images, columns)] == rows
    assert labels == sorted(labels) and preview_classes(images, 0) == (int(images**0.5), None)


@pytest.mark.parametrize("side", [16, 32, 80])  # a screen shows them enlarged by 4, 2 and 1
def test_previews_are_cut_apart_again(side: int, tmp_path: Path) -> None:
    model, pipeline = opened_up(DiP(**TINY_MODEL, num_classes=0)), {"height": side, "width": side}
    preview = PreviewSection(images=4, steps=2)
    save_preview(tmp_path, 7, model, pipeline, preview)
    ((step, found),) = read_previews(tmp_path, (side, side), 4).items()
    images = DiPPipeline(model, **pipeline)(seeds=range(4), **preview.pipeline_arguments()).images
    assert step == 7 and all(np.array_equal(a, np.asarray(b)) for a, b in zip(found, images, strict=True))


def test_the_average_is_sampled_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kernel that moves it leaves no trace of having done so, as fused ones do."""

    def fused(tensors: list[torch.Tensor], ends: list[torch.Tensor], weight: float) -> None:
        for tensor, end in zip(tensors, ends):
            tensor.data.lerp_(end, weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", fused)
    model = opened_up(DiP(**TINY_MODEL))
    ema, fresh = EMA(model, 0.5), DiP(**TINY_MODEL).eval()
    x, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    with torch.no_grad():
        before = ema.model(x, t, y)  # from here on the head keeps what it composed
        ema.update(opened_up(model), 5)
        fresh.load_state_dict(ema.model.state_dict())
        assert not torch.allclose(ema.model(x, t, y), before)
        torch.testing.assert_close(ema.model(x, t, y), fresh(x, t, y))
