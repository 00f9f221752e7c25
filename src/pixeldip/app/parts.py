"""What several tabs are made of: kinds of events, pictures, paths to walk along, the choice among models."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
import torch

from ..errors import UserError
from ..pipeline import DiPPipeline
from .models import Models

SAMPLING = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private", "show_progress": "minimal"}
TELLING = {"api_visibility": "private", "show_progress": "hidden"}  # Gradio shows messages of queued events only
PLAIN = {"queue": False, **TELLING}
NOT_COMPLETED = "not completed"
"""What a page says of a request that was stopped or refused; why it was refused is a message."""
FOUND = "runs and saved models found here"
ON, OFF = gr.update(interactive=True), gr.update(interactive=False)


def pixel_image(**more: Any) -> gr.Image:
    """A picture that is shown pixel by pixel, and cannot be changed."""
    return gr.Image(interactive=False, format="png", buttons=["fullscreen"], elem_classes="pixels", **more)


def path_slider(label: str) -> gr.Slider:
    """A slider along a path that is not there yet."""
    return gr.Slider(0, 1, 1, step=1, label=label, interactive=False, buttons=[])


def at_the_end(path: Sequence, whole: bool) -> Any:
    """The update of a slider along a path as far as it goes; one that still grows cannot be walked along."""
    last = len(path) - 1
    return gr.update(maximum=max(last, 1), value=last, interactive=whole)


def not_completed(path: Sequence) -> tuple[str, Any]:
    """What a page says, and the update of the slider along the path as far as it came; told once the request has ended,
    whose last view cannot come later."""
    return NOT_COMPLETED, gr.update(interactive=len(path) > 1)


def model_choice(label: str, **more: Any) -> gr.Dropdown:
    """A choice among models; its info tells how it is with the chosen one."""
    return gr.Dropdown([], label=label, info=FOUND, **more)


def offered(models: Models) -> Any:
    """The update of a choice that offers the models there are now, the first one chosen."""
    names = models.names()
    return gr.update(choices=names, value=names[0] if names else None)


def offered_again(models: Models, name: str | None) -> tuple[Any, Any]:
    """The updates of a choice that offers the models there are now, and of the button that needs the chosen one: if
    that is gone, none is chosen."""
    names = models.names()
    if not name or name in names:
        return gr.update(choices=names), gr.skip()
    return gr.update(choices=names, value=None, info=f"`{name}` is not here any more"), OFF


def when_loaded(
    models: Models, controls_of: Callable[[DiPPipeline], list[Any]], count: int
) -> Callable[..., Iterator[list[Any]]]:
    """The handler that shows what belongs to a chosen model.

    Args:
        controls_of: the updates of `count` controls.

    Returns:
        Given the model's name and those of other models that the button needs, it yields updates of the controls, of
        the choice, which tells that the model loads or why it cannot be loaded, and of the button, which is out of use
        until the controls belong to the model.
    """
    unchanged = [gr.skip()] * count

    def show(name: str | None, *others: str | None) -> Iterator[list[Any]]:
        if not name:
            yield [*unchanged, gr.skip(), OFF]
            return
        yield [*unchanged, gr.update(info="loading …"), OFF]
        try:
            controls = controls_of(models.load(name))
        except (UserError, torch.OutOfMemoryError) as error:
            yield [*unchanged, gr.update(info=f"`{error}`"), OFF]
        else:
            ready = all(_loads(models, other) for other in others)
            yield [*controls, gr.update(info=FOUND), gr.update(interactive=ready)]

    return show


def _loads(models: Models, name: str | None) -> bool:
    try:
        models.load(name or "")
    except (UserError, torch.OutOfMemoryError):
        return False
    return True
