"""The tab that samples images, shows their way from noise, keeps them, and restores how they were made."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ..images import read_note
from ..processes import precision_name
from ..sampling import SampledImages
from .engine import Moment, watch
from .gallery import Gallery
from .messages import told_in_page, warn_in_page
from .models import Models
from .parts import NOT_COMPLETED, PLAIN, SAMPLING, TELLING, offered, pixel_image
from .settings import (
    ImageSettings,
    Limits,
    SolutionControls,
    SubjectControls,
    class_names,
    settings_from_note,
    solution_controls,
    subject_controls,
)

NOISY, HEADING = "noisy image x_t", "predicted image"


def requested(models: Models, limits: Limits, settings: ImageSettings) -> SampledImages:
    """The images a request asks for, not sampled yet.

    Raises:
        UserError: if it cannot be met.
    """
    settings, seeds = settings.checked(limits)
    return SampledImages(
        models.load(settings.model),
        settings,
        seeds,
        settings.classes,
        height=settings.height,
        width=settings.width,
        name=settings.model,
    )


def generate_tab(page: gr.Blocks, models: Models, gallery: Gallery, limits: Limits) -> None:
    """Adds the tab's contents to the page."""
    path = gr.State((), time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            model = gr.Dropdown([], label="Model", info="runs and saved models found here")
            subject = subject_controls(limits)
            solution = solution_controls(limits)
            controls = [*subject.inputs, *solution.inputs]
            with gr.Row():
                start = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=280):
            picture = pixel_image(show_label=False, elem_id="picture", alt_text="The images of this request")
            line = gr.Markdown("", elem_id="progress")
            with gr.Row():
                moment = gr.Slider(0, 1, 1, step=1, label="Path, noise to image", interactive=False)
                what = gr.Radio([HEADING, NOISY], value=HEADING, label="Show")
            show_gallery, in_gallery = _gallery_part(models, gallery, limits, model, controls)

    def defaults(name: str | None) -> list[Any]:
        if not name:
            return [gr.skip()] * len(controls)
        subject = SubjectControls.updates(models.load(name), limits)
        return [*subject, *SolutionControls.values(models.load(name).default_settings, limits)]

    def open_page() -> list[Any]:
        return [offered(models), *show_gallery()]

    def generate(view: str, name: str, *values: Any) -> Iterator[tuple]:
        count = len(subject.inputs)
        settings = ImageSettings(
            model=name or "",
            **SubjectControls.settings(*values[:count]),
            **SolutionControls.settings(*values[count:]),
        )
        images = requested(models, limits, settings)
        for now in watch(images):
            if now.pixels is None:
                yield _look(now.now, view), now.line, gr.skip(), gr.skip()
            else:
                gallery.add(images, now.pixels)
                last = len(now.path) - 1
                slider = gr.update(maximum=last, value=last, interactive=True)
                yield _look(now.now, view), f"{now.line} · t = 1", now.path, slider

    page.load(open_page, None, [model, *in_gallery], **PLAIN).then(told_in_page(defaults), model, controls, **TELLING)
    model.input(told_in_page(defaults), model, controls, **TELLING)
    running = gr.on(
        [start.click, subject.seeds.submit],
        told_in_page(generate),
        [what, model, *controls],
        [picture, line, path, moment],
        show_progress="minimal",
        show_progress_on=line,
        scroll_to_output=True,
        **SAMPLING,
    )
    running.success(show_gallery, None, in_gallery, **PLAIN)
    # told once it has ended: its last view cannot come later
    running.failure(lambda: NOT_COMPLETED, None, line, **PLAIN)
    stop.click(None, None, None, cancels=running, **PLAIN)
    gr.on(
        [moment.input, what.input],
        _look_along,
        [path, moment, what],
        [picture, line],
        trigger_mode="always_last",
        **PLAIN,
    )


def _look(at: Moment, view: str) -> Any:
    return at.noisy if view == NOISY else at.heading


def _look_along(path: tuple[Moment, ...], index: float, view: str) -> tuple:
    if not path:
        return gr.skip(), gr.skip()
    at = path[min(int(index), len(path) - 1)]
    return _look(at, view), f"t = {at.t:.3f}"


def _gallery_part(
    models: Models, gallery: Gallery, limits: Limits, model: gr.Dropdown, controls: list[Component]
) -> tuple[Callable[[], tuple], list[Component]]:
    """Adds the kept images, what the chosen one tells, and buttons that set model and controls as it was made.

    Returns:
        What shows the images there are now, as the handler of an event, and its outputs.
    """
    shown = gr.State([])
    chosen = gr.State(None)
    gr.Markdown("### Gallery\nNewest first. Every PNG file says how it was made: choose one to read it.")
    pictures = gr.Gallery(
        show_label=False,
        columns=8,
        height=300,
        object_fit="contain",
        allow_preview=False,
        buttons=[],
        interactive=False,
        elem_id="gallery",
        elem_classes="pixels",
    )
    made_with = gr.Textbox(show_label=False, interactive=False, elem_id="made-with", placeholder="its settings")
    with gr.Row():
        restore = gr.Button("Restore settings", interactive=False, min_width=130, elem_id="restore")
        download = gr.DownloadButton("Download PNG", interactive=False, min_width=130)
        upload = gr.UploadButton("Restore from PNG …", file_types=[".png"], min_width=130)

    def show_gallery() -> tuple[list[str], list[str]]:
        files = [str(file) for file in gallery.newest()]
        return files, files

    def choose(files: list[str], event: gr.SelectData) -> tuple:
        file = files[event.index]
        note = settings_from_note(read_note(Path(file)))
        return file, note.describe(), gr.update(interactive=True), gr.update(value=file, interactive=True)

    restored = told_in_page(functools.partial(_restored, models, limits))
    pictures.select(told_in_page(choose), shown, [chosen, made_with, restore, download], **TELLING)
    restore.click(restored, [chosen, model], [model, *controls], **TELLING)
    upload.upload(restored, [upload, model], [model, *controls], **TELLING)
    return show_gallery, [pictures, shown]


def _restored(models: Models, limits: Limits, file: str, current: str | None) -> list[Any]:
    """The model and the controls as an image's file tells that it was made; the current model where that one is not
    here."""
    note = read_note(Path(file))
    settings = settings_from_note(note)
    name, notes = models.offered(settings.model), []
    if name is None:
        notes.append(f"the model it was made by is not offered here ({settings.model})")
        name = current
    if note.get("precision") not in (None, precision_name(models.precision)):
        notes.append(f"it was made in {note['precision']}, and the page computes in another precision")
    names = class_names(models.load(name)) if name else []
    kept = [label for label in settings.classes if label in names]
    notes += [f"the model has no class {label}" for label in settings.classes if label not in names]
    solution = SolutionControls.values(settings, limits)
    if (solution[0], solution[3]) != (settings.guidance, settings.steps):
        notes.append("its guidance or steps are beyond what is allowed here")
    if notes:
        warn_in_page(f"Not all is as it was: {'; '.join(notes)}.")
    subject = [gr.update(choices=names, value=kept, visible=bool(names)), *SubjectControls.values(settings)[1:]]
    return [gr.update(choices=models.names(), value=name), *subject, *solution]
