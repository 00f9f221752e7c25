"""The pictures of benchmarks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS, LIMIT = "#2456d6", "#9aa4b2", "#111827"
SERIES = (OURS, "#c2410c", "#0f766e")
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def plot(record: Mapping[str, Any], file: Path) -> None:
    """Bars of times, or lines over batch sizes or processes."""
    with matplotlib.rc_context(STYLE):
        figure = _lines(record) if "series" in record else _bars(record)
        figure.savefig(file, metadata={"Description": record["environment"]["command"]})


def _made_with(record: Mapping[str, Any]) -> str:
    size = f"{record['height']}×{record['width']}"
    return f"{size}, {record['model']['name']}, {record['environment']['device']}"


def _bars(record: Mapping[str, Any]) -> Figure:
    """Seconds of whole images, or else of steps, each with its limit drawn in."""
    if "images" in record:
        label = "seconds for a guided batch"
        rows = {
            f"{name}, {row['steps']} steps": (row["seconds"], row["limit"]) for name, row in record["images"].items()
        }
    else:
        label = "seconds for a training step"
        steps = record["steps"]
        rows = {name: (row["milliseconds"] / 1e3, row["floor_milliseconds"] / 1e3) for name, row in steps.items()}
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(rows)), dpi=150, layout="constrained")
    axes: Axes = figure.subplots()
    for row, (name, (seconds, limit)) in enumerate(rows.items()):
        axes.barh(row, seconds, 0.62, color=OURS if name.startswith("ours") else OTHERS)
        axes.plot([limit] * 2, [row - 0.31, row + 0.31], color=LIMIT, linewidth=2)
        axes.annotate(f"{seconds:.3g} s", (seconds, row), (4, 0), textcoords="offset points", va="center")
    axes.plot([], [], color=LIMIT, linewidth=2, label="at the rate of a large matrix product")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"{label} of {record['batch']} at {_made_with(record)}")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    return figure


def _lines(record: Mapping[str, Any]) -> Figure:
    """Each series in axes of its own: [batch or processes, figure] pairs, beside what the limit or the first allows."""
    series, what = record["series"], record["benchmark"]
    figure = Figure(figsize=(4.2 * max(len(series), 1), 3.4), dpi=150, layout="constrained")
    columns = figure.subplots(1, len(series), squeeze=False)[0]
    for axes, (name, points), colour in zip(columns, series.items(), SERIES):
        counts, values = zip(*points)
        axes.plot(counts, values, marker="o", color=colour)
        highest = max(values)
        if what == "throughput":
            shares = [record["steps"][f"{name}, {count}"]["share_of_limit"] for count in counts]
            limits = [value / share for value, share in zip(values, shares)]
            highest = max(limits)
            axes.plot(counts, limits, color=LIMIT, linewidth=1.5, linestyle="--", label="limit")
            axes.legend(frameon=False)
        elif what == "scaling":
            ideal = [values[0] * count / counts[0] for count in counts]
            highest = max(ideal)
            axes.plot(counts, ideal, color=LIMIT, linewidth=1.5, linestyle="--", label="without loss")
            axes.legend(frameon=False)
        axes.set_title(name, fontsize=10)
        axes.set_xticks(counts)
        axes.set_ylim(0, 1.2 * highest)
        axes.set_xlabel("processes" if what == "scaling" else "images in a batch")
        axes.set_ylabel("MiB" if what == "memory" else "images/s")
    figure.suptitle(f"{what} at {_made_with(record)}", fontsize=10)
    return figure
