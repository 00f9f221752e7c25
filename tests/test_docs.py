"""What the docs tell people to type."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixeldip import DiP
from pixeldip.cli import main
from pixeldip.model import HEADS, PLACEMENTS

from . import test_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page, dedented; "" is those without a language."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture
def gated_conv(monkeypatch: pytest.MonkeyPatch) -> str:
    """The head of docs/extend.md, registered as the page says."""
    (code,) = blocks(ROOT / "docs" / "extend.md", "python")
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


def test_python_of_the_pages(saved_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """README.md and docs/sample.md, from top to bottom, on a tiny model of the demo's classes."""
    monkeypatch.chdir(saved_run)
    for page in ("README.md", "docs/sample.md"):
        names: dict = {}
        for code in blocks(ROOT / page, "python"):
            exec(code.replace("num_inference_steps=20", "num_inference_steps=2"), names)
        assert len(names["images"]) in (1, 2) and names["images"][0].size == (32, 32)
    assert (saved_run / "fox.png").is_file()


def test_onnx_example(saved_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/export.md: its first command, then its code."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(saved_run)
    page = ROOT / "docs" / "export.md"
    command = blocks(page, "")[0].splitlines()[0].split()
    assert main(command[1:]) == 0
    exec(blocks(page, "python")[0], {})
    assert Image.open(saved_run / "exported" / "1.png").size == (32, 32)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/demo in it, trained for one step."""
    from rich.console import Console

    from pixeldip.training import train

    from .conftest import tiny_recipe

    folder = tmp_path_factory.mktemp("user")
    torch.manual_seed(0)
    sections = {"data": {"resolution": 32}, "training": {"steps": 1}}
    train(tiny_recipe(folder / "runs" / "demo", "emoji", **sections), Console(quiet=True))
    return folder
