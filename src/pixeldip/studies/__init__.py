"""Studies: the paper's tables and figures, `pixeldip study NAME`, and how to sample one model, `pixeldip sweep`."""

from .commands import STUDIES, study_command
from .sweep import sweep_command

__all__ = ["STUDIES", "study_command", "sweep_command"]
