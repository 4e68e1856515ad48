"""How often a verdict is wrong where two arms are alike, by simulation: alone, and any of a suite's arms after Holm."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.statistics import FEWEST, WRONG, judge, p_value
from scipy import stats
from study import study

CLIPS = (FEWEST, 8, 12, 16)
"""Clips of a suite."""

ARMS = 9
"""Arms that are judged together."""

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

SHAPES: Mapping[str, Draw] = {
    "normal": lambda rng, size: rng.normal(0, 1, size),
    "heavy tails (t, 3 degrees)": lambda rng, size: rng.standard_t(3, size),
    "skewed (gamma 4, skewness 1)": lambda rng, size: rng.gamma(4, 1, size) - 4,
    "skewed (exponential, skewness 2)": lambda rng, size: rng.exponential(1, size) - 1,
    "lognormal, skewness 6": lambda rng, size: rng.lognormal(0, 1, size) - np.exp(0.5),
}
"""Paired differences of mean 0."""


def alone(shape: str, clips: int, draws: int, seed: int) -> tuple[float, float]:
    """Return the share of draws with a verdict where there is no difference, by the rule and by Student's t alone."""
    data = SHAPES[shape](np.random.default_rng([seed, clips]), (draws, clips))
    student = np.asarray(stats.ttest_1samp(data, 0.0, axis=1)[1])
    return float(np.mean([p_value(one) < WRONG for one in data])), float(np.mean(student < WRONG))


def together(shape: str, clips: int, draws: int, seed: int, arms: int = ARMS) -> float:
    """Return the share of draws of arms that are all like the dense run in which one of them gets a verdict.

    Half of each arm's difference is the dense run's, which all of them share.
    """
    rng, wrong = np.random.default_rng([seed, clips, arms]), 0
    for _ in range(draws):
        shared, own = SHAPES[shape](rng, (1, clips)), SHAPES[shape](rng, (arms, clips))
        judged = judge(dict(enumerate((shared + own).tolist())))
        wrong += any(one.verdict in ("ahead", "behind") for one in judged.values())
    return wrong / draws


def measure(options: argparse.Namespace, _: Sequence[Line]) -> Iterable[Line]:
    """Give one line a shape and number of clips."""
    for shape in SHAPES:
        for clips in CLIPS:
            rule, student = alone(shape, clips, options.draws, options.seed)
            line = {"shape": shape, "clips": clips, "draws": options.draws, "seed": options.seed}
            family = {"together": together(shape, clips, options.families, options.seed), "families": options.families}
            yield {**line, "alone": rule, "student": student, **family, "arms": ARMS}


def table(lines: Sequence[Line]) -> str:
    """Return the table, with how it came about."""
    first = lines[0]
    counts = list(dict.fromkeys(line["clips"] for line in lines))
    heads = ["paired differences of mean 0"]
    heads += [f"{count} clips" for count in counts]
    rows = []
    for shape in dict.fromkeys(line["shape"] for line in lines):
        own = {line["clips"]: line for line in lines if line["shape"] == shape}
        rows.append((shape, *(_cell(own[count]) for count in counts)))
    return (
        f"{first['draws']} draws, seed {first['seed']}: false verdicts of one arm, in brackets by Student's t alone; "
        f"then of any of {first['arms']} arms after Holm's correction, {first['families']} draws.\n\n"
        f"{markdown_table(' | '.join(heads), rows)}"
    )


def _cell(line: Line) -> str:
    return f"{line['alone']:.1%} ({line['student']:.1%}); {line['together']:.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    return study(__doc__, arguments, measure, table, out="false-verdicts.jsonl", draws=10000, families=1000, seed=0)


if __name__ == "__main__":
    raise SystemExit(main())
