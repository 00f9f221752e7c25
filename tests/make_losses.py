"""The losses of a few steps, which no change moves unknowingly: `python -m tests.make_losses` writes them again."""

import json
import tempfile
from pathlib import Path

from rich.console import Console

from pixeldip.run_folder import read_metrics
from pixeldip.training import train

from .conftest import tiny_recipe

FILE = Path(__file__).with_name("losses.json")
MODELS = {
    "velocity": {},
    "image": {"prediction": "image"},
    "noise": {"prediction": "noise"},
    "attention, hybrid": {"head": "attention", "head_width": 16, "placement": "hybrid"},
    "mlp, intermediate": {"head": "mlp", "placement": "intermediate"},
    "coordinate_mlp": {"head": "coordinate_mlp"},
    "linear, absolute positions": {"head": "linear", "head_width": None, "absolute_positions": True},
}


def losses(folder: Path) -> dict[str, list[list[float]]]:
    """Loss and gradient norm of eight steps on the bundled pictures, of models of all predictions, heads and places."""
    found = {}
    for name, model in MODELS.items():
        sections = {"model": model, "training": {"steps": 8}, "optimizer": {"warmup_steps": 4}}
        recipe = tiny_recipe(folder / name, "emoji", **sections)
        train(recipe, Console(quiet=True))
        found[name] = [[entry["loss"], entry["gradient_norm"]] for entry in read_metrics(folder / name)]
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE.write_text(json.dumps(losses(Path(name)), indent=2) + "\n", encoding="utf-8")
