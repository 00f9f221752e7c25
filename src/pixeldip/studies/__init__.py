"""The paper's tables and figures as studies to run: `pixeldip study NAME`."""

from .commands import STUDIES, study_command

__all__ = ["STUDIES", "study_command"]
