"""A pipeline from a run, a folder or the hub, and back to a folder or the hub, with its model card."""

import inspect
import os
import tempfile
from pathlib import Path
from typing import Any, Self

from diffusers.utils import is_accelerate_available

from ..errors import UserError, in_one_line
from ..files import check_folder
from ..run_folder import belongs_to_a_run, no_such_folder, resolve_model
from ..saved_model import check_saved_model, only_variant
from ..sharing import check_license, forget_origin, upload, write_model_card
from ..terminal import quieted

_UPLOAD = ("private", "token", "commit_message", "create_pr")


class SavingMixin:
    """What `DiPPipeline` adds to diffusers' loading and saving; it stands before `DiffusionPipeline`."""

    _origin: Path | None = None
    """The folder it came from, of which its model card tells."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """A pipeline from a run folder (its newest checkpoint, EMA weights), a saved folder or a hub id.

        Only safetensors are read, and no code that comes with the model is run. Weights that are saved as one variant
        alone, such as "bf16", need no `variant`.

        Raises:
            UserError: if there is no model of that name, or it cannot be loaded.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(os.path.expanduser(name))
        if not is_accelerate_available():
            kwargs.setdefault("low_cpu_mem_usage", False)  # the other way needs it, and says so at length
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        where = resolve_model(name)
        is_here = Path(where).is_dir()
        try:
            with quieted("diffusers.pipelines.pipeline_utils"):  # why the hub is not reached is in the error, too
                saved = where if is_here else cls.download(where, **kwargs)
            check_saved_model(Path(saved))
            if kwargs.get("variant") is None:
                kwargs["variant"] = only_variant(Path(saved))
            pipeline = super().from_pretrained(saved, **kwargs)
        except UserError:
            raise
        except Exception as error:  # diffusers and the hub's client raise many kinds
            hub = "" if is_here else f"{no_such_folder(folder)}, and from the hub it "
            why = in_one_line(error if is_here else error.__cause__ or error)  # of the hub the cause says what to do
            raise UserError(f"{name}: {hub}cannot be loaded ({why})") from error
        pipeline._origin = folder if folder.is_dir() else None
        return pipeline

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        license: str | None = None,
        model_card: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers, with a model card: a README.md that says how to use the model and what made it.

        A pipeline that came from a run folder tells of that run; one that came from a saved folder keeps its card.

        Args:
            license: of the weights, as the hub spells it, for instance "cc-by-4.0".
            model_card: False leaves the README.md out.

        Raises:
            UserError: if a keyword is none of these or diffusers', the folder is a file or a run's, the model cannot be
                saved so that it loads again, or the card it keeps states its licence in words of its own.
        """
        hub = {key: kwargs.pop(key) for key in ("repo_id", *_UPLOAD) if key in kwargs}
        if unknown := sorted(kwargs.keys() - inspect.signature(super().save_pretrained).parameters.keys()):
            raise UserError(f"save_pretrained: there is no keyword {unknown[0]!r}")
        save_directory = Path(os.path.expanduser(save_directory))  # as from_pretrained reads it
        check_folder(save_directory)
        if belongs_to_a_run(save_directory):
            raise UserError(
                f"{save_directory}: a run's folder, where a saved model would be taken for what the run trains; save "
                "to a folder of its own"
            )
        if model_card:
            check_license(self._origin, license)
        super().save_pretrained(save_directory, **kwargs)
        forget_origin(save_directory)
        if model_card:
            write_model_card(
                save_directory,
                dict(self.model.config),
                (self.config.height, self.config.width),
                self.config.class_names,
                self.model.num_parameters(),
                self._origin,
                license,
                sorted(self.fused_loras),
            )
        if push_to_hub:
            upload(save_directory, hub.pop("repo_id", save_directory.name), **hub)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **kwargs: Any) -> str:
        """Saves the pipeline with its model card and uploads it.

        Args:
            repo_id: "owner/name" on the hub; made if it is not there.
            license: as for `save_pretrained`.
            kwargs: private, token, commit_message and create_pr of the upload, and what `save_pretrained` takes.

        Returns:
            The address of the commit.
        """
        hub = {key: kwargs.pop(key) for key in _UPLOAD if key in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(saved, license=license, **kwargs)
            return upload(saved, repo_id, **hub)
