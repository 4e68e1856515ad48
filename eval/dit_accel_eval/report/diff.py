"""Two reports side by side: what changed of each arm's quality, time and verdict between two files of results."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..runs.results import markdown_table
from ..statistics import bootstrap
from ..suites.comparison import FEWEST, ArmFigures, verdict
from .figures import Report, judged, stands
from .lines import ONE


def diff_of(before: Report, after: Report) -> list[dict[str, Any]]:
    """Return an entry an arm that either report judges, those of the first in its order, then the new ones.

    Each has the arm's ``name``; ``before`` and ``after`` its PSNR in dB, the dense steps that it costs by time, or by
    own work where it was not timed, and its verdict against fewer steps, None where that report lacks the arm; and of
    the clips that both have, with the same prompt, their number, the mean difference of PSNR with its interval, and
    ``change``: whether the arm is ``better`` or ``worse`` than before, the ``same``, ``open`` or of ``too few`` clips.
    """
    sides = [{arm.name: arm for arm in judged(report)} for report in (before, after)]
    same = {clip for clip, prompt in before.prompts.items() if after.prompts.get(clip) == prompt}
    found = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        entry: dict[str, Any] = {"name": name, "clips": 0}
        for key, report, side in zip(("before", "after"), (before, after), sides, strict=True):
            entry[key] = _side(report, side[name]) if name in side else None
        if name in sides[0] and name in sides[1]:
            own, other = (
                {line["clip"]: line["psnr"] for line in report.lines_of(side[name])}
                for report, side in zip((before, after), sides, strict=True)
            )
            changes = [other[clip] - own[clip] for clip in sorted(same & {*own} & {*other})]
            if changes:
                entry |= {
                    "clips": len(changes), "psnr_change": asdict(bootstrap(changes)), "change": _change(changes),
                }  # fmt: skip
        found.append(entry)
    return found


def _change(changes: Sequence[float]) -> str:
    if not any(changes):
        return "same"
    if len(changes) < FEWEST:
        return "too few"
    return {"ahead": "better", "behind": "worse"}.get(verdict(bootstrap(changes), len(changes)), "open")


def _side(report: Report, arm: ArmFigures) -> dict[str, Any]:
    key = "steps_in_time" if "steps_in_time" in arm.means else "work"
    return {
        "psnr": arm.psnr.mean, "steps": arm.means[key], "by": report.works[key], "verdict": stands(report, arm, key),
    }  # fmt: skip


def others_of(before: Report, after: Report) -> list[str]:
    """Return what the two files do not share, so that a difference may come from it: the model, the call, versions."""
    first, second = before.results.lines[0], after.results.lines[0]
    keys = (*ONE, "torch", "diffusers", "dit_accel", "device", "threads")
    found = [f"{key} {first.get(key)!r}, then {second.get(key)!r}" for key in keys if first.get(key) != second.get(key)]
    if before.prompts != after.prompts:
        found.append(f"{len(before.prompts)} prompts, then {len(after.prompts)}")
    return found


def diff_markdown(entries: Sequence[dict[str, Any]]) -> str:
    """Return the entries as a Markdown table, before and after in one cell."""
    rows = []
    for entry in entries:
        sides = [entry["before"], entry["after"]]
        stand, change = entry.get("change", ""), entry.get("psnr_change")
        told = stand
        if change and stand != "same":
            ends = "" if stand == "too few" else f"[{change['low']:+.2f}, {change['high']:+.2f}] "
            told = f"{change['mean']:+.2f} {ends}{stand}"
        kinds = dict.fromkeys(side["by"] for side in sides if side)
        rows.append((
            entry["name"], _arrow([f"{side['psnr']:.2f}" if side else "–" for side in sides]), told,
            _arrow([f"{side['steps']:.2f}" if side else "–" for side in sides]) + f" ({', then '.join(kinds)})",
            _arrow([(side["verdict"] or "–") if side else "–" for side in sides]),
        ))  # fmt: skip
    return markdown_table("arm | PSNR, dB | change, dB | dense steps' cost | verdict against fewer steps", rows)


def _arrow(texts: Sequence[str]) -> str:
    """Return both texts, once where they are alike."""
    return texts[0] if texts[0] == texts[1] else " → ".join(texts)
