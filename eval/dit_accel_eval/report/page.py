"""The page of a report: one HTML file that opens offline, its pictures inside."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.media import Frames
from dit_accel_pipelines.generation.request import EMBEDDED_FPS

from dit_accel import ConfigError

from ..runs.results import Line, read_kept, reference_of, run_of
from ..suites.comparison import ArmFigures, decimals_of, verdict
from ..suites.plots import frontier, picture
from .curves import costs, curves, density_figure, step_curves, step_map, svg_uri, threads_of
from .figures import Report, judged, misses, quantile_clips, worst_first
from .lines import ALWAYS, better_of, words_of
from .reproduce import commands_of, machines_of, name_of, suite_text, tokens_of, versions_of

LIGHTEST, DARKEST = 96, 62
"""Lightness in percent of the lowest and the highest cell of the heat map; black text stays readable on both."""

AMPLIFIED = 5
"""How many times larger differences are shown."""


def page(*reports: Report, players: int = 8) -> str:
    """Return the HTML of one report, or of several on one page.

    Args:
        players: how many clips of each are shown at most, where their frames were kept.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("dit_accel_eval.report", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    alone = len(reports) == 1
    parts = [
        _part(environment, report, players, prefix="" if alone else f"p{number}-", level=2 if alone else 3)
        for number, report in enumerate(reports, 1)
    ]
    title = parts[0]["title"] if alone else f"{len(parts)} suites: {', '.join(map(name_of, reports))}"
    return environment.get_template("page.html.jinja").render(title=title, parts=parts, fps=EMBEDDED_FPS)


def _part(environment: Any, report: Report, players: int, *, prefix: str, level: int) -> dict[str, Any]:
    """Return a report's part of the page, and what the page must know of it.

    Args:
        prefix: of the part's ids.
        level: of its headings.
    """
    from markupsafe import Markup

    shown, references, failed = players_of(report, players)
    first, scored = report.results.lines[0], any("score" in arm.means for arm in report.arms)
    about = {
        "prefix": prefix,
        "title": f"{name_of(report)}: {first['model']}, {len(report.prompts)} clips",
        "summary": _summary(report),
        "curves": curves(report),
        "step_curves": step_curves(report),
        "costs": costs(report),
        "players": shown,
        "references": references,
    }
    text = environment.get_template("part.html.jinja").render(
        **about,
        level=level,
        report=report,
        first=first,
        warnings=[*report.warnings, *failed],
        misses=misses(report),
        asked=", ".join(
            f"{metric} of at {'most' if better_of(metric) == 'less' else 'least'} {least:g}"
            for metric, least in report.minimums.items()
        ),
        groups=_groups(report),
        metrics={key: words for key, words in ALWAYS.items() if key != "score" or scored},
        further=report.further,
        words_of=words_of,
        better_of=better_of,
        digits=lambda name, sign="": f"%{sign}.{decimals_of(name)}f",
        step_map=_step_map(report),
        threads=threads_of(report),
        density=density_figure(report),
        verdict=verdict,
        reached=lambda arm: _reached(report, arm),
        plot=svg_uri(lambda: picture(report.arms, "")),
        frontiers=_frontiers(report),
        heat=_heat(report),
        amplified=AMPLIFIED,
        options=_options,
        commands=commands_of(report),
        suite=suite_text(report),
        suite_name=name_of(report),
        versions=versions_of(report.results.lines),
        machines=machines_of(report.results.lines),
        tokens=tokens_of(first),
    )
    return {**about, "text": Markup(text)}  # its values were escaped


def _summary(report: Report) -> str:
    """Return in a sentence how the arms stand against fewer steps."""
    key = next(iter(report.works))
    found = [(arm, verdict(arm.ahead[key], arm.clips)) for arm in judged(report) if key in arm.ahead]
    if not found:
        return "No arm is held against fewer steps here."
    counts = {word: sum(one == word for _, one in found) for word in ("ahead", "behind", "open")}
    best, _ = max(found, key=lambda one: one[0].ahead[key].mean)
    return (
        f"At equal {report.works[key]}, {counts['ahead']} of {len(found)} arms come nearer to the converged run than "
        f"fewer steps do, {counts['behind']} less near, {counts['open']} are open. The best of them: {best.name}, "
        f"{best.ahead[key]:+} dB."
    )


def _groups(report: Report) -> list[tuple[str, list[ArmFigures]]]:
    """Return the rows of the first table under their heads."""
    dense = [arm for arm in report.arms if report.is_dense(arm)]
    others = [arm for arm in report.arms if not report.is_dense(arm)]
    groups = [("Arms", others), ("Dense runs of fewer steps, UniPC", dense)]
    return [(head, arms) for head, arms in groups if arms]


def _reached(report: Report, arm: ArmFigures) -> str:
    if arm not in judged(report):
        return "not judged"
    low = [metric for metric in report.minimums if not report.reaches(arm, metric)]
    return f"misses {', '.join(low)}" if low else "reached"


def _frontiers(report: Report) -> list[str]:
    """Return in words what the plot's rings and line show, by kind of work."""
    whole = max(arm.clips for arm in report.arms)
    arms = [arm for arm in report.arms if arm.clips == whole]
    found = []
    for key in ("work", "work_real"):
        message = [f"{arm.name} ({arm.means[key]:.1f} steps, {arm.psnr.mean:.1f} dB)" for arm in frontier(arms, key)]
        found.append(f"Not surpassed at as little {report.works[key]}: {', '.join(message)}.")
    return found


def _step_map(report: Report) -> dict[str, Any]:
    """Return how many steps there are at most, and the rows of (arm, cells); a cell is its work and lightness."""
    found = step_map(report)
    most = max((max(values) for values in found.values()), default=1.0) or 1.0
    rows = [
        (arm, [(value, round(LIGHTEST + (DARKEST - LIGHTEST) * value / most)) for value in values])
        for arm, values in found.items()
    ]
    return {"steps": max(map(len, found.values()), default=0), "rows": rows}


def _heat(report: Report) -> dict[str, Any]:
    """Return the heat map's clips, worst first, and its rows of (arm, cells); a cell is its PSNR and lightness."""
    clips = worst_first(report)
    values = {(line["arm"], line["clip"]): line["psnr"] for line in report.results.lines}
    low, high = min(values.values()), max(values.values())

    def lightness(value: float) -> int:
        return round(float(np.interp(value, [low, high], [LIGHTEST, DARKEST])) if high > low else LIGHTEST)

    rows = []
    for _, arms in _groups(report):
        for arm in arms:
            cells = [values.get((arm.name, clip)) for clip in clips]
            rows.append((arm.name, [None if cell is None else (cell, lightness(cell)) for cell in cells]))
    return {"clips": clips, "rows": rows, "low": low, "high": high}


def _options(line: dict[str, Any]) -> list[tuple[str, str]]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """One clip of an arm beside its reference.

    Attributes:
        rank: ``worst`` or ``median`` among the arm's clips.
        own: the arm's strip, as a data URI.
        difference: the strip of amplified differences.
    """

    line: Line
    rank: str
    frames: int
    width: int
    height: int
    own: str
    difference: str


def players_of(report: Report, most: int) -> tuple[list[Player], dict[int, str], list[str]]:
    """Return the players, lowest PSNR first; clip -> its reference's strip; and why runs could not be shown.

    Every arm's worst clip comes before any arm's median one, so that few players still show every arm.
    """
    players, references, failed = [], {}, []
    for rank, line in _chosen(report):
        if len(players) >= most:
            break
        folder = report.results.path.parent
        try:
            own = read_kept(folder / line["kept"], run_of(line))
            reference = read_kept(folder / line["kept_reference"], reference_of(line))
            if own.shape != reference.shape:
                raise ConfigError(f"{line['kept']} is of shape {own.shape}, its reference of {reference.shape}")
        except ConfigError as error:
            failed.append(f"Clip {line['clip']} of {line['arm']} is not shown: {error}.")
            continue
        references.setdefault(line["clip"], data_uri(reference))
        players.append(
            Player(
                line=line, rank=rank, frames=len(own), width=own.shape[2], height=own.shape[1],
                own=data_uri(own), difference=data_uri(difference(own, reference)),
            )
        )  # fmt: skip
    return sorted(players, key=lambda player: player.line["psnr"]), references, failed


def _chosen(report: Report) -> Iterator[tuple[str, Line]]:
    kept: dict[str, Sequence[Line]] = {}
    for arm in judged(report):
        lines = [line for line in report.lines_of(arm) if "kept" in line]
        if lines:
            kept[arm.name] = lines
    worst = [quantile_clips(lines)[0] for lines in kept.values()]
    median = [quantile_clips(lines)[1] for lines in kept.values() if len(lines) > 1]
    for rank, lines in (("worst", worst), ("median", median)):
        yield from ((rank, line) for line in sorted(lines, key=lambda line: line["psnr"]))


def difference(clip: Frames, reference: Frames) -> Frames:
    """Return the amplified absolute difference of two clips, uint8."""
    strong = AMPLIFIED * np.abs(clip.astype(np.int16) - reference.astype(np.int16))
    return np.minimum(strong, 255).astype(np.uint8)


def data_uri(frames: Frames) -> str:
    """Return frames, one below the other, as a PNG in a data URI."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frames.reshape(-1, *frames.shape[2:])).save(out, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
