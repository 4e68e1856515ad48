"""The metrics of this package, as its entry point gives them."""

from .change_psnr import CHANGE_PSNR
from .clip_scores import CLIP_SCORES
from .consistency import CONSISTENCY
from .exposure import CLIPPING, EXPOSURE
from .ffmpeg import VMAF, XPSNR
from .flow import DYNAMIC, STATIC, STILL_FLICKERING, WARP_ERROR
from .gmflow import DYNAMIC_GMFLOW
from .loops import LOOP, NOREPEAT
from .motion import FLICKERING, MOTION
from .natural import BRISQUE, NIQE
from .perceptual import DISTS, LPIPS_ALEX, LPIPS_VGG
from .psnr import PSNR, PSNR_FRAMES
from .rife import SMOOTHNESS
from .sharpness import SHARPNESS
from .ssim import MS_SSIM, SSIM

METRICS = (
    PSNR, PSNR_FRAMES, CHANGE_PSNR, SSIM, MS_SSIM, LPIPS_ALEX, LPIPS_VGG, DISTS, VMAF, XPSNR, FLICKERING,
    STILL_FLICKERING, STATIC, DYNAMIC, DYNAMIC_GMFLOW, WARP_ERROR, SMOOTHNESS, CONSISTENCY, MOTION, SHARPNESS, BRISQUE,
    NIQE, EXPOSURE, CLIPPING, NOREPEAT, LOOP, *CLIP_SCORES,
)  # fmt: skip
"""Those with a reference, those of motion, of single frames and of long clips, and those that take a model's name."""
