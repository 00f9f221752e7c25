"""The network: backbone, heads, and DiP, which joins them."""

from .dip import DiP, check_size
from .heads import HEADS
from .int8 import Int8Linear
from .placement import PLACEMENTS
from .presets import PRESETS, Preset, network_config, preset_config

__all__ = [
    "HEADS",
    "PLACEMENTS",
    "PRESETS",
    "DiP",
    "Int8Linear",
    "Preset",
    "check_size",
    "network_config",
    "preset_config",
]
