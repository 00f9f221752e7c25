"""DiP: the backbone on large patches and the Patch Detailer Head on their pixels (Sec. 3.3).

B batch, G conditions of each image, C channels, H x W image, P patch side, N = (H / P)(W / P) patches, D hidden size.
"""

import copy
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from ..errors import UserError
from ..files import check_folder
from ..flow import OBJECTIVES, VelocityObjective
from ..settings import finite_number, whole_number
from .backbone import Backbone
from .heads import HEADS
from .heads.unet import UNetHead
from .int8 import Int8Linear
from .layers import Block, swiglu_inner, untouched
from .placement import PLACEMENTS, Injection, refine
from .presets import preset_config


class DiP(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Velocity network in pixel space: v = model(x, t, y).

    Args:
        in_channels: image channels C.
        patch_size: P; H and W of every input must be multiples of it.
        hidden_size: D, the width of the backbone.
        depth: number of DiT blocks.
        num_heads: attention heads; D / num_heads must be a multiple of 4 (2-D rotary positions).
        mlp_ratio: the SwiGLU inner size is int(2 * mlp_ratio * D / 3).
        num_classes: classes; label `num_classes` is the null class. 0 makes an unconditional model.
        head: a name from `pixeldip.model.heads.HEADS`; "linear" is the DiT-only baseline.
        head_width: channels of the head (in the unet's first stage); None for the head's own default.
        head_depth: of the unet, down/up stages, by default as many as reach 1 x 1, at most 4; of the others, blocks or
            hidden layers; None for the head's own default.
        placement: where the head stands (Fig. 5): "post", "intermediate" or "hybrid".
        prediction: what the network predicts, a name from `pixeldip.flow.OBJECTIVES`: "velocity" (Eq. 5, the
            release), "image", the clean image, or "noise" (Eq. 4). It is fixed when the model is made, and
            `forward` returns the velocity that follows from it.
        absolute_positions: adds sinusoids of a patch's place to its embedding. The rotary positions, which are all that
            the release has, tell patches apart only by what they hold, and at t = 0 that is noise.

    Raises:
        UserError: if a size is no number, or they do not fit together, or there is no such head, placement or
            prediction.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _skip_layerwise_casting_patterns = ["time_embed", "detailer"]  # whose code reads weights itself

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 16,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        head: str = "unet",
        head_width: int | None = None,
        head_depth: int | None = None,
        placement: str = "post",
        prediction: str = "velocity",
        absolute_positions: bool = False,
    ):
        super().__init__()
        self.register_to_config(**_plain_sizes(self.config))
        patch_dim, mlp_ratio = in_channels * patch_size**2, self.config.mlp_ratio
        self.backbone = Backbone(patch_dim, hidden_size, depth, num_heads, mlp_ratio, num_classes, absolute_positions)
        self.injection = None
        if placement != "post":
            between = HEADS[head](in_channels, patch_size, hidden_size, head_width, head_depth)
            self.injection = Injection(HEADS[head].context_type(hidden_size), between, patch_dim, hidden_size)
        if placement == "intermediate":
            head, head_width, head_depth = "linear", None, None
        self.context = HEADS[head].context_type(hidden_size)
        self.detailer = HEADS[head](in_channels, patch_size, hidden_size, head_width, head_depth)

    @property
    def objective(self) -> VelocityObjective:
        """How it is trained, and the path it samples on."""
        return OBJECTIVES[self.config.prediction]

    @property
    def paints_last(self) -> bool:
        """Whether a Patch Detailer Head stands behind the last block."""
        return self.config.placement != "intermediate" and self.config.head != "linear"

    @property
    def head_is_plain(self) -> bool:
        """Whether the last head may be copied: the model is not offloaded, no hook stands by the head's layers, and
        their weights are in floating point."""
        layers = [self, *self.detailer.modules()]
        weights = (type(p) is nn.Parameter and p.is_floating_point() for p in self.detailer.parameters())
        return untouched(layers, *map(type, layers)) and all(weights)

    def head_in_float32(self) -> nn.Module:
        """A copy of the last head, for `forward` to compute with in float32."""
        return copy.deepcopy(self.detailer).float()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "DiP | tuple[DiP, dict[str, Any]]":
        """As in diffusers; convolutions come back channels-last, as they were built."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # the former with output_loading_info=True
        model.to(memory_format=torch.channels_last)
        return loaded

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DiP":
        """A freshly initialised model of a named size, for instance "dip-xl/16"; keywords override its row."""
        return cls(**{**preset_config(name), **overrides})

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, also when they are sharded, and on a CUDA device the head, too; on a CPU that gains nothing
        (benchmarks/LOG.md)."""
        heads = tuple(HEADS.values()) if self.device.type == "cuda" else ()
        for module in self.modules():
            if isinstance(module, (Block, *heads)):
                module.compile(*args, **kwargs)

    @property
    def in_int8(self) -> bool:
        """Whether `quantize_to_int8` was called."""
        return any(isinstance(module, Int8Linear) for module in self.modules())

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters (LoRA) that are loaded, fused ones included."""
        return list(getattr(self, "peft_config", ()))

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; where that fails, with no adapter there before, the layers stay what they were."""
        try:
            super().load_lora_adapter(*args, **kwargs)
        except Exception:
            self._unload_without_adapters()
            raise

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers; with the last one the layers become what they were before the first."""
        super().delete_adapters(adapter_names)
        self._unload_without_adapters()

    def _unload_without_adapters(self) -> None:
        """Takes away what the layers were given for adapters, if there are none, so that the model can be saved."""
        if not self.adapters:
            self.unload_lora()

    def quantize_to_int8(self) -> None:
        """From now on, for inference, the linear layers of the backbone's attention and MLPs multiply 8-bit integers,
        weights rounded once for all, tokens as they come. The input of each MLP's last one has outliers: it is rotated.

        On a CPU with AVX512-VNNI faster than bf16 from DiP-B on, most so when compiled, and images are up to 6 dB
        farther from float32's; on other CPUs it may be slower and wrong, on GPUs the product is slower. The weights in
        floating point are let go of.

        Raises:
            UserError: if adapters are loaded, which such layers cannot take.
        """
        if self.adapters:
            raise UserError("int8: fuse the adapters and unload them first: fuse_lora(), then unload_lora_weights()")
        for block in self.backbone.blocks:
            for part in (block.attention, block.mlp):
                for name, layer in list(part.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(part, name, Int8Linear(layer, rotated=layer is block.mlp.down))

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # the pipeline passes on what its signature names
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            UserError: if it is in int8: its weights are those of the file it came from no longer; or if adapters are
                loaded, or safe_serialization is False, for no model can be made from such a file again; or if the
                folder is a file.
        """
        check_folder(save_directory)
        if not kwargs.get("safe_serialization", True):
            raise UserError("safe_serialization=False: only safetensors are loaded again; leave it out")
        if self.in_int8:
            raise UserError("a model in int8 is not saved: save it first, and quantize it each time it is loaded")
        if self.adapters:
            raise UserError(
                "a model with adapters is not saved: save_lora_weights() saves them alone; or let it be without them, "
                "unload_lora_weights(), or let them be part of it, fuse_lora() before that"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        self._forget_parts_of_before(Path(save_directory))

    @staticmethod
    def _forget_parts_of_before(folder: Path) -> None:
        """Where a model in one file replaces one in parts, diffusers deletes the parts, but not the list of them, which
        it would look for when it loads the folder; the other way round it leaves the one file."""
        for listing in folder.glob("*.safetensors.index*.json"):
            if not all((folder / part).is_file() for part in json.loads(listing.read_bytes())["weight_map"].values()):
                listing.unlink()
                continue
            stem, variant = listing.name.removesuffix(".json").split(".safetensors.index")
            (folder / f"{stem}{variant}.safetensors").unlink(missing_ok=True)

    def forget_kernels(self) -> None:
        """Composes the head's kernels again at its next call, as every call of a pipeline does: weights may have
        changed without a trace, by a fused optimizer or through their `.data`."""
        for module in self.modules():
            if isinstance(module, UNetHead):
                module.forget_kernels()

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """The output of the blocks' modulation layers, for a `forward` at one of these times with these labels.

        Args:
            t: (S,) times in [0, 1].
            y: (G, B) labels.

        Returns:
            (S, depth, G B, 6 D).
        """
        _, time = self.objective.network_input(t.new_zeros(len(t), 1, 1, 1), t)
        return self.backbone.modulations(time, y)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        tokens_after: int | None = None,
        modulations: Tensor | None = None,
        tokens: Tensor | None = None,
        head: nn.Module | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity at the noisy image.

        Args:
            x: x_t (B, C, H, W); images lie in [-1, 1], H and W are multiples of P.
            t: (B,) times in [0, 1], 0 noise, 1 data.
            y: (B,) integer class labels; `num_classes` is the null class. Or (G, B): G labels of each image, as
                guidance asks for; what depends on the image alone is then computed once.
            tokens_after: a number of blocks, 1 … depth.
            modulations: (depth, G B, 6 D), this t's part of what the method of that name returned for these labels.
            tokens: (G B, N, D), those after the last block of another evaluation of these images: the head works with
                them, and the backbone is left out.
            head: what `head_in_float32` returned, to take the last head's place. It works on one half of the patches
                after the other, so that it takes no more memory than in bf16.

        Returns:
            (B, C, H, W) in x's dtype, or (G, B, C, H, W); with `tokens_after` also the tokens (B, N, D), or
            (G B, N, D), after so many blocks.

        Raises:
            UserError: if H or W is not a multiple of P, or x, t or y has another shape.
        """
        check_inputs(x, t, y, self.config.in_channels)
        objective = self.objective
        seen, time = objective.network_input(x, t)
        labels = y if y.dim() == 2 else y[None]
        g = len(labels)
        asked_for = None

        def after_block(blocks: int, s: Tensor, time: Tensor, c: Tensor) -> Tensor:
            nonlocal asked_for
            if blocks == tokens_after:
                asked_for = s
            if self.injection is not None and blocks == self.config.depth // 2:
                s = self.injection(patches, s, time, c, g)
            return s

        p = self.config.patch_size
        check_size(x.shape[-2], x.shape[-1], p)
        rows, columns = x.shape[-2] // p, x.shape[-1] // p
        # (B, C, H, W) -> (B, N, C, P, P): channel-major inside a patch, patches in raster order
        patches = seen.unflatten(-1, (columns, p)).unflatten(-3, (rows, p)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        exact, patches = patches, patches.to(self.backbone.patch_embed.weight.dtype)
        if tokens is None:
            s, *conditions = self.backbone(patches.flatten(2), time, labels, (rows, columns), after_block, modulations)
        else:
            s, conditions = tokens, self.backbone.conditions(time, labels)
        if head is None:
            refined = refine(self.context, self.detailer, patches, s, *conditions, g)
        else:
            refined = refine(lambda *of: self.context(*of).float(), head, exact.float(), s, *conditions, g, parts=2)
        image = refined.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).reshape(-1, *x.shape[1:])
        if g > 1:
            x, t = x.repeat(g, 1, 1, 1), t.repeat(g)
        v = objective.to_velocity(image.to(x.dtype), x, t)
        if y.dim() == 2:
            v = v.unflatten(0, y.shape)
        return v if tokens_after is None else (v, asked_for)


def _plain_sizes(config: Mapping[str, Any]) -> dict[str, int | float]:
    """A model's sizes as plain numbers, which JSON can hold; UserError unless its configuration fits together."""
    of_head = [name for name in ("head_width", "head_depth") if config[name] is not None]
    whole = ("in_channels", "patch_size", "hidden_size", "depth", "num_heads", "num_classes", *of_head)
    sizes = {name: whole_number(name, config[name]) for name in whole}
    for name, value in sizes.items():
        if value < 1 and name != "num_classes":
            raise UserError(f"{name}={value}: must be at least 1")
    if sizes["num_classes"] < 0:
        raise UserError(f"num_classes={sizes['num_classes']}: must be at least 0 (0 makes an unconditional model)")
    mlp_ratio = finite_number("mlp_ratio", config["mlp_ratio"])
    if not isinstance(config["absolute_positions"], bool):
        raise UserError(f"absolute_positions={config['absolute_positions']!r}: give True or False")
    hidden_size, num_heads, depth = sizes["hidden_size"], sizes["num_heads"], sizes["depth"]
    if mlp_ratio <= 0:
        raise UserError(f"mlp_ratio={mlp_ratio}: must be above 0")
    if not swiglu_inner(hidden_size, mlp_ratio):
        raise UserError(f"mlp_ratio={mlp_ratio}: blocks {hidden_size} wide would have MLPs of no width; give more")
    if hidden_size % (4 * num_heads):
        raise UserError(
            f"hidden_size={hidden_size} with num_heads={num_heads}: hidden_size must be a multiple of "
            f"4 * num_heads = {4 * num_heads}"
        )
    for name, there in {"head": HEADS, "placement": PLACEMENTS, "prediction": OBJECTIVES}.items():
        if not isinstance(config[name], str) or config[name] not in there:
            raise UserError(f"{name}={config[name]!r}: choose one of {', '.join(there)}")
    head, placement = config["head"], config["placement"]
    if placement != "post" and (head == "linear" or depth < 2):
        why = "DiT-only has no head to place" if head == "linear" else "needs a depth of at least 2"
        raise UserError(f"placement={placement!r} with head={head!r} and depth={depth}: {why}")
    return {**sizes, "mlp_ratio": mlp_ratio}


def check_inputs(x: Tensor, t: Tensor, y: Tensor, channels: int) -> None:
    """Raises UserError unless a time and a label are given for each image: a single one would go for all unseen."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise UserError(f"x {tuple(x.shape)}: give images (B, {channels}, H, W)")
    images = x.shape[0]  # len would make a number of what an exported program leaves open
    if t.dim() != 1 or t.shape[0] != images:
        raise UserError(f"t {tuple(t.shape)}: give a time for each image, ({images},)")
    if y.dim() not in (1, 2) or y.shape[-1] != images:
        raise UserError(f"y {tuple(y.shape)}: give a label for each image, ({images},), or several, (G, {images})")


def check_size(height: int, width: int, patch_size: int) -> None:
    """Raises UserError unless both sides are multiples of the patch size."""
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise UserError(
            f"an image of {height}x{width} pixels (height x width) cannot be cut into patches of {patch_size}x"
            f"{patch_size}: both sides must be multiples of {patch_size}"
        )
