"""The metrics of this package, as its entry point gives them."""

from .clip_scores import CLIP_SCORES
from .flow import DYNAMIC, WARP_ERROR
from .motion import FLICKERING, LOOP, MOTION, SHARPNESS
from .perceptual import LPIPS
from .pixels import CHANGE_PSNR, MS_SSIM, PSNR, PSNR_FRAMES, SSIM

METRICS = (
    PSNR, PSNR_FRAMES, CHANGE_PSNR, SSIM, MS_SSIM, *LPIPS, FLICKERING, DYNAMIC, WARP_ERROR, MOTION, SHARPNESS, LOOP,
    *CLIP_SCORES,
)  # fmt: skip
"""Those with a reference, those of motion, of single frames and of long clips, and those that take a model's name."""
