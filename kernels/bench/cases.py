"""Calls that aot.py compiles, at the sizes that the predictions speak of: the methods', and others that users make."""

from __future__ import annotations

from calls import Setting
from dit_accel_kernels.backends.triton.launch import eight_bit_number
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
OTHERS = (
    (Setting(), ("partial", "decay+partial+pooled", "narrow+pooled", "narrow+backward")),
    (Setting(dim=192), ("narrow",)),
    (Setting(), ("int8", "fp8", "pooled+int8", "pooled+fp8", "order+fp8", "decay+fp8", "narrow+partial+pooled+int8")),
    (Setting(dim=64), ("int8", "pooled+fp8")),
    (Setting(dim=96), ("pooled+fp8",)),
)
STARTED = ("sm_90", "sm_100")  # where FlashAttention-4 attends to whole exact tiles and ours adds the others


def record_cases(target: str, into: dict[str, Recorded]) -> None:
    """Record what these calls launch on a target."""
    for at, kinds in (*CASES, *OTHERS):
        for kind in kinds:
            if "fp8" not in kind or eight_bit_number(target, "fp8") is not None:
                launches_of(kind, at, target, into)
    if target in STARTED:
        for kind in ("pooled", "partial+pooled"):
            launches_of(kind, Setting(), target, into, "fa4")
