"""Weights of the feature networks: missing, fetched, damaged, of another network."""

import functools
import http.server
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixeldip import UserError
from pixeldip.cli import main
from pixeldip.evaluation import extractors

from .conftest import GOOD, run, save_npz, smooth_images


def test_missing_weights_say_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = save_npz(tmp_path / "a.npz", GOOD)
    assert main(["evaluate", path, "--reference", path]) == 2
    error = capsys.readouterr().err
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    for text in ("95,628,359 bytes", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", str(place)):
        assert text in error
    place.parent.mkdir(parents=True)
    place.write_bytes(b"half of it")
    assert main(["evaluate", path, "--reference", path]) == 2
    assert "10 bytes, SHA-256" in capsys.readouterr().err and place.exists()


def test_missing_weights_are_fetched_and_checked(
    tmp_path: Path, seeded_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, from a server on this machine, with the seeded file as the published one."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(seeded_weights.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{seeded_weights.name}"
        monkeypatch.setattr(extractors, "INCEPTION_URL", url)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with pytest.raises(UserError, match=r"could not be fetched \(invalid hash value"):
            extractors.load_extractor("inception", torch.device("cpu"))
        assert not list(tmp_path.rglob("*.pth*"))
        digest = extractors.file_sha256(seeded_weights)
        monkeypatch.setattr(extractors, "INCEPTION_SHA256", digest)
        loaded = extractors.load_extractor("inception", torch.device("cpu"))
        server.shutdown()
    assert loaded.weights == {"file": extractors.INCEPTION_FILE, "sha256": digest, "published": True}
    assert (tmp_path / "hub" / "checkpoints" / extractors.INCEPTION_FILE).is_file() and not loaded.warnings


def test_weights_of_another_network(tmp_path: Path, seeded_weights: Path, capsys: pytest.CaptureFixture) -> None:
    state = torch.load(seeded_weights, weights_only=True)
    wrong = {
        "aux": {**state, "AuxLogits.fc.weight": torch.zeros(3)},
        "lacking": {k: v for k, v in state.items() if k != "fc.bias"},
        "shape": {**state, "fc.bias": torch.zeros(1000)},
        "numbers": {0: torch.zeros(3)},
        "nan": {**state, "Conv2d_1a_3x3.bn.bias": torch.full((32,), math.nan)},
    }
    for name, tensors in wrong.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
    (tmp_path / "text.pth").write_text("hello")
    path = save_npz(tmp_path / "a.npz", GOOD)
    for name, message in {
        "aux": "AuxLogits.fc.weight is not a tensor of this network",
        "lacking": "fc.bias is missing",
        "shape": "fc.bias has shape (1000,), expected (1008,)",
        "numbers": "expected a dictionary of tensors by name",
        "text": "not a file of tensors, or a damaged one",
        "none": "no such file",
        "nan": "6 of 6 images have inception features that are not finite, the first is image 0",
    }.items():
        arguments = ["--reference", path, "--inception-weights", str(tmp_path / f"{name}.pth")]
        assert main(["evaluate", path, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_dinov2_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.save_pretrained(tmp_path / "dino")
    samples, references = smooth_images(9, 1), smooth_images(8, 2)
    arguments = [save_npz(tmp_path / "a.npz", samples), "--reference", save_npz(tmp_path / "b.npz", references)]
    record = run(tmp_path, *arguments, "--metrics", "fd_dinov2", "kid_dinov2", "--dinov2", tmp_path / "dino")

    def features(images: np.ndarray) -> np.ndarray:
        pictures = [Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC) for x in images]
        x = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            return model.eval()((x - mean[:, None, None]) / std[:, None, None]).pooler_output.double().numpy()

    a, b = features(samples), features(references)
    root = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T / math.sqrt(8 * 7), compute_uv=False).sum()
    traces = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root
    assert record["metrics"]["fd_dinov2"] == pytest.approx(expected, rel=0.02)  # Pillow rounds to grey levels
    assert "not comparable with published FD-DINOv2" in " ".join(record["warnings"])
    assert main(["evaluate", *arguments, "--metrics", "fd_dinov2", "--dinov2", str(tmp_path / "none")]) == 2
    assert "DINOv2" in capsys.readouterr().err
