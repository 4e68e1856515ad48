"""Writes a report: the page that opens offline, its clips in a folder beside it; JSON by a schema; and Markdown.

Each file is whole or not there.
"""

import shlex
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel_pipelines.generation.progress import Stages

from dit_accel import ConfigError
from dit_accel.files import check_writable, write_json, write_text

from ..metrics.registered import DYNAMICS, FLOOR, decimals_of
from ..runs.results import ResultLine
from ..statistics import FEWEST, TOO_FEW, Judged, judge, p_words, reach_words
from ..suites import figures
from ..suites.figures import NOTHING, ArmFigures
from .charts import costs, forest, hues, prompt_map, step_map
from .lines import ALWAYS, SCHEMA, SCHEMA_VERSION, SETTING, better_of, metric_words
from .media import AMPLIFIED, Entry, Media, fps_of, kept_lines, shown
from .report import SuiteReport, quantile_clips

if TYPE_CHECKING:
    from jinja2 import Environment

RANKS = {"ahead": 4, "open": 3, "behind": 2, TOO_FEW: 1, "": 0, NOTHING: 0}  # of verdicts, to sort by
SPEEDS = {"steps_in_time": "time", "work": "work"}  # kinds of work by which the first table gives speed-ups -> in words
VERSIONS = ("dit_accel", "diffusers", "torch", "python")
NAMED = 4  # arms that a sentence names; the table has the others
Shown = tuple[Entry, Sequence[str]]  # what `media.shown` returns of a report


def templates() -> "Environment":
    """Return the templates of this folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("dit_accel_eval.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def page(*reports: SuiteReport, clips: Sequence[Shown] = (), folder: str = "") -> str:
    """Return the HTML of one report, or of several on one page."""
    alone = len(reports) == 1
    entries = clips or [({}, ())] * len(reports)
    parts = [
        _part(report, *entry, prefix="" if alone else f"p{number}-", level=2 if alone else 3)
        for number, (report, entry) in enumerate(zip(reports, entries, strict=True), 1)
    ]
    title = parts[0]["title"] if alone else f"{len(parts)} suites: {', '.join(report.name for report in reports)}"
    data = {"root": f"{urllib.parse.quote(folder)}/", "parts": [part.pop("data") for part in parts]}
    return templates().get_template("page.html.jinja").render(title=title, parts=parts, data=data)


def _part(report: SuiteReport, media: Entry, failed: Sequence[str], *, prefix: str, level: int) -> dict[str, Any]:
    """Return what the templates take of a report."""
    lines, groups, scores = report.results.lines, _groups(report), score_leads(report)
    scored = any("score" in arm.means for arm in report.arms)
    reference = f"the model's own {report.full_steps} steps" if report.own else "the converged run"
    return {
        "prefix": prefix, "level": level, "title": f"{report.name}: {lines[0].model}, {len(report.prompts)} clips",
        "summary": summary(report, scores), "report": report, "first": lines[0].raw,
        "reference": "the reference's clips" if report.of_folders else reference, "whole": whole_of(report),
        "warnings": [*report.warnings, *failed], "rows": arm_rows(report, report.judged, scores),
        "speeds": {key: f"speed-up by {words}" for key, words in SPEEDS.items() if key in report.works},
        "forest": forest(report), "hues": hues(report), "groups": groups,
        "hidden": len(report.arms) - sum(len(arms) for _, arms in groups),
        "metrics": {key: words for key, words in ALWAYS.items() if key != "score" or scored},
        "columns": _columns(report),
        "dynamics": {key: words for key, words in DYNAMICS.items() if any(key in arm.dynamics for arm in report.arms)},
        "words_of": metric_words, "better_of": better_of,
        "digits": lambda name, sign="": f"%{sign}.{decimals_of(name)}f",
        "prompt_map": prompt_map(report, [arm for _, arms in groups for arm in arms]),
        "step_map": step_map(report), "costs": costs(report),
        "threads": sorted({line.times["threads"] for line in lines if line.times}),
        "p_words": p_words, "seconds_cell": figures.seconds_cell, "rule": figures.rule_words(report.arms),
        "pairs_rule": figures.pairs_rule(report.pairs) if report.pairs else "", "shows": bool(media.get("runs")),
        "options": _options, "commands": _commands(report), "versions": package_versions(lines),
        "machines": "; ".join(_machines(lines)),
        "tokens": lines[0].raw.get("tokens"), "data": _data(report, media, prefix),
    }  # fmt: skip


def whole_of(report: SuiteReport) -> str:
    """Return in words what speed-ups are over."""
    return "its clips" if report.of_folders else f"{report.full_steps} dense steps"


def score_leads(report: SuiteReport) -> dict[str, Judged]:
    """Return arm -> by how many percent the judge's score is above that of fewer steps, of the arms that have one."""
    leads = {arm.name: report.leads(arm, "score").values() for arm in report.judged}
    return judge({name: [100 * lead for lead in each] for name, each in leads.items()})


def summary(report: SuiteReport, scores: Mapping[str, Judged]) -> str:
    """Return in a sentence or two whether the judge can tell the arms from fewer steps, and how they stand."""
    leads = {arm.name: arm.ahead[report.main] for arm in report.judged if report.main in arm.ahead}
    if not leads:
        return "No arm is held against fewer steps here."
    if all(lead.verdict == TOO_FEW for lead in leads.values()):
        clips = max(lead.count for lead in leads.values())
        return f"Too few clips for a verdict: there are {clips}, it takes {FEWEST}."
    names = {word: [name for name, lead in leads.items() if lead.verdict == word] for word in ("ahead", "behind")}
    parts = (
        [f"The judge's score can't tell any of these arms from fewer steps{_reach(scores)}."] if _alike(scores) else []
    )
    parts.append(f"Against fewer steps at equal {report.works[report.main]}, {len(names['ahead'])} of {len(leads)} arms"
                 f" are ahead, {len(names['behind'])} behind; of the others these clips do not tell.")  # fmt: skip
    idle = [arm.name for arm in report.judged if arm.saved_nothing]
    parts += [f"Saved nothing, and is not judged: {', '.join(idle)}."] if idle else []
    parts += [f"{word.capitalize()}: {', '.join(arms)}." for word, arms in names.items() if 0 < len(arms) <= NAMED]
    pairs = {str(pair.pair): pair.score for pair in report.pairs if pair.score}
    if _alike(pairs):
        parts.insert(0, f"The judge's score can't tell the arms of any declared pair apart{_reach(pairs)}.")
    return " ".join(parts)


def _reach(scores: Mapping[str, Judged]) -> str:
    words = reach_words(scores.values(), "points")
    return f" ({words})" if words else ""


def _alike(scores: Mapping[str, Judged]) -> bool:
    return {lead.verdict for lead in scores.values()} == {"open"}


def arm_rows(report: SuiteReport, arms: Sequence[ArmFigures], scores: Mapping[str, Judged]) -> list[dict[str, Any]]:
    """Return the rows of the first table, the arm that is furthest ahead first, rivals last."""
    rows = []
    for arm in arms:
        lead = arm.ahead.get(report.main)
        verdict = lead.verdict if lead else NOTHING * arm.saved_nothing
        rows.append({
            "arm": arm, "lead": lead, "verdict": verdict, "rank": RANKS[verdict], "score": scores.get(arm.name),
            "speedups": {key: (steps := arm.means.get(key)) and report.full_steps / steps for key in report.works},
        })  # fmt: skip
    return sorted(rows, key=lambda row: -(row["lead"].mean if row["lead"] else -1e9))


def _columns(report: SuiteReport) -> list[str]:
    """Return the further metrics of the first table: of those that compare frames as people do, and the encoding's."""
    return [name for name in report.further if name.startswith("lpips")][:1] + [FLOOR] * (FLOOR in report.further)


def _data(report: SuiteReport, media: Entry, prefix: str) -> dict[str, Any]:
    """Return what the page's script knows of a report, as plain values."""
    colours, arms = hues(report), []
    for arm in report.judged:
        lines = report.lines_of(arm)
        worst, median = quantile_clips(lines)
        arms.append({
            "name": arm.name, "hue": colours.get(arm.name), "worst": worst.clip, "median": median.clip,
            "even": len(lines) % 2 == 0, "cells": _cells(report, arm),
            "clips": media.get("runs", {}).get(arm.name, {}),
        })  # fmt: skip
    return {
        "prefix": prefix, "prompts": report.prompts, "arms": arms, "references": media.get("references", {}),
        "rivals": media.get("rivals", {}), "fps": fps_of(report), "amplified": AMPLIFIED,
        "reference": "converged" if not report.own else whole_of(report).replace("dense", "own"),
    }  # fmt: skip


def _cells(report: SuiteReport, arm: ArmFigures) -> dict[int, dict[str, str]]:
    """Return clip -> the cells of an arm's row of the first table that a clip has of its own, by their columns."""
    leads, by_clip = report.leads(arm), {}
    for line in report.lines_of(arm):
        cells = {"psnr": f"{line.psnr:.2f}"}
        cells |= {"lead": f"{leads[line.clip]:+.2f}"} if line.clip in leads else {}
        cells |= {key: f"{report.full_steps / steps:.2f}×" for key in report.works if (steps := line.value(key))}
        cells |= {"score": f"{100 * line.score:.0f} %"} if line.score is not None else {}
        metrics = {name: line.metrics[name] for name in _columns(report) if name in line.metrics}
        cells |= {name: f"{value:.{decimals_of(name)}f}" for name, value in metrics.items()}
        cells |= {name: f"{100 * (clip - other):+.1f}" for name, (clip, other) in line.dynamics.items()}
        by_clip[line.clip] = cells
    return by_clip


def _groups(report: SuiteReport) -> list[tuple[str, list[ArmFigures]]]:
    """Return the rows of the table of all figures under their heads; dense runs are those that most clips have."""
    dense = [arm for arm in report.arms if report.is_dense(arm)]
    most = max((arm.clips for arm in dense), default=0)
    groups = {"Arms": [arm for arm in report.arms if arm not in dense]}
    groups["Dense runs of fewer steps"] = [arm for arm in dense if arm.clips == most]
    return [(head, arms) for head, arms in groups.items() if arms]


def _machines(lines: Sequence[ResultLine]) -> list[str]:
    """Return the devices of lines and what is known of cards, of each value the least and the greatest."""
    devices = sorted({line.raw["device"] for line in lines if "device" in line.raw})
    states = [line.raw["card"] for line in lines if "card" in line.raw]
    values = {
        key: sorted({state[key] for state in states}, key=lambda value: (len(value), value))
        for key in (states or [{}])[0]
    }
    return devices + [f"{key} {' to '.join(dict.fromkeys((each[0], each[-1])))}" for key, each in values.items()]


def package_versions(lines: Sequence[ResultLine]) -> dict[str, str]:
    """Return package -> its versions among the lines; lines made before a version was kept tell none."""
    known = {key: sorted({str(line.raw[key]) for line in lines if key in line.raw}) for key in VERSIONS}
    return {key: ", ".join(versions) for key, versions in known.items() if versions}


def _commands(report: SuiteReport) -> list[str]:
    """Return the commands that make the results anew, and the page from those."""
    path, lines = report.results.path, report.results.lines
    if report.of_folders:
        folders = {f"--{line.raw['role']} {shlex.quote(line.arm)}=DIR": "" for line in lines}
        return [f"dit-accel eval folders --reference DIR {' '.join(folders)} -o {path.stem}.html"]
    suite, out, page = (shlex.quote(name) for name in (f"{report.name}.toml", path.name, f"{path.stem}.html"))
    timed = " --time" if any(line.seconds is not None for line in lines) else ""
    frames = " --frames frames" if any(line.kept for line in lines) else ""
    return [f"dit-accel eval run {suite} --out {out}{timed}{frames}", f"dit-accel eval report {out} -o {page}"]


def _options(line: ResultLine) -> list[tuple[str, str]]:
    """Return (method, its options in words) of what a line ran."""
    ran = dict(line.methods)
    ran |= {f"scheduler {line.solver}": line.raw["scheduler"]} if "scheduler" in line.raw else {}
    ran |= {"call": line.raw["arm_call"]} if "arm_call" in line.raw else {}
    ran |= {**line.raw.get("guider", {}), **line.rival}
    return [(method, ", ".join(f"{key} = {_short(value)}" for key, value in options.items() if value is not None))
            for method, options in ran.items()]  # fmt: skip


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(_short, value[:3]))}, ... {len(value)} values]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_reports(
    reports: Sequence[SuiteReport], wanted: Mapping[str, Path], *, clips: int | None = None
) -> list[Path]:
    """Write reports by kind, ``html``, one page of all, or ``json``, which holds one; returns their paths."""
    if "json" in wanted and len(reports) > 1:
        raise ConfigError(f"json holds one file of results, got {len(reports)}; report each by itself")
    seen = {report.results.path.resolve(): "the results that are read" for report in reports}
    for kind, path in wanted.items():
        if path.resolve() in seen:
            raise ConfigError(f"{kind} would overwrite {path}, {seen[path.resolve()]}; choose another name")
        seen[path.resolve()] = f"which is written as {kind}"
        check_writable(path, kind)
    if "html" in wanted:
        _write_page(reports, wanted["html"], clips)
    if "json" in wanted:
        write_json(wanted["json"], data_of(reports[0]))
    return list(wanted.values())


def _write_page(reports: Sequence[SuiteReport], path: Path, clips: int | None) -> None:
    most = max(len(report.prompts) for report in reports) if clips is None else clips
    total = sum(len(pairs) for report in reports for pairs in kept_lines(report, most).values())
    media, entries = Media(path) if total else None, []
    if media is not None:
        with Stages() as stages:
            stages.stage("clips", total)
            entries = [shown(report, media, most, stages.advance) for report in reports]
    write_text(path, page(*reports, clips=entries, folder=media.folder.name if media else ""))
    if media is not None:
        media.tidy()


def data_of(report: SuiteReport) -> dict[str, Any]:
    """Return all figures as plain values."""
    first = report.results.lines[0].raw
    references = {line.clip: line for line in report.results.lines}
    return {
        "schema": SCHEMA, "version": SCHEMA_VERSION, "name": report.name, "full_steps": report.full_steps,
        "protocol": sorted({str(line.raw["protocol"]) for line in report.results.lines if "protocol" in line.raw}),
        "machines": sorted({str(line.raw["device"]) for line in report.results.lines if "device" in line.raw}),
        **{key: first[key] for key in ("model", "weights", "call", "reference")},
        "versions": package_versions(report.results.lines),
        "clips": [
            {"clip": clip, "prompt": prompt, "reference_steps": references[clip].reference_steps,
             "reference_agreement": references[clip].reference_agreement}
            for clip, prompt in report.prompts.items()
        ],
        "arms": [_arm(report, arm) for arm in report.arms],
        "pairs": [{**asdict(pair), "verdict": pair.verdict} for pair in report.pairs], "warnings": [*report.warnings],
        "lines": [dict(line.raw) for line in report.results.lines],
    }  # fmt: skip


def _arm(report: SuiteReport, arm: ArmFigures) -> dict[str, Any]:
    setting = report.settings[arm.name].raw
    return {
        "name": arm.name, "dense": report.is_dense(arm), "clips": arm.clips,
        **{key: setting[key] for key in SETTING if key in setting},
        "psnr": asdict(arm.psnr), "means": dict(arm.means),
        **({"dynamics": {name: asdict(moved) for name, moved in arm.dynamics.items()}} if arm.dynamics else {}),
        "against_fewer_steps": {key: asdict(lead) for key, lead in arm.ahead.items()},
        "metrics": {
            name: {**asdict(value), "better": better_of(name),
                   "against_fewer_steps": asdict(arm.differences[name]) if name in arm.differences else None}
            for name, value in arm.metrics.items()
        },
    }  # fmt: skip


def markdown_text(report: SuiteReport) -> str:
    """Return the table of all arms, and below it that of declared pairs and what to know."""
    first = report.results.lines[0]
    parts = [f"{first.model}, {len(report.prompts)} clips, 95 % intervals. {figures.rule_words(report.arms)}"]
    parts += [figures.arms_markdown(report.arms), *([figures.pairs_markdown(report.pairs)] if report.pairs else [])]
    parts += ["\n- ".join(["Warnings:\n", *report.warnings])] if report.warnings else []
    return "\n\n".join(parts)
