"""The page of a report: one HTML file that opens offline, with its clips in a folder beside it."""

import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from ..statistics import FEWEST, TOO_FEW, judge, p_words
from ..suites.comparison import ArmFigures, decimals_of, rule_words, seconds_cell
from .charts import costs, forest, hues, place_maps, prompt_map, threads_of
from .figures import Report, judged, leads_of, misses, quantile_clips
from .lines import ALWAYS, better_of, words_of
from .media import AMPLIFIED, Entry, fps_of
from .reproduce import commands_of, machines_of, name_of, suite_text, tokens_of, versions_of

RANKS = {"ahead": 4, "open": 3, "behind": 2, TOO_FEW: 1, "": 0}
"""Verdict -> its place when the table is sorted by it."""

NAMED = 4
"""Arms that a sentence names; the table has the others."""

Shown = tuple[Entry, Sequence[str]]
"""What `media.shown` returns of a report."""


def page(*reports: Report, shown: Sequence[Shown] = (), folder: str = "") -> str:
    """Return the HTML of one report, or of several on one page.

    Args:
        shown: the clips of each report; none: nothing is shown.
        folder: name of the folder that holds them, beside the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dit_accel_eval.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    alone = len(reports) == 1
    clips = shown or [({}, ())] * len(reports)
    parts = [
        _part(report, *one, prefix="" if alone else f"p{number}-", level=2 if alone else 3)
        for number, (report, one) in enumerate(zip(reports, clips, strict=True), 1)
    ]
    title = parts[0]["title"] if alone else f"{len(parts)} suites: {', '.join(map(name_of, reports))}"
    data = {"root": f"{urllib.parse.quote(folder)}/", "parts": [part.pop("data") for part in parts]}
    return environment.get_template("page.html.jinja").render(title=title, parts=parts, data=data)


def _part(report: Report, media: Entry, failed: Sequence[str], *, prefix: str, level: int) -> dict[str, Any]:
    """Return what the templates take of a report.

    Args:
        prefix: of the part's ids.
        level: of its headings.
    """
    first, scored = report.results.lines[0], any("score" in arm.means for arm in report.arms)
    return {
        "prefix": prefix,
        "level": level,
        "title": f"{name_of(report)}: {first['model']}, {len(report.prompts)} clips",
        "summary": summary(report),
        "report": report,
        "first": first,
        "reference": f"the model's own {report.full_steps} steps" if report.own else "the converged run",
        "warnings": [*report.warnings, *failed],
        "misses": misses(report),
        "asked": ", ".join(
            f"{metric} of at {'most' if better_of(metric) == 'less' else 'least'} {least:g}"
            for metric, least in report.minimums.items()
        ),
        "rows": _rows(report),
        "forest": forest(report),
        "hues": hues(report),
        "groups": _groups(report),
        "hidden": len(report.arms) - sum(len(arms) for _, arms in _groups(report)),
        "metrics": {key: words for key, words in ALWAYS.items() if key != "score" or scored},
        "columns": _columns(report),
        "words_of": words_of,
        "better_of": better_of,
        "digits": lambda name, sign="": f"%{sign}.{decimals_of(name)}f",
        "prompt_map": prompt_map(report, [arm for _, arms in _groups(report) for arm in arms]),
        "maps": place_maps(report),
        "costs": costs(report),
        "threads": threads_of(report),
        "p_words": p_words,
        "seconds_cell": seconds_cell,
        "rule": rule_words(report.arms),
        "reached": lambda arm: _reached(report, arm),
        "shows": bool(media.get("runs")),
        "options": _options,
        "commands": commands_of(report),
        "suite": suite_text(report),
        "suite_name": name_of(report),
        "versions": versions_of(report.results.lines),
        "machines": machines_of(report.results.lines),
        "tokens": tokens_of(first),
        "data": _data(report, media, prefix),
    }


def summary(report: Report) -> str:
    """Return in a sentence or two how the arms stand against fewer steps, and whether a judge can tell them apart."""
    found = {arm.name: arm.ahead[report.main] for arm in judged(report) if report.main in arm.ahead}
    if not found:
        return "No arm is held against fewer steps here."
    if all(one.verdict == TOO_FEW for one in found.values()):
        clips = max(one.count for one in found.values())
        return f"Too few clips for a verdict: there are {clips}, it takes {FEWEST}."
    names = {word: [name for name, one in found.items() if one.verdict == word] for word in ("ahead", "behind")}
    parts = [f"{word.capitalize()}: {', '.join(arms)}." for word, arms in names.items() if 0 < len(arms) <= NAMED]
    counts = f"{len(names['ahead'])} of {len(found)} arms are ahead, {len(names['behind'])} behind"
    parts.insert(0, f"Against fewer steps at equal {report.works[report.main]}, {counts}; of the others these clips do "
                   "not tell.")  # fmt: skip
    scores = judge({arm.name: [*leads_of(report, arm, "score").values()] for arm in judged(report)})
    if scores and {one.verdict for one in scores.values()} == {"open"}:
        parts.insert(0, "The judge's score can't tell any of these arms from fewer steps.")
    return " ".join(parts)


def _rows(report: Report) -> list[dict[str, Any]]:
    """Return the rows of the first table, the arm that is furthest ahead first."""
    rows = []
    for arm in judged(report):
        lead = arm.ahead.get(report.main)
        stand = lead.verdict if lead else ""
        rows.append({
            "arm": arm, "lead": lead, "stands": stand, "rank": RANKS[stand], "speedup": report.speedup(arm),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -(row["lead"].mean if row["lead"] else -1e9))


def _columns(report: Report) -> list[str]:
    """Return the further metrics of the first table: those that compare frames as people do."""
    return [name for name in report.further if name.startswith("lpips")][:1]


def _data(report: Report, media: Entry, prefix: str) -> dict[str, Any]:
    """Return what the page's script knows of a report, as plain values."""
    colours, arms = hues(report), []
    for arm in judged(report):
        lines = report.lines_of(arm)
        worst, median = quantile_clips(lines)
        clips = {
            clip: {key: one["file"] if isinstance(one, dict) else one for key, one in entry.items()}
            for clip, entry in media.get("runs", {}).get(arm.name, {}).items()
        }
        arms.append({
            "name": arm.name, "hue": colours.get(arm.name), "worst": worst["clip"], "median": median["clip"],
            "even": len(lines) % 2 == 0, "cells": _cells(report, arm), "clips": clips,
        })  # fmt: skip
    rivals = {
        name: {clip: entry["file"] for clip, entry in clips.items()} for name, clips in media.get("rivals", {}).items()
    }
    return {
        "prefix": prefix, "prompts": report.prompts, "arms": arms, "references": media.get("references", {}),
        "rivals": rivals, "fps": fps_of(report), "amplified": AMPLIFIED,
        "reference": f"own {report.full_steps} steps" if report.own else "converged",
    }  # fmt: skip


def _cells(report: Report, arm: ArmFigures) -> dict[int, dict[str, str]]:
    """Return clip -> the cells of an arm's row of the first table that a clip has of its own, by their columns."""
    leads, found = leads_of(report, arm), {}
    for line in report.lines_of(arm):
        cells = {"psnr": f"{line['psnr']:.2f}"}
        cells |= {"lead": f"{leads[line['clip']]:+.2f}"} if line["clip"] in leads else {}
        cells |= {"speedup": f"{report.full_steps / line[report.main]:.2f}×"} if line.get(report.main) else {}
        cells |= {"score": f"{line['score']:.0%}".replace("%", " %")} if "score" in line else {}
        for name in _columns(report):
            value = line.get("metrics", {}).get(name)
            cells |= {name: f"{value:.{decimals_of(name)}f}"} if value is not None else {}
        found[line["clip"]] = cells
    return found


def _groups(report: Report) -> list[tuple[str, list[ArmFigures]]]:
    """Return the rows of the table of all figures under their heads; dense runs are those that most clips have."""
    most = max((arm.clips for arm in report.arms if report.is_dense(arm)), default=0)
    dense = [arm for arm in report.arms if report.is_dense(arm) and arm.clips == most]
    others = [arm for arm in report.arms if not report.is_dense(arm)]
    groups = [("Arms", others), ("Dense runs of fewer steps", dense)]
    return [(head, arms) for head, arms in groups if arms]


def _reached(report: Report, arm: ArmFigures) -> str:
    if arm not in judged(report):
        return "not judged"
    low = [metric for metric in report.minimums if not report.reaches(arm, metric)]
    return f"misses {', '.join(low)}" if low else "reached"


def _options(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (method, its options in words) of what a line ran."""
    found = []
    further = {f"scheduler {line['solver']}": line["scheduler"]} if "scheduler" in line else {}
    further |= {"call": line["arm_call"]} if "arm_call" in line else {}
    for method, options in {**line["methods"], **further, **line.get("guider", {})}.items():
        message = [f"{key} = {_short(value)}" for key, value in options.items() if value is not None]
        found.append((method, ", ".join(message)))
    return found


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(_short, value[:3]))}, ... {len(value)} values]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
