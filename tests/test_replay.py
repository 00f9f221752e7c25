"""A replayed network is its model: modulation ahead of the solution, and on a CUDA device graphs, change no image."""

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from pixeldip import DiP, DiPPipeline, UserError, replay
from pixeldip.flow import SOLVERS, guided_velocity, time_grid
from pixeldip.replay import ReplayedNetwork, SolutionNetwork
from pixeldip.sampling import load_pipeline

from .conftest import TINY_MODEL, opened_up

Y = torch.tensor([2, 0])
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are recorded on CUDA devices only")


def tiny(**changes: object) -> DiP:
    return opened_up(DiP(**{**TINY_MODEL, **changes}, num_classes=3)).eval()


@torch.no_grad()
def solution(network: DiP | ReplayedNetwork, solver: str = "euler", y: Tensor = Y, scale: float = 2.0) -> Tensor:
    """Six steps, the first of them unguided."""
    device = next((network if isinstance(network, DiP) else network.model).parameters()).device
    x = torch.randn(len(y), 3, 16, 24, generator=torch.Generator().manual_seed(0)).to(device)
    times = time_grid(6)
    if isinstance(network, ReplayedNetwork):
        network = network.begin(times)
    return SOLVERS[solver](guided_velocity(network, y.to(device), 3, scale, (0.1, 1.0)), x, times)


def same(network: ReplayedNetwork, **arguments: object) -> None:
    plain = solution(network.model, **arguments)
    torch.testing.assert_close(solution(network, **arguments), plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@contextmanager
def modulation_calls(model: DiP) -> Iterator[list[int]]:
    """How many conditions the first block's modulation layer was given, call by call."""
    rows: list[int] = []
    layer = model.backbone.blocks[0].modulation
    handle = layer.register_forward_hook(lambda _, given, __: rows.append(given[0].flatten(0, -2).shape[0]))
    yield rows
    handle.remove()


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_modulation_is_computed_once_for_all_steps(solver: str) -> None:
    network = ReplayedNetwork(tiny())
    same(network, solver=solver)
    with modulation_calls(network.model) as rows:
        solution(network, solver)
    assert rows == [7 * 2, 7 * 4]  # all seven times for the unguided step's two labels, then for the guided ones' four


@pytest.mark.parametrize(
    "changes", [{"prediction": "noise"}, {"placement": "hybrid"}, {"head": "linear", "head_width": None}]
)
def test_of_every_kind_of_model(changes: dict) -> None:
    same(ReplayedNetwork(tiny(**changes)))


def test_weights_and_labels_may_change() -> None:
    network = ReplayedNetwork(tiny())
    same(network)
    same(network, y=Y.flip(0))
    same(network, scale=1.0)
    opened_up(network.model, seed=1)
    same(network)
    network.model.to(torch.bfloat16)
    plain = solution(network.model)
    assert (solution(network) - plain).std() < 0.02 * plain.std()


def test_without_room_and_at_other_times_each_step_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = ReplayedNetwork(tiny()), torch.randn(2, 3, 16, 16)
    called = network.begin([0.25, 0.5])
    for t in (0.25, 0.6):
        wanted = network.model(x, torch.full((2,), t), Y)
        torch.testing.assert_close(called(x, t, Y), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    monkeypatch.setattr(replay, "MOST_AHEAD", 0)
    same(network)
    with modulation_calls(network.model) as rows:
        solution(network)
    assert rows == [2, 4, 4, 4, 4, 4]
    config = network.model.config
    for_two = 7 * config.depth * 2 * 6 * config.hidden_size * 4
    for room, calls in ((1.5, [7 * 2, 4, 4, 4, 4, 4]), (2.5, [7 * 2, 7 * 4])):  # one table at a time
        monkeypatch.setattr(replay, "MOST_AHEAD", room * for_two)
        same(network)
        with modulation_calls(network.model) as rows:
            solution(network)
        assert rows == calls


def test_pipelines_compute_modulation_ahead_when_asked() -> None:
    pipe = DiPPipeline(tiny(), height=16, width=16)
    pipe.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        return pipe([2, 0], num_inference_steps=6, output_type="latent").images

    plain = images()
    pipe.enable_precomputed_modulation()
    with modulation_calls(pipe.model) as rows:
        torch.testing.assert_close(images(), plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
        assert len(rows) == 2
        pipe.disable_precomputed_modulation()
        images()
        assert len(rows) == 2 + 6


def test_weights_of_inference_mode() -> None:
    """They leave no trace of changes, and may not be asked for one."""
    with torch.inference_mode():
        pipe = DiPPipeline(tiny(), height=16, width=16)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe([2, 0], num_inference_steps=2, output_type="latent").images
    pipe.enable_precomputed_modulation()
    ahead = pipe([2, 0], num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(ahead, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_a_pipeline_computes_with_the_model_it_has() -> None:
    pipe = DiPPipeline(tiny(), height=16, width=24)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_precomputed_modulation()
    before = pipe([2, 0], num_inference_steps=2, output_type="latent").images
    pipe.model = opened_up(tiny(), seed=1)
    after = pipe([2, 0], num_inference_steps=2, output_type="latent").images
    pipe.disable_precomputed_modulation()
    plain = pipe([2, 0], num_inference_steps=2, output_type="latent").images
    assert before.shape == (2, 3, 16, 24) and (before - after).abs().max() > 0.01
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("stopped", [False, True])
def test_a_pipeline_keeps_no_modulation(stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = DiPPipeline(tiny(), height=16, width=16)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_precomputed_modulation()
    begun: list[weakref.ref] = []
    begin = pipe._replayed.begin

    def watched(times: list[float]) -> SolutionNetwork:
        network = begin(times)
        begun.append(weakref.ref(network))
        return network

    monkeypatch.setattr(pipe._replayed, "begin", watched)

    def on_step(*_: object) -> None:
        assert begun[0]()._ahead is not None
        if stopped:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped") if stopped else nullcontext():
        pipe([2, 0], num_inference_steps=6, callback_on_step_end=on_step)
    assert len(begun) == 1 and begun[0]() is None


@pytest.mark.parametrize("solver", ["euler", None])
def test_threads_share_a_pipeline(solver: str | None) -> None:
    """Each call has its own steps and states, those of a scheduler included."""
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe = DiPPipeline(tiny(), scheduler, height=16, width=16)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_precomputed_modulation()

    def images(steps: int) -> Tensor:
        return pipe([2, 0], num_inference_steps=steps, solver=solver, output_type="latent").images

    steps = [5, 6, 7, 8] * 6
    with ThreadPoolExecutor(4) as threads:
        for count, together in zip(steps, threads.map(images, steps)):
            torch.testing.assert_close(together, images(count), rtol=1e-4, atol=1e-5 * together.abs().max().item())


def test_commands_compute_modulation_ahead(tmp_path: Path) -> None:
    DiPPipeline(tiny(), height=16, width=16).save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path), torch.device("cpu"))
    with modulation_calls(pipe.model) as rows:
        pipe([2, 0], num_inference_steps=6, guidance_interval=(0.0, 1.0))
    assert len(rows) == 1


def test_graphs_want_a_cuda_device() -> None:
    with pytest.raises(UserError, match="the model is on the cpu device"):
        DiPPipeline(tiny(), height=16, width=16).enable_cuda_graphs()


@CUDA
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_replay_the_same_images(precision: torch.dtype, compiled: bool) -> None:
    model = tiny().to("cuda", precision)
    if compiled:
        torch.compiler.reset()
        model.compile_repeated_blocks(dynamic=False)
    network = ReplayedNetwork(model)
    for change in (lambda: None, lambda: opened_up(model.cpu(), seed=1).cuda()):
        change()
        plain = solution(model)
        for again in (solution(network), solution(network)):
            assert (again - plain).std() < (0.02 if precision == torch.bfloat16 else 1e-4) * plain.std()


@CUDA
def test_threads_record_graphs_one_at_a_time() -> None:
    pipes = [DiPPipeline(opened_up(tiny(), seed).to("cuda"), height=16, width=24) for seed in (1, 2)]

    def images(pipe: DiPPipeline) -> Tensor:
        return pipe([2, 0], num_inference_steps=6, output_type="latent").images

    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    plain = [images(pipe) for pipe in pipes] * 4
    for pipe in pipes:
        pipe.enable_cuda_graphs()
    with ThreadPoolExecutor(4) as threads:
        for wanted, together in zip(plain, threads.map(images, pipes * 4)):
            assert (together - wanted).std() < 1e-4 * wanted.std()


@CUDA
def test_graphs_with_and_without_the_backbone() -> None:
    pipe = DiPPipeline(tiny().to("cuda"), height=16, width=24)
    pipe.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        return pipe([2, 0], num_inference_steps=6, backbone_every=2, output_type="latent").images

    plain = images()
    pipe.enable_cuda_graphs()
    for again in (images(), images()):
        assert (again - plain).std() < 1e-4 * plain.std()
