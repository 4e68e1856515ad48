"""What each preset level measured at each number of steps: the tables of README.md and docs/presets.md, and the figures
that the package carries: `python eval/studies/preset_table.py` writes these.
"""  # fmt: skip

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from dit_accel_eval.runs.results import Line, markdown_table, read_lines
from dit_accel_eval.statistics import Judged, judge

from dit_accel.methods.preset_figures import Figure, promise
from dit_accel.methods.presets import LEVELS, MEASURED_ON

RESULTS = "eval/results/preset-levels-{}.jsonl"
FIGURES = Path("dit_accel/methods/preset_figures.json")

SOLVERS = {("wan-tiny", "own"): "UniPC", ("flux-tiny", "own"): "Euler", ("flux-tiny", "unipc"): "UniPC"}
"""Model and how a run names its solver -> that solver; the first of each model is the one that it ships with."""

SHORT = (10, 16, 20, 30, 50)
"""Numbers of steps of the short table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One level at one number of steps on one model with one solver.

    Attributes:
        fewer: dense steps that took as long as the median prompt; ``fewer_psnr`` is the median PSNR of so many.
        lead: over these, by prompt, judged together with all rows of the model and solver.
    """

    figure: Figure
    least: float
    fewer: float
    fewer_psnr: float
    lead: Judged


def rows(root: Path) -> dict[str, list[Row]]:
    """Return level -> its rows; of runs in which it skips nothing there is none."""
    by_level: dict[str, list[Row]] = defaultdict(list)
    for (model, named), solver in SOLVERS.items():
        lines = [line for line in read_lines(root / RESULTS.format(model)) if line["solver"] == named]
        by: dict[tuple[str, int], dict[int, Line]] = defaultdict(dict)
        for line in lines:
            by[line["setting"], line["steps"]][line["clip"]] = line
        runs = {key: clips for key, clips in by.items() if key[0] in LEVELS and _median(clips, "work") < 1}
        fewer = {key: _median(clips, "time") * key[1] for key, clips in runs.items()}
        rivals = {key: {clip: _dense(by, key[1], clip, fewer[key]) for clip in clips} for key, clips in runs.items()}
        leads = judge(
            {key: [line["psnr"] - rivals[key][clip] for clip, line in clips.items()] for key, clips in runs.items()}
        )
        for (level, steps), clips in runs.items():
            psnr = [line["psnr"] for line in clips.values()]
            figure = Figure(
                model=model, solver=solver, steps=steps, median=round(float(np.median(psnr)), 1),
                tenth=round(float(np.quantile(psnr, 0.1)), 1), loop=round(1 / _median(clips, "time"), 3),
                call=round(1 / _median(clips, "call"), 3),
                skipped=round(1 - float(np.mean([line["work"] for line in clips.values()])), 3),
            )  # fmt: skip
            key, rival = (level, steps), float(np.median([*rivals[level, steps].values()]))
            row = Row(figure=figure, least=min(psnr), fewer=fewer[key], lead=leads[key], fewer_psnr=rival)
            by_level[level].append(row)
    return by_level


def _median(clips: dict[int, Line], key: str) -> float:
    return float(np.median([line[key] for line in clips.values()]))


def _dense(by: dict[tuple[str, int], dict[int, Line]], steps: int, clip: int, fewer: float) -> float:
    """Return a clip's PSNR after so many dense steps, linear between the numbers that were run."""
    known = {
        int(name.split()[1]): of[clip] for (name, count), of in by.items() if name[:5] == "dense" and count == steps
    }
    counts = sorted(known)
    return float(np.interp(fewer, counts, [known[count]["psnr"] for count in counts]))


def short_table(_: Path) -> str:
    """Return the promises of the levels at a few numbers of steps, the least of both models, in Markdown."""
    cells = [
        [f"`{level}`", *(f"{figure.median:.0f} ({figure.tenth:.0f}), {figure.call:.2f}x" if figure else "nothing"
                         for figure in (promise(level, steps) for steps in SHORT))] for level in LEVELS
    ]  # fmt: skip
    return markdown_table(" | ".join(["level", *(f"{steps} steps" for steps in SHORT)]), cells)


def long_table(root: Path) -> str:
    """Return all rows in Markdown."""
    by_level = rows(root)
    heads = (
        "model, solver | steps | level | PSNR, dB: median (10th percentile, least) | loop | whole call | "
        "dense steps of equal time (median dB) | lead over them, dB (median)"
    )
    ordered = [(row, row.figure, level) for level in LEVELS for row in by_level.get(level, ())]
    ordered.sort(key=lambda entry: (MEASURED_ON.index(entry[1].model), entry[1].solver, entry[1].steps))
    table = [
        [f"{fig.model}, {fig.solver}", fig.steps, f"`{level}`", f"{fig.median:.1f} ({fig.tenth:.1f}, {row.least:.1f})",
         f"{fig.loop:.2f}x", f"{fig.call:.2f}x", f"{row.fewer:.1f} ({row.fewer_psnr:.1f})", row.lead.judged("+.1f")]
        for row, fig, level in ordered
    ]  # fmt: skip
    return markdown_table(heads, table)


def figures_text(root: Path) -> str:
    """Return the figures that the package carries, as JSON."""
    by_level = {level: [asdict(row.figure) for row in of] for level, of in rows(root).items()}
    levels = [level for level in LEVELS if level in by_level]
    lines = [f'"{level}": [\n' + ",\n".join(map(json.dumps, by_level[level])) + "\n]" for level in levels]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FIGURES.write_text(figures_text(Path()), encoding="utf-8")
