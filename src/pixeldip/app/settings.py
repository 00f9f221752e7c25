"""What a page asks to be sampled: checked like flags, restored from a picture, shown as controls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..errors import UserError
from ..pipeline import DiPPipeline
from ..sampling import parse_seeds
from ..settings import Positive, SamplingSettings, check_values

SOLVERS = [("Euler", "euler"), ("AB2", "ab2"), ("Heun", "heun"), ("Ancestral", "ancestral")]
LARGEST_GUIDANCE = 15
LABELS = {
    "model": "Model",
    "classes": "Classes",
    "seeds": "Seeds",
    "height": "Height",
    "width": "Width",
    "guidance": "Guidance",
    "guidance_interval": "Guide from and until",
    "steps": "Steps",
    "solver": "Solver",
    "time_shift": "Time shift",
    "backbone_every": "Backbone every",
}
"""What a page calls a request's settings."""


@dataclass(frozen=True)
class Limits:
    """The most one request may ask for."""

    images: int = 16
    steps: int = 250
    side: int = 1024

    @property
    def first_seeds(self) -> str:
        """What a page begins with."""
        return f"0-{min(8, self.images) - 1}"


@dataclass
class ImageSettings(SamplingSettings):
    """A request: how to sample, and what."""

    model: str = ""
    classes: tuple[str, ...] = ()
    seeds: str = "0-7"
    height: Positive | None = None
    width: Positive | None = None

    def checked(self, limits: Limits) -> tuple["ImageSettings", list[int]]:
        """The settings, a field's 16.0 as 16, and the seeds.

        Raises:
            UserError: if a value is out of range or beyond the limits.
        """
        settings = check_values(self, LABELS.__getitem__)
        if settings.steps > limits.steps:
            raise UserError(f"{LABELS['steps']}: at most {limits.steps} here, asked for {settings.steps}")
        for name in ("height", "width"):
            side = getattr(settings, name)
            if side and side > limits.side:
                raise UserError(f"{LABELS[name]}: at most {limits.side} pixels here, asked for {side}")
        return settings, parse_seeds(settings.seeds, limits.images)

    def describe(self) -> str:
        """A line that says it all."""
        lo, hi = self.guidance_interval
        shift = "" if self.time_shift == 1 else f" · time shift {self.time_shift:g}"
        every = "" if self.backbone_every == 1 else f" · backbone at 1 evaluation in {self.backbone_every}"
        return (
            f"{', '.join([*self.classes, f'seed {self.seeds}'])} · {self.solver}, {self.steps} steps{shift}{every} · "
            f"guidance {self.guidance:g} from t = {lo:g} to {hi:g} · {self.height}×{self.width} · {self.model}"
        )


def settings_from_note(note: Mapping[str, Any]) -> ImageSettings:
    """The settings that make one picture again, from what its file says.

    Raises:
        UserError: if something is missing, or is of another kind than it should be.
    """
    try:
        settings = ImageSettings(
            model=str(note["model"]),
            classes=(str(note["class"]),) if "class" in note else (),
            seeds=str(int(note["seed"])),
            steps=note["num_inference_steps"],
            solver=note["solver"],
            guidance=note["guidance_scale"],
            guidance_interval=tuple(note["guidance_interval"]),
            time_shift=note["time_shift"],
            backbone_every=note.get("backbone_every", 1),  # pictures of earlier versions do not say it
            height=note["height"],
            width=note["width"],
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the picture's settings cannot be read: {type(error).__name__} {error}") from None
    return check_values(settings, LABELS.__getitem__)


@dataclass
class SolutionControls:
    """The controls of how to sample; `inputs` in the order of `settings`."""

    guidance: gr.Slider
    start: gr.Slider
    end: gr.Slider
    steps: gr.Slider
    solver: gr.Dropdown
    shift: gr.Number
    every: gr.Number

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [self.guidance, self.start, self.end, self.steps, self.solver, self.shift, self.every]

    @staticmethod
    def settings(
        guidance: float, start: float, end: float, steps: float, solver: str, shift: float | None, every: float | None
    ) -> dict[str, Any]:
        """The values of the controls, by the names of `SamplingSettings`."""
        return {
            "guidance": guidance,
            "guidance_interval": (start, end),
            "steps": steps,
            "solver": solver,
            "time_shift": shift,
            "backbone_every": every,
        }

    @staticmethod
    def values(settings: SamplingSettings, limits: Limits) -> list[Any]:
        """What the controls show for settings; those beyond a limit are brought back to it."""
        solver = "euler" if settings.solver == "ddim" else settings.solver  # the same steps
        guidance = min(max(settings.guidance, 0), LARGEST_GUIDANCE)
        steps = min(settings.steps, limits.steps)
        return [guidance, *settings.guidance_interval, steps, solver, settings.time_shift, settings.backbone_every]


def solution_controls(limits: Limits) -> SolutionControls:
    """Adds the controls to the page."""
    plain = SamplingSettings()
    guidance = gr.Slider(
        0,
        LARGEST_GUIDANCE,
        plain.guidance,
        step=0.1,
        label=LABELS["guidance"],
        info="1 is none; more: truer to the class, less varied",
        buttons=[],
    )
    with gr.Row():
        start, end = plain.guidance_interval
        start = gr.Slider(0, 1, start, step=0.01, label="Guide from", info="t = 0: noise", min_width=120, buttons=[])
        end = gr.Slider(0, 1, end, step=0.01, label="Guide until", info="t = 1: image", min_width=120, buttons=[])
    most, first = max(limits.steps, 2), min(plain.steps, limits.steps)
    steps = gr.Slider(1, most, first, step=1, label=LABELS["steps"], buttons=[])
    with gr.Row():
        solver = gr.Dropdown(
            SOLVERS, value=plain.solver, label=LABELS["solver"], info="Heun: two evaluations a step", min_width=140
        )
        shift = gr.Number(
            plain.time_shift, label=LABELS["time_shift"], info="above 1: more noisy times", step=0.1, min_width=120
        )
        every = gr.Number(
            plain.backbone_every,
            label=LABELS["backbone_every"],
            info="evaluations; else the head alone",
            precision=0,
            min_width=120,
        )
    return SolutionControls(guidance, start, end, steps, solver, shift, every)


@dataclass
class SubjectControls:
    """The controls of what to sample."""

    classes: gr.Dropdown
    seeds: gr.Textbox
    height: gr.Number
    width: gr.Number

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [self.classes, self.seeds, self.height, self.width]

    @staticmethod
    def settings(classes: list[str] | None, seeds: str, height: float | None, width: float | None) -> dict[str, Any]:
        """The values of the controls, by the names of `ImageSettings`."""
        return {"classes": tuple(classes or ()), "seeds": seeds, "height": height, "width": width}

    @property
    def of_model(self) -> list[gr.components.Component]:
        """Those that show something else for another model; the seeds stay."""
        return [self.classes, self.height, self.width]

    @staticmethod
    def updates(pipeline: DiPPipeline, limits: Limits) -> list[Any]:
        """What `of_model` shows for a model that was just chosen."""
        names, patch = class_names(pipeline), pipeline.model.config.patch_size
        sides = (min(side, limits.side // patch * patch) for side in (pipeline.config.height, pipeline.config.width))
        return [gr.update(choices=names, value=names[:4], visible=bool(names)), *sides]

    @staticmethod
    def values(settings: ImageSettings) -> list[Any]:
        """What the controls show for settings."""
        return [list(settings.classes), settings.seeds, settings.height, settings.width]


def class_names(pipeline: DiPPipeline) -> list[str]:
    """The classes as a page names them: by name, or by id where they have none."""
    return list(pipeline.config.class_names) or [str(i) for i in range(pipeline.model.config.num_classes)]


def subject_controls(limits: Limits) -> SubjectControls:
    """Adds the controls to the page."""
    classes = gr.Dropdown(
        [], value=[], multiselect=True, label=LABELS["classes"], info="dealt out to the seeds in turn; none: all"
    )
    with gr.Row():
        seeds = gr.Textbox(limits.first_seeds, label=f"{LABELS['seeds']} (at most {limits.images})", min_width=140)
        height = gr.Number(None, label=LABELS["height"], min_width=80)
        width = gr.Number(None, label=LABELS["width"], min_width=80)
    return SubjectControls(classes, seeds, height, width)
