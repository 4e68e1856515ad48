"""Writes a report: JSON by a versioned schema, CSV, Markdown and the page with its clips, each whole or not at all."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.progress import Stages

from dit_accel import ConfigError
from dit_accel.files import check_writable, json_text, written_whole

from ..statistics import Estimate
from ..suites.comparison import ArmFigures, rule_words, table_of
from .figures import Report, misses
from .lines import better_of
from .media import folder_of, kept_lines, media_beside, shown
from .page import page
from .reproduce import versions_of

SCHEMA, SCHEMA_VERSION = "dit-accel/eval-report", 2
SETTING = ("num_inference_steps", "solver", "flow_shift", "methods")
FURTHER = ("scheduler", "guider", "arm_call")
"""What only some arms set."""


def write_reports(reports: Sequence[Report], wanted: Mapping[str, Path], *, clips: int | None = None) -> list[Path]:
    """Write files by kind: ``html``, ``csv``, ``json`` or ``markdown``; returns their paths.

    Several reports make one page; the other kinds hold one each. Kept clips are put into a folder beside the page.

    Args:
        clips: prompts whose clips the page shows at most, the hardest first; None: all.

    Raises:
        ConfigError: for a path that can't be written, as on a full disk, is given twice, or is that of the results, for
            another kind than a page of several, and for clips that can't be encoded or put there.
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
    writers: dict[str, Callable[[Report], str]] = {
        "csv": csv_text,
        "json": lambda report: json_text(data_of(report)) + "\n",
        "markdown": lambda report: markdown_text(report) + "\n",
    }
    with _paged(reports, wanted.get("html"), clips) as (text, put):
        texts = {path: text if kind == "html" else writers[kind](report) for kind, path in wanted.items()}
        for path, text in texts.items():
            with written_whole(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
                if path == wanted.get("html"):
                    put()
    return list(texts)


@contextlib.contextmanager
def _paged(reports: Sequence[Report], path: Path | None, clips: int | None) -> Iterator[tuple[str, Callable[[], None]]]:
    """Give the page's text, and what puts its clips beside it; neither where no page is wanted."""
    if path is None:
        yield "", lambda: None
        return
    most = max(len(report.prompts) for report in reports) if clips is None else clips
    total = sum(len(pairs) for report in reports for pairs in kept_lines(report, most).values())
    if not total:
        yield page(*reports), lambda: None
        return
    with media_beside(path) as media:
        with Stages() as stages:
            stages.stage("clips", total)
            found = [shown(report, media, most, stages.advance) for report in reports]
        yield page(*reports, shown=found, folder=folder_of(path).name), media.put


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
            key: asdict(found) for key, found in arm.ahead.items()
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
    heads += ["psnr", "psnr_median", "psnr_low", "psnr_high", "ssim", "score"]
    ends = ("", "_median", "_low", "_high")
    heads += [f"ahead_{key}{end}" for key in works for end in (*ends, "_verdict", "_p_holm")]
    heads += [f"{name}{end}" for name in report.further for end in ends]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for arm in report.arms:
        setting = report.settings[arm.name]
        cells: list[Any] = [arm.name, str(report.is_dense(arm)).lower(), arm.clips]
        cells += [setting["num_inference_steps"], setting["solver"], *(arm.means.get(key, "") for key in works)]
        cells += [*_numbers(arm.psnr), arm.means["ssim"], arm.means.get("score", "")]
        for key in works:
            found = arm.ahead.get(key)
            cells += [*_numbers(found), found.verdict, found.p_holm] if found else [""] * 6
        for name in report.further:
            cells += _numbers(arm.metrics[name]) if name in arm.metrics else [""] * 4
        writer.writerow(cells)
    return out.getvalue()


def _numbers(found: Estimate) -> list[float | None]:
    """Return a mean, its median and its interval, whose ends are empty under so few clips that there is none."""
    return [found.mean, found.median, found.low, found.high]


def markdown_text(report: Report) -> str:
    """Return the table of all arms, and below it what to know and what was missed."""
    first = report.results.lines[0]
    parts = [f"{first['model']}, {len(report.prompts)} clips, 95 % intervals. {rule_words(report.arms)}"]
    parts += [table_of(report.arms)]
    for head, texts in (("Warnings", report.warnings), ("Missed", misses(report))):
        if texts:
            parts.append("\n".join([f"{head}:", "", *(f"- {text}" for text in texts)]))
    return "\n\n".join(parts)
