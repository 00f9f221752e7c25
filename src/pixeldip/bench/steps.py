"""The steps that benchmarks time: one of guided sampling, and one of training."""

import copy
import functools

import torch
from torch import Tensor, nn

from ..flow import guided_velocity
from ..model import DiP, Int8Linear
from ..processes import autocast
from ..replay import ReplayedNetwork, SolutionNetwork
from ..training.ema import EMA
from ..training.loss import training_loss
from .contenders import Contender, Int8Part
from .timing import Step

GUIDANCE, TIME, DT = 4.0, 0.5, 0.01
STEPS = 100  # of Euler's method, as in Table 1
LR, EMA_DECAY = 1e-4, 0.9999


def noise_and_labels(model: DiP, size: tuple[int, int], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a benchmark's step is given: x (B, C, H, W) and y (B,)."""
    x = torch.randn(batch, model.config.in_channels, *size, device=device)
    return x, torch.zeros(batch, dtype=torch.long, device=device)


def replayed(network: DiP) -> SolutionNetwork:
    """A network as the commands call it, for the `STEPS` of an image.

    What is computed ahead is no part of a step, and stays in memory; the limit counts the weights that it spares.
    """
    return ReplayedNetwork(network).begin([TIME + DT * step for step in range(STEPS)])


def sampling_contender(called: DiP | SolutionNetwork, x: Tensor, y: Tensor, counted: DiP | None = None) -> Contender:
    """A guided Euler step of a network in evaluation mode, one of the `STEPS` of its images.

    Args:
        counted: the same network in plain eager code, if this one's FLOPs cannot be counted.
    """
    network = called.model if isinstance(called, SolutionNetwork) else called
    velocity = guided_velocity(called, y, network.config.num_classes, GUIDANCE)

    @torch.no_grad()
    def step() -> Tensor:
        return x + DT * velocity(x, TIME, TIME)

    def plain(images: int) -> Step:
        return sampling_contender(counted, x[:1].expand(images, -1, -1, -1), y[:1].expand(images)).step

    int8 = _int8_part(network, x)
    parameters = network.num_parameters() + int8.weights
    return Contender(step, len(x), len(x) / STEPS, network.dtype, parameters, plain if counted else None, int8)


def _int8_part(network: DiP, x: Tensor) -> Int8Part:
    """Of a guided step of images x."""
    tokens = 2 * len(x) * x.shape[-2:].numel() // network.config.patch_size**2
    layers = [module for module in network.modules() if isinstance(module, Int8Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return Int8Part(2 * tokens * weights, weights)


class TrainingStep:
    """A model's optimizer and average, and a step of them: step(x, y).

    Args:
        parallel: what is called in the model's place, for instance its DistributedDataParallel.
    """

    def __init__(self, model: DiP, precision: torch.dtype, parallel: nn.Module | None = None):
        self.model, self.precision, self.parallel = model.train(), precision, parallel or model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=model.device.type in ("cpu", "cuda"))
        self.ema, self.steps = EMA(model, EMA_DECAY), 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        noise, t = torch.randn_like(x), torch.rand(len(x), device=x.device)
        with autocast(x.device, self.precision):
            losses = training_loss(self.parallel, self.model.objective, None, x, y, noise, t)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, self.steps)
        self.steps += 1

    def contender(self, x: Tensor, y: Tensor, counted: DiP | None = None) -> Contender:
        """Args: counted: the same model in plain eager code, if this one's FLOPs cannot be counted."""

        def plain(images: int) -> Step:
            eager = TrainingStep(copy.deepcopy(counted).to(x.device), self.precision)
            return functools.partial(eager, x[:images], y[:images])

        step = functools.partial(self, x, y)
        return Contender(step, len(x), len(x), self.precision, self.model.num_parameters(), plain if counted else None)


def counted_apart(compiles: bool, device: torch.device) -> bool:
    """What counts FLOPs does not see into compiled code, and takes more memory than a step that fills a GPU."""
    return compiles or device.type == "cuda"
