"""What of `attention_shapes` is timed within a budget of seconds, planned before it starts by one short dense call."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dit_accel.adapters.adapter import Family
from dit_accel.errors import ConfigError
from dit_accel.estimate.estimate import attention_flops, estimate

from ..runs.conditions import device_name
from ..runs.results import Line
from .attention_shapes import Arm, Shape, arms_of
from .timing import now

INPUTS = "standard normal"
KEY = ("family", "height", "width", "num_frames", "heads", "dtype", "arm", "threads", "torch", "device")
"""What tells one line from another; of lines that are alike in it the last one counts."""

PROBE_TOKENS = 4096
"""Tokens of the dense call by which times are planned."""

SLICE = 1024
"""Tokens over which the feed-forward is timed: what it takes grows with them in proportion."""

CALLS = 4
"""Calls of which `seconds_of` takes the median; the first does not count."""

OVER_DENSE = {"auto": 1.5, "flex": 2.5}
"""Backend -> seconds of a pair of tokens over dense attention's, by which a call's time is planned; assumed."""

COMPILES = {"flex": 20.0}
"""Backend -> seconds that it needs for a new shape and dtype; assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where calls are timed, and on how many heads.

    Attributes:
        device: where.
        heads: of each call.
        most_rounds: times that each arm of a shape is run, where there is time.
        limit: seconds that all rounds of one arm may take.
        load: the system's, before anything is timed; None: not known.
    """

    device: torch.device
    heads: int
    most_rounds: int
    limit: float
    load: float | None = None


@dataclass(slots=True, kw_only=True)
class Group:
    """The arms of one shape in one dtype, which take turns.

    Attributes:
        seconds: that a dense call is expected to take.
        rest_seconds: that the feed-forward's rate is expected to take.
        wanted: arms that have no line yet.
        arms: those that are timed, dense first, which the others are held against.
        rounds: how often.
        left_out: arm -> why it isn't.
    """

    shape: Shape
    dtype: torch.dtype
    seconds: float
    rest_seconds: float
    wanted: frozenset[Arm]
    arms: list[Arm]
    rounds: int = 1
    left_out: dict[Arm, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What it is called while it runs."""
        return f"{self.shape.name}, {str(self.dtype)[6:]}"

    def call(self, arm: Arm) -> float:
        """Return the seconds that one call of an arm is expected to take."""
        return self.seconds * (pairs_of(self.shape, arm) * OVER_DENSE[arm.backend] if arm.backend else 1.0)

    def prepared(self, arm: Arm) -> float:
        """Return the seconds that an arm is expected to take before its first call that counts."""
        return COMPILES.get(arm.backend, 0.0) + self.call(arm) if arm.backend else 0.0

    def expected(self, rounds: int | None = None) -> float:
        """Return the seconds that all of it is expected to take."""
        seconds = (self.prepared(arm) + (rounds or self.rounds) * self.call(arm) for arm in self.arms)
        return sum(seconds, self.rest_seconds if self.arms else 0.0)


@lru_cache(maxsize=64)
def pairs_of(shape: Shape, arm: Arm) -> float:
    """Return the share of the pairs of tokens that an arm is expected to compute; a mean key is one."""
    config = arm.config
    return 1.0 if config is None else estimate(*shape.of, **shape.sizes, methods=[config]).pair_density


def plan_groups(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], machine: Machine, budget: float, known: Sequence[Line] = ()
) -> list[Group]:
    """Return what is to be timed within a budget of seconds, the shortest first; lines that are known are left out.

    Rounds are taken off where they do not fit, then FlexAttention, then whole groups, each from the longest.

    Raises:
        ConfigError: for more heads than a model has.
    """
    for shape in shapes:
        if machine.heads > (most := shape.of[1].heads):
            raise ConfigError(f"{shape.family} has {most} heads, got --heads {machine.heads}; ask for 1 to {most}")
    done = {key_of(line) for line in known if "reason" not in line}
    groups = [group for dtype in dtypes for group in _groups(shapes, dtype, machine, done)]
    groups.sort(key=lambda group: group.seconds)
    for group in groups:
        _limit(group, machine)
    while sum(group.expected() for group in groups) > budget:
        if not _shorten(groups, budget):
            break
    return groups


def _groups(
    shapes: Sequence[Shape], dtype: torch.dtype, machine: Machine, done: set[tuple[Any, ...]]
) -> Iterator[Group]:
    """Give a group for each shape of which something is missing."""
    missing = {shape: [arm for arm in arms_of(shape) if key_of(about(shape, arm, dtype, machine)) not in done]
               for shape in shapes}  # fmt: skip
    rate = dense_rate(machine.device, dtype) if any(missing.values()) else 1.0
    for shape, wanted in missing.items():
        if wanted:
            family, arms = shape.of[1], arms_of(shape)
            seconds = attention_flops(family, shape.layout.tokens) * machine.heads / family.heads / rate
            yield Group(
                shape=shape, dtype=dtype, seconds=seconds, rest_seconds=CALLS * feed_forward_flops(family) / rate,
                wanted=frozenset(wanted), arms=[arm for arm in arms if arm in wanted or arm is arms[0]],
            )  # fmt: skip


def _limit(group: Group, machine: Machine) -> None:
    """Choose the rounds, and leave out what alone takes longer than an arm may."""
    dense = group.arms[0]
    for arm in list(group.arms):
        needed = group.prepared(arm) + group.call(arm)
        if needed > machine.limit:
            why = f"{arm.name} would take about {needed:,.0f} s, the limit is {machine.limit:,.0f}"
            group.left_out |= dict.fromkeys(group.arms if arm is dense else [arm], why)
            group.arms = [one for one in group.arms if one not in group.left_out]
        if not group.arms:
            break
    group.rounds = max(1, min(machine.most_rounds, int(machine.limit / group.seconds)))


def _shorten(groups: list[Group], budget: float) -> bool:
    """Take something off the longest group that can be shortened; False: nothing is left."""
    for may, shorten in (
        (lambda group: group.rounds > 1, lambda group: setattr(group, "rounds", group.rounds - 1)),
        (lambda group: any(arm.backend == "flex" for arm in group.arms), partial(_leave_out, budget, "flex")),
        (lambda group: bool(group.arms), partial(_leave_out, budget, None)),
    ):
        if longest := max(filter(may, groups), key=lambda group: group.expected(), default=None):
            shorten(longest)
            return True
    return False


def _leave_out(budget: float, backend: str | None, group: Group) -> None:
    for arm in list(group.arms):
        if backend is None or arm.backend == backend:
            seconds = group.prepared(arm) + group.call(arm)
            group.left_out[arm] = f"would take about {seconds:,.0f} s more than a budget of {budget:,.0f} s has left"
            group.arms.remove(arm)


def feed_forward_flops(family: Family) -> int:
    """Return the FLOPs of the feed-forward of one block over `SLICE` tokens."""
    return 4 * SLICE * family.heads * family.head_dim * family.ffn_dim


def dense_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of dense attention over a short sequence."""
    q, k, v = (torch.randn(1, 1, PROBE_TOKENS, 128).to(device, dtype) for _ in range(3))
    seconds = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v), device)
    return 4 * PROBE_TOKENS**2 * 128 / seconds


@torch.no_grad()
def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a few calls after one that does not count."""
    taken = []
    for _ in range(CALLS):
        started = now(device)
        run()
        taken.append(now(device) - started)
    return float(np.median(taken[1:]))


def system_load() -> float | None:
    """Return how many processes wanted a core over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def about(shape: Shape, arm: Arm, dtype: torch.dtype, machine: Machine) -> Line:
    """Return what is known of a line before it is measured."""
    family, layout = shape.of[1], shape.layout
    return {
        "shape": shape.name, "family": family.name, **shape.sizes, "num_frames": shape.planned.num_frames,
        "tokens": layout.tokens, "visual_tokens": layout.visual_tokens, "heads": machine.heads,
        "all_heads": family.heads, "head_dim": family.head_dim, "inputs": INPUTS, "arm": arm.name,
        "methods": {arm.choice.config.name: arm.choice.config.to_dict()} if arm.choice else {},
        "backend": arm.backend, "presets": dict(arm.presets), "dtype": str(dtype)[6:],
        "device": device_name(machine.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "load": machine.load,
    }  # fmt: skip


def key_of(line: Line) -> tuple[Any, ...]:
    """Return what tells a line from others."""
    return tuple(line[name] for name in KEY)
