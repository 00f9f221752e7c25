"""Alignment with an image encoder: its targets, its gradient, and runs that train with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.processes import Processes
from pixeldip.recipe import AlignmentSection, Recipe, parse_recipe, recipe_values, save_recipe
from pixeldip.run_folder import checkpoints, newest_checkpoint, read_metrics
from pixeldip.training import train
from pixeldip.training.alignment import AlignedDiP, Alignment, load_alignment
from pixeldip.training.checkpoint import load_checkpoint
from pixeldip.training.ema import EMA
from pixeldip.training.loss import training_loss

from .conftest import QUIET, TINY_MODEL, opened_up, saved_state, tiny_recipe

transformers = pytest.importorskip("transformers")

MEAN, STD = (0.1, 0.3, 0.6), (0.2, 0.4, 0.5)
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**LAYERS, "image_size": 28, "patch_size": 7}
TEXT = {**LAYERS, "vocab_size": 50}


def tiny_encoder(kind: str) -> nn.Module:
    """Random weights; where a kind knows dropout it would be felt, were it ever left on."""
    torch.manual_seed(0)
    t = transformers
    if kind == "dinov2":
        return t.Dinov2Model(t.Dinov2Config(**SIZES, hidden_dropout_prob=0.5))
    if kind == "dinov2 with registers":
        return t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3))
    if kind == "vit":
        return t.ViTModel(t.ViTConfig(**SIZES, intermediate_size=64, hidden_dropout_prob=0.5))
    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(vision_config=SIZES, text_config=TEXT))
    return t.SiglipModel(t.SiglipConfig(vision_config=SIZES, text_config=TEXT))


def save_encoder(folder: Path, kind: str = "dinov2", statistics: bool = False) -> Path:
    tiny_encoder(kind).save_pretrained(folder)
    if statistics:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def load(folder: Path, **settings) -> Alignment:
    section = AlignmentSection(encoder=str(folder), **settings)
    return load_alignment(section, TINY_MODEL["patch_size"], Processes(0, 1, torch.device("cpu")))


def aligned_recipe(out: Path, pictures: Path, encoder: Path | str, **sections: dict) -> Recipe:
    alignment = {"weight": 0.5, "block": 1, "encoder": str(encoder), "projector_width": 16}
    optimizer = {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant"}
    return tiny_recipe(out, pictures, **{"alignment": alignment, "optimizer": optimizer, **sections})


def images(height: int = 16, width: int = 24, batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def resized(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Images in [-1, 1] as Pillow resizes them, in [0, 1]."""
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in x.flatten(0, 1).numpy()
    ]
    return (torch.from_numpy(np.stack(planes)).unflatten(0, x.shape[:2]) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40)])
@pytest.mark.parametrize(
    ("kind", "others"), [("dinov2", 1), ("dinov2 with registers", 4), ("vit", 1), ("clip", 1), ("siglip", 0)]
)
def test_the_target_is_the_encoders_patch_tokens(
    kind: str, others: int, height: int, width: int, tmp_path: Path
) -> None:
    """As many as the model has patches, without the class and register tokens, however many there are."""
    alignment = load(save_encoder(tmp_path / "encoder", kind, statistics=True))
    x, rows, columns = images(height, width), height // 8, width // 8
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = (resized(x, 7 * rows, 7 * columns) - mean) / std
    reference = tiny_encoder(kind).eval()
    reference = getattr(reference, "vision_model", reference)
    interpolate = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = reference(pixel_values=pixels, **interpolate).last_hidden_state[:, others:]
    assert expected.shape == (3, rows * columns, 32)
    torch.testing.assert_close(alignment.target(x), expected, rtol=1e-4, atol=1e-4)


def test_without_statistics_imagenets_are_taken(encoder: Path, tmp_path: Path) -> None:
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    said = save_encoder(tmp_path / "said")
    (said / "preprocessor_config.json").write_text(json.dumps(imagenet))
    x = images()
    assert torch.equal(load(encoder).target(x), load(said).target(x))
    assert not torch.allclose(load(encoder).target(x), load(save_encoder(tmp_path / "c", statistics=True)).target(x))


def test_loss_is_one_minus_the_cosine(encoder: Path) -> None:
    alignment = load(encoder)
    target = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(alignment.loss(3 * target, target), torch.zeros(2))
    torch.testing.assert_close(alignment.loss(-target, target), torch.full((2,), 2.0))
    half = target.clone()
    half[0, :3] *= -1  # half of one image's patches opposite, the others equal
    torch.testing.assert_close(alignment.loss(half, target), torch.tensor([1.0, 0.0]))
    other = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    cosines = (other * target).sum(-1) / (other.norm(dim=-1) * target.norm(dim=-1))
    torch.testing.assert_close(alignment.loss(other, target), 1 - cosines.mean(1))


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels, noise and times."""
    x = images()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0, 1, 3]), noise, torch.tensor([0.2, 0.5, 0.9])


def aligned_model(encoder: Path, weight: float = 0.5) -> tuple[Alignment, AlignedDiP]:
    """Of three blocks, its gates open, aligned after the second."""
    alignment = load(encoder, weight=weight, block=2, projector_width=16)
    model = opened_up(DiP(**{**TINY_MODEL, "depth": 3}, num_classes=3))
    return alignment, AlignedDiP(model, alignment.section, alignment.width)


def test_what_is_minimised_is_the_weighted_sum(encoder: Path) -> None:
    """Of the flow's loss as without alignment, and the distance of the block's tokens to those of the clean images."""
    alignment, network = aligned_model(encoder, weight=0.3)
    tokens: list[torch.Tensor] = []
    network.model.backbone.blocks[1].register_forward_hook(lambda block, inputs, output: tokens.append(output))
    losses = training_loss(network, network.model.objective, alignment, *batch())
    distance = alignment.loss(network.projector(tokens[0]), alignment.target(batch()[0])).mean()
    torch.testing.assert_close(losses["alignment"], distance)
    torch.testing.assert_close(losses["loss"], losses["flow"] + 0.3 * distance)
    alone = training_loss(network.model, network.model.objective, None, *batch())
    assert alone.keys() == {"loss"}
    torch.testing.assert_close(losses["flow"], alone["loss"])


def test_the_gradient_ends_at_the_block(encoder: Path) -> None:
    """It reaches the projector and all that the block's tokens come from: no later block, no head, no encoder."""
    alignment, network = aligned_model(encoder)
    training_loss(network, network.model.objective, alignment, *batch())["alignment"].backward()
    before = ("model.backbone.patch", "model.backbone.time", "model.backbone.class", "projector.")
    before += ("model.backbone.blocks.0.", "model.backbone.blocks.1.")
    for name, parameter in network.named_parameters():
        reached = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert reached == name.startswith(before), name
    for name, parameter in alignment.encoder.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name


def test_a_run_comes_nearer_to_the_encoder(tmp_path: Path, picture_folder: Path, encoder: Path) -> None:
    training = {"steps": 40, "log_every": 10, "save_every": 40}
    train(aligned_recipe(tmp_path / "run", picture_folder, encoder, training=training), QUIET)
    entries = read_metrics(tmp_path / "run")
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["flow"] + 0.5 * entry["alignment"], rel=1e-5)
    assert entries[-1]["alignment"] < 0.9 * entries[0]["alignment"]


def test_alignment_changes_no_random_number_of_the_flow(tmp_path: Path, picture_folder: Path, encoder: Path) -> None:
    """The same first weights, noise, times and labels: the flow's first loss is that of a run without it."""
    once = {"steps": 1}
    train(aligned_recipe(tmp_path / "with", picture_folder, encoder, training=once), QUIET)
    train(tiny_recipe(tmp_path / "without", picture_folder, training=once), QUIET)
    (ours,), (plain,) = (read_metrics(tmp_path / run) for run in ("with", "without"))
    assert ours["flow"] == pytest.approx(plain["loss"], rel=1e-6)
    assert "flow" not in plain and "alignment" not in plain


def everything_saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = saved_state(checkpoint)
    ema = DiPPipeline.from_pretrained(str(checkpoint / "pipeline")).model.state_dict()
    return tensors | {f"ema.{name}": value for name, value in ema.items()}


def test_resumed_it_ends_bit_for_bit_the_same(tmp_path: Path, picture_folder: Path, encoder: Path) -> None:
    train(aligned_recipe(tmp_path / "straight", picture_folder, encoder), QUIET)
    for steps in (3, 6):
        train(aligned_recipe(tmp_path / "resumed", picture_folder, encoder, training={"steps": steps}), QUIET)
    straight, resumed = (everything_saved(newest_checkpoint(tmp_path / run)) for run in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name
    losses = [
        [(e["step"], e["loss"], e["alignment"]) for e in read_metrics(tmp_path / run)]
        for run in ("straight", "resumed")
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    # the projector and its part of the optimizer's state are in there, and move
    half = everything_saved(checkpoints(tmp_path / "straight")[0])
    projector = [name for name in straight if name.startswith("network.projector.")]
    assert len(projector) == 6 and not any(torch.equal(half[name], straight[name]) for name in projector)
    parameters = sum(name.startswith("network.model.") for name in straight) + 6
    assert sum(name.endswith(".exp_avg") for name in straight) == parameters


def test_the_encoder_is_in_no_file(tmp_path: Path, picture_folder: Path, encoder: Path) -> None:
    train(aligned_recipe(tmp_path / "with", picture_folder, encoder), QUIET)
    train(tiny_recipe(tmp_path / "without", picture_folder), QUIET)
    ours, plain = (newest_checkpoint(tmp_path / run) for run in ("with", "without"))
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (ours, plain)]
    assert names[0] == names[1]
    contents = b"".join(path.read_bytes() for path in ours.rglob("*") if path.is_file())
    projector = [tensor for name, tensor in saved_state(ours).items() if name.startswith("network.projector.")]
    assert projector and all(tensor.numpy().tobytes() in contents for tensor in projector)  # the search finds
    for name, tensor in load(encoder).encoder.state_dict().items():
        if tensor.dim() > 1 and tensor.any():
            assert tensor.numpy().tobytes() not in contents, name
    models = [DiPPipeline.from_pretrained(str(folder / "pipeline")).model for folder in (ours, plain)]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_a_checkpoint_without_a_projector_is_named(tmp_path: Path, encoder: Path, picture_folder: Path) -> None:
    train(tiny_recipe(tmp_path / "run", picture_folder), QUIET)
    with pytest.raises(UserError, match=r"alignment.weight = 0.0, and this one asks for 0.5"):
        train(aligned_recipe(tmp_path / "run", picture_folder, encoder, optimizer={}), QUIET)
    network = aligned_model(encoder)[1]
    optimizer = torch.optim.AdamW(network.parameters())
    with pytest.raises(UserError, match=r"cannot resume from this checkpoint \(it is of another network"):
        load_checkpoint(newest_checkpoint(tmp_path / "run"), network, EMA(network.model, 0.9), optimizer)


def test_compiled_it_trains_the_same(tmp_path: Path, picture_folder: Path, encoder: Path) -> None:
    """Each block one graph without a break, and what is saved has the names it always has."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    for name, compile in (("plain", False), ("compiled", True)):
        training = {"steps": 2, "compile": compile}
        model = {"depth": 2, "head": "linear", "head_width": None}
        train(aligned_recipe(tmp_path / name, picture_folder, encoder, training=training, model=model), QUIET)
    plain, ours = (read_metrics(tmp_path / name) for name in ("plain", "compiled"))
    for key in ("loss", "flow", "alignment"):
        assert [e[key] for e in ours] == pytest.approx([e[key] for e in plain], rel=1e-4), key
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    states = [saved_state(newest_checkpoint(tmp_path / name)) for name in ("plain", "compiled")]
    assert states[0].keys() == states[1].keys()


def test_two_processes_train_as_one(tmp_path: Path, picture_folder: Path, encoder: Path) -> None:
    alone = aligned_recipe(tmp_path / "one", picture_folder, encoder, training={"steps": 3})
    train(alone, QUIET)
    both = parse_recipe({**recipe_values(alone), "out": str(tmp_path / "two")})
    both.training.gradient_accumulation = 2
    save_recipe(both, tmp_path / "two.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launch += ["-m", "pixeldip.cli", "train", str(tmp_path / "two.yaml")]
    subprocess.run(launch, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    one, two = (read_metrics(tmp_path / run) for run in ("one", "two"))
    for key in ("loss", "flow", "alignment"):
        assert [e[key] for e in two] == pytest.approx([e[key] for e in one], rel=1e-5), key
    saved = [everything_saved(newest_checkpoint(tmp_path / run)) for run in ("one", "two")]
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def refused(recipe: Recipe) -> str:
    """The one line a run that cannot start ends with; it leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        train(recipe, QUIET)
    assert not Path(recipe.out).exists()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_block_the_model_does_not_have(tmp_path: Path, picture_folder: Path, encoder: Path) -> None:
    alignment = {"weight": 0.5, "block": 3, "encoder": str(encoder)}
    recipe = aligned_recipe(tmp_path / "run", picture_folder, encoder, alignment=alignment)
    assert refused(recipe) == "alignment.block 3: the model has 2 blocks"


def test_an_encoder_that_is_not_there(tmp_path: Path, picture_folder: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "nobody/nothing"):
        assert refused(aligned_recipe(tmp_path / "run", picture_folder, name)).startswith(f"alignment.encoder {name}: ")


@pytest.mark.parametrize("kind", ["Bert", "ResNet", "ConvNext", "Swin", "ViTMAE"])
def test_models_without_a_token_per_patch(kind: str, tmp_path: Path, picture_folder: Path) -> None:
    sizes = {
        "Bert": TEXT,
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4},
        "ConvNext": {"hidden_sizes": [8] * 4, "depths": [1] * 4},
        "Swin": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2},
        "ViTMAE": SIZES,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes[kind])
    folder = tmp_path / "encoder"
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    message = refused(aligned_recipe(tmp_path / "run", picture_folder, folder))
    assert message.startswith(f"alignment.encoder {folder}: ")


def test_a_damaged_encoder(tmp_path: Path, picture_folder: Path) -> None:
    weights = save_encoder(tmp_path / "encoder") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    message = refused(aligned_recipe(tmp_path / "run", picture_folder, tmp_path / "encoder"))
    assert message.startswith(f"alignment.encoder {tmp_path / 'encoder'}: ")
