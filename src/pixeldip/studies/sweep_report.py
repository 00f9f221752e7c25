"""The report of a sweep."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..evaluation.registry import METRICS, label
from ..images import display_scale, enlarged
from ..report import data_uri, light_frame, machine, to_svg, write_pages
from .comparison_report import in_order, mean_and_spread
from .folder import SETTINGS, read_json, read_picture
from .sweep_settings import Setting

SHOWN = 12
"""Samples of every setting that the report shows."""
APART = 2.0
"""Standard deviations, of two values together, from which they count as different."""
FASTER = 1.1
"""Times that a setting must be faster than the best one to be worth naming."""
TICKS_APART = 1.15
AXES = {
    "evaluations": "evaluations",
    "guidance": "guidance scale",
    "time_shift": "time shift",
    "backbone_every": "backbone at 1 in",
}


def result_file(out: Path, setting: Setting) -> Path:
    """Where the numbers of a setting lie; its samples lie beside them, `.png`."""
    return out / "settings" / f"{setting.name}.json"


def is_there(out: Path, setting: Setting) -> bool:
    """Whether a setting has its numbers and its samples."""
    path = result_file(out, setting)
    return path.is_file() and path.with_suffix(".png").is_file()


def settings_there(out: Path) -> set[str]:
    """Names of those that have their numbers."""
    return {path.stem for path in out.glob("settings/*.json")}


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting and what was measured of it."""

    setting: Setting
    result: dict[str, Any]
    samples: Path

    def value(self, metric: str) -> tuple[float, float]:
        """A metric and its standard deviation, as many samples as real images where they are split for a floor; NaN
        where it is not defined for the samples."""
        scale, known = METRICS[metric].scale, self.result["floors"].get(metric, {})
        if "samples" in known:
            return scale * known["samples"], scale * known["samples_deviation"]
        return scale * self.result["metrics"].get(metric, math.nan), 0.0

    def real(self, metric: str) -> tuple[float, float] | None:
        """What real images score, and its standard deviation."""
        scale, known = METRICS[metric].scale, self.result["floors"].get(metric, {})
        return (scale * known["real"], scale * known.get("real_deviation", 0.0)) if "real" in known else None


def write_sweep_report(out: Path, settings: Sequence[Setting]) -> Path:
    """Writes report.html, report.md and figures of the settings; returns the HTML page."""
    facts = read_json(out / SETTINGS)
    rows = [Row(s, read_json(result_file(out, s)), result_file(out, s).with_suffix(".png")) for s in settings]
    first = rows[0].result
    metrics = in_order(row.result["metrics"] for row in rows)
    decisive = next((m for m in metrics if METRICS[m].better == "lower"), None)
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    curves = to_svg(_curves(rows, metrics))
    (figures / "curves.svg").write_text(curves, encoding="utf-8")
    shown = []
    for row in rows:
        picture = read_picture(row.samples)
        picture = enlarged(picture, display_scale(picture.height, 64))
        picture.save(figures / f"{row.setting.name}.png", optimize=True)
        shown.append((row.setting.in_words, f"figures/{row.setting.name}.png", data_uri(picture)))
    asked = facts["sweep"]
    as_reference = "with the reference's classes in its numbers" if facts["classes_as_reference"] else "of all classes"
    content = {
        "facts": {
            "Model": asked["model"],
            "Reference": asked["reference"],
            "Samples": f"{first['count']} for every setting, the same seeds, {as_reference}",
            "Precision": ", ".join(sorted({row.result.get("precision", "not recorded") for row in rows})),
            "Machine": machine(first["environment"]),
        },
        "head": ["", *(label(m, first["count"]) for m in metrics), "ms per image"],
        "table": [_cells(row, metrics) for row in rows],
        "floors": ["real images", *(_floor(rows, m) for m in metrics), ""],
        "verdict": verdict(rows, decisive) if decisive else "",
        "size": next((floor["size"] for floor in first["floors"].values() if "size" in floor), None),
        "reuses": any(setting.backbone_every > 1 for setting in settings),
        "curves": curves,
        "samples": shown,
        "warnings": sorted({warning for row in rows for warning in row.result["warnings"]}),
        "commands": list(dict.fromkeys(row.result["command"] for row in rows)),
    }
    return write_pages(out, "sweep", content)


def _text(value: float, deviation: float) -> str:
    if math.isnan(value):
        return "–"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "−") + (f" ± {deviation:.{digits}f}" if deviation else "")


def _cells(row: Row, metrics: Sequence[str]) -> list[str]:
    milliseconds = mean_and_spread([1e3 * row.result["seconds_per_image"]], 0)
    return [row.setting.in_words, *(_text(*row.value(m)) for m in metrics), milliseconds]


def _real(rows: Sequence[Row], metric: str) -> tuple[float, float] | None:
    """Of the first setting for which the metric is defined."""
    return next(filter(None, (row.real(metric) for row in rows)), None)


def _floor(rows: Sequence[Row], metric: str) -> str:
    real = _real(rows, metric)
    return "" if real is None else _text(*real)


def verdict(rows: Sequence[Row], metric: str) -> str:
    """The best setting, and the fastest that the metric does not tell from it."""
    rows = [row for row in rows if not math.isnan(row.value(metric)[0])]
    best = min(rows, key=lambda row: row.value(metric)[0])
    value, deviation = best.value(metric)

    def as_good(row: Row) -> bool:
        other, its = row.value(metric)
        return other - value <= APART * math.hypot(deviation, its)

    fastest = min(filter(as_good, rows), key=lambda row: row.result["seconds_per_image"])
    name = label(metric, best.result["count"])
    text = f"Lowest {name}: {best.setting.in_words} ({_text(value, deviation)})."
    times = best.result["seconds_per_image"] / fastest.result["seconds_per_image"]
    if times >= FASTER:
        text += (
            f" The fastest that is within {APART:g} standard deviations of it: {fastest.setting.in_words} "
            f"({_text(*fastest.value(metric))}), in 1/{times:.1f} of the time."
        )
    return text


def _curves(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """Each metric against the evaluations, where one solver has several, else against the guidance scale."""
    budgets = {(row.setting.solver, row.setting.evaluations) for row in rows}
    over = "evaluations" if len(budgets) > len({solver for solver, _ in budgets}) else "guidance"
    lines = _lines(rows, over)
    columns = min(len(metrics), 2)
    down = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.9 * columns + 2.2, 3.2 * down), layout="constrained")
    panels = figure.subplots(down, columns, squeeze=False).flatten()
    for axes in panels[len(metrics) :]:
        axes.remove()
    for axes, metric in zip(panels, metrics):
        for name, line in lines.items():
            places = [getattr(row.setting, over) for row in line]
            values, deviations = zip(*(row.value(metric) for row in line))
            axes.errorbar(places, values, yerr=deviations, fmt="o-", markersize=4, linewidth=1.4, capsize=2, label=name)
        if real := _real(rows, metric):
            axes.axhline(real[0], color="#888", linestyle=":", linewidth=1.2)
        if over == "evaluations":
            ticks: list[int] = []
            for count in sorted({row.setting.evaluations for row in rows}, reverse=True):
                if not ticks or TICKS_APART * count < ticks[-1]:  # Heun's 49 stands beside 50
                    ticks.append(count)
            axes.set_xscale("log")
            axes.set_xticks(ticks, list(map(str, ticks)), minor=False)
            axes.minorticks_off()
        axes.set_title(f"{label(metric, rows[0].result['count'])}\ndotted: real images", fontsize=9)
        axes.set_xlabel(AXES[over])
        light_frame(axes)
        axes.tick_params(labelsize=8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _lines(rows: Sequence[Row], over: str) -> dict[str, list[Row]]:
    """Rows that differ in `over` alone, by what else varies; an unguided row is the start of every interval's line."""
    guided = [row for row in rows if over != "guidance" or row.setting.guidance != 1] or list(rows)
    others = [field.name for field in dataclasses.fields(Setting) if field.name != over]
    told = [name for name in others if len({getattr(row.setting, name) for row in guided}) > 1]
    lines: dict[str, list[Row]] = {}
    for row in guided:
        name = ", ".join(_in_legend(row.setting, field) for field in told)
        lines.setdefault(name, []).append(row)
    for line in lines.values() if over == "guidance" else ():
        like = dataclasses.replace(line[0].setting, guidance=1.0, interval=(0.0, 1.0))
        line += [row for row in rows if row not in line and row.setting == like]
    for line in lines.values():
        line.sort(key=lambda row: getattr(row.setting, over))
    return lines


def _in_legend(setting: Setting, field: str) -> str:
    value = getattr(setting, field)
    if field == "interval":
        return f"{value[0]:g} < t < {value[1]:g}"
    return value if field == "solver" else f"{AXES[field]} {value:g}"
