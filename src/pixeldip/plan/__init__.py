"""A training on paper: parameters, memory, FLOPs, time, cost and disk, before anything is started."""

import json
from typing import Any

from rich.console import Console

from ..recipe import Recipe
from .figures import Plan, Row, plan
from .report import record, show

__all__ = ["Plan", "Row", "plan", "plan_command"]


def plan_command(recipe: Recipe, options: Any) -> None:
    """What `pixeldip train --plan` does with its `PlanOptions`: a table, and one line of JSON.

    Raises:
        UserError: if the recipe cannot be trained, or the device is not known.
    """
    planned = plan(
        recipe,
        options.plan_devices,
        options.plan_device,
        options.plan_utilisation,
        options.plan_price,
        options.plan_classes,
    )
    show(planned, Console())
    print(json.dumps(record(planned)))
