"""Tiny models of every family for `check_adapter`: configs and inputs with all three grid sizes different."""

from tiny_image_models import FLUX, FLUX_KIN, IMAGE_MODELS, QWEN_IMAGE, SD3
from tiny_video_models import HUNYUAN, LTX, MOCHI, VIDEO_MODELS, WAN

__all__ = ["FLUX", "FLUX_KIN", "HUNYUAN", "LTX", "MOCHI", "MODELS", "QWEN_IMAGE", "SD3", "WAN"]

MODELS = {**VIDEO_MODELS, **IMAGE_MODELS}
"""Adapter name -> its tiny models."""
