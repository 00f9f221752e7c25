"""Sharing a saved model: its card, which says how to use it and what made it, and the upload."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData

from . import __version__
from .errors import UserError
from .files import write_json
from .run_folder import ENVIRONMENT, NETWORK, RECIPE, newest_checkpoint, newest_preview, read_evaluations, read_metrics
from .saved_model import CONFIG, INDEX

CARD = "README.md"
SAMPLES = "samples.png"
LICENCE = "## Licence\n\n{}"
NO_LICENCE = "None was stated for these weights."
FUSED = (
    "## Adapters\n\nAdapters (LoRA) were fused into these weights: {}. Samples and numbers above are of those before."
)
TEMPLATE = Path(__file__).with_name("model_card.md")


def write_model_card(
    folder: Path,
    model: Mapping[str, Any],
    size: tuple[int, int],
    class_names: Sequence[str],
    parameters: int,
    origin: Path | None = None,
    license: str | None = None,
    fused: Sequence[str] = (),
) -> None:
    """Writes README.md, and samples.png if there are any, into a saved model's folder.

    Args:
        model: the network's configuration.
        size: (height, width) it was trained at.
        origin: the run it was trained in, or the saved folder it was loaded from, whose card it keeps.
        license: of the weights, as the hub spells it; None: the card says that none was stated.
        fused: names of adapters that were fused into the weights since they were loaded.
    """
    if origin and (origin / CARD).is_file():
        _keep_card(origin, folder, license, fused)
        return
    run = origin if origin and newest_checkpoint(origin) else None
    data = ModelCardData(
        license=license,
        library_name="pixeldip",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "dip", "pixel-space", *(["class-conditional"] if model["num_classes"] else [])],
    )
    if run and (preview := newest_preview(run)):
        shutil.copyfile(preview, folder / SAMPLES)
    example = list(class_names[:2]) or list(range(min(2, model["num_classes"])))
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=(run or folder).resolve().name,
        model=model,
        size=size,
        class_names=class_names,
        parameters=f"{parameters / 1e6:.1f} M",
        example=repr(example) if example else None,
        has_samples=(folder / SAMPLES).is_file(),
        licence=LICENCE.format(license or NO_LICENCE),
        version=__version__,
        run=_facts(run) if run else None,
    )
    _save_card(card, folder, fused)


def check_license(origin: Path | None, license: str | None) -> None:
    """Raises UserError if the card of a saved folder, which is kept, states another licence in words of its own."""
    if license is None or origin is None or not (origin / CARD).is_file():
        return
    card = ModelCard.load(origin / CARD)
    stated = card.data.license
    if stated != license and LICENCE.format(stated or NO_LICENCE) not in card.text:
        raise UserError(
            f"{origin / CARD}: states the licence {stated} in words of its own, which license={license!r} would "
            "contradict: leave it out, and edit the card that is saved"
        )


def _keep_card(origin: Path, folder: Path, license: str | None, fused: Sequence[str]) -> None:
    """The card of a model that is saved again, with a licence if one is stated now."""
    if (origin / SAMPLES).is_file() and origin.resolve() != folder.resolve():
        shutil.copyfile(origin / SAMPLES, folder / SAMPLES)
    card = ModelCard.load(origin / CARD)
    if license:
        card.text = card.text.replace(LICENCE.format(card.data.license or NO_LICENCE), LICENCE.format(license))
        card.data.license = license
    _save_card(card, folder, fused)


def _save_card(card: ModelCard, folder: Path, fused: Sequence[str]) -> None:
    if fused and (told := FUSED.format(", ".join(fused))) not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{told}\n"
    card.save(folder / CARD)


def upload(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a saved model to the hub; makes the repository if it is not there. Returns the commit's address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    message = commit_message or "Upload DiPPipeline"
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, create_pr=create_pr))


def _facts(run: Path) -> dict[str, Any]:
    """What the run folder knows."""
    recipe = (run / RECIPE).read_text(encoding="utf-8")
    checkpoint, metrics, evaluations = newest_checkpoint(run), read_metrics(run), read_evaluations(run)
    step = int(checkpoint.name.removeprefix("step-"))
    losses = [entry["loss"] for entry in metrics if entry["step"] <= step]
    environment = run / ENVIRONMENT
    return {
        "recipe": recipe.strip(),
        "values": yaml.safe_load(recipe),
        "step": step,
        "loss": losses[-1] if losses else None,
        "environment": json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        "evaluation": _numbers(evaluations[-1]) if evaluations else None,
    }


def _numbers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    floors = evaluation["floors"]
    rows = [(name, f"{value:.4g}", _floor(floors.get(name))) for name, value in evaluation["metrics"].items()]
    return {"step": evaluation["step"], "rows": rows}


def _floor(floor: Mapping[str, float] | None) -> str:
    return f"{floor['real']:.4g}" if floor else ""


def forget_origin(folder: Path) -> None:
    """Takes out of a saved pipeline's files what diffusers notes there: the path on this machine it came from."""
    for path in (folder / INDEX, folder / NETWORK / CONFIG):
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("_name_or_path", None):
            write_json(path, values)
