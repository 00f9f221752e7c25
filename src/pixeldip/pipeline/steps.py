"""What a call of the pipeline does between a solver's steps: it calls back, counts, keeps states, stops."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..errors import UserError
from ..flow.solvers import Velocity
from ..settings import whole_number

STATE = "latents"  # what diffusers' callbacks call the state x_t, though nothing is latent here
PREDICTED = "pred_original_sample"  # what diffusers' schedulers call the image that a prediction leads to
OnStepEnd = Callable[[DiffusionPipeline, int, float, dict[str, Tensor]], dict[str, Tensor] | None]


class _Interrupted(Exception):
    """Carries the state out of a solver that is not to go on."""

    def __init__(self, state: Tensor):
        self.state = state


@dataclass
class StepHandler:
    """Stands by while a solver goes from step to step, with arguments as `DiPPipeline.__call__` takes them.

    Raises:
        UserError: if one of them is out of range.
    """

    pipeline: DiffusionPipeline
    callback: OnStepEnd | PipelineCallback | MultiPipelineCallbacks | None
    tensor_inputs: Sequence[str] | None
    trajectory_every: int
    trajectory: list[tuple[float, Tensor]] = field(default_factory=list)
    """The states (t, x_t) that were asked for."""

    def __post_init__(self):
        self.trajectory_every = whole_number("trajectory_every", self.trajectory_every)
        if self.trajectory_every < 0:
            raise UserError(f"trajectory_every {self.trajectory_every}: give 0, to keep none, or more")
        if self.callback is not None and not callable(self.callback):
            raise UserError(f"callback_on_step_end {self.callback!r}: give a function")
        if isinstance(self.callback, PipelineCallback | MultiPipelineCallbacks):
            self.tensor_inputs = self.callback.tensor_inputs
        wanted = self.tensor_inputs or ()
        there = self.pipeline._callback_tensor_inputs
        if isinstance(wanted, str) or not isinstance(wanted, Iterable):
            raise UserError(f"callback_on_step_end_tensor_inputs {wanted!r}: give a list of names")
        self.tensor_inputs = tuple(wanted)
        if unknown := [name for name in self.tensor_inputs if name not in there]:
            raise UserError(f"callback_on_step_end_tensor_inputs: {unknown[0]}; there are {' and '.join(there)}")

    def solution(self, solver: Callable[..., Tensor], velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
        """The state that a solver comes to from x, at the last of the times or where it was interrupted."""
        last, predicted = len(times) - 2, x
        predicts = self.callback and PREDICTED in self.tensor_inputs

        def predicting(x: Tensor, t: float, step_start: float) -> Tensor:
            nonlocal predicted
            v = velocity(x, t, step_start)
            predicted = x + (1 - t) * v
            return v

        def on_step(step: int, t: float, x: Tensor) -> Tensor:
            if self.callback:
                tensors = {name: predicted if name == PREDICTED else x for name in self.tensor_inputs}
                x = _replaced(x, self.callback(self.pipeline, step, t, tensors))
            bar.update()
            stops = self.pipeline.interrupt or step == last
            if self.trajectory_every and (stops or (step + 1) % self.trajectory_every == 0):
                self._keep(t, x)
            if stops and step != last:
                raise _Interrupted(x)
            return x

        if self.trajectory_every:
            self._keep(times[0], x)
        with self.pipeline.progress_bar(total=len(times) - 1) as bar:
            try:
                return solver(predicting if predicts else velocity, x, times, on_step)
            except _Interrupted as stopped:
                return stopped.state

    def _keep(self, t: float, x: Tensor) -> None:
        self.trajectory.append((t, x.to("cpu", copy=True)))  # what a callback returned may be its own, to change


def _replaced(state: Tensor, returned: Any) -> Tensor:
    """The state that goes on after a callback, whose own it is if it returned one."""
    if returned is None:
        return state
    if not isinstance(returned, Mapping):
        raise UserError(
            f"callback_on_step_end: returned a {type(returned).__name__}; give a dictionary, for instance "
            f'{{"{STATE}": the new state}}, or nothing'
        )
    new = returned.get(STATE)
    if new is None:
        return state
    if not isinstance(new, Tensor) or new.shape != state.shape:
        found = f"a tensor of {tuple(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
        raise UserError(f"callback_on_step_end: {STATE} is {found}; give a tensor of {tuple(state.shape)}")
    return new.to(state)
