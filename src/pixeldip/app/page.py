"""The page: its tabs, its looks and its queue."""

import gradio as gr

from .. import __version__
from ..arguments import AppArguments
from ..errors import UserError
from ..processes import choose_device, choose_precision, precision_name
from .compare import compare_tab
from .gallery import Gallery
from .generate import generate_tab
from .head import head_tab
from .models import Models
from .settings import Limits
from .training import training_tab

LARGEST_UPLOAD = "20mb"
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.blue,
    neutral_hue=gr.themes.colors.slate,
    font=["system-ui", "sans-serif"],  # nothing is fetched from elsewhere
    font_mono=["ui-monospace", "monospace"],
)
# inside @media Gradio's own selectors reach the tabs' contents alone
CSS = """
.gradio-container { width: 100%; max-width: 1400px !important; margin: auto; }
.pixels img { image-rendering: pixelated; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)) !important; }
.gradio-container input[type=range]:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 4px; }
.gradio-container .app { padding: clamp(12px, 3vw, 32px) !important; }
@media (max-width: 640px) { .tab-container button { padding: 8px 8px !important; } }
"""


def launch_page(arguments: AppArguments) -> gr.Blocks:
    """Serves the page in the background, on 127.0.0.1; its `local_url` is the address.

    Raises:
        UserError: if there is nothing to show, the gallery cannot be written, or the port is taken.
    """
    device = choose_device(arguments.device)
    models = Models(arguments.models, arguments.folders, device, choose_precision(arguments.precision, device))
    if not models.names() and not models.runs():
        places = ", ".join(map(str, arguments.folders))
        raise UserError(f"no model and no run in {places}: name one, or make one with pixeldip demo")
    gallery = Gallery(arguments.gallery)
    limits = Limits(arguments.max_images, arguments.max_steps, arguments.max_side)
    page = _build(models, gallery, limits)
    page.queue(max_size=arguments.max_queue, default_concurrency_limit=4, api_open=False)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=arguments.port,
            inbrowser=arguments.open,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            allowed_paths=[str(gallery.folder)],
            max_file_size=LARGEST_UPLOAD,
            theme=THEME,
            css=CSS,
            ssr_mode=False,
        )
    except OSError:
        raise UserError(f"port {arguments.port} is taken; choose another with --port") from None
    return page


def _build(models: Models, gallery: Gallery, limits: Limits) -> gr.Blocks:
    where = f"{models.device}, {precision_name(models.precision)}"
    page = gr.Blocks(title="pixeldip", analytics_enabled=False, delete_cache=(3600, 86400))
    with page:
        gr.Markdown(f"# pixeldip\nImages in pixel space, step by step · {where} · version {__version__}")
        with gr.Tab("Generate") as tab:
            generate_tab(page, tab, models, gallery, limits)
        with gr.Tab("Compare") as tab:
            compare_tab(page, tab, models, gallery, limits)
        with gr.Tab("Head") as tab:
            head_tab(page, tab, models)
        with gr.Tab("Training") as tab:
            training_tab(page, tab, models)
    return page
