"""The tab that shows what the head adds, step by step along a path."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import gradio as gr
import pandas as pd
import torch
from PIL import Image

from ..errors import UserError
from ..flow import clean_image
from ..pipeline import DiPPipeline
from .contexts import STEPS, HeadStep, compare_contexts, noise_share
from .engine import Pace, sheet, watched
from .messages import told_in_page
from .models import Models
from .parts import (
    OFF,
    PLAIN,
    SAMPLING,
    TELLING,
    at_the_end,
    model_choice,
    not_completed,
    offered,
    offered_again,
    path_slider,
    pixel_image,
    when_loaded,
)
from .settings import ImageSettings, Limits, class_names

IMAGES = 4
PICTURES = (
    "The noisy image x_t",
    "What the velocity leads to",
    "The same, without the context",
    "The velocity",
    "The same, without the context",
)
SERIES = ("with the context", "without", "difference")


@dataclass(frozen=True)
class _Seen:
    """A step as the page shows it. shares: for each of `SERIES`; pictures: for each of `PICTURES`."""

    t: float
    shares: list[float]
    pictures: list[Image.Image]

    @classmethod
    def of(cls, step: HeadStep, patch_size: int) -> Self:
        x, v, w = step.x, step.velocity, step.without_context
        t = torch.full((len(x),), step.t)
        shown = x, clean_image(x, v, t), clean_image(x, w, t), v, w
        return cls(step.t, step.coarse_shares(patch_size), [sheet(images, columns=2) for images in shown])


def head_tab(page: gr.Blocks, tab: gr.Tab, models: Models) -> None:
    """Adds the tab's contents to the page."""
    steps = gr.State((), time_to_live=3600)
    gr.Markdown(
        "### What the head adds\n"
        "The backbone hands the head a context for each patch; the head paints the patch from it and from the noisy "
        "pixels. Here the same head paints once more with **zeros in place of the context**. The plot tells what share "
        "of the velocity's power lies in **coarse** waves, longer than a patch; the rest lies in **fine** ones."
    )
    with gr.Row():
        model = model_choice("Model", min_width=160)
        label = gr.Dropdown([], label="Class", info="of every image", min_width=120)
        seeds = gr.Textbox("0-3", label=f"Seeds (at most {IMAGES})", info="an image for each", min_width=120)
    with gr.Row():
        start = gr.Button("Measure", variant="primary", interactive=False, min_width=120, elem_id="measure")
        stop = gr.Button("Stop", min_width=80)
    line = gr.Markdown("", elem_id="measured")
    plot = gr.LinePlot(
        x="t",
        y="coarse share, %",
        color="of",
        y_lim=[0, 100],
        x_title="t, from noise (0) to the image (1)",
        height=280,
        color_title=" ",
        color_map=dict(zip(SERIES, ("#3b82f6", "#d97706", "#059669"))),
        buttons=["fullscreen"],
        show_label=False,
        visible=False,
    )
    moment = path_slider("Step, from noise to image")
    at = gr.Markdown("")
    pictures = []
    with gr.Row():
        for captions in (PICTURES[:1], PICTURES[1:3], PICTURES[3:]):  # a narrow page breaks between them
            with gr.Column(scale=len(captions), min_width=140 * len(captions)), gr.Row():
                for caption in captions:
                    with gr.Column(min_width=130):
                        gr.Markdown(caption)
                        pictures.append(pixel_image(show_label=False, alt_text=caption))
    measured = [line, plot, steps, moment, at, *pictures]

    def classes_of(pipeline: DiPPipeline) -> list[Any]:
        names = class_names(pipeline)
        return [gr.update(choices=names, value=names[0] if names else None, visible=bool(names))]

    def nothing_measured() -> list[Any]:
        return ["", gr.update(visible=False), (), OFF, "", *[None] * len(pictures)]

    def measure(name: str | None, label: str | None, seeds: str) -> Iterator[tuple]:
        settings = ImageSettings(model=name or "", seeds=seeds, steps=STEPS)
        _, chosen = settings.checked(Limits(images=IMAGES, steps=STEPS))
        pipeline = models.load(settings.model)
        if pipeline.model.config.head == "linear":
            raise UserError(f"{settings.model} is DiT-only: it has no head that paints pixels")
        patch_size, size = pipeline.model.config.patch_size, (pipeline.config.height, pipeline.config.width)
        pace, seen = Pace(STEPS), []
        work = watched(lambda tell: compare_contexts(pipeline, label, chosen, tell))
        with contextlib.closing(work) as telling:
            for step in telling:
                seen.append(_Seen.of(step, patch_size))
                if pace.due():
                    slider = at_the_end(seen, whole=False)
                    yield pace.line(len(seen)), curves(seen), tuple(seen), slider, *pictures_at(seen, STEPS)
        line = f"{len(chosen)} paths of {STEPS} steps in {pace.seconds():.1f} s. "
        line += f"White noise: {noise_share(*size, patch_size):.0%} coarse."
        middle = STEPS // 2
        slider = gr.update(maximum=STEPS - 1, value=middle, interactive=True)
        yield line, curves(seen), tuple(seen), slider, *pictures_at(seen, middle)

    def curves(seen: Sequence[_Seen]) -> Any:
        rows = [(step.t, 100 * share, name) for step in seen for name, share in zip(SERIES, step.shares)]
        return gr.update(value=pd.DataFrame(rows, columns=["t", "coarse share, %", "of"]), visible=True)

    def pictures_at(seen: Sequence[_Seen], index: float) -> list[Any]:
        if not seen:
            return [gr.skip()] * (1 + len(pictures))
        step = seen[min(int(index), len(seen) - 1)]
        return [f"t = {step.t:.3f}", *step.pictures]

    running = start.click(
        told_in_page(measure), [model, label, seeds], measured, show_progress_on=[plot, *pictures], **SAMPLING
    )
    running.failure(not_completed, steps, [line, moment], **PLAIN)
    stop.click(None, None, None, cancels=running, **PLAIN)
    show = when_loaded(models, classes_of, 1)
    shown = [label, model, start]
    page.load(lambda: offered(models), None, model, **PLAIN).then(show, model, shown, **TELLING)
    model.input(show, model, shown, trigger_mode="always_last", **TELLING)
    model.input(nothing_measured, None, measured, cancels=running, **PLAIN)
    tab.select(lambda name: offered_again(models, name), model, [model, start], **PLAIN)
    moment.input(pictures_at, [steps, moment], [at, *pictures], trigger_mode="always_last", **PLAIN)
