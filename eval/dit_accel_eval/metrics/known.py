"""The metrics of this package, as its entry point gives them."""

from .change_psnr import CHANGE_PSNR
from .exposure import CLIPPING, EXPOSURE
from .ffmpeg import VMAF, XPSNR
from .flow import DYNAMIC, STATIC, STILL_FLICKERING, WARP_ERROR
from .loops import LOOP, NOREPEAT
from .motion import FLICKERING, MOTION
from .psnr import PSNR, PSNR_FRAMES
from .sharpness import SHARPNESS
from .ssim import MS_SSIM, SSIM

METRICS = (
    PSNR, PSNR_FRAMES, CHANGE_PSNR, SSIM, MS_SSIM, VMAF, XPSNR, FLICKERING, STILL_FLICKERING, STATIC, DYNAMIC,
    WARP_ERROR, MOTION, SHARPNESS, EXPOSURE, CLIPPING, NOREPEAT, LOOP,
)  # fmt: skip
