"""How far samples are from the solution, by solver and number of evaluations: a table, and one JSON line.

    python benchmarks/solvers.py MODEL [--seeds 0-31] [--guidance 2] [--reference SOURCE] [--out FILE]

The solution is Heun's with 1000 steps from the same noise. Errors are root mean squares over all pixels, in grey
levels of 255. With a reference, also the kernel distance (times 1000) of EfficientNet-Lite0 features between samples
and those images, and of the solution, beside that of its two halves. Evaluations count a guided pair as one.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from pixeldip.data import open_source
from pixeldip.evaluation import ArrayImages
from pixeldip.evaluation.extractors import load_extractor
from pixeldip.evaluation.image_sets import SourceImages
from pixeldip.evaluation.metrics import kernel_distance
from pixeldip.evaluation.stream import measure
from pixeldip.flow import evaluations
from pixeldip.processes import Processes
from pixeldip.provenance import environment
from pixeldip.recipe import DataSection
from pixeldip.sampling import deal_classes, load_pipeline, parse_seeds

BUDGETS = (5, 10, 20, 50, 100)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


class Features:
    """EfficientNet-Lite0 features of images."""

    def __init__(self, device: torch.device):
        self.processes, self.extractor = Processes(0, 1, device), load_extractor("efficientnet", device)

    def of_source(self, source: str, side: int) -> torch.Tensor:
        return self._of(SourceImages(open_source(DataSection(source=source)), source, (side, side)))

    def of_samples(self, samples: np.ndarray) -> torch.Tensor:
        """Of (B, C, H, W) in grey levels from -127.5."""
        pixels = (samples + 127.5).round().astype(np.uint8)
        return self._of(ArrayImages(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))))

    def _of(self, images: ArrayImages | SourceImages) -> torch.Tensor:
        return measure(images, [self.extractor], self.processes).kept["efficientnet", "pool"]


def show(what: str, rows: dict[str, dict[int, float]]) -> None:
    print(f"| {what} at evaluations | " + " | ".join(map(str, BUDGETS)) + " |\n|" + "---|" * (len(BUDGETS) + 1))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--seeds", default="0-31")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--reference", default="")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(arguments.model, device)
    seeds = parse_seeds(arguments.seeds)
    classes = deal_classes(range(pipeline.model.config.num_classes), len(seeds), None)

    def sample(steps: int, solver: str | None) -> np.ndarray:
        how = {"num_inference_steps": steps, "solver": solver, "guidance_scale": arguments.guidance}
        x = pipeline(classes, seeds=seeds, guidance_interval=(0.0, 1.0), output_type="latent", **how).images
        return x.clamp(-1, 1).cpu().numpy() * 127.5

    features = Features(device) if arguments.reference else None
    real = features.of_source(arguments.reference, pipeline.config.height) if features else None

    def distance(samples: np.ndarray) -> float:
        return 1000 * kernel_distance(features.of_samples(samples), real)

    solution = sample(1000, "heun")
    errors: dict[str, dict[int, float]] = {}
    distances: dict[str, dict[int, float]] = {}
    for name in ("euler", "ab2", "heun", *SCHEDULERS):
        solver = None if name in SCHEDULERS else name
        pipeline.scheduler = SCHEDULERS[name]() if solver is None else FlowMatchEulerDiscreteScheduler()
        errors[name], distances[name] = {}, {}
        for budget in BUDGETS:
            steps = (budget + 1) // 2 if name == "heun" else budget
            count, samples = evaluations(name, steps), sample(steps, solver)
            errors[name][count] = float(np.sqrt(np.square(samples - solution).mean()))
            if features:
                distances[name][count] = distance(samples)
    asked = {"model": arguments.model, "seeds": arguments.seeds, "guidance": arguments.guidance}
    record = {"benchmark": "solvers", **asked, "rms_error_of_255": errors}
    show("error", errors)
    if features:
        show("distance", distances)
        middle = len(solution) // 2
        halves = [features.of_samples(half) for half in (solution[:middle], solution[middle:])]
        floor = {"solution": distance(solution), "halves_of_the_solution": 1000 * kernel_distance(*halves)}
        print(", ".join(f"{name.replace('_', ' ')}: {value:.1f}" for name, value in floor.items()))
        record |= {"reference": arguments.reference, "kernel_distance_x1000": distances, **floor}
    line = json.dumps({**record, "environment": environment(Processes(0, 1, device))})
    print(line)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
