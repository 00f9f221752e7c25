"""The diffusers pipeline: a trained `DiP`, its classes and its size, ready to sample."""

from .dip_pipeline import DiPPipeline
from .lora import check_peft
from .output import DiPPipelineOutput
from .reuse import check_reuse
from .steps import PREDICTED, STATE

__all__ = ["PREDICTED", "STATE", "DiPPipeline", "DiPPipelineOutput", "check_peft", "check_reuse"]
