"""The studies by name, and which flags each has."""

import dataclasses
import difflib
from pathlib import Path

from ..arguments import StudyArguments
from ..errors import UserError
from ..settings import refuse_flags
from ..terminal import PlainConsole
from .comparison import Comparison, measure_contender, prepare_measures, run_comparison
from .comparison_report import write_report
from .comparisons import COMPARISONS
from .features import FEATURES, FILE, check_installed, measure_features, write_features_report
from .folder import SAMPLES
from .overfit import OVERFIT, run_overfit
from .study import Study

STUDIES: dict[str, Study] = {**COMPARISONS, OVERFIT.name: OVERFIT, FEATURES.name: FEATURES}

COMPARED = ("recipe", "data", "split", "held_out", "held_out_split", "reference", "contenders", "seeds", "images")
"""Flags of the studies that compare on a set of images; overfit has none."""
OVERFITTED = ("image", "resolution")
"""Flags of overfit alone."""
MEASURED = ("reference", "images")
"""Flags about samples, of which features measures none."""
FOREIGN = {OVERFIT.name: COMPARED, FEATURES.name: OVERFITTED + MEASURED}
"""Flags that mean nothing to a study; to the others, those of overfit."""


def study_command(arguments: StudyArguments) -> int:
    """What `pixeldip study` does. Returns the exit status.

    Raises:
        UserError: for every mistake in the arguments or files.
    """
    name = arguments.name
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1)
        raise UserError(f"no study {name!r}; " + (f"perhaps {near[0]}" if near else f"there are {', '.join(STUDIES)}"))
    refuse_flags(arguments, FOREIGN.get(name, OVERFITTED), f"means nothing to the {name} study; leave it out")
    out = arguments.out or Path("runs") / f"study-{name}-{arguments.scale}"
    arguments, console = dataclasses.replace(arguments, out=out), PlainConsole()
    if name == OVERFIT.name:
        return run_overfit(arguments, console)
    comparison = Comparison(measure_contender, write_report, SAMPLES, prepare_measures, with_costs=True)
    if name == FEATURES.name:
        check_installed()
        comparison = Comparison(measure_features, write_features_report, FILE, needs_classes=True)
    return run_comparison(STUDIES[name], comparison, arguments, console)
