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

    def check(self, limits: Limits) -> list[int]:
        """The seeds.

        Raises:
            UserError: if a value is out of range or beyond the limits.
        """
        check_values(self, str)
        if self.steps > limits.steps:
            raise UserError(f"steps: at most {limits.steps} here, asked for {self.steps}")
        for name, side in (("height", self.height), ("width", self.width)):
            if side and side > limits.side:
                raise UserError(f"{name}: at most {limits.side} pixels here, asked for {side}")
        return parse_seeds(self.seeds, limits.images)

    def describe(self) -> str:
        """A line that says it all."""
        lo, hi = self.guidance_interval
        shift = "" if self.time_shift == 1 else f" · time shift {self.time_shift:g}"
        return (
            f"{', '.join([*self.classes, f'seed {self.seeds}'])} · {self.solver}, {self.steps} steps{shift} · guidance "
            f"{self.guidance:g} from t = {lo:g} to {hi:g} · {self.height}×{self.width} · {self.model}"
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
            height=note["height"],
            width=note["width"],
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the picture's settings cannot be read: {type(error).__name__} {error}") from None
    return check_values(settings, str)


@dataclass
class SolutionControls:
    """The controls of how to sample; `inputs` in the order of `settings`."""

    guidance: gr.Slider
    start: gr.Slider
    end: gr.Slider
    steps: gr.Slider
    solver: gr.Dropdown
    shift: gr.Number

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [self.guidance, self.start, self.end, self.steps, self.solver, self.shift]

    @staticmethod
    def settings(
        guidance: float, start: float, end: float, steps: float, solver: str, shift: float | None
    ) -> dict[str, Any]:
        """The values of the controls, by the names of `SamplingSettings`."""
        return {
            "guidance": guidance,
            "guidance_interval": (start, end),
            "steps": int(steps),
            "solver": solver,
            "time_shift": shift,
        }

    @staticmethod
    def values(settings: SamplingSettings, limits: Limits) -> list[Any]:
        """What the controls show for settings; those beyond a limit are brought back to it."""
        solver = "euler" if settings.solver == "ddim" else settings.solver  # the same steps
        guidance = min(max(settings.guidance, 0), LARGEST_GUIDANCE)
        steps = min(settings.steps, limits.steps)
        return [guidance, *settings.guidance_interval, steps, solver, settings.time_shift]


def solution_controls(limits: Limits) -> SolutionControls:
    """Adds the controls to the page."""
    plain = SamplingSettings()
    guidance = gr.Slider(
        0,
        LARGEST_GUIDANCE,
        plain.guidance,
        step=0.1,
        label="Guidance",
        info="1 is none; more: truer to the class, less varied",
    )
    with gr.Row():
        start, end = plain.guidance_interval
        start = gr.Slider(0, 1, start, step=0.01, label="Guide from", info="t = 0: noise", min_width=120)
        end = gr.Slider(0, 1, end, step=0.01, label="Guide until", info="t = 1: image", min_width=120)
    steps = gr.Slider(1, max(limits.steps, 2), min(plain.steps, limits.steps), step=1, label="Steps")
    with gr.Row():
        solver = gr.Dropdown(
            SOLVERS, value=plain.solver, label="Solver", info="Heun: two evaluations a step", min_width=140
        )
        shift = gr.Number(
            plain.time_shift, label="Time shift", info="above 1: more noisy times", step=0.1, min_width=120
        )
    return SolutionControls(guidance, start, end, steps, solver, shift)


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
        sides = {"height": height and int(height), "width": width and int(width)}
        return {"classes": tuple(classes or ()), "seeds": seeds, **sides}

    @staticmethod
    def updates(pipeline: DiPPipeline, limits: Limits) -> list[Any]:
        """What the controls show for a model that was just chosen."""
        names, patch = class_names(pipeline), pipeline.model.config.patch_size
        sides = (min(side, limits.side // patch * patch) for side in (pipeline.config.height, pipeline.config.width))
        return [gr.update(choices=names, value=names[:4], visible=bool(names)), limits.first_seeds, *sides]

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
        [], value=[], multiselect=True, label="Classes", info="dealt out to the seeds in turn; none: all"
    )
    with gr.Row():
        seeds = gr.Textbox(limits.first_seeds, label=f"Seeds (at most {limits.images})", min_width=140)
        height = gr.Number(None, label="Height", precision=0, min_width=80)
        width = gr.Number(None, label="Width", precision=0, min_width=80)
    return SubjectControls(classes, seeds, height, width)
