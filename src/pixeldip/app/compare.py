"""The tab that samples two settings with the same seeds, side by side."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from ..images import psnr
from .engine import watch
from .gallery import Gallery
from .generate import requested
from .messages import told_elsewhere, told_in_page
from .models import Models
from .parts import NOT_COMPLETED, PLAIN, SAMPLING, TELLING, offered, pixel_image
from .settings import ImageSettings, Limits, SolutionControls, SubjectControls, solution_controls, subject_controls


@dataclass
class _Side:
    model: gr.Dropdown
    solution: SolutionControls

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [self.model, *self.solution.inputs]


def compare_tab(page: gr.Blocks, models: Models, gallery: Gallery, limits: Limits) -> None:
    """Adds the tab's contents to the page."""
    subject = subject_controls(limits)
    sides, pictures = [], []
    with gr.Row():
        for name in "AB":
            with gr.Column(min_width=280):
                gr.Markdown(f"### {name}")
                model = gr.Dropdown([], label=f"Model of {name}")
                sides.append(_Side(model, solution_controls(limits)))
    with gr.Row():
        start = gr.Button("Compare", variant="primary", min_width=120, elem_id="compare")
        stop = gr.Button("Stop", min_width=80)
    line = gr.Markdown("", elem_id="comparison")
    with gr.Row():
        for name in "AB":
            pictures.append(
                pixel_image(
                    label=name,
                    alt_text=f"The images of setting {name}",
                    elem_id=f"compared-{name}",
                    min_width=280,
                )
            )
    a, b = sides

    def open_page() -> list[Any]:
        return [offered(models) for _ in sides]

    def subject_of(name: str | None) -> list[Any]:
        return SubjectControls.updates(models.load(name), limits) if name else [gr.skip()] * len(subject.inputs)

    def solution_of(name: str | None) -> list[Any]:
        if not name:
            return [gr.skip()] * len(a.solution.inputs)
        return SolutionControls.values(models.load(name).default_settings, limits)

    def with_and_without_guidance(name: str | None) -> list[Any]:
        guided = solution_of(name)
        return [*guided, 1.0, *guided[1:]] if name else 2 * guided

    def compare(*values: Any) -> Iterator[tuple]:
        count, each = len(subject.inputs), len(a.inputs)
        what = SubjectControls.settings(*values[:count])
        requests = []
        for first in (count, count + each):
            name, *solution = values[first : first + each]
            settings = ImageSettings(model=name or "", **what, **SolutionControls.settings(*solution))
            requests.append(requested(models, limits, settings))
        results = []
        for side, images in enumerate(requests):
            with contextlib.closing(watch(images)) as views:
                for view in views:
                    both = [gr.skip(), gr.skip()]
                    both[side] = view.now.heading
                    yield (*both, f"{'AB'[side]}: {view.line}")
            gallery.add(images, view.pixels)
            results.append((view.pixels, view.line))
        (one, said_a), (other, said_b) = results
        yield gr.skip(), gr.skip(), f"A: {said_a}  \nB: {said_b}  \n{difference(one, other)}"

    opening = page.load(open_page, None, [a.model, b.model], **PLAIN)
    both = [*a.solution.inputs, *b.solution.inputs]
    for show, controls in ((subject_of, subject.inputs), (with_and_without_guidance, both)):
        opening.then(told_elsewhere(show, len(controls)), a.model, controls, **PLAIN)
    a.model.input(told_in_page(subject_of), a.model, subject.inputs, **TELLING)
    for side in sides:
        side.model.input(told_in_page(solution_of), side.model, side.solution.inputs, **TELLING)
    running = start.click(
        told_in_page(compare),
        [*subject.inputs, *a.inputs, *b.inputs],
        [*pictures, line],
        show_progress="minimal",
        show_progress_on=line,
        **SAMPLING,
    )
    running.failure(lambda: NOT_COMPLETED, None, line, **PLAIN)
    stop.click(None, None, None, cancels=running, **PLAIN)


def difference(one: np.ndarray, other: np.ndarray) -> str:
    """How far two batches of images, uint8, are apart."""
    if one.shape != other.shape:
        return "The images differ in size."
    ratio = psnr(one, other)
    return "The images are equal." if math.isinf(ratio) else f"PSNR between them: {ratio:.1f} dB"
