"""The board: one page of all runs whose JSON files lie in a folder, sorted and filtered, with the rules on top."""

import json
import math
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from dit_accel import ConfigError

from ..metrics.registered import DYNAMICS
from ..protocol import PROTOCOL, protocol_rules
from .lines import SCHEMA, read_results
from .report import suite_report
from .writing import SPEEDS, arm_rows, templates


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherScore:
    """The mean of a metric over videos, by another tool; it is held against no reference run and no rival."""

    tool: str
    metric: str
    mean: float
    videos: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """What the page shows."""

    rows: list[dict[str, Any]]  # an arm of a run each, as plain values
    others: dict[str, list[OtherScore]]  # file -> what another tool says of its videos
    unread: dict[str, str]  # file -> why it is not shown


def read_board(folder: Path) -> Board:
    """Read all ``.json`` files in a folder and those within, but side-cars of clips."""
    board = Board(rows=[], others={}, unread={})
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; name one that holds the JSON files of runs")
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(data, dict) and data.get("schema") == SCHEMA:
                board.rows.extend(_rows(name, path))
            elif scores := other_scores(data):
                board.others[name] = scores
            elif not (isinstance(data, dict) and "prompt" in data):
                board.unread[name] = f"it is neither {SCHEMA} nor a result of FastVideo or VBench"
        except (OSError, ValueError) as error:  # a ConfigError is one
            board.unread[name] = str(error)
    if not (board.rows or board.others):
        reasons = "".join(f"; {name}: {reason}" for name, reason in board.unread.items())
        raise ConfigError(f"{folder} holds no JSON file of a run; write some with eval report --json{reasons}")
    board.rows.sort(key=lambda row: -row["lead"].mean if row["lead"] else 1e9)
    return board


def _rows(file: str, path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run, whose figures are made anew from its lines."""
    report = suite_report(read_results(path))
    first, rows = report.results.lines[0].raw, arm_rows(report, report.judged, {})
    about = {"file": file, "run": report.name, "model": first["model"], "reference": first["reference"]}
    about |= {"machine": first.get("device", "not known"), "protocol": first.get("protocol", "–")}
    for row in rows:
        by = next((key for key in SPEEDS if row["speedups"].get(key)), "")
        pairs = {pair.pair.against: pair.verdict for pair in report.pairs if pair.pair.arm == row["arm"].name}
        row |= {"speed": row["speedups"].get(by), "by": SPEEDS.get(by, ""), **about}
        row["pairs"] = "; ".join(f"{words} against {name}" for name, words in pairs.items())
    return rows


def board_page(board: Board, folder: Path, page: Path) -> str:
    """Return the HTML of a board that links to the files of its folder, from where the page lies."""
    root = urllib.parse.quote(Path(os.path.relpath(folder, page.parent)).as_posix())
    filters = {key: sorted({row[key] for row in board.rows if row[key]}) for key in ("model", "verdict", "protocol")}
    return templates().get_template("board.html.jinja").render(
        board=board, root=root, filters=filters, rules=_as_html(protocol_rules()), protocol=PROTOCOL, dynamics=DYNAMICS,
    )  # fmt: skip


def _as_html(rules: str) -> list[Markup]:
    """Return the entries of a numbered Markdown list as HTML."""
    entries = re.split(r"^\d+\. ", rules, flags=re.MULTILINE)[1:]
    bold = (re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(entry))) for entry in entries)
    return [Markup(re.sub(r"\*(.+?)\*", r"<em>\1</em>", entry)) for entry in bold]


def other_scores(data: Any) -> list[OtherScore]:
    """Return the scores in a file's JSON, [] where it is of neither tool.

    FastVideo writes a list of ``{"video": ..., "scores": {metric: {"score": ...}}}``, or such a list as ``samples``;
    VBench ``{dimension: [score, [{"video_path": ..., "video_results": ...}, ...]]}``.
    """
    samples = data.get("samples") if isinstance(data, dict) else data
    if isinstance(samples, list):
        values: dict[str, list[float]] = {}
        tables = [sample.get("scores") for sample in samples if isinstance(sample, dict)]
        for scores in (part for table in tables for part in (table if isinstance(table, list) else [table])):
            for metric, result in scores.items() if isinstance(scores, dict) else ():
                score = result.get("score") if isinstance(result, dict) else result
                if isinstance(score, int | float) and math.isfinite(score):
                    values.setdefault(metric, []).append(float(score))
        means = {metric: float(np.mean(each)) for metric, each in values.items()}
        return [OtherScore(tool="FastVideo", metric=key, mean=means[key], videos=len(values[key])) for key in means]
    dimensions = data.items() if isinstance(data, dict) else ()
    return [
        OtherScore(tool="VBench", metric=name, mean=float(value[0]), videos=len(value[1]))
        for name, value in dimensions
        if isinstance(value, list) and [type(part) for part in value] in ([float, list], [int, list])
    ]
