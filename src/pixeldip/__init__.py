"""pixeldip: image generation directly in pixel space with DiP."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("pixeldip")
__all__ = ["DiP", "DiPPipeline", "UserError", "__version__"]

_HOMES = {"DiP": "model", "DiPPipeline": "pipeline", "UserError": "errors"}


def __getattr__(name: str) -> Any:
    # Loaded at first use: importing torch and diffusers takes seconds, `pixeldip --help` should not.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
