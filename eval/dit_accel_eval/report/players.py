"""Clips beside the converged run: strips of frames as data in the page, moved together by one bar."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from dit_accel_pipelines.generation.media import Frames

from dit_accel import ConfigError

from ..runs.results import Line, read_kept, reference_of, run_of
from .figures import Report, judged, quantile_clips

AMPLIFIED = 5
"""How many times larger differences are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """One clip of an arm beside its reference.

    Attributes:
        rank: ``worst`` or ``median`` among the arm's clips.
        own: the arm's strip, as a data URI.
        difference: the strip of amplified differences.
    """

    line: Line
    rank: str
    frames: int
    width: int
    height: int
    own: str
    difference: str


def players_of(report: Report, most: int) -> tuple[list[Player], dict[int, str], list[str]]:
    """Return the players, lowest PSNR first; clip -> its reference's strip; and why runs could not be shown.

    Every arm's worst clip comes before any arm's median one, so that few players still show every arm.
    """
    players, references, failed = [], {}, []
    for rank, line in _chosen(report):
        if len(players) >= most:
            break
        folder = report.results.path.parent
        try:
            own = read_kept(folder / line["kept"], run_of(line))
            reference = read_kept(folder / line["kept_reference"], reference_of(line))
            if own.shape != reference.shape:
                raise ConfigError(f"{line['kept']} is of shape {own.shape}, its reference of {reference.shape}")
        except ConfigError as error:
            failed.append(f"Clip {line['clip']} of {line['arm']} is not shown: {error}.")
            continue
        references.setdefault(line["clip"], data_uri(reference))
        players.append(
            Player(
                line=line, rank=rank, frames=len(own), width=own.shape[2], height=own.shape[1],
                own=data_uri(own), difference=data_uri(difference(own, reference)),
            )
        )  # fmt: skip
    return sorted(players, key=lambda player: player.line["psnr"]), references, failed


def _chosen(report: Report) -> Iterator[tuple[str, Line]]:
    kept: dict[str, Sequence[Line]] = {}
    for arm in judged(report):
        lines = [line for line in report.lines_of(arm) if "kept" in line]
        if lines:
            kept[arm.name] = lines
    worst = [quantile_clips(lines)[0] for lines in kept.values()]
    median = [quantile_clips(lines)[1] for lines in kept.values() if len(lines) > 1]
    for rank, lines in (("worst", worst), ("median", median)):
        yield from ((rank, line) for line in sorted(lines, key=lambda line: line["psnr"]))


def difference(clip: Frames, reference: Frames) -> Frames:
    """Return the amplified absolute difference of two clips, uint8."""
    strong = AMPLIFIED * np.abs(clip.astype(np.int16) - reference.astype(np.int16))
    return np.minimum(strong, 255).astype(np.uint8)


def data_uri(frames: Frames) -> str:
    """Return frames, one below the other, as a PNG in a data URI."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frames.reshape(-1, *frames.shape[2:])).save(out, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
