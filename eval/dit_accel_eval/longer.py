"""Compares clips longer than trained: `python -m dit_accel_eval.longer eval/suites/longer-tiny.toml`.

No clip has a reference, so each is judged by itself: the rule checker on single frames, motion, sharpness, and how near
a later stretch comes to the opening one. Every clip of every arm is one JSON line; a run that was stopped goes on.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from dit_accel_assets.checker import check
from dit_accel_assets.clips import Scene, clip_of
from dit_accel_pipelines.wan import WAN_TINY

from dit_accel.rules.ultravico import output_frames

from .compare import generate, model_hash, read_lines, suite_command
from .fidelity import Clip
from .paired import bootstrap
from .suite import Suite

TRAINED = output_frames(WAN_TINY.trained_frames or 0, WAN_TINY.vae[0])
"""Frames of the longest clips that the embedded model was trained on."""

STRETCH = 8
"""Frames of the opening that is looked for again."""

JUDGED = 17
"""Frames of a clip, evenly spaced, that the checker judges one by one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, or only print the table of what has run; returns the exit code."""
    return suite_command(__doc__ or "", run, table, arguments)


def run(suite: Suite, out: Path) -> None:
    """Generate what ``out`` does not hold yet, and append one JSON line per clip.

    Raises:
        ConfigError: if ``out`` holds results of another model.
    """
    lines = read_lines(out)
    model = model_hash(out, lines)
    pipe = WanPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    done = {(line["arm"], line["clip"]) for line in lines}
    for clip in range(suite.clips):
        prompt, scene, _ = clip_of(clip, held_out=True)
        for arm in suite.arms:
            if (arm.name, clip) in done:
                continue
            video, seconds, report = generate(pipe, suite, arm, prompt, clip)
            line = {
                "arm": arm.name,
                "clip": clip,
                "prompt": prompt,
                "frames": len(video),
                **judged(video, scene),
                "density": report.density,
                "seconds": seconds,
                "steps": arm.num_inference_steps,
                "torch": torch.__version__,
                "model": model,
            }
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"clip {clip} {arm.name}: {line['right']:.0%} of the frames right", file=sys.stderr)


def judged(video: Clip, scene: Scene) -> dict[str, Any]:
    """Return what a clip shows of a scene.

    Args:
        video: [F, height, width, 3] in [0, 1].
        scene: what its prompt asked for.

    Returns:
        ``right``: share of single frames with the right colour, shape and background; ``first``: whether the first
        frame has them; ``direction``: whether the clip moves as asked; and `motion`, `sharpness` and `repetition`.
    """
    frames = sorted({round(place) for place in np.linspace(0, len(video) - 1, JUDGED)})
    verdicts = [_is_right(video[frame], scene) for frame in frames]
    return {
        "right": float(np.mean(verdicts)),
        "first": verdicts[0],
        "direction": check(video).direction == scene.direction,
        "motion": motion(video),
        "sharpness": sharpness(video),
        "repetition": repetition(video),
    }


def _is_right(frame: np.ndarray, scene: Scene) -> bool:
    verdict = check(frame[None])
    return (verdict.color, verdict.shape, verdict.background) == (scene.color, scene.shape, scene.background)


def motion(video: Clip) -> float:
    """Return the mean absolute difference of neighbouring frames, in [0, 1]."""
    return float(np.abs(np.diff(video, axis=0)).mean())


def sharpness(video: Clip) -> float:
    """Return the variance of the Laplacian of the frames' mean channel."""
    x = video.mean(-1)
    inner = x[:, 1:-1, 1:-1]
    laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * inner
    return float(laplacian.var())


def repetition(video: Clip) -> float:
    """Return the least RMS difference between the opening frames and a later stretch as long; small: it repeats.

    Later stretches begin half the trained length on. The idea is that of RIFLEx' NoRepeat (arXiv 2502.15894), without
    a theoretical period; a clip that stands still scores as one that repeats.
    """
    starts = range(min(TRAINED // 2, len(video) - STRETCH), len(video) - STRETCH + 1)
    differences = [np.sqrt(np.mean((video[:STRETCH] - video[start : start + STRETCH]) ** 2)) for start in starts]
    return float(min(differences))


def table(suite: Suite, lines: Sequence[dict[str, Any]]) -> str:
    """Return the suite's Markdown table: one row per arm, means over clips, intervals by paired bootstrap."""
    return "\n".join(_rows(suite, lines))


def _rows(suite: Suite, lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| arm | clips | frames right | first frame right | direction right | motion x 1000 | sharpness x 1000 "
        "| repetition RMS | against | paired difference, points of frames right |"
    )
    yield "|---" * 10 + "|"
    by_arm = {arm.name: {line["clip"]: line for line in lines if line["arm"] == arm.name} for arm in suite.arms}
    for arm in suite.arms:
        clips = by_arm[arm.name]
        if not clips:
            continue
        names = ("right", "first", "direction", "motion", "sharpness", "repetition")
        right, first, direction, *rest = (float(np.mean([line[name] for line in clips.values()])) for name in names)
        shared = sorted(set(clips) & set(by_arm[arm.against])) if arm.against else []
        others = by_arm[arm.against] if arm.against else {}
        paired = [100 * (clips[clip]["right"] - others[clip]["right"]) for clip in shared]
        cells = (
            arm.name,
            len(clips),
            *(f"{share:.0%}" for share in (right, first, direction)),
            f"{1000 * rest[0]:.2f}",
            f"{1000 * rest[1]:.2f}",
            f"{rest[2]:.3f}",
            arm.against or "",
            bootstrap(paired) if paired else "",
        )
        yield f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    raise SystemExit(main())
