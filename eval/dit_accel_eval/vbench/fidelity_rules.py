"""How published code bases measure a clip's fidelity to a reference: PSNR, SSIM and LPIPS, frame by frame.

All take two clips of uint8 frames [F, height, width, 3] and return a number a frame; what is wrong with some stands
in `protocols`. The project's own definitions are in `metrics`.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ..metrics.perceptual import TOGETHER, lpips_maps
from ..metrics.weights import tensors
from .sampling import Frames

Values = npt.NDArray[np.float64]
Measure = Callable[[Frames, Frames], Values]

LEAST = 1e-10
"""Mean squared error, of values in [0, 1], at which TeaCache's and FastVideo's PSNR end, at 100 dB."""

BOX, GAUSS, SKIMAGE = 11, 11, 7
"""Pixels of the windows: the box of Sparse-VideoGen, the Gaussian of TeaCache and FastVideo, scikit-image's box."""


def _errors(clip: Frames, reference: Frames) -> Values:
    """Return each frame's mean squared error, of values in [0, 1]."""
    away = (clip.astype(np.float64) - reference) / 255
    return np.square(away).mean(axis=(1, 2, 3))


def psnr(clip: Frames, reference: Frames) -> Values:
    """Return 10 log10(1 / MSE) in dB; infinite for equal frames."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(_errors(clip, reference))


def psnr_capped(clip: Frames, reference: Frames) -> Values:
    """Return 10 log10(1 / MSE) in dB, at most 100."""
    return -10 * np.log10(np.maximum(_errors(clip, reference), LEAST))


def psnr_wrapped(clip: Frames, reference: Frames) -> Values:
    """Return 20 log10(255 / RMSE) in dB of 8-bit differences and squares that wrap at 256, as cache-dit has it.

    Infinite where all wrapped squares are 0, as of equal frames, but of frames that differ by 16 everywhere, too.
    """
    away = clip - reference  # uint8: wraps
    errors = (away * away).astype(np.float64).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 20 * np.log10(255 / np.sqrt(errors))


def _ssim(clip: Frames, reference: Frames, window: Tensor, *, padding: int = 0, sample: bool = False) -> Values:
    """Return the mean over a frame's places and colours of its structural similarity.

    Args:
        clip: the frames.
        reference: what they should be.
        window: [height, width], of sum 1.
        padding: zeros around, 0: only places where the window fits.
        sample: whether variances are those of a sample, times n / (n - 1).
    """
    kernel = window.expand(3, 1, *window.shape)
    more = window.numel() / (window.numel() - 1) if sample else 1.0
    found = []
    for frames in zip(clip, reference, strict=True):
        x, y = (torch.from_numpy(one.astype(np.float64) / 255).permute(2, 0, 1)[None] for one in frames)
        parts = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), kernel, padding=padding, groups=3)
        mean_x, mean_y, xx, yy, xy = parts
        var_x, var_y, both = more * (xx - mean_x**2), more * (yy - mean_y**2), more * (xy - mean_x * mean_y)
        light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        found.append(float((light * (2 * both + 0.03**2) / (var_x + var_y + 0.03**2)).mean()))
    return np.array(found)


def _box(side: int) -> Tensor:
    return torch.full((side, side), 1 / side**2, dtype=torch.float64)


def _gauss(side: int = GAUSS, sigma: float = 1.5) -> Tensor:
    line = torch.exp(-(torch.arange(side, dtype=torch.float64) - side // 2).square() / (2 * sigma**2))
    line = line / line.sum()
    return line[:, None] * line


ssim_box: Measure = partial(_ssim, window=_box(BOX), padding=BOX // 2)
"""SSIM by a box of 11 pixels, zeros around, as Sparse-VideoGen has it."""

ssim_gauss: Measure = partial(_ssim, window=_gauss())
"""SSIM by a Gaussian of 11 pixels where it fits, as TeaCache has it."""

ssim_gauss_padded: Measure = partial(_ssim, window=_gauss(), padding=GAUSS // 2)
"""SSIM by a Gaussian of 11 pixels, zeros around, as FastVideo has it."""

ssim_skimage: Measure = partial(_ssim, window=_box(SKIMAGE), sample=True)
"""scikit-image's SSIM: a box of 7 pixels where it fits, variances of a sample."""


def _lpips(net: str, clip: Frames, reference: Frames, *, scaled: bool = True, spread: bool = False) -> Values:
    """Return LPIPS of frames.

    Args:
        net: ``alex`` or ``vgg``.
        clip: the frames.
        reference: what they should be.
        scaled: whether values are brought to [-1, 1], as the network has them; else they stay in [0, 1].
        spread: whether layers' maps are drawn to the frames' size before their mean is taken.
    """
    weights, found = tensors(f"lpips-{net}"), []
    for start in range(0, len(clip), TOGETHER):
        own, other = (_images(frames[start : start + TOGETHER], scaled) for frames in (clip, reference))
        maps = lpips_maps(own, other, weights, net)
        if spread:
            maps = [F.interpolate(one, size=clip.shape[1:3], mode="bilinear", align_corners=False) for one in maps]
        found.append(torch.stack([one.mean((1, 2, 3)) for one in maps]).sum(0))
    return torch.cat(found).double().numpy()


def _images(frames: Frames, scaled: bool) -> Tensor:
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return 2 * images - 1 if scaled else images


lpips_alex: Measure = partial(_lpips, "alex")
"""LPIPS by AlexNet."""

lpips_vgg_unscaled: Measure = partial(_lpips, "vgg", scaled=False)
"""LPIPS by VGG16 of frames in [0, 1], as Sparse-VideoGen has it."""

lpips_alex_spread: Measure = partial(_lpips, "alex", spread=True)
"""LPIPS by AlexNet, the mean of maps drawn to the frames' size, as TeaCache has it."""
