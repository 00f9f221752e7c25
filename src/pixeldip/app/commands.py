"""From flags to the page, which is served until it is interrupted."""

import os
import threading

from ..arguments import AppArguments
from ..errors import UserError

LAST_SECONDS = 10
"""After Ctrl-C, in which the server may close the pages that are open."""


def app_command(arguments: AppArguments) -> None:
    """What `pixeldip app` does: serves the page on 127.0.0.1 until it is interrupted.

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
        last = threading.Timer(LAST_SECONDS, os._exit, [130])  # whatever a thread of the server still waits for
        last.daemon = True
        last.start()
        page.close(verbose=False)
