"""Reads result lines for a report, and refuses what no report could be true of."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.batch import json_lines

from dit_accel import ConfigError

from ..metrics.registered import metric_about
from ..runs.results import KEPT, ResultLine, last_lines
from ..runs.rivals import SERVERS

ALWAYS = {"psnr": "PSNR to the reference, dB", "ssim": "SSIM", "score": "score"}
"""Metric that every line has -> in words; of each, more is better. Clips of one's own prompts have no score."""

NUMBER, TEXT, TABLE = "finite number", "text", "table"
COSTS = ("work", "work_real", "attended")  # of what ran besides, not known of folders and servers
KINDS = {
    **dict.fromkeys(("clip", "num_inference_steps", "psnr", "ssim"), NUMBER),
    **dict.fromkeys(("reference_agreement", "reference_steps", *COSTS), NUMBER),
    **dict.fromkeys(("arm", "prompt", "model", "weights", "solver"), TEXT),
    **{"call": TABLE, "methods": TABLE, "reference": "", "flow_shift": ""},
}
"""Key that every line of a report has -> what its value must be, "" for anything."""

SCHEMA, SCHEMA_VERSION = "dit-accel/eval-report", 4  # of a file that travels; its JSON Schema lies beside this
OF_A_FILE = ("suite", "folder", *KEPT)  # keys in which lines of one run may differ between files
ONE = ("model", "weights", "dtype", "call", "reference")  # what all lines of one report must share
SETTING = ("num_inference_steps", "solver", "flow_shift", "methods", "scheduler", "guider", "arm_call")  # an arm's


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The last line of each clip and arm of a results file, and whether its end was cut off."""

    path: Path
    lines: tuple[ResultLine, ...]
    cut: bool

    @property
    def name(self) -> str:
        """The suite's name, or the file's where lines tell none."""
        return next((line.raw["suite"] for line in self.lines if "suite" in line.raw), self.path.stem)


def read_results(path: Path) -> Results:
    """Read the results of `eval run`: its JSON lines, or the JSON file that a report writes of them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"results {path} can't be read ({reason}); name the file that eval run wrote") from None
    if path.suffix == ".json":
        text = "".join(f"{json.dumps(line)}\n" for line in _travelled(path, text))
    whole, _, rest = text.rpartition("\n")
    lines = [_line(*line) for line in json_lines(whole, str(path), "delete that line, and run the suite again")]
    if not lines:
        raise ConfigError(f"{path} holds no results; fill it with dit-accel eval run SUITE.toml --out {path}")
    _check_one(path, lines)
    return Results(path=path, lines=tuple(last_lines(lines).values()), cut=bool(rest.strip()))


def _travelled(path: Path, text: str) -> list[Any]:
    """Return the lines in the JSON file of a run."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); write it anew with dit-accel eval report --json") from None
    known = isinstance(data, dict) and data.get("schema") == SCHEMA
    if not known or data.get("version") != SCHEMA_VERSION or not isinstance(data.get("lines"), list):
        found = f"version {data.get('version')} of it" if known else "another file"
        raise ConfigError(
            f"{path} is no {SCHEMA} of version {SCHEMA_VERSION} but {found}; write it anew with eval report --json"
        )
    return data["lines"]


def merged_results(files: Sequence[Results]) -> Results:
    """Return the lines of several files as those of the first; a clip that two of them tell otherwise is refused."""
    lines, prompts = dict[tuple[str, int], tuple[Path, ResultLine]](), dict[int, str]()
    for results in files:
        for line in results.lines:
            if prompts.setdefault(line.clip, line.prompt) != line.prompt:
                both = f"{prompts[line.clip]!r} and of {line.prompt!r}"
                raise ConfigError(f"clip {line.clip} is of {both} in {results.path}; merge files of the same prompts")
            before, first = lines.setdefault(line.key, (results.path, line))
            if any(first.raw.get(key) != line.raw.get(key) for key in {*first.raw, *line.raw} - {*OF_A_FILE}):
                raise ConfigError(
                    f"{before} and {results.path} tell clip {line.clip} of arm {line.arm!r} otherwise; leave one out"
                )
    every = [line for _, line in lines.values()]
    _check_one(files[-1].path, every)
    return Results(path=files[0].path, lines=tuple(every), cut=False)


def _line(where: str, line: dict[str, Any]) -> ResultLine:
    unknown = COSTS if "role" in line or not {*line.get("rival", ())}.isdisjoint(SERVERS) else ()
    needed = {key: kind for key, kind in KINDS.items() if key not in unknown}
    missing = [key for key in needed if key not in line]
    if missing:
        raise ConfigError(
            f"{where} lacks {', '.join(missing)}; a report takes results that are held against converged runs, and "
            "dit-accel eval run SUITE.toml --table prints those of a suite with a judge"
        )
    for key, kind in {**needed, "score": NUMBER, "metrics": TABLE}.items():
        if key in line:
            _check(where, key, line[key], kind)
    for key, value in line.get("metrics", {}).items():
        _check(where, key, value, NUMBER)
    return ResultLine.of(line)


def _check(where: str, key: str, value: object, kind: str) -> None:
    """Refuse a value that is not of a kind."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not {NUMBER: number, TEXT: isinstance(value, str), TABLE: isinstance(value, dict)}.get(kind, True):
        raise ConfigError(f"{where} has {key} {value!r}, which is no {kind}; delete it and run again")


def metric_words(metric: str) -> str:
    """Return a metric in words; its name alone where it is not installed."""
    about = metric_about(metric)
    return ALWAYS.get(metric) or (about.words if about else metric)


def better_of(metric: str) -> str:
    """Return which way a metric is better: ``more``, ``less`` or ``neither``."""
    about = metric_about(metric)
    return "more" if metric in ALWAYS else about.better if about else "neither"


def _check_one(path: Path, lines: Sequence[ResultLine]) -> None:
    for key in ONE:
        counts = Counter(json.dumps(line.raw.get(key), sort_keys=True) for line in lines)
        if len(counts) > 1:
            mixed = " and ".join(f"{value} ({count} lines)" for value, count in counts.most_common(3))
            raise ConfigError(f"{path} mixes results of several {key}: {mixed}; report each from a file of its own")
    settings: dict[str, str] = {}
    for line in last_lines(lines).values():
        setting = json.dumps([line.raw.get(key) for key in SETTING], sort_keys=True)
        if settings.setdefault(line.arm, setting) != setting:
            raise ConfigError(f"{path} has arm {line.arm!r} with two settings; rename one, or delete its lines")
