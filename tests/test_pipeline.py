"""The pipeline as users of diffusers know pipelines."""

import base64
import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
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
from diffusers.callbacks import PipelineCallback
from rich.console import Console
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.flow import OBJECTIVES, SOLVERS, evaluations, follow_scheduler, set_times, time_grid
from pixeldip.training import train

from .conftest import TINY_MODEL, opened_up, tiny_recipe

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler(),
    "heun": FlowMatchHeunDiscreteScheduler(),
    "unipc": UniPCMultistepScheduler(**FLOW),
    "dpm-solver++": DPMSolverMultistepScheduler(**FLOW),
}
CPU = torch.device("cpu")


@pytest.fixture
def pipeline(model_folder: Path) -> DiPPipeline:
    pipeline = DiPPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_classes_by_name_and_by_id(pipeline: DiPPipeline) -> None:
    named, numbered, counted = (
        pipeline(c, num_inference_steps=2, seeds=[5], output_type="pt").images for c in ("bee", [1], torch.tensor([1]))
    )
    assert torch.equal(named, numbered) and torch.equal(named, counted) and named.shape == (1, 3, 16, 16)
    for single in (1, np.int64(1), torch.tensor(1)):
        assert torch.equal(named, pipeline(single, num_inference_steps=2, seeds=[5], output_type="pt").images)
    assert pipeline("ant", num_inference_steps=2, height=24, width=8).images[0].size == (8, 24)


def test_numbers_of_numpy_are_saved_so_that_they_load_again(tmp_path: Path) -> None:
    own = {"num_inference_steps": np.int64(3), "guidance_interval": np.array([0.0, 0.5])}
    names = np.arange(2)
    pipeline = DiPPipeline(DiP(**TINY_MODEL, num_classes=2), height=np.int64(16), class_names=names, sampling=own)
    pipeline.save_pretrained(tmp_path)
    again = DiPPipeline.from_pretrained(tmp_path)
    assert (again.config.height, again.config.class_names, again.default_settings.steps) == (16, ["0", "1"], 3)
    assert again.default_settings.guidance_interval == (0.0, 0.5)


def test_names_that_are_numbers_are_no_ids() -> None:
    pipeline = DiPPipeline(DiP(**TINY_MODEL, num_classes=3), class_names=["1", "10", "2"])
    assert [pipeline.class_id(label) for label in ("1", "2", 1)] == [0, 2, 1]
    with pytest.raises(UserError, match="no class named '0'; perhaps '10'"):
        pipeline.class_id("0")


@pytest.mark.parametrize(
    ("names", "classes", "there"),
    [
        ([], 0, "it was trained without classes"),
        ([], 3, "it has classes 0 to 2"),
        ([f"c{i}" for i in range(1000)], 1000, "it has c0, c1, .* c39 and 960 more"),
    ],
)
def test_a_class_that_is_not_there(names: list[str], classes: int, there: str) -> None:
    model = DiP(**TINY_MODEL, num_classes=classes)
    with pytest.raises(UserError, match=f"no class named 'zebra'; {there}$"):
        DiPPipeline(model, class_names=names).class_id("zebra")


def test_output_types(pipeline: DiPPipeline) -> None:
    state, tensor, array, pictures = (
        pipeline(["ant", "cow"], num_inference_steps=3, height=8, width=16, output_type=kind).images
        for kind in ("latent", "pt", "np", "pil")
    )
    assert state.shape == tensor.shape == (2, 3, 8, 16) and array.shape == (2, 8, 16, 3)
    assert state.min() < -1 and tensor.min() == 0 and tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.stack([np.asarray(p) for p in pictures]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    images, trajectory = pipeline("ant", num_inference_steps=1, return_dict=False)
    assert len(images) == 1 and trajectory is None


def test_pictures_of_values_that_are_not_finite_are_told(pipeline: DiPPipeline) -> None:
    with torch.no_grad():
        pipeline.model.backbone.class_embed.weight[1] = torch.nan
    with pytest.warns(UserWarning, match=r"1 of 2 images hold values that are not finite, .* another checkpoint"):
        assert len(pipeline(["ant", "bee"], num_inference_steps=1).images) == 2


@pytest.mark.parametrize("prediction", OBJECTIVES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_default_scheduler_is_the_native_euler(prediction: str, shift: float) -> None:
    model = opened_up(DiP(**TINY_MODEL, num_classes=3, prediction=prediction))
    pipeline = DiPPipeline(model, height=16, width=24)
    settings = {"num_inference_steps": 10, "time_shift": shift, "output_type": "latent", "seeds": [3, 4]}
    settings |= {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.7)}
    ours, theirs = (pipeline([0, 1], solver=solver, **settings).images for solver in ("euler", None))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())


def towards_a_gaussian(x: torch.Tensor, t: float, _: float) -> torch.Tensor:
    """The exact velocity for data N(0.5, 0.3^2): E[x - eps | x_t]."""
    variance = 0.09 * t**2 + (1 - t) ** 2
    return 0.5 + (0.09 * t - (1 - t)) / variance * (x - 0.5 * t)


@pytest.mark.parametrize(("name", "steps", "bound"), [("euler", 64, 2e-2), ("heun", 64, 3e-3), ("unipc", 64, 3e-3)])
def test_schedulers_solve_the_flow(name: str, steps: int, bound: float) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float32).view(1, 1, 1, 9)
    scheduler = SCHEDULERS[name]
    times = set_times(scheduler, steps, 1.0, OBJECTIVES["velocity"], CPU)
    assert times[0] == pytest.approx(0, abs=2e-3) and times[-1] == 1
    x = follow_scheduler(scheduler, towards_a_gaussian, noise, times)
    torch.testing.assert_close(x, 0.5 + 0.3 * noise, rtol=0, atol=bound)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_comes_to_the_same_image(name: str, pipeline: DiPPipeline, tmp_path: Path) -> None:
    settings = {"class_labels": ["bee"], "seeds": [1], "guidance_scale": 2.0, "output_type": "latent"}
    exact = pipeline(solver="heun", num_inference_steps=300, **settings).images
    pipeline.scheduler = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config)
    once, twice = (pipeline(num_inference_steps=60, **settings).images for _ in range(2))
    assert torch.equal(once, twice)  # nothing is left over from the first call
    assert (once - exact).square().mean().sqrt() < 0.05 * exact.std()
    pipeline.save_pretrained(tmp_path)
    again = DiPPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is type(SCHEDULERS[name])
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(num_inference_steps=60, **settings).images, once)


def test_noise_of_a_stochastic_scheduler_belongs_to_the_seed(pipeline: DiPPipeline) -> None:
    pipeline.scheduler = DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++")
    settings = {"num_inference_steps": 6, "output_type": "latent"}
    alone = pipeline("bee", seeds=[4], **settings).images
    torch.manual_seed(1)
    among = pipeline(["ant", "bee"], seeds=[7, 4], **settings).images[1:]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, pipeline("bee", seeds=[4], solver="euler", **settings).images, atol=0.1)


@pytest.mark.parametrize("solver", [None, "ancestral"])
def test_generators_in_place_of_seeds(pipeline: DiPPipeline, solver: str | None) -> None:
    settings = {"num_inference_steps": 3, "output_type": "latent", "solver": solver}

    def one(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    first, second = (pipeline(["ant", "bee"], generator=one(3), **settings).images for _ in range(2))
    assert torch.equal(first, second)
    each = pipeline(["ant", "bee"], generator=[one(3), one(4)], **settings).images
    alone = pipeline(["bee"], generator=[one(4)], **settings).images
    torch.testing.assert_close(each[1:], alone, rtol=1e-4, atol=1e-4)
    seeded = pipeline(["ant", "bee"], seeds=[3, 4], **settings).images
    assert not torch.equal(first, seeded)


@pytest.mark.parametrize("given", ["seeds", "generator"])
def test_noise_does_not_depend_on_torchs_default(given: str, pipeline: DiPPipeline) -> None:
    def image() -> torch.Tensor:
        noise = {"seeds": [3]} if given == "seeds" else {"generator": torch.Generator().manual_seed(3)}
        return pipeline("ant", num_inference_steps=3, solver="ancestral", output_type="latent", **noise).images

    plain = image()
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(image(), plain, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("solver", [*SOLVERS, None])
def test_callback_sees_changes_and_stops(pipeline: DiPPipeline, solver: str | None) -> None:
    seen = []

    def watch(pipe: DiPPipeline, step: int, t: float, tensors: dict) -> dict:
        assert pipe is pipeline and (pipe.num_timesteps, pipe.guidance_scale) == (5, 2.0)
        seen.append((step, t, tensors["latents"]))
        if step == 1:
            return {"latents": torch.zeros_like(tensors["latents"])}
        pipe._interrupt = step == 3
        return {}

    settings = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "latent", "solver": solver}
    result = pipeline("ant", callback_on_step_end=watch, trajectory_every=1, **settings)
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert torch.equal(result.images, seen[-1][2])
    # the zeros were taken on: what came after is small, as one step of the velocity makes it
    assert seen[2][2].abs().max() < 0.7 * seen[0][2].abs().max()
    assert [t for t, _ in result.trajectory] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert len(pipeline("ant", **settings).images) == 1  # and the next call is not interrupted


@pytest.mark.parametrize("solver", [*(name for name in SOLVERS if evaluations(name, 3) == 3), None])
def test_callbacks_see_the_predicted_image(pipeline: DiPPipeline, solver: str | None) -> None:
    """The first step, from noise, heads for what a single step ends in; others evaluate again."""
    seen = []
    settings = {"class_labels": "ant", "seeds": [5], "solver": solver, "output_type": "latent"}
    end = pipeline(num_inference_steps=1, **settings).images
    pipeline(
        num_inference_steps=3,
        callback_on_step_end=lambda *news: seen.append(news[3]),
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
        **settings,
    )
    torch.testing.assert_close(seen[0], {"pred_original_sample": end})


def test_callback_objects_of_diffusers(pipeline: DiPPipeline) -> None:
    class Darker(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs) -> dict:
            return {"latents": callback_kwargs["latents"] - 0.1}

    settings = {"num_inference_steps": 1, "output_type": "latent"}
    plain = pipeline("ant", **settings).images
    darker = pipeline("ant", callback_on_step_end=Darker(cutoff_step_ratio=1.0), **settings).images
    torch.testing.assert_close(darker, plain - 0.1)


def test_trajectory(pipeline: DiPPipeline) -> None:
    path = pipeline("ant", num_inference_steps=5, trajectory_every=2, output_type="latent")
    assert [t for t, _ in path.trajectory] == pytest.approx([0, 0.4, 0.8, 1])
    assert torch.equal(path.trajectory[-1][1], path.images)


def test_half_precision_keeps_the_state_in_full(model_folder: Path) -> None:
    half = DiPPipeline.from_pretrained(model_folder, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    full = DiPPipeline.from_pretrained(model_folder)
    settings = {"num_inference_steps": 10, "output_type": "latent", "seeds": [0]}
    a, b = (pipe("cow", **settings).images for pipe in (half, full))
    assert a.dtype == torch.float32
    assert (a - b).square().mean().sqrt() < 0.02 * b.std()
    moved = full.to(torch.bfloat16)("cow", **settings).images
    assert torch.equal(moved, a)


def test_half_precision_makes_the_same_images(model_folder: Path) -> None:
    settings = {"class_labels": [0, 1, 2, 0] * 4, "seeds": range(16), "output_type": "pt"}
    full, half = (
        DiPPipeline.from_pretrained(model_folder, torch_dtype=dtype)(**settings).images
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert -10 * (full - half).square().mean().log10() > 40  # dB of PSNR
    assert full.std() > 0.1


def test_repeated_blocks_compile_to_the_same_images(pipeline: DiPPipeline) -> None:
    torch.compiler.reset()
    settings = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 1.0}
    plain = pipeline("ant", **settings).images
    pipeline.model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(pipeline("ant", **settings).images, plain, rtol=1e-4, atol=1e-4)


def test_batch_sizes_and_intervals_do_not_compile_again(pipeline: DiPPipeline) -> None:
    torch.compiler.reset()
    compiled = CompileCounter()
    pipeline.model.compile_repeated_blocks(fullgraph=True, backend=compiled)

    def graphs_after(images: int, **settings) -> int:
        pipeline(["ant", "bee"] * images, num_inference_steps=4, **settings)
        return compiled.frame_count

    first = graphs_after(1), graphs_after(2)
    assert first[-1] == 2  # one for the first size, one for all others
    for images in (1, 3, 4):
        for interval in ((0.1, 1.0), (0.0, 1.0), (0.3, 0.6)):
            for scale in (1.0, 1.5, 4.0):
                assert graphs_after(images, guidance_interval=interval, guidance_scale=scale) == 2


@pytest.mark.parametrize(
    "kind", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_group_offloading_changes_nothing(pipeline: DiPPipeline, kind: dict) -> None:
    settings = {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipeline("ant", **settings).images
    pipeline.model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kind)
    offloaded = pipeline("ant", **settings).images
    torch.testing.assert_close(offloaded, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def test_a_folder_from_before_there_were_schedulers(model_folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(model_folder, old)
    shutil.rmtree(old / "scheduler")
    index = json.loads((old / "model_index.json").read_text())
    del index["scheduler"]
    (old / "model_index.json").write_text(json.dumps(index))
    assert isinstance(DiPPipeline.from_pretrained(old).scheduler, FlowMatchEulerDiscreteScheduler)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give class_labels: the model has classes 0 to 2"),
        ({"class_labels": ["ant"], "seeds": [1, 2]}, "1 class labels but 2 seeds"),
        ({"class_labels": ["ant"], "generator": [torch.Generator()] * 3}, "1 class labels but 3 generators"),
        ({"class_labels": ["ant"], "generator": torch.Generator(), "seeds": [1]}, "not both"),
        ({"class_labels": ["ant"], "solver": "rk4"}, "choose one of euler"),
        ({"class_labels": ["ant"], "output_type": "jpeg"}, "choose one of pil, np, pt, latent"),
        ({"class_labels": ["bea"]}, "no class named 'bea'; perhaps 'bee'"),
        ({"class_labels": [1.5]}, "no class named 1.5"),
        ({"class_labels": [3]}, "classes 0 to 2"),
        ({"class_labels": [-1]}, "class -1 is out of range"),
        ({"class_labels": [0], "height": 20}, "multiples of 8"),
        ({"class_labels": [0], "callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt; there are latents and pred"),
        ({"class_labels": [0], "num_inference_steps": 0}, "at least one step"),
        ({"class_labels": [0], "num_inference_steps": 2.5}, "a whole number"),
        ({"class_labels": []}, "no image is asked for"),
        ({"class_labels": [0], "seeds": 7}, "seeds 7: give a list of whole numbers"),
        ({"class_labels": [0], "seeds": [0.5]}, "give a list of whole numbers"),
        ({"class_labels": [0], "seeds": [-1]}, "seeds: -1 is below 0"),
        ({"class_labels": [0], "seeds": [2**64]}, "seeds: 18446744073709551616 is above 9223372036854775807"),
        ({"class_labels": [0], "generator": 7}, "generator 7: give a torch.Generator, or a list"),
        ({"class_labels": [0], "generator": [None]}, "give a torch.Generator, or a list"),
        ({"class_labels": [0], "guidance_scale": float("nan")}, "guidance_scale nan: give a finite number"),
        ({"class_labels": [0], "guidance_scale": float("inf")}, "guidance_scale inf: give a finite number"),
        ({"class_labels": [0], "guidance_scale": "3"}, "guidance_scale '3': give a finite number"),
        ({"class_labels": [0], "guidance_interval": 0.5}, "guidance_interval 0.5: give two numbers"),
        ({"class_labels": [0], "guidance_interval": (0, "1")}, "guidance_interval '1': give a finite number"),
        ({"class_labels": [0], "guidance_interval": (0.9, 0.1)}, "0 <= lo <= hi <= 1"),
        ({"class_labels": [0], "time_shift": float("inf")}, "time_shift inf: give a finite number"),
        ({"class_labels": [0], "height": 0}, "an image of 0x16 pixels"),
        ({"class_labels": [0], "width": "64"}, "width '64': give a whole number"),
        ({"class_labels": [0], "height": 8e8}, "height 800000000.0: give a whole number"),
        (
            {"class_labels": [0, 1], "height": 2**40},
            "images of 1099511627776x16 .* noise alone of 2, 393216.0 GiB; ask",
        ),
        ({"class_labels": [0], "height": 2**63, "generator": torch.Generator()}, "no memory for the noise alone of 1,"),
        ({"class_labels": [0], "num_inference_steps": "5"}, "steps='5': at least one step is needed, and a whole"),
        ({"class_labels": [0], "callback_on_step_end_tensor_inputs": "latents"}, "'latents': give a list of names"),
        ({"class_labels": [0], "callback_on_step_end_tensor_inputs": 1}, "inputs 1: give a list of names"),
        ({"class_labels": [0], "callback_on_step_end": "print"}, "callback_on_step_end 'print': give a function"),
        ({"class_labels": [0], "callback_on_step_end_tensor_inputs": [1]}, "1; there are latents and pred"),
        ({"class_labels": [0], "callback_on_step_end": lambda *_: True}, "returned a bool; give a dictionary"),
        (
            {"class_labels": [0], "callback_on_step_end": lambda *news: {"latents": news[3]["latents"][:, :1]}},
            r"latents is a tensor of \(1, 1, 16, 16\); give a tensor of \(1, 3, 16, 16\)",
        ),
        (
            {"class_labels": [0], "callback_on_step_end": lambda *news: {"latents": news[3]["latents"].numpy()}},
            "latents is a ndarray; give a tensor",
        ),
        ({"class_labels": [0], "solver": ["euler"]}, "choose one of euler"),
        ({"class_labels": [0], "trajectory_every": "2"}, "trajectory_every '2': give a whole number"),
        ({"class_labels": [0], "trajectory_every": -1}, "trajectory_every -1: give 0"),
    ],
)
def test_arguments_out_of_range(pipeline: DiPPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": "64"}, "height '64': give a whole number"),
        ({"width": 0}, "width 0: must be from 1 to 16384"),
        ({"height": 2**20}, "height 1048576: must be from 1"),
        ({"model": None}, "model None: give a DiP; DiPPipeline.from_pretrained"),
        ({"class_names": "ant"}, "class_names 'ant': give a list of names"),
        ({"class_names": 3}, "class_names 3: give a list of names"),
        ({"sampling": [50]}, r"sampling \[50\]: give a dictionary"),
    ],
)
def test_parts_of_other_kinds(model_folder: Path, arguments: dict, message: str) -> None:
    """Most would be saved, and not load again."""
    with pytest.raises(UserError, match=message):
        DiPPipeline.from_pretrained(model_folder, **arguments)


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


def test_saving_takes_what_it_takes_elsewhere(pipeline: DiPPipeline, tmp_path: Path) -> None:
    def check(**which: str) -> None:
        theirs = DiPPipeline.from_pretrained(tmp_path, **which).model.state_dict()
        assert all(torch.equal(theirs[name], value) for name, value in pipeline.model.state_dict().items())

    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")
    parts = [path.name for path in (tmp_path / "model").glob("*.safetensors")]
    assert len(parts) > 1 and all(".fp16" in name for name in parts)
    check(variant="fp16")
    check()  # as the commands load it, which know of no variants
    pipeline.save_pretrained(tmp_path, variant="fp16")  # in one file, where the parts were
    check(variant="fp16")
    check()
    pipeline.save_pretrained(tmp_path, variant="ema")
    check(variant="ema")
    with pytest.raises(UserError, match=r'variants ema and fp16; say in Python which, .* variant="ema"\), or keep'):
        check()
    pipeline.save_pretrained(tmp_path)
    check()


def test_the_users_folder(pipeline: DiPPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("~/saved")
    again = DiPPipeline.from_pretrained("~/saved")
    pipeline.model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv"]))
    pipeline.save_lora_weights("~/lora")
    again.load_lora_weights("~/lora")
    assert again.model.adapters and [path.name for path in tmp_path.iterdir()] == ["home"]


def test_what_could_not_be_loaded_again_is_not_saved(pipeline: DiPPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="safe_serialization=False: only safetensors are loaded again"):
        pipeline.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "file").touch()
    for whole in (pipeline, pipeline.model):
        with pytest.raises(UserError, match="file: a file; name a folder to save to"):
            whole.save_pretrained(tmp_path / "file")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "class_names": ["ant", "bee"]}))
    with pytest.raises(UserError, match="class_names: 2 names for 3 classes"):
        DiPPipeline.from_pretrained(tmp_path)


def test_lora(pipeline: DiPPipeline, model_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {"class_labels": ["ant"], "num_inference_steps": 3, "output_type": "latent"}
    plain = pipeline(**settings).images
    layers = ["qkv", "attention.out", "mlp.up", "down.0", "detailer.out"]
    pipeline.model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False))
    adapted = pipeline(**settings).images
    assert (adapted - plain).abs().max() > 0.01
    pipeline.save_lora_weights(tmp_path)
    with pytest.raises(UserError, match="a model with adapters is not saved"):
        pipeline.save_pretrained(tmp_path / "whole")
    again = DiPPipeline.from_pretrained(model_folder)
    again.load_lora_weights(tmp_path, adapter_name="mine")
    assert torch.equal(again(**settings).images, adapted)
    again.set_adapters("mine", 0.0)
    assert torch.equal(again(**settings).images, plain)
    again.set_adapters("mine", 1.0)
    again.fuse_lora()
    torch.testing.assert_close(again(**settings).images, adapted, rtol=1e-4, atol=1e-4)
    fused = copy.deepcopy(again)
    fused.unload_lora_weights()
    fused.save_pretrained(tmp_path / "fused")
    saved = DiPPipeline.from_pretrained(tmp_path / "fused")
    saved.save_pretrained(tmp_path / "copy")
    for folder in (tmp_path / "fused", tmp_path / "copy"):
        assert (folder / "README.md").read_text().count("Adapters (LoRA) were fused into these weights: mine. ") == 1
    torch.testing.assert_close(saved(**settings).images, adapted, rtol=1e-4, atol=1e-4)
    again.unfuse_lora()
    again.unload_lora_weights()
    torch.testing.assert_close(again(**settings).images, plain, rtol=1e-4, atol=1e-4)
    again.load_lora_weights(tmp_path, adapter_name="mine")
    again.load_lora_weights(tmp_path, adapter_name="mine", hotswap=True)  # the same adapters as before, and no mistake
    torch.testing.assert_close(again(**settings).images, adapted, rtol=1e-4, atol=1e-4)
    again.unload_lora_weights()
    weights = {"elsewhere.lora_A.weight": torch.zeros(4, 8), "elsewhere.lora_B.weight": torch.zeros(8, 4)}
    with pytest.raises(UserError, match=r"LoRA weights: .*elsewhere.* not found"):
        again.load_lora_weights(weights)
    with pytest.raises(UserError, match="LoRA weights nowhere: "):
        again.load_lora_weights("nowhere")
    layer = "backbone.blocks.0.attention.qkv"
    weights = {f"{layer}.lora_A.weight": torch.zeros(4, 64), f"{layer}.lora_B.weight": torch.zeros(192, 4)}
    with pytest.raises(UserError, match=r"LoRA weights: of a model of other sizes \(size mismatch for \S+lora_A.*\)$"):
        again.load_lora_weights(weights)
    for none in ({}, {"a": torch.zeros(3)}):
        with pytest.raises(UserError, match="LoRA weights: no tensors of LoRA are in it"):
            again.load_lora_weights(none)
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"damaged\.safetensors: cannot be loaded \(Error while deserializing"):
        again.load_lora_weights(tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match="LoRA adapter to save: name one of those loaded; none is loaded"):
        again.save_lora_weights(tmp_path / "copied")
    again.load_lora_weights(tmp_path)
    again.save_lora_weights(tmp_path / "copied")  # the only one, whatever its name
    copied, written = (folder / "pytorch_lora_weights.safetensors" for folder in (tmp_path / "copied", tmp_path))
    assert load_file(copied).keys() == load_file(written).keys()
    again.load_lora_weights(tmp_path, adapter_name="second")
    with pytest.raises(UserError, match="name one of those loaded; there are default_0, second"):
        again.save_lora_weights(tmp_path / "copied")


def test_weights_may_change_without_a_trace(model_folder: Path) -> None:
    changed, other = (DiPPipeline.from_pretrained(model_folder) for _ in range(2))
    for pipe in (changed, other):
        pipe.set_progress_bar_config(disable=True)
    settings = {"class_labels": ["ant"], "num_inference_steps": 3, "output_type": "latent"}
    before = changed(**settings).images
    opened_up(other.model, seed=1)
    for weight, wanted in zip(changed.model.parameters(), other.model.parameters()):
        weight.data.copy_(wanted.data)  # as averages are put in, and adapters merged, elsewhere
    after = changed(**settings).images
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, other(**settings).images)


def test_a_model_knows_how_it_is_sampled(model_folder: Path, tmp_path: Path) -> None:
    network = DiPPipeline.from_pretrained(model_folder).model
    own = {"num_inference_steps": 3, "guidance_scale": 1.5, "guidance_interval": (0.2, 0.9), "solver": "heun"}
    DiPPipeline(network, height=16, width=16, sampling=own).save_pretrained(tmp_path / "saved")
    pipeline = DiPPipeline.from_pretrained(tmp_path / "saved")
    assert pipeline.default_settings.pipeline_arguments() == {**own, "time_shift": 1.0}

    def sample(**said: object) -> torch.Tensor:
        return pipeline([0, 1], output_type="latent", **said).images

    untold = sample()
    assert torch.equal(untold, sample(**own))
    for name, value in {**own, "num_inference_steps": 4, "guidance_scale": 3.0, "solver": "euler"}.items():
        assert (name == "guidance_interval") == torch.equal(untold, sample(**{name: value}))
    without_class = sample(seeds=[5, 5], guidance_scale=0.0, guidance_interval=(0.0, 1.0))
    torch.testing.assert_close(without_class[0], without_class[1], rtol=1e-4, atol=1e-4)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # who chooses a scheduler wants it followed
    shifted = sample()
    assert not torch.equal(shifted, untold)
    assert not torch.equal(shifted, sample(solver="euler"))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert torch.equal(untold, sample())
    assert DiPPipeline(network).default_settings.pipeline_arguments()["num_inference_steps"] == 50


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"steps": 3}, "'steps' is none of num_inference_steps"),
        ({"num_inference_steps": 0}, "steps: input should be greater"),
        ({"solver": "rk4"}, "solver"),
    ],
)
def test_ways_of_sampling_there_are_not(sampling: dict, message: str, pipeline: DiPPipeline) -> None:
    with pytest.raises(UserError, match=message):
        DiPPipeline(pipeline.model, sampling=sampling)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with previews and an evaluation, on the bundled pictures."""
    evaluation = {"every": 6, "images": 4, "steps": 1, "metrics": ["kid_efficientnet", "boundary"]}
    preview = {"every": 6, "images": 10, "steps": 2}
    recipe = tiny_recipe(tmp_path_factory.mktemp("runs") / "toy", "emoji", evaluation=evaluation, preview=preview)
    train(recipe, Console(quiet=True))
    return Path(recipe.out)


def test_the_model_card_tells_of_the_run(run: Path, tmp_path: Path) -> None:
    DiPPipeline.from_pretrained(run).save_pretrained(tmp_path / "toy", license="cc-by-4.0")
    card = (tmp_path / "toy" / "README.md").read_text()
    assert "license: cc-by-4.0" in card.split("---")[1] and "library_name: pixeldip" in card.split("---")[1]
    for text in (
        *("# toy", "Data: emoji, split train", "6 steps of 4 images", "Measured after step 6", "| kid_efficientnet | "),
        *("class_labels=['red heart', 'sun']", "red heart, sun, strawberry", "patch_size | 8", "num_heads: 2"),
        f"torch {torch.__version__}",
    ):
        assert text in card, text
    assert "Started from" not in card
    newest = max((run / "previews").iterdir())
    assert (tmp_path / "toy" / "samples.png").read_bytes() == newest.read_bytes()
    assert not any(str(run) in path.read_text() for path in (tmp_path / "toy").rglob("*.json"))
    assert not list(run.rglob("README.md"))  # checkpoints have none: they would be stale
    further = shutil.copytree(run, tmp_path / "further" / "toy")  # than its checkpoint
    with (further / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 9, "loss": 77.7, "images_per_second": 1.0}) + "\n")
    DiPPipeline.from_pretrained(further).save_pretrained(tmp_path / "saved" / "toy", license="cc-by-4.0")
    told = (tmp_path / "saved" / "toy" / "README.md").read_text()
    assert sorted(told.splitlines()) == sorted(card.splitlines())  # the entries at the top have no order
    # a copy of a copy keeps it; weights from nowhere say so
    DiPPipeline.from_pretrained(tmp_path / "toy").save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == card and (tmp_path / "copy" / "samples.png").is_file()
    DiPPipeline.from_pretrained(run).save_pretrained(tmp_path / "unlicensed")
    DiPPipeline.from_pretrained(tmp_path / "unlicensed").save_pretrained(tmp_path / "licensed", license="cc-by-4.0")
    assert "None was stated" in (tmp_path / "unlicensed" / "README.md").read_text()
    licensed = (tmp_path / "licensed" / "README.md").read_text()
    assert sorted(licensed.splitlines()) == sorted(card.splitlines())
    DiPPipeline.from_pretrained(tmp_path / "licensed").save_pretrained(tmp_path / "again", license="mit")
    again = (tmp_path / "again" / "README.md").read_text()
    assert "license: mit" in again and "## Licence\n\nmit" in again and "cc-by" not in again
    (tmp_path / "again" / "README.md").write_text(
        again.replace("## Licence\n\nmit", "## Licence\n\nAs MIT's, but kinder")
    )
    kept = DiPPipeline.from_pretrained(tmp_path / "again")
    with pytest.raises(UserError, match=r"states the licence mit in words of its own, which license='cc0-1\.0' would"):
        kept.save_pretrained(tmp_path / "contradicted", license="cc0-1.0")
    with pytest.raises(UserError, match="save_pretrained: there is no keyword 'licence'"):
        kept.save_pretrained(tmp_path / "contradicted", licence="mit")
    assert not (tmp_path / "contradicted").exists()
    DiPPipeline(DiP(**TINY_MODEL, num_classes=0), height=16, width=16).save_pretrained(tmp_path / "unknown")
    unknown = (tmp_path / "unknown" / "README.md").read_text()
    assert "An unconditional" in unknown and "is not known" in unknown and "None was stated" in unknown


def test_the_cards_example_runs(run: Path, tmp_path: Path) -> None:
    DiPPipeline.from_pretrained(run).save_pretrained(tmp_path / "toy")
    example = (tmp_path / "toy" / "README.md").read_text().split("```python")[1].split("```")[0]
    names: dict = {}
    exec(example.replace("FOLDER-OR-HUB-ID", str(tmp_path / "toy")), names)
    assert len(names["images"]) == 2


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files needs."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://127.0.0.1:{self.server.server_port}/me/toy"
        answer: dict = {"url": url, "name": "me/toy", "id": "me/toy"}
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/commit/{'0' * 40}", "hookOutput": ""}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/toy", "sha": "0" * 40, "siblings": [], "tags": []})

    def _answer(self, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_push_to_hub(run: Path) -> None:
    """Against a server on this machine; the hub's address is read once, so another process pushes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"from pixeldip import DiPPipeline; p = DiPPipeline.from_pretrained({str(run)!r}); "
    code += "p.push_to_hub('me/toy', token='hf_x', license='mit')"
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    try:
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    finally:
        server.shutdown()
    assert {"README.md", "samples.png", "model_index.json", "model/config.json"} <= server.files.keys()
    assert "model/diffusion_pytorch_model.safetensors" in server.files
    assert "license: mit" in server.files["README.md"].decode() and "# toy" in server.files["README.md"].decode()
