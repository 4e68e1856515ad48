"""Judges the arms of suites by VBench's names on the embedded world: `python -m dit_accel_eval.vbench.judged`.

Each arm makes the same held-out clips, which are judged by what their prompts ask for (`asked`), so no run is the
reference; the suite's first arm is what the others are held against, clip by clip. Every clip of every arm is one JSON
line; a run that was stopped goes on.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from dit_accel_pipelines.solvers import BEST

from dit_accel import ConfigError, DitAccelError
from dit_accel.files import check_writable

from ..arms import Arm
from ..comparison import WORKS, verdict
from ..counting import REAL_SHARE, Counts, work
from ..embedded import EmbeddedModel, check_name, settled_call, weights_hash
from ..metrics import Sample, scores
from ..paired import bootstrap, holm, sign_flips
from ..results import Line, append_line, check_lines, latest, read_lines, write_lines
from ..suite import Suite, read_suite
from .asked import model_scores, numbers
from .dimensions import DIMENSIONS
from .proxies import FPS, NAMES, correlations

SUITES = (Path("eval/suites/vbench-wan-tiny.toml"), Path("eval/suites/vbench-flux-tiny.toml"))

SURE = 0.05
"""p-value, corrected for the number of differences in a table, below which a verdict stands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the suites' results lack, then print their tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suites", type=Path, nargs="*", default=SUITES, help="default: both embedded models'")
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON lines; default: results/ beside the suite's folder"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the tables of an earlier run, generate nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        read = [(read_suite(path), options.out or path.parent.parent / "results") for path in options.suites]
        for suite, folder in read:
            check_suite(suite)
            if not options.table:
                run(suite, folder / f"{suite.name}.jsonl")
        for suite, folder in read:
            print(f"\n{suite.model}\n\n{table(suite, read_lines(folder / f'{suite.name}.jsonl'))}")
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def check_suite(suite: Suite) -> None:
    """Refuse a suite whose first arm can't be what the others are held against.

    Raises:
        ConfigError: with the reason.
    """
    check_name(suite.model)
    first = suite.arms[0]
    if not first.is_dense:
        raise ConfigError(f"suite {suite.name} begins with {first.name!r}; put the dense run first, 'unipc STEPS'")
    for arm in suite.arms:
        if arm.call:
            raise ConfigError(f"all arms run at one size, got {dict(arm.call)} for {arm.name!r}; leave it out")


def run(suite: Suite, out: Path) -> None:
    """Make and judge what ``out`` does not hold yet, clip by clip, and append one JSON line per clip and arm.

    Raises:
        ConfigError: if ``out`` can't be written, or holds results of another model, call or arm.
    """
    setting = _setting(suite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"results can't be written to {out.parent}: {error.strerror}; name another folder") from None
    check_writable(out, "results")
    lines = read_lines(out)
    check_lines(out, lines, setting, {arm.name: arm.to_dict() for arm in suite.arms})
    write_lines(out, lines)  # without a last line that was cut off
    done = latest(lines)
    todo = [
        (number, arm)
        for number in numbers(suite.model, suite.clips)
        for arm in suite.arms
        if (arm.name, number) not in done
    ]
    if not todo:
        return
    model = EmbeddedModel(suite.model, suite.call)
    step = model.run(0, steps=1, solver=BEST).counts
    for number, arm in todo:
        line = {"suite": suite.name, **setting, **_judged(model, number, arm, step)}
        append_line(out, line)
        print(f"{suite.model}, clip {number}, {arm.name}: {line['work']:.1f} steps' work", file=sys.stderr)


def _setting(suite: Suite) -> Line:
    return {
        "model": suite.model,
        "weights": weights_hash(suite.model),
        "call": settled_call(suite.model, suite.call),
    }


def _judged(model: EmbeddedModel, number: int, arm: Arm, step: Counts) -> Line:
    made = model.run(
        number, steps=arm.num_inference_steps, solver=arm.solver, flow_shift=arm.flow_shift, methods=arm.methods
    )
    shares = {"work": model.own_share, "work_real": REAL_SHARE}
    return {
        "arm": arm.name,
        "clip": number,
        "prompt": model.prompt(number),
        **arm.to_dict(),
        **{key: round(work(made.counts, step, made.attended, share), 6) for key, share in shares.items()},
        "world": model_scores(model.name, number, made.frames),
        "metrics": {} if len(made.frames) == 1 else scores(NAMES, Sample(frames=made.frames, fps=FPS)).values(),
        "torch": torch.__version__,
    }


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: a row a dimension, a column an arm, means over the clips that ask for it.

    Behind a mean stands whether the arm is ahead of or behind the first one, clip by clip; bold where that stands after
    Holm's correction for all differences of the table. Clips of which an arm is missing are left out.
    """
    by_arm = _whole(suite, lines)
    first = suite.arms[0].name
    asked = {name: _clips(by_arm[first], name) for name in DIMENSIONS}
    pairs = {
        (name, arm): [by_arm[arm][clip]["world"][name] - by_arm[first][clip]["world"][name] for clip in both]
        for arm in by_arm
        if arm != first
        for name in DIMENSIONS
        if (both := [clip for clip in asked[name] if name in by_arm[arm][clip]["world"]])
    }
    sure = {key for key, p in holm({key: sign_flips(found) for key, found in pairs.items()}).items() if p < SURE}
    rows = [f"| name@world | clips | {' | '.join(by_arm)} |", f"|---|{'---|' * (len(by_arm) + 1)}"]
    for key, words in WORKS.items():
        cells = [_mean([line[key] for line in clips.values()], 1) for clips in by_arm.values()]
        rows.append(f"| *{words}, steps* | {len(by_arm[first])} | {' | '.join(cells)} |")
    for name in DIMENSIONS:
        cells = [_cell(by_arm[arm], name, pairs.get((name, arm), []), sure=(name, arm) in sure) for arm in by_arm]
        if any(cells):
            rows.append(f"| {name} | {len(asked[name])} | {' | '.join(cells)} |")
    never = [name for name in DIMENSIONS if not any(_clips(clips, name) for clips in by_arm.values())]
    parts = ["\n".join(rows), f"Not told of this model's clips: {', '.join(never)}." if never else "", _proxies(by_arm)]
    return "\n\n".join(part for part in parts if part)


def _proxies(by_arm: Mapping[str, Mapping[int, Line]]) -> str:
    """Return the table of how metrics order a clip's arms, "" where there are no metrics."""
    lines = [line | {"scene": clip} for clips in by_arm.values() for clip, line in clips.items() if line.get("metrics")]
    if not lines:
        return ""
    head = "Spearman's rank correlation of a metric with the world's score over one clip's arms, as above over damages."
    return "\n".join([head, "", *correlations(lines, "clip")])


def _whole(suite: Suite, lines: Sequence[Line]) -> dict[str, dict[int, Line]]:
    """Return arm -> clip -> line, of the clips that all arms have."""
    held = latest(lines)
    names = [arm.name for arm in suite.arms]
    clips = [clip for clip in sorted({clip for _, clip in held}) if all((name, clip) in held for name in names)]
    return {name: {clip: held[name, clip] for clip in clips} for name in names}


def _clips(clips: Mapping[int, Line], name: str) -> list[int]:
    return [clip for clip, line in clips.items() if name in line["world"]]


def _cell(clips: Mapping[int, Line], name: str, differences: Sequence[float], *, sure: bool) -> str:
    mean = _mean([line["world"][name] for line in clips.values() if name in line["world"]], 2)
    said = verdict(bootstrap(differences), len(differences)) if differences else "open"
    if said == "open":
        return mean
    return f"**{mean} {said}**" if sure else f"{mean} {said}"


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" if values else ""


if __name__ == "__main__":
    raise SystemExit(main())
