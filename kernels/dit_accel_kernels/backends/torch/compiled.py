"""Loads fused.cpp as the package's wheel brings it, or builds it once with the machine's own C++ compiler.

A built library lies in the user's cache. Its name holds a digest of all that it is made of and one of its own bytes: a
file that doesn't match is never loaded but built anew. The folder and the file must be no links, belong to the user (or
root) and be writable by nobody else; nor may others replace the cache that holds them.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .shipped import DIGITS, FLAGS, shipped_library, sources

SOURCE = Path(__file__).with_name("fused.cpp")
SWITCH = "DIT_ACCEL_CPU_LOOP"
"""Environment variable: 0 leaves every call on a CPU to torch's own operations."""

COMPILERS = ("c++", "g++", "clang++")

POINTERS = (
    "q", "k", "v", "out", "keys", "values", "key_means", "value_means", "lengths", "valid", "head_scale", "decay",
    "mean_decay", "frames", "exact_offsets", "exact", "pooled_offsets", "pooled", "mask_ids",
    "mask_bits", "odd", "evidence_starts", "lse", "evidence", "parallel",
)  # fmt: skip
STRIDES = ("q_strides", "k_strides", "v_strides", "out_strides")
SIZES = (
    "batch", "heads", "key_heads", "groups", "num_q", "num_k", "rows", "columns", "dim", "value_dim", "by_mass",
    "narrow", "pairs", "team", "threads", "next", "end",
)  # fmt: skip


class LoopCall(ctypes.Structure):
    """`LoopCall` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64 * 3) for name in STRIDES),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_double),
        ("seconds", ctypes.c_double),
    )


class Loop(NamedTuple):
    """The compiled loop, or None, and in words who compiled it or why it is not there."""

    library: ctypes.CDLL | None
    why: str


@lru_cache(maxsize=1)
def compiled_loop() -> Loop:
    """Return the compiled loop, built on first use; there is none without a compiler or if `SWITCH` says so.

    It is built by the command that CXX holds and no other; without CXX it is the package's own, if that has one for
    this processor, or built by the first of `COMPILERS` that works. What fails is warned of.
    """
    if os.environ.get(SWITCH) == "0":
        return Loop(None, f"{SWITCH} is 0")
    if not os.environ.get("CXX", "").strip() and (path := shipped_library(SOURCE, processor_text())):
        try:
            return Loop(bound(path), f"of the package, for {path.stem.split('-')[1]}")
        except OSError:  # a system without the C library that it was built for
            pass
    try:
        commands = _commands()
        folder = cache_folder() if commands else None
    except (OSError, RuntimeError, ValueError) as error:
        return _without(str(error))
    if folder is None:
        return Loop(None, f"no C++ compiler was found ({', '.join(COMPILERS)})")
    tune = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    tried: list[str] = []
    for command in commands:
        try:
            return Loop(_loaded(folder, command, (*FLAGS, tune)), f"compiled by {Path(command[0]).name}")
        except (OSError, subprocess.SubprocessError) as error:
            message = (getattr(error, "stderr", None) or "").strip() or str(error)
            tried.append(f"{shlex.join(command)}: {message.splitlines()[-1]}")
    return _without("; ".join(tried))


def _without(why: str) -> Loop:
    warnings.warn(
        f"could not build the loop of the torch backend ({why}); torch's own operations are used, which take up to "
        f"twice as long. {SWITCH}=0 says so without this warning",
        stacklevel=2,
    )
    return Loop(None, f"it could not be built ({why})")


def _commands() -> list[list[str]]:
    """Return the compilers to try, as commands. Raises ValueError if CXX names one that is not there, or is none."""
    named = os.environ.get("CXX", "").strip()
    if not named:
        return [[program_path] for name in COMPILERS if (program_path := shutil.which(name))]
    try:
        program, *arguments = shlex.split(named)
    except ValueError as error:
        raise ValueError(f"CXX is {named!r}, which is no command: {error}") from None
    program_path = shutil.which(program)
    if program_path is None:
        raise ValueError(f"CXX is {named!r}, and there is no program {program!r}")
    return [[program_path, *arguments]]


def cache_folder() -> Path:
    """Return the folder of libraries, made if need be, which only this user can write to.

    Raises OSError if it can't be made, is a link, belongs to somebody else or could be swapped by others, RuntimeError
    if there is no home folder.
    """
    advice = "set XDG_CACHE_HOME to a folder of your own"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "dit-accel" / "kernels"
    for one in (root, folder.parent, folder):
        one.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = one.stat() if one is root else one.lstat()
        if not stat.S_ISDIR(status.st_mode):  # somebody else's may lead to any folder of the user's
            raise OSError(f"{one} is a link: {advice}")
        if not _trusted_owner(status):
            raise OSError(f"{one} belongs to user {status.st_uid}: {advice}")
        if one is root and _open_to_others(status):
            raise OSError(f"others can write to {one}: {advice}")
        if one is not root and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            one.chmod(0o700)
    return folder


def _open_to_others(status: os.stat_result) -> bool:
    """Whether others can put something in the place of what lies in a folder; a sticky folder's is its owner's.

    A group with the number of the folder's owner is that user's alone, as many systems set it up.
    """
    mode, own_group = status.st_mode, status.st_gid == status.st_uid
    if not hasattr(os, "getuid") or mode & stat.S_ISVTX:
        return False
    return bool(mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not own_group))


def _trusted_owner(status: os.stat_result) -> bool:
    """Whether a file belongs to this user, or to root, who could do anything; always so where there are no such ids."""
    return not hasattr(os, "getuid") or status.st_uid in (os.getuid(), 0)


def _loaded(folder: Path, command: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    """Return the library that a compiler makes, from the folder if it is there and whole, else built.

    Raises OSError or subprocess.SubprocessError if that fails or takes minutes.
    """
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = (sources(SOURCE), *command, version, *flags, processor_text())
    made_of = _digest("\n".join(parts).encode())
    there = sorted(folder.glob(f"fused-{made_of}-*.so"))
    for path in filter(whole, there):
        try:
            return bound(path)
        except OSError:  # of another machine that shares the folder
            continue
    loaded = bound(_built(folder, made_of, [*command, *flags]))
    for path in there:
        if not whole(path):  # what was just built may have taken its name
            path.unlink(missing_ok=True)
    return loaded


def is_own(path: Path) -> bool:
    """Return whether a path is a file of this user's that nobody else can write to; OSError if it is not there."""
    status = path.lstat()
    shared = hasattr(os, "getuid") and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(status.st_mode) and _trusted_owner(status) and not shared


def whole(path: Path) -> bool:
    """Return whether a library is what its name says and nobody else's: only then may it be loaded."""
    try:
        return is_own(path) and path.stem.rpartition("-")[2] == _digest(path.read_bytes())
    except OSError:
        return False


def _built(folder: Path, made_of: str, command: list[str]) -> Path:
    """Build the library and put it under its name in one step, whole and on the disk: others may look at any time."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "fused.so"
        build = [*command, str(SOURCE), "-o", str(made)]
        subprocess.run(build, capture_output=True, text=True, check=True, timeout=300)
        made.chmod(0o700)
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        path = folder / f"fused-{made_of}-{_digest(made.read_bytes())}.so"
        os.replace(made, path)
    return path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def processor_text() -> str:
    """Return what tells apart processors that code is made for: on Linux the model and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def bound(path: Path) -> ctypes.CDLL:
    """Load the loop from a file whose bytes are known to be its own.

    Raises OSError if it can't be loaded, lacks a function or was built for another structure.
    """
    loaded = ctypes.CDLL(str(path))
    try:
        for size in (loaded.panel, loaded.call_bytes, loaded.has_pairs, loaded.tile_words):
            size.restype = ctypes.c_int64
        for function in (loaded.attend, loaded.pack):
            function.restype, function.errcheck = ctypes.c_int64, _require_memory
    except AttributeError as error:
        raise OSError(f"{path} is no compiled loop: {error}") from None
    if loaded.call_bytes() != ctypes.sizeof(LoopCall):
        raise OSError(f"{path} takes calls of {loaded.call_bytes()} bytes, not of {ctypes.sizeof(LoopCall)}")
    return loaded


def _require_memory(failed: Any, function: Any, _: Any) -> Any:
    if failed:
        raise MemoryError(f"{function.__name__} of the compiled loop found no memory for what it keeps beside the call")
    return failed


@lru_cache(maxsize=1)
def torchs_threads() -> int | None:
    """Return where GOMP_parallel is, which runs a function on the threads that torch keeps; None: torch has none such.

    A child process has none of its parent's threads, and libgomp waits for them there: it starts its own.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(torchs_threads=lambda: None))
