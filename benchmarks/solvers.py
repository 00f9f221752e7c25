"""How far samples are from the solution, by solver and number of evaluations: a table, and one JSON line.

    python benchmarks/solvers.py MODEL [--seeds 0-31] [--guidance 2] [--out FILE]

The solution is Heun's with 1000 steps from the same noise. Errors are root mean squares over all pixels, in grey
levels of 255. Evaluations count a guided pair as one. How good the samples are is for `pixeldip sweep` to say.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from pixeldip.flow import evaluations, steps_within
from pixeldip.processes import Processes
from pixeldip.provenance import environment
from pixeldip.sampling import deal_classes, load_pipeline, parse_seeds

BUDGETS = (5, 10, 20, 50, 100)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--seeds", default="0-31")
    parser.add_argument("--guidance", type=float, default=2.0)
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

    solution = sample(1000, "heun")
    errors: dict[str, dict[int, float]] = {}
    for name in ("euler", "ab2", "heun", *SCHEDULERS):
        solver = None if name in SCHEDULERS else name
        pipeline.scheduler = SCHEDULERS[name]() if solver is None else FlowMatchEulerDiscreteScheduler()
        errors[name] = {}
        for budget in BUDGETS:
            steps = steps_within(name, budget)
            count, samples = evaluations(name, steps), sample(steps, solver)
            errors[name][count] = float(np.sqrt(np.square(samples - solution).mean()))
    asked = {"model": arguments.model, "seeds": arguments.seeds, "guidance": arguments.guidance}
    record = {"benchmark": "solvers", **asked, "rms_error_of_255": errors}
    print("| evaluations | " + " | ".join(map(str, BUDGETS)) + " |\n|" + "---|" * (len(BUDGETS) + 1))
    for name, row in errors.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    line = json.dumps({**record, "environment": environment(Processes(0, 1, device))})
    print(line)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
