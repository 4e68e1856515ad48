"""Pairs of arms that a suite declares before it runs, such as ours against another project's, held against each other.

A table of ``[[compare]]`` has an ``arm``, what it is held ``against``, and the ``margin`` in dB that it is to be ahead
by, 0 where none is given. The pairs of a suite are judged together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from ..runs.results import Line, latest, markdown_table
from ..statistics import FEWEST, TOO_FEW, Judged, judge, p_words
from .arms import Arm, check_kinds, dense_arm

KINDS = {"arm": str, "against": str, "margin": (int, float)}
"""Key of a pair -> what it must be."""

EQUAL = 1.02
"""Time or work, of the other arm's, up to which an arm's counts as no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An arm, what it is held against, and by how many dB it is to be ahead."""

    arm: str
    against: str
    margin: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigures:
    """What the clips of both arms say.

    Attributes:
        ahead: by how many dB of PSNR the arm is ahead, clip by clip.
        costs: of the arm and of the other, in dense steps.
        by: what costs are: measured ``time``; ``processor time``, where arms ran on one thread beside other work; or
            counted ``work``.
        dense: steps of the dense run that costs are a share of.
    """

    pair: Pair
    ahead: Judged
    costs: tuple[float, float]
    by: str
    dense: int

    @property
    def dearer(self) -> bool:
        """Whether the arm costs more than the one that it is held against."""
        return self.costs[0] > EQUAL * self.costs[1]

    @property
    def verdict(self) -> str:
        """What is said of the pair, its margin and cost within."""
        said, margin = self.ahead.verdict, self.pair.margin
        words = {"ahead": f"ahead by more than {margin:g} dB", "behind": f"not {margin:g} dB ahead"} if margin else {}
        more = f", at more {self.by}" if self.dearer and said not in ("open", TOO_FEW) else ""
        return words.get(said, said) + more


def read_pairs(tables: Sequence[Any], arms: Sequence[Arm], where: str) -> tuple[Pair, ...]:
    """Return the pairs of a suite's ``[[compare]]`` tables.

    Raises:
        ConfigError: for an unknown or ill-typed key, an arm that the suite has not, or an arm against itself.
    """
    names, found = [arm.name for arm in arms], list[Pair]()
    for values in tables:
        if not isinstance(values, dict):
            raise ConfigError(f"{where} has compare = {values!r}; write [[compare]] with arm and against below it")
        check_kinds(values, KINDS, f"{where}: compare")
        missing = [key for key in ("arm", "against") if key not in values]
        if missing:
            raise ConfigError(f"{where} has a [[compare]] without {' and '.join(missing)}; name two of its arms")
        pair = Pair(**values)
        for name in (pair.arm, pair.against):
            if name not in names:
                raise ConfigError(f"{where} compares {name!r}, which is none of its arms; {did_you_mean(name, names)}")
        if pair.arm == pair.against or (pair.arm, pair.against) in [(one.arm, one.against) for one in found]:
            raise ConfigError(f"{where} compares {pair.arm!r} with {pair.against!r}, itself or a second time; drop it")
        found.append(pair)
    return tuple(found)


def pair_figures(
    pairs: Sequence[Pair], lines: Sequence[Line], reference_steps: int | None = None
) -> list[PairFigures]:  # fmt: skip
    """Return the figures of the pairs of which both arms ran on a clip at least, judged together.

    Args:
        reference_steps: of the reference, where that is the model's own run: what costs are a share of; None: the steps
            of the arm of most.
    """
    known = latest(lines)
    shared = {pair: _shared(pair, known) for pair in pairs}
    differences = {pair: [own["psnr"] - other["psnr"] for own, other in both] for pair, both in shared.items()}
    judged = judge(differences, {pair: pair.margin for pair in pairs})
    found = []
    for pair, ahead in judged.items():
        both = shared[pair]
        dense = reference_steps or max(line["num_inference_steps"] for ends in both for line in ends)
        by, costs = _costs(both, known, dense)
        found.append(PairFigures(pair=pair, ahead=ahead, costs=costs, by=by, dense=dense))
    return found


def _costs(
    both: Sequence[tuple[Line, Line]], known: Mapping[tuple[str, int], Line], dense: int
) -> tuple[str, tuple[float, float]]:
    """Return what two arms cost in dense steps, the mean over clips, and by what: see `PairFigures`."""
    lines = [line for ends in both for line in ends]
    of_clip = {clip: _busy(line) for (name, clip), line in known.items() if name == dense_arm(dense).name}

    def processor_steps(line: Line) -> float:
        return dense * _busy(line) / of_clip[line["clip"]]

    by, cost = "work", lambda line: float(line["work"])
    if all("steps_in_time" in line for line in lines):
        by, cost = "time", lambda line: float(line["steps_in_time"])
    elif all(_busy(line) and of_clip.get(line["clip"]) for line in lines):
        by, cost = "processor time", processor_steps
    own, other = (float(np.mean([cost(ends[place]) for ends in both])) for place in (0, 1))
    return by, (own, other)


def _busy(line: Line) -> float:
    """Return the processor seconds of a run's steps on one thread; 0 where not known, or of several threads."""
    times = line.get("times", {})
    return float(times.get("processor", 0.0)) if times.get("threads") == 1 else 0.0


def _shared(pair: Pair, known: Mapping[tuple[str, int], Line]) -> list[tuple[Line, Line]]:
    """Return the lines of both arms, of the clips that both have."""
    clips = sorted(clip for name, clip in known if name == pair.arm and (pair.against, clip) in known)
    return [(known[pair.arm, clip], known[pair.against, clip]) for clip in clips]


def pairs_table(
    pairs: Sequence[Pair], lines: Sequence[Line], reference_steps: int | None = None
) -> str:  # fmt: skip
    """Return the Markdown table of declared pairs and how they were judged, "" where none is declared or ran."""
    found = pair_figures(pairs, lines, reference_steps)
    if not found:
        return ""
    cost = found[0].by
    rows = []
    for one in found:
        own, other = (share / one.dense for share in one.costs)
        text = f"{own:.2f} vs {other:.2f}" + ("" if one.by == cost else f" by {one.by}")
        name = f"{one.pair.arm} vs {one.pair.against}"
        rows.append((name, one.ahead.cell("+"), p_words(one.ahead.p_holm), one.verdict, text))
    together = max(one.ahead.together for one in found)
    about = (
        f"Pairs declared in the suite, PSNR clip by clip; p by Holm's rule over {together}, of the difference being "
    )
    about += "0, or the margin where one is given."
    if not together:
        about = f"Pairs declared in the suite, PSNR clip by clip; there is no verdict under {FEWEST} clips."
    heads = f"pair | PSNR ahead, dB (median) | Holm p | verdict | share of dense {cost}"
    return f"{about}\n\n{markdown_table(heads, rows)}"
