"""One generated video or image: its frames, how long it took, and what ran."""

from dataclasses import dataclass

import dit_accel

from .media import Frames
from .timing import Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generated video: frames uint8 [F, height, width, 3], how long it took, and the attachment's report."""

    prompt: str
    frames: Frames
    timings: Timings
    report: dit_accel.Report | None
