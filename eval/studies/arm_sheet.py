"""Draws clips of a suite's arms side by side: `python eval/studies/arm_sheet.py SUITE.toml FILE [ARM ...]`.

A .png shows the middle frame of the first clips, or with `--along CLIP` frames of one clip from its first to its last;
a .gif shows one clip in motion, every `--every`-th frame of it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.job import clips_of
from dit_accel_eval.suites.suite import Suite, read_suite
from dit_accel_pipelines.generation.media import Frames, contact_sheet, to_uint8, upscale, write_media

from dit_accel.errors import ConfigError, DitAccelError, did_you_mean
from dit_accel.files import check_writable, written_whole

SHOWN = 4
"""Clips on a contact sheet."""

ALONG = 9
"""Frames of one clip on a contact sheet."""

SHADES = 8
"""Steps of brightness between the shades of a .gif, which would dither finer ones."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a contact sheet, or a moving one; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("out", type=Path, help=".png or .gif")
    parser.add_argument("arms", nargs="*", help="their names; default: all")
    parser.add_argument("--along", type=int, metavar="CLIP", help="frames of this clip; a .gif's, else the first")
    parser.add_argument("--every", type=int, default=2, help="of how many frames a .gif shows one")
    options = parser.parse_args(arguments)
    try:
        sheet(read_suite(options.suite), options.out, options.arms, along=options.along, every=options.every)
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def sheet(suite: Suite, out: Path, names: Sequence[str] = (), *, along: int | None = None, every: int = 2) -> None:
    """Draw some arms (none named: all), one row each.

    Args:
        suite: whose arms.
        out: .png, or .gif for one clip in motion.
        names: of the arms.
        along: the clip whose frames are shown; None: the middle frames of the first clips, in a .gif the first clip.
        every: of how many frames a .gif shows one.

    Raises:
        ConfigError: for a name that is no arm's, or a file that can't be written.
    """
    check_writable(out, "the contact sheet")
    moving = out.suffix.lower() == ".gif"
    if not moving and out.suffix.lower() != ".png":
        raise ConfigError(f"the contact sheet {out} ends in {out.suffix!r}; use .png, or .gif for one clip in motion")
    if every < 1:
        raise ConfigError(f"a .gif can't show one of {every} frames; --every takes 1 or more")
    known = {arm.name: arm for arm in suite.arms}
    for name in names:
        if name not in known:
            raise ConfigError(f"{suite.name} has no arm {name!r}; {did_you_mean(name, known)}")
    arms = [known[name] for name in names] or list(suite.arms)
    labels, model = [arm.name for arm in arms], EmbeddedModel(suite.model, suite.call)
    if moving or along is not None:
        rows = [_frames(model, arm, suite.first_clip if along is None else along) for arm in arms]
    else:
        middle = [[_frames(model, arm, clip) for clip in clips_of(suite, SHOWN)] for arm in arms]
        rows = [np.stack([frames[len(frames) // 2] for frames in made]) for made in middle]
    with written_whole(out) as temporary:
        if moving:
            write_media(temporary, _moving(rows, labels, every), fps=15)
        else:
            columns = SHOWN if along is None else ALONG
            contact_sheet(rows, labels, columns=columns).quantize(128).save(temporary)


def _moving(clips: Sequence[Frames], labels: Sequence[str], every: int) -> Frames:
    """Return one picture a moment, [F, height, width, 3], the clips below one another; ended ones keep their last."""
    moments = range(0, max(len(clip) for clip in clips), every)
    shown = [upscale(clip // SHADES * SHADES, 2) for clip in clips]
    return np.stack(
        [
            np.asarray(contact_sheet([clip[[min(moment, len(clip) - 1)]] for clip in shown], labels))
            for moment in moments
        ]
    )


def _frames(model: EmbeddedModel, arm: Arm, clip: int) -> Frames:
    made = model.run(
        clip, steps=arm.num_inference_steps, solver=arm.solver, flow_shift=arm.flow_shift, methods=arm.methods,
        call=arm.call,
    )  # fmt: skip
    return to_uint8(made.frames)


if __name__ == "__main__":
    raise SystemExit(main())
