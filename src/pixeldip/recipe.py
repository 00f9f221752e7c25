"""Recipes: everything a run depends on, typed, read from YAML and overridden by flags.

The defaults of all but the model are those of `recipes/my-images.yaml`. This module imports no torch, so that
`pixeldip train --help` answers at once.
"""

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from .errors import UserError
from .files import write_text
from .settings import (
    Device,
    EvaluationOptions,
    FloatPrecision,
    Fraction,
    NonNegative,
    Positive,
    SamplingSettings,
    Solver,
    strict,
    where_and_why,
)

Beta = Annotated[float, Field(ge=0, lt=1)]


@strict
@dataclass
class ModelSection:
    """The network: a preset, single sizes, or a preset with some sizes changed."""

    preset: str | None = None
    """A named size, for instance dip-xl/16; the sizes given beside it override its row."""
    pretrained: str | None = None
    """Trained weights to start from: a run folder, a saved model, a hub id or an authors' checkpoint. Its sizes are
    taken over; those given beside it override them, and what no longer fits starts from scratch."""
    lora_rank: Positive | None = None
    """Train low-rank adapters (LoRA) of the pretrained model's blocks, and nothing else."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapters count alpha / rank; None: 1."""
    patch_size: Positive | None = None
    hidden_size: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    head: str | None = None
    """Patch Detailer Head: unet, coordinate_mlp, attention, mlp, or linear for the DiT-only baseline."""
    head_width: Positive | None = None
    head_depth: Positive | None = None
    placement: Literal["post", "intermediate", "hybrid"] | None = None
    """Where the head stands: after the last block (None: this), half-way through the blocks, or in both places."""
    prediction: Literal["velocity", "image", "noise"] | None = None
    """What the network predicts; None: velocity. image (the clean image) learns clean strokes much sooner; noise
    trains on the variance-preserving path (Eqs. 1 and 4)."""
    absolute_positions: bool | None = None
    """Tell the backbone where in the image a patch lies; None: no, as in the release. Small budgets gain by it."""


@strict
@dataclass
class DataSection:
    """The images."""

    source: str = ""
    """An image folder (a class per sub-folder, or none), a folder of parquet or webdataset shards, one such
    file, either at an address that fsspec knows (s3://…), a hub id, or "emoji", the bundled set."""
    split: str = "train"
    resolution: Positive | tuple[Positive, Positive] = 64
    """Pixels: one number, or height and width; both multiples of the patch size."""
    flip: bool = False
    """Mirror half of the images, chosen again in each epoch."""
    image_column: str | None = None
    """None: the first column that holds images."""
    label_column: str | None = None
    """None: the class column if there is one; "none": ignore it and train without classes."""
    max_broken: Fraction = 0.05
    """Stop when more than this fraction of the images cannot be read."""
    in_memory: bool | None = None
    """Keep the cropped images in memory; None: if they take at most 1 GiB."""
    workers: NonNegative = 4
    """Processes that decode images (none are started when the images are in memory)."""
    timeout: Positive = 600
    """Seconds such a process may take over a batch before the run stops."""
    accept_changes: bool = False
    """Resume although images were added, lost or renamed since the run began."""


@strict
@dataclass
class FlowSection:
    """How times and classes are drawn in training."""

    time_distribution: Literal["logit_normal", "uniform"] | None = None
    """None: logit_normal, or uniform for model.prediction noise."""
    time_mean: float = 0.0
    time_std: Annotated[float, Field(gt=0)] = 1.0
    time_shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1: more training on noisy images."""
    class_dropout: Fraction = 0.1
    """Fraction of labels replaced by the null class, for classifier-free guidance."""


@strict
@dataclass
class AlignmentSection:
    """REPA (Yu et al. 2025): the tokens of a block are held near those of a frozen image encoder."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """Of 1 - cosine similarity in the loss; 0: no alignment. The release trains with 0.5."""
    block: Positive = 8
    """After how many blocks the tokens are taken."""
    encoder: str = "facebook/dinov2-base"
    """A vision transformer of the transformers library: hub id or folder."""
    projector_width: Positive = 2048
    """Of the two hidden layers between tokens and encoder; trained, saved for resuming, not sampled with."""


@strict
@dataclass
class OptimizerSection:
    """AdamW."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: NonNegative = 200
    schedule: Literal["constant", "cosine"] = "cosine"
    """cosine falls towards 1% of lr, which would be that of the step after the last."""
    cooldown_steps: NonNegative = 0
    """Last steps, over which the rate falls to 0, so that a constant run can be ended well at any step."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; None: no clipping."""


@strict
@dataclass
class TrainingSection:
    """The run."""

    steps: Positive = 20_000
    batch_size: Positive = 64
    """Images per optimizer step over all processes."""
    gradient_accumulation: Positive = 1
    """Forward and backward passes per step; each process takes batch_size / (processes * this) images at once."""
    ema_decay: Fraction = 0.999
    """Of the sampled weights; rises from 0.1 to this over the first steps."""
    precision: FloatPrecision = "auto"
    """auto: bf16 where the device has instructions for it and, on a CPU, multiplies faster by them; else fp32."""
    compile: bool = False
    gradient_checkpointing: bool = False
    shard: bool = False
    """Split weights, gradients, optimizer and average over the processes (FSDP2), for models that fit no device."""
    seed: NonNegative = 0
    device: Device = "auto"
    log_every: Positive = 20
    save_every: Positive = 1000
    keep_last: Positive = 2
    """Checkpoints kept; older ones are deleted after a newer one is complete. With 1, damage to it ends the run."""
    on_divergence: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite: the step is left out, and the run stops, or goes on."""
    gradient_limit: Annotated[float, Field(gt=0)] | None = None
    """A gradient norm above this counts as divergence too, before clipping."""
    skip_limit: Positive = 10
    """Consecutive steps left out that stop a run all the same."""


@strict
@dataclass
class PreviewSection(SamplingSettings):
    """Sample grids from the EMA weights during training, always of the same seeds."""

    steps: Positive = 30
    solver: Solver = "ab2"
    guidance: float = 2.0
    every: NonNegative = 1000
    """Steps between previews; 0: none."""
    images: Positive = 32


@strict
@dataclass
class EvaluationSection(EvaluationOptions, SamplingSettings):
    """Metrics of EMA samples during training, logged like the loss; the reference is data.source by default."""

    metrics: tuple[str, ...] = ("kid_efficientnet", "fd_mid_efficientnet", "boundary")
    every: NonNegative = 0
    """Steps between evaluations; 0: none."""
    images: Annotated[int, Field(ge=4)] = 1000
    """Samples per evaluation, always of the same seeds."""
    guidance: float = 2.0


@strict
@dataclass
class LoggingSection:
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Beside metrics.jsonl, which is always written."""
    project: str = "pixeldip"


@strict
@dataclass
class Recipe:
    """A training run."""

    out: Annotated[str, Field(min_length=1)] = "runs/my-images"
    """The run folder; a run found there is resumed."""
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    flow: FlowSection = field(default_factory=FlowSection)
    alignment: AlignmentSection = field(default_factory=AlignmentSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    preview: PreviewSection = field(default_factory=PreviewSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    logging: LoggingSection = field(default_factory=LoggingSection)


_ADAPTER = TypeAdapter(Recipe)


def image_size(data: DataSection) -> tuple[int, int]:
    """(height, width) of the training images."""
    return (data.resolution, data.resolution) if isinstance(data.resolution, int) else tuple(data.resolution)


def parse_recipe(values: Any, where: str = "recipe") -> Recipe:
    """A checked recipe from nested dictionaries; what is left out takes the default.

    Raises:
        UserError: naming the key, what was expected and what was found.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected sections such as data: and model:, found {type(values).__name__}")
    try:
        recipe = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise UserError(f"{where}: {'; '.join(_explain(e) for e in error.errors())}") from None
    recipe.out = os.path.expanduser(recipe.out)
    return recipe


def _explain(error: Any) -> str:
    if error["type"] != "unexpected_keyword_argument":
        return where_and_why(error)
    path = [str(part) for part in error["loc"]]
    known = _keys_at(path[:-1])
    near = difflib.get_close_matches(path[-1], known, n=1)
    return f"{'.'.join(path)} is not a key of a recipe; " + (
        f"perhaps {'.'.join([*path[:-1], near[0]])}" if near else f"there are {', '.join(known)}"
    )


def _keys_at(path: list[str]) -> list[str]:
    cls: Any = Recipe
    for part in path:
        cls = next(f.type for f in dataclasses.fields(cls) if f.name == part)
    return [f.name for f in dataclasses.fields(cls)]


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one place, of which YAML takes the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise yaml.YAMLError(f"line {line}: {key.value} is given already in line {first}; leave one out")
            lines[key.value] = line
        return node


def load_recipe(name: str) -> Recipe:
    """A recipe from a YAML file, or by name from those that come with the package.

    Raises:
        UserError: if there is none, or it is not a recipe.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{name}: no such recipe file")
        file = path
    else:
        packaged = resources.files("pixeldip.recipes")
        known = sorted(entry.name.removesuffix(".yaml") for entry in packaged.iterdir() if entry.name.endswith(".yaml"))
        if name not in known:
            raise UserError(f"{name!r} is neither a .yaml file nor one of the recipes {', '.join(known)}")
        file = packaged.joinpath(f"{name}.yaml")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, endless digits, endless brackets
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse_recipe(values, where=name)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Nested dictionaries of plain YAML types that `parse_recipe` turns back into the same recipe."""
    return _ADAPTER.dump_python(recipe, mode="json")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes or replaces the file in one step: another process may be reading it."""
    write_text(path, yaml.safe_dump(recipe_values(recipe), sort_keys=False))
