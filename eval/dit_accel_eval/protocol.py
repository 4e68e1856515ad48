"""The protocol by which accelerated models are compared: its rules and prompts, and the clips that a verdict takes.

How many that are is simulated from the differences that clips really showed.
"""

import json
import tomllib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from .runs.results import markdown_table
from .statistics import FEWEST, WRONG, p_values

PROTOCOL = "1"  # version of the protocol; it rises when the same clips would be measured, paired or judged otherwise
USES = ("choosing", "judging")  # of prompts: settings and rivals are chosen on the one, and judged on the other
CHANCE = 0.8  # chance of a verdict with which a number of clips is enough
COUNTS = (FEWEST, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # numbers of clips that are tried
LEADS = (1.0, 2.0, 3.0, 5.0, 10.0)  # true leads of the table, in dB


def protocol_rules() -> str:
    """Return the rules as a numbered list in Markdown."""
    return (files("dit_accel_eval") / "protocol.md").read_text(encoding="utf-8").strip()


def protocol_prompts(use: str) -> dict[str, tuple[str, ...]]:
    """Return category -> its prompts for one of `USES`."""
    data = tomllib.loads((files("dit_accel_eval") / "prompts.toml").read_text(encoding="utf-8"))
    return {category["name"]: tuple(category[use]) for category in data["category"]}


def prompts_in_order(use: str) -> tuple[str, ...]:
    """Return the prompts for one of `USES`, those first that come first in each category, so that any start is even."""
    return tuple(prompt for row in zip(*protocol_prompts(use).values(), strict=True) for prompt in row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """By how many dB each clip of an arm was ahead of fewer steps, in a file of results."""

    results: str
    arm: str
    leads: tuple[float, ...]

    @property
    def deviation(self) -> float:
        """The standard deviation over clips, in dB."""
        return float(np.std(self.leads, ddof=1))


def committed() -> list[Spread]:
    """Return the spreads that ship with the package: of each of three suites, the arm of median deviation."""
    text = (files("dit_accel_eval") / "spreads.jsonl").read_text(encoding="utf-8")
    return [Spread(**{**row, "leads": tuple(row["leads"])}) for row in map(json.loads, text.splitlines())]


def typical(results: str, leads: Mapping[str, Sequence[float]]) -> Spread:
    """Return the spread of the arm of median deviation, of an even number the lower of the two in the middle."""
    spreads = [Spread(results=results, arm=arm, leads=tuple(each)) for arm, each in leads.items()]
    return sorted(spreads, key=lambda spread: spread.deviation)[(len(spreads) - 1) // 2]


def chance(
    leads: Sequence[float], lead: float, clips: int, *, arms: int = 1, draws: int = 1000, seed: int = 0
) -> float:
    """Return how often a true lead in dB gets its verdict on so many clips.

    Clips are drawn from those that were measured, moved so that their mean is the lead. Of several arms this one alone
    differs, so that Holm's first step, the level over the number of arms, decides.
    """
    data = np.asarray(leads, dtype=np.float64)
    centred = (data - data.mean()) * np.sqrt(len(data) / (len(data) - 1))  # as wide as the clips that were not measured
    drawn = lead + np.random.default_rng(seed).choice(centred, (draws, clips))
    return float((p_values(drawn) < WRONG / arms).mean())


def clips_for(leads: Sequence[float], lead: float, *, arms: int = 1) -> int | None:
    """Return the least of `COUNTS` that gives a true lead its verdict in `CHANCE` of the draws, None if none does."""
    place = bisect_left(COUNTS, CHANCE, key=lambda clips: chance(leads, lead, clips, arms=arms))
    return COUNTS[place] if place < len(COUNTS) else None


def power_table(spreads: Sequence[Spread], leads: Sequence[float] = LEADS, arms: int = 1) -> str:
    """Return the Markdown table of the clips that it takes to see true leads."""
    heads = ["results, arm of median spread", "spread, dB", *(f"{lead:g} dB" for lead in leads)]
    rows = []
    for spread in spreads:
        counts = [clips_for(spread.leads, lead, arms=arms) or f"over {COUNTS[-1]}" for lead in leads]
        rows.append([f"{spread.results}, {spread.arm}", f"{spread.deviation:.1f}", *counts])
    return markdown_table(" | ".join(heads), rows)
