"""Starting from trained weights, with all of them or with adapters."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.cli import main
from pixeldip.model import network_config
from pixeldip.recipe import ModelSection, Recipe, load_recipe, parse_recipe, recipe_values
from pixeldip.run_folder import newest_checkpoint, read_metrics
from pixeldip.training import train
from pixeldip.training.checkpoint import merged
from pixeldip.training.preparation import model_config
from pixeldip.training.pretrained import Start, resample, start_from

from .conftest import (
    QUIET,
    TINY_MODEL,
    assert_same_state,
    make_picture,
    newest_step,
    opened_up,
    saved_state,
    tiny_recipe,
)

CLASSES = ["bee", "cat", "ant"]


@pytest.fixture
def trained(tmp_path: Path) -> DiPPipeline:
    model = opened_up(DiP(**TINY_MODEL, num_classes=3), seed=5)
    pipeline = DiPPipeline(model, height=16, width=16, class_names=CLASSES)
    pipeline.save_pretrained(tmp_path / "trained")
    return pipeline


def recipe_from(tmp_path: Path, pictures: Path, **sections: dict) -> Recipe:
    model = {"pretrained": str(tmp_path / "trained"), **sections.pop("model", {})}
    recipe = tiny_recipe(tmp_path / "run", pictures, **sections)
    values = recipe_values(recipe)
    return parse_recipe({**values, "model": model})


def started(trained: DiPPipeline, class_names: list[str] = CLASSES, **changes) -> tuple[DiP, Start]:
    torch.manual_seed(0)
    model = DiP(**{**TINY_MODEL, "num_classes": len(class_names), **changes})
    return model, start_from("there", trained, model, class_names)


def velocity(model: DiP, size: int = 16, y: int = 0) -> torch.Tensor:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor([0.3, 0.8]), torch.tensor([y, y]))


def test_the_same_classes_keep_everything(trained: DiPPipeline) -> None:
    model, start = started(trained)
    assert torch.equal(velocity(model), velocity(trained.model))
    assert (
        start.new == start.resampled == start.classes_new == start.classes_left_out == []
        and start.classes_kept == CLASSES
    )
    assert len(start.kept) == len(model.state_dict())


def test_classes_go_by_name(trained: DiPPipeline) -> None:
    model, start = started(trained, ["ant", "bee", "cow", "dog"])
    table, old = model.backbone.class_embed.weight, trained.model.backbone.class_embed.weight
    assert torch.equal(table[0], old[2]) and torch.equal(table[1], old[0]) and torch.equal(table[-1], old[-1])
    for new in (2, 3):  # the null class, and what a class starts as: much less, and training tells them apart late
        assert 0.15 < (table[new] - old[-1]).std() < 0.4
    assert (start.classes_kept, start.classes_new) == (["ant", "bee"], ["cow", "dog"])
    assert start.sentences()[-1] == (
        "classes: ant, bee kept; new, from the null class: cow, dog; left out, since no image is of them: cat"
    )
    torch.testing.assert_close(velocity(model, y=4), velocity(trained.model, y=3))
    nameless = DiPPipeline(trained.model, height=16, width=16)
    by_id, _ = started(nameless, ["x", "y", "z"])
    assert torch.equal(by_id.backbone.class_embed.weight, old)
    by_number, _ = started(nameless, ["0", "2", "1"])
    assert torch.equal(by_number.backbone.class_embed.weight, old[[0, 2, 1, 3]])
    _, start = started(nameless, ["x", "y"])
    assert (start.classes_new, start.classes_left_out) == (["x", "y"], ["0", "1", "2"])
    _, start = started(trained, [])
    assert start.sentences()[-1] == "classes: none kept; left out, since no image is of them: bee, cat, ant"


def test_another_patch_size_reads_an_enlarged_image_alike(trained: DiPPipeline) -> None:
    model, start = started(trained, patch_size=16)
    assert start.resampled == ["backbone.patch_embed.weight"]
    assert all(
        "detailer.down.3" in name or "detailer.up.3" in name or "detailer.merge" in name or "bottleneck" in name
        for name in start.new
    )
    patch = torch.randn(3, 8, 8)
    enlarged = patch.repeat_interleave(2, -1).repeat_interleave(2, -2)
    tokens = (m.backbone.patch_embed(p.flatten()) for m, p in ((model, enlarged), (trained.model, patch)))
    torch.testing.assert_close(*tokens)


def test_resampled_layers_of_dit(trained: DiPPipeline) -> None:
    weight, bias = torch.randn(3 * 64, 5), torch.randn(3 * 64)
    token = torch.randn(5)
    small = (weight @ token + bias).view(3, 8, 8)
    large = (resample(weight, 8, 24, "written") @ token + resample(bias, 8, 24, "written")).view(3, 24, 24)
    torch.testing.assert_close(large, small.repeat_interleave(3, -1).repeat_interleave(3, -2))
    assert resample(weight, 8, 6, "written").shape == (3 * 36, 5)


def test_another_head_starts_from_scratch(trained: DiPPipeline) -> None:
    _, start = started(trained, head="linear", head_width=None)
    assert {name for name in start.new} == {
        "context.modulation.weight",
        "context.modulation.bias",
        "detailer.out.weight",
        "detailer.out.bias",
    }
    config = model_config(ModelSection(head="linear"), 3, network_config(trained.model.config))
    assert config["hidden_size"] == 32 and DiP(**config).config.head_width is None  # eight was the other head's
    _, start = started(trained, placement="hybrid")
    assert all(name.startswith(("detailer.", "injection.")) for name in start.new)


def test_another_depth(trained: DiPPipeline) -> None:
    model, start = started(trained, depth=1)
    assert torch.equal(model.backbone.blocks[0].mlp.up.weight, trained.model.backbone.blocks[0].mlp.up.weight)
    assert (start.cut_off, start.new) == (["backbone.blocks.1"], [])
    assert "cut off, for a smaller depth: backbone.blocks.1" in start.sentences()
    _, start = started(trained, depth=3)
    assert start.cut_off == [] and all(name.startswith("backbone.blocks.2.") for name in start.new)


def test_a_run_goes_on_from_a_model(trained: DiPPipeline, tmp_path: Path, picture_folder: Path, capsys) -> None:
    recipe = recipe_from(tmp_path, picture_folder, data={"resolution": 24})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "start.json").write_text('{"pretrained": "a start that came to nothing"}')
    train(recipe, Console(soft_wrap=True))
    said = capsys.readouterr().out
    assert f"tensors kept from {tmp_path / 'trained'}" in said
    record = json.loads((tmp_path / "run" / "start.json").read_text())
    assert (record["classes_kept"], record["classes_new"], record["new"]) == (["ant", "bee"], [], [])
    pipeline = DiPPipeline.from_pretrained(tmp_path / "run")
    assert (pipeline.config.height, pipeline.config.class_names) == (24, ["ant", "bee"])
    # the first step's loss is the trained model's, not a fresh one's
    fresh = tiny_recipe(tmp_path / "fresh", picture_folder, data={"resolution": 24})
    train(fresh, QUIET)
    first = [read_metrics(tmp_path / name)[0]["loss"] for name in ("run", "fresh")]
    assert abs(first[0] - first[1]) > 0.01


@pytest.mark.parametrize("model", [{}, {"lora_rank": 2}])
def test_resumed_without_the_folder_it_came_from(
    model: dict, trained: DiPPipeline, tmp_path: Path, picture_folder: Path
) -> None:
    (picture_folder / "dog").mkdir()
    make_picture(7).save(picture_folder / "dog" / "0.png")
    recipe = recipe_from(tmp_path, picture_folder, model=model)
    recipe.optimizer.schedule = "constant"
    train(recipe, QUIET)
    recipe.out, recipe.training.steps = str(tmp_path / "again"), 4
    train(recipe, QUIET)
    (tmp_path / "trained").rename(tmp_path / "gone")
    recipe.training.steps = 6
    train(recipe, QUIET)
    assert newest_step(tmp_path / "again") == 6
    assert_same_state(tmp_path / "run", tmp_path / "again")


def test_adapters_alone_are_trained(trained: DiPPipeline, tmp_path: Path, picture_folder: Path, capsys) -> None:
    recipe = recipe_from(tmp_path, picture_folder, model={"lora_rank": 4, "lora_alpha": 8.0})
    recipe.optimizer.lr, recipe.optimizer.warmup_steps = 1e-2, 0
    train(recipe, Console(soft_wrap=True))
    assert "LoRA: " in capsys.readouterr().out
    checkpoint = newest_checkpoint(tmp_path / "run")
    weights = load_file(checkpoint / "lora" / "pytorch_lora_weights.safetensors")
    layers = {name.rpartition(".lora_")[0] for name in weights}
    assert len(layers) == 2 * 6 and all(name.startswith("backbone.blocks.") for name in layers)
    # the folder holds the base with the adapters added in; the base and its adapters make the same images
    settings = {"class_labels": ["bee"], "num_inference_steps": 2, "guidance_scale": 2.0, "solver": "heun"}
    settings["output_type"] = "latent"
    sampled = DiPPipeline.from_pretrained(tmp_path / "run")(**settings).images
    base = DiPPipeline.from_pretrained(tmp_path / "trained")
    before = base(**settings).images
    with pytest.raises(UserError, match=f"a run's folder; LoRA weights of its newest checkpoint are {checkpoint}/lora"):
        base.load_lora_weights(checkpoint.parents[1])
    base.load_lora_weights(checkpoint / "lora")
    torch.testing.assert_close(base(**settings).images, sampled, rtol=1e-3, atol=1e-3)
    assert (sampled - before).abs().max() > 0.01
    again = DiPPipeline.from_pretrained(tmp_path / "run")
    again.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert (
        f"\n- Started from the trained weights of {tmp_path / 'trained'}, with adapters (LoRA) of rank 4 added" in card
    )
    own, theirs = (m.state_dict() for m in (again.model, trained.model))
    for name in own:
        changed = not torch.equal(own[name], theirs[name]) and name != "backbone.class_embed.weight"
        assert changed == any(name == f"{layer}.weight" for layer in layers), name
    for layer in layers:
        added = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"] * 8 / 4  # alpha / rank
        torch.testing.assert_close(own[f"{layer}.weight"] - theirs[f"{layer}.weight"], added, rtol=1e-3, atol=1e-5)


def test_new_classes_are_trained_beside_adapters(trained: DiPPipeline, tmp_path: Path) -> None:
    recipe = recipe_from(tmp_path, "emoji", model={"lora_rank": 2})
    recipe.optimizer.lr, recipe.optimizer.warmup_steps = 1e-2, 0
    train(recipe, QUIET)
    state = saved_state(newest_checkpoint(tmp_path / "run"))
    assert sum(name.endswith(".exp_avg") for name in state) == 2 * 2 * 6 + 1
    assert DiPPipeline.from_pretrained(tmp_path / "run").config.class_names[0] == "red heart"


def test_merging_leaves_the_original_alone(trained: DiPPipeline) -> None:
    peft = pytest.importorskip("peft")
    model = trained.model
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    before, names = velocity(model), list(model.state_dict())
    torch.testing.assert_close(velocity(merged(model)), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(velocity(model), before) and list(model.state_dict()) == names
    assert not any("lora" in name for name in merged(model).state_dict())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"pretrained": "nowhere"}, "model.pretrained: nowhere: no such folder here, and not a hub id"),
        ({"pretrained": "no.ckpt"}, "model.pretrained: no.ckpt: no such file"),
        ({"pretrained": "some/hub-id"}, "model.pretrained: some/hub-id: no such folder here, and from the hub"),
        ({"preset": "dip-s/16"}, "give one of them"),
        ({"prediction": "noise"}, "predicts the velocity"),
        ({"patch_size": 7}, "multiples of 7"),
        ({"hidden_size": 64}, "nothing of its blocks fits .hidden_size 32 there, 64 here"),
        ({"pretrained": None, "lora_rank": 2}, "adapters need a trained model"),
        ({"lora_alpha": 2.0}, "there are no adapters without a rank"),
        ({"lora_rank": 2, "depth": 3}, "only adapters would be trained, and backbone.blocks.2.*would stay as init"),
    ],
)
def test_refused(model: dict, message: str, trained: DiPPipeline, tmp_path: Path, picture_folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(recipe_from(tmp_path, picture_folder, model=model), QUIET)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_flags_that_name_a_network_replace_the_recipes(trained: DiPPipeline, tmp_path: Path, picture_folder) -> None:
    flags = "--data.resolution 16 --training.steps 1 --training.batch-size 2 --preview.every 0 --training.device cpu"
    where = ["--data.source", str(picture_folder), "--out", str(tmp_path / "run")]
    assert main(["train", f"--model.pretrained={tmp_path / 'trained'}", *where, *flags.split()]) == 0
    assert DiPPipeline.from_pretrained(tmp_path / "run").model.config.hidden_size == 32
    record = json.loads((tmp_path / "run" / "start.json").read_text())
    assert (record["new"], record["trained_at"]) == ([], [16, 16])
    pytest.importorskip("peft")
    values = {"model": {"pretrained": "elsewhere", "lora_rank": 2, "hidden_size": 64}}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(values))
    where = ["--data.source", str(picture_folder), "--out", str(tmp_path / "adapted")]
    named = f"--model.pretrained={tmp_path / 'trained'}"
    assert main(["train", str(tmp_path / "lora.yaml"), named, "--model.preset", "None", *where, *flags.split()]) == 0
    assert (load_recipe(str(tmp_path / "adapted" / "recipe.yaml"))).model.lora_rank == 2
    assert (tmp_path / "adapted" / "checkpoints" / "step-00000001" / "lora").is_dir()


def test_from_an_authors_checkpoint(tmp_path: Path, picture_folder: Path) -> None:
    from .test_official import tensors

    torch.save({"state_dict": {f"ema_denoiser.{k}": v for k, v in tensors().items()}}, tmp_path / "release.ckpt")
    recipe = recipe_from(tmp_path, picture_folder, model={"pretrained": str(tmp_path / "release.ckpt")})
    recipe.data.resolution = 32
    train(recipe, QUIET)
    record = json.loads((tmp_path / "run" / "start.json").read_text())
    assert record["new"] == [] and record["classes_new"] == ["ant", "bee"] and len(record["kept"]) > 40
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).model.pretrained.endswith("release.ckpt")
