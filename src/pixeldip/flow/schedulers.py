"""diffusers' schedulers as solvers of our velocity.

Their sigma is 1 - t, and the velocity they are given is ours turned round, noise - data. diffusers is imported where it
is used: that takes seconds, which the processes that read images for a training can do without.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .objectives import VelocityObjective
from .solvers import OnStep, Velocity, reached, time_grid

SIGMA_ERROR = 1e-5  # how far float32, and UniPC's way round a division by zero, move a sigma
TAKE_PRECEDENCE = "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"  # over flow sigmas


def check_flow_scheduler(scheduler: Any) -> None:
    """Raises UserError unless the diffusers scheduler follows the straight path from noise to data."""
    from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler

    take_flow_sigmas = DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler
    config, name = getattr(scheduler, "config", {}), type(scheduler).__name__
    flows = isinstance(scheduler, take_flow_sigmas) and not any(config.get(sigmas) for sigmas in TAKE_PRECEDENCE)
    flows = flows and config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    if not (flows or (name.startswith("FlowMatch") and not config.get("invert_sigmas"))):
        raise UserError(
            f"{name} does not follow the path the model was trained on: take a FlowMatch… scheduler without "
            "invert_sigmas, or UniPCMultistepScheduler or DPMSolverMultistepScheduler with use_flow_sigmas=True, "
            "prediction_type='flow_prediction' and no other sigmas"
        )


def is_default_scheduler(scheduler: Any) -> bool:
    """Whether it is Euler's method as diffusers makes it, and nobody has chosen otherwise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    def settings(of: Any) -> dict[str, Any]:
        return {name: value for name, value in of.config.items() if not name.startswith("_")}

    kind = FlowMatchEulerDiscreteScheduler
    return type(scheduler) is kind and settings(scheduler) == settings(kind())


def set_times(
    scheduler: Any, steps: int, shift: float, objective: VelocityObjective, device: torch.device
) -> list[float]:
    """Prepares a scheduler and returns the times at which it asks for the velocity, then 1.

    They are those of `time_grid` where the scheduler takes sigmas from outside, its own where it does not; a shift
    in the scheduler's configuration comes on top.

    Raises:
        UserError: if a shift is asked of a scheduler that has its own times, flow-match Heun is to follow a network
            that predicts the image, or the scheduler refuses.
    """
    from diffusers import FlowMatchHeunDiscreteScheduler

    check_flow_scheduler(scheduler)
    times = time_grid(steps, shift, objective)
    takes_sigmas, name = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters, type(scheduler).__name__
    if shift != 1 and not takes_sigmas:
        raise UserError(f"time_shift={shift:g}: {name} has times of its own; set its shift in its configuration")
    if objective.ends_in_output and isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        raise UserError(
            f"{name} takes a long step to t = 0.999 by the velocity there, in which the error of a predicted image "
            "counts a thousand times, and this model predicts the image: take solver='heun', or another scheduler"
        )
    arguments = {"sigmas": 1 - np.array(times[:-1])} if takes_sigmas else {"num_inference_steps": steps}
    try:
        scheduler.set_timesteps(device=device, **arguments)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    scheduler.set_begin_index(0)
    theirs = [1 - sigma for sigma in scheduler.sigmas.tolist()]
    kept = len(theirs) == len(times) and all(abs(a - b) < SIGMA_ERROR for a, b in zip(theirs, times))
    return times if kept else theirs


def follow_scheduler(
    scheduler: Any,
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    on_step: OnStep | None = None,
    generators: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """The solution of a scheduler that `set_times` has prepared; each of its evaluations counts as a step.

    Args:
        generators: where its fresh noise comes from, if it needs any.
    """
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in takes else {}
    for i, (timestep, t) in enumerate(zip(scheduler.timesteps, times)):
        x = scheduler.step(-velocity(x, t, t), timestep, x, return_dict=False, **extra)[0]
        x = reached(on_step, i, times[i + 1], x)
    return x
