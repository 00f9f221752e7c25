"""One training step on tensors that have sizes and no data: its FLOPs, and the bytes it holds.

B images of one forward and backward pass.
"""

import contextlib
import functools
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..bench.timing import count_flops
from ..model import DiP
from ..model.layers import Attention, RMSNorm
from ..processes import autocast
from ..recipe import Recipe, image_size
from ..training.alignment import AlignedDiP, Alignment
from ..training.loss import training_loss
from ..training.pretrained import add_adapters

CPU = torch.device("cpu")
FEW, MORE = 2, 3  # images of the two passes that tell what is fixed from what each image adds; 1 is a special shape


class PaperStep:
    """A recipe's network, and what passes of it take; everything is linear in the images but for the point of the peak.

    Args:
        config: the `DiP` keywords.
        precision: what the passes compute in.
        encoder: of the alignment, on the meta device; None: without it.
        fused: memory as with a GPU's kernels, which hold no attention matrix for the backward pass, and of a norm only
            its input; False: as with the CPU's.
        sharded: weights are gathered in `precision`, block by block, and gradients leave as soon as they are there.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: Mapping[str, Any],
        precision: torch.dtype,
        encoder: nn.Module | None = None,
        fused: bool = True,
        sharded: bool = False,
    ):
        self.recipe, self.precision, self.fused, self.sharded = recipe, precision, fused, sharded
        self.encoder, self.projector, self._alignment = encoder, None, None
        with torch.device("meta"):
            self.model = self.network = DiP(**config)
            if recipe.model.lora_rank:
                add_adapters(self.model, recipe.model, train_classes=False)
        if encoder is not None:
            with self._without_data():
                self._alignment = Alignment(recipe.alignment, encoder.to_empty(device=CPU), config["patch_size"])
            with torch.device("meta"):
                self.network = AlignedDiP(self.model, recipe.alignment, self._alignment.width)
            self.projector = self.network.projector
        if sharded:
            self.network.type(precision)
        with self._without_data():
            self.network.to_empty(device=CPU)
        self.network.train()
        if sharded:
            for parameter in self.network.parameters():
                parameter.register_post_accumulate_grad_hook(_leave)
        if fused:
            for module in self.network.modules():
                if isinstance(module, RMSNorm):
                    module.forward = functools.partial(_fused_norm, module)
                elif isinstance(module, Attention):
                    module.attend = F.scaled_dot_product_attention
        self._flops: tuple[int, int] | None = None
        self._timelines: dict[tuple[bool, bool], tuple[np.ndarray, np.ndarray]] = {}

    def flops(self, images: int) -> int:
        """FLOPs of a pass of B images: forward, backward, what checkpointing computes again, and the encoder's."""
        if self._flops is None:
            self._checkpoint(self.recipe.training.gradient_checkpointing)
            few, more = (count_flops(lambda b=b: self._pass(b)) for b in (FEW, MORE))
            self._flops = few, more
        few, more = self._flops
        return few + (images - FEW) * (more - few)

    def peak_bytes(self, images: int, checkpointing: bool, accumulating: bool) -> int:
        """The most that a pass of B images holds beside what stays from step to step.

        These are activations, gradients and autocast's copies of weights, as eager code holds them. The operations are
        the same whatever B is, so two passes tell for each of them what is fixed and what an image adds.

        Args:
            accumulating: the gradients of earlier passes are there from the beginning.
        """
        key = checkpointing, accumulating
        if key not in self._timelines:
            self._checkpoint(checkpointing)
            few, more = (np.array(self._timeline(b, accumulating)) for b in (FEW, MORE))
            self._timelines[key] = few - FEW * (more - few), more - few
        fixed, each = self._timelines[key]
        return int((fixed + images * each).max()) + (self._gathered() if self.sharded else 0)

    def _gathered(self) -> int:
        """Bytes of the weights that are whole at once: what stands outside the blocks, and two blocks."""
        blocks = list(self.model.backbone.blocks)
        inside = [size_of(block.parameters()) for block in blocks]
        return size_of(self.network.parameters()) - sum(inside) + 2 * max(inside)

    def _checkpoint(self, enabled: bool) -> None:
        if enabled:
            self.model.enable_gradient_checkpointing()
        else:
            self.model.disable_gradient_checkpointing()

    def _timeline(self, images: int, accumulating: bool) -> list[int]:
        if accumulating and not self.sharded:
            self._pass(images, keep_gradients=True)
        kept = [*self.network.parameters(), *(self.encoder.parameters() if self.encoder is not None else ())]
        gradients = [p.grad for p in kept if p.grad is not None]
        attention = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.fused else contextlib.nullcontext()
        with attention, LiveBytes([*kept, *self.network.buffers(), *gradients]) as live:
            self._pass(images)
        return [bytes_held + size_of(gradients) for bytes_held in live.timeline]

    def _pass(self, images: int, keep_gradients: bool = False) -> None:
        height, width = image_size(self.recipe.data)
        with self._without_data():
            x = torch.empty(images, self.model.config.in_channels, height, width)
            y, t = torch.zeros(images, dtype=torch.long), torch.empty(images)
            with autocast(CPU, self.precision):
                objective = self.model.objective
                losses = training_loss(self.network, objective, self._alignment, x, y, torch.empty_like(x), t)
            losses["loss"].backward()
            if not keep_gradients:
                self.network.zero_grad()

    def _without_data(self) -> FakeTensorMode:
        return FakeTensorMode(allow_non_fake_inputs=True)


def _leave(parameter: nn.Parameter) -> None:
    parameter.grad = None


def size_of(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


class LiveBytes(TorchDispatchMode):
    """Notes after every operation how many bytes the tensors hold that were made in here.

    Args:
        known: tensors from before, of which views may be made in here.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.timeline: list[int] = []
        self._live = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._watched: dict[int, weakref.ref] = {}
        self._known_views: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False) and args[0].untyped_storage()._cdata in self._known:
            for view in tree_leaves(result):
                self._pass_over(view.untyped_storage())
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        self.timeline.append(self._live)
        return result

    def _pass_over(self, storage: torch.UntypedStorage) -> None:
        """A view of a known tensor takes no bytes, though without data it has a storage of its own."""
        key = storage._cdata
        if key not in self._known and key not in self._known_views:
            self._known_views[key] = weakref.ref(storage, lambda _: self._known_views.pop(key))

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._watched or key in self._known_views:
            return
        self._live += size

        def freed(_: weakref.ref) -> None:
            self._live -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, freed)


class _FusedRMSNorm(torch.autograd.Function):
    """The sizes of CUDA's kernel, not its numbers: it keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _fused_norm(module: RMSNorm, x: Tensor) -> Tensor:
    return _FusedRMSNorm.apply(x.float(), module.weight.float()).to(x.dtype)
