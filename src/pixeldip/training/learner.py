"""What learns: a network with its average and its optimizer, and one step of them."""

import contextlib
import functools
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import Batch
from ..images import from_uint8
from ..model import DiP
from ..processes import Processes, autocast, choose_precision
from ..recipe import Recipe, image_size
from .alignment import AlignedDiP, load_alignment
from .devices import peak_flops
from .divergence import Watch, spreading
from .ema import EMA
from .flops import training_flops
from .loss import training_loss
from .preparation import seeded_initialisation
from .schedule import draw, learning_rate
from .sharding import is_sharded, shard, whole_tensor


class Learner:
    """A model in training, on its device, sharded if the recipe says so. All processes call its methods.

    Attributes:
        model: what was given, trained in place.
        network: what is trained: the model, or the model and its alignment's projector around it.
        ema: the model's average.
        flops: of one image's forward and backward pass; None where the device's peak is not known.

    Raises:
        UserError: if the alignment's encoder cannot be had.
    """

    def __init__(self, recipe: Recipe, model: DiP, processes: Processes):
        training = recipe.training
        self.recipe, self.model, self.processes = recipe, model, processes
        self.precision = choose_precision(training.precision, processes.device)
        if training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.network: DiP | AlignedDiP = model
        self.alignment = None
        if recipe.alignment.weight:
            self.alignment = load_alignment(recipe.alignment, model.config.patch_size, processes)
            with seeded_initialisation(training.seed, 1):
                self.network = AlignedDiP(model, recipe.alignment, self.alignment.width)
        self.ema = EMA(model, training.ema_decay)
        self.flops = training_flops(model, *image_size(recipe.data)) if peak_flops(processes.device) else None
        for part in (self.network, self.ema.model):
            if training.shard and processes.world_size > 1:
                shard(part, processes, self.precision)
            else:
                part.to(processes.device)
        self.network.train()
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.network.parameters() if parameter.requires_grad],
            lr=recipe.optimizer.lr,
            betas=recipe.optimizer.betas,
            weight_decay=recipe.optimizer.weight_decay,
            fused=processes.device.type in ("cpu", "cuda"),
        )

    @functools.cached_property
    def _parallel(self) -> nn.Module:
        """The network as it is stepped: its parts compiled, its gradients averaged over the processes."""
        network = self.network
        if self.recipe.training.compile:
            self.model.compile_repeated_blocks()
        if self.processes.world_size == 1 or is_sharded(self.network):
            return network
        torch._dynamo.config.optimize_ddp = False  # which cuts compiled blocks where buckets of gradients end
        return DistributedDataParallel(network)

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, step: int, batches: Iterable[Batch], watch: Watch) -> None:
        """One step of the optimizer (from 0), on `training.gradient_accumulation` batches, and one of the average."""
        recipe, parts = self.recipe, self.recipe.training.gradient_accumulation
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe.optimizer, step, recipe.training.steps)
        for part, batch in enumerate(batches, 1):
            with self._averaging(part == parts):
                x = from_uint8(batch.images.to(self.processes.device, non_blocking=True))
                classes, seed = self.model.config.num_classes, recipe.training.seed
                y, noise, t = draw(recipe.flow, self.model.objective, batch, x, classes, seed)
                with autocast(self.processes.device, self.precision):
                    losses = training_loss(self._parallel, self.model.objective, self.alignment, x, y, noise, t)
                (spreading(losses["loss"]) / parts).backward()
            watch.part(losses)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.optimizer.gradient_clip or math.inf)
        watch.step(step, self.optimizer, whole_tensor(norm))
        self.optimizer.zero_grad()
        self.ema.update(self.model, step)

    def _averaging(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes average their gradients once, in the last part of a step."""
        if is_sharded(self.network):
            self.network.set_requires_gradient_sync(last)
        elif self.processes.world_size > 1 and not last:
            return self._parallel.no_sync()
        return contextlib.nullcontext()
