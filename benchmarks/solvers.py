"""How far samples are from the solution, by solver and number of evaluations: a table, and one JSON line.

    python benchmarks/solvers.py MODEL [--seeds 0-31] [--guidance 2] [--reference IMAGES] [--out FILE]

The solution is Heun's with 500 steps, 999 evaluations, from the same noise. Errors are root mean squares over all
pixels, in grey levels of 255, with times evenly spaced and with more of them near the noise (`time_shift`). Evaluations
count a guided pair as one. How good the samples are is for `pixeldip sweep` to say; with a reference, diffusers'
schedulers, which it does not know, are measured against it here as it measures our solvers.
"""

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from solution import Samples, in_words, rms

from pixeldip.flow import evaluations, steps_within

BUDGETS = (5, 10, 20, 50, 100)
SHIFTS = (1, 3)
MEASURED = (10, 25, 50)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "UniPC": lambda shift: UniPCMultistepScheduler(flow_shift=shift, **FLOW),
    "DPM-Solver++": lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
}


def main() -> None:
    samples = Samples(measures=True)
    solution = samples.of(500, "heun")
    errors: dict[str, dict[int, dict[int, float]]] = {}
    distances: dict[str, dict[int, dict[str, float]]] = {}
    print("| evaluations | " + " | ".join(map(str, BUDGETS)) + " |\n|" + "---|" * (len(BUDGETS) + 1))
    for name in ("euler", "ab2", "heun", *SCHEDULERS):
        solver = None if name in SCHEDULERS else name
        errors[name] = {}
        for shift in SHIFTS:
            if not solver:
                samples.pipeline.scheduler = SCHEDULERS[name](shift)
            found = errors[name][shift] = {}
            for budget in BUDGETS:
                steps = steps_within(solver, budget) if solver else budget
                count = evaluations(solver, steps) if solver else budget
                found[count] = rms(samples.of(steps, solver, time_shift=shift if solver else 1) - solution)
            shifted = f", shift {shift}" if shift != 1 else ""
            print(f"| {name}{shifted} | " + " | ".join(f"{error:.2f}" for error in found.values()) + " |", flush=True)
        if samples.evaluator and solver is None:
            samples.pipeline.scheduler = SCHEDULERS[name](1)
            distances[name] = {budget: samples.distances(budget, None) for budget in MEASURED}
            print(f"{name}: " + ", ".join(f"{budget}: {in_words(found)}" for budget, found in distances[name].items()))
    samples.put_out("solvers", rms_error_of_255=errors, distances=distances)


if __name__ == "__main__":
    main()
