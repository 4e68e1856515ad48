"""Writes a report: the page with its clips, and JSON by a versioned schema, each whole or not at all; and Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.progress import Stages

from dit_accel import ConfigError
from dit_accel.files import check_writable, write_json, write_text

from ..suites.figures import ArmFigures, arms_markdown, pairs_markdown, rule_words
from .lines import SCHEMA, SCHEMA_VERSION, SETTING, better_of
from .media import Media, kept_lines, shown
from .page import package_versions, page
from .report import SuiteReport


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
    write_text(path, page(*reports, shown=entries, folder=media.folder.name if media else ""))
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
            name: {**asdict(figures), "better": better_of(name),
                   "against_fewer_steps": asdict(arm.differences[name]) if name in arm.differences else None}
            for name, figures in arm.metrics.items()
        },
    }  # fmt: skip


def markdown_text(report: SuiteReport) -> str:
    """Return the table of all arms, and below it that of declared pairs and what to know."""
    first = report.results.lines[0]
    parts = [f"{first.model}, {len(report.prompts)} clips, 95 % intervals. {rule_words(report.arms)}"]
    parts += [arms_markdown(report.arms), *([pairs_markdown(report.pairs)] if report.pairs else [])]
    parts += ["\n- ".join(["Warnings:\n", *report.warnings])] if report.warnings else []
    return "\n\n".join(parts)
