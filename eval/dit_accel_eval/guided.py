"""Compares guidance at equal forwards: `python -m dit_accel_eval.guided eval/suites/guidance-wan-tiny.toml`.

Guidance changes what is sought, so no converged run is the measure: each clip is judged by itself, by how near it
comes to its prompt and by its sharpness. An arm is held, clip by clip, against the plain arm that `rival_of` names.
Every clip of every arm is one JSON line; a run that was stopped goes on. `python -m dit_accel_eval.guided SUITE sheet
FILE.png [ARM ...]` draws some clips of each arm.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from dit_accel_assets import model_closeness, model_score
from dit_accel_pipelines.media import contact_sheet

from dit_accel.errors import ConfigError, did_you_mean
from dit_accel.files import check_writable, written_whole

from .embedded import EmbeddedModel, settled_call, weights_hash
from .fidelity import Clip
from .metrics.sharpness import sharpness
from .paired import bootstrap
from .results import Line, append_line, check_lines, latest, read_lines, write_lines
from .suite import Arm, Suite, read_suite
from .suite_command import suite_command

EQUAL = 1.25
"""Forwards up to which plain arms count as equal: whole steps seldom give the very same number."""

SHOWN = 4
"""Clips on a contact sheet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, only print the table of what has run, or draw a contact sheet; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) > 2 and arguments[1] == "sheet":
        sheet(read_suite(Path(arguments[0])), Path(arguments[2]), arguments[3:])
        return 0
    return suite_command(__doc__, arguments, run, table)


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
        made = [_frames(model, arm, clip) for clip in range(min(SHOWN, suite.clips))]
        rows.append(np.stack([(255 * frames[len(frames) // 2]).round().astype(np.uint8) for frames in made]))
    with written_whole(out) as temporary:
        contact_sheet(rows, [arm.name for arm in arms], columns=SHOWN).quantize(128).save(temporary)


def _frames(model: EmbeddedModel, arm: Arm, clip: int) -> Clip:
    return model.run(
        clip, steps=arm.num_inference_steps, solver=arm.solver, flow_shift=arm.flow_shift, methods=arm.methods,
        call=arm.call,
    ).frames  # fmt: skip


def run(suite: Suite, out: Path) -> None:
    """Generate what ``out`` does not hold yet, clip by clip, and append one JSON line per clip and arm.

    Raises:
        ConfigError: if ``out`` holds results of another model or arm.
    """
    setting = {"model": suite.model, "weights": weights_hash(suite.model)}
    lines = read_lines(out)
    check_lines(out, lines, setting, {arm.name: _about(suite, arm) for arm in suite.arms})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(out, lines)  # without a last line that was cut off
    done = latest(lines)
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
            "forwards": made.counts.blocks / model.family.layers,
            "score": model_score(model.name, clip, made.frames),
            "closeness": model_closeness(model.name, clip, made.frames),
            "sharpness": sharpness(made.frames),
            "torch": torch.__version__,
        }
        append_line(out, line)
        print(f"clip {clip} {arm.name}: closeness {line['closeness']:.3f}", file=sys.stderr)


def _about(suite: Suite, arm: Arm) -> Line:
    return {**arm.to_dict(), "call": settled_call(suite.model, {**suite.call, **arm.call})}


def rival_of(suite: Suite, arm: Arm, lines: Sequence[Line]) -> Arm | None:
    """Return the plain arm that an arm is held against: of those with its forwards, the one nearest its prompts.

    So an arm is held against guidance by a negative prompt at that one's own best scale and equal cost: its forwards or
    up to `EQUAL` times as many; where no plain arm has, those with the fewest beyond. Plain arms have none.
    """
    if not arm.methods:
        return None
    means = {other.name: _mean(lines, other, "forwards") or 0.0 for other in suite.arms}
    own = means[arm.name]
    plain = [other for other in suite.arms if not other.methods and means[other.name] >= own]
    most = max(EQUAL * own, min((means[other.name] for other in plain), default=0.0))
    plain = [other for other in plain if means[other.name] <= most]
    return max(plain, key=lambda other: _mean(lines, other, "closeness") or 0.0, default=None)


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: one row per arm."""
    return "\n".join(_rows(suite, lines))


def _rows(suite: Suite, lines: Sequence[Line]) -> Iterator[str]:
    yield (
        "| arm | guidance | steps | forwards | answers right | closeness | sharpness x 1000 | against "
        "| closeness gained, points |"
    )
    yield "|---" * 9 + "|"
    by_arm = {arm.name: {line["clip"]: line for line in lines if line["arm"] == arm.name} for arm in suite.arms}
    for arm in suite.arms:
        clips = by_arm[arm.name]
        if not clips:
            continue
        forwards, score, close, sharp = (
            float(np.mean([line[name] for line in clips.values()]))
            for name in ("forwards", "score", "closeness", "sharpness")
        )
        rival = rival_of(suite, arm, lines)
        others = by_arm[rival.name] if rival else {}
        paired = [100 * (clips[clip]["closeness"] - others[clip]["closeness"]) for clip in sorted({*clips} & {*others})]
        call = next(iter(clips.values()))["call"]
        scale = call.get("guidance_scale", call.get("true_cfg_scale", ""))
        cells = (
            arm.name, scale, arm.num_inference_steps, f"{forwards:.1f}", f"{score:.0%}", f"{close:.3f}",
            f"{1000 * sharp:.2f}", rival.name if rival else "", f"{bootstrap(paired):+}" if paired else "",
        )  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


def _mean(lines: Sequence[Line], arm: Arm, name: str) -> float | None:
    values = [line[name] for line in lines if line["arm"] == arm.name]
    return float(np.mean(values)) if values else None


if __name__ == "__main__":
    raise SystemExit(main())
