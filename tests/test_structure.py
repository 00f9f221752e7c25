"""Imports run one way through the package, and all of it is installed."""

import ast
import tomllib
from pathlib import Path

import pixeldip

PACKAGE = Path(pixeldip.__file__).parent
ORDER = [
    "errors",
    "heap",
    "files",
    "terminal",
    "settings",
    "recipe",
    "arguments",
    "run_folder",
    "heartbeat",
    "processes",
    "provenance",
    "images",
    "flow",
    "model",
    "saved_model",
    "sharing",
    "replay",
    "pipeline",
    "data",
    "sampling",
    "vision_models",
    "evaluation",
    "export",
    "convert",
    "training",
    "bench",
    "plan",
    "report",
    "studies",
    "demo",
    "app",
    "cli",
]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return rooms - {"__version__"}


def test_imports_run_down_the_list() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "__init__.py" and path.parent == PACKAGE:
            continue
        here = ORDER.index(room(path))
        for other in imported_rooms(path):
            assert ORDER.index(other) < here, f"{path.relative_to(PACKAGE)} imports {other}"


def test_the_flow_knows_no_network() -> None:
    for path in (PACKAGE / "flow").glob("*.py"):
        assert imported_rooms(path) <= {"errors"}


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    there = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(settings["tool"]["setuptools"]["packages"]) == there | {"pixeldip.recipes"}
