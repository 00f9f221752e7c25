"""The pipeline as users of diffusers know pipelines."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from torch._dynamo.testing import CompileCounter

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.flow import SOLVERS, evaluations
from pixeldip.sampling import SampledImages, load_pipeline
from pixeldip.settings import SamplingSettings

from .conftest import TINY_MODEL, opened_up

CPU = torch.device("cpu")


def test_classes_by_name_and_by_id(pipeline: DiPPipeline) -> None:
    named, numbered, counted = (
        pipeline(c, num_inference_steps=2, seeds=[5], output_type="pt").images for c in ("bee", [1], torch.tensor([1]))
    )
    assert torch.equal(named, numbered) and torch.equal(named, counted) and named.shape == (1, 3, 16, 16)
    for single in (1, np.int64(1), torch.tensor(1)):
        assert torch.equal(named, pipeline(single, num_inference_steps=2, seeds=[5], output_type="pt").images)
    assert pipeline("ant", num_inference_steps=2, height=24, width=8).images[0].size == (8, 24)


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
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            pipeline.model.backbone.class_embed.weight[1] = 0
            pipeline.model.detailer.out.bias.fill_(value)
        with pytest.warns(UserWarning, match="drawn in black"):
            assert np.asarray(pipeline("bee", num_inference_steps=1).images[0]).max() == 0


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

    def stop(pipe: DiPPipeline, step: int, *_: object) -> None:
        pipe._interrupt = step == 2

    path = pipeline("ant", num_inference_steps=5, trajectory_every=2, output_type="latent", callback_on_step_end=stop)
    assert [t for t, _ in path.trajectory] == pytest.approx([0, 0.4, 0.6])
    assert torch.equal(path.trajectory[-1][1], path.images)
    buffer = torch.zeros(1, 3, 16, 16, dtype=torch.float64)

    def fill(pipe: DiPPipeline, step: int, t: float, tensors: dict) -> dict:
        return {"latents": buffer.fill_(step)}

    names = (name for name in ["latents"])
    asked = {"callback_on_step_end": fill, "callback_on_step_end_tensor_inputs": names, "trajectory_every": 1}
    path = pipeline("ant", num_inference_steps=3, output_type="latent", **asked)
    assert path.images.dtype == torch.float32 and next(names, None) is None
    assert [state.unique().tolist() for _, state in path.trajectory[1:]] == [[0.0], [1.0], [2.0]]


def test_half_precision_keeps_the_state_in_full(model_folder: Path) -> None:
    half = DiPPipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
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
        DiPPipeline.from_pretrained(model_folder, dtype=dtype)(**settings).images
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


def test_commands_compile_once_for_each_number_of_sequences(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch and, where it is guided, twice as many; the last batch is a smaller one."""
    torch.compiler.reset()
    compiled = CompileCounter()
    compiling = functools.partialmethod(DiP.compile_repeated_blocks, backend=compiled)
    monkeypatch.setattr(DiP, "compile_repeated_blocks", compiling)
    pipeline = load_pipeline(str(model_folder), CPU, compiled=True)
    for images, graphs in ((3, 2), (1, 4), (3, 4)):
        for interval in ((0.3, 1.0), (0.0, 1.0), (0.3, 0.6)):
            for scale in (4.0, 1.5, 1.0):
                settings = SamplingSettings(4, "euler", scale, interval)
                SampledImages(pipeline, settings, range(7)).read(0, images)
                assert compiled.frame_count == graphs


@pytest.mark.parametrize(
    "kind", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_group_offloading_changes_nothing(pipeline: DiPPipeline, kind: dict) -> None:
    settings = {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipeline("ant", **settings).images
    pipeline.model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kind)
    offloaded = pipeline("ant", **settings).images
    torch.testing.assert_close(offloaded, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


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
        ({"class_labels": [0], "backbone_every": 0}, "backbone_every 0: give 1"),
        ({"class_labels": [0], "backbone_every": 1.5}, "backbone_every 1.5: give a whole number"),
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
    assert pipeline.default_settings.pipeline_arguments() == {**own, "time_shift": 1.0, "backbone_every": 1}

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


def test_pictures_of_more_channels_are_refused_at_once() -> None:
    pipe = DiPPipeline(DiP(**TINY_MODEL, num_classes=0, in_channels=5), height=16, width=16)
    with pytest.raises(UserError, match=r'output_type "pil": pictures have 1 or 3 channels, the model 5'):
        pipe(num_inference_steps=1)
    assert pipe(num_inference_steps=1, output_type="pt").images.shape == (1, 5, 16, 16)
    with pytest.raises(UserError, match="makes images of 5 channels"):
        SampledImages(pipe, SamplingSettings(), range(2))
