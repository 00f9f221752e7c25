"""The picture of a latency benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

OURS, OTHERS, LIMIT = "#2456d6", "#9aa4b2", "#111827"


def plot_images(record: Mapping[str, Any], file: Path) -> None:
    """Bars of the seconds a batch takes by name, each with its limit drawn in."""
    images = record["images"]
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 0.9 + 0.45 * len(images)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for row, (name, image) in enumerate(images.items()):
            axes.barh(row, image["seconds"], 0.62, color=OURS if name.startswith("ours") else OTHERS)
            axes.plot([image["limit"]] * 2, [row - 0.31, row + 0.31], color=LIMIT, linewidth=2)
            axes.annotate(
                f"{image['seconds']:.1f} s", (image["seconds"], row), (4, 0), textcoords="offset points", va="center"
            )
        axes.plot([], [], color=LIMIT, linewidth=2, label="at the rate of a large matrix product")
        axes.set_yticks(range(len(images)), [f"{name}, {image['steps']} steps" for name, image in images.items()])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(
            f"seconds for a guided batch of {record['batch']} at {record['height']}×{record['width']}, "
            f"{record['model']['name']}, {record['environment']['device']}"
        )
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        figure.savefig(file, metadata={"Description": record["environment"]["command"]})
