"""A plan for people, and for programs."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..provenance import made_by
from ..recipe import image_size, recipe_values
from ..terminal import clock, say, warn
from ..training.devices import DEVICES
from .figures import USABLE, Plan, Row, gb

ALWAYS_SAID = (
    "images: of one pass on each device; GB: the most that a device holds; TFLOP: of a step, on all devices",
    "memory: of eager code with fused attention and norms, on tensors without data; compiled code holds less",
    "not in it: communication between devices, reading images, previews, evaluations, writing checkpoints",
)


def show(plan: Plan, console: Console) -> None:
    """Prints the plan as sentences, a table of one row per number of devices, warnings, and what was assumed."""
    training, options, checkpoint = plan.recipe.training, plan.options, plan.checkpoint
    published = DEVICES[options.device]
    height, width = image_size(plan.recipe.data)
    how = [plan.precision]
    how += ["with gradient checkpointing"] if training.gradient_checkpointing else []
    how += [f"{training.gradient_accumulation} passes per step"] if training.gradient_accumulation > 1 else []
    lines = [
        f"parameters: {_listed({name: count / 1e6 for name, count in plan.parameters.items()})} million",
        f"{training.steps} steps of {training.batch_size} images of {height}x{width}, {', '.join(how)}",
        f"{options.device}: {published.flops / 1e12:.0f} TFLOP/s in its data sheet, of which a step reaches "
        f"{options.utilisation:.0%}; {published.memory / 1e9:.0f} GB, of which {USABLE:.0%} are usable",
    ]
    state = next((row.state for row in reversed(plan.rows) if row.state), None)
    if state:
        each = _listed({name: size / 1e9 for name, size in state.items()})
        lines.append(f"on each device throughout: {each}, together {gb(sum(state.values()))}")
    whole, average, disk = (gb(size) for size in (checkpoint.whole, checkpoint.pipeline, checkpoint.on_disk))
    lines.append(
        f"a checkpoint: {whole}, of which the average is {average}; on disk up to {disk}, "
        f"the last {training.keep_last} and the one being written"
    )
    for line in lines:
        say(console, line)
    console.print(_table(plan))
    for row in plan.rows:
        if row.warning:
            warn(console, row.warning)
    for note in (*plan.notes, *ALWAYS_SAID):
        say(console, f"- {note}")


def _table(plan: Plan) -> Table:
    columns = ["devices", "images", "GB", "TFLOP", "s/step", "images/s", "h:mm:ss", "device h"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns + (["cost"] if plan.options.price is not None else []):
        table.add_column(column, justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(*_cells(row, plan), style="yellow" if row.warning else None)
    return table


def _cells(row: Row, plan: Plan) -> list[str]:
    cells = [f"{row.devices}"]
    if row.images is None:
        return cells
    cells += [f"{row.images}", f"{row.memory / 1e9:.1f}", f"{row.flops / 1e12:.4g}"]
    if row.seconds is not None:
        rate = plan.recipe.training.batch_size / row.seconds
        cells += [f"{row.seconds:.2g}", f"{rate:.0f}", clock(row.run_seconds), _amount(row.device_hours)]
    return cells + ([_amount(row.cost)] if row.cost is not None else [])


def record(plan: Plan) -> dict[str, Any]:
    """The plan in plain types, for one line of JSON."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {
        **values,
        "recipe": recipe_values(plan.recipe),
        "options": dataclasses.asdict(plan.options),
        "checkpoint": dataclasses.asdict(plan.checkpoint),
        "rows": [{**dataclasses.asdict(row), "memory": row.memory} for row in plan.rows],
        "environment": made_by(),
    }


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


def _amount(value: float) -> str:
    """Whole, or a small one in two digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
