"""Writes a report: JSON by a versioned schema, CSV, Markdown and the page, each whole or not at all."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.files import check_writable, json_text, written_whole

from ..suites.comparison import ArmFigures, table_of, verdict
from .figures import Report, misses
from .lines import better_of
from .page import page
from .reproduce import versions_of

SCHEMA, SCHEMA_VERSION = "dit-accel/eval-report", 1
SETTING = ("num_inference_steps", "solver", "flow_shift", "methods")
FURTHER = ("scheduler", "guider", "arm_call")
"""What only some arms set."""


def write_reports(reports: Sequence[Report], wanted: Mapping[str, Path], *, players: int = 8) -> list[Path]:
    """Write files by kind: ``html``, ``csv``, ``json`` or ``markdown``; returns their paths.

    Several reports make one page; the other kinds hold one each.

    Raises:
        ConfigError: for a path that can't be written, as on a full disk, is given twice, or is that of the results, and
            for another kind than a page of several.
    """
    others = [kind for kind in wanted if kind != "html"]
    if others and len(reports) > 1:
        raise ConfigError(f"{others[0]} holds one file of results, got {len(reports)}; report each by itself")
    report = reports[0]
    seen = {one.results.path.resolve(): "the results that are read" for one in reports}
    for kind, path in wanted.items():
        if path.resolve() in seen:
            raise ConfigError(f"{kind} would overwrite {path}, {seen[path.resolve()]}; choose another name")
        seen[path.resolve()] = f"which is written as {kind}"
        check_writable(path, kind)
    writers: dict[str, Callable[[], str]] = {
        "html": lambda: page(*reports, players=players),
        "csv": lambda: csv_text(report),
        "json": lambda: json_text(data_of(report)) + "\n",
        "markdown": lambda: markdown_text(report) + "\n",
    }
    texts = {path: writers[kind]() for kind, path in wanted.items()}
    for path, text in texts.items():
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(texts)


def data_of(report: Report) -> dict[str, Any]:
    """Return all figures as plain values."""
    first = report.results.lines[0]
    references = {line["clip"]: line for line in report.results.lines}
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        **{key: first[key] for key in ("model", "weights", "call", "reference")},
        "versions": versions_of(report.results.lines),
        "clips": [
            {"clip": clip, "prompt": prompt, "reference_steps": references[clip]["reference_steps"],
             "reference_agreement": references[clip]["reference_agreement"]}
            for clip, prompt in report.prompts.items()
        ],
        "arms": [_arm(report, arm) for arm in report.arms],
        "minimums": dict(report.minimums),
        "misses": misses(report),
        "warnings": list(report.warnings),
    }  # fmt: skip


def _arm(report: Report, arm: ArmFigures) -> dict[str, Any]:
    setting = report.settings[arm.name]
    runs = sorted(report.lines_of(arm), key=lambda line: line["clip"])
    keys = ("clip", "psnr", "ssim", "score", "metrics", "skipped", *report.works, "seconds", "dense_seconds")
    keys += ("times", "repeated", "step_work", "peak_memory_bytes")
    return {
        "name": arm.name,
        "dense": report.is_dense(arm),
        "clips": arm.clips,
        **{key: setting[key] for key in SETTING},
        **{key: setting[key] for key in FURTHER if key in setting},
        "psnr": asdict(arm.psnr),
        "means": dict(arm.means),
        "against_fewer_steps": {
            key: {
                **asdict(found), "verdict": verdict(found, arm.clips), "p": arm.p[key],
                "p_holm": report.holm[arm.name, key],
            }
            for key, found in arm.ahead.items()
        },
        "metrics": {
            name: {
                **asdict(found), "better": better_of(name),
                "against_fewer_steps": asdict(arm.differences[name]) if name in arm.differences else None,
            }
            for name, found in arm.metrics.items()
        },
        "runs": [{key: line[key] for key in keys if key in line} for line in runs],
    }  # fmt: skip


def csv_text(report: Report) -> str:
    """Return one row an arm, its means and intervals each in a column."""
    works = report.works
    heads = ["arm", "dense", "clips", "num_inference_steps", "solver", *works]
    heads += ["psnr", "psnr_low", "psnr_high", "ssim", "score"]
    heads += [f"ahead_{key}{end}" for key in works for end in ("", "_low", "_high", "_verdict", "_p_holm")]
    heads += [f"{name}{end}" for name in report.further for end in ("", "_low", "_high")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for arm in report.arms:
        setting = report.settings[arm.name]
        cells: list[Any] = [arm.name, str(report.is_dense(arm)).lower(), arm.clips]
        cells += [setting["num_inference_steps"], setting["solver"], *(arm.means.get(key, "") for key in works)]
        cells += [*asdict(arm.psnr).values(), arm.means["ssim"], arm.means.get("score", "")]
        for key in works:
            found = arm.ahead.get(key)
            verdicts = [verdict(found, arm.clips), report.holm[arm.name, key]] if found else []
            cells += [*asdict(found).values(), *verdicts] if found else [""] * 5
        for name in report.further:
            cells += [*asdict(arm.metrics[name]).values()] if name in arm.metrics else [""] * 3
        writer.writerow(cells)
    return out.getvalue()


def markdown_text(report: Report) -> str:
    """Return the table of all arms, and below it what to know and what was missed."""
    first = report.results.lines[0]
    parts = [f"{first['model']}, {len(report.prompts)} clips, 95 % intervals.", table_of(report.arms)]
    for head, texts in (("Warnings", report.warnings), ("Missed", misses(report))):
        if texts:
            parts.append("\n".join([f"{head}:", "", *(f"- {text}" for text in texts)]))
    return "\n\n".join(parts)
