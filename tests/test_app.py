"""The parts of the page that need no browser."""

import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'pixeldip[app]'")

import gradio as gr

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.app import engine
from pixeldip.app.contexts import coarse_share, compare_contexts, no_context, noise_share
from pixeldip.app.engine import PATH_MOMENTS, watch, watched
from pixeldip.app.gallery import SHOWN, Gallery
from pixeldip.app.messages import told_in_page
from pixeldip.app.models import Models
from pixeldip.app.parts import FOUND, offered_again, when_loaded
from pixeldip.app.settings import (
    ImageSettings,
    Limits,
    SolutionControls,
    SubjectControls,
    settings_from_note,
    solution_controls,
    subject_controls,
)
from pixeldip.app.training import POINTS, RunNow
from pixeldip.images import read_note, save_png
from pixeldip.model import HEADS
from pixeldip.recipe import save_recipe
from pixeldip.run_folder import LOG, RECIPE
from pixeldip.sampling import SampledImages
from pixeldip.settings import SamplingSettings

from .conftest import TINY_MODEL, opened_up, saved_model, tiny_recipe

NOTE = {
    "model": "m",
    "class": "bee",
    "seed": 3,
    "num_inference_steps": 5,
    "solver": "heun",
    "guidance_scale": 2.5,
    "guidance_interval": [0.2, 0.9],
    "time_shift": 1.5,
    "backbone_every": 2,
    "height": 16,
    "width": 24,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> DiPPipeline:
    pipeline = DiPPipeline.from_pretrained(saved_model(tmp_path_factory.mktemp("model"), 16))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline: DiPPipeline, steps: int, solver: str = "euler") -> SampledImages:
    return SampledImages(pipeline, SamplingSettings(steps=steps, solver=solver), [5, 6, 7])


@pytest.mark.parametrize(("steps", "solver"), [(1, "euler"), (7, "heun"), (60, "ab2"), (5, "ancestral")])
def test_watching_changes_no_image(pipeline: DiPPipeline, steps: int, solver: str) -> None:
    images = images_of(pipeline, steps, solver)
    *before, last = watch(images)
    assert all(view.path[-1] is view.now for view in before)  # where one that is stopped ends
    assert np.array_equal(last.pixels, images.read(0, 3))
    assert len(last.path) <= PATH_MOMENTS + 1 and last.path[0].t == 0 and last.path[-1].t == 1
    assert last.path[-1].heading.tobytes() == last.path[-1].noisy.tobytes()


@pytest.mark.parametrize("solver", ["euler", "ab2", "ancestral"])
def test_where_the_path_is_heading(pipeline: DiPPipeline, solver: str) -> None:
    """The first step from noise heads for x_0 + v, which is where a single step ends."""
    one = list(watch(images_of(pipeline, 1)))[-1].path[-1].noisy
    path = list(watch(images_of(pipeline, 2, solver)))[-1].path
    guided = path[1]  # at t = 0.5, after a step that began at t = 0, where nothing is guided
    assert guided.t == 0.5 and np.abs(np.asarray(guided.heading).astype(int) - np.asarray(one)).max() <= 1


def test_closing_stops_the_work(pipeline: DiPPipeline) -> None:
    evaluations = []
    hook = pipeline.model.register_forward_hook(lambda *_: evaluations.append(1))
    views = watch(images_of(pipeline, 2000))
    next(views), next(views)
    views.close()
    hook.remove()
    assert 0 < len(evaluations) < 1900
    assert len(list(watch(images_of(pipeline, 2)))) >= 2  # and the model is free again


def test_closing_the_program_wakes_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_closing", threading.Event())
    hold, caught = threading.Event(), []

    def work(tell) -> None:
        tell(1)
        hold.wait()

    def wait() -> None:
        try:
            list(watched(work))
        except UserError as error:
            caught.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    engine.stop_all()
    waiting.join(30)
    hold.set()
    assert caught == ["the page has been closed"]


def test_what_the_work_raises_arrives() -> None:
    def work(tell) -> None:
        tell(1)
        raise UserError("no")

    news = watched(work)
    assert next(news) == 1
    with pytest.raises(UserError, match="no"):
        next(news)


def test_mistakes_become_messages() -> None:
    for mistake, text in (UserError("no <b> here"), "no &lt;b&gt; here"), (torch.OutOfMemoryError(), "fewer images"):

        @told_in_page
        def handler(mistake: Exception = mistake) -> None:
            raise mistake

        @told_in_page
        def generator(mistake: Exception = mistake) -> Iterator[int]:
            yield 1
            raise mistake

        with pytest.raises(gr.Error) as caught:
            handler()
        assert text in caught.value.message and caught.value.duration  # after which it leaves
        news = generator()
        assert next(news) == 1
        with pytest.raises(gr.Error):
            next(news)
    with pytest.raises(ZeroDivisionError):
        told_in_page(lambda: 1 / 0)()


def test_limits() -> None:
    limits = Limits(images=4, steps=10, side=64)
    settings, seeds = ImageSettings(seeds="0-3", steps=10, height=64.0).checked(limits)
    assert seeds == [0, 1, 2, 3] and isinstance(settings.height, int)
    for wrong, message in [
        ({"seeds": "0-4"}, "5 images, and 4 are the most"),
        ({"seeds": f"0-{10**15}"}, "are the most here"),  # answered without making the list
        ({"seeds": str(2**63)}, "a seed is at most"),
        ({"steps": 11}, "Steps: at most 10"),
        ({"steps": 0}, "Steps: input should be greater"),
        (SolutionControls.settings(1.0, 0.0, 1.0, 2.5, "euler", 1.0, 1), "Steps: .* fractional part, found 2.5"),
        (SolutionControls.settings(1.0, 0.0, 1.0, 2, "euler", None, 1), "Time shift: .* found None"),
        (SubjectControls.settings([], "0", 16.5, None), "Height: .* fractional part, found 16.5"),
        ({"height": 65}, "Height: at most 64"),
        ({"guidance_interval": (0.0, 1.5)}, "Guide from and until"),
        ({"solver": "rk4"}, "Solver"),
        ({"guidance": "much"}, "Guidance"),
    ]:
        with pytest.raises(UserError, match=message):
            ImageSettings(**{"seeds": "0", "steps": 2, **wrong}).checked(limits)


def test_controls_begin_within_the_limits(pipeline: DiPPipeline) -> None:
    limits = Limits(images=2, steps=1, side=12)
    settings = SamplingSettings(steps=300, guidance=40.0, solver="ddim")
    assert SolutionControls.values(settings, limits) == [15, 0.1, 1.0, 1, "euler", 1.0, 1]
    classes, *others = SubjectControls.updates(pipeline, limits)
    assert others == [8, 8] and classes["value"] == ["ant", "bee", "cow"]
    with gr.Blocks():
        assert solution_controls(limits).steps.value == 1 and subject_controls(limits).seeds.value == "0-1"


def test_a_picture_gives_back_its_settings(pipeline: DiPPipeline, tmp_path: Path) -> None:
    asked = ImageSettings(steps=3, solver="heun", guidance=1.5, guidance_interval=(0.0, 0.7), time_shift=2.0)
    asked.backbone_every = 2
    images = SampledImages(pipeline, asked, [4, 9], ["cow", "ant"], height=24, width=16, name="m")
    gallery = Gallery(tmp_path / "gallery")
    gallery.folder.rmdir()  # somebody tidied up while the page was served
    gallery.add(images, images.read(0, 2))
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(b"")
    (gallery.folder / "y.png").symlink_to(elsewhere)
    (gallery.folder / "x.png").mkdir()
    (gallery.folder / "z.png").symlink_to(tmp_path / "nowhere")
    newest, _ = gallery.newest()  # pictures that lie in the folder
    assert [read_note(file)["seed"] for file in newest] == [4, 9]
    restored = settings_from_note(read_note(newest[1]))
    assert (restored.seeds, restored.classes, restored.height, restored.width, restored.model) == (
        "9",
        ("ant",),
        24,
        16,
        "m",
    )
    assert restored.pipeline_arguments() == asked.pipeline_arguments()
    again = SampledImages(pipeline, restored, [9], restored.classes, height=24, width=16)
    pixels = again.read(0, 1)[0].astype(int)
    assert np.abs(pixels - np.asarray(Image.open(newest[1]))).max() <= 1  # a batch of one rounds differently


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@example({"guidance_scale": "0"})
@example({"seed": float("inf")})
@given(st.dictionaries(st.sampled_from(sorted(NOTE)), JSON))
def test_notes_of_strangers(changed: dict) -> None:
    try:
        restored = settings_from_note({**NOTE, **changed})
    except UserError:
        return
    assert restored.describe() and restored.pipeline_arguments()


def test_files_without_a_note(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "jpeg.png", "JPEG")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:30])
    (tmp_path / "empty.png").touch()
    for name, message in [
        ("plain", "does not say how it was made"),
        ("jpeg", "not a PNG file"),
        ("cut", "not a PNG file"),
        ("empty", "not a PNG file"),
        ("deleted", r"\(No such file or directory\)"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            read_note(tmp_path / f"{name}.png")
        assert str(tmp_path) not in str(caught.value)
    save_png(Image.new("RGB", (4, 4)), tmp_path / "list.png", [1, 2])
    with pytest.raises(UserError, match="not one of pixeldip's"):
        read_note(tmp_path / "list.png")


def test_only_offered_models_are_loaded(tmp_path: Path) -> None:
    inside, outside = saved_model(tmp_path / "models" / "a", 16), saved_model(tmp_path / "b", 16)
    models = Models((), [tmp_path / "models", tmp_path / "missing"], torch.device("cpu"), torch.float32)
    assert models.names() == [str(inside)]
    first = models.load(str(inside))
    assert models.load(str(inside)) is first
    first.save_pretrained(inside)
    assert models.load(str(inside)) is not first
    for name in (str(outside), f"{inside}/../../b", "owner/name", ""):
        with pytest.raises(UserError, match=r"not one of those offered|choose a model"):
            models.load(name)
    (inside / "model" / "config.json").write_text("{")
    damaged = Models((), [tmp_path / "models"], torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        damaged.load(str(inside))
    with pytest.raises(UserError, match="no such folder"):
        Models(("nowhere/at/all",), [], torch.device("cpu"), torch.float32)


def test_a_model_is_known_by_any_spelling_of_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved_model(tmp_path / "models" / "a", 16) / LOG).touch()
    monkeypatch.chdir(tmp_path)
    models = Models(("models/a/", "./models/a"), [tmp_path / "models"], torch.device("cpu"), torch.float32)
    assert models.names() == models.runs() == ["models/a/"]
    for spelling in ("models/a", "./models/a/", str(tmp_path / "models" / "a"), "models/../models/a"):
        assert models.offered(spelling) == "models/a/"
    for other in ("a", "models", "owner/name", "~nobody/a", "a\0b", "a" * 5000):
        assert models.offered(other) is None


def test_a_button_waits_for_its_model(tmp_path: Path) -> None:
    inside = saved_model(tmp_path / "models" / "a", 16)
    damaged = saved_model(tmp_path / "models" / "b", 16)
    (damaged / "model" / "config.json").write_text("{")
    models = Models((), [tmp_path / "models"], torch.device("cpu"), torch.float32)
    show = when_loaded(models, lambda pipeline: [pipeline.config.height], 1)
    for other, ready in ((str(inside), True), (str(damaged), False), (None, False)):
        (_, choice, button), (height, again, at_last) = show(str(inside), other)
        assert (choice["info"], button["interactive"], height) == ("loading …", False, 16)
        assert again["info"] == FOUND and at_last["interactive"] is ready
    *_, (_, choice, button) = show(str(damaged))
    assert "config.json: cannot be read" in choice["info"] and not button["interactive"]
    assert [update[-1]["interactive"] for update in show(None)] == [False]


def test_a_model_that_is_gone_is_no_longer_chosen(tmp_path: Path) -> None:
    kept, gone = (saved_model(tmp_path / "models" / name, 16) for name in "ab")
    models = Models((), [tmp_path / "models"], torch.device("cpu"), torch.float32)
    shutil.rmtree(gone)
    new = saved_model(tmp_path / "models" / "c", 16)
    for name in (str(kept), None):
        choice, _ = offered_again(models, name)
        assert choice["choices"] == [str(kept), str(new)] and "value" not in choice
    choice, button = offered_again(models, str(gone))
    assert choice["value"] is None and f"{gone}` is not here" in choice["info"] and not button["interactive"]


def test_a_long_gallery_tells_how_long_it_is(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "gallery")
    for i in range(SHOWN + 3):
        (gallery.folder / f"{i:03d}.png").touch()
    newest, count = gallery.newest()
    assert len(newest) == SHOWN and newest[0].name == f"{SHOWN + 2:03d}.png" and count == SHOWN + 3


def test_a_gallery_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Gallery(tmp_path / "file" / "gallery")


def test_shares_of_waves() -> None:
    columns = torch.arange(64.0)
    long, short = (torch.sin(2 * math.pi * columns / length).expand(1, 3, 64, 64) for length in (32, 4))
    assert coarse_share(long, 8) == pytest.approx(1) and coarse_share(short, 8) == pytest.approx(0, abs=1e-6)
    assert coarse_share(long + short, 8) == pytest.approx(0.5)
    noise = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert coarse_share(noise, 8) == pytest.approx(noise_share(64, 64, 8), rel=0.05)
    assert noise_share(64, 64, 8) == pytest.approx(
        math.pi / 8**2, rel=0.05
    )  # a disc of radius 1/P among all frequencies
    assert coarse_share(torch.full((1, 3, 16, 16), 2.0), 8) == 0


@pytest.mark.parametrize("head", [name for name in HEADS if name != "linear"])
@torch.no_grad()
def test_without_context_a_patch_knows_nothing_of_the_others(head: str) -> None:
    model = opened_up(DiP(**{**TINY_MODEL, "head_width": 16}, num_classes=3, head=head)).eval()
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[..., 8:] += 1
    t, y = torch.full((1,), 0.5), torch.tensor([1])
    with_context = [model(image, t, y)[..., :8] for image in (x, other)]
    with no_context(model):
        without = [model(image, t, y)[..., :8] for image in (x, other)]
        another_class = model(x, t, torch.tensor([2]))[..., :8]
    assert not torch.equal(*with_context) and torch.equal(*without) and torch.equal(without[0], another_class)
    assert torch.equal(model(x, t, y)[..., :8], with_context[0])  # the model is whole again


@pytest.mark.parametrize("placement", ["post", "intermediate", "hybrid"])
def test_contexts_are_compared_on_the_path_that_is_sampled(placement: str) -> None:
    torch.manual_seed(0)  # some initial weights make large values, and large roundings
    model = opened_up(DiP(**TINY_MODEL, num_classes=3, placement=placement))
    pipeline = DiPPipeline(model, height=16, width=16, class_names=["ant", "bee", "cow"])
    pipeline.set_progress_bar_config(disable=True)
    steps = []
    compare_contexts(pipeline, "bee", [3], steps.append)
    end = steps[-1].x + (1 - steps[-1].t) * steps[-1].velocity
    sampled = pipeline(
        ["bee"], seeds=[3], num_inference_steps=len(steps), guidance_scale=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(end, sampled, atol=1e-5, rtol=0)
    assert all((step.velocity - step.without_context).abs().max() > 1e-3 for step in steps)


def test_a_run_as_its_folder_shows_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000500").mkdir(parents=True)
    (run / "checkpoints" / "step-00000500" / "state.safetensors").write_bytes(bytes(2**21))
    save_recipe(tiny_recipe(run, "emoji", training={"steps": 1000, "batch_size": 4}), run / RECIPE)
    lines = [{"step": i, "loss": 1 / i, "images_per_second": 8.0} for i in range(1, 901)]
    events = [{"event": "evaluation", "step": 500, "metrics": {"kid_efficientnet": 0.25}, "floors": {}}]
    (run / LOG).write_text("\n".join(map(json.dumps, [*lines, *events])) + '\n{"step": 901, "lo')
    now = RunNow.read(run)
    assert "step 900 of 1,000" in now.line() and "0:50 left" in now.line()  # 100 steps of 4 images at 8 a second
    curve = now.curve("loss")
    assert len(curve) <= POINTS and curve["loss"].iloc[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert now.table()[0][0] == "500" and now.table()[0][2] == "2.0"
    assert now.measured().to_dict("records") == [{"step": 500, "kid_efficientnet": "0.25"}]
    os.utime(run / LOG, (0, 0))
    assert "nothing new for" in RunNow.read(run).line()
    (run / LOG).write_text(json.dumps({"step": 1000, "loss": 0.1, "images_per_second": 8.0}) + "\n")
    assert RunNow.read(run).line().endswith("done")
    (run / LOG).write_text("")
    assert "no step is logged yet" in RunNow.read(run).line() and len(RunNow.read(run).curve("loss")) == 0
