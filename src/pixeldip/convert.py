"""The authors' checkpoints, and PixNerd's, read without running anything in them, as `DiP` models."""

import math
import pickle
import re
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import UserError
from .files import check_writable
from .model import DiP, check_size
from .model.heads.pixels import POSITION_FEATURES
from .model.layers import swiglu_inner
from .pipeline import DiPPipeline
from .terminal import some

# release name -> our name; \1 is the number of a block, {stage} that of a head stage, counted from 0, {beyond} how
# many blocks after the backbone's: PixNerd counts its head's blocks on
RENAMES = [
    (r"s_embedder\.proj", r"backbone.patch_embed"),
    (r"t_embedder\.mlp\.0", r"backbone.time_embed.fc1"),
    (r"t_embedder\.mlp\.2", r"backbone.time_embed.fc2"),
    (r"y_embedder\.embedding_table", r"backbone.class_embed"),
    (r"blocks\.(\d+)\.(norm1|norm2)", r"backbone.blocks.\1.\2"),
    (r"blocks\.(\d+)\.attn\.proj", r"backbone.blocks.\1.attention.out"),
    (r"blocks\.(\d+)\.attn\.(qkv|q_norm|k_norm)", r"backbone.blocks.\1.attention.\2"),
    (r"blocks\.(\d+)\.mlp\.w1", r"backbone.blocks.\1.mlp.gate"),
    (r"blocks\.(\d+)\.mlp\.w3", r"backbone.blocks.\1.mlp.up"),
    (r"blocks\.(\d+)\.mlp\.w2", r"backbone.blocks.\1.mlp.down"),
    (r"blocks\.(\d+)\.adaLN_modulation\.0", r"backbone.blocks.\1.modulation"),
    (r"local_decoder\.enc(\d+)\.0", "detailer.down.{stage}"),
    (r"local_decoder\.bottleneck\.0", r"detailer.bottleneck"),
    (r"local_decoder\.up(\d+)", "detailer.up.{stage}"),
    (r"local_decoder\.dec(\d+)\.0", "detailer.merge.{stage}"),
    (r"local_decoder\.out_conv", r"detailer.out"),
    (r"x_embedder\.embedder\.0", r"detailer.embed"),
    (r"blocks\.(\d+)\.param_generator1\.0", "detailer.blocks.{beyond}.generator"),
    (r"blocks\.(\d+)\.norm", "detailer.blocks.{beyond}.norm"),
    (r"final_layer\.norm", r"detailer.norm"),
    (r"final_layer\.linear", r"detailer.out"),
]
RELEASE_GRID = 16  # patches a side the release trains on: 256 px at P = 16, 512 px at P = 32
RELEASE_SAMPLING = {  # the guidance scale is that of the paper's pictures (Figs. 7 and 9); no source has the tables'
    "num_inference_steps": 100,
    "solver": "euler",
    "guidance_scale": 4.0,
    "guidance_interval": (0.1, 1.0),
}
PREFIXES = {"ema": "ema_denoiser.", "model": "denoiser."}


def our_name(name: str, depth: int) -> str | None:
    """Our name of a network tensor of the release, or of PixNerd's, or None if it is not one.

    Args:
        depth: blocks of the backbone.
    """
    stem, _, leaf = name.rpartition(".")
    for pattern, replacement in RENAMES:
        if match := re.fullmatch(pattern, stem):
            if "{" in replacement:
                number = int(match[1])
                return f"{replacement.format(stage=number - 1, beyond=number - depth)}.{leaf}"
            return f"{match.expand(replacement)}.{leaf}"
    return None


def load_release(path: str | Path, weights: str = "ema") -> DiP:
    """A `DiP` with the weights of an authors' checkpoint, or a PixNerd one, its sizes inferred from the tensors.

    Args:
        path: Lightning `.ckpt`, or `.safetensors` with the network's tensors under the release's names.
        weights: "ema" or "model", for a checkpoint that holds both.

    Raises:
        UserError: if the file cannot be read, or tensors are unknown, missing or of the wrong shape.
    """
    tensors = _network_tensors(Path(path), weights)
    config = infer_config(tensors, path)
    with torch.device("meta"):
        model = DiP(**config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    renamed = {our_name(name, config["depth"]) or name: (name, tensor) for name, tensor in tensors.items()}
    missing = sorted(expected.keys() - renamed.keys())
    surplus = sorted(renamed[name][0] for name in renamed.keys() - expected.keys())
    if missing or surplus:
        raise UserError(
            f"{path}: not a DiP or PixNerd checkpoint as far as we can read it."
            + (f" Missing (our names): {some(missing)}." if missing else "")
            + (f" Unknown: {some(surplus)}." if surplus else "")
        )
    for name, (theirs, tensor) in renamed.items():
        if tuple(tensor.shape) != expected[name]:
            raise UserError(f"{path}: tensor {theirs} has shape {tuple(tensor.shape)}, expected {expected[name]}")
    model.to_empty(device="cpu")
    model.load_state_dict({name: tensor for name, (_, tensor) in renamed.items()}, strict=True)
    return model.eval()


def release_pipeline(model: DiP, resolution: int | None = None) -> DiPPipeline:
    """A network of the release with the size it was trained at, or another one, and `RELEASE_SAMPLING`.

    Raises:
        UserError: if the resolution is no multiple of the patch size.
    """
    side = resolution or RELEASE_GRID * model.config.patch_size
    check_size(side, side, model.config.patch_size)
    return DiPPipeline(model, height=side, width=side, sampling=RELEASE_SAMPLING)


def convert_checkpoint(path: Path, out: Path, weights: str = "ema", resolution: int | None = None) -> None:
    """Writes the pipeline folder of an authors' checkpoint.

    Raises:
        UserError: if the checkpoint cannot be used, or `out` already holds something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already there and not empty; choose a new folder")
    model = load_release(path, weights)
    pipeline = release_pipeline(model, resolution)
    check_writable(out / "model_index.json")
    pipeline.save_pretrained(out)
    size = f"{pipeline.config.height}x{pipeline.config.width}"
    print(f"{path}: {model.num_parameters():,} parameters, {size}, written to {out}")


def infer_config(tensors: dict[str, Tensor], path: str | Path = "checkpoint") -> dict[str, int | float | str]:
    """The `DiP` keywords of a network of the release, from the shapes of its tensors.

    Raises:
        UserError: if a tensor that tells a size is missing.
    """
    try:
        hidden_size, patch_dim = tensors["s_embedder.proj.weight"].shape
        if "x_embedder.embedder.0.weight" in tensors:  # PixNerd's head
            head = "coordinate_mlp"
            head_width, in_channels = tensors["x_embedder.embedder.0.weight"].shape
            in_channels -= POSITION_FEATURES
            head_depth = _count(tensors, r"blocks\.(\d+)\.param_generator1\.")
        else:
            head = "unet"
            head_width, in_channels = tensors["local_decoder.enc1.0.weight"].shape[:2]
            head_depth = _count(tensors, r"local_decoder\.enc(\d+)\.")
        inner = tensors["blocks.0.mlp.w1.weight"].shape[0]
        head_dim = tensors["blocks.0.attn.q_norm.weight"].shape[0]
        num_classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
        if min(hidden_size, patch_dim, in_channels, head_width, head_depth, inner, head_dim) < 1:
            raise ValueError("a size below 1")
    except KeyError as missing:
        raise UserError(
            f"{path}: tensor {missing} is missing, so this is neither a DiP nor a PixNerd network; "
            f"it holds {len(tensors)} tensors: {some(sorted(tensors))}"
        ) from None
    except (ValueError, IndexError) as error:  # shapes of other lengths
        raise UserError(f"{path}: neither a DiP nor a PixNerd network: its tensors tell no sizes ({error})") from None
    # the release's; else a round one where there is; else one amid those of this inner size, which no rounding leaves
    ratios = 4.0, math.ceil(1.5 * inner) / hidden_size, (1.5 * inner + 0.75) / hidden_size
    mlp_ratio = next(ratio for ratio in ratios if swiglu_inner(hidden_size, ratio) == inner)
    return {
        "in_channels": in_channels,
        "patch_size": round((patch_dim / in_channels) ** 0.5),
        "hidden_size": hidden_size,
        "depth": _count(tensors, r"blocks\.(\d+)\.attn\."),
        "num_heads": hidden_size // head_dim,
        "mlp_ratio": mlp_ratio,
        "num_classes": num_classes,
        "head": head,
        "head_width": head_width,
        "head_depth": head_depth,
    }


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _network_tensors(path: Path, weights: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if weights not in PREFIXES:
        raise UserError(f"weights={weights!r}: choose one of {', '.join(PREFIXES)}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif not zipfile.is_zipfile(path):
            raise ValueError("not an archive, as torch has written since 1.6")
        else:
            state = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_tensors_only)
    except Exception as error:  # whatever a damaged or foreign file makes the readers say
        raise UserError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no state_dict")
    named = {name: value for name, value in state.items() if isinstance(name, str)}
    prefix = PREFIXES[weights]
    tensors = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    if not tensors and any(name.startswith(tuple(PREFIXES.values())) for name in named):
        other = next(key for key in PREFIXES if key != weights)
        raise UserError(f"{path}: holds no {prefix}* tensors; try weights={other!r} (--weights {other})")
    if not tensors and weights != "ema":
        raise UserError(f"{path}: holds one set of weights, whose names do not say which; leave --weights out")
    tensors = tensors or named
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: entry {name!r} is not a tensor; it was not loaded")
    claimed, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if claimed > size:
        raise UserError(f"{path}: claims {claimed:,} bytes of tensors, and the file has {size:,}: damaged")
    return tensors


# What a pickle may name. Everything else in a checkpoint (callbacks, hyper-parameters, code) becomes
# an inert object: its class is never imported and nothing of it is run.
_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
_STORAGES = re.compile(r"(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage")


class _Inert:
    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> "_Inert":
        return self

    def __hash__(self) -> int:
        return id(self)


class _TensorsOnlyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _ALLOWED:
            known = _ALLOWED[module, name]
            # a pickle can set attributes of what it names: of a function made for it, not of torch's
            return known if isinstance(known, type) else lambda *arguments: known(*arguments)
        if module in ("torch", "torch.storage") and _STORAGES.fullmatch(name):
            return super().find_class("torch", name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _Inert


_tensors_only = types.SimpleNamespace(
    __name__="pixeldip.convert.tensors_only",
    Unpickler=_TensorsOnlyUnpickler,
    load=lambda file, **kwargs: _TensorsOnlyUnpickler(file, **kwargs).load(),
)
