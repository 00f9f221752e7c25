"""Studies: their contenders, what they measure, and whole ones at tiny size."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixeldip import DiP
from pixeldip.arguments import StudyArguments
from pixeldip.cli import main
from pixeldip.images import from_uint8, psnr
from pixeldip.recipe import load_recipe, save_recipe
from pixeldip.studies import STUDIES, measures
from pixeldip.studies.comparison import base_recipe, chosen_contenders
from pixeldip.studies.comparison_report import Measure, difference, in_order, paper_table, student_t
from pixeldip.studies.comparisons import COMPARISONS
from pixeldip.studies.features import block_features, chosen_rows, probe_accuracy, silhouette
from pixeldip.studies.measures import TIMES, measure_costs, validation_losses
from pixeldip.studies.study import changed, contender_recipe
from pixeldip.training.preparation import check_recipe, model_config

from .conftest import TINY_MODEL, make_picture, opened_up, tiny_study_recipe

CPU = torch.device("cpu")


def study(*arguments: object) -> int:
    return main(["study", *map(str, arguments), "--device", "cpu"])


class StillImages:
    """Seventy pictures in memory: more than one batch."""

    def __init__(self) -> None:
        self.pixels = np.stack([np.asarray(make_picture(i, 16, 16)) for i in range(70)])
        self.labels = np.arange(70) % 2

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.pixels[start:stop]


@pytest.fixture
def held_out_folder(tmp_path: Path) -> Path:
    """Other pictures of the classes of `picture_folder`."""
    for k, name in enumerate(("ant", "bee")):
        (tmp_path / "held-out" / name).mkdir(parents=True)
        for i in range(6):
            make_picture(100 + 10 * k + i).save(tmp_path / "held-out" / name / f"{i}.png")
    return tmp_path / "held-out"


@pytest.fixture
def still() -> StillImages:
    return StillImages()


def test_help_names_every_study(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        study("--help")
    assert set(STUDIES) <= set(re.findall(r"[\w-]+", capsys.readouterr().out))


@pytest.mark.parametrize("scale", ["laptop", "gpu", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_contender_is_a_network_that_fits_its_images(name: str, scale: str) -> None:
    base = load_recipe(f"{'overfit' if name == 'overfit' else 'study'}-{scale}")
    contenders = STUDIES[name].contenders(scale)
    assert len({c.name for c in contenders}) == len({c.label for c in contenders}) == len(contenders)
    for contender in contenders:
        recipe = contender_recipe(base, contender, 0, "runs/x")
        recipe.data.source = "emoji"
        check_recipe(recipe, world_size=8 if scale == "paper" else 1)
        with torch.device("meta"):
            model = DiP(**model_config(recipe.model, 1000))
            size = recipe.data.resolution
            x, t, y = torch.zeros(1, 3, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
            assert model(x, t, y).shape == x.shape


def test_the_wide_head_is_all_that_its_recipe_changes() -> None:
    wide, usual = load_recipe("study-laptop-wide-head"), load_recipe("study-laptop")
    assert wide.model.head_width == 2 * usual.model.head_width
    assert changed(wide, "model", {"head_width": usual.model.head_width}) == usual


def test_what_is_asked_for_reaches_every_training() -> None:
    asked = StudyArguments("placement", data="mine", split="dev", reference="real.npz", contenders=("dit",))
    asked = dataclasses.replace(asked, steps=7, images=9, device="cpu")
    study = COMPARISONS[asked.name]
    (contender,) = chosen_contenders(study, asked)
    recipe = contender_recipe(base_recipe(study, asked), contender, 5, "runs/x")
    assert (recipe.data.source, recipe.data.split, recipe.evaluation.reference) == ("mine", "dev", "real.npz")
    assert (recipe.training.steps, recipe.training.device, recipe.training.seed) == (7, "cpu", 5)
    assert (recipe.evaluation.images, recipe.out, recipe.model.head) == (9, "runs/x", "linear")


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    """Is what all contenders train, data included; what a study compares is not in it."""
    mine = load_recipe("study-laptop")
    mine.model = dataclasses.replace(mine.model, hidden_size=96, head_width=7, head_depth=2, placement="hybrid")
    mine.data = dataclasses.replace(mine.data, source="mine", split="all")
    save_recipe(mine, tmp_path / "mine.yaml")
    asked = StudyArguments("heads", recipe=str(tmp_path / "mine.yaml"))
    base = base_recipe(COMPARISONS["heads"], asked)
    assert (base.data.source, base.data.split) == ("mine", "all")
    sizes = {c.name: contender_recipe(base, c, 0, "x").model for c in COMPARISONS["heads"].contenders("laptop")}
    assert {model.hidden_size for model in sizes.values()} == {96}
    assert {model.placement for model in sizes.values()} == {None}
    widths = {name: (model.head_width, model.head_depth) for name, model in sizes.items()}
    others = {"coordinate-mlp": (32, None), "attention": (32, 2), "dit": (None, None), "mlp": (None, None)}
    assert widths == {"unet": (7, 2), **others}
    # a study's own resolution is of the scale's recipe
    asked = dataclasses.replace(asked, name="patch-size", scale="paper")
    assert base_recipe(COMPARISONS["patch-size"], asked).data.resolution == 32
    assert base_recipe(COMPARISONS["patch-size"], dataclasses.replace(asked, recipe="")).data.resolution == 512


@pytest.mark.parametrize(("name", "counts"), [("scaling", [629, 772, 776, 1116, 632]), ("placement", [629, 632, 0, 0])])
def test_paper_scale_has_the_papers_sizes(name: str, counts: list[int]) -> None:
    base = load_recipe("study-paper")
    for contender, count in zip(COMPARISONS[name].contenders("paper"), counts, strict=True):
        with torch.device("meta"):
            model = DiP(**model_config(contender_recipe(base, contender, 0, "x").model, 1000))
        assert count in (0, round(model.num_parameters() / 1e6))


def test_validation_loss_is_eq_5_at_fixed_times(still: StillImages) -> None:
    """A network whose output is 0 has the mean square of x - eps: that of x, and 1 for the noise."""
    model = DiP(**TINY_MODEL, num_classes=2)
    torch.nn.init.zeros_(model.detailer.out.weight)
    losses = validation_losses(model, still, CPU, torch.float32)
    assert list(map(float, losses)) == pytest.approx(TIMES)
    x = from_uint8(torch.from_numpy(still.pixels))
    for value in losses.values():
        assert value == pytest.approx(x.square().mean().item() + 1, rel=0.05)
    model = opened_up(DiP(**TINY_MODEL, num_classes=2))
    again = [validation_losses(model, still, CPU, torch.float32) for _ in range(2)]
    assert again[0] == again[1] and len(set(again[0].values())) == len(TIMES)
    still.labels = 1 - still.labels
    swapped = validation_losses(model, still, CPU, torch.float32)
    assert all(swapped[t] != loss for t, loss in again[0].items())


def test_validation_images_are_of_all_classes(still: StillImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder holds one class after the other."""
    monkeypatch.setattr(measures, "VALIDATION_IMAGES", 8)
    still.labels = np.sort(still.labels)
    still.pixels[still.labels == 1] = 255
    model = DiP(**TINY_MODEL, num_classes=2)
    torch.nn.init.zeros_(model.detailer.out.weight)
    losses = validation_losses(model, still, CPU, torch.float32)
    half = from_uint8(torch.from_numpy(still.pixels[still.labels == 0])).square().mean().item()
    assert losses[f"{TIMES[5]:g}"] == pytest.approx((half + 1) / 2 + 1, rel=0.1)


def test_costs_are_the_models_own() -> None:
    base = load_recipe("study-laptop")
    recipes = {c.name: contender_recipe(base, c, 0, "x") for c in COMPARISONS["heads"].contenders("laptop")}
    costs = measure_costs({name: recipes[name] for name in ("unet", "dit")}, 10, CPU)
    models = {name: DiP(**model_config(recipes[name].model, 10)) for name in costs}
    for name, cost in costs.items():
        assert cost["parameters"] == models[name].num_parameters() and cost["latency"] > 0
    # of DiT-only, the matrix products by hand: 16 tokens of an image at 32 px, P = 8, D = 288, 4 blocks
    tokens, d, inner = 16, 288, int(2 * 4 * 288 / 3)
    block = tokens * (4 * d * d + 3 * d * inner) + 2 * tokens * tokens * d + 6 * d * d
    once = 256 * d + d * d + 2 * d * d + 2 * tokens * 192 * d  # time, final modulation, patches in and out
    assert costs["dit"]["flops"] == pytest.approx(2 * (4 * block + once), rel=0.01)
    assert costs["unet"]["flops"] > costs["dit"]["flops"]


def test_features_of_an_image_do_not_depend_on_its_neighbours(still: StillImages) -> None:
    model = opened_up(DiP(**TINY_MODEL, num_classes=2))
    images = torch.from_numpy(still.pixels).permute(0, 3, 1, 2)
    whole, part = (block_features(model, images[:n], [1, 2], CPU, torch.float32) for n in (70, 5))
    assert whole[1].shape == whole[2].shape == (70, 32) and not np.allclose(whole[1], whole[2])
    for block in (1, 2):
        np.testing.assert_allclose(whole[block][:5], part[block], atol=1e-5)


def test_probe_and_silhouette_know_clusters_from_noise() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    centres = 6 * np.eye(20)[:3]
    clusters, noise = centres[labels] + rng.standard_normal((300, 20)), rng.standard_normal((300, 20))
    assert probe_accuracy(clusters[:200], labels[:200], clusters[200:], labels[200:]) > 0.95
    assert probe_accuracy(noise[:200], labels[:200], noise[200:], labels[200:]) < 0.5
    assert silhouette(clusters, labels) > 0.4 > 0.1 > abs(silhouette(noise, labels))
    assert chosen_rows(np.array([2, 0, 2, 2, 0]), 2).tolist() == [0, 1, 2, 4]


def test_psnr() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * math.log10(5)) and psnr(grey, grey) == math.inf


def test_what_counts_as_different() -> None:
    mean, error, apart = difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.6])  # alike from seed to seed
    assert (mean, error, apart) == (pytest.approx(-1.6 / 3), pytest.approx(0.1 / 3), True)
    assert difference([1.0, 2.0, 3.0], [2.0, 1.5, 3.1])[2] is False
    assert difference([1.0, 2.0], [2.0, 3.2])[2] is False  # 11 standard errors are few, of two seeds
    mean, error, apart = difference([1.0], [2.0])
    assert mean == -1 and math.isnan(error) and apart is False


def test_student_t() -> None:
    t = pytest.importorskip("scipy.stats").t
    assert [student_t(seeds) for seeds in range(2, 12)] == pytest.approx(t.ppf(0.975, range(1, 11)), abs=6e-4)
    assert student_t(100) == student_t(11)


def test_the_papers_numbers_are_of_the_papers_sizes() -> None:
    study = COMPARISONS["scaling"]
    table = paper_table(study, study.contenders("laptop")[:2])
    assert [row[:2] for row in table[1:]] == [["DiT-only", "629M"], ["DiT-only, 32 layers", "772M"]]
    placement = COMPARISONS["placement"]
    labels = [row[0] for row in paper_table(placement, placement.contenders("laptop"))]
    assert labels == ["", "DiT-only", "Post-hoc refinement"]  # of the others it gives no numbers


def test_real_images_score_otherwise_at_other_patch_sizes() -> None:
    borders = Measure("boundary", "patch boundary ratio", 1, 2, "as real", (0.848, 0.912, 0.954))
    assert borders.floor == "0.85 to 0.95"
    assert dataclasses.replace(borders, floors=(0.951, 0.954)).floor == "0.95"
    assert dataclasses.replace(borders, floors=()).floor == ""


def test_metrics_stand_as_they_were_asked_for() -> None:
    """The first decides what a sweep calls best, also where it is not defined for the first setting."""
    assert in_order([{"boundary": 1.0}, {"nearest": 2.0, "boundary": 1.0}]) == ["nearest", "boundary"]


def test_a_comparison_and_what_it_keeps(
    picture_folder: Path, held_out_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One seed and two contenders, then all: the first runs stay as they are, and the report speaks of all."""
    recipe = tiny_study_recipe(tmp_path / "study-tiny.yaml")
    arguments = ["placement", "--recipe", recipe, "--out", tmp_path, "--steps", 1, "--images", 10]
    arguments += ["--data", picture_folder, "--held-out", held_out_folder, "--held-out-split", "train"]
    assert study(*arguments, "--seeds", 1, "--contenders", "dit", "hybrid") == 0
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert len(first) == 2
    assert "Intermediate" not in (tmp_path / "report.md").read_text()
    assert "nothing can be said" in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    assert study(*arguments, "--seeds", 2) == 0
    assert "run 2 of 8" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in first} == first

    def result_of(name: str, seed: int) -> dict:
        return json.loads((tmp_path / "runs" / f"{name}-seed{seed}" / "result.json").read_text())

    result = result_of("hybrid", 1)
    assert (result["contender"], result["seed"], result["recipe"]["training"]["seed"]) == ("hybrid", 1, 1)
    assert {"kid_efficientnet", "fd_mid_efficientnet", "boundary"} <= result["metrics"].keys()
    assert result["environment"]["torch"] == torch.__version__ and result["command"]
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        for label in ("DiT-only", "Post-hoc refinement", "Intermediate injection", "Hybrid injection", "real images"):
            assert label in text
        pairs = [line for line in text.splitlines() if "Post-hoc refinement − " in line or "DiT-only − " in line]
        assert len(pairs) == 5 and "nothing can be said" not in text
        values = {name: [result_of(name, seed)["validation_loss"] for seed in (0, 1)] for name in ("dit", "post")}
        mean, error, _ = difference(values["dit"], values["post"])
        assert f"{mean:.4f} ± {error:.4f}".replace("-", "−") in pairs[0]
    assert text.count("data:image/png;base64,") == 4 and text.count("<svg") == 2
    for file in ("measures.svg", "loss-by-time.svg", "samples-dit.png", "samples-hybrid.png"):
        assert f"figures/{file}" in (tmp_path / "report.md").read_text() and (tmp_path / "figures" / file).is_file()
    # a smaller report does not take the place of the larger one
    report = (tmp_path / "report.html").read_bytes()
    assert study(*arguments, "--seeds", 2, "--contenders", "dit", "post", "intermediate") == 2
    assert "would lose hybrid-seed0, hybrid-seed1: ask for these, too" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_bytes() == report
    # what a run has lost is made again from what it still has; what is damaged is named
    picture = tmp_path / "runs" / "dit-seed0" / "samples.png"
    samples = picture.read_bytes()
    picture.write_bytes(samples[:99])
    assert study(*arguments, "--seeds", 2) == 2
    assert f"{picture}: damaged" in capsys.readouterr().err
    picture.unlink()
    assert study(*arguments, "--seeds", 2) == 0 and picture.read_bytes() == samples
    # a metric that is not defined for some samples, such as borders in pictures of one grey, is a dash
    undefined = tmp_path / "runs" / "dit-seed0" / "result.json"
    values = json.loads(undefined.read_text())
    del values["metrics"]["boundary"], values["floors"]["boundary"], values["labels"]["boundary"]
    undefined.write_text(json.dumps(values))
    assert study(*arguments, "--seeds", 2) == 0
    dashes = [line.split(" | ")[0] for line in (tmp_path / "report.md").read_text().splitlines() if "| – |" in line]
    assert len(dashes) == 4 and all(name.startswith("| DiT-only") for name in dashes)
    assert "Patch boundary ratio" in (tmp_path / "report.md").read_text()
    result = tmp_path / "runs" / "post-seed1" / "result.json"
    result.write_text("{}")
    assert study(*arguments, "--seeds", 2) == 2
    assert f"{result}: not a study's file; delete it, and the same command" in capsys.readouterr().err
    # another study of the same folder would mix two things
    assert study(*arguments, "--steps", 2) == 2
    assert "holds a study with another recipe.training.steps (1, now 2): give the same" in capsys.readouterr().err
    assert study("heads", "--out", tmp_path) == 2
    assert "holds a study with another study (placement, now heads)" in capsys.readouterr().err
    make_picture(99).save(picture_folder / "ant" / "0.png")  # another image of the same name
    assert study(*arguments, "--seeds", 2) == 2
    assert "holds a study with another contents.training (sha256:" in capsys.readouterr().err


def test_overfitting_any_photograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_picture(3, 300, 200).save(tmp_path / "test.jpg")  # a name that would tell a split
    out = tmp_path / "study"
    arguments = ("overfit", "--image", tmp_path / "test.jpg", "--steps", 2, "--out", out)
    assert study(*arguments, "--resolution", 100) == 2  # no multiple of the patch size: the folder is not taken
    assert study(*arguments, "--resolution", 64) == 0
    for contender in ("dit", "dip"):
        result = json.loads((out / "runs" / contender / "result.json").read_text())
        assert list(result["psnr"]) == ["2"] and 3 < result["psnr"]["2"] < 20
        assert Image.open(out / "runs" / contender / "reconstruction.png").size == (64, 64)
    assert {path.name for path in (out / "figures").iterdir()} == {
        *("dit-only.png", "dit-only-zoom.png", "dip.png", "dip-zoom.png"),
        *("the-photograph.png", "the-photograph-zoom.png", "over-time.png", "psnr.svg"),
    }
    assert Image.open(out / "figures" / "over-time.png").size == (128, 260)  # one step, two networks
    assert "test.jpg" in (page := (out / "report.html").read_text()) and "PSNR after 2 steps" in page
    # what a run has lost is made again from what it still has, or its folder is named
    (out / "runs" / "dip" / "reconstruction.png").unlink()
    assert study(*arguments, "--resolution", 64) == 0 and (out / "runs" / "dip" / "reconstruction.png").is_file()
    shutil.rmtree(out / "runs" / "dit" / "previews")
    assert study(*arguments, "--resolution", 64) == 2
    assert f"{out / 'runs' / 'dit'}: previews are missing; delete the folder" in capsys.readouterr().err


def test_features_of_the_bundled_pictures(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert study("features", "--out", tmp_path, "--steps", 1, "--seeds", 1) == 0
    result = json.loads((tmp_path / "runs" / "post-seed0" / "result.json").read_text())
    assert (result["probe_images"], result["test_images"], result["clustered_images"]) == (40, 10, 50)
    assert result["chance"] == pytest.approx(0.1)
    assert result["features"].keys() == {"probe_middle", "probe_last", "silhouette_middle", "silhouette_last"}
    text = (tmp_path / "report.html").read_text()
    assert "pixels themselves" in text and "some class has only one held-out image" in text and "<svg" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["haeds"], "no study 'haeds'; perhaps heads"),
        (["heads", "--seeds", "0"], "--seeds"),
        (["heads", "--images", "3"], "--images"),
        (["heads", "--contenders", "unet", "dti"], "--contenders dti: the heads study has unet, coordinate-mlp"),
        (["heads", "--reference", "no.npz"], "no.npz: no such file"),
        (["heads", "--data", "nowhere"], "study: --data nowhere: no such folder"),
        (["heads", "--scale", "paper"], "--data is missing: name the training images"),
        (["heads", "--data", "{pictures}"], "name images that are not trained on, --held-out"),
        (["heads", "--data", "{pictures}", "--held-out", "emoji"], "they must be the same"),
        (
            ["heads", "--data", "{pictures}", "--held-out-split", "train"],
            "12 of 12 are training images, too; {pictures}",
        ),
        (
            ["features", "--data", "{plain}", "--held-out", "{plain}", "--held-out-split", "train"],
            "at least two classes",
        ),
        (["heads", "--resolution", "64"], "--resolution means nothing to the heads study"),
        (["heads", "--recipe", "mine"], "'mine' is neither a .yaml file nor one of the recipes"),
        (["patch-size", "--recipe", "{small}"], "dip-p16: its patches are as large as the images, 16x16"),
        (["heads", "--recipe", "{tuning}"], "tuning.yaml: contenders start from the beginning; leave model.pretrained"),
        (["overfit", "--recipe", "x"], "--recipe means nothing to the overfit study"),
        (["overfit", "--held-out", "x"], "--held-out means nothing to the overfit study"),
        (["features", "--images", "9"], "--images means nothing to the features study"),
        (["overfit", "--image", "no.jpg"], "--image no.jpg: No such file"),
        (["overfit", "--image", "{broken}"], "broken.jpg"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    picture_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "tuning.yaml").write_text("model: {pretrained: models/mine}")
    places = {"pictures": picture_folder, "plain": picture_folder / "ant", "broken": tmp_path / "broken.jpg"}
    places["tuning"] = tmp_path / "tuning.yaml"
    (tmp_path / "small.yaml").write_text("data: {source: emoji, resolution: 16}")
    places["small"] = tmp_path / "small.yaml"
    assert study(*(a.format(**places) for a in arguments), "--out", tmp_path / "study") == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and "Traceback" not in error
    assert not (tmp_path / "study" / "runs").exists()
