"""What of a stranger reaches the terminal and the records."""

import base64
import io
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixeldip.cli import main
from pixeldip.processes import start_processes
from pixeldip.provenance import command, environment
from pixeldip.terminal import PlainConsole, printable, warn
from pixeldip.training import train

from ..conftest import tiny_recipe
from .common import FUZZ, HOSTILE_NAMES


@settings(max_examples=200, **FUZZ)
@given(st.text(max_size=20) | st.sampled_from(HOSTILE_NAMES))
def test_what_is_printed_steers_no_terminal(text: str) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=10**6, force_terminal=False)
    console.print(text, soft_wrap=True)
    warn(console, text)
    printed = file.getvalue()
    assert printable(text) in printed
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in printed.replace("\n", ""))


def test_a_run_on_hostile_names(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in HOSTILE_NAMES:
        shutil.copytree(picture_folder / "ant", picture_folder / name)
    run = tmp_path / "run [/x]"
    train(tiny_recipe(run, picture_folder, training={"steps": 1}))
    second = {"pretrained": str(run), "patch_size": None, "hidden_size": None, "depth": None, "num_heads": None}
    shutil.rmtree(picture_folder / "ant")
    shutil.copytree(picture_folder / "bee", picture_folder / "\x1b[2Jnew [red]")
    (picture_folder / "bee" / "cut\x1b[1m\n.png").write_bytes(b"")
    recipe = tiny_recipe(tmp_path / "2", picture_folder, training={"steps": 1}, model=second, data={"max_broken": 0.5})
    recipe.model.head_width = None
    train(recipe)
    assert main(["sample", str(run), "--classes", "[/x]\x1b[1m", "--out", str(tmp_path / "out")]) == 2
    printed = "".join(capsys.readouterr())
    lines = printed.splitlines()
    assert [line for line in lines if "\x1b" in line] == [] and "\\x1b[2Jnew [red]" in printed


def test_no_secret_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = base64.b16encode(os.urandom(20)).decode()
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    flags = ["--hf-token", secret, f"--wandb.api_key={secret}", "--steps", "3", f"hf_{secret}", f"--x=hf_{secret}"]
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", *flags, f"https://me:{secret}@host/x", "--last", "2"])
    program = sys.modules["__main__"]
    shown = "--hf-token '***' '--wandb.api_key=***' --steps 3 '***' '--x=***' 'https://***@host/x' --last 2"
    monkeypatch.setattr(program, "__spec__", None, raising=False)
    assert command() == f"train.py {shown}"
    monkeypatch.setattr(program, "__spec__", find_spec("pixeldip.cli"))  # as python -m leaves it
    assert command() == f"python -m pixeldip.cli {shown}"
    with start_processes("cpu") as processes:
        assert secret not in json.dumps(environment(processes))
