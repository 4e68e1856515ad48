"""An examination of this machine: what each kernel needs and has, whether it is right, and how fast it is here.

What is measured is kept as the kernels keep it, so that `backend="auto"` takes what won, and `plan` counts by it.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit_accel_kernels.backends.torch.compiled import processor_text
from dit_accel_kernels.backends.triton.launch import architecture
from dit_accel_kernels.choice.candidates import CANDIDATES
from dit_accel_kernels.choice.race import SWITCH, lacks, measures, race_of, refused
from dit_accel_kernels.choice.self_check import Kind

from ..adapters.installed import family
from .kept_races import own_device, usual_dtype
from .sizes import token_layout

SECONDS = 110.0  # after which nothing more is begun; what takes seconds to compile is left out after half of them
RACE = 25.0  # of them that must be left for a race
DENSITY = 0.25  # share of the tiles that the lists of a race keep

SHAPES = {
    "cpu": (("flux.1-dev", 1024, 1024, 1), ("wan2.1-1.3b", 480, 832, 17), ("wan2.1-1.3b", 480, 832, 33)),
    "gpu": (("wan2.1-1.3b", 480, 832, 81), ("flux.1-dev", 1024, 1024, 1), ("wan2.1-14b", 720, 1280, 81)),
}
"""The calls that are raced: model, height and width in pixels, frames; a CPU times few of their heads."""

FEATURES = ((), ("LSE",), ("pooled tiles",))
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
PACKAGES = ("torch", "triton", "diffusers", "transformers", "dit-accel", "dit-accel-kernels")
INSTALLABLE = re.compile(r"\bpackage\b|compiler|imported|could not be built")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was found on this machine, as plain values for JSON."""

    machine: dict[str, Any]  # processor, threads, memory, cards, and the device that was examined
    versions: dict[str, str | None]  # of Python, packages and the system
    candidates: list[dict[str, Any]]  # of each kernel its package, and what it lacks here for calls of any dtype
    checks: list[dict[str, Any]] = field(default_factory=list)  # kernel, kind of call, and what was wrong, or None
    races: list[dict[str, Any]] = field(default_factory=list)  # a call, and seconds of each kernel, or why none
    install: list[str] = field(default_factory=list)  # what would make this machine faster, a line each
    notes: list[str] = field(default_factory=list)  # what was not measured, and why


NAMES = [name for name in CANDIDATES if name != "reference"]

Job = tuple[str, Callable[[float], bool]]
"""A part of an examination: what it is, and what does it in so many seconds and tells whether they were enough."""


def examine(say: Callable[[str, int, int], None]) -> Examination:
    """Examine the device that runs go to: self checks of every kernel, and races at three real shapes.

    Before each part ``say`` is called with what it is, how many are done, and how many there are.
    """
    device, end = own_device(), time.monotonic() + SECONDS
    others = (torch.bfloat16,) if device.type == "cpu" else (torch.float16, torch.float32)
    dtypes = (usual_dtype(device), *others)
    candidates = [_candidate(name, [_kind(device, dtype) for dtype in dtypes]) for name in NAMES]
    found = Examination(machine=_machine(device), versions=_versions(), candidates=candidates)
    found.install.extend(_installable(candidates, device))
    if not measures():
        found.notes.append(f"nothing was measured: {SWITCH} is 0 in the environment; unset it")
        return found
    jobs, late = _jobs(found, device, dtypes), 0
    for number, (text, job) in enumerate(jobs):
        say(text, number, len(jobs))
        late += not job(end - time.monotonic())
    if late:
        found.notes.append(
            f"{late} of {len(jobs)} parts were not measured, to end in time; they are when a run first needs them"
        )
    return found


def _jobs(found: Examination, device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Job]:
    """Return all parts of an examination, what matters most first."""
    raced, shapes = (dtypes, SHAPES["cpu"]) if device.type == "cpu" else (dtypes[:1], SHAPES["gpu"])
    here = [one["name"] for one in found.candidates if one["missing"] is None]
    quick = [name for name in here if not CANDIDATES[name].waits]

    def checks(kinds: Sequence[Kind], names: Sequence[str]) -> list[Job]:
        return [(f"self check of {name}", partial(_check, found, name, kind)) for kind in kinds for name in names]

    def races(dtype: torch.dtype) -> list[Job]:
        jobs = [(f"{shape[0]} in {_name(dtype)}", partial(_race, found, device, dtype, shape)) for shape in shapes]
        return [*checks([_kind(device, dtype)], here), *jobs]

    kinds = [_kind(device, dtype, dim, *more) for more in FEATURES for dim in (128, 64) for dtype in dtypes]
    first = [_kind(device, dtype) for dtype in raced]
    rest = checks([kind for kind in kinds if kind not in first], quick)
    return [*races(raced[0]), *rest, *(job for dtype in raced[1:] for job in races(dtype))]


def _kind(device: torch.device, dtype: torch.dtype, dim: int = 128, *features: str) -> Kind:
    return Kind(device, dtype, dim, dim, (128, 128), frozenset(features))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(found: Examination, name: str, kind: Kind, left: float) -> bool:
    if lacks(name, kind):
        return True
    if left < (SECONDS / 2 if CANDIDATES[name].waits else 0):
        return False
    found.checks.append({"kernel": name, "kind": str(kind), "fault": refused(name, kind, again=True)})
    return True


def _race(found: Examination, device: torch.device, dtype: torch.dtype, shape: Sequence[Any], left: float) -> bool:
    name, height, width, frames = shape
    model = family(name)
    tokens = token_layout(model, height=height, width=width, num_frames=frames).tokens
    size = f"{width}x{height}" + (f"x{frames}" if frames > 1 else "")
    row: dict[str, Any] = {"model": name, "size": size, "tokens": tokens, "dtype": _name(dtype)}
    row |= {"heads": model.heads, "head_dim": model.head_dim}
    found.races.append(row)
    if left < RACE:
        row["why"] = "not measured, to end in time"
        return False
    try:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(1, model.heads, tokens, model.head_dim, generator=random).to(device, dtype)
        row |= race_of(x, x.roll(1, 2), x.roll(2, 2), DENSITY, whole=left > SECONDS / 2)
    except RuntimeError as error:  # such as too little memory
        row["why"] = f"not measured: {' '.join(str(error).split())[:200]}"
        found.notes.append(f"{name} {size} in {_name(dtype)} {row['why']}")
    return True


def _candidate(name: str, kinds: Sequence[Kind]) -> dict[str, Any]:
    """Return what is said of a kernel; what it lacks is what it lacks for bfloat16, which most of them take."""
    candidate, found = CANDIDATES[name], {kind.dtype: lacks(name, kind) for kind in kinds}
    missing = found[torch.bfloat16] if all(found.values()) else None
    if missing:  # without the start and the end that it has as an error
        missing = re.sub(r": (install it or )?use '.*$", "", missing.removeprefix(f"backend {name!r} "))
    return {"name": name, "package": candidate.package, "version": candidate.version or None, "missing": missing}


def _installable(candidates: Sequence[dict[str, Any]], device: torch.device) -> list[str]:
    """Return a line for each thing that is not installed and would make this device faster."""
    here = [one for one in candidates if device.type in (CANDIDATES[one["name"]].on or (device.type,))]
    lines = [f"{one['name']} {one['missing']}" for one in here if INSTALLABLE.search(one["missing"] or "")]
    if device.type == "cpu" and any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/kfd")):
        lines.append(f"a card is there that torch {torch.__version__} can't use: install torch for it (pytorch.org)")
    return lines


def _machine(device: torch.device) -> dict[str, Any]:
    text, memory = processor_text(), None
    cards = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    model = re.search(r"model name\s*:\s*(.*)", text)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "instructions": " ".join(name for name in INSTRUCTIONS if name in text.split()),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "cards": [f"{torch.cuda.get_device_name(card)}, {architecture(card)}" for card in cards],
        "device": str(device),
    }


def _versions() -> dict[str, str | None]:
    about = {"python": platform.python_version(), "system": platform.platform()}
    versions: dict[str, str | None] = {**about, **dict.fromkeys(PACKAGES)}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
