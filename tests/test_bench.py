"""The baseline is the release's network, and the benchmarks say what they measured. No test looks at a time."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

from pixeldip import DiPPipeline, UserError
from pixeldip.bench import commands, timing
from pixeldip.bench.commands import as_compiled_as_told
from pixeldip.bench.contenders import Contender, compare_alone
from pixeldip.bench.release import ReleaseDiP, release_step
from pixeldip.bench.steps import TrainingStep, noise_and_labels, sampling_contender
from pixeldip.bench.timing import Times, count_flops, ratio, take_turns
from pixeldip.cli import main
from pixeldip.flow import guided_velocity
from pixeldip.model import DiP

from .conftest import PATIENCE, TINY_MODEL, opened_up, saved_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product and a copy that take no time: no test looks at what they reach."""
    monkeypatch.setitem(timing.CEILING_SIZES, "cpu", (128, 2**16))


@torch.no_grad()
def test_the_baseline_is_our_network_written_otherwise() -> None:
    model = opened_up(DiP(**TINY_MODEL, num_classes=3)).eval()
    release = ReleaseDiP(model)
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    torch.testing.assert_close(release(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-5)
    step = release_step(release, x, 0.4, 0.1, y, 3, 2.5)
    ours = x + 0.1 * guided_velocity(model, y, 3, 2.5)(x, 0.4, 0.4)
    torch.testing.assert_close(step, ours, rtol=1e-4, atol=1e-5)


def test_every_shape_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the eight after which torch stops, and never is the plain code taken instead."""
    counter = CompileCounter()
    double = torch.compile(lambda x: 2 * x, backend=counter, dynamic=False)
    with as_compiled_as_told():
        for size in range(2, 22):
            double(torch.zeros(size))
        assert counter.frame_count == 20
    monkeypatch.setattr(commands, "MOST_COMPILED", 20)
    with as_compiled_as_told(), pytest.raises(FailOnRecompileLimitHit):
        double(torch.zeros(22))


def test_turns_and_ratios() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = take_turns(steps, 3, CPU)
    assert "".join(order) == "aabb" + 3 * "ab" and all(len(values) == 3 for values in seconds.values())
    # within rounds 2, 2 and 3, whatever the machine did from round to round; the medians' ratio would be 3
    assert ratio({"slow": [2.0, 8.0, 6.0], "fast": [1.0, 4.0, 2.0]}, "slow", "fast") == 2
    assert Times.of([1.0, 2.0, 3.0]) == Times(2.0, 1.0)


def test_flops_of_attention_and_products() -> None:
    q = torch.randn(1, 2, 5, 4)
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 5 * 5 * 4)
    assert count_flops(lambda: torch.randn(3, 4) @ torch.randn(4, 5)) == 2 * 3 * 4 * 5


def test_flops_of_what_cannot_be_counted() -> None:
    """By its plain code with one image and two: what is paid once for a batch counts once."""
    weights = torch.randn(4, 5)

    def plain(images: int) -> Callable[[], Tensor]:
        return lambda: torch.randn(3 * images, 4) @ (weights @ torch.eye(5))

    contender = Contender(lambda: None, 7, 7, torch.float32, 20, counted=plain)
    assert contender.flops() == 2 * 4 * 5 * 5 + 7 * (2 * 3 * 4 * 5)
    contender.batch = 1
    assert contender.flops() == 2 * 4 * 5 * 5 + 2 * 3 * 4 * 5


def test_what_does_not_fit_is_named() -> None:
    def too_large() -> Contender:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def small() -> Contender:
        return Contender(lambda: torch.randn(3, 4) @ torch.randn(4, 5), 1, 1, torch.float32, 20)

    done: list[float] = []
    makers = {"ours": small, "plain": too_large, "ours, other": small}
    timings = compare_alone(makers, 3, CPU, lambda title, total: done.append(-total) or done.append)
    assert list(timings.rows) == ["ours", "ours, other"] and timings.record()["too_large"] == ["plain"]
    assert len(timings.ratios()) == 1 and len(done) == 12 and sum(done) == 0  # all the turns that were announced
    with pytest.raises(UserError, match="plain: the device's memory does not hold a step; give a smaller --batch"):
        compare_alone({"plain": too_large}, 3, CPU, lambda title, total: done.append)


def run(what: str, tmp_path: Path, capsys: pytest.CaptureFixture, *flags: str) -> dict:
    """The record a benchmark of a tiny model writes, which is also what it prints."""
    out = tmp_path / "results" / f"{what}.json"
    model = saved_model(tmp_path / "model", 16)
    common = ["--model", str(model), "--device", "cpu", "--out", str(out)]
    rounds = [] if what == "memory" else ["--rounds", "3"]
    assert main(["bench", what, *common, *rounds, *flags]) == 0
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    assert (record["benchmark"], record["height"]) == (what, 16) and record["environment"]["command"]
    assert out.with_suffix(".png").is_file()
    return record


def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = run("latency", tmp_path, capsys, "--batch", "2", "--heads", "--precision", "bf16")
    steps = record["steps"]
    ours = ["release, fp32", "release, autocast", "ours, fp32", "ours, bf16", "ours, bf16, modulation ahead"]
    assert list(steps) == [*ours, "head coordinate_mlp", "head attention", "head mlp", "DiT-only"]
    assert record["errors"]["ours, fp32"] < 1e-4 and record["errors"]["ours, bf16"] < 0.1
    whole = record["images"]["ours, bf16"]
    assert whole["steps"] == 100 and whole["seconds"] == pytest.approx(steps["ours, bf16"]["milliseconds"] / 10)
    for row in steps.values():
        assert row["share_of_limit"] == pytest.approx(row["floor_milliseconds"] / row["milliseconds"])
    # both branches and both halves of every convolution are cheaper than the release's
    assert steps["ours, fp32"]["gflops"] < steps["release, fp32"]["gflops"]
    assert steps["DiT-only"]["gflops"] < steps["ours, bf16"]["gflops"]
    assert steps["DiT-only"]["parameters"] < steps["ours, bf16"]["parameters"]
    rate = 2 / 100 / steps["ours, bf16"]["milliseconds"] * 1e3
    assert steps["ours, bf16"]["images_per_second"] == pytest.approx(rate)
    assert "head mlp / ours, bf16" in record["ratios"] and record["precision"] == "bfloat16"
    single = run("latency", tmp_path, capsys, "--heads", "--precision", "fp32")
    assert list(single["steps"])[4] == "ours, fp32, modulation ahead" and "head mlp / ours, fp32" in single["ratios"]


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = run("training", tmp_path, capsys, "--heads")
    steps = record["steps"]
    assert list(steps)[:3] == ["plain eager", "ours", "ours, checkpointing"] and "DiT-only" in steps
    assert steps["ours, checkpointing"]["gflops"] == pytest.approx(steps["ours"]["gflops"])  # what has to be computed
    assert {f"{name} / ours" for name in record["steps"] if name != "ours"} == set(record["ratios"])


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = run("throughput", tmp_path, capsys, "--batches", "1", "3")
    steps = record["steps"]
    for doing in ("sampling", "training"):
        assert [count for count, _ in record["series"][doing]] == [1, 3]
    assert steps["sampling, 3"]["gflops"] == pytest.approx(3 * steps["sampling, 1"]["gflops"])
    assert steps["training, 1"]["gflops"] > steps["sampling, 1"]["gflops"]
    # what is computed ahead of the steps counts as if it were part of each
    model = DiPPipeline.from_pretrained(tmp_path / "model").model.eval()
    whole = sampling_contender(model, *noise_and_labels(model, (16, 16), 1, CPU))
    whole.step()
    assert steps["sampling, 1"]["gflops"] == pytest.approx(whole.flops() / 1e9)


def test_memory(tmp_path: Path) -> None:
    """In a process of its own, as of the command: what other tests have freed stays resident, and would be used."""
    model, out = saved_model(tmp_path / "model", 16), tmp_path / "memory.json"
    command = [sys.executable, "-m", "pixeldip.cli", "bench", "memory", "--model", str(model), "--device", "cpu"]
    flags = ["--batches", "1", "48", "--heads", "--out", str(out)]
    subprocess.run([*command, *flags], check=True, capture_output=True, timeout=PATIENCE)
    record = json.loads(out.read_text())
    per_image = record["per_image"]
    assert 0 < per_image["sampling"] < per_image["training"]
    assert per_image["training, DiT-only"] < per_image["training"]
    peaks = {name: row["mebibytes"] for name, row in record["steps"].items()}
    assert peaks["training, 1"] < peaks["training, 48"]
    assert "sampling, head mlp, 48" in peaks and record["too_large"] == []


def test_memory_without_room(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is reported, and what does not is named."""
    taken = TrainingStep.__call__

    def step(self: TrainingStep, x: Tensor, y: Tensor) -> None:
        if len(x) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken(self, x, y)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    room = 2
    record = run("memory", tmp_path, capsys, "--batches", "1", "2", "4")
    assert record["too_large"] == ["training, 4", "training, checkpointing, 4"]
    assert [batch for batch, _ in record["series"]["training"]] == [1, 2] and "sampling, 4" in record["steps"]
    room = 0
    flags = ["--model", str(tmp_path / "model"), "--device", "cpu", "--batches", "1"]
    assert main(["bench", "memory", *flags]) == 2
    assert "1: the device's memory does not hold a step; give smaller --batches" in capsys.readouterr().err


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = run("scaling", tmp_path, capsys, "--processes", "2")  # beside one
    one, two = record["steps"]["1"], record["steps"]["2"]
    assert one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(two["images_per_second"] / one["images_per_second"] / 2)
    assert two["images_per_second"] == pytest.approx(2 / two["milliseconds"] * 1e3)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved_model(tmp_path / "dip-mine" / "first", 16)
    for flags, message in [
        (["--model", "dip-q/16"], "no preset 'dip-q/16'"),
        (["--model", "nowhere"], "no such folder"),
        (["--model", "dip-s/16", "--height", "20"], "multiples of 16"),
        (
            ["--model", str(saved_model(tmp_path / "model", 16)), "--width", "24", "--latent"],
            "squares of multiples of 16",
        ),
        (  # a folder of that name goes before presets
            ["--model", "dip-mine/first", "--width", "24", "--latent"],
            "squares of multiples of 16",
        ),
        (["--out", str(tmp_path / "x.png")], "x.png: is for the JSON line, a plot goes beside it"),
        (["--processes", "3"], "--processes means nothing to bench latency; leave it out"),
    ]:
        assert main(["bench", "latency", *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", "throughput", "--batches", "0"]) == 2
    assert capsys.readouterr().err == "pixeldip bench: --batches: input should be greater than or equal to 1, found 0\n"
