"""Recipes: everything a run depends on, typed, read from YAML and overridden by flags.

The defaults of all but the model are those of `recipes/my-images.yaml`. This module imports no torch, so that
`pixeldip train --help` answers at once.
"""

import dataclasses
import difflib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from .errors import UserError
from .files import write_text

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _section(cls: type) -> type:
    cls.__pydantic_config__ = _STRICT
    return cls


_LARGEST = 2**63 - 1
Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=_LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@_section
@dataclass
class ModelSection:
    """The network: a preset, single sizes, or a preset with some sizes changed."""

    preset: str | None = None
    """A named size, for instance dip-xl/16; the sizes given beside it override its row."""
    pretrained: str | None = None
    """Trained weights to start from: a run folder, a saved model, a hub id or an authors' checkpoint. Its sizes are
    taken over; those given beside it override them, and what no longer fits starts anew."""
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
    """What the network puts out; None: velocity. image (the clean image) learns clean strokes much sooner; noise
    trains on the variance-preserving path (Eqs. 1 and 4)."""
    absolute_positions: bool | None = None
    """Tell the backbone where in the image a patch lies; None: no, as in the release. Small budgets gain by it."""


@_section
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
    """Mirror half of the images, chosen anew in each epoch."""
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


@_section
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


@_section
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


@_section
@dataclass
class OptimizerSection:
    """AdamW."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: NonNegative = 200
    schedule: Literal["constant", "cosine"] = "cosine"
    """cosine falls to 1% of lr at the last step."""
    cooldown_steps: NonNegative = 0
    """Last steps, over which the rate falls to 0, so that a constant run can be ended well at any step."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; None: no clipping."""


@_section
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
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp32."""
    compile: bool = False
    gradient_checkpointing: bool = False
    shard: bool = False
    """Split weights, gradients, optimizer and average over the processes (FSDP2), for models that fit no device."""
    seed: NonNegative = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
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


_PIPELINE_ARGUMENTS = {
    "num_inference_steps": "steps",
    "solver": "solver",
    "guidance_scale": "guidance",
    "guidance_interval": "guidance_interval",
    "time_shift": "time_shift",
}


Solver = Literal["euler", "heun", "ab2", "ddim", "ancestral"]
"""The names of `flow.SOLVERS`."""


@_section
@dataclass
class SamplingSettings:
    """How images come from noise."""

    steps: Positive = 50
    solver: Solver = "euler"
    guidance: float = 4.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[Fraction, Fraction] = (0.1, 1.0)
    """Times between which steps are guided; 0 is noise, 1 is the image."""
    time_shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 takes more of the steps at noisy times."""

    def pipeline_arguments(self) -> dict[str, Any]:
        """The keywords `DiPPipeline.__call__` knows these settings by."""
        return {keyword: getattr(self, name) for keyword, name in _PIPELINE_ARGUMENTS.items()}

    @classmethod
    def from_pipeline_arguments(cls, values: Mapping[str, Any]) -> "SamplingSettings":
        """The other way round; what is not there takes the default.

        Raises:
            UserError: naming a keyword that is none of these, or a value that is out of range.
        """
        if unknown := sorted(values.keys() - _PIPELINE_ARGUMENTS):
            raise UserError(f"sampling settings: {unknown[0]!r} is none of {', '.join(_PIPELINE_ARGUMENTS)}")
        settings = cls(**{_PIPELINE_ARGUMENTS[keyword]: value for keyword, value in values.items()})
        return check_values(settings, lambda name: f"sampling settings: {name}")


@dataclass
class SamplingFlags:
    """How images come from noise. What is left out is as the model was saved to be sampled; of a run, as its previews
    are."""

    steps: Positive | None = None
    solver: Solver | None = None
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[Fraction, Fraction] | None = None
    """Times between which steps are guided; 0 is noise, 1 is the image."""
    time_shift: Annotated[float, Field(gt=0)] | None = None
    """Above 1 takes more of the steps at noisy times."""

    def settings(self, own: SamplingSettings) -> SamplingSettings:
        """What was given, and for the rest the model's own settings."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingFlags)}
        return dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})


@_section
@dataclass
class PreviewSection(SamplingSettings):
    """Sample grids from the EMA weights during training, always of the same seeds."""

    steps: Positive = 30
    solver: Solver = "ab2"
    guidance: float = 2.0
    every: NonNegative = 1000
    """Steps between previews; 0: none."""
    images: Positive = 32


@_section
@dataclass
class EvaluationOptions:
    """What is measured, against what, and how."""

    reference: str = ""
    """An ADM reference .npz (mu, sigma, mu_s, sigma_s, arr_0), or real images: a folder, parquet file or hub id."""
    reference_split: str = "train"
    metrics: tuple[str, ...] = ()
    """Of fid sfid is precision recall kid (Inception), fd_dinov2 kid_dinov2, kid_efficientnet
    fd_mid_efficientnet fd_pool_efficientnet (no download), boundary, nearest."""
    train_images: str = ""
    """The training images, for nearest: how near samples come to them."""
    train_split: str = "train"
    inception_weights: Path | None = None
    """weights-inception-2015-12-05-6726825d.pth; None: in torch's cache, fetched if it is not there."""
    dinov2: str = "facebook/dinov2-large"
    """Hub id or folder of the DINOv2 model."""
    pr_distance: Literal["adm", "float32"] = "adm"
    """Precision and recall: float16 distances as in ADM's evaluator, or float32."""
    is_split: Positive = 5000
    """Images per split of the Inception Score."""
    is_order: Literal["file", "shuffled"] = "file"
    """Splits of consecutive images, as in ADM, or of images in a seeded random order."""
    patch_size: Annotated[int, Field(ge=2)] | None = None
    """For boundary: pixels between the borders looked at; None: that of the model the samples come from, else 16."""
    evaluation_batch_size: Positive = 64
    """Images through the feature networks at once."""
    allow_resolution_mismatch: bool = False
    require_balanced: bool = False
    """Refuse samples whose classes differ in number."""
    verify: bool = True
    """Compare the checksums of .npz files before anything else."""
    cache: bool = True
    """Keep the features of reference images for the next time."""


@_section
@dataclass
class EvaluationSection(EvaluationOptions, SamplingSettings):
    """Metrics of EMA samples during training, logged like the loss; the reference is data.source by default."""

    metrics: tuple[str, ...] = ("kid_efficientnet", "fd_mid_efficientnet", "boundary")
    every: NonNegative = 0
    """Steps between evaluations; 0: none."""
    images: Annotated[int, Field(ge=4)] = 1000
    """Samples per evaluation, always of the same seeds."""
    guidance: float = 2.0


@_section
@dataclass
class LoggingSection:
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Beside metrics.jsonl, which is always written."""
    project: str = "pixeldip"


@_section
@dataclass
class Recipe:
    """A training run."""

    out: str = "runs/my-images"
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


@dataclass
class PlanOptions:
    """What `pixeldip train --plan` reckons with."""

    devices: tuple[Positive, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of devices, with one process of DistributedDataParallel each."""
    device: str = "H100"
    """H100, H200, A100, L40S, "RTX 4090" or "H100 PCIe": speed and memory of its data sheet."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of that speed, in bf16, which the FLOPs of a step reach. Llama 3's training reached 0.38 to 0.43 on H100s
    (Grattafiori et al. 2024, Table 4)."""
    price: Annotated[float, Field(gt=0)] | None = None
    """Of one device for one hour; None: no cost."""
    classes: NonNegative | None = None
    """None: those that data.source's folders or schema show, or ImageNet's 1000."""


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
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explained(error)}") from None


def check_flags(arguments: Any) -> None:
    """Checks a command's arguments, a dataclass, against the ranges of their types.

    Raises:
        UserError: naming the flags.
    """
    check_values(arguments, lambda name: f"--{name.replace('_', '-')}")


def check_values(settings: Any, spelling: Callable[[str], str]) -> Any:
    """A dataclass checked against the ranges of its types, its values turned into them.

    Args:
        spelling: a field's name as the user knows it.

    Raises:
        UserError: naming the values that are out of range.
    """
    try:
        return TypeAdapter(type(settings)).validate_python(vars(settings))
    except ValidationError as error:
        raise UserError("; ".join(f"{spelling(str(e['loc'][0]))}: {_found(e)}" for e in error.errors())) from None


def explained(error: ValidationError) -> str:
    """Each value that was refused: where, why, and what was found."""
    return "; ".join(_explain(e) for e in error.errors())


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]] or ["all of it"]
    if error["type"] == "unexpected_keyword_argument":
        known = _keys_at(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        return f"{'.'.join(path)} is not a key of a recipe; " + (
            f"perhaps {'.'.join([*path[:-1], near[0]])}" if near else f"there are {', '.join(known)}"
        )
    return f"{'.'.join(path)}: {_found(error)}"


class _Shortened(reprlib.Repr):
    """Of what was found, at most some 200 characters."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < 10**100 else "a number of more than 100 digits"


def _found(error: Any) -> str:
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {_Shortened().repr(error['input'])}"


def _keys_at(path: list[str]) -> list[str]:
    cls: Any = Recipe
    for part in path:
        cls = next(f.type for f in dataclasses.fields(cls) if f.name == part)
    return [f.name for f in dataclasses.fields(cls)]


def load_recipe(name: str) -> Recipe:
    """A recipe from a YAML file, or by name from those that come with the package.

    Raises:
        UserError: if there is none, or it is not a recipe.
    """
    path = Path(name)
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
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, endless digits, endless brackets
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse_recipe(values, where=name)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Nested dictionaries of plain YAML types that `parse_recipe` turns back into the same recipe."""
    return _ADAPTER.dump_python(recipe, mode="json")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes or replaces the file in one step: another process may be reading it."""
    write_text(path, yaml.safe_dump(recipe_values(recipe), sort_keys=False))
