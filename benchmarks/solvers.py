"""How far samples are from the solution, by solver and number of evaluations: a table, and one JSON line.

    python benchmarks/solvers.py MODEL [--seeds 0-31] [--guidance 2] [--reference IMAGES] [--out FILE]

The solution is Heun's with 1000 steps from the same noise. Errors are root mean squares over all pixels, in grey
levels of 255. Evaluations count a guided pair as one. How good the samples are is for `pixeldip sweep` to say; with a
reference, diffusers' schedulers, which it does not know, are measured against it here as it measures our solvers.
"""

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from solution import Samples, in_words, rms

from pixeldip.flow import evaluations, steps_within

BUDGETS = (5, 10, 20, 50, 100)
MEASURED = (10, 25, 50)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


def main() -> None:
    samples = Samples(measures=True)
    solution = samples.of(1000, "heun")
    errors: dict[str, dict[int, float]] = {}
    distances: dict[str, dict[int, dict[str, float]]] = {}
    for name in ("euler", "ab2", "heun", *SCHEDULERS):
        solver = None if name in SCHEDULERS else name
        samples.pipeline.scheduler = SCHEDULERS[name]() if solver is None else FlowMatchEulerDiscreteScheduler()
        errors[name] = {}
        for budget in BUDGETS:
            steps = steps_within(name, budget)
            errors[name][evaluations(name, steps)] = rms(samples.of(steps, solver) - solution)
        if samples.evaluator and solver is None:
            distances[name] = {budget: samples.distances(budget, None) for budget in MEASURED}
    print("| evaluations | " + " | ".join(map(str, BUDGETS)) + " |\n|" + "---|" * (len(BUDGETS) + 1))
    for name, row in errors.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    for name, row in distances.items():
        print(f"{name}: " + ", ".join(f"{budget}: {in_words(found)}" for budget, found in row.items()))
    samples.put_out("solvers", rms_error_of_255=errors, distances=distances)


if __name__ == "__main__":
    main()
