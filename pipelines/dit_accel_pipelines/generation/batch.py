"""What a command makes: one request for each output, of prompts, seeds and settings, with a name of its own."""

import csv
import dataclasses
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError
from dit_accel.methods.config import MethodConfig

from .named import read_named
from .options import fields_of
from .request import Request, prompt_text, read_prompts

MOST = 10_000
"""Outputs of one command at most, so that a slip in a grid is noticed before the disk is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One output of a command."""

    request: Request
    row: str  # which prompt and setting it shows, for a contact sheet
    column: str  # which seed, or which value of the last grid where all have one seed


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a prompt file."""

    where: str  # what errors call it
    values: Mapping[str, Any]  # options by their flags' names


def planned(options: Any, methods: Sequence[MethodConfig]) -> list[Planned]:
    """Return the outputs that options of ``generate`` and their methods ask for: prompts x settings x seeds.

    A line's own options win over the command's, and a grid's over both. Without --seeds each prompt has the next seed.

    Raises:
        ConfigError: for a line, a grid or a seed that can't be read, or two outputs of one name.
    """
    lines, settings, seeds = _lines(options), _settings(options.grid), read_seeds(options.seeds)
    if seeds and options.seed:
        raise ConfigError(f"generate takes --seed or --seeds, got {options.seed} and {options.seeds!r}; give one")
    each = len(settings) * max(1, len(seeds))
    if len(lines) * each > MOST:
        raise ConfigError(f"{len(lines) * each:,} outputs were requested, and {MOST:,} is the most; ask for fewer")
    names = numbered(options.output, len(lines) * each)
    made = []
    for place, line in enumerate(lines):
        named = read_named(type(options), line.values, line.where, known=_known(options))
        own = numbered(Path(named.options["output"]), each) if "output" in named.options else []
        first = options.seed + (0 if options.same_seed else place)
        for number, (setting, seed) in enumerate(itertools.product(settings, seeds or [None])):
            chosen = read_named(type(options), setting, "--grid", known=_known(options) - {"prompt", "output"})
            values = {**fields_of(Request, options), "seed": first, **named.options, **chosen.options}
            values |= {"seed": values["seed"] if seed is None else seed}
            values["output"] = own[number] if own else names[place * each + number]
            try:
                request = Request(**values, methods=chosen.attached_to(named.attached_to(methods)))
            except ConfigError as error:
                raise ConfigError(f"{line.where}: {error}" if line.where else str(error)) from None
            made.append(Planned(request=request, **_labels(request, setting, seed, several=len(lines) > 1)))
    for output, count in Counter(one.request.output for one in made).items():
        if count > 1:
            raise ConfigError(f"two outputs are named {output}; give each a name of its own")
    return made


def numbered(output: Path, count: int) -> list[Path]:
    """Return a path for each of so many outputs: the output itself, or with a number before its suffix."""
    if count == 1:
        return [output]
    digits = max(2, len(str(count)))
    return [output.with_name(f"{output.stem}-{n:0{digits}d}{output.suffix}") for n in range(1, count + 1)]


def _known(options: Any) -> set[str]:
    """Return the fields of options that a request has too, so that each output may have its own."""
    return {field.name for field in dataclasses.fields(Request)} & {field.name for field in dataclasses.fields(options)}


def _labels(request: Request, setting: Mapping[str, str], seed: int | None, *, several: bool) -> dict[str, str]:
    parts = [f"{name} {value}" for name, value in setting.items()]
    column = f"seed {request.seed}" if seed is not None or not parts else parts.pop()
    return {"row": ", ".join([*([request.prompt] if several else []), *parts]), "column": column}


def _lines(options: Any) -> list[Line]:
    """Return what to show, from the command line or a file; `ConfigError` unless there is one of both."""
    if options.prompt is not None and options.prompt_file is None:
        return [Line("", {"prompt": options.prompt})]
    if options.prompt is not None or options.prompt_file is None:
        got = "neither" if options.prompt is None else "both"
        raise ConfigError(f"generate takes a prompt in quotes or --prompt-file, got {got}; give one of them")
    path: Path = options.prompt_file
    if path.suffix.lower() not in (".csv", ".jsonl"):
        return [Line("", {"prompt": prompt}) for prompt in read_prompts(path)]
    text = prompt_text(path, "--prompt-file")
    if path.suffix.lower() == ".csv":
        lines = list(_csv_lines(text, path))
    else:
        remedy = 'write, say, {"prompt": "a red circle"}'
        lines = [Line(*line) for line in json_lines(text, f"--prompt-file {path}", remedy)]
    if not lines:
        raise ConfigError(f"--prompt-file {path} has no prompt in it; write one per line")
    for line in lines:
        if not str(line.values.get("prompt") or "").strip():
            raise ConfigError(f"{line.where} has no prompt; add one, as prompt")
    return lines


def _csv_lines(text: str, path: Path) -> Iterator[Line]:
    """Yield the rows of a CSV file, whose first names the options; an empty cell leaves its option out."""
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            where = f"--prompt-file {path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ConfigError(
                    f"{where} has not the {len(reader.fieldnames or ())} cells that the head names; put a text with "
                    "commas in double quotes"
                )
            yield Line(where, {name: cell for name, cell in row.items() if cell.strip()})
    except csv.Error as error:
        raise ConfigError(
            f"--prompt-file {path}, line {reader.reader.line_num} is no CSV ({error}); correct it"
        ) from None


def json_lines(text: str, file: str, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON Lines file, each behind what errors call its line; empty lines are left out."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is no JSON ({error}); {remedy}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{where} is {line.strip()[:40]!r}, no object; {remedy}")
        yield where, values


def read_seeds(text: str | None) -> list[int]:
    """Read seeds and ranges of them, such as ``0-3`` or ``0,5,9``; none without a text."""
    seeds: list[int] = []
    for part in text.split(",") if text else ():
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < first + MOST:
            raise ConfigError(f"--seeds takes whole numbers and ranges, such as 0-3 or 0,5,9, got {text!r}; correct it")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def _settings(grid: Sequence[str]) -> list[dict[str, str]]:
    """Return all combinations of values that grids name; one of none without a grid."""
    axes = []
    for text in grid:
        name, equals, values = text.partition("=")
        listed = [value.strip() for value in next(csv.reader([values], skipinitialspace=True), [])]
        if not (name.strip() and equals and listed and all(listed)):
            raise ConfigError(f"--grid {text!r} is not NAME=VALUE,VALUE; write, say, --grid num-inference-steps=10,20")
        if name.strip() in (axis[0][0] for axis in axes):
            raise ConfigError(f"two grids are of {name.strip()}; write its values into one")
        axes.append([(name.strip(), value) for value in listed])
    return [dict(setting) for setting in itertools.product(*axes)]
