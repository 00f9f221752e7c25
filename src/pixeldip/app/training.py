"""The tab that follows a training run: what its folder says, read again every few seconds."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import pandas as pd

from ..data import BrokenImage, decode
from ..errors import UserError
from ..recipe import Recipe, load_recipe
from ..run_folder import LOG, RECIPE, checkpoints, preview_files, read_evaluations, read_metrics, step_of
from ..terminal import clock
from .models import Models
from .parts import PLAIN, pixel_image

SECONDS_BETWEEN_LOOKS = 3
QUIET_SECONDS = 60  # after which a run that has not ended counts as standing still
POINTS = 400


@dataclass(frozen=True)
class RunNow:
    """A run as its folder shows it."""

    recipe: Recipe
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    previews: list[Path]
    checkpoints: list[Path]
    seconds_ago: float

    @classmethod
    def read(cls, run: Path) -> "RunNow":
        """Raises UserError if its recipe cannot be read."""
        return cls(
            load_recipe(str(run / RECIPE)),
            read_metrics(run),
            read_evaluations(run),
            preview_files(run),
            checkpoints(run),
            time.time() - (run / LOG).stat().st_mtime,
        )

    def line(self) -> str:
        """Where it stands."""
        if not self.metrics:
            return "Begun; no step is logged yet."
        last, steps = self.metrics[-1], self.recipe.training.steps
        text = f"**step {last['step']:,} of {steps:,}** · loss {last['loss']:.4f}"
        text += f" · {last['images_per_second']:.0f} images/s"
        if "mfu" in last:
            text += f" · MFU {last['mfu']:.0%} · {last['memory_gib']:.1f} GiB"
        if last["step"] >= steps:
            return f"{text} · done"
        left = (steps - last["step"]) * self.recipe.training.batch_size / max(last["images_per_second"], 1e-9)
        if self.seconds_ago > QUIET_SECONDS:
            return f"{text} · nothing new for {clock(self.seconds_ago)}; the same command resumes it if it has stopped"
        return f"{text} · {clock(left)} left"

    def curve(self, key: str) -> pd.DataFrame:
        """A logged value over the steps, in at most `POINTS` means of neighbours."""
        frame = pd.DataFrame(self.metrics, columns=["step", key])
        group = frame.index // -(-len(frame) // POINTS) if len(frame) else frame.index
        return frame.groupby(group).mean()

    def table(self) -> list[list[str]]:
        """The checkpoints, newest first: step, when, size."""
        rows = []
        for path in reversed(self.checkpoints):
            try:
                files = [file.stat() for file in path.rglob("*") if file.is_file()]
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            except FileNotFoundError:  # the run has just deleted it
                continue
            rows.append([f"{step_of(path):,}", when, f"{sum(f.st_size for f in files) / 2**20:.1f}"])
        return rows

    def measured(self) -> pd.DataFrame:
        """The evaluations: a row each."""
        return pd.DataFrame(
            [{"step": e["step"], **{k: f"{v:.4g}" for k, v in e["metrics"].items()}} for e in self.evaluations]
        )


class Looked(NamedTuple):
    """What was there at the last look, by which the next one tells whether anything is new."""

    run: str
    metrics: int
    previews: int
    checkpoints: tuple[str, ...]
    evaluations: int

    @classmethod
    def at(cls, run: str, now: RunNow) -> "Looked":
        names = tuple(path.name for path in now.checkpoints)
        return cls(run, len(now.metrics), len(now.previews), names, len(now.evaluations))


def training_tab(page: gr.Blocks, tab: gr.Tab, models: Models) -> None:
    """Adds the tab's contents to the page."""
    looked = gr.State(None)
    with gr.Row():
        run = gr.Dropdown([], label="Run", info="the one written last comes first", min_width=200, scale=4)
        again = gr.Button("Look for runs", min_width=120)
    line = gr.Markdown("", elem_id="run-line")
    with gr.Column(visible=False) as details:
        with gr.Row():
            loss = _curve("loss", label="Loss")
            rate = _curve("images_per_second", label="Images per second", y_title="images/s")
        with gr.Row():
            with gr.Column(scale=3, min_width=280, visible=False) as over_time:
                preview = pixel_image(
                    label="Preview",
                    height=480,
                    alt_text="Samples of the averaged weights, always of the same seeds",
                )
                when = gr.Slider(0, 1, 0, step=1, label="Previews over time", interactive=False, buttons=[])
            with gr.Column(scale=2, min_width=280):
                table = gr.Dataframe(
                    headers=["step", "saved", "MiB"],
                    label="Checkpoints",
                    interactive=False,
                    buttons=[],
                    show_label=True,
                )
                evaluations = gr.Dataframe(label="Evaluations", interactive=False, visible=False, buttons=[])
    timer = gr.Timer(SECONDS_BETWEEN_LOOKS, active=False)
    outputs = [looked, line, details, loss, rate, over_time, preview, when, table, evaluations]

    def find(name: str | None) -> Any:
        runs = models.runs()
        first = runs[0] if runs else None
        return gr.update(choices=runs, value=name if name in runs else first)

    def look(name: str | None, before: Looked | None, index: float) -> dict[Any, Any]:
        if not name:
            return without("No run has begun in the folders looked through: `pixeldip train` begins one.")
        if name not in models.runs():
            return without(f"`{name}` is not here any more.")
        try:
            now = RunNow.read(Path(name))
        except (UserError, OSError) as error:
            return without(f"{name} cannot be read: `{error}`")
        here = Looked.at(name, now)
        if here == before:
            return {line: now.line()}
        newest = max(len(now.previews) - 1, 0)
        # at the newest preview, stay there
        following = before is None or before.run != name or int(index) >= before.previews - 1
        at = newest if following else int(index)
        measured = now.measured()
        return {
            looked: here,
            line: now.line(),
            details: gr.update(visible=True),
            loss: loss_plot(now.curve("loss")),
            rate: now.curve("images_per_second"),
            over_time: gr.update(visible=len(now.previews) > 0),
            preview: show(name, at),
            when: gr.update(maximum=max(newest, 1), value=at, interactive=newest > 0),
            table: now.table(),
            evaluations: gr.update(value=measured, visible=len(measured) > 0),
        }

    def without(why: str) -> dict[Any, Any]:
        return {looked: None, line: why, details: gr.update(visible=False)}

    def loss_plot(curve: pd.DataFrame) -> Any:
        usual = curve["loss"].quantile(0.95) if len(curve) else 0.0  # the first steps would flatten all the others
        return gr.update(value=curve, y_lim=[0, 1.1 * usual or 1.0])

    def show(name: str | None, index: float) -> Any:
        previews = preview_files(Path(name)) if name in models.runs() else []
        if not previews:
            return gr.update(value=None)
        file = previews[min(int(index), len(previews) - 1)]
        try:
            return gr.update(value=decode(file.read_bytes()), label=f"Step {step_of(file):,}")
        except (OSError, BrokenImage):
            return gr.update(value=None, label=f"Step {step_of(file):,}: cannot be read")

    gr.on([page.load, again.click], find, run, run, **PLAIN)
    gr.on([run.change, timer.tick], look, [run, looked, when], outputs, **PLAIN)
    when.input(show, [run, when], preview, trigger_mode="always_last", **PLAIN)
    tab.select(lambda: gr.update(active=True), None, timer, **PLAIN)


def _curve(key: str, label: str, **titles: str) -> gr.LinePlot:
    return gr.LinePlot(x="step", y=key, height=240, min_width=280, buttons=["fullscreen"], label=label, **titles)
