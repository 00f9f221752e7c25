"""The head with tokens that the backbone left: between two evaluations of it, and at the end, in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.model import HEADS

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
    refused = pytest.raises(UserError, match="backbone_every 2: no Patch Detailer Head stands behind")
    with refused:
        images(pipe, backbone_every=2)
    with refused:
        DiPPipeline(pipe.model, sampling={"backbone_every": 2})


@contextmanager
def computed_in(pipe: DiPPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The precisions of what the last head puts out, evaluation by evaluation."""
    kinds: list[torch.dtype] = []
    head = type(pipe.model.detailer)
    forward = head.forward

    def watched(self: torch.nn.Module, *given: Tensor) -> Tensor:
        out = forward(self, *given)
        kinds.append(out.dtype)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(head, "forward", watched)
        yield kinds


BF16, FP32 = torch.bfloat16, torch.float32
EXACT = [FP32, FP32]  # one half of the patches after the other
FEW = {"num_inference_steps": 3}


@pytest.mark.parametrize("head", HEADS)
def test_a_predicted_image_is_not_rounded(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width = {"unet": 8, "linear": None}.get(head, 16)
    pipe = tiny(prediction="image", head=head, head_width=width)
    exact = images(pipe, **FEW)
    pipe.to(BF16)
    weights = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    for ahead in (False, True):
        if ahead:
            pipe.enable_precomputed_modulation()
        with computed_in(pipe, monkeypatch) as kinds:
            found = images(pipe, **FEW)
        assert kinds == [BF16, BF16, BF16, *EXACT]
        assert (found - exact).std() < 0.1 * exact.std()
        assert (found != found.bfloat16()).any()
    after = pipe.model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"backbone_every": 2}, [BF16, BF16, BF16, *EXACT]),  # the backbone is due at the last one
        ({"backbone_every": 3}, [BF16, BF16, *EXACT]),
        ({"solver": "heun"}, [BF16] * 4 + [*EXACT, BF16, *EXACT]),  # two of its evaluations are at the last time
        ({"guidance_interval": (0.0, 0.5)}, [BF16, BF16, BF16, *EXACT]),
    ],
)
def test_which_evaluation_is_the_last(settings: dict, kinds: list, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny(prediction="image")
    pipe.to(BF16)
    with computed_in(pipe, monkeypatch) as found:
        images(pipe, **FEW, **settings)
    assert found == kinds


def test_in_autocast_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny(prediction="image")
    with torch.autocast("cpu", torch.bfloat16), computed_in(pipe, monkeypatch) as kinds:
        images(pipe, **FEW)
    assert kinds == [BF16, BF16, BF16, *EXACT]
    with computed_in(pipe, monkeypatch) as kinds:
        images(pipe, **FEW)
    assert kinds == [FP32] * 3


def test_heads_that_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a velocity is predicted, the last step's rounding counts for a step; layers with hooks are not copied."""
    velocity, hooked = tiny(), tiny(prediction="image")
    hooked.model.detailer.out.register_forward_hook(lambda *_: None)
    for pipe in (velocity, hooked):
        pipe.to(BF16)
        with computed_in(pipe, monkeypatch) as kinds:
            images(pipe, **FEW)
        assert kinds == [BF16] * 3


def test_the_last_head_takes_no_more_memory_than_the_others() -> None:
    """In two parts, as if each patch were alone."""
    pipe = tiny(prediction="image")
    x, t, y = torch.randn(2, 3, 16, 24), torch.tensor([0.3, 0.3]), torch.tensor([[2, 0], [3, 3]])
    with torch.no_grad():
        v, tokens = pipe.model(x, t, y, tokens_after=pipe.model.config.depth)
        patches: list[int] = []
        head = pipe.model.head_in_float32()
        head.register_forward_hook(lambda _, given, __: patches.append(len(given[0])))
        again = pipe.model(x, t, y, tokens=tokens, head=head)
    assert patches == [6, 6]  # of twelve
    torch.testing.assert_close(again, v, rtol=1e-4, atol=1e-5 * v.abs().max().item())


def test_a_model_that_is_offloaded(tmp_path: Path) -> None:
    """Its head lies elsewhere between evaluations."""
    pipe = tiny(prediction="image", head="mlp", head_width=16)
    pipe.to(BF16)
    pipe.model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    assert images(pipe, **FEW).isfinite().all()
