"""The tab that shows what the head adds: the velocity with and without the context the backbone gives the head.

B batch, C channels, P patch side.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UserError
from ..flow import SOLVERS, clean_image, guided_velocity, seeded_normal, start_state, time_grid
from ..model import DiP
from ..pipeline import DiPPipeline
from .engine import Pace, sheet, watched
from .messages import told_elsewhere, told_in_page
from .models import Models
from .parts import PLAIN, SAMPLING, TELLING, offered, pixel_image
from .settings import ImageSettings, Limits, class_names

STEPS = 24
IMAGES = 4
PICTURES = (
    "The noisy image x_t",
    "What the velocity leads to",
    "The same, without the context",
    "The velocity",
    "The same, without the context",
)
SERIES = ("with the context", "without", "difference")


@dataclass(frozen=True)
class HeadStep:
    """One step of a path; states and velocities (B, C, H, W) on the CPU."""

    t: float
    x: Tensor
    velocity: Tensor
    without_context: Tensor

    def coarse_shares(self, patch_size: int) -> list[float]:
        """Of the velocity, of that without the context, and of their difference."""
        both = self.velocity, self.without_context, self.velocity - self.without_context
        return [coarse_share(v, patch_size) for v in both]

    def pictures(self) -> list[Image.Image]:
        """In the order of `PICTURES`."""
        v, w = self.velocity, self.without_context
        t = torch.full((len(v),), self.t)
        return [sheet(x, columns=2) for x in (self.x, clean_image(self.x, v, t), clean_image(self.x, w, t), v, w)]


@dataclass(frozen=True)
class _Seen:
    t: float
    shares: list[float]
    pictures: list[Image.Image]


def coarse_share(v: Tensor, patch_size: int) -> float:
    """The share of the power of v (B, C, H, W) in waves longer than a patch, in [0, 1]; the mean is left out.

    By Parseval's theorem the other waves have the rest.
    """
    power = torch.fft.fft2(v.float()).abs().square().sum((0, 1))
    coarse, every = _coarse_waves(*v.shape[-2:], patch_size)
    return (power[coarse].sum() / power[every].sum().clamp(min=1e-30)).item()


def noise_share(height: int, width: int, patch_size: int) -> float:
    """The expected `coarse_share` of white noise: that of the frequencies."""
    coarse, every = _coarse_waves(height, width, patch_size)
    return (coarse.sum() / every.sum()).item()


def _coarse_waves(height: int, width: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Which frequencies (H, W) are of waves longer than a patch, and which of waves at all."""
    fy, fx = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    cycles_per_pixel = (fy[:, None].square() + fx.square()).sqrt()
    every = cycles_per_pixel > 0
    return every & (cycles_per_pixel < 1 / patch_size), every


def contexts(model: DiP) -> list[nn.Module]:
    """The layers that hand the backbone's context to a head, wherever heads stand; DiT-only has one too."""
    inner = [] if model.injection is None else [model.injection.context]
    return inner if model.config.placement == "intermediate" else [*inner, model.context]


@contextlib.contextmanager
def no_context(model: DiP) -> Iterator[None]:
    """Within it, heads see their noisy patches, and zeros in place of the context."""
    hooks = [layer.register_forward_hook(lambda _, __, context: torch.zeros_like(context)) for layer in contexts(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def compare_contexts(
    pipeline: DiPPipeline, label: str | None, seeds: list[int], tell: Callable[[HeadStep], None]
) -> None:
    """Samples with Euler's method, without guidance, and tells at each step both velocities at the state it is in."""
    model, device = pipeline.model, pipeline.device
    null_class = model.config.num_classes
    y = torch.full((len(seeds),), null_class if label is None else pipeline.class_id(label), device=device)
    velocity = guided_velocity(model, y, null_class)

    def both(x: Tensor, t: float, step_start: float) -> Tensor:
        v = velocity(x, t, step_start)
        with no_context(model):
            w = velocity(x, t, step_start)
        tell(HeadStep(t, x.float().cpu(), v.float().cpu(), w.float().cpu()))
        return v

    times = time_grid(STEPS, objective=model.objective)
    shape = (model.config.in_channels, pipeline.config.height, pipeline.config.width)
    SOLVERS["euler"](both, start_state(seeded_normal(seeds, shape, device), times), times)


def head_tab(page: gr.Blocks, models: Models) -> None:
    """Adds the tab's contents to the page."""
    steps = gr.State((), time_to_live=3600)
    gr.Markdown(
        "### What the head adds\n"
        "The backbone hands the head a context for each patch; the head paints the patch from it and from the noisy "
        "pixels. Here the same head paints once more with **zeros in place of the context**. The plot tells what share "
        "of the velocity's power lies in **coarse** waves, longer than a patch; the rest lies in **fine** ones."
    )
    with gr.Row():
        model = gr.Dropdown([], label="Model", min_width=160)
        label = gr.Dropdown([], label="Class", min_width=120)
        seeds = gr.Textbox("0-3", label=f"Seeds (at most {IMAGES})", min_width=120)
        start = gr.Button("Measure", variant="primary", min_width=120, elem_id="measure")
    line = gr.Markdown("", elem_id="measured")
    plot = gr.LinePlot(
        x="t",
        y="coarse share, %",
        color="of",
        y_lim=[0, 100],
        x_title="t, from noise (0) to the image (1)",
        height=280,
        color_title=" ",
        color_map=dict(zip(SERIES, ("#2456d6", "#d97706", "#059669"))),
        buttons=["fullscreen"],
        show_label=False,
    )
    moment = gr.Slider(0, STEPS - 1, 0, step=1, label="Step, from noise to image", interactive=False)
    at = gr.Markdown("")
    pictures = []
    with gr.Row():
        for caption in PICTURES:
            with gr.Column(min_width=150):
                gr.Markdown(caption)
                pictures.append(pixel_image(show_label=False, alt_text=caption))

    def classes_of(name: str | None) -> Any:
        names = class_names(models.load(name)) if name else []
        return gr.update(choices=names, value=names[0] if names else None, visible=bool(names))

    def measure(name: str | None, label: str | None, seeds: str) -> Iterator[tuple]:
        settings = ImageSettings(model=name or "", seeds=seeds, steps=STEPS)
        chosen = settings.check(Limits(images=IMAGES, steps=STEPS))
        pipeline = models.load(settings.model)
        if pipeline.model.config.head == "linear":
            raise UserError(f"{settings.model} is DiT-only: it has no head that paints pixels")
        patch_size, size = pipeline.model.config.patch_size, (pipeline.config.height, pipeline.config.width)
        pace, seen = Pace(STEPS), []
        work = watched(lambda tell: compare_contexts(pipeline, label, chosen, tell))
        with contextlib.closing(work) as telling:
            for step in telling:
                seen.append(_Seen(step.t, step.coarse_shares(patch_size), step.pictures()))
                if pace.due():
                    yield pace.line(len(seen)), curves(seen), gr.skip(), gr.skip(), *pictures_at(seen, STEPS)
        line = f"{len(chosen)} paths of {STEPS} steps in {pace.seconds():.1f} s. "
        line += f"White noise: {noise_share(*size, patch_size):.0%} coarse."
        middle = STEPS // 2
        slider = gr.update(value=middle, interactive=True)
        yield line, curves(seen), tuple(seen), slider, *pictures_at(seen, middle)

    def curves(seen: Sequence[_Seen]) -> pd.DataFrame:
        rows = [(step.t, 100 * share, name) for step in seen for name, share in zip(SERIES, step.shares)]
        return pd.DataFrame(rows, columns=["t", "coarse share, %", "of"])

    def pictures_at(seen: Sequence[_Seen], index: float) -> list[Any]:
        if not seen:
            return [gr.skip()] * (1 + len(pictures))
        step = seen[min(int(index), len(seen) - 1)]
        return [f"t = {step.t:.3f}", *step.pictures]

    page.load(lambda: offered(models), None, model, **PLAIN).then(told_elsewhere(classes_of, 1), model, label, **PLAIN)
    model.input(told_in_page(classes_of), model, label, **TELLING)
    start.click(
        told_in_page(measure),
        [model, label, seeds],
        [line, plot, steps, moment, at, *pictures],
        show_progress="minimal",
        show_progress_on=line,
        **SAMPLING,
    )
    moment.input(pictures_at, [steps, moment], [at, *pictures], trigger_mode="always_last", **PLAIN)
