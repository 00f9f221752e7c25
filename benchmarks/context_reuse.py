"""What reusing the global context costs, the backbone run at some evaluations only and the head at each: tables, and
one JSON line.

    python benchmarks/context_reuse.py MODEL [--seeds 0-31] [--guidance 2] [--reference IMAGES] [--out FILE]

Rows have as many evaluations of the backbone whatever the way, so that the head's are given for free: reuse earns its
place only where it is well ahead of "every". "2" and "4" run the backbone at every second or fourth evaluation.
"placed", too, has four times as many evaluations as of the backbone, which it runs where the tokens have changed by the
same amount since: by their true change at every evaluation, found with eight seeds before. An estimate could only
approach that. In between the tokens are "held" as they were, or "extrapolated" on the line through the last two.

Errors are root mean squares over all pixels, in grey levels of 255, from Heun's solution with 500 steps. With a
reference: distances to it, as `pixeldip sweep` measures them; `ancestral` has no solution to be far from.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
from solution import Samples, in_words, rms
from torch import Tensor, nn

BUDGETS = (10, 25, 50)
WAYS = {
    "every": (1, "held", False),
    "2, held": (2, "held", False),
    "2, extrapolated": (2, "extrapolated", False),
    "4, held": (4, "held", False),
    "4, extrapolated": (4, "extrapolated", False),
    "placed, held": (4, "held", True),
    "placed, extrapolated": (4, "extrapolated", True),
}
PROBED = 8


class ReusingBackbone(nn.Module):
    """A backbone that computes at some of every `calls` calls, and in between puts out tokens from the last of them.

    Args:
        computed: which ones, from 0, the first of them included.
    """

    def __init__(self, backbone: nn.Module, calls: int, computed: Collection[int], way: str):
        super().__init__()
        self.backbone, self.calls, self.computed, self.way = backbone, calls, set(computed), way
        self.patch_embed = backbone.patch_embed
        self.done, self.kept = 0, []
        self.changes: list[float] = []

    def forward(self, patches: Tensor, t: Tensor, y: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
        now, call = t[0].item(), self.done % self.calls
        self.done += 1
        if call == 0:
            self.kept = []
        if call in self.computed:
            s, time, c = self.backbone(patches, t, y, *rest)
            if self.kept:
                self.changes.append(((s - self.kept[-1][1]).norm() / s.norm()).item())
            self.kept = [*self.kept, (now, s)][-2:]
            return s, time, c
        time, c = self.backbone.conditions(t, y)
        (t1, s), earlier = self.kept[-1], self.kept[:-1]
        if self.way == "extrapolated" and earlier:
            ((t0, s0),) = earlier
            s = s + (now - t1) / (t1 - t0) * (s - s0)
        return s, time, c


class Reuse:
    """Reuses a pipeline's context in turn in several ways."""

    def __init__(self, samples: Samples):
        self.samples, self.model = samples, samples.pipeline.model
        self.backbone = self.model.backbone

    @contextmanager
    def of(self, way: str, budget: int, solver: str) -> Iterator[int]:
        """In here the samples run their backbone so many times, in the steps that this gives."""
        every, filled, placed = WAYS[way]
        calls = budget * every
        computed = self._placed(budget, calls, solver) if placed else range(0, calls, every)
        self.model.backbone = ReusingBackbone(self.backbone, calls, computed, filled)
        yield calls
        self.model.backbone = self.backbone

    def _placed(self, budget: int, calls: int, solver: str) -> list[int]:
        """Calls between which the tokens change by the same amount."""
        probe = self.model.backbone = ReusingBackbone(self.backbone, calls, range(calls), "held")
        self.samples.of(calls, solver, PROBED)
        changed = np.concatenate([[0], np.cumsum(probe.changes)])
        marks = np.arange(budget) / budget * changed[-1]
        placed = np.searchsorted(changed, marks)
        for i in range(1, budget):  # each at a call of its own
            placed[i] = max(placed[i], placed[i - 1] + 1)
        return np.minimum(placed, calls - budget + np.arange(budget)).tolist()


def main() -> None:
    samples = Samples(measures=True)
    samples.pipeline.disable_precomputed_modulation()  # and graphs: a `ReusingBackbone` does not do the same every time
    reuse, solution = Reuse(samples), samples.of(500, "heun")
    head = "| solver | evaluations of the backbone | " + " | ".join(WAYS) + " |\n|" + "---|" * (len(WAYS) + 2)
    errors: dict[str, dict[int, dict[str, float]]] = {"euler": {}, "ab2": {}}
    print(head)
    for solver, by_budget in errors.items():
        for budget in BUDGETS:
            by_budget[budget] = {}
            for way in WAYS:
                with reuse.of(way, budget, solver) as steps:
                    by_budget[budget][way] = rms(samples.of(steps, solver) - solution)
            print(f"| {solver} | {budget} | " + " | ".join(f"{e:.2f}" for e in by_budget[budget].values()) + " |")
    distances: dict[str, dict[int, dict[str, dict[str, float]]]] = {"ancestral": {}, "ab2": {}}
    if samples.evaluator:
        print(head)
        for solver, by_budget in distances.items():
            for budget in BUDGETS[:1]:
                by_budget[budget] = {}
                for way in WAYS:
                    with reuse.of(way, budget, solver) as steps:
                        by_budget[budget][way] = samples.distances(steps, solver)
                print(f"| {solver} | {budget} | " + " | ".join(map(in_words, by_budget[budget].values())) + " |")
    samples.put_out("context_reuse", rms_error_of_255=errors, distances=distances)


if __name__ == "__main__":
    main()
