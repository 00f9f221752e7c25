"""Starting from trained weights: what of them is kept, what is resampled, what starts from scratch.

D hidden size, C image channels, P patch side.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from ..convert import load_release, release_pipeline
from ..errors import UserError
from ..model import DiP
from ..pipeline import DiPPipeline, check_peft
from ..processes import Processes
from ..recipe import ModelSection
from ..run_folder import START
from ..terminal import some

CLASS_TABLE = "backbone.class_embed.weight"
# Tensors with an axis of a patch's C*P*P numbers, and whether that axis is read or written
PATCH_AXES = {
    "backbone.patch_embed.weight": "read",
    "injection.project.weight": "read",
    "detailer.out.weight": "written",
    "detailer.out.bias": "written",
}
# Parts that only mean the same when they belong to the same head in the same place
HEAD_PARTS = ("detailer.", "injection.", "context.")
SIZES = ("hidden_size", "num_heads", "mlp_ratio")
ADAPTED_LAYERS = r"backbone\.blocks\.\d+\.(attention\.(qkv|out)|mlp\.(gate|up|down)|modulation)"
RELEASE_FILES = (".ckpt", ".safetensors")


@dataclass
class Start:
    """What a model begins with: tensors by name, classes by name or id, and the (height, width) of its training."""

    pretrained: str
    trained_at: list[int]
    kept: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    classes_kept: list[str] = field(default_factory=list)
    classes_new: list[str] = field(default_factory=list)
    classes_left_out: list[str] = field(default_factory=list)
    """Of the trained model: the images have none of that name, and this model does not know them any more."""
    cut_off: list[str] = field(default_factory=list)
    """Blocks of the trained model that this one, of fewer, has no place for."""

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> list[str]:
        """For people."""
        lines = [
            f"{len(self.kept)} tensors kept from {self.pretrained}, trained at {'x'.join(map(str, self.trained_at))}"
        ]
        if self.cut_off:
            lines.append(f"cut off, for a smaller depth: {some(self.cut_off)}")
        if self.resampled:
            lines.append(f"resampled to another patch size: {', '.join(self.resampled)}")
        if self.new:
            lines.append(f"started from scratch: {some(self.new)}")
        if self.classes_new or self.classes_left_out:
            found = [f"{some(self.classes_kept)} kept" if self.classes_kept else "none kept"]
            if self.classes_new:
                found.append(f"new, from the null class: {some(self.classes_new)}")
            if self.classes_left_out:
                found.append(f"left out, since no image is of them: {some(self.classes_left_out)}")
            lines.append(f"classes: {'; '.join(found)}")
        return lines


def load_pretrained(name: str, processes: Processes) -> DiPPipeline:
    """A run folder, a saved folder, a hub id or an authors' checkpoint, in every process; the main one fetches it.

    Raises:
        UserError: in all of them, if it cannot be had.
    """

    def load() -> DiPPipeline:
        try:
            if Path(name).suffix in RELEASE_FILES:
                return release_pipeline(load_release(name))
            diffusers_logging.disable_progress_bar()  # of loading one component
            return DiPPipeline.from_pretrained(name)
        except UserError as error:
            raise UserError(f"model.pretrained: {error}") from error

    return processes.main_first(load)


def read_start(run: Path) -> Start:
    """What the run began with.

    Raises:
        UserError: if the run folder does not say.
    """
    try:
        return Start(**json.loads((run / START).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run / START}: cannot be read, and the run cannot be resumed without it ({error})") from error


@torch.no_grad()
def start_from(name: str, pretrained: DiPPipeline, model: DiP, class_names: Sequence[str]) -> Start:
    """Copies into a fresh model what fits of a trained one.

    A tensor of the same name and shape is kept; those of the head only if it is the same head in the same place.
    The embedding of a patch, and DiT's final layer, are resampled to another patch size. Rows of the class table go
    by name, or, if the trained model has no names, by id where there are as many classes; a new class starts from the
    null class, which is kept, as far from it as classes start from one another.
    """
    start = Start(name, trained_at=[pretrained.config.height, pretrained.config.width])
    theirs, ours = pretrained.model.state_dict(), model.state_dict()
    old, new = pretrained.model.config, model.config
    same_head = (old.head, old.placement) == (new.head, new.placement)
    for key, value in ours.items():
        source = theirs.get(key) if same_head or not key.startswith(HEAD_PARTS) else None
        if key == CLASS_TABLE:
            _copy_classes(start, value, source, pretrained.config.class_names, class_names)
        elif source is None:
            start.new.append(key)
        elif source.shape == value.shape:
            value.copy_(source)
            start.kept.append(key)
        elif key in PATCH_AXES and old.in_channels == new.in_channels:
            resampled = resample(source, old.patch_size, new.patch_size, PATCH_AXES[key])
            if resampled.shape == value.shape:
                value.copy_(resampled)
            (start.resampled if resampled.shape == value.shape else start.new).append(key)
        else:
            start.new.append(key)
    if not any(key.startswith("backbone.blocks.") for key in start.kept):
        sizes = ", ".join(f"{key} {old[key]} there, {new[key]} here" for key in SIZES if old[key] != new[key])
        raise UserError(f"model.pretrained {name}: nothing of its blocks fits ({sizes}); leave the sizes out")
    start.cut_off = [f"backbone.blocks.{i}" for i in range(new.depth, old.depth)]
    return start


def check_adapted(start: Start) -> None:
    """Refuses adapters beside parts that start from scratch: nothing would ever train those.

    Raises:
        UserError: naming them.
    """
    if start.new:
        raise UserError(
            f"model.lora_rank: only adapters would be trained, and {some(start.new)}, which the pretrained model does "
            "not have, would stay as initialised; leave its sizes and head as they are, or train without adapters"
        )


def _copy_classes(
    start: Start, table: Tensor, trained: Tensor, trained_names: Sequence[str], names: Sequence[str]
) -> None:
    if trained.shape[1] != table.shape[1]:
        start.new.append(CLASS_TABLE)
        return
    ids = [str(i) for i in range(len(trained) - 1)]
    labels = list(names) if names else [str(i) for i in range(len(table) - 1)]
    if not trained_names and sorted(names) == sorted(ids):  # folders called by number, in alphabetical order
        trained_names = ids
    by_id = not trained_names and len(trained) == len(table)
    table[-1] = trained[-1]
    for i, label in enumerate(labels):
        row = i if by_id else list(trained_names).index(label) if label in trained_names else None
        if row is None:
            table[i] += trained[-1]  # its random start on top, by which new classes differ from the first step
            start.classes_new.append(label)
        else:
            table[i] = trained[row]
            start.classes_kept.append(label)
    if not by_id:
        theirs = trained_names or ids
        start.classes_left_out = [label for label in theirs if label not in start.classes_kept]
    start.kept.append(CLASS_TABLE)


def resample(weight: Tensor, old: int, new: int, axis: str) -> Tensor:
    """A layer between a patch's numbers and tokens, for patches of another side.

    Args:
        weight: (D, C*P*P) if the patch is read: then a patch enlarged by a whole factor gives the same
            token. (C*P*P, …) if it is written: then the same token gives the enlarged patch.
        old, new: P of the weight, and P wanted.
        axis: "read" or "written".
    """
    rows = weight if axis == "read" else weight.flatten(1).T if weight.dim() > 1 else weight[None]
    cells = rows.unflatten(1, (-1, old, old))
    cells = F.interpolate(cells.float(), (new, new), mode="area").flatten(1).to(weight.dtype)
    if axis == "read":
        return cells * (old / new) ** 2
    return cells.T.unflatten(1, weight.shape[1:]) if weight.dim() > 1 else cells[0]


def add_adapters(model: DiP, section: ModelSection, train_classes: bool) -> None:
    """LoRA (Hu et al. 2022) on the linear layers of all blocks; nothing else is trained, but the table of new classes.

    Raises:
        UserError: if PEFT is not installed.
    """
    check_peft("model.lora_rank")
    from peft import LoraConfig

    alpha = section.lora_alpha or section.lora_rank
    model.add_adapter(LoraConfig(r=section.lora_rank, lora_alpha=alpha, target_modules=ADAPTED_LAYERS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or (train_classes and name == CLASS_TABLE))
