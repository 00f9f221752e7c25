"""The command line. Each command parses its flags here (`arguments`) and imports what it needs only then."""

import contextlib
import difflib
import errno
import io
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

INTERRUPTED = 130  # what shells call a command ended by Ctrl-C
BROKEN_PIPE = 141
_DISKS_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
T = TypeVar("T")
_KINDS = {"{None}|": "", "{": "", "}": "", " ": " and ", "|": " or ", "INT": "a whole number", "FLOAT": "a number"}
"""tyro's signs for what a flag takes, and what they mean."""

try:
    import tyro

    from .arguments import (
        AppArguments,
        BenchArguments,
        ConvertArguments,
        DemoArguments,
        EvaluateArguments,
        ExportArguments,
        ReferenceArguments,
        SampleArguments,
        StudyArguments,
        SweepArguments,
        TrainArguments,
    )
    from .errors import UserError
    from .heap import keep_freed_memory
    from .recipe import ModelSection, load_recipe, parse_recipe, recipe_values
    from .settings import PlanOptions, check_flags, check_values
    from .terminal import PlainConsole, drop_output, printable, say
except KeyboardInterrupt:  # these take a moment, in which nothing has begun
    sys.exit(INTERRUPTED)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted,
    141 when nobody reads the output any more."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        try:
            return _run(*argv)
        finally:
            sys.stdout.flush()  # here, where what keeps it from being written can be told
    except UserError as error:
        _tell(argv[0], str(error))
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # what reads our output, such as head, has seen enough
        drop_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in _DISKS_FAULTS:
            raise
        drop_output()
        _tell(argv[0], f"{error.filename or 'what it writes to'}: {error.strerror}")
        return 2


def _run(name: str, *arguments: str) -> int:
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        from . import __version__

        print(f"pixeldip {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"perhaps {near[0]}" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"no command {name!r}; {hint}")
    keep_freed_memory()
    return COMMANDS[name](list(arguments)) or 0


def _tell(name: str, mistake: str) -> None:
    PlainConsole(stderr=True).print(f"pixeldip {name}: ", style="bold red", end="")
    print(printable(mistake), file=sys.stderr)


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


def _checked(kind: type[T], prog: str, arguments: list[str]) -> T:
    """As `_parsed`, and as `check_flags` checks them."""
    parsed = _parsed(kind, prog, arguments)
    check_flags(parsed)
    return parsed


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
    parsed = _checked(DemoArguments, "pixeldip demo", arguments)
    from .demo import run_demo

    return run_demo(parsed)


def train(arguments: list[str]) -> int:
    """Train a model, or resume its run: pixeldip train [RECIPE.yaml] [--section.key value]."""
    positional = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    default = load_recipe(positional[0]) if positional else load_recipe("my-images")
    if _given("--model.pretrained", arguments):  # a whole network takes the place of the recipe's sizes
        adapters = {"lora_rank": default.model.lora_rank, "lora_alpha": default.model.lora_alpha}
        default.model = ModelSection(**adapters)
    elif _given("--model.preset", arguments):
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
        from .plan.commands import plan_command

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


def _given(flag: str, arguments: list[str]) -> bool:
    """Whether a flag has a value other than None."""
    words = itertools.chain.from_iterable(argument.split("=", 1) for argument in arguments)
    return any(word == flag and value != "None" for word, value in itertools.pairwise([*words, "None"]))


def sample(arguments: list[str]) -> None:
    """Sample images from a trained model into a folder or an .npz file."""
    parsed = _checked(SampleArguments, "pixeldip sample", arguments)
    from .sampling.commands import sample_command

    sample_command(parsed)


def evaluate(arguments: list[str]) -> None:
    """Measure samples: FID, sFID, Inception Score, precision, recall and more; make reference files."""
    if arguments[:1] == ["reference"]:
        parsed = _checked(ReferenceArguments, "pixeldip evaluate reference", arguments[1:])
        from .evaluation.commands import reference_command

        reference_command(parsed)
    else:
        parsed = _checked(EvaluateArguments, "pixeldip evaluate", arguments)
        from .evaluation.commands import evaluate_command

        evaluate_command(parsed)


def study(arguments: list[str]) -> int:
    """Repeat a study of the paper: train contenders, measure them, write one report."""
    parsed = _checked(StudyArguments, "pixeldip study", arguments)
    from .studies import study_command

    return study_command(parsed)


def sweep(arguments: list[str]) -> int:
    """Find the guidance, solver and number of steps that suit a model."""
    parsed = _checked(SweepArguments, "pixeldip sweep", arguments)
    from .studies import sweep_command

    return sweep_command(parsed)


def convert(arguments: list[str]) -> None:
    """Turn an authors' checkpoint into a model folder."""
    parsed = _checked(ConvertArguments, "pixeldip convert", arguments)
    from .convert import convert_checkpoint

    convert_checkpoint(parsed.checkpoint, parsed.out, parsed.weights, parsed.resolution)


def export(arguments: list[str]) -> None:
    """Write a model's network as a torch.export or ONNX program."""
    parsed = _checked(ExportArguments, "pixeldip export", arguments)
    from .export import export_command

    export_command(parsed)


def bench(arguments: list[str]) -> None:
    """Measure speed and memory: against the release's way, other heads, and the device's limit."""
    parsed = _checked(BenchArguments, "pixeldip bench", arguments)
    from .bench.commands import bench_command

    bench_command(parsed)


def app(arguments: list[str]) -> None:
    """Open a page to play with models and to follow training."""
    parsed = _checked(AppArguments, "pixeldip app", arguments)
    from .app.commands import app_command

    app_command(parsed)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
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
