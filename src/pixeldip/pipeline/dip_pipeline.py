"""The diffusers pipeline: a trained `DiP`, its classes and its size, ready to sample."""

import copy
import difflib
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..errors import UserError
from ..flow import (
    SOLVERS,
    SampleNoise,
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
from ..replay import ReplayedNetwork, SolutionNetwork, forget_kernels
from ..settings import SamplingFlags, SamplingSettings, whole_number
from ..terminal import some
from .arguments import labels_of_images, names_of_classes, plain_settings, random_source, training_side
from .lora import LoRAMixin
from .output import DiPPipelineOutput, check_output_type, put_out
from .saving import SavingMixin
from .steps import PREDICTED, STATE, OnStepEnd, StepHandler
from .tokens import TokenKeepingNetwork, check_reuse


class DiPPipeline(SavingMixin, DiffusionPipeline, LoRAMixin):
    """Class-conditional sampling with a `DiP`.

    Args:
        model: the network.
        scheduler: one of diffusers' flow-match schedulers, or UniPC or DPM-Solver++ with flow sigmas; by default
            Euler's method. It is followed unless a call names a `solver`.
        height, width: the training size in pixels, the default for samples.
        class_names: one name per class; None if they have none.
        sampling: what calls leave out: num_inference_steps, guidance_scale, guidance_interval, time_shift,
            backbone_every and, while the scheduler is the default one, solver. Saved with the model; a training run
            puts in what its previews are sampled with.

    Raises:
        UserError: if the model is no network, the scheduler follows another path, the names are not as many as the
            model's classes, height or width is no whole number from 1 to 16384, or `sampling` says anything else, or
            what the model cannot be sampled with.
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
        names = names_of_classes(class_names, model.config.num_classes)
        height, width = training_side("height", height), training_side("width", width)
        if not isinstance(sampling, Mapping | None):
            raise UserError(f"sampling {sampling!r}: give a dictionary of what calls leave out")
        self.register_modules(model=model, scheduler=scheduler)
        checked = SamplingSettings.from_pipeline_arguments(sampling or {}).pipeline_arguments()
        check_reuse(checked["backbone_every"], model)
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
        backbone_every: int | None = None,
    ) -> DiPPipelineOutput | tuple:
        """Samples one image per class label.

        Steps, guidance, interval, time shift, backbone_every and solver that are left out are those of the pipeline's
        `sampling`; where it has none, 50, 4, (0.1, 1), 1, 1 and the scheduler.

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
            backbone_every: K: the backbone is computed at one evaluation of the network in K, and where guidance begins
                or ends; at the others only the head, a small part, on the state with the tokens that it left.

        Raises:
            UserError: if an argument is out of range, a callback returns another kind of state, or there is no memory
                for the noise.
        """
        model, device = self.model, self._execution_device
        given = SamplingFlags(
            num_inference_steps, solver, guidance_scale, guidance_interval, time_shift, backbone_every
        )
        settings = plain_settings(given.settings(self.default_settings), model)
        num_classes = model.config.num_classes
        seeds, generator = random_source(seeds, generator)
        labels = labels_of_images(class_labels, num_classes, self.class_id, seeds, generator)
        height = self.config.height if height is None else whole_number("height", height)
        width = self.config.width if width is None else whole_number("width", width)
        check_size(height, width, model.config.patch_size)
        check_output_type(output_type, model.config.in_channels)
        handler = StepHandler(self, callback_on_step_end, callback_on_step_end_tensor_inputs, trajectory_every)

        noise = SampleNoise(seeds, generator, len(labels), (model.config.in_channels, height, width), device)
        solve, times = self._solver(solver, settings.steps, settings.time_shift, noise)
        scale = settings.guidance if num_classes else 1.0
        y = torch.tensor(labels, device=device)
        network = self._network(times, settings.backbone_every)
        velocity = guided_velocity(network, y, num_classes, scale, settings.guidance_interval)
        self._guidance_scale, self._num_timesteps, self._interrupt = settings.guidance, len(times) - 1, False
        x = handler.solution(solve, velocity, start_state(noise.start, times), times)
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
        """Every evaluation is computed again, with its modulation."""
        self._replayed = None

    def _solver(
        self, name: str | None, steps: int, time_shift: float, noise: SampleNoise
    ) -> tuple[Callable[..., Tensor], list[float]]:
        """The solver of that name, by default the pipeline's own or its scheduler, and the times it goes through."""
        objective = self.model.objective
        if name is None and is_default_scheduler(self.scheduler):
            name = self.config.sampling.get("solver")
        if name is None:
            scheduler = copy.deepcopy(self.scheduler)  # a call's steps are its own, whoever shares the pipeline
            times = set_times(scheduler, steps, time_shift, objective, noise.device)
            return functools.partial(follow_scheduler, scheduler, generators=noise.generators), times
        if not isinstance(name, str) or name not in SOLVERS:
            raise UserError(f"solver {name!r}: choose one of {', '.join(SOLVERS)}")
        fresh = {"noise": noise.fresh} if is_stochastic(name) else {}
        return functools.partial(SOLVERS[name], **fresh), time_grid(steps, time_shift, objective)

    def _network(self, times: Sequence[float], backbone_every: int) -> TokenKeepingNetwork:
        """What a solver at these times calls."""
        forget_kernels(self.model)
        network: DiP | SolutionNetwork = self.model
        if self._replayed is not None:
            if self._replayed.model is not self.model:
                self._replayed = ReplayedNetwork(self.model, self._replayed.graphs)
            network = self._replayed.begin(times)
        return TokenKeepingNetwork(self.model, network, times, backbone_every)
