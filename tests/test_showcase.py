"""The model that comes with the repository: it still draws what it drew when it was saved."""

import re
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from pixeldip import DiPPipeline
from pixeldip.images import grid, psnr

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "emoji64"
DRAWINGS = ROOT / "docs" / "showcase" / "drawings"
PICTURES = Path(__file__).parent / "showcase" / "emoji64.png"
CLASSES = ["cat-face", "heart", "food-fruit", "monkey-face"]


def test_pictures_are_what_they_were() -> None:
    """A sample of each of four classes, as the model is saved to be sampled."""
    images = DiPPipeline.from_pretrained(MODEL)(class_labels=CLASSES, seeds=[0, 1, 2, 3]).images
    assert psnr(np.asarray(grid(images, len(images), gap=0)), np.asarray(Image.open(PICTURES))) > 30


def test_the_folder_is_small_and_says_whose_drawings_it_learnt_from() -> None:
    (weights,) = MODEL.rglob("*.safetensors")
    assert weights.stat().st_size < 20e6
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert re.search("^license: ", card, re.M)
    for source in ("Noto", "Twemoji", "Fluent", "CC-BY", "Apache", "MIT"):
        assert source in card


def test_the_drawings_are_its_classes_and_those_held_out_are_of_other_emoji() -> None:
    train, test = (
        datasets.load_dataset("parquet", data_files=str(DRAWINGS / f"{part}.parquet"), split="train")
        for part in ("train", "test")
    )
    assert train.features["label"].names == DiPPipeline.from_pretrained(MODEL).config.class_names
    assert set(test.features["label"].names) <= set(train.features["label"].names)
    assert not set(train["caption"]) & set(test["caption"])
