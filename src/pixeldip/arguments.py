"""What each command takes: its flags, their types, ranges and defaults, as --help shows them.

This module imports no torch, so that every command's --help answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from .recipe import Recipe
from .settings import (
    Device,
    EvaluationOptions,
    FloatPrecision,
    Fraction,
    NonNegative,
    PlanOptions,
    Positive,
    Precision,
    SamplingFlags,
    Side,
    Solver,
)


@dataclass
class DemoArguments:
    """Train a small DiP on the bundled pictures, sample it, and write one HTML page about it.

    Interrupted with Ctrl-C, it saves; the same command goes on from there.
    """

    out: Path = Path("runs/demo")
    """The run folder; the page is its report.html."""
    steps: Positive | None = None
    """Optimizer steps; by default the recipe's."""
    seed: NonNegative = 0
    device: Device = "auto"


@dataclass
class TrainArguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    plan: bool = False
    """Train nothing: print parameters, memory, FLOPs, time and checkpoint sizes of the recipe, and what would not fit.
    The last line is JSON."""
    plan_options: Annotated[PlanOptions, tyro.conf.arg(name="plan")] = field(default_factory=PlanOptions)


@dataclass
class SampleArguments(SamplingFlags):
    """Sample images from a trained model."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """A run folder, a saved model folder or a hub id."""
    out: Path = Path("samples")
    """A folder for PNG files, a grid.png and settings.json; or FILE.npz for ADM's and pixeldip's evaluators."""
    classes: tuple[str, ...] = ()
    """Class names or ids; by default all of them."""
    seeds: str = "0-15"
    """One image per seed: 7, 0-15 or 0-7,20. The classes are dealt out in turn, and in an .npz in a random order."""
    class_order_seed: NonNegative | None = None
    """Deal the classes out in the random order of this seed; None: 0 for an .npz, in turn for a folder."""
    height: Side | None = None
    width: Side | None = None
    batch_size: Positive = 32
    device: Device = "auto"
    precision: Precision = "auto"
    """int8: most products of the backbone, on CPUs that can: faster, most so compiled, and a little less exact."""
    compile: bool = False
    """Compile the model's blocks first: worth its half minute for many images, or large ones."""


@dataclass
class EvaluateArguments(EvaluationOptions, SamplingFlags):
    """Measure samples against a reference. `pixeldip evaluate reference --help` tells how to make one."""

    samples: tyro.conf.Positional[str] = tyro.MISSING
    """An image folder, an .npz with arr_0 (N, H, W, 3) uint8, or a model to sample from (run, saved folder, hub id)."""
    out: Path | None = None
    """JSON file for the numbers and everything needed to judge them."""
    images: Positive = 50_000
    """Samples of a model, seeds 0, 1, 2 …"""
    classes: tuple[str, ...] = ()
    """Class names or ids, of a model; by default all of them, as many samples of each, in a seeded random order."""
    save_images: Path | None = None
    """Keep the samples of a model: a folder, or FILE.npz."""
    device: Device = "auto"
    precision: Precision = "auto"
    """Of a model; the feature networks always compute in fp32."""
    compile: bool = False
    """Compile the blocks of a model first."""


@dataclass
class ReferenceArguments:
    """Make a reference batch, as ADM's evaluator reads it: mu, sigma, mu_s, sigma_s of all images, and arr_0."""

    data: tyro.conf.Positional[str]
    """An image folder, a parquet or webdataset file, a hub dataset, or an .npz of images."""
    out: Path = Path("reference.npz")
    resolution: Side | None = None
    """Crop and scale to squares of this size as training does; None: the images all have one size."""
    split: str = "train"
    images: Positive = 10_000
    """At most so many images go into the file, a seeded choice; the statistics are of all of them."""
    inception_weights: Path | None = None
    batch_size: Positive = 64
    device: Device = "auto"


@dataclass
class StudyArguments:
    """Repeat a study of the paper at the scale you can afford; the same command goes on where it stopped."""

    name: tyro.conf.Positional[str] = tyro.MISSING
    """heads, scaling, placement, head-config, patch-size, prediction (comparisons), overfit or features."""
    scale: Literal["laptop", "gpu", "paper"] = "laptop"
    """laptop: about an hour on 2 cores; gpu: 25 minutes of one large GPU; paper: the full recipe, for a cluster."""
    recipe: str = ""
    """What all contenders train, a recipe's name or .yaml file; by default study-SCALE. What they change in it stays
    the scale's."""
    out: Path | None = None
    """Folder of the runs and the report; None: runs/study-NAME-SCALE."""
    data: str = ""
    """Training images, as for train; by default the recipe's: the bundled emoji, of which there are only 40."""
    split: str = ""
    """Of the training images; by default the recipe's: train."""
    held_out: str = ""
    """Images that are not trained on; by default another split of the training images' source."""
    held_out_split: str = "test"
    reference: str = ""
    """A reference .npz to measure distances to, in place of the held-out images."""
    image: Path | None = None
    """The photograph of overfit; by default the bundled one."""
    resolution: Side | None = None
    """Height and width overfit crops and scales its photograph to; by default the scale's."""
    contenders: tuple[str, ...] = ()
    """Names of those to compare, for instance unet dit; by default all of the study's."""
    seeds: Positive = 3
    """Trainings of every contender, with seeds 0, 1, 2 …"""
    steps: Positive | None = None
    """Optimizer steps of each training; by default the scale's."""
    images: Annotated[int, Field(ge=4)] | None = None
    """Samples of each model that are measured; by default the scale's."""
    device: Device = "auto"


@dataclass
class SweepArguments(EvaluationOptions):
    """Sample a model with every combination of settings, measure them all on the same seeds, and write one report:
    which guidance, which solver, how many steps. But for the guidance, what is left out is as the model was saved to be
    sampled. What is in --out already is not measured again."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """A run folder, a saved model folder or a hub id."""
    guidance: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0, 1.5, 2.0, 3.0, 4.0)
    guidance_interval: Annotated[tuple[tuple[Fraction, Fraction], ...], Field(min_length=1)] | None = None
    """One or more pairs, for instance 0 1 0.1 1."""
    solver: Annotated[tuple[Solver, ...], Field(min_length=1)] | None = None
    evaluations: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """Of the network, a guided pair counted as one: as many steps, or half as many of heun."""
    time_shift: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None
    backbone_every: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """K: the backbone is computed at one of these evaluations in K, the head at all."""
    images: Annotated[int, Field(ge=4)] = 1000
    """Samples of every combination, seeds 0, 1, 2 …; with the reference's classes in its numbers, if it has classes
    of the model's names."""
    label_column: str | None = None
    """Of the reference, as data.label_column."""
    metrics: tuple[str, ...] = ("kid_efficientnet", "fd_mid_efficientnet", "boundary")
    out: Path = Path("runs/sweep")
    """Folder of the numbers and the report."""
    device: Device = "auto"
    precision: Precision = "auto"
    compile: bool = False
    """Compile the model's blocks first."""


@dataclass
class ConvertArguments:
    """Turn an authors' checkpoint, of DiP or of PixNerd, into a model folder."""

    checkpoint: tyro.conf.Positional[Path]
    """Lightning .ckpt, or .safetensors with the release's tensor names."""
    out: tyro.conf.Positional[Path]
    """Folder to write; DiPPipeline.from_pretrained and pixeldip sample read it."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, which the authors sample from, or the raw ones."""
    resolution: Side | None = None
    """Training size in pixels; by default 16 patches a side. For PixNerd's fine-tune at 512 give 512."""


@dataclass
class ExportArguments:
    """Write a model's network as a program of its own, checked against the model."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """A run folder, a saved model folder or a hub id."""
    format: Literal["torch", "onnx"] = "onnx"
    """torch: torch.export, and an AOTInductor package where a C++ compiler is found; onnx: for any ONNX runtime."""
    out: Path = Path("exported")
    """Folder to write."""
    height: Side | None = None
    width: Side | None = None


@dataclass
class BenchArguments:
    """Measure speed and memory on this device: a table, and one line of JSON. Only ratios within a run mean much."""

    what: tyro.conf.Positional[Literal["latency", "throughput", "training", "memory", "scaling"]]
    """latency: one guided step, against the release's way of working. training: one step with AdamW and EMA, likewise.
    throughput: images per second of both against the batch size. memory: of both, and for each image more. scaling:
    training on a growing number of processes."""
    model: str = "dip-b/16"
    """A preset, with random weights; or a run folder, a saved model folder or a hub id."""
    height: Side | None = None
    """By default 16 patches, or the training size."""
    width: Side | None = None
    batch: Positive = 1
    """latency, training: images in a step; scaling: in each process."""
    batches: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """throughput, memory."""
    processes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2)
    """scaling: 1 is always measured, since the efficiency is against it."""
    rounds: Annotated[int, Field(ge=3)] = 11
    """All but memory."""
    compile: bool = False
    """throughput: with torch.compile of the blocks; latency (also in int8) and training: also."""
    precision: FloatPrecision = "auto"
    """Of what is compiled, trained, or measured for its memory; latency always has both in plain code."""
    heads: bool = False
    """latency, training, memory: also each other head, and DiT-only, as in Table 2."""
    latent: bool = False
    """latency: also DiT-XL/2 with its VAE, random weights, in 250 steps as in Table 1."""
    device: Device = "auto"
    out: Path | None = None
    """File for the JSON line; a plot goes beside it."""


@dataclass
class AppArguments:
    """A page on 127.0.0.1 to play with models, see what they do, and follow training. Ctrl-C ends it."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, saved models or hub ids to offer, beside those found in --folders."""
    folders: tuple[Path, ...] = (Path("runs"), Path("models"))
    """Places whose sub-folders are runs or saved models."""
    gallery: Path = Path("runs/gallery")
    """Folder for the pictures the page makes."""
    port: Annotated[int, Field(ge=1, le=65535)] = 7860
    open: bool = False
    """Open the page in the browser."""
    device: Device = "auto"
    precision: Precision = "auto"
    max_images: Positive = 16
    """The most images of one request."""
    max_steps: Positive = 250
    max_side: Positive = 1024
    """The largest height or width in pixels."""
    max_queue: Positive = 16
    """Requests that may wait; those beyond are turned away."""
