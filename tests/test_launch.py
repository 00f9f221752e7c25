"""The launch files start what they say, on processes of this machine. SLURM and Kubernetes themselves are not here."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pixeldip.recipe import save_recipe
from pixeldip.run_folder import read_events, read_metrics

from .conftest import tiny_recipe

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture
def arguments(tmp_path: Path, picture_folder: Path) -> list[str]:
    """What goes to `pixeldip train`."""
    recipe = tiny_recipe(tmp_path / "run", picture_folder, training={"steps": 4, "shard": True})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    return [str(tmp_path / "recipe.yaml"), "--training.seed", "5"]


def environment(**variables: object) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_trained(run: Path, processes: int) -> None:
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2, 3, 4]
    (start,) = read_events(run, "start")
    assert start["processes"] == processes
    command = start["command"].split()
    assert command[:4] == ["python", "-m", "pixeldip.cli", "train"] and command[-2:] == ["--training.seed", "5"]


def test_one_machine(arguments: list[str], tmp_path: Path) -> None:
    subprocess.run([LAUNCH / "machine.sh", *arguments], env=environment(PROCESSES=2), check=True, timeout=120)
    assert_trained(tmp_path / "run", 2)


def test_several_machines(arguments: list[str], tmp_path: Path) -> None:
    variables = environment(HEAD="localhost", MACHINES=2, PROCESSES=1, PORT=free_port())
    machines = [subprocess.Popen([LAUNCH / "machines.sh", *arguments], env=variables) for _ in range(2)]
    assert [machine.wait(timeout=120) for machine in machines] == [0, 0]
    assert_trained(tmp_path / "run", 2)


def test_a_machine_that_is_not_told_enough(arguments: list[str]) -> None:
    done = subprocess.run([LAUNCH / "machines.sh", *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and "HEAD: the name of one of the machines" in done.stderr


def test_kubernetes(arguments: list[str], tmp_path: Path) -> None:
    """The container's command, with its variables, on one machine."""
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    (machines,) = jobset["spec"]["replicatedJobs"]
    job = machines["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(variables["MACHINES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["PROCESSES"])
    assert variables["HEAD"] == f"{jobset['metadata']['name']}-{machines['name']}-0-0.{jobset['metadata']['name']}"
    here = environment(**variables | {"HEAD": "localhost", "MACHINES": 1, "PROCESSES": 2})
    command = [part.replace("29400", str(free_port())) for part in container["command"]]
    subprocess.run([*command, *arguments], env=here, check=True, timeout=120)
    assert_trained(tmp_path / "run", 2)
