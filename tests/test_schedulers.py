"""diffusers' schedulers follow our path, alone and in the pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.flow import OBJECTIVES, follow_scheduler, set_times, time_grid

from .conftest import TINY_MODEL, gaussian_velocity, opened_up

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler(),
    "heun": FlowMatchHeunDiscreteScheduler(),
    "unipc": UniPCMultistepScheduler(**FLOW),
    "dpm-solver++": DPMSolverMultistepScheduler(**FLOW),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("prediction", OBJECTIVES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_default_scheduler_is_the_native_euler(prediction: str, shift: float) -> None:
    model = opened_up(DiP(**TINY_MODEL, num_classes=3, prediction=prediction))
    pipeline = DiPPipeline(model, height=16, width=24)
    settings = {"num_inference_steps": 10, "time_shift": shift, "output_type": "latent", "seeds": [3, 4]}
    settings |= {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.7)}
    ours, theirs = (pipeline([0, 1], solver=solver, **settings).images for solver in ("euler", None))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())


@pytest.mark.parametrize(("name", "steps", "bound"), [("euler", 64, 2e-2), ("heun", 64, 3e-3), ("unipc", 64, 3e-3)])
def test_schedulers_solve_the_flow(name: str, steps: int, bound: float) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float32).view(1, 1, 1, 9)
    scheduler = SCHEDULERS[name]
    times = set_times(scheduler, steps, 1.0, OBJECTIVES["velocity"], CPU)
    assert times[0] == pytest.approx(0, abs=2e-3) and times[-1] == 1
    x = follow_scheduler(scheduler, gaussian_velocity(0.5, 0.3), noise, times)
    torch.testing.assert_close(x, 0.5 + 0.3 * noise, rtol=0, atol=bound)


BEE = {"class_labels": ["bee"], "seeds": [1], "guidance_scale": 2.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def solution(model_folder: Path) -> torch.Tensor:
    """The image of `BEE`, in steps far shorter than those compared with it."""
    return DiPPipeline.from_pretrained(model_folder)(solver="heun", num_inference_steps=300, **BEE).images


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_comes_to_the_same_image(
    name: str, pipeline: DiPPipeline, solution: torch.Tensor, tmp_path: Path
) -> None:
    pipeline.scheduler = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config)
    once, twice = (pipeline(num_inference_steps=60, **BEE).images for _ in range(2))
    assert torch.equal(once, twice)  # nothing is left over from the first call
    assert (once - solution).square().mean().sqrt() < 0.05 * solution.std()
    pipeline.save_pretrained(tmp_path)
    again = DiPPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is type(SCHEDULERS[name])
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(num_inference_steps=60, **BEE).images, once)


def test_noise_of_a_stochastic_scheduler_belongs_to_the_seed(pipeline: DiPPipeline) -> None:
    pipeline.scheduler = DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++")
    settings = {"num_inference_steps": 6, "output_type": "latent"}
    alone = pipeline("bee", seeds=[4], **settings).images
    torch.manual_seed(1)
    among = pipeline(["ant", "bee"], seeds=[7, 4], **settings).images[1:]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, pipeline("bee", seeds=[4], solver="euler", **settings).images, atol=0.1)


def test_a_shift_for_a_scheduler_with_times_of_its_own(pipeline: DiPPipeline) -> None:
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(UserError, match="set its shift in its configuration"):
        pipeline("ant", time_shift=2.0)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)  # the same as time_shift
    shifted, asked = (
        pipe("ant", num_inference_steps=4, output_type="latent", time_shift=shift).images
        for pipe, shift in (
            (pipeline, 1.0),
            (DiPPipeline(pipeline.model, height=16, width=16, class_names=["ant", "bee", "cow"]), 2.0),
        )
    )
    torch.testing.assert_close(shifted, asked, rtol=1e-4, atol=1e-5)
    assert time_grid(4, 2.0)[1] == pytest.approx(1 / 7)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(UserError, match=r"FlowMatchEulerDiscreteScheduler: .*mu"):
        pipeline("ant")


def test_a_predicted_image_wants_another_heun() -> None:
    model = opened_up(DiP(**TINY_MODEL, num_classes=3, prediction="image"))
    pipeline = DiPPipeline(model, FlowMatchHeunDiscreteScheduler(), height=16, width=16)
    with pytest.raises(UserError, match=r"FlowMatchHeun.* this model predicts the image: take solver='heun'"):
        pipeline([0], num_inference_steps=4)
    assert pipeline([0], num_inference_steps=4, solver="heun", output_type="pt").images.isfinite().all()


def test_a_scheduler_of_another_path_is_refused(pipeline: DiPPipeline) -> None:
    with pytest.raises(UserError, match=r"DDIMScheduler does not follow the path .* FlowMatch"):
        DiPPipeline(pipeline.model, DDIMScheduler())
    for scheduler in (
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        DPMSolverMultistepScheduler(**FLOW, use_lu_lambdas=True),
        UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True),
        DEISMultistepScheduler(**FLOW),
        SASolverScheduler(**FLOW),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        None,
    ):
        pipeline.scheduler = scheduler
        with pytest.raises(UserError, match="use_flow_sigmas=True"):
            pipeline("ant")
    assert pipeline("ant", solver="euler", num_inference_steps=1).images
