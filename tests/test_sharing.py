"""The model card of a run, and its upload to a hub."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.training import train

from .conftest import TINY_MODEL, tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with previews and an evaluation, on the bundled pictures."""
    evaluation = {"every": 6, "images": 4, "steps": 1, "metrics": ["kid_efficientnet", "boundary"]}
    preview = {"every": 6, "images": 10, "steps": 2}
    recipe = tiny_recipe(tmp_path_factory.mktemp("runs") / "toy", "emoji", evaluation=evaluation, preview=preview)
    train(recipe, Console(quiet=True))
    return Path(recipe.out)


def test_the_model_card_tells_of_the_run(run: Path, tmp_path: Path) -> None:
    DiPPipeline.from_pretrained(run).save_pretrained(tmp_path / "toy", license="cc-by-4.0")
    card = (tmp_path / "toy" / "README.md").read_text()
    assert "license: cc-by-4.0" in card.split("---")[1] and "library_name: pixeldip" in card.split("---")[1]
    for text in (
        *("# toy", "Data: emoji, split train", "6 steps of 4 images", "Measured after step 6", "| kid_efficientnet | "),
        *("class_labels=['red heart', 'sun']", "red heart, sun, strawberry", "patch_size | 8", "num_heads: 2"),
        f"torch {torch.__version__}",
    ):
        assert text in card, text
    assert "Started from" not in card
    newest = max((run / "previews").iterdir())
    assert (tmp_path / "toy" / "samples.png").read_bytes() == newest.read_bytes()
    assert not any(str(run) in path.read_text() for path in (tmp_path / "toy").rglob("*.json"))
    assert not list(run.rglob("README.md"))  # checkpoints have none: they would be stale
    further = shutil.copytree(run, tmp_path / "further" / "toy")  # than its checkpoint
    with (further / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 9, "loss": 77.7, "images_per_second": 1.0}) + "\n")
    DiPPipeline.from_pretrained(further).save_pretrained(tmp_path / "saved" / "toy", license="cc-by-4.0")
    told = (tmp_path / "saved" / "toy" / "README.md").read_text()
    assert sorted(told.splitlines()) == sorted(card.splitlines())  # the entries at the top have no order
    # a copy of a copy keeps it; weights from nowhere say so
    DiPPipeline.from_pretrained(tmp_path / "toy").save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == card and (tmp_path / "copy" / "samples.png").is_file()
    DiPPipeline.from_pretrained(run).save_pretrained(tmp_path / "unlicensed")
    DiPPipeline.from_pretrained(tmp_path / "unlicensed").save_pretrained(tmp_path / "licensed", license="cc-by-4.0")
    assert "None was stated" in (tmp_path / "unlicensed" / "README.md").read_text()
    licensed = (tmp_path / "licensed" / "README.md").read_text()
    assert sorted(licensed.splitlines()) == sorted(card.splitlines())
    DiPPipeline.from_pretrained(tmp_path / "licensed").save_pretrained(tmp_path / "again", license="mit")
    again = (tmp_path / "again" / "README.md").read_text()
    assert "license: mit" in again and "## Licence\n\nmit" in again and "cc-by" not in again
    (tmp_path / "again" / "README.md").write_text(
        again.replace("## Licence\n\nmit", "## Licence\n\nAs MIT's, but kinder")
    )
    kept = DiPPipeline.from_pretrained(tmp_path / "again")
    with pytest.raises(UserError, match=r"states the licence mit in words of its own, which license='cc0-1\.0' would"):
        kept.save_pretrained(tmp_path / "contradicted", license="cc0-1.0")
    with pytest.raises(UserError, match="save_pretrained: there is no keyword 'licence'"):
        kept.save_pretrained(tmp_path / "contradicted", licence="mit")
    assert not (tmp_path / "contradicted").exists()
    DiPPipeline(DiP(**TINY_MODEL, num_classes=0), height=16, width=16).save_pretrained(tmp_path / "unknown")
    unknown = (tmp_path / "unknown" / "README.md").read_text()
    assert "An unconditional" in unknown and "is not known" in unknown and "None was stated" in unknown


def test_the_cards_example_runs(run: Path, tmp_path: Path) -> None:
    DiPPipeline.from_pretrained(run).save_pretrained(tmp_path / "toy")
    example = (tmp_path / "toy" / "README.md").read_text().split("```python")[1].split("```")[0]
    names: dict = {}
    exec(example.replace("FOLDER-OR-HUB-ID", str(tmp_path / "toy")), names)
    assert len(names["images"]) == 2


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files needs."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://127.0.0.1:{self.server.server_port}/me/toy"
        answer: dict = {"url": url, "name": "me/toy", "id": "me/toy"}
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/commit/{'0' * 40}", "hookOutput": ""}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/toy", "sha": "0" * 40, "siblings": [], "tags": []})

    def _answer(self, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_push_to_hub(run: Path) -> None:
    """Against a server on this machine; the hub's address is read once, so another process pushes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"from pixeldip import DiPPipeline; p = DiPPipeline.from_pretrained({str(run)!r}); "
    code += "p.push_to_hub('me/toy', token='hf_x', license='mit')"
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    try:
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    finally:
        server.shutdown()
    assert {"README.md", "samples.png", "model_index.json", "model/config.json"} <= server.files.keys()
    assert "model/diffusion_pytorch_model.safetensors" in server.files
    assert "license: mit" in server.files["README.md"].decode() and "# toy" in server.files["README.md"].decode()
