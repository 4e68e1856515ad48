"""Compares clips longer than trained: `python -m dit_accel_eval.longer eval/suites/longer-wan-tiny.toml`.

No clip has a reference, so each is judged by itself: the judge's score for its prompt, motion, sharpness, how near a
later stretch comes to the opening one, and how much of a loop it is. Every clip of every arm is one JSON line; a run
that was stopped goes on.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from dit_accel_assets import model_defaults, model_score

from .embedded import EmbeddedModel, settled_call, weights_hash
from .metrics.loops import loop, repetition
from .metrics.motion import motion
from .metrics.sharpness import sharpness
from .paired import bootstrap
from .results import Line, append_line, check_lines, latest, read_lines, write_lines
from .suite import Arm, Suite
from .suite_command import suite_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, or only print the table of what has run; returns the exit code."""
    return suite_command(__doc__, arguments, run, table)


def run(suite: Suite, out: Path) -> None:
    """Generate what ``out`` does not hold yet, and append one JSON line per clip.

    Raises:
        ConfigError: if ``out`` holds results of another model or arm.
    """
    setting = {"model": suite.model, "weights": weights_hash(suite.model)}
    lines = read_lines(out)
    check_lines(out, lines, setting, {arm.name: _about(suite, arm) for arm in suite.arms})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(out, lines)  # without a last line that was cut off
    done, trained = latest(lines), int(model_defaults(suite.model)["num_frames"])
    todo = [(clip, arm) for clip in range(suite.clips) for arm in suite.arms if (arm.name, clip) not in done]
    model = EmbeddedModel(suite.model, suite.call) if todo else None
    for clip, arm in todo:
        assert model is not None
        made = model.run(
            clip, steps=arm.num_inference_steps, solver=arm.solver, flow_shift=arm.flow_shift, methods=arm.methods,
            call=arm.call,
        )  # fmt: skip
        line: Line = {
            "arm": arm.name,
            "clip": clip,
            "prompt": model.prompt(clip),
            **setting,
            **_about(suite, arm),
            "frames": len(made.frames),
            "score": model_score(model.name, clip, made.frames),
            "motion": motion(made.frames),
            "sharpness": sharpness(made.frames),
            "repetition": repetition(made.frames, trained),
            "loop": loop(made.frames, trained),
            "attended": made.attended,
            "torch": torch.__version__,
        }
        append_line(out, line)
        print(f"clip {clip} {arm.name}: score {line['score']:.0%}", file=sys.stderr)


def _about(suite: Suite, arm: Arm) -> Line:
    return {**arm.to_dict(), "call": settled_call(suite.model, {**suite.call, **arm.call})}


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: one row per arm, each against the plain arm of its length and steps."""
    return "\n".join(_rows(suite, lines))


def _rows(suite: Suite, lines: Sequence[Line]) -> Iterator[str]:
    yield (
        "| arm | clips | frames | score | motion x 1000 | sharpness x 1000 | repetition RMS | loop | pairs computed "
        "| against | paired difference, points of the score | of the loop |"
    )
    yield "|---" * 12 + "|"
    by_arm = {arm.name: {line["clip"]: line for line in lines if line["arm"] == arm.name} for arm in suite.arms}
    for arm in suite.arms:
        clips = by_arm[arm.name]
        if not clips:
            continue
        names = ("frames", "score", "motion", "sharpness", "repetition", "loop", "attended")
        frames, score, *rest = (float(np.mean([line[name] for line in clips.values()])) for name in names)
        plain = _plain(suite, arm)
        others = by_arm[plain.name] if plain else {}
        both = sorted(set(clips) & set(others))
        paired = [100 * (clips[clip]["score"] - others[clip]["score"]) for clip in both]
        loops = [clips[clip]["loop"] - others[clip]["loop"] for clip in both]
        cells = (
            arm.name,
            len(clips),
            f"{frames:.0f}",
            f"{score:.0%}",
            f"{1000 * rest[0]:.2f}",
            f"{1000 * rest[1]:.2f}",
            f"{rest[2]:.3f}",
            f"{rest[3]:.2f}",
            f"{rest[4]:.0%}",
            plain.name if plain else "",
            bootstrap(paired) if paired else "",
            bootstrap(loops) if loops else "",
        )
        yield f"| {' | '.join(map(str, cells))} |"


def _plain(suite: Suite, arm: Arm) -> Arm | None:
    """Return the arm that differs from another only in having no methods."""
    plain = {**arm.to_dict(), "methods": {}}
    return next((other for other in suite.arms if other is not arm and other.to_dict() == plain), None)


if __name__ == "__main__":
    raise SystemExit(main())
