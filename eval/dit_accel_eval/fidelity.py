"""The two measures that the protocol rests on, PSNR and SSIM of a clip to its reference; see `metrics` for all."""

from .metrics.metric import Clip
from .metrics.psnr import psnr
from .metrics.ssim import ssim

__all__ = ["Clip", "psnr", "ssim"]
