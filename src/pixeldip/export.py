"""A model's network as a program of its own: for `torch.export`, or as ONNX, which needs neither torch nor pixeldip."""

import contextlib
import importlib.util
import io
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .arguments import ExportArguments
from .errors import UserError
from .files import check_writable, write_json
from .flow import VelocityNetwork, time_grid
from .model import DiP, check_size
from .pipeline import DiPPipeline
from .provenance import made_by
from .sampling import load_pipeline
from .terminal import PlainConsole, quieted, say

RECORD = "export.json"
PROGRAM, PACKAGE, ONNX = "model.pt2", "model.aoti.pt2", "model.onnx"
CHECKED_BATCHES = (1, 2, 5)
TOLERANCE = 1e-3  # of the largest value
LARGEST_BATCH = 4096
STEPS = 50


def export_command(arguments: ExportArguments) -> None:
    """What `pixeldip export` does."""
    console = PlainConsole()
    pipeline = load_pipeline(arguments.model, torch.device("cpu"))
    height, width = arguments.height or pipeline.config.height, arguments.width or pipeline.config.width
    errors = export_model(pipeline, arguments.out, arguments.format, height, width, console)
    for name, error in errors.items():
        say(console, f"{arguments.out / name}: differs from the model by {error:.1e} of its largest value")


def export_model(
    pipeline: DiPPipeline, out: Path, format: str, height: int, width: int, console: Console
) -> dict[str, float]:
    """Writes (x, t, y) -> velocity for any batch size and one image size, checked against the model itself.

    x is float32 (B, C, H, W), t float32 (B,), y int64 (B,), where `null_class` of export.json means no class. "torch"
    writes `model.pt2` for `torch.export.load` and, where a C++ compiler is found, `model.aoti.pt2` for
    `torch._inductor.aoti_load_package`; "onnx" writes `model.onnx`. What is there already is replaced once all is
    written and checked.

    Returns:
        The largest difference from the model by file, relative to the largest value.

    Raises:
        UserError: if a package is missing, the size does not fit, a program does not do what the model does, or
            nothing can be written there; the folder is then as it was.
    """
    model = pipeline.model.eval()
    check_size(height, width, model.config.patch_size)
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"export to ONNX needs {package}: pip install 'pixeldip[export]'")
    for name in (RECORD, ONNX) if format == "onnx" else (RECORD, PROGRAM, PACKAGE):
        check_writable(out / name)
    with console.status("tracing"), _quiet():
        program = torch.export.export(model, _inputs(model, height, width, 2), dynamic_shapes=_dynamic_batch())
    # not `writing`: a failure's traceback would keep its frames, and torch 2.11 crashes when the program goes with them
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as partial:
            written = _write_programs(program, Path(partial), format, console)
            with console.status("checking"):
                errors = {name: difference(velocity, model, height, width) for name, velocity in written.items()}
            for name, error in errors.items():
                if not error <= TOLERANCE:  # nor is NaN
                    raise UserError(
                        f"{out / name}: differs from the model by {error:.2g} of its largest value; it was not written"
                    )
            record = {
                **made_by(),
                "height": height,
                "width": width,
                "channels": model.config.in_channels,
                "null_class": model.config.num_classes,
                "class_names": pipeline.config.class_names,
                "times": time_grid(STEPS, 1.0, model.objective),
                "differences": errors,
            }
            write_json(Path(partial) / RECORD, record)
            for path in Path(partial).iterdir():
                path.replace(out / path.name)
            if format == "torch" and PACKAGE not in written:  # an earlier one would be of another model
                (out / PACKAGE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    return errors


def _write_programs(
    program: torch.export.ExportedProgram, folder: Path, format: str, console: Console
) -> dict[str, VelocityNetwork]:
    """The programs of a format, read back from the files written, by name."""
    if format == "onnx":
        with console.status("translating"), _quiet():
            translated = torch.onnx.export(
                program, dynamo=True, input_names=["x", "t", "y"], output_names=["velocity"], verbose=False
            )
            translated.save(str(folder / ONNX))
        return {ONNX: _onnx_velocity(folder / ONNX)}
    saved = io.BytesIO()  # torch's own writer of files aborts the process where the disk is full
    torch.export.save(program, saved)
    (folder / PROGRAM).write_bytes(saved.getbuffer())
    written: dict[str, VelocityNetwork] = {PROGRAM: torch.export.load(folder / PROGRAM).module()}
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        compiled = io.BytesIO()
        with console.status("compiling"), _quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=compiled)
        (folder / PACKAGE).write_bytes(compiled.getbuffer())
        written[PACKAGE] = torch._inductor.aoti_load_package(str(folder / PACKAGE))
    else:
        say(console, "no C++ compiler found: no AOTInductor package was made")
    return written


@torch.no_grad()
def difference(velocity: VelocityNetwork, model: DiP, height: int, width: int) -> float:
    """The largest difference of a program from the model, over several batch sizes, relative to the largest value; NaN
    where one of them gives it."""
    errors = []
    for batch in CHECKED_BATCHES:
        inputs = _inputs(model, height, width, batch)
        expected = model(*inputs)
        errors.append((velocity(*inputs) - expected).abs().max() / expected.abs().max())
    return torch.stack(errors).max().item()


def _inputs(model: DiP, height: int, width: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, model.config.in_channels, height, width, generator=generator)
    t = torch.rand(batch, generator=generator)
    return x, t, torch.arange(batch) % (model.config.num_classes + 1)


def _dynamic_batch() -> dict[str, Any]:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    return {name: {0: batch} for name in ("x", "t", "y")}


def _onnx_velocity(path: Path) -> VelocityNetwork:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        inputs = {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()}
        return torch.from_numpy(session.run(None, inputs)[0])

    return velocity


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes about packages it does not find and interfaces it will change."""
    with quieted("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
