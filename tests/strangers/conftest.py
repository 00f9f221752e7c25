from pathlib import Path

import pytest

from pixeldip import DiPPipeline


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> DiPPipeline:
    return DiPPipeline.from_pretrained(model_folder)
