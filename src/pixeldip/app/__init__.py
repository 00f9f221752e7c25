"""A page on this machine to play with models and to follow training."""

import os
import threading
from typing import Any

from ..errors import UserError


def app_command(arguments: Any) -> None:
    """What `pixeldip app` does with its `AppArguments`: serves the page on 127.0.0.1 until it is interrupted.

    Raises:
        UserError: if Gradio is missing, nothing is found to show, or the port is taken.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        from .engine import stop_all
        from .page import launch_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: pip install 'pixeldip[app]'") from None
    page = launch_page(arguments)
    print(
        f"{page.local_url} (only from this machine; Ctrl-C ends it); pictures are kept in {arguments.gallery}",
        flush=True,
    )
    try:
        threading.Event().wait()
    finally:
        stop_all()
        page.close(verbose=False)
