"""The board: one page of all runs whose JSON files lie in a folder, sorted and filtered, with the rules on top."""

import json
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from dit_accel import ConfigError

from ..metrics.dynamics import DYNAMICS
from ..protocol import PROTOCOL, protocol_rules
from ..suites.figures import NOTHING
from .lines import SCHEMA, read_results
from .others import OtherScore, other_scores
from .page import RANKS, SPEEDS, templates
from .report import suite_report


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """What the page shows.

    Attributes:
        rows: an arm of a run each, as plain values.
        others: file -> what another tool says of its videos.
        unread: file -> why it is not shown.
    """

    rows: list[dict[str, Any]]
    others: dict[str, list[OtherScore]]
    unread: dict[str, str]


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
    first, rows = report.results.lines[0].raw, []
    machine = first.get("device", "not known")
    for arm in report.judged:
        lead = arm.ahead.get(report.main)
        pairs = {pair.pair.against: pair.verdict for pair in report.pairs if pair.pair.arm == arm.name}
        verdict = lead.verdict if lead else NOTHING * arm.saved_nothing
        speeds = {key: report.full_steps / arm.means[key] for key in SPEEDS if key in arm.means}
        by = next(iter(speeds), "")
        rows.append({
            "file": file, "run": report.name, "model": first["model"], "arm": arm.name, "clips": arm.clips,
            "speed": speeds.get(by), "by": SPEEDS.get(by, ""), "lead": lead, "verdict": verdict, "rank": RANKS[verdict],
            "pairs": "; ".join(f"{words} against {name}" for name, words in pairs.items()), "psnr": arm.psnr,
            "dynamics": {name: arm.dynamics.get(name) for name in DYNAMICS}, "machine": machine,
            "protocol": first.get("protocol", "–"), "reference": first["reference"],
        })  # fmt: skip
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
