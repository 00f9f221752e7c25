"""What several tabs are made of: kinds of events, pictures, the choice among models."""

from typing import Any

import gradio as gr

from .models import Models

SAMPLING = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
TELLING = {"api_visibility": "private", "show_progress": "hidden"}  # Gradio shows messages of queued events only
PLAIN = {"queue": False, **TELLING}
NOT_COMPLETED = "not completed"
"""What a page says of a request that was stopped or refused; why it was refused is a message."""


def pixel_image(**more: Any) -> gr.Image:
    """A picture that is shown pixel by pixel, and cannot be changed."""
    return gr.Image(interactive=False, format="png", buttons=["fullscreen"], elem_classes="pixels", **more)


def offered(models: Models) -> Any:
    """The update of a dropdown that offers the models there are now, the first one chosen."""
    names = models.names()
    return gr.update(choices=names, value=names[0] if names else None)
