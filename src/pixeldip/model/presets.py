"""The keywords of a `DiP`: of named sizes, one row each, with its parameters and what the paper measured for it; and of
a saved model."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Preset:
    """`parameters` counts 1000 classes on RGB; `fid` is the paper's on ImageNet, where it gives one."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    parameters: int
    head: str = "unet"
    fid: float | None = None
    source: str = ""


PRESETS = {
    "dip-s/8": Preset(384, 12, 6, 8, 34_289_411),
    "dip-s/16": Preset(384, 12, 6, 16, 39_394_563),
    "dip-s/32": Preset(384, 12, 6, 32, 40_279_299),
    "dip-b/8": Preset(768, 12, 12, 8, 130_980_611),
    "dip-b/16": Preset(768, 12, 12, 16, 136_405_251),
    "dip-b/32": Preset(768, 12, 12, 32, 138_174_723),
    "dip-l/8": Preset(1024, 22, 16, 8, 419_786_755),
    "dip-l/16": Preset(1024, 22, 16, 16, 425_424_387),
    "dip-l/32": Preset(1024, 22, 16, 32, 427_783_683),
    "dip-xl/8": Preset(1152, 26, 16, 8, 626_245_283),
    "dip-xl/16": Preset(1152, 26, 16, 16, 631_989_411, fid=1.79, source="Table 1, 600 epochs"),
    "dip-xl/32": Preset(1152, 26, 16, 32, 634_643_619, fid=2.31, source="Table 3, 512x512"),
    "dit-26x1152/16": Preset(1152, 26, 16, 16, 628_563_360, head="linear", fid=5.28, source="Table 2"),
    "dit-32x1152/16": Preset(1152, 32, 16, 16, 771_953_664, head="linear", fid=4.91, source="Table 2"),
    "dit-26x1280/16": Preset(1280, 26, 16, 16, 775_539_008, head="linear", fid=4.28, source="Table 2"),
    "dit-26x1536/16": Preset(1536, 26, 16, 16, 1_115_891_328, head="linear", fid=2.83, source="Table 2"),
}


def preset_config(name: str) -> dict[str, int | str]:
    """The `DiP` keywords of a preset.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name).lower(), PRESETS, n=3, cutoff=0.5)
        hint = f"; perhaps {' or '.join(near)}" if near else ""
        raise UserError(f"no preset {name!r}{hint}. Presets: {', '.join(PRESETS)}")
    row = PRESETS[name]
    return {
        "hidden_size": row.hidden_size,
        "depth": row.depth,
        "num_heads": row.num_heads,
        "patch_size": row.patch_size,
        "head": row.head,
    }


def network_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `DiP` keywords among the entries of a saved configuration."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
