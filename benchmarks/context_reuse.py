"""What reusing the global context costs, the backbone run at every k-th evaluation: a table, and one JSON line.

    python benchmarks/context_reuse.py MODEL [--seeds 0-31] [--guidance 2] [--out FILE]

Errors are root mean squares over all pixels, in grey levels of 255, from Heun's solution with 500 steps. A row has as
many evaluations of the backbone whatever k is, so that the head's are given for free: reuse earns its place only
where its error is well below that of k = 1. "held" keeps the tokens as they were, "extrapolated" continues the line
through the last two.
"""

import torch.nn.functional as F
from solution import Samples, rms
from torch import Tensor, nn

BUDGETS = (10, 20, 50)
WAYS = ((1, "held"), (2, "held"), (2, "extrapolated"), (4, "held"), (4, "extrapolated"))


class ReusingBackbone(nn.Module):
    """A backbone that computes at every `every`-th call, and in between puts out tokens from the last calls."""

    def __init__(self, backbone: nn.Module, every: int, way: str):
        super().__init__()
        self.backbone, self.every, self.way = backbone, every, way
        self.patch_embed = backbone.patch_embed
        self.calls, self.kept = 0, []

    def forward(self, patches: Tensor, t: Tensor, y: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
        now, computes = t[0].item(), self.calls % self.every == 0
        self.calls += 1
        if computes:
            s, time, c = self.backbone(patches, t, y, *rest)
            self.kept = [*self.kept, (now, s)][-2:]
            return s, time, c
        time = self.backbone.time_embed(t).repeat(len(y), 1)
        c = F.silu(time + self.backbone.class_embed(y).flatten(0, 1))
        (t1, s), earlier = self.kept[-1], self.kept[:-1]
        if self.way == "extrapolated" and earlier:
            ((t0, s0),) = earlier
            s = s + (now - t1) / (t1 - t0) * (s - s0)
        return s, time, c


def main() -> None:
    samples = Samples()
    pipeline, backbone = samples.pipeline, samples.pipeline.model.backbone
    solution = samples.of(500, "heun")
    pipeline.disable_precomputed_modulation()  # and graphs: a `ReusingBackbone` does not do the same at every call
    errors: dict[str, dict[int, dict[str, float]]] = {"euler": {}, "ab2": {}}
    names = [f"k = {every}" + (f", {way}" if every > 1 else "") for every, way in WAYS]
    print("| solver | evaluations of the backbone | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
    for solver, by_budget in errors.items():
        for budget in BUDGETS:
            by_budget[budget] = {}
            for name, (every, way) in zip(names, WAYS):
                pipeline.model.backbone = ReusingBackbone(backbone, every, way)
                by_budget[budget][name] = rms(samples.of(budget * every, solver) - solution)
            print(f"| {solver} | {budget} | " + " | ".join(f"{e:.2f}" for e in by_budget[budget].values()) + " |")
    samples.put_out("context_reuse", errors)


if __name__ == "__main__":
    main()
