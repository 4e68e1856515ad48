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
from .reference import is_converged

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

    def __str__(self) -> str:
        return f"{self.arm} vs {self.against}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigures:
    """What the clips of both arms say.

    Attributes:
        ahead: by how many dB of PSNR the arm is ahead, clip by clip.
        score: the same of the judge's score, in percent; None where clips have none.
        costs: of the arm and of the other, as shares of the dense run's.
        by: what costs are: measured ``time``; ``processor time``, where arms ran on one thread beside other work; or
            counted ``work``.
    """

    pair: Pair
    ahead: Judged
    score: Judged | None
    costs: tuple[float, float]
    by: str

    @property
    def verdict(self) -> str:
        """What is said of the pair, its margin and cost within."""
        said, margin, dearer = self.ahead.verdict, self.pair.margin, self.costs[0] > EQUAL * self.costs[1]
        words = {"ahead": f"ahead by more than {margin:g} dB", "behind": f"not {margin:g} dB ahead"} if margin else {}
        more = f", at more {self.by}" if dearer and said not in ("open", TOO_FEW) else ""
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
        if pair.arm == pair.against or str(pair) in map(str, found):
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
    known, both = latest([line for line in lines if is_converged(line)]), dict[Pair, list[tuple[Line, Line]]]()
    for pair in pairs:
        clips = sorted(clip for name, clip in known if name == pair.arm and (pair.against, clip) in known)
        both[pair] = [(known[pair.arm, clip], known[pair.against, clip]) for clip in clips]
    ahead = judge(
        {pair: [own["psnr"] - other["psnr"] for own, other in ends] for pair, ends in both.items()},
        {pair: pair.margin for pair in pairs},
    )
    scores = judge({
        pair: [100 * (own["score"] - other["score"]) for own, other in ends if "score" in own and "score" in other]
        for pair, ends in both.items()
    })  # fmt: skip
    found = []
    for pair, one in ahead.items():
        dense = reference_steps or max(line["num_inference_steps"] for ends in both[pair] for line in ends)
        by, costs = _costs(both[pair], known, dense)
        found.append(PairFigures(pair=pair, ahead=one, score=scores.get(pair), costs=costs, by=by))
    return found


def _costs(
    both: Sequence[tuple[Line, Line]], known: Mapping[tuple[str, int], Line], dense: int
) -> tuple[str, tuple[float, float]]:
    """Return by what two arms' costs are told, the best that all lines have, and these; see `PairFigures`."""
    whole = {clip: _busy(line) for (name, clip), line in known.items() if name == dense_arm(dense).name}
    kinds = {
        "time": lambda line: line.get("steps_in_time", 0) / dense,
        "processor time": lambda line: _busy(line) / (whole.get(line["clip"]) or np.inf),
        "work": lambda line: line["work"] / dense,
    }
    found = {by: np.array([[cost(line) for line in ends] for ends in both]) for by, cost in kinds.items()}
    by = next((by for by, costs in found.items() if costs.all()), "work")
    own, other = found[by].mean(0)
    return by, (float(own), float(other))


def _busy(line: Line) -> float:
    """Return the processor seconds of a run's steps on one thread; 0 where not known, or of several threads."""
    times = line.get("times", {})
    return float(times.get("processor", 0.0)) if times.get("threads") == 1 else 0.0


def pairs_rule(found: Sequence[PairFigures]) -> str:
    """Return in words how pairs are judged."""
    together = max(one.ahead.together for one in found)
    if not together:
        return f"Pairs declared in the suite, PSNR clip by clip; there is no verdict under {FEWEST} clips."
    return (
        f"Pairs declared in the suite, PSNR clip by clip; p by Holm's rule over {together}, of the difference being 0, "
        "or the margin where one is given."
    )


def pairs_text(found: Sequence[PairFigures]) -> str:
    """Return the Markdown table of pairs and how they were judged, "" where there is none."""
    if not found:
        return ""
    scored, cost = any(one.score for one in found), found[0].by
    heads = "pair | PSNR ahead, dB (median) | Holm p | verdict "
    heads += f"{'| score, % ' if scored else ''}| share of dense {cost}"
    rows = []
    for one in found:
        costs = f"{one.costs[0]:.2f} vs {one.costs[1]:.2f}" + ("" if one.by == cost else f" by {one.by}")
        cells = [str(one.pair), one.ahead.cell("+"), p_words(one.ahead.p_holm), one.verdict]
        rows.append((*cells, *([one.score.judged("+.1f") if one.score else ""] if scored else []), costs))
    return f"{pairs_rule(found)}\n\n{markdown_table(heads, rows)}"
