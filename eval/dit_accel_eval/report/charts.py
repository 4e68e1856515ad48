"""What the page of a report draws, as plain data: one colour an arm, leads by clip, maps by prompt and step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..suites.figures import ArmFigures
from .report import SuiteReport

ACROSS, MIB = 320, 2**20  # width of the drawing of leads; bytes
GOLDEN = 137.508  # degrees between the hues of arms, so that neighbours differ most


def hues(report: SuiteReport) -> dict[str, int]:
    """Return arm -> its hue in degrees, the same in every drawing; dense runs have none and are drawn in black."""
    arms = [arm.name for arm in report.arms if not report.is_dense(arm)]
    return {name: round(250 + number * GOLDEN) % 360 for number, name in enumerate(arms)}


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from ``low`` to ``high``."""
    from matplotlib.ticker import MaxNLocator

    numbers = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(number) for number in numbers if low <= number <= high]


class Row(NamedTuple):
    """An arm's row of the drawing of leads, places across."""

    dots: Mapping[int, float]
    mean: float
    ends: list[float]  # of the interval, none without one


class Forest(NamedTuple):
    """Every arm's leads over fewer steps, in dB, on one scale."""

    rows: Mapping[str, Row]
    marks: Sequence[tuple[float, float]]
    zero: float


def forest(report: SuiteReport) -> Forest | None:
    """Return the leads at equal `Report.main`; None where no arm is held against fewer steps."""
    arms = {arm.name: arm.ahead[report.main] for arm in report.judged if report.main in arm.ahead}
    leads = {arm.name: report.leads(arm) for arm in report.judged if arm.name in arms}
    if not arms:
        return None
    every = np.array([lead for by_clip in leads.values() for lead in by_clip.values()])
    ends = [end for ahead in arms.values() for end in (ahead.low, ahead.high) if end is not None]
    low, high = min(0.0, np.quantile(every, 0.02), *ends), max(0.0, np.quantile(every, 0.98), *ends)
    edge = 0.04 * (high - low) or 1.0
    low, high = float(low - edge), float(high + edge)

    def place(value: float) -> float:
        return round(float(np.clip((value - low) / (high - low), 0.01, 0.99)) * ACROSS, 1)

    rows = {}
    for name, ahead in arms.items():
        ends = [place(end) for end in (ahead.low, ahead.high) if end is not None]
        rows[name] = Row({clip: place(lead) for clip, lead in leads[name].items()}, place(ahead.mean), ends)
    return Forest(rows, [(place(tick), tick) for tick in ticks(low, high)], place(0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A table of values whose cells are shaded by them."""

    name: str
    heads: Sequence[tuple[int, str]]
    rows: Mapping[str, Sequence[float | None]]
    digits: int

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        values = [value for row in self.rows.values() for value in row if value is not None]
        return min(values), max(values)

    def share(self, value: float) -> float:
        """Return where a value lies between the ends, from 0 to 1."""
        low, high = self.ends
        return (value - low) / ((high - low) or 1.0)


def prompt_map(report: SuiteReport, arms: Sequence[ArmFigures]) -> Map:
    """Return the PSNR of arms by clip, the hardest clip first."""
    values = {line.key: line.psnr for line in report.results.lines}
    clips = report.worst_first()
    rows = {arm.name: [values.get((arm.name, clip)) for clip in clips] for arm in arms}
    return Map(name="PSNR in dB", heads=[(clip, report.prompts[clip]) for clip in clips], rows=rows, digits=1)


def step_map(report: SuiteReport) -> Map | None:
    """Return the work of each step of the arms that are not dense runs, means over clips; None where no line tells."""
    rows = {}
    for arm in report.judged:
        works = [line.step_work for line in report.lines_of(arm) if line.step_work]
        if len({len(work) for work in works}) == 1:
            rows[arm.name] = [float(value) for value in np.mean(works, axis=0)]
    name = (
        "Work of each step in dense steps: 0 where a cache skipped it, less than 1 where blocks or tiles were left "
        "out, more where a method adds forwards"
    )
    heads = [(step, "") for step in range(1, max(map(len, rows.values()), default=0) + 1)]
    return Map(name=name, heads=heads, rows=rows, digits=2) if rows else None


def costs(report: SuiteReport) -> dict[str, dict[str, float]]:
    """Return arm -> what its stages took in seconds, and the most MiB that were held, means over clips that tell."""
    figures = {}
    for arm in report.arms:
        lines = [line for line in report.lines_of(arm) if line.times]
        held = [max(line.peak_memory_bytes.values()) / MIB for line in lines if line.peak_memory_bytes]
        if lines:
            figures[arm.name] = {
                **{key: float(np.mean([line.times[key] for line in lines])) for key in ("text", "denoise", "decode")},
                "step": float(np.median([seconds for line in lines for seconds in line.times["steps"]])),
                **({"memory": max(held)} if held else {}),
            }
    return figures
