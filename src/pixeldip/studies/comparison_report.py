"""The page about a comparison, as HTML and Markdown: a table, plots with error bars, samples, commands."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..evaluation.registry import METRICS
from ..images import display_scale, enlarged
from ..model import DiP
from ..model.heads.unet import DEFAULT_WIDTH
from ..recipe import parse_recipe
from ..report import ACCENT, data_uri, light_frame, machine, to_svg, write_pages
from ..terminal import clock
from ..training.preparation import model_config
from .folder import COSTS, RESULT, SAMPLES, SETTINGS, read_json, read_picture
from .study import Contender, Study

LOSS = "validation_loss"
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95% quantiles of Student's t for 1, 2 … 10 degrees of freedom."""


@dataclass(frozen=True)
class Row:
    """A contender's results, one entry per seed, and its cost."""

    contender: Contender
    results: list[dict[str, Any]]
    cost: dict[str, float]
    samples: Path

    def values(self, measure: str) -> list[float]:
        """A measure by seed; NaN where it is not defined for the samples."""
        return [r[LOSS] if measure == LOSS else r["metrics"].get(measure, math.nan) for r in self.results]


@dataclass(frozen=True)
class Measure:
    """A column: how it is named, how it is shown, and what real images score."""

    name: str
    label: str
    scale: float
    digits: int
    better: str
    floors: tuple[float, ...]
    """More than one where contenders of other patch sizes are measured otherwise; none of the loss."""

    @property
    def direction(self) -> str:
        return "dotted: real images" if self.better == "as real" else f"{self.better} is better"

    @property
    def floor(self) -> str:
        """What real images score, from the least to the most."""
        return " to ".join(dict.fromkeys(self.text([floor]) for floor in self.floors[:1] + self.floors[-1:]))

    def text(self, values: Sequence[float]) -> str:
        return mean_and_spread([self.scale * value for value in values], self.digits)


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """mean ± standard deviation, for people; a dash where a value is not defined."""
    if any(map(math.isnan, values)):
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}".replace("-", "−")


def write_report(study: Study, out: Path, contenders: Sequence[Contender], seeds: int) -> Path:
    """Writes report.html, report.md and its figures into the study's folder; returns the HTML page."""
    costs, settings = read_json(out / COSTS), read_json(out / SETTINGS)
    rows = []
    for contender in contenders:
        folders = [out / "runs" / f"{contender.name}-seed{seed}" for seed in range(seeds)]
        results = [read_json(folder / RESULT) for folder in folders]
        rows.append(Row(contender, results, costs["costs"][contender.name], folders[0] / SAMPLES))
    measures = _measures(rows)
    figures = {"measures.svg": to_svg(_dots(rows, measures)), "loss-by-time.svg": to_svg(_loss_by_time(rows))}
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for name, svg in figures.items():
        (folder / name).write_text(svg, encoding="utf-8")
    samples = []
    for row in rows:
        picture = read_picture(row.samples)
        picture = enlarged(picture, display_scale(picture.width // 9, 64))
        name = f"samples-{row.contender.name}.png"
        picture.save(folder / name, optimize=True)
        samples.append((row.contender.label, f"figures/{name}", data_uri(picture)))
    content = {
        "study": study,
        "scale": settings["scale"],
        "facts": _facts(settings, rows),
        "head": ["", *(m.label for m in measures), "parameters", "GFLOPs", "guided step", "training"],
        "table": [_cells(row, measures, rows) for row in rows],
        "floors": ["real images", *(m.floor for m in measures), "", "", "", ""],
        "difference_head": ["", *(m.label for m in measures)],
        "differences": _differences(rows, measures),
        "t": f"{student_t(seeds):.1f}" if seeds > 1 else "",
        "paper": paper_table(study, contenders),
        "figures": figures,
        "samples": samples,
        "warnings": sorted({warning for row in rows for result in row.results for warning in result["warnings"]}),
        "commands": _commands(rows),
        "seeds": seeds,
    }
    return write_pages(out, "comparison", content)


def _measures(rows: Sequence[Row]) -> list[Measure]:
    results = [result for row in rows for result in row.results]
    labels = {name: label for result in results for name, label in result["labels"].items()}
    measures = [Measure(LOSS, "validation loss", 1, 4, "lower", ())]
    for name in in_order(result["metrics"] for result in results):
        known = {result["floors"].get(name, {}).get("real") for result in results}
        floors = tuple(sorted(known - {None}))
        metric, label = METRICS[name], labels[name]
        largest = max(abs(metric.scale * result["metrics"].get(name, 0)) for result in results)
        digits = 1 if largest >= 100 else 2 if largest >= 2 else 3
        measures.append(Measure(name, label, metric.scale, digits, metric.better, floors))
    return measures


def in_order(metrics: Iterable[Mapping[str, float]]) -> list[str]:
    """The names of all metrics of several results, as they were asked for; some results may lack one that is not
    defined for their samples."""
    return list(dict.fromkeys(name for one in sorted(metrics, key=len, reverse=True) for name in one))


def _cells(row: Row, measures: Sequence[Measure], rows: Sequence[Row]) -> list[str]:
    rate = statistics.median(result["images_per_second"] for result in row.results)
    fastest = min(r.cost["latency"] for r in rows)
    return [
        row.contender.label,
        *(m.text(row.values(m.name)) for m in measures),
        f"{row.cost['parameters'] / 1e6:.2f} M",
        f"{row.cost['flops'] / 1e9:.3g}",
        f"{1e3 * row.cost['latency']:.3g} ms (×{row.cost['latency'] / fastest:.2f})",
        f"{rate:.3g} images/s",
    ]


def _differences(rows: Sequence[Row], measures: Sequence[Measure]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Every pair of contenders: its name, and for each measure the difference, and whether it counts as one."""
    table = []
    for a, b in itertools.combinations(rows, 2):
        cells = []
        for m in measures:
            mean, error, apart = difference(a.values(m.name), b.values(m.name))
            spread = "" if math.isnan(error) else f" ± {m.scale * error:.{m.digits}f}"
            text = "–" if math.isnan(mean) else f"{m.scale * mean:.{m.digits}f}{spread}".replace("-", "−")
            cells.append((text, apart))
        table.append((f"{a.contender.label} − {b.contender.label}", cells))
    return table


def student_t(seeds: int) -> float:
    """How many standard errors from 0 a mean over so many seeds, at least two, may be by chance, at 95%.

    More than 11 seeds get the value of 11, a little too large.
    """
    return STUDENT_T[min(seeds - 1, len(STUDENT_T)) - 1]


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, bool]:
    """Of two contenders, seed by seed: the mean difference, its standard error, and whether it is more than chance.

    With one seed the error is NaN, and no difference is; with a value that is NaN so is the mean.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, seeds = statistics.fmean(differences), len(differences)
    if seeds < 2 or math.isnan(mean):
        return mean, math.nan, False
    error = statistics.stdev(differences) / math.sqrt(seeds)
    return mean, error, abs(mean) > student_t(seeds) * error


def paper_table(study: Study, contenders: Sequence[Contender]) -> list[list[str]]:
    """What the paper measured of the contenders that were compared, under the sizes that it measured."""
    names = {c.name for c in contenders}
    theirs = [c for c in study.contenders("paper") if c.name in names and c.paper]
    columns = list(dict.fromkeys(column for c in theirs for column in c.paper))
    if not columns:
        return []
    return [["", *columns], *([c.label, *(c.paper.get(column, "") for column in columns)] for c in theirs)]


def facts(settings: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What all runs of a study share, for people."""
    recipe = settings["recipe"]
    training, resolution = recipe["training"], recipe["data"]["resolution"]
    size = f"{resolution}×{resolution}" if isinstance(resolution, int) else "×".join(map(str, resolution))
    held_out = settings["held_out"]
    images = training["steps"] * training["batch_size"]
    return {
        "Data": f"{recipe['data']['source']}, split {recipe['data']['split']}, at {size}; held out: "
        f"{held_out['source']}, split {held_out['split']}",
        "Network": _network(settings),
        "Training": f"{training['steps']} steps of {training['batch_size']} images, the same for all; "
        f"learning rate {recipe['optimizer']['lr']:g}, {recipe['optimizer']['schedule']}; "
        f"{clock(sum(images / result['images_per_second'] for result in results))} in all",
        "Machine": ", and ".join(dict.fromkeys(machine(result["environment"]) for result in results)),
    }


def _network(settings: dict[str, Any]) -> str:
    """What contenders change, in their recipe's sizes."""
    with torch.device("meta"):
        model = DiP(**model_config(parse_recipe(settings["recipe"], SETTINGS).model, num_classes=1)).config
    return (
        f"{model.depth} blocks, {model.hidden_size} wide, on {model.patch_size}×{model.patch_size} patches, a U-Net of "
        f"{model.head_width or DEFAULT_WIDTH} channels; contenders change what their names say"
    )


def _facts(settings: dict[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    evaluation = settings["recipe"]["evaluation"]
    return {
        **facts(settings, [result for row in rows for result in row.results]),
        "Samples": f"{evaluation['images']} of each run: {evaluation['solver']}, {evaluation['steps']} steps, guidance "
        f"{evaluation['guidance']:g}",
        "Latency": "measured in one run, all contenders in turn, with initial weights",
    }


def _commands(rows: Sequence[Row]) -> list[str]:
    first = rows[0].results[0]["recipe"]["out"]
    runs = dict.fromkeys(r["command"] for row in rows for r in row.results)
    return [*runs, f"pixeldip train {first}/recipe.yaml   # one run again; recipe.yaml is in every run's folder"]


def _dots(rows: Sequence[Row], measures: Sequence[Measure]) -> Figure:
    figure = Figure(figsize=(3.1 * len(measures) + 1.5, 0.42 * len(rows) + 1.1), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    places = range(len(rows), 0, -1)
    for axes, measure in zip(panels, measures):
        for place, row in zip(places, rows):
            values = [measure.scale * value for value in row.values(measure.name) if not math.isnan(value)]
            if not values:
                continue
            spread = statistics.stdev(values) if len(values) > 1 else 0
            axes.plot(values, [place] * len(values), "o", color=ACCENT, alpha=0.35, markersize=4, markeredgewidth=0)
            axes.errorbar(statistics.fmean(values), place, xerr=spread, fmt="o", color=ACCENT, capsize=3, markersize=6)
        axes.locator_params(axis="x", nbins=6)  # more would run into each other
        for floor in measure.floors:
            axes.axvline(measure.scale * floor, color="#888", linestyle=":", linewidth=1.2)
        axes.set_title(f"{measure.label}\n{measure.direction}", fontsize=9)
        light_frame(axes, axis="x")
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(list(places), [row.contender.label for row in rows])
    panels[0].set_ylim(0.4, len(rows) + 0.6)
    return figure


def _loss_by_time(rows: Sequence[Row]) -> Figure:
    """Each contender's loss over the mean of all of them, so that differences show at every noise level."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    curves = []
    for row in rows:
        losses = [result["validation_losses"] for result in row.results]
        curves.append([statistics.fmean(one[t] for one in losses) for t in losses[0]])
    times = [float(t) for t in rows[0].results[0]["validation_losses"]]
    mean = [statistics.fmean(values) for values in zip(*curves)]
    for row, curve in zip(rows, curves):
        ratio = [value / middle for value, middle in zip(curve, mean)]
        axes.plot(times, ratio, "o-", markersize=3, linewidth=1.4, label=row.contender.label)
    axes.set(xlabel="t (0 noise, 1 image)", ylabel="loss / mean of all contenders")
    light_frame(axes)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
