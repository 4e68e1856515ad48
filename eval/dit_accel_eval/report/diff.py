"""Two reports side by side: what changed of each arm's quality, time and verdict between two files of results."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..runs.results import markdown_table
from ..statistics import judge
from ..suites.figures import ArmFigures
from .lines import ONE
from .report import SuiteReport

WORDS = {"ahead": "better", "behind": "worse"}  # verdict of a change -> what it is called here


def diff_of(before: SuiteReport, after: SuiteReport) -> list[dict[str, Any]]:
    """Return an entry an arm that either report judges, those of the first in its order, then the new ones.

    ``before`` and ``after`` hold its PSNR in dB, the dense steps that it costs by time, else own work, and its verdict
    against fewer steps; ``clips`` counts those that both have with the same prompt, ``psnr_change`` is over these.
    """
    reports = (before, after)
    sides = [{arm.name: arm for arm in report.judged} for report in reports]
    first, second = ({line.key: line.psnr for line in report.results.lines} for report in reports)
    same = [clip for clip, prompt in before.prompts.items() if after.prompts.get(clip) == prompt]
    both = first.keys() & second.keys()
    changes = {
        name: [second[name, clip] - first[name, clip] for clip in same if (name, clip) in both]
        for name in dict.fromkeys([*sides[0], *sides[1]])
    }
    judged, entries = judge(changes), []
    for name, gaps in changes.items():
        words = "same" if not any(gaps) else WORDS.get(judged[name].verdict, judged[name].verdict)
        entries.append({
            "name": name, "before": _side(before, sides[0].get(name)), "after": _side(after, sides[1].get(name)),
            "clips": len(gaps), "psnr_change": asdict(judged[name]) if gaps else None, "change": words if gaps else "",
        })  # fmt: skip
    return entries


def _side(report: SuiteReport, arm: ArmFigures | None) -> dict[str, Any] | None:
    if arm is None:
        return None
    key = report.main if report.main in arm.means else next((key for key in report.works if key in arm.means), "")
    verdict = arm.ahead[key].verdict if key in arm.ahead else ""
    cost = {"steps": arm.means.get(key), "by": report.works.get(key, "")}
    return {"psnr": arm.psnr.mean, **cost, "verdict": verdict}


def others_of(before: SuiteReport, after: SuiteReport) -> list[str]:
    """Return what the two files do not share, so that a difference may come from it: the model, the call, versions."""
    first, second = before.results.lines[0].raw, after.results.lines[0].raw
    keys = (*ONE, "torch", "diffusers", "dit_accel", "device", "threads", "protocol")
    texts = [f"{key} {first.get(key)!r}, then {second.get(key)!r}" for key in keys if first.get(key) != second.get(key)]
    if before.prompts != after.prompts:
        texts.append(f"{len(before.prompts)} prompts, then {len(after.prompts)}")
    return texts


def diff_markdown(entries: Sequence[dict[str, Any]]) -> str:
    """Return the entries as a Markdown table, before and after in one cell."""
    rows = []
    for entry in entries:
        sides, change, words = [entry["before"], entry["after"]], entry["psnr_change"], entry["change"]
        if change and words != "same":
            ends = "" if change["low"] is None else f"[{change['low']:+.2f}, {change['high']:+.2f}] "
            words = f"{change['mean']:+.2f} {ends}{words}"
        kinds = dict.fromkeys(side["by"] for side in sides if side)
        cells = [
            " → ".join(dict.fromkeys(form.format(side[key]) if side and side[key] else "–" for side in sides))
            for key, form in (("psnr", "{:.2f}"), ("steps", "{:.2f}"), ("verdict", "{}"))
        ]
        rows.append((entry["name"], cells[0], words, f"{cells[1]} ({', then '.join(kinds)})", cells[2]))
    return markdown_table("arm | PSNR, dB | change, dB | dense steps' cost | verdict against fewer steps", rows)
