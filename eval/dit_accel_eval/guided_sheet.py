"""Draws some clips of each arm of a suite: `python -m dit_accel_eval.guided_sheet SUITE.toml FILE.png [ARM ...]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from dit_accel_pipelines.media import contact_sheet

from dit_accel.errors import ConfigError, DitAccelError, did_you_mean
from dit_accel.files import check_writable, written_whole

from .arms import Arm
from .embedded import EmbeddedModel
from .job import clips_of
from .metrics.metric import Clip
from .suite import Suite, read_suite

SHOWN = 4
"""Clips on a contact sheet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a contact sheet; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("out", type=Path, help="PNG")
    parser.add_argument("arms", nargs="*", help="their names; default: all")
    options = parser.parse_args(arguments)
    try:
        sheet(read_suite(options.suite), options.out, options.arms)
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def sheet(suite: Suite, out: Path, names: Sequence[str] = ()) -> None:
    """Draw the middle frame of the first clips, one column each, of some arms (none named: all), one row each.

    Raises:
        ConfigError: for a name that is no arm's, or a file that can't be written.
    """
    check_writable(out, "the contact sheet")
    known = {arm.name: arm for arm in suite.arms}
    for name in names:
        if name not in known:
            raise ConfigError(f"{suite.name} has no arm {name!r}; {did_you_mean(name, known)}")
    arms = [known[name] for name in names] or list(suite.arms)
    model, rows = EmbeddedModel(suite.model, suite.call), []
    for arm in arms:
        made = [_frames(model, arm, clip) for clip in clips_of(suite, SHOWN)]
        rows.append(np.stack([(255 * frames[len(frames) // 2]).round().astype(np.uint8) for frames in made]))
    with written_whole(out) as temporary:
        contact_sheet(rows, [arm.name for arm in arms], columns=SHOWN).quantize(128).save(temporary)


def _frames(model: EmbeddedModel, arm: Arm, clip: int) -> Clip:
    return model.run(
        clip, steps=arm.num_inference_steps, solver=arm.solver, flow_shift=arm.flow_shift, methods=arm.methods,
        call=arm.call,
    ).frames  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
