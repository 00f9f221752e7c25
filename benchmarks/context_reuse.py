"""What reusing the global context costs, the backbone run at every k-th evaluation: a table, and one JSON line.

    python benchmarks/context_reuse.py MODEL [--seeds 0-31] [--guidance 2] [--out FILE]

Errors are root mean squares over all pixels, in grey levels of 255, from Heun's solution with 500 steps. A row has as
many evaluations of the backbone whatever k is, so that the head's are given for free: reuse earns its place only
where its error is well below that of k = 1. "held" keeps the tokens as they were, "extrapolated" continues the line
through the last two.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixeldip.processes import Processes
from pixeldip.provenance import environment
from pixeldip.sampling import deal_classes, load_pipeline, parse_seeds

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
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--seeds", default="0-31")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(arguments.model, device)
    backbone, seeds = pipeline.model.backbone, parse_seeds(arguments.seeds)
    classes = deal_classes(range(pipeline.model.config.num_classes), len(seeds), None)

    def sample(steps: int, solver: str) -> np.ndarray:
        how = {"num_inference_steps": steps, "solver": solver, "guidance_scale": arguments.guidance}
        x = pipeline(classes, seeds=seeds, guidance_interval=(0.0, 1.0), output_type="latent", **how).images
        return x.clamp(-1, 1).cpu().numpy() * 127.5

    solution = sample(500, "heun")
    errors: dict[str, dict[int, dict[str, float]]] = {"euler": {}, "ab2": {}}
    names = [f"k = {every}" + (f", {way}" if every > 1 else "") for every, way in WAYS]
    print("| solver | evaluations of the backbone | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
    for solver, by_budget in errors.items():
        for budget in BUDGETS:
            by_budget[budget] = {}
            for name, (every, way) in zip(names, WAYS):
                pipeline.model.backbone = ReusingBackbone(backbone, every, way)
                difference = sample(budget * every, solver) - solution
                by_budget[budget][name] = float(np.sqrt(np.square(difference).mean()))
            print(f"| {solver} | {budget} | " + " | ".join(f"{e:.2f}" for e in by_budget[budget].values()) + " |")
    asked = {"model": arguments.model, "seeds": arguments.seeds, "guidance": arguments.guidance}
    record = {"benchmark": "context_reuse", **asked, "rms_error_of_255": errors}
    line = json.dumps({**record, "environment": environment(Processes(0, 1, device))})
    print(line)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
