"""What `Attachment.check` measures of two runs of one seed, and the picture that it writes."""

from pathlib import Path

import numpy as np
from dit_accel_pipelines.generation.media import contact_sheet, to_uint8

from dit_accel.attachment.check import Check
from dit_accel.errors import ConfigError
from dit_accel.files import check_writable, written_whole

from ..metrics.metric import Clip, Sample
from ..metrics.registered import scores

METRICS = ("psnr", "ssim", "lpips@alex")
TIMES = 5  # by how much a difference is enlarged in the picture


def compare(frames: Clip, reference: Clip) -> tuple[dict[str, float], dict[str, str]]:
    """Return metric -> how near frames come to a reference, and why others of `METRICS` were not measured."""
    results = scores(METRICS, Sample(frames=frames.clip(0, 1), reference=reference.clip(0, 1)))
    return results.values(), {**results.skipped, **results.unavailable}


def write_sheet(check: Check, path: Path) -> None:
    """Write the frames of both runs and their difference as a PNG, whole or not at all; refuse another ending."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"check writes a PNG, got {path}; end the name in .png")
    check_writable(path, "the check's picture")
    difference = np.clip(TIMES * np.abs(check.accelerated - check.dense), 0, 1)
    rows = [to_uint8(clip) for clip in (check.dense, check.accelerated, difference)]
    with written_whole(path) as temporary:
        contact_sheet(rows, ("dense", "with methods", f"{TIMES} x difference")).save(temporary, format="PNG")
