"""Makes the fixtures of this folder from independent implementations. Not needed to run the tests.

python make_fixtures.py resize                     with tensorflow-cpu 2.21.0: tf1_resize.npz
python make_fixtures.py inception TORCH_FIDELITY   with pixeldip's environment; TORCH_FIDELITY is the folder of the
                                                   package torch_fidelity 0.4.0, unpacked: inception.npz
"""

import sys
import tempfile
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SIZES = [(32, 299), (64, 299), (256, 299), (299, 299), (512, 299), (7, 13), (33, 20)]


def resize() -> None:
    import tensorflow as tf

    arrays = {}
    for size, target in SIZES:
        x = np.random.default_rng(size).integers(0, 256, (1, size, 3, 1), dtype=np.uint8)
        y = tf.raw_ops.ResizeBilinear(
            images=x.astype(np.float32), size=[target, 5], align_corners=False, half_pixel_centers=False
        )
        arrays |= {f"x{size}": x[0, ..., 0], f"y{size}": y.numpy()[0, ..., 0]}
    np.savez_compressed(HERE / "tf1_resize.npz", **arrays)


def seeded_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights that depend on names and shapes alone and let signals through."""
    state = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        random = np.random.default_rng(i)
        if name.endswith(("running_var", "bn.weight")):
            values = random.uniform(0.5, 1.5, shape)
        else:
            fan_in = np.prod(shape[1:]) if len(shape) > 1 else 100
            values = random.standard_normal(shape) * np.sqrt(2 / fan_in)
        state[name] = values.astype(np.float32)
    return state


def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, 3, 64, 80), dtype=np.uint8)


def torch_fidelity_features(folder: str, weights: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    """Features of images (B, 3, H, W) uint8 by the package torch_fidelity in a folder."""
    import torch

    package = types.ModuleType("torch_fidelity")  # its __init__ needs torchvision
    package.__path__ = [folder]
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[2].clone()))
    with torch.no_grad():
        pool, logits = network(torch.from_numpy(x))
    rows = spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    return {"pool": pool.numpy(), "spatial": rows.numpy(), "logits": logits.numpy()}


def inception(folder: str) -> None:
    import torch

    from pixeldip.evaluation.inception import Inception

    shapes = {k: tuple(v.shape) for k, v in Inception().state_dict().items() if not k.endswith("num_batches_tracked")}
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({k: torch.from_numpy(v) for k, v in seeded_state(shapes).items()}, file.name)
        features = torch_fidelity_features(folder, Path(file.name), images())
    np.savez_compressed(HERE / "inception.npz", **features)


if __name__ == "__main__":
    {"resize": resize, "inception": inception}[sys.argv[1]](*sys.argv[2:])
