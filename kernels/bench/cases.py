"""Calls of the methods that aot.py compiles, at the sizes that the predictions speak of."""

from __future__ import annotations

from calls import Setting
from recorded import Recorded, launches_of

CASES = (
    (
        Setting(),
        (
            "plain", "fused", "decay", "pooled", "mask", "order", "keep+maxgap", "keep+mass", "keep+budget",
            "pinned+route", "decay+keep+maxgap", "mask+keep+pinned+maxgap", "order+keep+maxgap", "backward",
            "pinned+routed+backward",
        ),
    ),
    (Setting(dim=64), ("plain", "pooled")),
    (Setting(dim=96), ("plain",)),
    (Setting(tile=64), ("plain", "pooled", "keep+maxgap", "pinned+route")),
    (Setting(dtype="fp32"), ("plain",)),
)  # fmt: skip
STARTED = ("sm_90", "sm_100")  # where FlashAttention-4 attends to exact tiles and ours adds pooled ones


def record_cases(target: str, into: dict[str, Recorded]) -> None:
    """Record what CASES launch on a target."""
    for at, kinds in CASES:
        for kind in kinds:
            launches_of(kind, at, target, into)
    if target in STARTED:
        launches_of("pooled", Setting(), target, into, "fa4")
