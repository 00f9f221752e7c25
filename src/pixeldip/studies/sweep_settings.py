"""What a sweep compares: settings of sampling, each a row of its table."""

import dataclasses
import itertools

from ..arguments import SweepArguments
from ..flow import check_interval, evaluations, steps_within
from ..settings import SamplingSettings


@dataclasses.dataclass(frozen=True)
class Setting:
    """One combination: a row of the table.

    Args:
        evaluations: of the network, a guided pair counted as one.
    """

    solver: str
    evaluations: int
    guidance: float
    interval: tuple[float, float]
    time_shift: float
    backbone_every: int = 1

    @property
    def name(self) -> str:
        interval = "" if self.guidance == 1 else f"-from{self.interval[0]:g}to{self.interval[1]:g}"
        shift = "" if self.time_shift == 1 else f"-shift{self.time_shift:g}"
        every = "" if self.backbone_every == 1 else f"-every{self.backbone_every}"
        return f"{self.solver}-{self.evaluations}-guidance{self.guidance:g}{interval}{shift}{every}"

    @property
    def in_words(self) -> str:
        """As the flags of `pixeldip sample` name it."""
        text = f"{self.solver}, {self.evaluations} evaluations, guidance {self.guidance:g}"
        if self.guidance != 1 and self.interval != (0.0, 1.0):
            text += f" for {self.interval[0]:g} < t < {self.interval[1]:g}"
        text += f", time shift {self.time_shift:g}" if self.time_shift != 1 else ""
        return text + (f", backbone at 1 in {self.backbone_every}" if self.backbone_every != 1 else "")

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            steps=steps_within(self.solver, self.evaluations),
            solver=self.solver,
            guidance=self.guidance,
            guidance_interval=self.interval,
            time_shift=self.time_shift,
            backbone_every=self.backbone_every,
        )


def combinations(arguments: SweepArguments, own: SamplingSettings) -> list[Setting]:
    """Every combination of the values of `SweepArguments`, or else of the model's own, each once: without guidance
    there is no interval, and Heun's solver takes an odd number of evaluations.

    Raises:
        UserError: if an interval is the wrong way round.
    """
    intervals = arguments.guidance_interval or (own.guidance_interval,)
    for interval in intervals:
        check_interval(interval)
    solvers = arguments.solver or (own.solver,)
    counts = arguments.evaluations or (evaluations(own.solver, own.steps),)
    shifts = arguments.time_shift or (own.time_shift,)
    reuses = arguments.backbone_every or (own.backbone_every,)
    found: dict[str, Setting] = {}
    for solver, count, guidance, interval, shift, every in itertools.product(
        solvers, counts, arguments.guidance, intervals, shifts, reuses
    ):
        interval = (0.0, 1.0) if guidance == 1 else tuple(interval)
        asked = Setting(solver, count, guidance, interval, shift, every)
        setting = dataclasses.replace(asked, evaluations=evaluations(solver, asked.sampling.steps))
        found.setdefault(setting.name, setting)
    return list(found.values())
