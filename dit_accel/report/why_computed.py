"""Why a cache computed a forward, and what to do about it: the reasons that it logged, in a reader's words."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .clock import Key

Cause = tuple[str, str]
"""What took the time, and what to do."""

Options = Mapping[str, Mapping[str, Any]]
"""Method name -> its options."""


def why_computed(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], methods: Options
) -> tuple[dict[Key, Cause], dict[Key, str]]:
    """Return why each forward was computed that a cache logged, and which cache skipped each of the others."""
    computed: dict[Key, Cause] = {}
    skipped: dict[Key, str] = {}
    for name, log in logs.items():
        above = [
            entry["value"]
            for entry in log
            if not entry["reused"] and entry["reason"] == "measured" and entry["value"] is not None
        ]
        never = not any(entry["reused"] for entry in log)
        half = statistics.median(above) if above else None
        for entry in log:
            key = (entry["transformer"], entry["step_index"], entry["branch"])
            if entry["reused"]:
                skipped[key] = name
            else:
                computed[key] = _cause(name, entry["reason"], methods.get(name, {}), half, never)
    return computed, skipped


def _cause(name: str, reason: str, options: Mapping[str, Any], half: float | None, never: bool) -> Cause:
    def option(key: str) -> str:
        return f"{name}.{key} = {options[key]}" if key in options else f"{name}.{key}"

    if reason == "measured" and options.get("error") is not None:
        raised = f"raise {option('error')}"
        raised += f"; {half:.3g} would skip half of them, at a loss of quality" if half is not None else ""
        return f"steps whose forecast {name} expected to be off by more than its error", raised
    if reason == "measured":
        raised = f"raise {option('threshold')}"
        raised += f"; {half:.3g} would skip half of them, at a loss of quality" if half is not None else ""
        if never:
            return f"{name} never skipped: every step that it measured changed more than its threshold", raised
        return f"steps that changed more than {name}'s threshold", raised
    table: dict[str, Cause] = {
        "first steps": ("first steps, always computed", f"lower {option('warmup_steps')}"),
        "last steps": ("last steps, always computed", f"lower {option('last_steps')}"),
        "few steps": ("a run of few steps, which is computed whole", f"lower {option('min_steps')}"),
        "conditional": ("conditional forwards, always computed", f"set {name}.branches to all"),
        "listed": (
            "steps that are listed to be computed",
            f"list fewer in {option('steps' if 'steps' in options else 'compute_at')}",
        ),
        "threshold 0": (f"{name} skips nothing", f"raise {option('threshold')}"),
        "not a number": (f"steps in which {name} measured no number", "look for nan in the model's outputs"),
        "its own rule": (f"steps that diffusers' {options.get('config')} computed", "loosen its options"),
        "refreshed": (f"steps in which {name} computed every block", f"lower {option('warmup_steps')}"),
    }
    if reason in table:
        return table[reason]
    if re.fullmatch(r"\d+ skipped in a row", reason):
        return f"steps that {name} computes after so many that it skipped", f"raise {option('max_consecutive')}"
    if match := re.fullmatch(r"(\w+) needs it", reason):
        return f"steps that {match[1]} needs computed", f"detach {match[1]}, if {name} serves you better"
    return f"forwards that {name} computed: {reason}", "no option changes this"
