"""The tab that samples two settings with the same seeds, side by side."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from ..images import psnr
from ..pipeline import DiPPipeline
from .engine import watch
from .gallery import Gallery
from .generate import requested
from .messages import told_in_page
from .models import Models
from .parts import (
    NOT_COMPLETED,
    OFF,
    PLAIN,
    SAMPLING,
    TELLING,
    model_choice,
    offered,
    offered_again,
    pixel_image,
    when_loaded,
)
from .settings import ImageSettings, Limits, SolutionControls, SubjectControls, solution_controls, subject_controls


@dataclass
class _Side:
    model: gr.Dropdown
    solution: SolutionControls

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [self.model, *self.solution.inputs]


def compare_tab(page: gr.Blocks, tab: gr.Tab, models: Models, gallery: Gallery, limits: Limits) -> None:
    """Adds the tab's contents to the page."""
    subject = subject_controls(limits)
    sides, pictures = [], []
    with gr.Row():
        for name in "AB":
            with gr.Column(min_width=280):
                gr.Markdown(f"### {name}")
                model = model_choice(f"Model of {name}")
                sides.append(_Side(model, solution_controls(limits)))
    with gr.Row():
        start = gr.Button("Compare", variant="primary", interactive=False, min_width=120, elem_id="compare")
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

    def show_again(of_a: str | None, of_b: str | None) -> tuple:
        (choice_a, button_a), (choice_b, button_b) = (offered_again(models, name) for name in (of_a, of_b))
        return choice_a, choice_b, OFF if OFF in (button_a, button_b) else gr.skip()

    def solution_of(pipeline: DiPPipeline) -> list[Any]:
        return SolutionControls.values(pipeline.default_settings, limits)

    def unguided(pipeline: DiPPipeline) -> list[Any]:
        return [1.0, *solution_of(pipeline)[1:]]

    def subject_and_solution(pipeline: DiPPipeline) -> list[Any]:
        return [*SubjectControls.updates(pipeline, limits), *solution_of(pipeline)]

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

    def shows(side: _Side, other: _Side, controls_of: Callable[[DiPPipeline], list[Any]]) -> dict[str, Any]:
        controls = [*subject.of_model, *side.solution.inputs] if side is a else side.solution.inputs
        return {
            "fn": when_loaded(models, controls_of, len(controls)),
            "inputs": [side.model, other.model],
            "outputs": [*controls, side.model, start],
            **TELLING,
        }

    opening = page.load(open_page, None, [a.model, b.model], **PLAIN)
    opening.then(**shows(a, b, subject_and_solution)).then(**shows(b, a, unguided))
    a.model.input(trigger_mode="always_last", **shows(a, b, subject_and_solution))
    b.model.input(trigger_mode="always_last", **shows(b, a, solution_of))
    tab.select(show_again, [a.model, b.model], [a.model, b.model, start], **PLAIN)
    running = start.click(
        told_in_page(compare),
        [*subject.inputs, *a.inputs, *b.inputs],
        [*pictures, line],
        show_progress_on=pictures,
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
