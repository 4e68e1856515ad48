"""Judges arms by VBench's names on the embedded world, for suites with ``judge = "../studies/judge_vbench.py"``.

Each arm makes the same held-out clips, which are judged by what their prompts ask for , so no run is the
reference; the suite's first arm is what the others are held against, clip by clip.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from dit_accel_eval.metrics import Sample, scores
from dit_accel_eval.runs.counting import Counts, works
from dit_accel_eval.runs.model import Run, SuiteModel
from dit_accel_eval.runs.results import Line, latest
from dit_accel_eval.statistics import Judged, judge
from dit_accel_eval.suites.lines import WORKS
from dit_accel_eval.suites.suite import Suite
from dit_accel_eval.vbench.dimensions import DIMENSIONS
from dit_accel_pipelines.generation.request import EMBEDDED_FPS
from dit_accel_pipelines.generation.solvers import BEST
from vbench_proxies import NAMES, correlations
from world_scenes import model_scores, numbers

from dit_accel import ConfigError

__all__ = ["check_suite", "measures", "numbers", "table"]


def check_suite(suite: Suite) -> None:
    """Refuse a suite whose first arm can't be what the others are held against."""
    first = suite.arms[0]
    if not first.is_dense:
        raise ConfigError(f"suite {suite.name} begins with {first.name!r}; put the dense run first, 'unipc STEPS'")
    for arm in suite.arms:
        if arm.call:
            raise ConfigError(f"all arms run at one size, got {dict(arm.call)} for {arm.name!r}; leave it out")


def measures(model: SuiteModel, clip: int, made: Run) -> Line:
    """Return what a line says of a clip."""
    world = model_scores(model.name, clip, made.frames)
    sample = Sample(frames=made.frames, fps=EMBEDDED_FPS)
    return {
        **works(made.counts, _dense_step(model), made.attended, model.own_share),
        "score": world["overall_consistency"],
        "world": world,
        "metrics": {} if len(made.frames) == 1 else scores(NAMES, sample).values(),
    }


@functools.lru_cache(maxsize=1)
def _dense_step(model: SuiteModel) -> Counts:
    """Return what a dense step runs, which is one more run in each process."""
    return model.run(0, steps=1, solver=BEST).counts


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: a row a dimension, a column an arm, means over the clips that ask for it.

    Behind a mean stands whether the arm is ahead of or behind the first one, clip by clip, after Holm's correction for
    all differences of the table. Clips of which an arm is missing are left out.
    """
    check_suite(suite)
    by_arm = _whole(suite, lines)
    first = suite.arms[0].name
    requested = {name: _clips(by_arm[first], name) for name in DIMENSIONS}
    pairs = {
        (name, arm): [by_arm[arm][clip]["world"][name] - by_arm[first][clip]["world"][name] for clip in both]
        for arm in by_arm
        if arm != first
        for name in DIMENSIONS
        if (both := [clip for clip in requested[name] if name in by_arm[arm][clip]["world"]])
    }
    judged = judge(pairs)
    rows = [f"| name@world | clips | {' | '.join(by_arm)} |", f"|---|{'---|' * (len(by_arm) + 1)}"]
    for key, words in WORKS.items():
        cells = [_mean([line[key] for line in clips.values()], 1) for clips in by_arm.values()]
        rows.append(f"| *{words}, steps* | {len(by_arm[first])} | {' | '.join(cells)} |")
    for name in DIMENSIONS:
        cells = [_cell(by_arm[arm], name, judged.get((name, arm))) for arm in by_arm]
        if any(cells):
            rows.append(f"| {name} | {len(requested[name])} | {' | '.join(cells)} |")
    never = [name for name in DIMENSIONS if not any(_clips(clips, name) for clips in by_arm.values())]
    parts = [
        "\n".join(rows),
        f"Not reported for this model's clips: {', '.join(never)}." if never else "",
        _proxies(by_arm),
    ]
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


def _cell(clips: Mapping[int, Line], name: str, judged: Judged | None) -> str:
    mean = _mean([line["world"][name] for line in clips.values() if name in line["world"]], 2)
    return f"{mean} {judged.verdict}" if judged and judged.verdict in ("ahead", "behind") else mean


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" if values else ""
