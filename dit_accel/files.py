"""Files written whole or not at all and by one run at a time, and JSON that every reader takes."""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import Busy, ConfigError, DitAccelError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the system that say that a disk is full, or the user's share of it, or a file as large as it may be."""

LEAST_FREE = 1 << 20
"""Bytes below which a disk is taken for full where a library says only that it could not write."""

_making = threading.Lock()
"""Held while a file is made and noted in `_temporaries`."""

_temporaries: set[Path] = set()
"""Files that this process deletes when it is done: those half written, and its locks."""


MOST_TEXT = 16 << 20
"""Bytes of the largest file that is read whole because an option names it."""


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """Return the text of a file that an option names.

    Raises:
        OSError: also for what is no regular file, which may have no end, and for more than `MOST_TEXT` bytes.
        UnicodeDecodeError: for what is no text.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)  # a pipe that nobody writes to would keep us waiting
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise OSError(errno.EFBIG, f"it has more than {MOST_TEXT >> 20} MiB", str(path))
    return content.decode(encoding).replace("\r\n", "\n")


def user_cache() -> Path:
    """Return the folder in which dit-accel keeps what it made: ``dit-accel`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-accel"


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that takes its place if the block ends well, and vanishes otherwise.

    A link stays a link: the file that it points to is the one replaced.

    Raises:
        ConfigError: if the disk is full.
    """
    path = Path(os.path.realpath(path))
    # the name does not grow with the path's, which may be as long as the file system allows
    temporary = path.with_name(f".dit-accel-{secrets.token_hex(8)}{path.suffix}")
    with _full_disk_told(path):
        try:
            with _making:
                _temporaries.add(temporary)  # before it exists: a signal may arrive between the two
                temporary.touch(exist_ok=False)
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            _temporaries.discard(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write a text, whole or not at all; raises as `written_whole`."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write plain values as JSON, whole or not at all; see `json_text`."""
    write_text(path, json_text(data) + "\n")


@contextlib.contextmanager
def written_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its place, and that of what it holds, if the block ends well.

    Raises:
        ConfigError: if the disk is full.
    """
    path = Path(os.path.realpath(path))
    temporary, before = (path.with_name(f".dit-accel-{secrets.token_hex(8)}") for _ in range(2))
    with _full_disk_told(path):
        try:
            with _making:
                _temporaries.add(temporary)
                temporary.mkdir()
            yield temporary
            with contextlib.suppress(FileNotFoundError):
                path.rename(before)
            temporary.rename(path)
        finally:
            for folder in (temporary, before):
                shutil.rmtree(folder, ignore_errors=True)
            _temporaries.discard(temporary)


def remove_temporaries() -> None:
    """Delete what is half written and locks, for a process that ends without leaving its blocks; it writes no more."""
    _making.acquire(timeout=1.0)  # never given back: another thread may be about to write
    for temporary in list(_temporaries):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def no_space(path: Path, reason: object) -> ConfigError:
    """Return the error of a file for which there was no room while a command ran."""
    return ConfigError(
        f"{path} can't be written ({reason}); free some space, or name another folder, and run the same again: what "
        "was written before it is whole"
    )


@contextlib.contextmanager
def _full_disk_told(path: Path) -> Iterator[None]:
    """Raise `ConfigError` in place of an error of a full disk on which the block writes ``path``; others pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DitAccelError) or not (no_room(error) or _no_room_left(path.parent, error)):
            raise
        raise no_space(path, getattr(error, "strerror", None) or os.strerror(errno.ENOSPC)) from error


def no_room(error: BaseException) -> bool:
    """Tell whether an error says that a disk is full: by its number, or in its words, as libraries pass it on."""
    return getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL)


def _no_room_left(folder: Path, error: Exception) -> bool:
    """Tell whether a library's own error came while the disk had no room left."""
    if isinstance(error, OSError):
        return False
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < LEAST_FREE
    return False


def make_folder(path: Path, what: str = "the folder") -> None:
    """Make a folder with those above it, which may be there; `ConfigError` where it can't be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{what} {path} can't be made ({error.strerror}); choose another") from None


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[None]:
    """Make a folder, with those above it, for the block; if the block fails, what was made and is empty goes again."""
    path = Path(path)
    folders = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # there is something in it
            for folder in folders:
                folder.rmdir()
        raise


@contextlib.contextmanager
def held(path: str | Path, what: str = "output") -> Iterator[None]:
    """Keep other runs from writing the same output, which need not exist, while the block runs.

    A file ``.NAME.lock`` lies beside the output meanwhile. The system frees it when the process ends, however it does.
    On a file system without locks nothing is held.

    Raises:
        Busy: if another run holds it, with that run's process.
    """
    path = Path(os.path.realpath(path))
    lock = path.with_name(f".{path.name[:200]}.lock")
    handle = _locked(lock, f"{what} {path}")
    if handle is None:
        yield
        return
    _temporaries.add(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        _temporaries.discard(lock)
        os.close(handle)


def _locked(lock: Path, what: str) -> int | None:
    """Return the open and locked file; None where the system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # nor could the output be written here, which has an error of its own
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            if not isinstance(error, BlockingIOError):
                return None
            by = f"process {holder}" if holder else "another process"
            raise Busy(f"{what} is being written by {by}; wait for it to end, or name another file") from None
        if _is_open(lock, handle):
            with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        os.close(handle)  # the one who held it has deleted it meanwhile


def _is_open(path: Path, handle: int) -> bool:
    """Tell whether what is open is what lies at a path now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def check_writable(path: str | Path, what: str = "output") -> None:
    """Refuse a path at which `written_whole` could not put a file, before anything is computed; nothing is created."""
    real = Path(os.path.realpath(path))
    try:
        obstacle = _obstacle(real)
    except OSError as error:
        obstacle = f"{error.strerror}; choose another folder or name"
    if obstacle:
        raise ConfigError(f"{what} {path} can't be written: {obstacle}")


def check_room(folder: str | Path, size: int, what: str) -> None:
    """Refuse to begin what will find no room at its end."""
    real = Path(os.path.realpath(folder))
    free = shutil.disk_usage(next(part for part in (real, *real.parents) if part.is_dir())).free
    if free < size:
        raise ConfigError(
            f"{what} about {_spelled(size)}, and {folder} has {_spelled(free)} free; free some, or name another folder"
        )


def _spelled(size: int) -> str:
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


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
