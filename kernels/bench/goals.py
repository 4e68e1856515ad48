"""The goals that the kernels are held to, judged by the times of gpu.py."""

from __future__ import annotations

from typing import Any

from timed import RADIAL, SDPA


def goals(records: list[dict[str, Any]]) -> list[tuple[str, float | None, float, bool]]:
    """(goal, worst found or None, limit, whether less is better), from the timed records."""
    seconds = {(r["shape"], r["candidate"], r["density"]): r["seconds"] for r in records if "seconds" in r}
    shapes = {shape for shape, _, _ in seconds}

    def ratios(a: tuple[str, float], b: tuple[str, float], only: set[str] | None = None) -> list[float]:
        found = [(seconds.get((s, *a)), seconds.get((s, *b))) for s in sorted(only or shapes)]
        return [x / y for x, y in found if x is not None and y is not None]

    def best_dense(shape: str, density: float) -> float | None:
        rivals = [seconds[shape, name, 1.0] for name in SDPA if (shape, name, 1.0) in seconds]
        own = seconds.get((shape, "triton", density))
        return min(rivals) / own if rivals and own else None

    def routed() -> list[float]:
        """Against the plain time at 0.1, which grows with the density that routing really chose."""
        found = {
            r["shape"]: r["density_found"] / 0.1
            for r in records
            if "seconds" in r and r["candidate"] == "triton-routed"
        }
        pairs = [(s, ratios(("triton-routed", 0.1), ("triton", 0.1), {s})) for s in sorted(found)]
        return [x / found[s] for s, values in pairs for x in values]

    def linear() -> list[float]:
        return [x / d for d in (0.1, 0.25, RADIAL, 0.5) for x in ratios(("triton", d), ("triton", 1.0))]

    worst = lambda values, pick: pick(values) if values else None  # noqa: E731
    return [
        ("time over density x all-tiles time", worst(linear(), max), 1.12, True),
        ("best SDPA over ours, wan-720p at 0.27", best_dense("wan-720p", RADIAL), 2.5, False),
        ("best SDPA over ours, 128k at 0.1", best_dense("128k", 0.1), 5.0, False),
        ("FlexAttention over ours", worst(ratios(("flex", RADIAL), ("triton", RADIAL)), min), 1.1, False),
        ("with decay over without", worst(ratios(("triton-decay", RADIAL), ("triton", RADIAL)), max), 1.05, True),
        ("with votes over without", worst(ratios(("triton-votes", RADIAL), ("triton-kept", RADIAL)), max), 1.02, True),
        ("with routing over without", worst(routed(), max), 1.1, True),
        ("with pooled rest over without", worst(ratios(("triton-pooled", 0.1), ("triton", 0.1)), max), 1.1, True),
        ("backward over forward", worst(ratios(("triton-backward", RADIAL), ("triton", RADIAL)), max), 2.7, True),
    ]
