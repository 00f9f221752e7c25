"""The diffusers pipeline: a trained `DiP`, its classes and its size, ready to sample."""

import copy
import difflib
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..errors import UserError
from ..flow import (
    LARGEST_SEED,
    SOLVERS,
    SampleNoise,
    VelocityNetwork,
    check_flow_scheduler,
    follow_scheduler,
    guided_velocity,
    is_default_scheduler,
    is_stochastic,
    set_times,
    start_state,
    time_grid,
)
from ..model import DiP, check_size
from ..replay import ReplayedNetwork, SolutionNetwork
from ..settings import LARGEST_SIDE, SamplingSettings, finite_number, whole_number
from ..terminal import some
from .lora import LoRAMixin
from .output import DiPPipelineOutput, check_output_type, put_out
from .saving import SavingMixin
from .steps import PREDICTED, STATE, OnStepEnd, StepHandler


class DiPPipeline(SavingMixin, DiffusionPipeline, LoRAMixin):
    """Class-conditional sampling with a `DiP`.

    Args:
        model: the network.
        scheduler: one of diffusers' flow-match schedulers, or UniPC or DPM-Solver++ with flow sigmas; by default
            Euler's method. It is followed unless a call names a `solver`.
        height, width: the training size in pixels, the default for samples.
        class_names: one name per class; None if they have none.
        sampling: what calls leave out: num_inference_steps, guidance_scale, guidance_interval, time_shift and,
            while the scheduler is the default one, solver. Saved with the model; a training run puts in what its
            previews are sampled with.

    Raises:
        UserError: if the model is no network, the scheduler follows another path, the names are not as many as the
            model's classes, height or width is no whole number from 1 to 16384, or `sampling` says anything else.
    """

    _replayed: ReplayedNetwork | None = None
    model_cpu_offload_seq = "model"
    _optional_components = ["scheduler"]
    _callback_tensor_inputs = [STATE, PREDICTED]

    def __init__(
        self,
        model: DiP,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        height: int = 256,
        width: int = 256,
        class_names: list[str] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        check_flow_scheduler(scheduler)
        if not isinstance(model, torch.nn.Module):
            raise UserError(f"model {model!r}: give a DiP; DiPPipeline.from_pretrained loads a saved one")
        names = _names(class_names)
        if names and len(names) != model.config.num_classes:
            raise UserError(f"class_names: {len(names)} names for {model.config.num_classes} classes of the model")
        height, width = _training_side("height", height), _training_side("width", width)
        if not isinstance(sampling, Mapping | None):
            raise UserError(f"sampling {sampling!r}: give a dictionary of what calls leave out")
        self.register_modules(model=model, scheduler=scheduler)
        checked = SamplingSettings.from_pipeline_arguments(sampling or {}).pipeline_arguments()
        sampling = {name: checked[name] for name in sampling or ()}  # plain numbers, which JSON can hold
        self.register_to_config(height=height, width=width, class_names=names, sampling=sampling)

    def class_id(self, label: int | str) -> int:
        """The id of a class given by id or exact name. Where names are numbers, a number in a string is a name.

        Raises:
            UserError: if there is no such class.
        """
        num_classes, names = self.model.config.num_classes, self.config.class_names
        have = f"it has classes 0 to {num_classes - 1}" if num_classes else "it was trained without classes"
        if isinstance(label, str) and label in names:
            return names.index(label)
        numbered = any(name.isdecimal() for name in names)
        try:
            index = int(label) if isinstance(label, str) and not numbered else operator.index(label)
        except (ValueError, TypeError):
            near = difflib.get_close_matches(str(label), names, n=3, cutoff=0.4)
            hint = f"perhaps {' or '.join(map(repr, near))}" if near else f"it has {some(names, 40)}" if names else have
            raise UserError(f"the model has no class named {label!r}; {hint}") from None
        if not 0 <= index < num_classes:
            raise UserError(f"class {index} is out of range: {have}")
        return index

    @property
    def default_settings(self) -> SamplingSettings:
        """How calls sample that do not say it."""
        return SamplingSettings.from_pipeline_arguments(self.config.sampling)

    @property
    def guidance_scale(self) -> float:
        """Of the call that is running."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that is running."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop after this step; a callback sets `_interrupt` for that."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        solver: str | None = None,
        time_shift: float | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (STATE,),
        trajectory_every: int = 0,
    ) -> DiPPipelineOutput | tuple:
        """Samples one image per class label.

        Steps, guidance, interval, time shift and solver that are left out are those of the pipeline's `sampling`;
        where it has none, 50, 4, (0.1, 1), 1 and the scheduler.

        Args:
            class_labels: ids or exact names, or one for one image; for a model without classes, leave it out.
            num_inference_steps: steps from noise (t = 0) to data (t = 1), spaced as the model's objective asks.
            guidance_scale: w of u + w (c - u); 1 is no guidance.
            guidance_interval: steps that start at lo < t < hi are guided.
            seeds: one per image; by default 0, 1, 2 … An image depends on its seed alone, not on the
                batch around it.
            generator: in place of seeds, as elsewhere in diffusers: one for all images, or a list of one each.
            solver: euler, heun, ab2 (two-step Adams-Bashforth), ddim (another name of euler) or ancestral
                (DDPM's, which adds fresh noise at every step). A scheduler is followed as a copy of it for each call.
            time_shift: above 1 takes more of the steps at noisy times.
            height, width: pixels, multiples of the patch size; by default the training size.
            output_type: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1]; or "latent", what the solver
                ended in: (B, C, H, W) with images in [-1, 1], not clipped.
            return_dict: False for a plain tuple (images, trajectory).
            callback_on_step_end: called as f(pipeline, step, t, tensors) after each step, from 0, with the time
                it reached; tensors["latents"] is the state x_t (B, C, H, W). What it returns under that name
                replaces the state. Setting `pipeline._interrupt = True` stops after the step.
            callback_on_step_end_tensor_inputs: what is put into `tensors`: "latents"; and "pred_original_sample", the
                image (B, C, H, W) that the step's last evaluation of the network was heading for, x + (1 - t) v.
            trajectory_every: keep (t, x_t) at the start, after every so many steps, and at the end; 0: keep none.

        Raises:
            UserError: if an argument is out of range, a callback returns another kind of state, or there is no memory
                for the noise.
        """
        own = self.default_settings.pipeline_arguments()
        steps = own["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        guidance_scale = own["guidance_scale"] if guidance_scale is None else guidance_scale
        guidance_interval = own["guidance_interval"] if guidance_interval is None else guidance_interval
        time_shift = own["time_shift"] if time_shift is None else time_shift
        if solver is None and is_default_scheduler(self.scheduler):
            solver = self.config.sampling.get("solver")
        guidance_scale = finite_number("guidance_scale", guidance_scale)
        time_shift = finite_number("time_shift", time_shift)
        guidance_interval = _pair("guidance_interval", guidance_interval)
        seeds, generator = _whole_numbers(seeds), _generators(generator)
        labels = self._labels(class_labels, seeds, generator)
        model, device = self.model, self._execution_device
        height = self.config.height if height is None else whole_number("height", height)
        width = self.config.width if width is None else whole_number("width", width)
        check_size(height, width, model.config.patch_size)
        check_output_type(output_type)
        handler = StepHandler(self, callback_on_step_end, callback_on_step_end_tensor_inputs, trajectory_every)
        shape = (model.config.in_channels, height, width)
        random = SampleNoise(seeds, generator, len(labels), shape, device)
        null_class = model.config.num_classes
        scale = guidance_scale if null_class else 1.0
        if solver is None:
            check_flow_scheduler(self.scheduler)
            scheduler = copy.deepcopy(self.scheduler)  # a call's steps are its own, whoever shares the pipeline
            times = set_times(scheduler, steps, time_shift, model.objective, device)
            solve = functools.partial(follow_scheduler, scheduler, generators=random.generators)
        elif isinstance(solver, str) and solver in SOLVERS:
            times = time_grid(steps, time_shift, model.objective)
            fresh = {"noise": random.fresh} if is_stochastic(solver) else {}
            solve = functools.partial(SOLVERS[solver], **fresh)
        else:
            raise UserError(f"solver {solver!r}: choose one of {', '.join(SOLVERS)}")
        network = self._network(times)
        velocity = guided_velocity(network, torch.tensor(labels, device=device), null_class, scale, guidance_interval)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, len(times) - 1, False
        x = handler.solution(solve, velocity, start_state(random.start, times), times)
        self.maybe_free_model_hooks()
        images, trajectory = put_out(x, output_type), handler.trajectory or None
        return DiPPipelineOutput(images, trajectory) if return_dict else (images, trajectory)

    def enable_precomputed_modulation(self) -> None:
        """From now on calls compute the modulation of the blocks, which depends on time and class alone, for all their
        steps at once.

        Where images are few that spares a third of the weights that a step reads. Images are the same up to rounding.
        Weights may change between calls. It does not go with offloading. CUDA graphs include it.
        """
        self._replayed = self._replayed or ReplayedNetwork(self.model, graphs=False)

    def disable_precomputed_modulation(self) -> None:
        """As `disable_cuda_graphs`, for both go together."""
        self.disable_cuda_graphs()

    def enable_cuda_graphs(self) -> None:
        """From now on calls record what the device does for one evaluation, and replay it for the others.

        That spares the CPU, which takes longer than the GPU where images are few; modulation is precomputed, too.
        Images are the same up to rounding. Weights may change between calls, but not by a fused optimizer or through
        their `.data`, which leave no trace, and adapters must stay as they are: enable it again after such a change.
        It does not go with offloading.

        Raises:
            UserError: if the model is not on a CUDA device.
        """
        if self.model.device.type != "cuda":
            raise UserError(
                f"CUDA graphs: the model is on the {self.model.device.type} device; move the pipeline to a CUDA "
                "device first, without offloading"
            )
        self._replayed = ReplayedNetwork(self.model)

    def disable_cuda_graphs(self) -> None:
        """Every evaluation is computed anew again, with its modulation."""
        self._replayed = None

    def _network(self, times: Sequence[float]) -> VelocityNetwork | SolutionNetwork:
        """What a solver at these times calls."""
        self.model.forget_kernels()
        if self._replayed is None:
            return self.model
        if self._replayed.model is not self.model:
            self._replayed = ReplayedNetwork(self.model, self._replayed.graphs)
        return self._replayed.begin(times)

    def _labels(
        self,
        class_labels: Sequence[int | str] | int | str | None,
        seeds: list[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> list[int]:
        """An id per image; as many images as labels, or as seeds or generators without classes."""
        null_class = self.model.config.num_classes
        if seeds is not None and generator is not None:
            raise UserError("give seeds or a generator, not both")
        if min(seeds or [0]) < 0:
            raise UserError(f"seeds: {min(seeds)} is below 0")
        if max(seeds or [0]) > LARGEST_SEED:
            raise UserError(f"seeds: {max(seeds)} is above {LARGEST_SEED}, the largest")
        given = {"seeds": seeds, "generators": generator if isinstance(generator, list) else None}
        counts = {name: len(values) for name, values in given.items() if values is not None}
        if null_class == 0:
            if class_labels is not None:
                raise UserError("the model was trained without classes: leave class_labels out and give seeds")
            return _at_least_one([0] * next(iter(counts.values()), 1))
        if class_labels is None:
            raise UserError(f"give class_labels: the model has classes 0 to {null_class - 1}")
        try:
            asked = [class_labels] if isinstance(class_labels, str) else list(class_labels)
        except TypeError:  # a single id, perhaps of numpy or torch
            asked = [class_labels]
        labels = _at_least_one([self.class_id(label) for label in asked])
        for name, count in counts.items():
            if count != len(labels):
                raise UserError(f"{len(labels)} class labels but {count} {name}: give one per image")
        return labels


def _at_least_one(labels: list[int]) -> list[int]:
    if not labels:
        raise UserError("no image is asked for: give at least one class label, or seed")
    return labels


def _names(class_names: Iterable[Any] | None) -> list[str]:
    if isinstance(class_names, str) or not isinstance(class_names, Iterable | None):
        raise UserError(f"class_names {class_names!r}: give a list of names, one per class")
    return [] if class_names is None else [str(name) for name in class_names]


def _training_side(name: str, value: Any) -> int:
    side = whole_number(name, value)
    if not 1 <= side <= LARGEST_SIDE:
        raise UserError(f"{name} {side}: must be from 1 to {LARGEST_SIDE}")
    return side


def _whole_numbers(seeds: Sequence[int] | None) -> list[int] | None:
    try:
        return None if seeds is None else [operator.index(seed) for seed in seeds]
    except TypeError:
        raise UserError(f"seeds {seeds!r}: give a list of whole numbers, one per image") from None


def _pair(name: str, values: Any) -> tuple[float, float]:
    try:
        lo, hi = values
    except (TypeError, ValueError):
        raise UserError(f"{name} {values!r}: give two numbers, (lo, hi)") from None
    return finite_number(name, lo), finite_number(name, hi)


def _generators(generator: Any) -> torch.Generator | list[torch.Generator] | None:
    each = list(generator) if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in each):
        raise UserError(f"generator {generator!r}: give a torch.Generator, or a list of them, one per image")
    return each if isinstance(generator, list | tuple) else generator
