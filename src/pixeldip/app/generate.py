"""The tab that samples images, shows their way from noise, keeps them, and restores how they were made."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from ..errors import UserError
from ..images import display_scale, enlarged, read_note
from ..pipeline import DiPPipeline
from ..processes import precision_name
from ..sampling import SampledImages
from .engine import Moment, watch
from .gallery import SHOWN, Gallery
from .messages import told_in_page, warn_in_page
from .models import Models
from .parts import (
    FOUND,
    OFF,
    ON,
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
PRESS = "() => document.querySelector('#generate').click()"  # which does nothing while the button is out of use
LARGE = 384  # a chosen picture's width on the page, about


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


def generate_tab(page: gr.Blocks, tab: gr.Tab, models: Models, gallery: Gallery, limits: Limits) -> None:
    """Adds the tab's contents to the page."""
    path = gr.State((), time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            model = model_choice("Model")
            subject = subject_controls(limits)
            solution = solution_controls(limits)
            controls, of_model = [*subject.inputs, *solution.inputs], [*subject.of_model, *solution.inputs]
            with gr.Row():
                start = gr.Button("Generate", variant="primary", interactive=False, min_width=120, elem_id="generate")
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=280):
            picture = pixel_image(show_label=False, elem_id="picture", alt_text="The images of this request")
            line = gr.Markdown("", elem_id="progress")
            with gr.Row():
                moment = path_slider("Path, noise to image")
                what = gr.Radio([HEADING, NOISY], value=HEADING, label="Show")
            show_gallery, chosen, in_gallery = _gallery_part(models, gallery, limits, [model, *controls, start])

    def defaults(pipeline: DiPPipeline) -> list[Any]:
        subject = SubjectControls.updates(pipeline, limits)
        return [*subject, *SolutionControls.values(pipeline.default_settings, limits)]

    def open_page(chosen: str | None) -> list[Any]:
        return [offered(models), *show_gallery(chosen)]

    def show_again(name: str | None, chosen: str | None) -> list[Any]:
        return [*offered_again(models, name), *show_gallery(chosen)]

    def generate(view: str, name: str, *values: Any) -> Iterator[tuple]:
        count = len(subject.inputs)
        settings = ImageSettings(
            model=name or "",
            **SubjectControls.settings(*values[:count]),
            **SolutionControls.settings(*values[count:]),
        )
        images = requested(models, limits, settings)
        for now in watch(images):
            done = now.pixels is not None
            if done:
                gallery.add(images, now.pixels)
            text = f"{now.line} · t = 1" if done else now.line
            yield _look(now.now, view), text, now.path, at_the_end(now.path, done)

    show = when_loaded(models, defaults, len(of_model))
    shown = [*of_model, model, start]
    page.load(open_page, chosen, [model, *in_gallery], **PLAIN).then(show, model, shown, **TELLING)
    model.input(show, model, shown, trigger_mode="always_last", **TELLING)
    tab.select(show_again, [model, chosen], [model, start, *in_gallery], **PLAIN)
    subject.seeds.submit(None, js=PRESS, **PLAIN)
    running = start.click(
        told_in_page(generate),
        [what, model, *controls],
        [picture, line, path, moment],
        show_progress_on=picture,
        scroll_to_output=True,
        **SAMPLING,
    )
    running.success(show_gallery, chosen, in_gallery, **PLAIN)
    running.failure(not_completed, path, [line, moment], **PLAIN)
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
    models: Models, gallery: Gallery, limits: Limits, restored: list[Component]
) -> tuple[Callable[[str | None], list[Any]], gr.State, list[Component]]:
    """Adds the kept images, what the chosen one tells, and buttons that set the tab's controls as it was made.

    Args:
        restored: the outputs of `_restored`.

    Returns:
        What shows the images there are now, as the handler of an event, its input, which is the chosen file, and its
        outputs.
    """
    model = restored[0]
    shown = gr.State([])
    chosen = gr.State(None)
    title = gr.Markdown()
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
    with gr.Row():
        large = pixel_image(
            show_label=False, visible=False, min_width=200, elem_id="chosen", alt_text="The chosen picture"
        )
        with gr.Column(min_width=200):
            made_with = gr.Textbox(
                show_label=False, lines=3, interactive=False, elem_id="made-with", placeholder="its settings"
            )
            with gr.Row():
                restore = gr.Button("Restore settings", interactive=False, min_width=180, elem_id="restore")
                download = gr.DownloadButton("Download PNG", interactive=False, min_width=180)
                upload = gr.UploadButton("Restore from PNG …", file_types=[".png"], min_width=180)
    about_one = [chosen, large, made_with, restore, download]

    def show_gallery(chosen: str | None) -> list[Any]:
        newest, count = gallery.newest()
        files = list(map(str, newest))
        here = chosen in files
        at = files.index(chosen) if here else math.nan  # JSON's null, which deselects; Gradio leaves a None out
        which = f"The newest {SHOWN} of {count:,}" if count > SHOWN else "Newest first"
        text = f"### Gallery\n{which}. Every PNG file says how it was made: choose one to read it."
        one = [gr.skip()] * len(about_one) if here else _untold("")
        return [text, gr.update(value=files, selected_index=at), files, *one]

    def choose(files: list[str], event: gr.SelectData) -> list[Any]:
        return _about(files[event.index])

    restore_from = told_in_page(functools.partial(_restored, models, limits))
    pictures.select(choose, shown, about_one, trigger_mode="multiple", **PLAIN)
    restore.click(restore_from, [chosen, model], restored, **TELLING)
    upload.upload(restore_from, [upload, model], restored, **TELLING)
    return show_gallery, chosen, [title, pictures, shown, *about_one]


def _about(file: str) -> list[Any]:
    """What the page shows of a chosen picture: the file, the updates of the large picture and of the text, and those of
    the buttons; where it does not say how it was made, that."""
    try:
        text = settings_from_note(read_note(Path(file))).describe()
        with Image.open(file) as picture:
            large = enlarged(picture, display_scale(picture.width, LARGE))
    except (UserError, OSError) as error:
        return _untold(str(error))
    return [file, gr.update(value=large, visible=True), text, ON, gr.update(value=file, interactive=True)]


def _untold(text: str) -> list[Any]:
    """Likewise, of no picture."""
    return [None, gr.update(value=None, visible=False), text, OFF, OFF]


def _restored(models: Models, limits: Limits, file: str, current: str | None) -> list[Any]:
    """The updates of the model, of the controls and of the button that needs them, as an image's file tells that it was
    made; the current model where that one is not here."""
    note = read_note(Path(file))
    settings = settings_from_note(note)
    name, notes = models.offered(settings.model), []
    if name is None:
        notes.append(f"the model it was made by is not offered here ({settings.model})")
        name = current if current in models.names() else None
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
    choice = gr.update(choices=models.names(), value=name, info=FOUND)
    return [choice, *subject, *solution, gr.update(interactive=name is not None)]
