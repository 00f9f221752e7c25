"""The models a page offers, and those that are in memory."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UserError
from ..pipeline import DiPPipeline
from ..run_folder import LOG, names_a_model, resolve_model
from ..sampling import load_pipeline
from ..saved_model import INDEX

KEPT = 2  # models in memory at once: what a comparison needs


class Models:
    """Models by name: those named at the start, then those found in the folders.

    Nothing else can be loaded from the page, whatever a request says.

    Args:
        named: run folders, saved models or hub ids.
        folders: places whose sub-folders are looked through for runs and saved models.
    """

    def __init__(self, named: Sequence[str], folders: Sequence[Path], device: torch.device, precision: torch.dtype):
        self.named, self.folders, self.device, self.precision = tuple(named), tuple(folders), device, precision
        self._loaded: dict[tuple[str, int], DiPPipeline] = {}
        self._lock = threading.Lock()
        for name in self.named:
            resolve_model(name)

    def names(self) -> list[str]:
        """As of now: a run appears with its first checkpoint."""
        return list(self._offered().values())

    def offered(self, name: str) -> str | None:
        """The model's name here, given any spelling of its path; None if it is not offered."""
        return self._offered().get(_place(name))

    def runs(self) -> list[str]:
        """Run folders that have begun to train, the one written last first."""
        folders = _first_by_place([*self.named, *map(str, self._sub_folders())]).values()
        begun = {name: log.stat().st_mtime for name in folders if (log := Path(name, LOG)).is_file()}
        return sorted(begun, key=begun.__getitem__, reverse=True)

    def load(self, name: str) -> DiPPipeline:
        """The model; of a run, its newest checkpoint.

        Raises:
            UserError: if the page does not offer it, or it cannot be loaded.
        """
        if name not in self.names():
            raise UserError(f"model {name!r}: not one of those offered here" if name else "choose a model first")
        where = resolve_model(name)
        index = Path(where, INDEX)
        version = where, index.stat().st_mtime_ns if index.is_file() else 0  # a saved folder may be saved to again
        with self._lock:
            pipeline = self._loaded.pop(version, None) or load_pipeline(name, self.device, self.precision)
            self._loaded[version] = pipeline  # last: the one used most recently
            while len(self._loaded) > KEPT:
                del self._loaded[next(iter(self._loaded))]
        return pipeline

    def _offered(self) -> dict[str, str]:
        """Names by place."""
        found = [str(folder) for folder in self._sub_folders() if names_a_model(str(folder))]
        return _first_by_place([*self.named, *found])

    def _sub_folders(self) -> list[Path]:
        return [
            path
            for folder in self.folders
            if folder.is_dir()
            for path in sorted(folder.iterdir())
            if path.is_dir() and not path.name.startswith(".")
        ]


def _first_by_place(names: Sequence[str]) -> dict[str, str]:
    """The first spelling of each folder's path, and each hub id, by what is the same for all spellings."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(_place(name), name)
    return first


def _place(name: str) -> str:
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.isdir(path) else name
