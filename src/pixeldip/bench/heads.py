"""The other heads on the same backbone: the contenders of Table 2."""

from typing import Any

from ..model import DiP, network_config
from ..model.heads import HEADS


def other_heads(model: DiP) -> dict[str, dict[str, Any]]:
    """By name, the arguments of a DiP that is this model with another head after its last block, of that head's own
    default size, and of DiT-only."""
    sizes = {**network_config(model.config), "head_width": None, "head_depth": None, "placement": "post"}
    return {
        "DiT-only" if head == "linear" else f"head {head}": {**sizes, "head": head}
        for head in HEADS
        if head != model.config.head
    }
