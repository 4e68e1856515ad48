"""Draws a suite's results as a PNG of PSNR over work: `python eval/studies/suite_picture.py SUITE.toml`."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel_eval.runs.results import TUNED, WORKS, result_lines
from dit_accel_eval.statistics import frontier
from dit_accel_eval.suites.figures import ArmFigures, suite_figures
from dit_accel_eval.suites.suite import read_suite
from dit_accel_pipelines.generation.solvers import BEST
from matplotlib.figure import Figure

from dit_accel import ConfigError, DitAccelError
from dit_accel.files import written_whole

RIVALS = {BEST: "k-", TUNED: "k--"}
"""Dense runs that arms are held against -> their line."""

MARKS, DOTS = "osv^", 80
"""Marks of groups beyond the ten colours; dots an inch, since the pictures are committed and stay small."""


def draw(arms: Sequence[ArmFigures], title: str, path: Path) -> None:
    """Write a PNG of PSNR over work: a panel for each kind of work, the best solver's dense runs as a line with band.

    Arms of one name and several steps are joined; those whose names agree up to a comma share a colour. An arm that no
    other surpasses at as little work has a ring around it.
    """
    if not arms:
        raise ConfigError(f"{title} has no results to draw; run dit-accel eval run first")
    whole = max(arm.clips for arm in arms)
    arms = [arm for arm in arms if arm.clips == whole]  # dense runs that only some clips needed as rivals are left out
    differ = any(abs(arm.means["work"] - arm.means["work_real"]) >= 1e-6 for arm in arms)
    works = [key for key in WORKS if key == "work_real" or differ]
    figure = Figure(figsize=(3.5 + 5.5 * len(works), 5.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(works), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, works, strict=True):
        _draw_panel(panel, arms, key)
    panels[0].set_ylabel("PSNR to the converged run, dB")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS)


def _draw_panel(panel: Any, arms: Sequence[ArmFigures], key: str) -> None:
    groups: dict[str, dict[str, list[ArmFigures]]] = defaultdict(lambda: defaultdict(list))
    for arm in arms:
        groups[_series(arm).partition(",")[0]][_series(arm)].append(arm)
    ours = [group for group in groups if group not in RIVALS]
    looks = {group: (f"C{number % 10}", MARKS[number // 10 % len(MARKS)]) for number, group in enumerate(ours)}
    for group, members in groups.items():
        for number, points in enumerate(members.values()):
            points.sort(key=lambda arm: arm.means[key])
            across, up = [arm.means[key] for arm in points], [arm.psnr.mean for arm in points]
            label = group if number == 0 else None
            if group in RIVALS:
                panel.plot(across, up, RIVALS[group], label=f"{group}, fewer steps")
                sure = [arm for arm in points if arm.psnr.low is not None]
                low, high = [arm.psnr.low for arm in sure], [arm.psnr.high for arm in sure]
                panel.fill_between([arm.means[key] for arm in sure], low, high, color="k", alpha=0.1, linewidth=0)
            else:
                colour, mark = looks[group]
                panel.plot(across, up, f"{mark}-", color=colour, label=label, markersize=4, linewidth=0.7)
    best = frontier(arms, lambda arm: (arm.means[key], arm.psnr.mean))
    best = [arm for arm in best if _series(arm) not in RIVALS]
    panel.plot([arm.means[key] for arm in best], [arm.psnr.mean for arm in best], "ko", markersize=8, fillstyle="none")
    panel.set_xlabel(f"{WORKS[key]}, in dense steps")
    panel.grid(alpha=0.3)


def _series(arm: ArmFigures) -> str:
    """Return an arm's name without its steps."""
    name, _, steps = arm.name.rpartition(" ")
    return name if steps.isdigit() else arm.name


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a suite's results; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--results", type=Path, help="JSON lines; default: results/<suite>.jsonl beside the suites")
    parser.add_argument("--out", type=Path, help="PNG; default: docs/evidence/<suite>.png")
    options = parser.parse_args(arguments)
    try:
        suite = read_suite(options.suite)
        lines = options.results or options.suite.parent.parent / "results" / f"{suite.name}.jsonl"
        arms = suite_figures(suite, result_lines(lines))
        clips = max((arm.clips for arm in arms), default=suite.clips)
        draw(
            arms,
            f"{suite.name}: {suite.model}, {clips} held-out clips",
            options.out or Path("docs/evidence") / f"{suite.name}.png",
        )
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
