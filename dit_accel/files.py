"""Files written whole or not at all, and JSON that every reader takes."""

import contextlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that takes its place if the block ends well, and vanishes otherwise.

    A link stays a link: the file that it points to is the one replaced.
    """
    path = Path(os.path.realpath(path))
    # the name does not grow with the path's, which may be as long as the file system allows
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".dit-accel-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, what: str = "output") -> None:
    """Refuse a path at which `written_whole` could not put a file, before anything is computed.

    Args:
        path: the file to be written; nothing is created.
        what: what the file is called in the error.

    Raises:
        ConfigError: for a folder that is missing or not writable, a name that is too long, or something in the file's
            place that must not be replaced: a folder, a device, a read-only file.
    """
    real = Path(os.path.realpath(path))
    try:
        obstacle = _obstacle(real)
    except OSError as error:
        obstacle = f"{error.strerror}; choose another folder or name"
    if obstacle:
        raise ConfigError(f"{what} {path} can't be written: {obstacle}")


def _obstacle(path: Path) -> str | None:
    if not os.path.isdir(path.parent):
        return f"{path.parent} is not a folder; create it first"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None:
        if stat.S_ISDIR(mode):
            return "it is a folder; name a file in it"
        if not stat.S_ISREG(mode):
            return "it is not a regular file; choose another name"
        if not os.access(path, os.W_OK):
            return "it is read-only; choose another name"
    with tempfile.TemporaryFile(dir=path.parent):
        return None


def json_text(data: Any) -> str:
    """Return plain values as JSON text.

    JSON has no number for nan and the infinities; they become null. What JSON has no type for becomes its string.
    """
    return json.dumps(_finite(data), indent=2, default=str, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
