"""The diffusers pipeline: a trained `DiP`, its classes and its size, ready to sample."""

from .dip_pipeline import DiPPipeline
from .lora import check_peft
from .output import DiPPipelineOutput
from .steps import PREDICTED, STATE
from .tokens import check_reuse

__all__ = ["PREDICTED", "STATE", "DiPPipeline", "DiPPipelineOutput", "check_peft", "check_reuse"]
