"""Recipes: every value counts, mistakes are named, the packaged ones train."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pixeldip import UserError
from pixeldip.recipe import AlignmentSection, FlowSection, load_recipe, parse_recipe
from pixeldip.run_folder import newest_checkpoint
from pixeldip.training import train
from pixeldip.training.preparation import check_recipe

from .conftest import QUIET, make_picture, saved_state, tiny_recipe


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """What three steps leave behind: three_steps(section, key, value) with one value of the recipe changed."""
    folder = tmp_path_factory.mktemp("three")
    for i in range(6):
        (folder / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        make_picture(i).save(folder / "pictures" / "ab"[i % 2] / f"{i}.png")

    def run(section: str = "data", key: str = "flip", value: object = False) -> dict[str, torch.Tensor]:
        out = folder / f"{section}-{key}-{value}"
        recipe = tiny_recipe(out, folder / "pictures", **{section: {key: value}})
        recipe.training.steps = 3
        train(recipe, QUIET)
        return saved_state(newest_checkpoint(out))

    return run


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("optimizer", "lr", 1e-2), ("optimizer", "betas", [0.5, 0.9]), ("optimizer", "betas", [0.9, 0.5])),
        *(("optimizer", "weight_decay", 0.5), ("optimizer", "gradient_clip", 1e-3), ("optimizer", "warmup_steps", 2)),
        ("optimizer", "cooldown_steps", 2),
        *(("flow", "time_mean", 1.0), ("flow", "time_std", 0.3), ("flow", "time_shift", 3.0)),
        *(("flow", "time_distribution", "uniform"), ("flow", "class_dropout", 0.9)),
        *(("training", "seed", 1), ("training", "batch_size", 6), ("data", "flip", True)),
    ],
)
def test_every_value_of_the_recipe_is_felt(
    section: str, key: str, value: object, three_steps: Callable[..., dict[str, torch.Tensor]]
) -> None:
    plain, changed = three_steps(), three_steps(section, key, value)
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


def test_without_a_clip_no_gradient_is_shortened(tmp_path: Path, picture_folder: Path) -> None:
    """Those of a network that predicts the image are longer than 1."""

    def left_behind(clip: float | None) -> dict[str, torch.Tensor]:
        sections = {"model": {"prediction": "image"}, "optimizer": {"gradient_clip": clip}, "training": {"steps": 3}}
        train(tiny_recipe(tmp_path / str(clip), picture_folder, **sections), QUIET)
        return saved_state(newest_checkpoint(tmp_path / str(clip)))

    plain, unreached, clipped = map(left_behind, (None, 1e9, 1.0))
    assert all(torch.equal(plain[name], unreached[name]) for name in plain)
    assert any(not torch.equal(plain[name], clipped[name]) for name in plain)


@pytest.mark.parametrize(
    "name", ["my-images", "demo", "demo-gpu", "emoji64", "imagenet256-dip-xl", "imagenet512-dip-xl32"]
)
def test_packaged_recipes_train_at_tiny_size(name: str, tmp_path: Path, picture_folder: Path) -> None:
    recipe = load_recipe(name)
    check_recipe(recipe, world_size=8 if name.startswith("imagenet") else 1)
    tiny = tiny_recipe(tmp_path / "run", picture_folder)
    recipe.out, recipe.model = tiny.out, tiny.model
    recipe.data.source, recipe.data.resolution, recipe.data.in_memory = tiny.data.source, tiny.data.resolution, True
    recipe.training.steps, recipe.training.batch_size, recipe.training.compile = 2, 4, False
    recipe.data.label_column = tiny.data.label_column
    recipe.training.device, recipe.preview.every = "cpu", 2
    recipe.preview.images, recipe.preview.steps = 4, 2
    if recipe.alignment.weight:
        from .test_alignment import save_encoder  # needs transformers

        recipe.alignment.encoder, recipe.alignment.block = str(save_encoder(tmp_path / "encoder")), 2
    assert train(recipe, QUIET).step == 2


def test_imagenet_recipes_hold_the_releases_settings() -> None:
    recipe = load_recipe("imagenet256-dip-xl")
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.optimizer.weight_decay) == (1e-4, (0.9, 0.999), 1e-3)
    assert (recipe.optimizer.warmup_steps, recipe.optimizer.gradient_clip, recipe.training.ema_decay) == (
        0,
        None,
        0.9999,
    )
    assert (recipe.flow, recipe.training.batch_size) == (FlowSection(time_distribution="logit_normal"), 256)
    assert recipe.alignment == AlignmentSection(weight=0.5, block=8, encoder="facebook/dinov2-base")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"dpeth": 3}}, "model.dpeth is not a key of a recipe; perhaps model.depth"),
        ({"modle": {}}, "modle is not a key of a recipe; perhaps model"),
        ({"training": {"steps": "seven"}}, "training.steps: .*integer.*'seven'"),
        ({"training": {"steps": 0}}, "training.steps: .*found 0"),
        ({"flow": {"class_dropout": 1.5}}, "flow.class_dropout"),
        ({"data": {"resolution": [64]}}, "data.resolution"),
        ({"data": {"resolution": [64, 0]}}, r"data\.resolution\.1: "),
        ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule"),
        ({"data": None}, "data"),
        ([1], "expected sections"),
    ],
)
def test_recipes_with_mistakes(values: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_recipe(values)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "processes", "message"),
    [
        ({"data": {"resolution": 60}, "model": {"patch_size": 8}}, 1, "60x60 pixels .* multiples of 8"),
        ({"preview": {"guidance_interval": [0.8, 0.2]}}, 1, "preview: "),
        ({"evaluation": {"guidance_interval": [0.8, 0.2]}}, 1, "evaluation: "),
        ({"preview": {"backbone_every": 2}, "model": {"head": "linear"}}, 1, "preview: backbone_every 2: no Patch"),
        ({"training": {"batch_size": 6}}, 4, "batch_size 6 cannot be split over 4 processes"),
        ({"training": {"batch_size": 6, "gradient_accumulation": 4}}, 1, "multiple of 4"),
        ({"model": {"preset": "dip-xxl/16"}}, 1, "no preset"),
        ({"model": {"hidden_size": 30, "num_heads": 4}}, 1, "multiple of"),
    ],
)
def test_recipes_that_cannot_work(values: dict, processes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_recipe(parse_recipe(values), processes)


def test_yaml_numbers_come_out_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("optimizer: {lr: 3e-4}\ndata: {resolution: [64, 96]}\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.optimizer.lr == 3e-4 and recipe.data.resolution == (64, 96)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "while parsing a flow node"),
        ("training:\n  steps: 5\n  seed: 1\n  steps: 7\n", "line 4: steps is given already in line 2; leave one out"),
        (
            "training: {seed: 1}\ndata: {flip: true}\ntraining: {steps: 7}\n",
            "line 3: training is given already in line 1",
        ),
        ("data: {flip: true, flip: false}\n", "line 1: flip is given already in line 1"),
    ],
)
def test_yaml_with_mistakes(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=f"r.yaml: not valid YAML: {message}"):
        load_recipe(str(tmp_path / "r.yaml"))
