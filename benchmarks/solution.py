"""What solvers.py and context_reuse.py share: samples of a model's seeds, their distance to the solution, a record."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pixeldip.processes import Processes
from pixeldip.provenance import environment
from pixeldip.sampling import deal_classes, load_pipeline, parse_seeds


class Samples:
    """Of the model, seeds and guidance that the command line asks for, guided at every step."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("model")
        parser.add_argument("--seeds", default="0-31")
        parser.add_argument("--guidance", type=float, default=2.0)
        parser.add_argument("--out", type=Path)
        self.asked = parser.parse_args()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline = load_pipeline(self.asked.model, self.device)
        self.seeds = parse_seeds(self.asked.seeds)
        self.classes = deal_classes(range(self.pipeline.model.config.num_classes), len(self.seeds), None)

    def of(self, steps: int, solver: str | None) -> np.ndarray:
        """In grey levels of 255, about 0; without a solver the pipeline's scheduler is followed."""
        how = {"num_inference_steps": steps, "solver": solver, "guidance_scale": self.asked.guidance}
        x = self.pipeline(
            self.classes, seeds=self.seeds, guidance_interval=(0.0, 1.0), output_type="latent", **how
        ).images
        return x.clamp(-1, 1).cpu().numpy() * 127.5

    def put_out(self, benchmark: str, errors: Mapping[str, Mapping]) -> None:
        """Prints the JSON line, and writes it where --out says."""
        asked = {"model": self.asked.model, "seeds": self.asked.seeds, "guidance": self.asked.guidance}
        made_by = environment(Processes(0, 1, self.device))
        line = json.dumps({"benchmark": benchmark, **asked, "rms_error_of_255": errors, "environment": made_by})
        print(line)
        if self.asked.out:
            self.asked.out.write_text(line + "\n", encoding="utf-8")


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.square(difference).mean()))
