"""Self-contained HTML pages: pictures and plots are inside the file."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..files import write_text

ACCENT = "#2456d6"


def light_frame(axes: Axes, **grid: Any) -> None:
    """What every plot here has: a faint grid (arguments of `Axes.grid`), and no box around it."""
    axes.grid(alpha=0.25, **grid)
    axes.spines[["top", "right"]].set_visible(False)


def render(template: str, **content: Any) -> str:
    """A template of this folder, filled in; HTML ones escape what is put in."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("pixeldip", "report"),
        autoescape=jinja2.select_autoescape(("html",)),
        keep_trailing_newline=True,
    )
    return templates.get_template(template).render(**content)


def machine(environment: Mapping[str, Any]) -> str:
    """Where something was measured, from its `provenance.environment`, for people."""
    threads = "1 thread" if environment["threads"] == 1 else f"{environment['threads']} threads"
    return f"{environment['device']}, {threads}; torch {environment['torch']}, pixeldip {environment['pixeldip']}"


def write_pages(folder: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Writes report.md and report.html from the templates of a name; returns the HTML page."""
    for kind in ("md", "html"):
        write_text(folder / f"report.{kind}", render(f"{name}.{kind}", **content))
    return folder / "report.html"


def to_svg(figure: Figure) -> str:
    """A figure as an <svg> element; the same figure gives the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pixeldip", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def data_uri(image: Image.Image) -> str:
    """A picture as a data: URI (PNG)."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
