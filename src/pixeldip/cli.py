"""The command line. Each command parses its flags here and imports what it needs only then."""

import contextlib
import difflib
import io
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

INTERRUPTED = 130  # what shells call a command ended by Ctrl-C
BROKEN_PIPE = 141
T = TypeVar("T")
_KINDS = {"{None}|": "", "{": "", "}": "", " ": " and ", "|": " or ", "INT": "a whole number", "FLOAT": "a number"}
"""tyro's signs for what a flag takes, and what they mean."""

try:
    import tyro
    from pydantic import Field

    from .errors import UserError
    from .heap import keep_freed_memory
    from .recipe import ModelSection, Recipe, load_recipe, parse_recipe, recipe_values
    from .settings import (
        EvaluationOptions,
        Fraction,
        NonNegative,
        PlanOptions,
        Positive,
        Precision,
        SamplingFlags,
        Side,
        Solver,
        check_flags,
        check_values,
    )
    from .terminal import PlainConsole, printable, say
except KeyboardInterrupt:  # these take a moment, in which nothing has begun
    sys.exit(INTERRUPTED)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted,
    141 when nobody reads the output any more."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from . import __version__

        print(f"pixeldip {__version__}")
        return 0
    name, arguments = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"perhaps {near[0]}" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"no command {name!r}; {hint}")
        keep_freed_memory()
        return COMMANDS[name](arguments) or 0
    except UserError as error:
        PlainConsole(stderr=True).print(f"pixeldip {name}: ", style="bold red", end="")
        print(printable(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # what reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would say it again
        return BROKEN_PIPE


def _parsed(kind: type[T], prog: str, arguments: list[str], **options: Any) -> T:
    """The arguments as a dataclass; what tyro says of a value, in a box of many lines, is said in one.

    Raises:
        UserError: naming the flag and the value.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=prog, args=arguments, **options)
    except SystemExit:
        if message := _of_a_value(said.getvalue()):
            raise UserError(message) from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def _of_a_value(box: str) -> str | None:
    """What tyro's box says of one value; None if it is of anything else."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]]  # below the title
    if lines and not lines[0].strip("-"):  # where a terminal has no box characters, underlined
        del lines[0]
    text = " ".join(itertools.takewhile(lambda line: line.strip("─╰╯-"), lines))  # down to a rule, or an empty line
    if found := re.fullmatch(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)\.", text):
        choices = sorted(choice for choice in re.findall(r"'([^']*)'", found[3]) if choice != "None")
        return f"{found[2]}: choose one of {', '.join(choices)}, not {found[1]}"
    if found := re.fullmatch(r"Error parsing (\S+): no type matching (.*) could be instantiated from \[(.*)\]\.", text):
        flag, kinds, value = found.groups()
        for name, meaning in _KINDS.items():
            kinds = kinds.replace(name, meaning)
        return f"{flag}: expected {kinds}, found {value}"
    if found := re.fullmatch(r"Error parsing (\S+): (.*)", text):
        why = found[2].replace("invalid literal for int() with base 10:", "expected a whole number, found")
        return f"{found[1]}: {why.replace('could not convert string to float:', 'expected a number, found')}"
    if found := re.fullmatch(r"Missing value for argument '(.*)'\. Expected .*", text):
        return f"{found[1]}: a value is missing"
    return None


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "pixeldip: image generation directly in pixel space\n\ncommands (pixeldip COMMAND --help):\n" + "\n".join(
        lines
    )


def demo(arguments: list[str]) -> int:
    """Train a small model on the bundled pictures, sample it, write a report: the tour."""
    from .demo import DemoArguments, run_demo

    parsed = _parsed(DemoArguments, "pixeldip demo", arguments)
    check_flags(parsed)
    return run_demo(parsed)


@dataclass
class TrainArguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    plan: bool = False
    """Train nothing: print parameters, memory, FLOPs, time and checkpoint sizes of the recipe, and what would not fit.
    The last line is JSON."""
    plan_options: Annotated[PlanOptions, tyro.conf.arg(name="plan")] = field(default_factory=PlanOptions)


def train(arguments: list[str]) -> int:
    """Train a model, or resume its run: pixeldip train [RECIPE.yaml] [--section.key value]."""
    positional = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    default = load_recipe(positional[0]) if positional else load_recipe("my-images")
    named = {argument.partition("=")[0] for argument in arguments}
    if "--model.pretrained" in named:  # a whole network takes the place of the recipe's sizes
        default.model = ModelSection()
    elif "--model.preset" in named:
        default.model = ModelSection(prediction=default.model.prediction)
    parsed = _parsed(
        TrainArguments,
        "pixeldip train [RECIPE]",
        arguments[len(positional) :],
        description="Train a model, or resume the run in --out. RECIPE is a YAML file or the name of a packaged "
        "recipe (default: my-images); every flag overrides one of its values. --model.preset and --model.pretrained "
        "take the place of all the recipe's sizes.",
        default=TrainArguments(default),
    )
    recipe = parse_recipe(recipe_values(parsed.recipe), where="flags")
    if parsed.plan:
        check_values(parsed.plan_options, lambda name: f"--plan.{name}")
        from .plan import plan_command

        plan_command(recipe, parsed.plan_options)
        return 0
    if parsed.plan_options != PlanOptions():
        raise UserError("the --plan.… flags belong to --plan; add it, or leave them out to train")
    from .training import train as run_training

    console = PlainConsole()  # quiet in all processes but the main one from here on
    outcome = run_training(recipe, console)
    if not outcome.status:
        say(console, f"sample it: pixeldip sample {shlex.quote(str(outcome.run))}")
    return outcome.status


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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Precision = "auto"
    """int8: most products of the backbone, on CPUs that can: faster, most so compiled, and a little less exact."""
    compile: bool = False
    """Compile the model's blocks first: worth its half minute for many images, or large ones."""


def sample(arguments: list[str]) -> int:
    """Sample images from a trained model into a folder or an .npz file."""
    parsed = _parsed(SampleArguments, "pixeldip sample", arguments)
    check_flags(parsed)
    from .sampling import sample_command

    sample_command(parsed)
    return 0


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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def evaluate(arguments: list[str]) -> int:
    """Measure samples: FID, sFID, Inception Score, precision, recall and more; make reference files."""
    if arguments[:1] == ["reference"]:
        parsed = _parsed(ReferenceArguments, "pixeldip evaluate reference", arguments[1:])
        check_flags(parsed)
        from .evaluation.commands import reference_command

        reference_command(parsed)
    else:
        parsed = _parsed(EvaluateArguments, "pixeldip evaluate", arguments)
        check_flags(parsed)
        from .evaluation.commands import evaluate_command

        evaluate_command(parsed)
    return 0


@dataclass
class StudyArguments:
    """Repeat a study of the paper at the scale you can afford; the same command goes on where it stopped."""

    name: tyro.conf.Positional[str] = tyro.MISSING
    """heads, scaling, placement, head-config, patch-size (comparisons), overfit or features."""
    scale: Literal["laptop", "gpu", "paper"] = "laptop"
    """laptop: an hour at most on 2 cores; gpu: 25 minutes of one large GPU; paper: the full recipe, for a cluster."""
    out: Path | None = None
    """Folder of the runs and the report; None: runs/study-NAME-SCALE."""
    data: str = ""
    """Training images, as for train; by default the bundled emoji, of which there are only 40."""
    split: str = "train"
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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def study(arguments: list[str]) -> int:
    """Repeat a study of the paper: train contenders, measure them, write one report."""
    parsed = _parsed(StudyArguments, "pixeldip study", arguments)
    check_flags(parsed)
    from .studies import study_command

    return study_command(parsed)


@dataclass
class SweepArguments(EvaluationOptions):
    """Sample a model with every combination of settings, measure them all on the same seeds, and write one report:
    which guidance, which solver, how many steps. What is in --out already is not measured again."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """A run folder, a saved model folder or a hub id."""
    guidance: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0, 1.5, 2.0, 3.0, 4.0)
    guidance_interval: Annotated[tuple[tuple[Fraction, Fraction], ...], Field(min_length=1)] = ((0.1, 1.0),)
    """One or more pairs, for instance 0 1 0.1 1."""
    solver: Annotated[tuple[Solver, ...], Field(min_length=1)] = ("ab2",)
    evaluations: Annotated[tuple[Positive, ...], Field(min_length=1)] = (20,)
    """Of the network, a guided pair counted as one: as many steps, or half as many of heun."""
    time_shift: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    images: Annotated[int, Field(ge=4)] = 1000
    """Samples of every combination, seeds 0, 1, 2 …; with the reference's classes in its numbers, if it has classes
    of the model's names."""
    label_column: str | None = None
    """Of the reference, as data.label_column."""
    metrics: tuple[str, ...] = ("kid_efficientnet", "fd_mid_efficientnet", "boundary")
    out: Path = Path("runs/sweep")
    """Folder of the numbers and the report."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Precision = "auto"
    compile: bool = False
    """Compile the model's blocks first."""


def sweep(arguments: list[str]) -> int:
    """Find the guidance, solver and number of steps that suit a model."""
    parsed = _parsed(SweepArguments, "pixeldip sweep", arguments)
    check_flags(parsed)
    from .studies import sweep_command

    return sweep_command(parsed)


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


def convert(arguments: list[str]) -> int:
    """Turn an authors' checkpoint into a model folder."""
    parsed = _parsed(ConvertArguments, "pixeldip convert", arguments)
    check_flags(parsed)
    from .convert import convert_checkpoint

    convert_checkpoint(parsed.checkpoint, parsed.out, parsed.weights, parsed.resolution)
    return 0


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


def export(arguments: list[str]) -> int:
    """Write a model's network as a torch.export or ONNX program."""
    parsed = _parsed(ExportArguments, "pixeldip export", arguments)
    check_flags(parsed)
    from .export import export_command

    export_command(parsed)
    return 0


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
    heads: bool = False
    """latency, training, memory: also each other head, and DiT-only, as in Table 2."""
    latent: bool = False
    """latency: also DiT-XL/2 with its VAE, random weights, in 250 steps as in Table 1."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: Path | None = None
    """File for the JSON line; a plot goes beside it."""


def bench(arguments: list[str]) -> int:
    """Measure speed and memory: against the release's way, other heads, and the device's limit."""
    parsed = _parsed(BenchArguments, "pixeldip bench", arguments)
    check_flags(parsed)
    from .bench import bench_command

    bench_command(parsed)
    return 0


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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Precision = "auto"
    max_images: Positive = 16
    """The most images of one request."""
    max_steps: Positive = 250
    max_side: Positive = 1024
    """The largest height or width in pixels."""
    max_queue: Positive = 16
    """Requests that may wait; those beyond are turned away."""


def app(arguments: list[str]) -> int:
    """Open a page to play with models and to follow training."""
    parsed = _parsed(AppArguments, "pixeldip app", arguments)
    check_flags(parsed)
    from .app import app_command

    app_command(parsed)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "study": study,
    "sweep": sweep,
    "convert": convert,
    "export": export,
    "bench": bench,
    "app": app,
}

if __name__ == "__main__":
    sys.exit(main())
