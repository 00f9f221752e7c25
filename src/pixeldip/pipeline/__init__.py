"""The diffusers pipeline: a trained `DiP`, its classes and its size, ready to sample."""

from .dip_pipeline import PREDICTED, STATE, DiPPipeline, DiPPipelineOutput
from .lora import check_peft

__all__ = ["PREDICTED", "STATE", "DiPPipeline", "DiPPipelineOutput", "check_peft"]
