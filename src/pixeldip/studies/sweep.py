"""How a model is best sampled: every combination of some settings, measured on the same seeds and classes."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..errors import UserError
from ..evaluation import Evaluator
from ..evaluation.image_sets import SourceImages, open_images
from ..evaluation.registry import METRICS, label
from ..flow import check_interval, evaluations, steps_within
from ..images import display_scale, enlarged, grid
from ..pipeline import DiPPipeline
from ..processes import Processes, choose_precision, keep_freed_memory, start_processes, stop_processes
from ..provenance import environment
from ..recipe import SamplingSettings
from ..report import data_uri, machine, to_svg, write_pages
from ..sampling import SampledImages, load_pipeline
from ..terminal import PlainConsole
from .comparison_report import mean_and_spread
from .folder import SETTINGS, claim, read_json, write_result

SHOWN = 12
"""Samples of every setting that the report shows."""
APART = 2.0
"""Standard deviations, of two values together, from which they count as different."""
AXES = {"evaluations": "evaluations", "guidance": "guidance scale", "time_shift": "time shift"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One combination: a row of the table.

    Args:
        evaluations: of the network, a guided pair counted as one.
    """

    solver: str
    evaluations: int
    guidance: float
    interval: tuple[float, float]
    time_shift: float

    @property
    def name(self) -> str:
        interval = "" if self.guidance == 1 else f"-from{self.interval[0]:g}to{self.interval[1]:g}"
        shift = "" if self.time_shift == 1 else f"-shift{self.time_shift:g}"
        return f"{self.solver}-{self.evaluations}-guidance{self.guidance:g}{interval}{shift}"

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            steps=steps_within(self.solver, self.evaluations),
            solver=self.solver,
            guidance=self.guidance,
            guidance_interval=self.interval,
            time_shift=self.time_shift,
        )


def combinations(arguments: Any) -> list[Setting]:
    """Every combination of the values of `SweepArguments`, each once: without guidance there is no interval, and
    Heun's solver takes an odd number of evaluations.

    Raises:
        UserError: if an interval is the wrong way round.
    """
    for interval in arguments.guidance_interval:
        check_interval(interval)
    lists = (arguments.solver, arguments.evaluations, arguments.guidance, arguments.guidance_interval)
    found: dict[str, Setting] = {}
    for solver, count, guidance, interval, shift in itertools.product(*lists, arguments.time_shift):
        interval = (0.0, 1.0) if guidance == 1 else tuple(interval)
        asked = Setting(solver, count, guidance, interval, shift)
        setting = dataclasses.replace(asked, evaluations=evaluations(solver, asked.sampling.steps))
        found.setdefault(setting.name, setting)
    return list(found.values())


class FirstImages:
    """Keeps the first samples that go past."""

    def __init__(self) -> None:
        self.pictures: list[Image.Image] = []

    def __enter__(self) -> "FirstImages":
        return self

    def add(self, images: np.ndarray) -> None:
        self.pictures += [Image.fromarray(pixels) for pixels in images[: SHOWN - len(self.pictures)]]

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        pass


def sweep_command(arguments: Any) -> int:
    """What `pixeldip sweep` does with its `SweepArguments`; what is in the folder already is not measured again.

    Raises:
        UserError: for every mistake in the arguments or files.
    """
    keep_freed_memory()
    settings = combinations(arguments)
    processes = start_processes(arguments.device)
    console = PlainConsole(quiet=not processes.is_main)
    try:
        precision = choose_precision(arguments.precision, processes.device)
        pipeline = load_pipeline(arguments.model, processes.device, precision)
        size = pipeline.config.height, pipeline.config.width
        real = reference_images(arguments, size)
        classes = classes_like(real, pipeline)
        options = dataclasses.replace(
            arguments, reference="" if real else arguments.reference, patch_size=pipeline.model.config.patch_size
        )
        if "nearest" in options.metrics and not options.train_images:
            raise UserError("nearest measures the distance to the training images: name them, --train-images")
        asked = ("model", "reference", "reference_split", "label_column", "images", "metrics", "train_images")
        facts = {name: getattr(arguments, name) for name in asked}
        missing = [s for s in settings if not processes.on_main(lambda s=s: _result(arguments.out, s).is_file())]
        evaluator = Evaluator(options, *size, processes, console, real) if missing else None
        processes.on_main(lambda: claim(arguments.out, {"sweep": facts, "classes_as_reference": bool(classes)}))
        for number, setting in enumerate(missing, start=1):
            console.rule(f"{number} of {len(missing)}: {in_words(setting)}", align="left")
            samples = SampledImages(
                pipeline,
                setting.sampling,
                range(arguments.images),
                classes,
                order_seed=None if classes else 0,
                name=arguments.model,
            )
            first = FirstImages()
            evaluation = evaluator.evaluate(samples, first)
            processes.on_main(lambda s=setting, f=first, e=evaluation: _keep(arguments.out, s, f, e.record, processes))
        if processes.is_main:
            page = write_sweep_report(arguments.out, settings)
            console.print(f"done; open {page}", highlight=False, soft_wrap=True)
        processes.barrier()
    finally:
        stop_processes()
    return 0


def reference_images(arguments: Any, size: tuple[int, int]) -> SourceImages | None:
    """The real images, with classes; None for an `.npz`, which the evaluator opens itself."""
    if arguments.reference.endswith(".npz"):
        return None
    if not arguments.reference:
        raise UserError("--reference is missing: name images that were not trained on")
    try:
        return open_images(
            arguments.reference,
            arguments.reference_split,
            size,
            arguments.allow_resolution_mismatch,
            arguments.label_column,
            skip_broken=True,
        )
    except UserError as error:
        raise UserError(f"--reference {error}") from error


def classes_like(real: SourceImages | None, pipeline: DiPPipeline) -> list[int]:
    """The class of each real image, so that samples have every class as often; empty if the classes are not the
    model's, and samples then have them all equally often."""
    names = list(pipeline.config.class_names or ())
    if real is None or real.labels is None or not names or list(real.source.class_names) != names:
        return []
    return real.labels.tolist()


def _result(out: Path, setting: Setting) -> Path:
    return out / "settings" / f"{setting.name}.json"


def _keep(out: Path, setting: Setting, first: FirstImages, record: dict[str, Any], processes: Processes) -> None:
    path = _result(out, setting)
    path.parent.mkdir(exist_ok=True)
    sampling_seconds = record["seconds"]["samples, images"]
    grid(first.pictures, len(first.pictures)).save(path.with_suffix(".png"))
    write_result(
        path,
        {
            "setting": dataclasses.asdict(setting),
            "metrics": record["metrics"],
            "floors": record["floors"],
            "warnings": record["warnings"],
            "count": record["samples"]["count"],
            "seconds_per_image": sampling_seconds / record["samples"]["count"] * processes.world_size,
            "environment": environment(processes),
        },
    )


def in_words(setting: Setting) -> str:
    """A setting as the flags of `pixeldip sample` name it."""
    text = f"{setting.solver}, {setting.evaluations} evaluations, guidance {setting.guidance:g}"
    if setting.guidance != 1 and setting.interval != (0.0, 1.0):
        text += f" for {setting.interval[0]:g} < t < {setting.interval[1]:g}"
    return text + (f", time shift {setting.time_shift:g}" if setting.time_shift != 1 else "")


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting and what was measured of it."""

    setting: Setting
    result: dict[str, Any]
    samples: Path

    def value(self, metric: str) -> tuple[float, float]:
        """A metric and its standard deviation, as many samples as real images where they are split for a floor."""
        scale, known = METRICS[metric].scale, self.result["floors"].get(metric, {})
        if "samples" in known:
            return scale * known["samples"], scale * known["samples_deviation"]
        return scale * self.result["metrics"][metric], 0.0

    def real(self, metric: str) -> tuple[float, float] | None:
        """What real images score, and its standard deviation."""
        scale, known = METRICS[metric].scale, self.result["floors"].get(metric, {})
        return (scale * known["real"], scale * known.get("real_deviation", 0.0)) if "real" in known else None


def write_sweep_report(out: Path, settings: Sequence[Setting]) -> Path:
    """Writes report.html, report.md and figures of the settings; returns the HTML page."""
    facts = read_json(out / SETTINGS)
    rows = [Row(s, read_json(_result(out, s)), _result(out, s).with_suffix(".png")) for s in settings]
    first = rows[0].result
    metrics = list(first["metrics"])
    decisive = next((m for m in metrics if METRICS[m].better == "lower"), None)
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    curves = to_svg(_curves(rows, metrics))
    (figures / "curves.svg").write_text(curves, encoding="utf-8")
    shown = []
    for row in rows:
        picture = Image.open(row.samples)
        picture = enlarged(picture, display_scale(picture.height, 64))
        picture.save(figures / f"{row.setting.name}.png", optimize=True)
        shown.append((in_words(row.setting), f"figures/{row.setting.name}.png", data_uri(picture)))
    asked = facts["sweep"]
    as_reference = "with the reference's classes in its numbers" if facts["classes_as_reference"] else "of all classes"
    content = {
        "facts": {
            "Model": asked["model"],
            "Reference": asked["reference"],
            "Samples": f"{first['count']} for every setting, the same seeds, {as_reference}",
            "Machine": machine(first["environment"]),
        },
        "head": ["", *(label(m, first["count"]) for m in metrics), "ms per image"],
        "table": [_cells(row, metrics) for row in rows],
        "floors": ["real images", *(_floor(rows[0], m) for m in metrics), ""],
        "verdict": _verdict(rows, decisive) if decisive else "",
        "curves": curves,
        "samples": shown,
        "warnings": sorted({warning for row in rows for warning in row.result["warnings"]}),
        "commands": list(dict.fromkeys(row.result["command"] for row in rows)),
    }
    return write_pages(out, "sweep", content)


def _text(value: float, deviation: float) -> str:
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "−") + (f" ± {deviation:.{digits}f}" if deviation else "")


def _cells(row: Row, metrics: Sequence[str]) -> list[str]:
    milliseconds = mean_and_spread([1e3 * row.result["seconds_per_image"]], 0)
    return [in_words(row.setting), *(_text(*row.value(m)) for m in metrics), milliseconds]


def _floor(row: Row, metric: str) -> str:
    real = row.real(metric)
    return "" if real is None else _text(*real)


def _verdict(rows: Sequence[Row], metric: str) -> str:
    """The best setting, and the fastest that the metric does not tell from it."""
    best = min(rows, key=lambda row: row.value(metric)[0])
    value, deviation = best.value(metric)

    def as_good(row: Row) -> bool:
        other, its = row.value(metric)
        return other - value <= APART * math.hypot(deviation, its)

    fastest = min(filter(as_good, rows), key=lambda row: row.result["seconds_per_image"])
    name = label(metric, best.result["count"])
    text = f"Lowest {name}: {in_words(best.setting)} ({_text(value, deviation)})."
    if fastest is not best:
        times = best.result["seconds_per_image"] / fastest.result["seconds_per_image"]
        text += (
            f" The fastest that is within {APART:g} standard deviations of it: {in_words(fastest.setting)} "
            f"({_text(*fastest.value(metric))}), in 1/{times:.1f} of the time."
        )
    return text


def _curves(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """Each metric against the evaluations, where one solver has several, else against the guidance scale."""
    budgets = {(row.setting.solver, row.setting.evaluations) for row in rows}
    over = "evaluations" if len(budgets) > len({solver for solver, _ in budgets}) else "guidance"
    lines = _lines(rows, over)
    figure = Figure(figsize=(3.9 * len(metrics) + 2.2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics):
        for name, line in lines.items():
            places = [getattr(row.setting, over) for row in line]
            values, deviations = zip(*(row.value(metric) for row in line))
            axes.errorbar(places, values, yerr=deviations, fmt="o-", markersize=4, linewidth=1.4, capsize=2, label=name)
        if real := rows[0].real(metric):
            axes.axhline(real[0], color="#888", linestyle=":", linewidth=1.2)
        if over == "evaluations":
            ticks = sorted({row.setting.evaluations for row in rows})
            axes.set_xscale("log")
            axes.set_xticks(ticks, list(map(str, ticks)), minor=False)
            axes.minorticks_off()
        axes.set_title(f"{label(metric, rows[0].result['count'])}\ndotted: real images", fontsize=9)
        axes.set_xlabel(AXES[over])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
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
    for line in lines.values():
        like = dataclasses.replace(line[0].setting, guidance=1.0, interval=(0.0, 1.0))
        line += [row for row in rows if row not in line and row.setting == like]
        line.sort(key=lambda row: getattr(row.setting, over))
    return lines


def _in_legend(setting: Setting, field: str) -> str:
    value = getattr(setting, field)
    if field == "interval":
        return f"{value[0]:g} < t < {value[1]:g}"
    return value if field == "solver" else f"{AXES[field]} {value:g}"
