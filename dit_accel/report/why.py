"""Why a run was not faster: the causes by their share of its time, largest first, and what to do about each."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .clock import TimedForward, Timing

LEAST = 0.03
"""Share of the run's time from which a cause is named."""

Cause = tuple[str, str]
"""What took the time, and what to do."""

Options = Mapping[str, Mapping[str, Any]]
"""Method name -> its options."""


def why_not_faster(
    timing: Timing, methods: Options, logs: Mapping[str, list[dict[str, Any]]], dense_layers: Mapping[Any, float],
    notes: tuple[str, ...],
) -> list[str]:  # fmt: skip
    """Return a line for each cause that took at least `LEAST` of the run's time.

    Args:
        timing: the forwards.
        methods: what was attached.
        logs: cache's name -> what it logged of each forward (`dit_accel.methods.caches.log.CachedForward`).
        dense_layers: (transformer, step, branch) -> share of a forward's attention calls that stayed dense.
        notes: the methods' remarks.
    """
    if not timing.forwards:
        return []
    lost: dict[Cause, float] = defaultdict(float)
    reasons = {
        (entry["transformer"], entry["step_index"], entry["branch"]): (name, entry["reason"], entry["value"])
        for name, log in logs.items()
        for entry in log
        if not entry["reused"]
    }
    unskipped = [value for _, reason, value in reasons.values() if reason == "measured" and value is not None]
    half = statistics.median(unskipped) if unskipped else None
    for one in timing.forwards:
        key = (one.transformer, one.step_index, one.branch)
        usual = _usual(timing, one)
        if one.seconds > 2 * usual and one is timing.forwards[0]:
            lost["the first forward's own start: compilation, loading, tuning", "run once before you measure"] += (
                one.seconds - usual
            )
        taken = min(one.seconds, usual)
        if key in reasons:
            lost[_of_cache(*reasons[key], methods, half)] += taken
        elif one.kind == "dense":
            lost[_of_dense(one, methods, notes)] += taken
        elif one.kind == "reduced":
            for cause, share in _of_reduced(one, timing, dense_layers.get(key, 0.0), methods):
                lost[cause] += share * taken
    lost[
        "between the forwards: the scheduler, offloading, guidance",
        "keep the model on the device if it fits; the methods can't change this",
    ] += sum(one.before for one in timing.forwards)
    found = sorted(((seconds / timing.elapsed, cause) for cause, seconds in lost.items()), reverse=True)
    return [f"{share:.0%} {what}; {advice}" for share, (what, advice) in found if share >= LEAST]


def _usual(timing: Timing, one: TimedForward) -> float:
    return statistics.median(timing.seconds(one.kind))


def _of_cache(name: str, reason: str, value: float | None, methods: Options, half: float | None) -> Cause:
    """Return why a cache computed a forward."""
    options = methods.get(name, {})

    def option(key: str) -> str:
        return f"{name}.{key} = {options[key]}" if key in options else f"{name}.{key}"

    measured = f"; {half:.3g} would skip half of them" if half is not None else ""
    table: dict[str, Callable[[], Cause]] = {
        "first steps": lambda: ("first steps, always computed", f"lower {option('warmup_steps')}"),
        "last steps": lambda: ("last steps, always computed", f"lower {option('last_steps')}"),
        "few steps": lambda: ("a run of few steps, which is computed whole", f"lower {option('min_steps')}"),
        "measured": lambda: (
            f"steps that changed more than {name} skips",
            f"raise {option('threshold')}{measured}, at a loss of quality",
        ),
        "conditional": lambda: ("conditional forwards, always computed", f"set {name}.branches to all"),
    }
    return table.get(reason, lambda: (f"forwards that {name} computed: {reason}", "no option changes this"))()


def _of_dense(one: TimedForward, methods: Options, notes: tuple[str, ...]) -> Cause:
    """Return why a forward that no cache could skip was dense."""
    for name, options in methods.items():
        if any(note.startswith(f"{name} stays dense") for note in notes):
            return "too few tokens for sparse attention to pay", f"a step cache, or lower {name}.min_tokens"
        for option in ("dense_steps", "dense_last_steps", "dense_above_sigma"):
            if options.get(option):
                return f"steps that {name} leaves dense", f"lower {name}.{option} = {options[option]}"
    remark = "; ".join(notes)
    return "forwards in which no method acted" + (f" ({remark})" if remark else ""), "add a step cache"


def _of_reduced(
    one: TimedForward, timing: Timing, dense_layers: float, methods: Options
) -> Iterator[tuple[Cause, float]]:
    """Yield what kept a forward that some method shortened as long as it was, with its share."""
    if dense_layers:
        names = [name for name, options in methods.items() if options.get("dense_layers")]
        advice = f"lower {names[0]}.dense_layers = {methods[names[0]]['dense_layers']}" if names else "see the notes"
        yield ("attention calls that stayed dense in forwards that were thinned out", advice), dense_layers
    if timing.dense and one.seconds > 0.9 * timing.dense:
        yield (
            (
                "thinned-out forwards that take as long as dense ones: attention is a small part of them at this size",
                "use a step cache; sparse attention pays on longer sequences",
            ),
            1.0 - dense_layers,
        )
