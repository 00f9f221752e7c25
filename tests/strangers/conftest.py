from pathlib import Path

import pytest

from pixeldip import DiPPipeline

from ..conftest import saved_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("strangers") / "model", 16)


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> DiPPipeline:
    return DiPPipeline.from_pretrained(model_folder)
