"""What a person types, and what comes back."""

import contextlib
import gc
import json
import os
import platform
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.cli import COMMANDS, main
from pixeldip.images import display_scale, from_uint8, grid, to_uint8
from pixeldip.recipe import parse_recipe, save_recipe
from pixeldip.run_folder import newest_checkpoint
from pixeldip.sampling import SampledImages, deal_classes, parse_seeds
from pixeldip.settings import SamplingSettings
from pixeldip.training import train

from .conftest import TINY_MODEL, largest_file, opened_up, tiny_recipe


def test_help_needs_no_torch() -> None:
    code = (
        "import contextlib, sys\n"
        "from pixeldip.cli import COMMANDS, main\n"
        "for command in ([], *([name] for name in COMMANDS), ['evaluate', 'reference']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([*command, '--help'])\n"
        "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("False False\n")
    for command in COMMANDS:
        assert f"  {command} " in output and f"usage: pixeldip {command} " in output


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not told")
def test_commands_keep_freed_memory() -> None:
    code = (
        "import resource; from pixeldip.cli import main; main(['convert', 'nowhere.ckpt', 'out']); import torch\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def fewest():\n"
        "    seen = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt for _ in range(9) if torch.ones(2**24).all()]\n"
        "    return min(after - before for before, after in zip(seen, seen[1:]))\n"
        "print(max(fewest(), ThreadPoolExecutor(1).submit(fewest).result()))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) < 100  # 64 MiB are 16384 pages


@pytest.mark.parametrize("while_importing", ["tyro", "torch"])
def test_ctrl_c_before_anything_has_begun(while_importing: str) -> None:
    code = (
        "import sys\n"
        "class CtrlC:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {while_importing!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "from pixeldip.cli import main\n"
        "sys.exit(main(['convert', 'nowhere.ckpt', 'out']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_a_reader_that_has_seen_enough(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pixeldip.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full disk")
def test_output_to_a_full_disk() -> None:
    command = [sys.executable, "-m", "pixeldip.cli", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "pixeldip --help: what it writes to: No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tain"], "perhaps train"),
        (["train"], "data.source is missing"),
        (["train", "no.yaml"], "no.yaml: no such recipe file"),
        (["train", "my-imags"], "neither a .yaml file nor one of the recipes"),
        (["train", "--data.source", "nowhere"], "no such folder"),
        (["train", "--training.steps", "0"], "training.steps"),
        (["train", "--data.source", "emoji", "--out", ""], "out: string should have at least 1 character, found ''"),
        (["train", "--data.source", ".", "--optimizer.betas", "0.9", "1"], "optimizer.betas.1: input should be less"),
        (["train", "--plan", "--data.source", "fake.parquet"], "data.source fake.parquet: "),
        (["sample", "nowhere"], "no such folder"),
        (["sample", "nowhere/"], "nowhere/: no such folder"),
        (["evaluate", "nowhere/", "--metrics", "boundary"], "nowhere/: no such folder"),
        (["sample", "{model}", "--classes", "beee"], "perhaps 'bee'"),
        (["sample", "{model}", "--classes", "3"], "classes 0 to 2"),
        (["sample", "{model}", "--seeds", "a-b"], "seeds 'a-b'"),
        (["sample", "{model}", "--height", "20"], "multiples of 8"),
        (["sample", "{model}", "--steps", "abc"], "sample: --steps: expected a whole number, found 'abc'\n"),
        (["sample", "{model}", "--steps"], "sample: --steps: a value is missing\n"),
        (
            ["sample", "{model}", "--guidance-interval", "1"],
            "--guidance-interval: expected a number and a number, found",
        ),
        (
            ["sample", "{model}", "--solver", "rk4"],
            "--solver: choose one of ab2, ancestral, ddim, euler, heun, not 'rk4'",
        ),
        (["train", "--training.steps", "x"], "train: --training.steps: expected a whole number, found 'x'\n"),
        (["sample", "{model}", "--height", "800000000"], "--height: input should be less than or equal to 16384"),
        (["sample", "{model}", "--steps", "0"], "--steps: input should be greater than or equal to 1, found 0"),
        (["sample", "{model}", "--steps", "100001"], "--steps: input should be less than or equal to 100000"),
        (["sample", "{model}", "--guidance", "nan"], "--guidance: input should be a finite number"),
        (["convert", "nothing.ckpt", "out"], "nothing.ckpt: no such file"),
        (["convert", "nothing.ckpt", "out", "--resolution", "0"], "--resolution: input should be"),
        (
            ["evaluate", "a.npz", "--patch-size", "0"],
            "--patch-size: input should be greater than or equal to 2, found 0",
        ),
        (["evaluate", "a.npz", "--evaluation-batch-size", "-1"], "--evaluation-batch-size: input should be"),
        (["evaluate", "reference", "emoji", "--resolution", "0"], "--resolution: input should be"),
        (["evaluate", "reference", "a.npz", "--resolution", "9"], "a.npz: is measured as it is; leave out"),
        (["evaluate", "reference", "emoji", "--out", "."], "cannot be written (a folder has that name)"),
        (["evaluate", "a.npz"], "a.npz: no such file"),
        (["evaluate", "a.npz", "--images", "9"], "--images is of the samples of a model; a.npz holds images"),
        (["evaluate", "a.npz", "--guidance", "2"], "--guidance is of the samples of a model"),
        (["demo", "--steps", "0"], "--steps: input should be greater than or equal to 1, found 0"),
        (["demo", "--seed", "-1"], "--seed: input should be greater than or equal to 0, found -1"),
        (["sample", "{model}", "--class-order-seed", "-1"], "--class-order-seed: input should be"),
    ],
)
def test_mistakes_are_one_message_and_status_2(
    arguments: list[str],
    message: str,
    model_folder: Path,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.parquet").write_text("x")
    assert main([a.format(model=model_folder) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "╭" not in error


@pytest.mark.filterwarnings("error")  # a file that Python closes later, when the disk is still full
@pytest.mark.parametrize("out", ["samples", "samples.npz"])
def test_sampling_onto_a_full_disk(out: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with largest_file(300):
        status = main(["sample", str(model_folder), "--seeds", "0-3", "--steps", "1", "--out", str(tmp_path / out)])
        gc.collect()
    assert status == 2 and "cannot be written (File too large)" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_tells_of_the_images_in_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, out = tmp_path / "model", tmp_path / "samples"
    shutil.copytree(model_folder, model)
    command = ["sample", str(model), "--seeds", "0-3", "--steps", "1", "--precision", "fp32", "--batch-size", "1"]
    command += ["--out", str(out)]
    read = SampledImages.read

    def stopped(images: SampledImages, start: int, *rest: object) -> np.ndarray:
        if start == 2:
            raise KeyboardInterrupt
        return read(images, start, *rest)

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir()}

    with monkeypatch.context() as patch:
        patch.setattr(SampledImages, "read", stopped)
        assert main(command) == 130
    listed = [json.loads(line)["file_name"] for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert listed == ["000000.png", "000001.png"]
    assert contents().keys() == {*listed, "metadata.jsonl", "settings.json"}
    assert json.loads((out / "settings.json").read_text())["seeds"] == "0-3"
    assert main([*command, "--batch-size", "4"]) == 0
    whole = contents()
    assert whole.keys() == {"grid.png", "metadata.jsonl", "settings.json", *(f"00000{i}.png" for i in range(4))}
    assert whole["metadata.jsonl"].count(b"\n") == 4
    with largest_file(300):
        assert main([*command, "--batch-size", "4"]) == 2
    for flags, told in (
        (["--guidance", "2"], "guidance_scale 4.0, not 2.0"),
        (["--classes", "ant"], "classes [0, 1, 2], not [0]"),
        (["--class-order-seed", "0"], "class_order_seed None, not 0"),
        (["--height", "24"], "height 16, not 24"),
        (["--precision", "bf16"], "precision 'float32', not 'bfloat16'"),
    ):
        assert main([*command, *flags]) == 2
        assert f"holds images of {told}; name another folder, or delete" in capsys.readouterr().err
    assert contents() == whole
    trained_on = DiPPipeline.from_pretrained(model)
    opened_up(trained_on.model)
    trained_on.save_pretrained(model)
    assert main(command) == 2
    assert "holds images of weights_sha256 '" in capsys.readouterr().err
    assert contents() == whole
    (out / "settings.json").unlink()
    assert main(command) == 2 and "holds images and no settings.json" in capsys.readouterr().err


def test_a_mistyped_flag_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--model.dpeth", "3"])
    assert caught.value.code == 2 and "--model.depth" in "".join(capsys.readouterr())


def test_the_users_folder(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["sample", str(model_folder), "--seeds", "0-1", "--steps", "1", "--out=~/a.npz"]) == 0
    assert main(["evaluate", "~/a.npz", "--metrics", "boundary", "--out", "~/a.json"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "a.json"}
    assert parse_recipe({"out": "~/run"}).out == str(tmp_path / "run")


def test_samples_do_not_depend_on_the_batch(model_folder: Path, tmp_path: Path) -> None:
    common = ["sample", str(model_folder), "--seeds", "0-4,9", "--steps", "3", "--precision", "fp32", "--device", "cpu"]
    common += ["--classes", "bee", "cow", "--class-order-seed", "7", "--height", "24", "--width", "8"]
    for size in (1, 4):
        assert main([*common, "--batch-size", str(size), "--out", str(tmp_path / str(size))]) == 0
    for i in range(6):
        a, b = (np.asarray(Image.open(tmp_path / size / f"{i:06d}.png")).astype(int) for size in ("1", "4"))
        assert abs(a - b).max() <= 1  # one grey level: matrix products round differently in another batch
    pictures = [Image.open(tmp_path / "4" / f"{i:06d}.png") for i in range(6)]
    notes = [json.loads(picture.info["pixeldip"]) for picture in pictures]
    classes = [("ant", "bee", "cow")[k] for k in deal_classes((1, 2), 6, order_seed=7)]
    told = list(zip((0, 1, 2, 3, 4, 9), classes))
    assert [(note["seed"], note["class"]) for note in notes] == told and {p.size for p in pictures} == {(8, 24)}
    assert notes[5]["num_inference_steps"] == 3
    listed = [json.loads(line) for line in (tmp_path / "4" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["label"]) for row in listed] == told
    assert (tmp_path / "4" / "grid.png").is_file() and json.loads((tmp_path / "4" / "settings.json").read_text())[
        "seeds"
    ] == "0-4,9"


def test_images_in_a_precision(model_folder: Path) -> None:
    pipeline = DiPPipeline.from_pretrained(model_folder)
    full, half = (
        SampledImages(pipeline, SamplingSettings(steps=2), range(3), precision=precision)
        for precision in (torch.float32, torch.bfloat16)
    )
    assert (full.made_with()["precision"], half.made_with()["precision"]) == ("float32", "bfloat16")
    assert not np.array_equal(full.read(0, 3), half.read(0, 3))


def test_grey_images() -> None:
    pipeline = DiPPipeline(opened_up(DiP(**TINY_MODEL, in_channels=1, num_classes=0)), height=16, width=24)
    settings = SamplingSettings(steps=2, guidance=1.0)
    pictures = pipeline(seeds=[3, 4], **settings.pipeline_arguments()).images
    pixels = SampledImages(pipeline, settings, [3, 4]).read(0, 2)
    assert {picture.mode for picture in pictures} == {"L"}
    np.testing.assert_array_equal(pixels, np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))


def test_train_then_sample(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = "--data.resolution 16 --model.hidden-size 32 --model.depth 1 --training.steps 2 --training.batch-size 4"
    run = tmp_path / "my run"
    assert (
        main(["train", "--data.source", str(picture_folder), "--out", str(run), *flags.split(), "--preview.every", "0"])
        == 0
    )
    pixeldip, *told = shlex.split(capsys.readouterr().out.rpartition("sample it: ")[2])
    assert (pixeldip, told) == ("pixeldip", ["sample", str(run)])
    assert main([*told, "--seeds", "0-3", "--steps", "2", "--out", str(tmp_path / "s")]) == 0
    assert len(list((tmp_path / "s").glob("0*.png"))) == 4


def test_demo_report_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "3", "--device", "cpu"]) == 0
    distances = json.loads(Path("runs/demo/evaluation.json").read_text())
    kernel = distances["kernel_distance"]  # three steps make no drawings; real ones lie near the floor
    assert kernel["samples_to_held_out"] > 5 * abs(kernel["train_to_held_out"]) and kernel["floor_deviation"] > 0
    page = Path("runs/demo/report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "@import" not in page
    assert page.count("data:image/png;base64,") >= 3 * 10 + 4 and "<svg" in page
    for text in ("red heart", "rocket", "pixeldip train demo --data.source", "3 steps", "held-out", "noise floor"):
        assert text in page


def test_trackers(tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder, logging={"trackers": ["tensorboard"]})
    train(recipe, Console(quiet=True))
    shutil.rmtree(newest_checkpoint(tmp_path / "run"))
    train(recipe, Console(quiet=True))  # steps that it went back behind count as it ran them again
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_goes_on_in_its_tracker_and_one_of_the_same_name_does_not(
    tmp_path: Path, picture_folder: Path
) -> None:
    """By a process of its own: trackio reads where to write as it is imported."""
    pytest.importorskip("trackio")
    recipes = []
    for out, steps in (("a", 3), ("b", 2), ("a", 6)):
        run = tmp_path / out / "run"
        recipe = tiny_recipe(run, picture_folder, training={"steps": steps}, logging={"trackers": ["trackio"]})
        recipes.append(str(tmp_path / f"{len(recipes)}.yaml"))
        save_recipe(recipe, Path(recipes[-1]))
    code = "import sys; from pixeldip.cli import main; sys.exit(any(main(['train', each]) for each in sys.argv[1:]))"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, *recipes], env=environment, check=True, capture_output=True)
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "pixeldip.db")) as database:
        rows = database.execute("select run_id, step from metrics order by id").fetchall()
    runs = list(dict.fromkeys(run for run, _ in rows))
    assert [[step for run, step in rows if run == each] for each in runs] == [[1, 2, 3, 4, 5, 6], [1, 2]]


def test_a_tracker_that_cannot_be_started(tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder, logging={"trackers": ["tensorboard"]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    with pytest.raises(UserError, match=r"logging\.trackers: tensorboard cannot be started \(.*File exists"):
        train(recipe, Console(quiet=True))


def test_a_tracker_that_is_not_installed(tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = tiny_recipe(tmp_path / "run", picture_folder, logging={"trackers": ["wandb"]})
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'pixeldip\[wandb\]'"):
        train(recipe, Console(quiet=True))


def test_seeds() -> None:
    assert parse_seeds("7") == [7] and parse_seeds("0-2,9, 4") == [0, 1, 2, 9, 4]
    for text in ("", "5-3", "0-3,9-5", "7-", "x", "1,,2"):
        with pytest.raises(UserError):
            parse_seeds(text)


def test_uint8_rounds_as_the_release() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)


def test_grid() -> None:
    cells = [Image.new("RGB", (2, 1), (i, 0, 0)) for i in range(3)]
    sheet = grid(cells, columns=2, gap=1, scale=2)
    assert sheet.size == (9, 5)
    assert [sheet.getpixel(p)[0] for p in ((0, 0), (5, 1), (0, 3), (4, 0), (5, 3))] == [0, 1, 2, 255, 255]
    assert [display_scale(width) for width in (16, 64, 256)] == [6, 2, 1]


def test_sampling_with_compiled_blocks(model_folder: Path, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    common = ["sample", str(model_folder), "--seeds", "0-1", "--steps", "2", "--device", "cpu", "--precision", "fp32"]
    for name, flags in (("plain.npz", []), ("compiled.npz", ["--compile"])):
        assert main([*common, "--out", str(tmp_path / name), *flags]) == 0
        assert bool(counters["stats"]["unique_graphs"]) == bool(flags)
    plain, compiled = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("plain.npz", "compiled.npz"))
    assert np.abs(plain - compiled).max() <= 1
