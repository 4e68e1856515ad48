"""Reads result lines for a report, and refuses what no report could be true of."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from ..metrics.registered import described, metrics
from ..runs.results import Line, latest

ALWAYS = {"psnr": "PSNR to converged, dB", "ssim": "SSIM", "score": "score"}
"""Metric that every line has -> in words; of each, more is better. Clips of one's own prompts have no score."""

NUMBERS = ("psnr", "ssim", "work", "work_real", "attended", "reference_agreement", "reference_steps")
TEXTS = ("arm", "prompt", "model", "weights", "solver")
ONE = ("model", "weights", "dtype", "call", "reference")
"""What all lines of one report must share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a file of result lines holds.

    Attributes:
        lines: the last line of each clip and arm.
        cut: whether the file ended in a line that was cut off.
    """

    path: Path
    lines: tuple[Line, ...]
    cut: bool


def read_results(path: Path) -> Results:
    """Read the results of `eval run`.

    Raises:
        ConfigError: for a file that is missing or empty, a line that is broken or of another kind, or lines of two
            models, weights, calls or references.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"results {path} can't be read ({reason}); name the file that eval run wrote") from None
    whole, _, rest = text.rpartition("\n")
    lines = [_line(f"{path}, line {number}", one) for number, one in enumerate(whole.splitlines(), 1) if one.strip()]
    if not lines:
        raise ConfigError(f"{path} holds no results; fill it with dit-accel eval run SUITE.toml --out {path}")
    _check_one(path, lines)
    return Results(path=path, lines=tuple(latest(lines).values()), cut=bool(rest.strip()))


def _line(where: str, text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}); delete that line, and run the suite again") from None
    if not isinstance(line, dict):
        raise ConfigError(f"{where} is no result but {text[:40]!r}; delete that line")
    needed = ("clip", "num_inference_steps", "call", "methods", "reference", "flow_shift", *NUMBERS, *TEXTS)
    missing = [key for key in needed if key not in line]
    if missing:
        raise ConfigError(
            f"{where} lacks {', '.join(missing)}; a report takes results that are held against converged runs, and "
            "dit-accel eval run SUITE.toml --table prints those of a suite with a judge"
        )
    scored = ["score"] if "score" in line else []
    metrics = {"metrics": line.get("metrics", {})}
    _check(where, line, (*NUMBERS, "clip", "num_inference_steps", *scored), _is_finite, "finite number")
    _check(where, line, TEXTS, lambda value: isinstance(value, str), "text")
    _check(where, metrics, metrics, lambda value: isinstance(value, dict), "table")
    _check(where, metrics["metrics"], metrics["metrics"], _is_finite, "finite number")
    _check_steps(where, line)
    _check(where, line, ("call", "methods"), lambda value: isinstance(value, dict), "table")
    return line


def _check(where: str, line: Line, keys: Iterable[str], right: Callable[[Any], bool], kind: str) -> None:
    """Refuse a value that is not of a kind."""
    for key in keys:
        if not right(line[key]):
            raise ConfigError(f"{where} has {key} {line[key]!r}, which is no {kind}; delete it and run again")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_steps(where: str, line: Line) -> None:
    """Refuse times and work by step that are no numbers; lines of earlier releases have none."""
    times = line.get("times", {"text": 0, "denoise": 0, "decode": 0, "threads": 1, "steps": [0]})
    try:
        values = [*(times[key] for key in ("text", "denoise", "decode", "threads")), *times["steps"]]
        values += [*line.get("step_work", ()), *line.get("peak_memory_bytes", {}).values()]
        values += [one for step in line.get("density", ()) for one in step if one is not None]
        right = bool(times["steps"]) and all(math.isfinite(value) for value in values)
    except (KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise ConfigError(
            f"{where} has times, work by step, density or memory that are no numbers; delete it and run again"
        )


def further_metrics(lines: Sequence[Line]) -> list[str]:
    """Return the metrics that lines have besides `ALWAYS`, as they first appear."""
    return list(dict.fromkeys(name for line in lines for name in line.get("metrics", ())))


def words_of(metric: str) -> str:
    """Return a metric in words; its name alone where it is not installed."""
    if metric in ALWAYS:
        return ALWAYS[metric]
    found = described(metric)
    return found.words if found else metric


def better_of(metric: str) -> str:
    """Return which way a metric is better: ``more``, ``less`` or ``neither``."""
    if metric in ALWAYS:
        return "more"
    found = described(metric)
    return found.better if found else "neither"


def _check_one(path: Path, lines: Sequence[Line]) -> None:
    for key in ONE:
        counts = Counter(json.dumps(line.get(key), sort_keys=True) for line in lines)
        if len(counts) > 1:
            mixed = " and ".join(f"{value} ({count} lines)" for value, count in counts.most_common(3))
            raise ConfigError(f"{path} mixes results of several {key}: {mixed}; report each from a file of its own")
    settings: dict[str, str] = {}
    for line in latest(lines).values():
        keys = ("num_inference_steps", "solver", "flow_shift", "methods", "scheduler", "guider", "arm_call")
        setting = json.dumps([line.get(key) for key in keys], sort_keys=True)
        if settings.setdefault(line["arm"], setting) != setting:
            raise ConfigError(f"{path} has arm {line['arm']!r} with two settings; rename one, or delete its lines")


def read_minimums(texts: Sequence[str]) -> Mapping[str, float]:
    """Read what is asked of every arm, each as ``metric=value``.

    Raises:
        ConfigError: for another form, an unknown metric, with the nearest, one that is neither better nor worse by
            itself, or a value that is no finite number.
    """
    known, found = {*ALWAYS, *metrics()}, {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals:
            raise ConfigError(f"--min {text!r} is not METRIC=VALUE; write, say, --min psnr=28")
        if name not in known and described(name) is None:
            hint = did_you_mean(name, known).replace("dit-accel models", "dit-accel eval metrics")
            raise ConfigError(f"--min {text!r} names no metric; {hint}")
        if better_of(name) == "neither":
            raise ConfigError(f"--min {text!r}: of {name} neither more nor less is better by itself; leave it out")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise ConfigError(f"--min {text!r} has no number behind the sign; write, say, --min {name}=28")
    return found
