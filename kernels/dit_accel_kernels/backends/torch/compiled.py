"""Builds fused.cpp with the machine's own C++ compiler, once, into the user's cache; without one there is no loop."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("fused.cpp")
SWITCH = "DIT_ACCEL_CPU_LOOP"
"""Environment variable: 0 leaves every call on a CPU to torch's own operations."""

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled loop; None without a compiler, or if `SWITCH` says so, or with a warning if it fails."""
    compiler = next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))),
        None,
    )
    if compiler is None or os.environ.get(SWITCH) == "0":
        return None
    tune = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    try:
        path = built(compiler, (*FLAGS, tune))
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or "").strip() or str(error)
        warnings.warn(
            f"{compiler} could not build the loop of the torch backend ({told.splitlines()[-1]}); torch's own "
            f"operations are used, which take up to twice as long. {SWITCH}=0 says so without this warning",
            stacklevel=2,
        )
        return None


def built(compiler: str, flags: tuple[str, ...]) -> Path:
    """Return the library's path, which is named by all that it is made of: source, compiler, flags and processor.

    Raises:
        OSError: if the cache can't be written.
        subprocess.SubprocessError: if the compiler fails or takes minutes.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), compiler, version, *flags, processor())
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-accel" / "kernels"
    path = folder / f"fused-{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            command = [compiler, *flags, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            os.replace(made, path)
    return path


def processor() -> str:
    """Return what tells apart processors that code is made for: on Linux the model and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
