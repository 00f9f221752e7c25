"""The losses of a few steps, which no change moves unknowingly: `python -m tests.make_losses` writes them anew."""

import json
import tempfile
from pathlib import Path

from rich.console import Console

from pixeldip.run_folder import read_metrics
from pixeldip.training import train

from .conftest import tiny_recipe

FILE = Path(__file__).with_name("losses.json")


def losses(folder: Path) -> dict[str, list[list[float]]]:
    """Loss and gradient norm of eight steps on the bundled pictures, by what the network puts out."""
    found = {}
    for prediction in ("velocity", "image", "noise"):
        sections = {"model": {"prediction": prediction}, "training": {"steps": 8}, "optimizer": {"warmup_steps": 4}}
        recipe = tiny_recipe(folder / prediction, "emoji", **sections)
        train(recipe, Console(quiet=True))
        found[prediction] = [[entry["loss"], entry["gradient_norm"]] for entry in read_metrics(folder / prediction)]
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE.write_text(json.dumps(losses(Path(name)), indent=2) + "\n", encoding="utf-8")
