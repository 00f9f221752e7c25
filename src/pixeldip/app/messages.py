"""A user's mistake as a message in the page."""

import functools
import html
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch

from ..errors import UserError

SECONDS_SHOWN = 20


def told_in_page(handler: Callable) -> Callable:
    """The handler, or generator, of an event; a UserError it raises becomes a message."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def generator(*arguments: Any) -> Iterator[Any]:
            with _told():
                yield from handler(*arguments)

        return generator

    @functools.wraps(handler)
    def function(*arguments: Any) -> Any:
        with _told():
            return handler(*arguments)

    return function


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise _message(str(error)) from None
    except torch.OutOfMemoryError:
        raise _message("out of memory: ask for fewer images, or a smaller size") from None


def _message(text: str) -> gr.Error:
    return gr.Error(html.escape(text), duration=SECONDS_SHOWN, print_exception=False)


def warn_in_page(text: str) -> None:
    """A message in the page that limits what was done."""
    gr.Warning(html.escape(text), title="Note")
