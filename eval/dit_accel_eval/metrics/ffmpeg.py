"""VMAF and XPSNR, measured by the ffmpeg that imageio-ffmpeg brings."""

import json
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from .metric import Measured, Metric, NotMeasured, Sample, check_short_side, levels, mean_of
from .psnr import CAP

NARROWEST = 16
"""Pixels of the short side from which VMAF's four scales are there."""

BT709 = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p"
"""How RGB becomes what the filters compare: Rec. 709, limited range, colour at every pixel."""


@cache
def _filters() -> frozenset[str]:
    import imageio_ffmpeg

    try:
        output = subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"], capture_output=True, text=True, check=True
        )
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return frozenset()
    return frozenset(line.split()[1] for line in output.stdout.splitlines() if "->" in line and len(line.split()) > 2)


def no_filter(name: str) -> str | None:
    """Return why ffmpeg's filter can't be had, None if it can."""
    return None if name in _filters() else f"the ffmpeg of imageio-ffmpeg has no filter {name}; update imageio-ffmpeg"


def filtered(sample: Sample, graph: str) -> str:
    """Run a filter of two inputs over the clip, first, and its reference; returns what ffmpeg wrote to ``log``.

    Args:
        sample: the clip and its reference, compared as 8 bits.
        graph: the filter, which writes to a file ``log`` in its working folder.

    Raises:
        NotMeasured: if ffmpeg fails, with its last line.
    """
    import imageio_ffmpeg

    clip, reference = sample.pair()
    with tempfile.TemporaryDirectory() as folder:
        for name, frames in (("clip", clip), ("reference", reference)):
            Path(folder, name).write_bytes(levels(frames).tobytes())
        size = f"{clip.shape[2]}x{clip.shape[1]}"
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", "25", "-i"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-threads", "1"]
        command += [*raw, "clip", *raw, "reference", "-lavfi", f"[0:v]{BT709}[a];[1:v]{BT709}[b];[a][b]{graph}"]
        done = subprocess.run(
            [*command, "-f", "null", "-"], cwd=folder, capture_output=True, text=True, errors="replace"
        )
        log = Path(folder, "log")
        if done.returncode or not log.exists():
            last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
            raise NotMeasured(f"ffmpeg could not measure it: {last}")
        return log.read_text(encoding="utf-8")


def vmaf(sample: Sample) -> Measured:
    """Return VMAF, 0 to 100, mean over frames."""
    check_short_side(sample.frames, NARROWEST, "VMAF takes")
    log = filtered(sample, "libvmaf=log_fmt=json:log_path=log:n_threads=1")
    return mean_of([frame["metrics"]["vmaf"] for frame in json.loads(log)["frames"]])


def xpsnr(sample: Sample) -> Measured:
    """Return XPSNR in dB, mean over frames of (4 Y + U + V) / 6, each at most `CAP`."""
    log = filtered(sample, "xpsnr=stats_file=log")
    values = []
    for line in log.splitlines():
        found = dict(re.findall(r"XPSNR ([yuv]): *(\S+)", line))
        if len(found) == 3:
            y, u, v = (min(CAP, float(found[plane])) for plane in "yuv")
            values.append((4 * y + u + v) / 6)
    if len(values) != len(sample.frames):
        raise NotMeasured(f"ffmpeg gave XPSNR of {len(values)} frames of {len(sample.frames)}")
    return mean_of(values)


VMAF = Metric(
    name="vmaf@v0.6.1", words="VMAF", better="more", bounds=(0.0, 100.0), reference=True, measure=vmaf, decimals=1,
    missing=lambda: no_filter("libvmaf"),
    source="Netflix' VMAF, its built-in model v0.6.1, on 8-bit frames; ffmpeg's libvmaf",
)  # fmt: skip

XPSNR = Metric(
    name="xpsnr", words="XPSNR, dB", better="more", bounds=(-np.inf, CAP), reference=True, measure=xpsnr, decimals=2,
    missing=lambda: no_filter("xpsnr"),
    source="Helmrich et al. 2020, (4 Y + U + V) / 6, mean over 8-bit frames, at most 100 dB; ffmpeg's xpsnr",
)  # fmt: skip
