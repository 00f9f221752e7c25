"""Image encoders of the transformers library, an optional part."""

from torch import nn

from .errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_vision_model(name: str, role: str) -> nn.Module:
    """A `transformers` model by hub id or folder, in float32.

    Args:
        role: what messages call it.

    Raises:
        UserError: if transformers is missing, or there is no such model, or its files are damaged, or it comes with
            code of its own, which is never run.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UserError(f"{role} needs transformers: pip install 'pixeldip[dinov2]'") from error
    try:
        return AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False, dtype="float32")
    except Exception as error:  # transformers raises many kinds for what is not there, damaged or does not fit
        raise UserError(f"{role} {name}: {' '.join(str(error).split())}") from error


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation an encoder wants of its pixels, given as 0 to 1; ImageNet's if it does not say."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        values = {}
    return tuple(values.get("image_mean", IMAGENET_MEAN)), tuple(values.get("image_std", IMAGENET_STD))
