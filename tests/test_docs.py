"""What the docs tell people to type: every command and every block of code is run, at small size."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from pixeldip import DiP
from pixeldip.bench import timing
from pixeldip.bench.commands import FOREIGN
from pixeldip.cli import COMMANDS, main
from pixeldip.model import HEADS, PLACEMENTS
from pixeldip.recipe import parse_recipe
from pixeldip.run_folder import names_a_model
from pixeldip.studies import STUDIES
from pixeldip.training import train

from . import test_model, test_official
from .conftest import make_picture, tiny_recipe, tiny_study_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REPORTS = [page for page in PAGES if page.name == "report.md"]  # written by studies, with the commands that made them

SMALLER = {
    "torchrun --nproc-per-node 8 -m pixeldip.cli": "pixeldip",  # many processes: test_scale_out, test_evaluate
    "0-49999": "0-7",
    "0-63": "0-3",
    "0-15": "0-3",
    "--steps 100": "--steps 2",
    "--compile --heads": "--compile",
    "--scale paper": "--scale laptop --out runs/study-heads-paper",
    "--data IMAGENET --held-out-split validation": "--data photos-train/ --held-out photos-test/",
    "--resolution 256": "--resolution 32",
    "--classes 207 360": "--classes 2 4",
    "num_inference_steps=20": "num_inference_steps=2",
    "range(2000)": "range(8)",
}
MAKES = {
    "pixeldip convert": "models/dip-xl-16",
    "pixeldip demo": "runs/demo",
    "pixeldip train --data.source my-photos/\n": "runs/my-images",
}
TINY_RUN = (
    "--training.steps 2 --training.batch-size 4 --training.no-compile --preview.every 0 --alignment.weight 0 "
    "--data.workers 0"
)
TINY_NETWORK = "--model.hidden-size 32 --model.depth 2 --model.num-heads 2 --model.head-width 8"


def small_flags(arguments: list[str], inception: Path) -> list[str]:
    """What makes a command of the docs a matter of seconds; a flag given twice counts as given last."""
    command, flags = arguments[0], [*arguments[1:]]
    if command == "train":
        pretrained = "--model.pretrained" in flags
        return [*TINY_RUN.split(), *([] if pretrained else TINY_NETWORK.split())]
    if flags[:1] == ["overfit"]:
        return ["--resolution", "64", "--steps", "2"]
    if command == "study":
        two = [contender.name for contender in STUDIES[flags[0]].contenders("laptop")][:2]
        more = ["--recipe", "study-tiny.yaml", *(["--contenders", *two] if len(two) == 2 else [])]
        more += ["--held-out-split", "train"] if "--held-out" in flags else []
        more += ["--images", "4"] if flags[0] != "features" else []
        return ["--steps", "2", "--seeds", "1", *more]
    if command == "evaluate":
        more = ["--images", "8"] if flags[0] == "reference" or names_a_model(flags[0]) else []
        if flags[0] != "reference":
            more += ["--allow-resolution-mismatch", "--no-cache"]
        return [*more, "--inception-weights", str(inception)]
    if command == "sweep":
        return ["--images", "4", "--guidance", "2", "--solver", "ab2", "--evaluations", "2", "--no-cache"]
    if command == "bench":
        least = {"rounds": 3, "batch": 1, "batches": 1, "processes": 1}
        small = [f"--{name}={value}" for name, value in least.items() if name not in FOREIGN[flags[0]]]
        return ["--model", "MODEL", *small]
    return ["--steps", "2"] if command in ("demo", "sample") else []


def parts(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page in order, dedented: (language, text); "" is the shell."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [(language, re.sub(rf"^{indent}", "", text, flags=re.M)) for indent, language, text in found]


def commands(shell: str) -> list[list[str]]:
    """The command lines of a block, as words."""
    lines = shell.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture
def gated_conv(monkeypatch: pytest.MonkeyPatch) -> str:
    """The head of docs/extend.md, registered as the page says."""
    (code,) = (text for language, text in parts(ROOT / "docs" / "extend.md") if language == "python")
    names: dict = {}
    exec(code, names)
    monkeypatch.setitem(HEADS, "gated_conv", names["GatedConvHead"])
    return "gated_conv"


def test_the_head_of_the_docs(gated_conv: str, tmp_path: Path) -> None:
    for patch_size in (5, 8):
        for placement in PLACEMENTS:
            test_model.test_any_multiple_of_the_patch(gated_conv, placement, patch_size)
            test_model.test_a_gradient_reaches_every_parameter(gated_conv, placement, patch_size)
            test_model.test_starts_closed_and_small(gated_conv, placement)
            test_model.test_save_and_load(gated_conv, placement, tmp_path / placement)
            test_model.test_gradient_checkpointing_changes_nothing(gated_conv, placement)
        test_model.test_the_head_sees_one_patch_at_a_time(gated_conv, patch_size)
    test_model.test_compiles_to_the_same_function(gated_conv, {})
    assert DiP(head=gated_conv, head_width=8).config.head == "gated_conv"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in REPORTS], ids=lambda page: page.stem)
def test_a_page_from_top_to_bottom(
    page: Path, users_folder: Path, seeded_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "user"
    shutil.copytree(users_folder, folder)
    text = page.read_text(encoding="utf-8")
    for command, made in MAKES.items():
        if command in text:
            shutil.rmtree(folder / made)
    monkeypatch.chdir(folder)
    # what takes the time of a page, and is tested elsewhere: ceilings, distances of two thousand dimensions, C++
    monkeypatch.setitem(timing.CEILING_SIZES, "cpu", (128, 2**16))
    monkeypatch.setattr("pixeldip.evaluation.registry.frechet_distance", lambda *_: 1.0)
    monkeypatch.setattr("pixeldip.export.shutil", SimpleNamespace(which=lambda _: None))
    names: dict = {}
    for language, text in parts(page):
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        if language == "python":
            if page.stem != "extend":  # which has a test of its own
                exec(text, names)
        elif language == "yaml":
            parse_recipe(yaml.safe_load(text), page.name)
        elif language == "":
            for program, *arguments in commands(text):
                if program == "make":
                    assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
                elif arguments[0] == "app":
                    pass  # started, and ended with Ctrl-C, by test_app_browser
                else:
                    assert program == "pixeldip", text
                    assert main([*arguments, *small_flags(arguments, seeded_weights)]) == 0, arguments


def test_commands_within_sentences() -> None:
    for page in PAGES:
        for words in map(str.split, re.findall(r"`pixeldip ([^`]+)`", page.read_text(encoding="utf-8"))):
            assert words[0] in COMMANDS, page
            assert words[0] != "study" or words[1] in (*STUDIES, "…"), page


def test_flags_within_sentences(capsys: pytest.CaptureFixture) -> None:
    """Each `--flag` is one of ours, or of what the page is about."""
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
    with pytest.raises(SystemExit):
        main(["evaluate", "reference", "--help"])
    ours = set(re.findall(r"--[a-z][\w.-]+", capsys.readouterr().out))
    others = {"--max-restarts", "--nproc-per-node"}  # torchrun's
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for code in re.findall(r"`([^`]+)`", text):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code):
                assert flag in ours | others, f"{page.name}: {flag}"


@pytest.fixture(scope="module")
def users_folder(seeded_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages take for granted: pictures, a trained demo, models, samples, a reference."""
    folder = tmp_path_factory.mktemp("docs") / "user"
    for source in ("my-photos", "held-out-photos", "new-pictures", "photos-train", "photos-test", "IMAGENET", "REF"):
        for k, name in enumerate(("ant", "bee")):
            (folder / source / name).mkdir(parents=True)
            for i in range(6):
                make_picture(100 * len(source) + 10 * k + i, 32, 32).save(folder / source / name / f"{i}.png")
    for own in ("recipes", "models", "docs/showcase/drawings"):
        shutil.copytree(ROOT / own, folder / own)
    sections = {"data": {"resolution": 32}, "training": {"steps": 1}}
    train(tiny_recipe(folder / "runs" / "demo", "emoji", **sections), Console(quiet=True))
    shutil.copytree(folder / "runs" / "demo", folder / "runs" / "my-images")
    for name in ("MODEL", "my-model"):
        shutil.copytree(next((folder / "runs" / "demo" / "checkpoints").iterdir()) / "pipeline", folder / name)
    tiny_study_recipe(folder / "study-tiny.yaml")
    release = {f"ema_denoiser.{name}": value for name, value in test_official.tensors().items()}
    torch.save({"state_dict": release}, folder / "DiP-XL-16.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for prepared in (
            "convert DiP-XL-16.ckpt models/dip-xl-16",
            "sample MODEL --seeds 0-7 --steps 1 --out SAMPLES",
            f"evaluate reference REF --out VIRTUAL_imagenet256_labeled.npz --inception-weights {seeded_weights}",
        ):
            assert main(prepared.split()) == 0
    return folder
