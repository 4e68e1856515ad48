"""The goals that the kernels are held to, with what the roofline predicts for a card and what gpu.py measured on it.

`python kernels/bench/goals.py --card H100` needs no card: it prints goal, prediction and, of the JSON lines given with
--measured, measurement. Each goal is a ratio of times, or of speeds, and the worst of the timed shapes counts. A ratio
is predicted twice, by bounds (all work overlaps) and by serial times (none does). Where both miss the goal it can't be
reached as the kernels are: it is dropped, and the better one of the two is what to hold a measurement to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cards import CARDS, Card
from mixes import Table, read_table
from roofline import SHAPES, predict_call, predict_dense

RADIAL = 0.27  # RadialAttention's density at Wan 720p, 81 frames
DENSE = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
UNKNOWN = ("flex", "triton-decay")  # whose times the model doesn't tell: factors of decay take loops of their own
Seconds = tuple[float, ...]  # one measured, or two predicted, by bound and serial
Times = Callable[[str, str, float], Seconds | None]  # by shape, candidate, density


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """A ratio that is to be at most (`less`) or at least `limit`; what is predicted, by bound and serial, and measured.

    `limit` is None where there is no goal, only a bound to compare with.
    """

    name: str
    limit: float | None
    less: bool
    predicted: Seconds | None = None
    measured: float | None = None

    @property
    def best(self) -> float | None:
        """The better prediction."""
        return None if self.predicted is None else (min if self.less else max)(self.predicted)

    @property
    def possible(self) -> bool:
        """Whether the goal is one, for all that is predicted."""
        return self.limit is not None and (self.best is None or self._meets(self.best))

    @property
    def verdict(self) -> str:
        """Whether the measurement meets the goal; a goal that can't be met is none."""
        if not self.possible:
            return "no goal" if self.limit is None else "dropped: out of reach"
        if self.measured is None:
            return "not measured"
        return "met" if self._meets(self.measured) else "MISSED"

    def _meets(self, value: float) -> bool:
        assert self.limit is not None
        return value <= self.limit if self.less else value >= self.limit

    @property
    def asked(self) -> str:
        """The goal in words."""
        return "" if self.limit is None else f"{'<=' if self.less else '>='} {self.limit:g}"


Call = tuple[str, float]  # candidate, density


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """What a goal is about: time of the fastest call `above` over that of the call `below` and a share of it.

    Of all timed shapes, or of one.
    """

    name: str
    above: tuple[Call, ...]
    below: Call
    limit: float | None
    less: bool = True
    share: float = 1.0
    shape: str | None = None

    def of(self, times: Times, shape: str) -> Seconds | None:
        """The ratio for a shape, by each kind of time; None where a call has no time."""
        above = [found for call in self.above if (found := times(shape, *call)) is not None]
        below = times(shape, *self.below)
        if not above or below is None or self.shape not in (None, shape):
            return None
        return tuple(min(each) / (y * self.share) for each, y in zip(zip(*above, strict=True), below, strict=True))


LINEAR = "time over density x all-tiles time"
DENSE_CALLS = tuple((name, 1.0) for name in DENSE)
RATIOS = (
    *(
        Ratio(name=LINEAR, above=(("triton", d),), below=("triton", 1.0), limit=1.12, share=d)
        for d in (0.1, 0.25, RADIAL, 0.5)
    ),
    *(
        Ratio(
            name=f"best SDPA over ours, {shape} at {density:g}", above=DENSE_CALLS, below=("triton", density),
            limit=limit, less=False, shape=shape,
        )
        for shape, density, limit in (("wan-720p", RADIAL, 2.5), ("128k", 0.1, 5.0))
    ),
    Ratio(
        name="FlexAttention over ours", above=(("flex", RADIAL),), below=("triton", RADIAL), limit=1.1, less=False
    ),
    Ratio(name="with decay over without", above=(("triton-decay", RADIAL),), below=("triton", RADIAL), limit=1.05),
    Ratio(name="with votes over without", above=(("triton-votes", RADIAL),), below=("triton-kept", RADIAL), limit=1.02),
    Ratio(name="with routing over without", above=(("triton-routed", 0.1),), below=("triton", 0.1), limit=1.1),
    Ratio(name="with pooled rest over without", above=(("triton-pooled", 0.1),), below=("triton", 0.1), limit=1.1),
    Ratio(name="backward over forward", above=(("triton-backward", RADIAL),), below=("triton", RADIAL), limit=None),
)  # fmt: skip


def goals(
    records: list[dict[str, Any]], card: Card | None = None, table: Table | None = None, block: int = 128
) -> list[Goal]:
    """All goals, with the timed records' measurements and, where the card is known, predictions at tiles of `block`.

    Predictions are for the shapes that were timed, for all of them if none was.
    """
    timed = {(r["shape"], r["candidate"], r["density"]): r for r in records if "seconds" in r}
    shapes = tuple(dict.fromkeys(shape for shape, _, _ in timed)) or tuple(SHAPES)

    def measured(shape: str, candidate: str, density: float) -> Seconds | None:
        found = timed.get((shape, candidate, density))
        if found is None:
            return None
        if candidate == "triton-routed":  # which grows with the density that routing really chose
            return (found["seconds"] * density / found["density_found"],)
        return (found["seconds"],)

    def predicted(shape: str, candidate: str, density: float) -> Seconds | None:
        if card is None or table is None or candidate in UNKNOWN:
            return None
        at = replace(SHAPES[shape], block=block)
        if candidate in DENSE:
            dense = predict_dense(at, card)
            return None if dense is None else (dense, dense)
        found = predict_call(at, candidate, density, card, table)
        return None if found is None else (found["bound"], found["serial"])

    return [
        Goal(
            name=name,
            limit=ratios[0].limit,
            less=ratios[0].less,
            predicted=_worst(ratios, predicted, shapes),
            measured=(_worst(ratios, measured, shapes) or (None,))[0],
        )
        for name in dict.fromkeys(ratio.name for ratio in RATIOS)
        for ratios in [[ratio for ratio in RATIOS if ratio.name == name]]
    ]


def _worst(ratios: list[Ratio], times: Times, shapes: tuple[str, ...]) -> Seconds | None:
    """The worst of the ratios over the shapes, by each kind of time; None where there is nothing."""
    found = [x for ratio in ratios for shape in shapes if (x := ratio.of(times, shape)) is not None]
    pick = max if ratios[0].less else min
    return tuple(pick(each) for each in zip(*found, strict=True)) if found else None


def lines(found: list[Goal]) -> list[str]:
    """The goals side by side with prediction and measurement, a line each, under a head."""
    head = f"{'':38}{'goal':>8}  {'predicted':>13}  {'measured':>8}"
    return [head, *(f"{goal.name:38}{goal.asked:>8}  {_told(goal)}  {goal.verdict}" for goal in found)]


def _told(goal: Goal) -> str:
    predicted = "" if goal.predicted is None else "{:.2f} - {:.2f}".format(*sorted(goal.predicted))
    return f"{predicted:>13}  {'' if goal.measured is None else f'{goal.measured:.3f}':>8}"


def main() -> None:
    """Print the goals for a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="H100", choices=CARDS, help="(default %(default)s)")
    parser.add_argument("--block", type=int, default=128, choices=(64, 128), help="tile side (default %(default)s)")
    parser.add_argument("--measured", type=Path, help="JSON lines of gpu.py time on that card")
    args = parser.parse_args()
    records = []
    if args.measured:
        found = map(json.loads, args.measured.read_text().splitlines())
        records = [r for r in found if r.get("kind") == "time" and args.card in r["device"]]
    print(f"{args.card}: predicted by the roofline from the compile table, all work overlapping and none")
    print("\n".join(lines(goals(records, CARDS[args.card], read_table(), args.block))))


if __name__ == "__main__":
    main()
