"""Result lines: one JSON line a clip and arm, appended whole by any process, sorted when a run ends."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.files import no_space, written_whole

from .clips import OwnClips

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """Return the JSON lines of a file, [] if there is none; a last line without an end was cut off, and is left out.

    Raises:
        ConfigError: for a line that is not JSON.
    """
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ConfigError(f"{path} has a line that is not JSON ({error}); delete that line") from None


def append_line(path: Path, line: Line) -> None:
    """Append one line, whole, so that several processes may write to one file.

    Raises:
        ConfigError: if it can't be written whole, as on a full disk; the part that was is taken off.
    """
    data = (json.dumps(line) + "\n").encode()
    with explained_disk_errors(path):
        handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o666)
        written = 0
        try:
            while written < len(data):  # but once, if the disk takes it
                written += os.write(handle, data[written:])
        except OSError:
            _take_off(path, data[:written])
            raise
        finally:
            os.close(handle)


def _take_off(path: Path, part: bytes) -> None:
    """Cut off what was written of a line, if nobody has written behind it; else it is left, and told when read."""
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.seek(size - len(part))
        if file.read() == part:
            file.truncate(size - len(part))


@contextlib.contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """Say in one line that a file can't be written.

    Raises:
        ConfigError: with the system's reason, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise no_space(path, error.strerror or error) from None


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Replace a file by these lines, atomically.

    Raises:
        ConfigError: if it can't be written, as on a full disk; the file is as it was.
    """
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def markdown_table(heads: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table of rows under heads, which stand with `` | `` between them."""
    lines = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([f"| {heads} |", "|---" * len(heads.split(" | ")) + "|", *lines])


def latest(lines: Sequence[Line]) -> dict[tuple[str, int], Line]:
    """Return (arm, clip) -> its last line."""
    return {(line["arm"], line["clip"]): line for line in lines}


def check_lines(path: Path, lines: Sequence[Line], expected: Line, arms: Mapping[str, Line]) -> None:
    """Refuse lines of another model, call, reference or arm than the suite's, by name.

    Args:
        path: the lines' file.
        lines: what it holds.
        expected: key -> what every line must say.
        arms: arm -> what it runs; lines of other arms are not looked at.

    Raises:
        ConfigError: for the first line that differs.
    """
    for line in lines:
        for name, value in expected.items():
            if line.get(name) != value:
                raise ConfigError(
                    f"{path} holds results of {name} {line.get(name)!r}, this suite has {value!r}; delete it and run "
                    "again"
                )
        for name, value in arms.get(line["arm"], {}).items():
            if line.get(name) != value:
                raise ConfigError(
                    f"{path} holds results of arm {line['arm']!r} with {name} {line.get(name)!r}, this suite has "
                    f"{value!r}; rename the arm, or delete its lines"
                )


def check_clips(path: Path, lines: Sequence[Line], own: OwnClips | None) -> None:
    """Refuse lines of another prompt or seed than their clip has in the suite.

    Args:
        path: the lines' file.
        lines: what it holds.
        own: the suite's own prompts and seeds; None: clips are held-out ones.

    Raises:
        ConfigError: for the first line that differs.
    """
    for line in lines:
        _check_clip(path, line, own)


def _check_clip(path: Path, line: Line, own: OwnClips | None) -> None:
    clip = line["clip"]
    here = (own.prompt(clip), own.seed(clip)) if own is not None and clip < len(own) else None
    if (own is None and "seed" not in line) or (line.get("prompt"), line.get("seed")) == here:
        return
    text = "a held-out prompt" if own is None else f"{here[0]!r} and seed {here[1]}" if here else "no such clip"
    raise ConfigError(
        f"{path} holds clip {clip} of prompt {line.get('prompt')!r} and seed {line.get('seed')}, this suite has "
        f"{text}; write its results to another file"
    )
