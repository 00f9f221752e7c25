"""What a study compares: contenders, each a change to one recipe, and what the paper found."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..recipe import Recipe, parse_recipe, recipe_values

Scale = Literal["laptop", "gpu", "paper"]


@dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    Args:
        name: for folders and commands.
        label: for people.
        model: keys of the recipe's model section that this contender changes.
        paper: what the paper measured for it on ImageNet, by column of its table.
    """

    name: str
    label: str
    model: Mapping[str, Any]
    paper: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper as something to run.

    Args:
        question: what it asks.
        source: the paper's table or figure.
        finding: the paper's answer.
        contenders: its rows, at a scale.
        data: keys of the recipe's data section that it changes, by scale.
    """

    name: str
    title: str
    question: str
    source: str
    finding: str
    contenders: Callable[[Scale], tuple[Contender, ...]]
    data: Mapping[Scale, Mapping[str, Any]] = field(default_factory=dict)


def changed(recipe: Recipe, section: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some keys of a section changed, checked like any other."""
    values = recipe_values(recipe)
    return parse_recipe({**values, section: {**values[section], **changes}}, where=f"study, {section}")


def contender_recipe(base: Recipe, contender: Contender, seed: int, out: str) -> Recipe:
    """What one run of a comparison trains."""
    recipe = changed(base, "model", contender.model)
    recipe.training = dataclasses.replace(recipe.training, seed=seed)
    recipe.out = out
    return recipe
