"""From a recipe and flags to a plan, printed."""

import json

from ..recipe import Recipe
from ..settings import PlanOptions
from ..terminal import PlainConsole
from .figures import plan
from .report import record, show


def plan_command(recipe: Recipe, options: PlanOptions) -> None:
    """What `pixeldip train --plan` does: a table, and one line of JSON.

    Raises:
        UserError: if the recipe cannot be trained, or the device is not known.
    """
    console = PlainConsole()
    with console.status("counting"):
        planned = plan(recipe, options)
    show(planned, console)
    print(json.dumps(record(planned)))
