"""The diffusers pipeline: a trained `DiP`, its classes and its size, ready to sample."""

import difflib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from .errors import UserError
from .flow import (
    SOLVERS,
    Stream,
    fold_seed,
    guided_velocity,
    is_stochastic,
    seeded_normal,
    start_state,
    time_grid,
)
from .images import to_pil
from .model import DiP, check_size
from .run_folder import PIPELINE, newest_checkpoint


@dataclass
class DiPPipelineOutput(BaseOutput):
    """images: PIL pictures, or a tensor (B, C, H, W) in [-1, 1]; trajectory: the states asked for, if any."""

    images: list[Image.Image] | Tensor
    trajectory: list[tuple[float, Tensor]] | None = None


class DiPPipeline(DiffusionPipeline):
    """Class-conditional sampling with a `DiP`.

    Args:
        model: the network.
        height, width: the training size in pixels, the default for samples.
        class_names: one name per class; None if they have none.
    """

    def __init__(self, model: DiP, height: int = 256, width: int = 256, class_names: list[str] | None = None):
        super().__init__()
        self.register_modules(model=model)
        self.register_to_config(height=height, width=width, class_names=list(class_names or ()))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DiPPipeline":
        """A pipeline from a run folder (its newest checkpoint, EMA weights), a saved folder or a hub id.

        Raises:
            UserError: if there is no model of that name.
        """
        name = str(pretrained_model_name_or_path)
        kwargs.setdefault("low_cpu_mem_usage", False)  # the other way needs accelerate, and says so at length
        return super().from_pretrained(resolve_model(name), **kwargs)

    def class_id(self, label: int | str) -> int:
        """The id of a class given by id or exact name.

        Raises:
            UserError: if there is no such class.
        """
        num_classes, names = self.model.config.num_classes, self.config.class_names
        if isinstance(label, str) and label in names:
            return names.index(label)
        try:
            index = int(label)
        except ValueError:
            near = difflib.get_close_matches(str(label), names, n=3, cutoff=0.4)
            hint = (
                f"; perhaps {' or '.join(map(repr, near))}" if near else f"; it has {', '.join(names)}" if names else ""
            )
            raise UserError(f"the model has no class named {label!r}{hint}") from None
        if not 0 <= index < num_classes:
            have = f"it has classes 0 to {num_classes - 1}" if num_classes else "it was trained without classes"
            raise UserError(f"class {index} is out of range: {have}")
        return index

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.1, 1.0),
        seeds: Sequence[int] | None = None,
        solver: str = "euler",
        time_shift: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        trajectory_every: int = 0,
        on_step: Callable[[int], None] | None = None,
    ) -> DiPPipelineOutput:
        """Samples one image per class label.

        Args:
            class_labels: ids or exact names; for a model without classes, leave it out.
            num_inference_steps: solver steps from noise (t = 0) to data (t = 1), spaced as the model's objective asks.
            guidance_scale: w of u + w (c - u); 1 is no guidance.
            guidance_interval: steps that start at lo < t < hi are guided.
            seeds: one per image; by default 0, 1, 2 … An image depends on its seed alone, not on the
                batch around it.
            solver: euler, heun, ab2 (two-step Adams-Bashforth), ddim (another name of euler) or ancestral
                (DDPM's, which adds fresh noise at every step, from the image's seed too).
            time_shift: above 1 takes more of the steps at noisy times.
            height, width: pixels, multiples of the patch size; by default the training size.
            output_type: "pil", or "pt" for a tensor (B, C, H, W) in [-1, 1].
            trajectory_every: keep (t, x_t) before every so many steps, and the final (1, x); 0: keep none.
            on_step: called after each step with its number, from 0.

        Raises:
            UserError: if an argument is out of range.
        """
        labels = self._labels(class_labels, seeds)
        seeds = list(range(len(labels))) if seeds is None else list(seeds)
        if len(seeds) != len(labels):
            raise UserError(f"{len(labels)} class labels but {len(seeds)} seeds: give one seed per image")
        if solver not in SOLVERS:
            raise UserError(f"solver {solver!r}: choose one of {', '.join(SOLVERS)}")
        if output_type not in ("pil", "pt"):
            raise UserError(f"output_type {output_type!r}: choose pil or pt")
        model, device = self.model, self._execution_device
        height, width = height or self.config.height, width or self.config.width
        check_size(height, width, model.config.patch_size)
        null_class = model.config.num_classes
        scale = guidance_scale if null_class else 1.0
        velocity = guided_velocity(model, torch.tensor(labels, device=device), null_class, scale, guidance_interval)
        times = time_grid(num_inference_steps, time_shift, model.objective)
        trajectory: list[tuple[float, Tensor]] = []

        def watched(x: Tensor, t: float, step_start: float) -> Tensor:
            if trajectory_every and t == step_start and times.index(t) % trajectory_every == 0:
                trajectory.append((t, x.cpu()))
            return velocity(x, t, step_start)

        shape = (model.config.in_channels, height, width)

        def fresh_noise(step: int) -> Tensor:
            return seeded_normal([fold_seed(seed, Stream.FRESH_NOISE, step) for seed in seeds], shape, device)

        solve = functools.partial(SOLVERS[solver], noise=fresh_noise) if is_stochastic(solver) else SOLVERS[solver]
        start = start_state(seeded_normal(seeds, shape, device), times)
        x = solve(watched, start, times, on_step and (lambda i, *_: on_step(i)))
        if trajectory_every:
            trajectory.append((1.0, x.cpu()))
        return DiPPipelineOutput(to_pil(x) if output_type == "pil" else x, trajectory or None)

    def _labels(self, class_labels: Sequence[int | str] | int | str | None, seeds: Sequence[int] | None) -> list[int]:
        null_class = self.model.config.num_classes
        if null_class == 0:
            if class_labels is not None:
                raise UserError("the model was trained without classes: leave class_labels out and give seeds")
            return [0] * (len(seeds) if seeds is not None else 1)
        if class_labels is None:
            raise UserError(f"give class_labels: the model has classes 0 to {null_class - 1}")
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        return [self.class_id(label) for label in class_labels]


def names_a_model(name: str) -> bool:
    """Whether `resolve_model` would look for a model there: a folder that holds one, or a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return (path / "model_index.json").is_file() or newest_checkpoint(path) is not None
    return not path.exists() and path.suffix != ".npz" and _may_be_hub_id(name)


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def resolve_model(name: str) -> str:
    """The folder or hub id of a pipeline, given a run folder, a saved model folder or a hub id.

    Raises:
        UserError: if it is a folder without a model, or no folder and no hub id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return str(path)
        if checkpoint := newest_checkpoint(path):
            return str(checkpoint / PIPELINE)
        raise UserError(f"{name}: neither a saved model (no model_index.json) nor a run with a checkpoint")
    if path.exists():
        raise UserError(f"{name}: a file; to load an authors' checkpoint, first run pixeldip convert {name} OUT")
    if not _may_be_hub_id(name):
        raise UserError(f"{name}: no such folder, and not a hub id (owner/name)")
    return name
