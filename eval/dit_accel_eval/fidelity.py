"""Fidelity: how far a clip is from the dense clip of the same prompt and seed."""

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Clip = npt.NDArray[np.float32]
"""Frames [F, height, width, 3] in [0, 1]."""


def psnr(clip: Clip, reference: Clip) -> float:
    """Return the peak signal-to-noise ratio in dB over all frames; 100 for identical clips, so that means stay finite.

    Raises:
        ValueError: for clips of different shapes.
    """
    return min(100.0, float(peak_signal_noise_ratio(*_pair(clip, reference), data_range=1.0)))


def ssim(clip: Clip, reference: Clip) -> float:
    """Return the structural similarity (Gaussian window, 11 pixels), mean over frames, 1 for identical clips.

    Raises:
        ValueError: for clips of different shapes.
    """
    return float(structural_similarity_index_measure(*_pair(clip, reference), data_range=1.0))  # type: ignore[arg-type]


def _pair(clip: Clip, reference: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    if clip.shape != reference.shape or clip.ndim != 4:
        raise ValueError(
            f"only clips [F, height, width, 3] of one shape can be compared, got {clip.shape}, {reference.shape}"
        )
    one, two = (torch.from_numpy(np.ascontiguousarray(x, np.float32)).permute(0, 3, 1, 2) for x in (clip, reference))
    return one, two
