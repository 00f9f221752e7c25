"""Provokes faults that take real processes, mounts or a network, and says what each did to a run.

    python benchmarks/faults/provoke.py [FAULT ...] [--times 1] [--seed 0]

Each fault ends a small run; the same command is given again, and must end bit for bit as a run left alone. Prints what
was said and lost, and a JSON line; the exit status is 1 if anything came out otherwise. Linux; CPU, fp32; disk_full and
read_only mount a small file system, which takes root.
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from kill_and_resume import newest_step, reached, recipe, tensors
from PIL import Image

from pixeldip import DiP, DiPPipeline, __version__
from pixeldip.recipe import Recipe, parse_recipe, recipe_values, save_recipe
from pixeldip.run_folder import read_events

STEPS = 120
PIXELDIP = [sys.executable, "-m", "pixeldip.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
JUMPING_CLOCK = """
import itertools, time
real, count = time.time, itertools.count()
time.time = lambda: real() - 1e5 * (next(count) % 7)
"""


class Broken(Exception):
    """A fault that came out otherwise than it should."""


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Broken(otherwise)


class Scene:
    """A folder for one fault, and the commands in it."""

    def __init__(self, folder: Path, dice: random.Random, alone: dict[int, Path]):
        self.folder, self.dice, self.alone = folder, dice, alone
        self.run = folder / "run"

    def recipe(self, **sections: dict) -> Recipe:
        values = recipe_values(recipe(self.run, STEPS))
        for name, section in sections.items():
            values[name] = {**values[name], **section}
        return parse_recipe(values)

    def start(self, settings: Recipe, launcher: list[str] = PIXELDIP, **options) -> subprocess.Popen:
        save_recipe(settings, self.folder / "recipe.yaml")
        command = [*launcher, *(["-m", "pixeldip.cli"] if launcher is not PIXELDIP else []), "train"]
        return subprocess.Popen(
            [*command, str(self.folder / "recipe.yaml")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            **options,
        )

    def until_a_random_step(self, process: subprocess.Popen) -> int:
        goal = self.dice.randint(8, STEPS // 2)
        while reached(self.run) < goal and process.poll() is None:
            time.sleep(0.002)
        expect(process.poll() is None, f"ended by itself with status {process.returncode}")
        return reached(self.run)

    def end(self, process: subprocess.Popen, status: int, said: str, within: float = 60) -> dict:
        """Waits for the end of a process that has just met its fault; what it said and what was lost."""
        began = time.perf_counter()
        output, _ = process.communicate(timeout=within)
        seconds = round(time.perf_counter() - began, 1)
        lines = [line for line in output.splitlines() if said in line]
        expect(process.returncode == status, f"status {process.returncode}, expected {status}:\n{output[-2000:]}")
        expect(bool(lines), f"nothing said {said!r}:\n{output[-2000:]}")
        lost = reached(self.run) - newest_step(self.run)
        last = lines[-1].strip().replace(f"{self.folder.parent}/", "")
        return {"status": status, "seconds": seconds, "said": last, "steps_lost": lost}

    def goes_on(self, settings: Recipe, launcher: list[str] = PIXELDIP, processes: int = 1, **options) -> None:
        """The same command ends as the run left alone."""
        process = self.start(settings, launcher, **options)
        output, _ = process.communicate(timeout=300)
        expect(process.returncode == 0, f"the same command ended with {process.returncode}:\n{output[-2000:]}")
        self.same(processes)

    def same(self, processes: int = 1) -> None:
        ours, theirs = tensors(self.run), tensors(self.alone[processes])
        different = [name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])]
        expect(not different, f"{len(different)} of {len(theirs)} tensors differ from the run left alone")


def children(pid: int, of: str = "") -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if of in Path(f"/proc/{child}/cmdline").read_text()]


def sigterm(scene: Scene, number: int = signal.SIGTERM) -> dict:
    settings = scene.recipe(training={"save_every": STEPS})
    process = scene.start(settings)
    scene.until_a_random_step(process)
    process.send_signal(number)
    ended = scene.end(process, 128 + number, "stopped after step")
    expect(ended["steps_lost"] == 0, "steps were lost")
    scene.goes_on(settings)
    return ended


def sigint(scene: Scene) -> dict:
    return sigterm(scene, signal.SIGINT)


def sigterm_torchrun(scene: Scene) -> dict:
    """torchrun passes the signal on, and ends with a status of its own."""
    settings = scene.recipe(training={"save_every": STEPS})
    process = scene.start(settings, TORCHRUN)
    scene.until_a_random_step(process)
    process.send_signal(signal.SIGTERM)
    ended = scene.end(process, 1, "stopped after step")
    expect(ended["steps_lost"] == 0, "steps were lost")
    scene.goes_on(settings, TORCHRUN, processes=2)
    return ended


def second_run(scene: Scene) -> dict:
    settings = scene.recipe(training={"steps": 10**9})
    process = scene.start(settings)
    scene.until_a_random_step(process)
    ended = scene.end(scene.start(settings), 2, f"process {process.pid} on")
    process.kill()
    process.communicate()
    few_more = scene.recipe(training={"steps": newest_step(scene.run) + 5})
    scene.end(scene.start(few_more), 0, "resumed in")
    return {**ended, "steps_lost": 0}


def rank_killed(scene: Scene) -> dict:
    settings = scene.recipe()
    process = scene.start(settings, TORCHRUN)
    scene.until_a_random_step(process)
    os.kill(scene.dice.choice(children(process.pid)), signal.SIGKILL)
    ended = scene.end(process, 1, "another process of this run has ended")
    scene.goes_on(settings, TORCHRUN, processes=2)
    return ended


def rank_killed_restarts(scene: Scene) -> dict:
    launcher = [*TORCHRUN, "--max-restarts", "1"]
    process = scene.start(scene.recipe(), launcher)
    scene.until_a_random_step(process)
    killed_at, newest = reached(scene.run), newest_step(scene.run)
    os.kill(scene.dice.choice(children(process.pid)), signal.SIGKILL)
    ended = scene.end(process, 0, "resumed in", within=120)
    scene.same(processes=2)
    resumed = [event["resumed_from"] for event in read_events(scene.run, "start")]
    expect(len(resumed) == 2, f"started {len(resumed)} times")
    return {**ended, "steps_lost": killed_at - newest}


def rank_frozen(scene: Scene) -> dict:
    """As on a machine without power or network: no connection is closed, nothing comes any more."""
    settings = scene.recipe()
    process = scene.start(settings, TORCHRUN)
    scene.until_a_random_step(process)
    os.kill(scene.dice.choice(children(process.pid)), signal.SIGSTOP)
    ended = scene.end(process, 1, "is not heard of any more", within=180)
    scene.goes_on(settings, TORCHRUN, processes=2)
    return ended


def torchrun_killed(scene: Scene) -> dict:
    """What it started is left without it."""
    settings = scene.recipe(training={"steps": 10**9, "save_every": 10**9})
    process = scene.start(settings, TORCHRUN)
    scene.until_a_random_step(process)
    process.kill()
    ended = scene.end(process, -signal.SIGKILL, "stopped after step")
    expect(ended["steps_lost"] == 0, "steps were lost")
    settings.training.steps = newest_step(scene.run) + 5
    scene.end(scene.start(settings, TORCHRUN), 0, "resumed in")
    return ended


def data_worker_killed(scene: Scene) -> dict:
    settings = scene.recipe(data={"in_memory": False, "workers": 2})
    process = scene.start(settings)
    scene.until_a_random_step(process)
    os.kill(scene.dice.choice(children(process.pid, "spawn_main")), signal.SIGKILL)
    ended = scene.end(process, 2, "that reads images died")
    scene.goes_on(settings)
    return ended


def storage_hangs(scene: Scene) -> dict:
    """Opening a file no longer comes back, as on a network file system whose server is gone."""
    files = pictures(scene.folder / "pictures")
    settings = scene.recipe(
        data={"source": str(files[0].parent), "in_memory": False, "workers": 2, "timeout": 20, "flip": False},
        training={"steps": 10**9},
    )
    process = scene.start(settings)
    scene.until_a_random_step(process)
    leases = [write_lease(file) for file in files]
    ended = scene.end(process, 2, "no batch came within data.timeout = 20 s", within=120)
    for lease in leases:
        os.close(lease)
    settings.training.steps = newest_step(scene.run) + 5
    scene.end(scene.start(settings), 0, "resumed in")
    return ended


def write_lease(file: Path) -> int:
    """A descriptor while which is open nobody else can open the file: Linux lets them wait for 45 seconds."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # which tells that somebody waits
    descriptor = os.open(file, os.O_RDWR)
    while True:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            return descriptor
        except BlockingIOError:  # it is being read just now
            time.sleep(0.001)


def pictures(folder: Path) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{shade}.png" for shade in range(8)]
    for shade, file in enumerate(files):
        Image.new("RGB", (16, 16), (30 * shade, 0, 0)).save(file)
    return files


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def disk_full(scene: Scene) -> dict:
    with mounted(scene.run, "16m"):
        settings = scene.recipe()
        filler = scene.run / "filler"
        process = scene.start(settings)
        scene.until_a_random_step(process)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        ended = scene.end(process, 2, "No space left on device")
        filler.unlink()
        scene.goes_on(settings)
    return ended


def read_only(scene: Scene) -> dict:
    with mounted(scene.run, "16m"):
        settings = scene.recipe()
        process = scene.start(settings)
        scene.until_a_random_step(process)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        subprocess.run(["mount", "-o", "remount,ro", scene.run], check=True)
        ended = scene.end(scene.start(settings), 2, "cannot be written (Read-only file system)")
        subprocess.run(["mount", "-o", "remount,rw", scene.run], check=True)
        scene.goes_on(settings)
    return ended


def out_of_memory(scene: Scene) -> dict:
    limit = 6 * 2**30
    settings = scene.recipe(training={"batch_size": 100_000})
    process = scene.start(settings, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    return scene.end(process, 2, "give --training.gradient-accumulation 2", within=120)


def clock_jumps(scene: Scene) -> dict:
    (scene.folder / "sitecustomize.py").write_text(JUMPING_CLOCK)
    path = os.pathsep.join([str(scene.folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    settings = scene.recipe()
    process = scene.start(settings, env=environment)
    scene.until_a_random_step(process)
    process.send_signal(signal.SIGTERM)
    ended = scene.end(process, 143, "stopped after step")
    scene.goes_on(settings, env=environment)
    times = [event["time"] for event in (read_events(scene.run, "start") + read_events(scene.run, "interrupted"))]
    expect(max(times) - min(times) > 5e4, "the clock did not jump")
    return ended


def unreachable(scene: Scene) -> dict[str, str]:
    hub = {"HF_HOME": str(scene.folder / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    return {**os.environ, **hub}


def hub_unreachable(scene: Scene) -> dict:
    process = scene.start(scene.recipe(data={"source": "owner/name"}), env=unreachable(scene))
    return scene.end(process, 2, "data.source owner/name", within=120)


def hub_model_cached(scene: Scene) -> dict:
    """The pretrained model is in the hub's cache, the hub is not there."""
    snapshot = scene.folder / "hub" / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    DiPPipeline(DiP(patch_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=0)).save_pretrained(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    settings = scene.recipe(training={"steps": 2}, model={"pretrained": "owner/name"})
    for name in ("patch_size", "hidden_size", "depth", "num_heads", "head_width"):
        setattr(settings.model, name, None)
    return scene.end(scene.start(settings, env=unreachable(scene)), 0, "from owner/name", within=120)


def hub_dataset_cached(scene: Scene) -> dict:
    """The images are in the cache of the datasets library, the hub is not there."""
    import datasets

    cache = scene.folder / "hub" / "datasets"
    folder = pictures(scene.folder / "pictures")[0].parent
    datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(cache))
    (built,) = cache.glob("imagefolder/*/*/*/")
    cached = cache / "owner___name" / "default" / "0.0.0" / built.name
    cached.parent.mkdir(parents=True)
    built.rename(cached)
    (arrow,) = cached.glob("*.arrow")
    arrow.rename(cached / "name-train.arrow")
    info = cached / "dataset_info.json"
    info.write_text(info.read_text().replace("imagefolder", "name"))
    process = scene.start(scene.recipe(data={"source": "owner/name"}, training={"steps": 2}), env=unreachable(scene))
    return scene.end(process, 0, "8 images", within=120)


FAULTS: dict[str, Callable[[Scene], dict]] = {
    function.__name__: function
    for function in (
        sigterm,
        sigint,
        sigterm_torchrun,
        second_run,
        rank_killed,
        rank_killed_restarts,
        rank_frozen,
        torchrun_killed,
        data_worker_killed,
        storage_hangs,
        disk_full,
        read_only,
        out_of_memory,
        clock_jumps,
        hub_unreachable,
        hub_dataset_cached,
        hub_model_cached,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", nargs="*", default=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        alone = {processes: Path(folder) / f"alone-{processes}" for processes in (1, 2)}
        for processes, run in alone.items():
            save_recipe(recipe(run, STEPS), Path(folder) / "alone.yaml")
            launcher = PIXELDIP if processes == 1 else [*TORCHRUN, "-m", "pixeldip.cli"]
            subprocess.run([*launcher, "train", str(Path(folder) / "alone.yaml")], check=True, capture_output=True)
        for name in arguments.faults:
            for time_ in range(arguments.times):
                place = Path(folder) / f"{name}-{time_}"
                place.mkdir()
                try:
                    outcome = FAULTS[name](Scene(place, dice, alone))
                except (Broken, subprocess.SubprocessError) as error:
                    outcome = {"broken": str(error)}
                found.setdefault(name, []).append(outcome)
                print(f"{name}: {outcome}", flush=True)
    record = {"benchmark": "provoke", "pixeldip": __version__, "torch": torch.__version__, "faults": found}
    print(json.dumps(record))
    return 1 if any("broken" in outcome for outcomes in found.values() for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
