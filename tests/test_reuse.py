"""Between two evaluations of the backbone the head is the model's, with the tokens of the first of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from pixeldip import DiP, DiPPipeline, UserError

from .conftest import TINY_MODEL, opened_up


def tiny(scheduler: UniPCMultistepScheduler | None = None, **changes: object) -> DiPPipeline:
    model = opened_up(DiP(**{**TINY_MODEL, **changes}, num_classes=3)).eval()
    pipe = DiPPipeline(model, scheduler, height=16, width=24)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: DiPPipeline, **settings: object) -> Tensor:
    whole = {"num_inference_steps": 6, "guidance_scale": 2.0, "guidance_interval": (0.0, 1.0), **settings}
    return pipe([2, 0], output_type="latent", **whole).images


@contextmanager
def held(pipe: DiPPipeline, every: int) -> Iterator[None]:
    """The whole model is computed at every evaluation; only what its last block puts out is as at the last that was
    due."""
    kept: list[Tensor] = []

    def hold(module: torch.nn.Module, given: tuple, out: Tensor) -> Tensor:
        kept.append(kept[-1] if len(kept) % every else out)
        return kept[-1]

    handle = pipe.model.backbone.blocks[-1].register_forward_hook(hold)
    yield
    handle.remove()


@contextmanager
def conditions(pipe: DiPPipeline) -> Iterator[list[int]]:
    """Of how many conditions the backbone was computed, time by time."""
    rows: list[int] = []
    handle = pipe.model.backbone.blocks[0].register_forward_hook(lambda _, __, out: rows.append(len(out)))
    yield rows
    handle.remove()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"placement": "hybrid"}, {"prediction": "image"}, {"head": "attention", "head_width": 16}]
)
def test_the_head_works_with_the_tokens_it_was_left(changes: dict, ahead: bool) -> None:
    pipe = tiny(**changes)
    plain = images(pipe)
    with held(pipe, 4):
        wanted = images(pipe)
    if ahead:
        pipe.enable_precomputed_modulation()
    with conditions(pipe) as rows:
        found = images(pipe, backbone_every=4)
    assert rows == [4, 4]  # of six evaluations
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(images(pipe, backbone_every=1), images(pipe))


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        ({"backbone_every": 2}, [4, 4, 4]),
        ({"backbone_every": 100}, [4]),
        ({"backbone_every": 2, "solver": "heun"}, [4] * 6),  # of eleven evaluations
        ({"backbone_every": 3, "guidance_interval": (0.3, 0.7)}, [2, 4, 2]),  # anew where guidance begins and ends
        ({"backbone_every": 2, "solver": "ancestral", "guidance_scale": 1.0}, [2, 2, 2]),
    ],
)
def test_when_the_backbone_is_computed(settings: dict, computed: list[int]) -> None:
    pipe = tiny()
    for _ in range(2):  # what one call kept is not the next one's
        with conditions(pipe) as rows:
            images(pipe, **settings)
        assert rows == computed


def test_a_scheduler_is_followed_alike() -> None:
    pipe = tiny(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    with held(pipe, 3):
        wanted = images(pipe)
    with conditions(pipe) as rows:
        found = images(pipe, backbone_every=3)
    assert rows == [4, 4]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("changes", [{"head": "linear", "head_width": None}, {"placement": "intermediate"}])
def test_a_model_with_nothing_to_compute_in_between(changes: dict) -> None:
    pipe = tiny(**changes)
    images(pipe, backbone_every=1)
    with pytest.raises(UserError, match="backbone_every 2: no Patch Detailer Head stands behind"):
        images(pipe, backbone_every=2)
