"""The frozen encoder of an alignment, on paper."""

import torch
from torch import nn

from ..recipe import AlignmentSection

# hidden size, layers, attention heads of DINOv2 (Oquab et al. 2023)
DINOV2 = {
    "facebook/dinov2-small": (384, 12, 6),
    "facebook/dinov2-base": (768, 12, 12),
    "facebook/dinov2-large": (1024, 24, 16),
}


def encoder_on_paper(section: AlignmentSection) -> tuple[nn.Module | None, str | None]:
    """The encoder without weights, on the meta device, and what must be said of it.

    Its sizes are those of its own configuration where that lies on this machine, or DINOv2's published ones; nothing
    is fetched.
    """
    unknown = f"alignment.encoder {section.encoder} is not in it: "
    try:
        from transformers import AutoConfig, AutoModel, Dinov2Config
    except ImportError:
        return None, f"{unknown}transformers is not installed"
    try:
        config = AutoConfig.from_pretrained(section.encoder, local_files_only=True)
        said = None
    except (OSError, ValueError):
        if section.encoder not in DINOV2:
            return None, f"{unknown}its configuration is not on this machine"
        hidden_size, layers, heads = DINOV2[section.encoder]
        config = Dinov2Config(
            hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads, image_size=518, patch_size=14
        )
        said = f"{section.encoder} has its published sizes: its configuration is not on this machine"
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=torch.float32), said
