"""Which kernel "auto" takes: those that pass their self check run on a call's own queries, keys and values, once.

Dense attention by torch runs beside them, so that a caller knows what the lists gain (`Chosen.speed`). A race decides
for all calls of one kind and of about one size and density, from `LEAST_FLOPS` on, and is kept on disk. There is none
under `DIT_ACCEL_MEASURE=0`, inside a captured graph, or where torch is to be deterministic: then the first of our own
kernels that takes the call and passes is chosen. Of several processes the first one races and the others follow it.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..backends.slices import slice_of
from ..cache import capturing
from ..checks import problem_of
from ..problem import Problem
from ..tiles import TileLists
from .candidates import CANDIDATES, OURS, machine
from .measured import Measured
from .self_check import Kind, fault, kind_of, on_device, sample

SWITCH = "DIT_ACCEL_MEASURE"
"""Environment variable: 0 measures and checks nothing; the first of our kernels that takes a call computes it."""

LEAST_FLOPS = 5e9  # of the dense call, below which a race would take longer than it can save
SIDE = 128  # of the tiles of races before any call
DENSE_TOKENS = 1024  # of the dense calls that are timed for those of a model
SLICE_FLOPS = 5e9  # of the dense call that is timed on a CPU: as few heads as have so many
TURNS, MOST = 3, 3
WAIT = 30.0  # seconds that other processes wait for what the first one says
TRIED = "self check begun by process"
ENDED = "its self check ended the process"


class Chosen(NamedTuple):
    """What computes a call, and its speed over dense attention, None if that is not measured."""

    name: str
    speed: float | None = None


_lock = threading.RLock()
_said: dict[str, str] = {}
_decided: dict[tuple, tuple[str, float | None]] = {}  # by what a class is made of, for the calls after the first

_sample = lru_cache(maxsize=4)(sample)  # of all kernels that are asked about a kind


@lru_cache(maxsize=16)
def measured(device: torch.device) -> Measured:
    """The measurements of a device."""
    return Measured(machine(device))


def measures() -> bool:
    """Whether kernels are checked and raced in this process."""
    return os.environ.get(SWITCH) != "0"


def decisions() -> list[str]:
    """What was chosen in this process and why, a line for each kind of call, and what was refused."""
    return list(_said.values())


def choose(problem: Problem, least: float | None = None) -> Chosen:
    """What computes a call whose backend is "auto", by a race from `least` operations on.

    Its time is taken to fall with the density of its tiles.
    """
    kind, exact = kind_of(problem), torch.are_deterministic_algorithms_enabled()
    if not measures():
        return Chosen(first(problem))
    call = (kind, problem.q.shape, problem.num_k, problem.groups, problem.tiles_exact, exact)
    decided = _decided.get(call)
    if decided is None:
        decided = _decide(problem, kind, LEAST_FLOPS if least is None else least)
        if not capturing(kind.device):
            _decided[call] = decided
    name, share = decided
    return Chosen(name, None if share is None else share / max(problem.density, 1e-9))


def _decide(problem: Problem, kind: Kind, least: float) -> tuple[str, float | None]:
    """The kernel of a class of calls by a race, kept or run now, and its share of the ideal; or the first of ours."""
    key, fixed = class_of(problem, kind), torch.are_deterministic_algorithms_enabled()

    def find() -> dict[str, Any] | None:
        kept = measured(kind.device)[key]
        if kept is None and problem.precision is None and not (fixed or capturing(kind.device)):
            kept = measured(kind.device)[key] = raced(problem, kind)
        return kept

    with _lock:
        kept = _agreed(key, find) if _dense_flops(problem.q, problem.k, problem.v) >= least else None
    if kept is None:
        return first(problem, None if capturing(kind.device) else kind), None
    _said[key] = f"{key}: {kept['why']}"
    return kept["name"], kept["share"]


def first(problem: Problem, kind: Kind | None = None) -> str:
    """The first of our kernels that takes a call and, where its kind is named, passes the self check for that."""
    taking = (name for name in OURS if CANDIDATES[name].takes(problem))
    return next((name for name in taking if kind is None or not refused(name, kind)), "gather")


def refused(name: str, kind: Kind, *, again: bool = False) -> str | None:
    """Why a kernel is not used for calls of a kind, from its self check, run once and kept; None: it passes.

    A process that a check ended, by a crash of the kernel, leaves the note that it had begun: the kernel is not tried
    again. All others are checked anew where `again` says so.
    """
    candidate, kept = CANDIDATES[name], measured(kind.device)
    key = f"{name} {candidate.version}, {kind}".replace(" ,", ",")
    found = kept[key]
    if isinstance(found, str) and found.startswith(TRIED):
        process = int(found.rsplit(" ", 1)[1])
        found = None if process == os.getpid() or _lives(process) else ENDED
        if found:
            kept[key] = found
    if found is None or (again and found != ENDED):
        if candidate.package:  # ours have run on every call of our tests
            kept[key] = f"{TRIED} {os.getpid()}"
        found = fault(kind, candidate.attend, compiles=bool(candidate.package) or candidate.waits) or ""
        kept[key] = found
    if found:
        _said[key] = f"{key}: not used, since {found}"
    return found or None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def class_of(problem: Problem, kind: Kind) -> str:
    """The name of the calls that one race decides: of one kind and about as many tokens, heads and tiles."""
    tokens = 1 << round(math.log2(max(1, problem.num_q * problem.num_k)) / 2)
    heads = problem.q.shape[0] * problem.q.shape[1]
    share = "" if problem.selection is not None else f", density 1/{1 << round(-math.log2(max(problem.density, 1e-3)))}"
    return f"{kind}, about {tokens} tokens, {1 << round(math.log2(max(1, heads)))} heads{share}"


def too_short(q: Tensor, k: Tensor, v: Tensor, layout: str) -> bool:
    """Whether a call, [B, S, H, D] or [B, H, S, D], is too short for a race to pay."""
    return _dense_flops(q, k, v, 1 if layout == "bshd" else 2) < LEAST_FLOPS


def _dense_flops(q: Tensor, k: Tensor, v: Tensor, axis: int = 2) -> float:
    return 2.0 * q.numel() * k.shape[axis] * (1 + v.shape[3] / q.shape[3])


def _agreed(key: str, find: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """What the only process finds, or the first of several, whom the others follow; None where it says nothing."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return find()
    store, name = dist.distributed_c10d._get_default_store(), f"dit-accel {key}"
    if dist.get_rank() == 0:
        kept = find()
        store.set(name, json.dumps(kept))
        return kept
    try:
        store.wait([name], timedelta(seconds=WAIT))
        return json.loads(store.get(name))
    except (RuntimeError, ValueError):
        _said[key] = f"{key}: the first process said nothing in {WAIT:.0f} s, so the first of our kernels is taken"
        return None


def raced(problem: Problem, kind: Kind, *, whole: bool = False) -> dict[str, Any]:
    """The fastest of the kernels that take a call and pass, and its share of the ideal: dense time x density / time.

    In a `whole` race all of them run, those that wait too.
    """
    call = part(problem)
    taking = [name for name, one in CANDIDATES.items() if name != "reference" and one.takes(call)]
    passing: list[str] = []
    for name in sorted(taking, key=lambda name: CANDIDATES[name].waits):
        enough = not whole and (len(passing) == MOST or (CANDIDATES[name].waits and passing))
        if not enough and not refused(name, kind):
            passing.append(name)
    calls = {name: partial(CANDIDATES[name].run, call) for name in passing}
    times = timed({**calls, "dense": partial(_dense, call)}, call)
    dense = times.pop("dense", None)
    if not times:
        return {"name": "gather", "share": None, "why": "nothing else could run"}
    name = min(times, key=times.__getitem__)
    speed = None if dense is None else dense / times[name]
    others = "".join(f", {other} {times[other] / times[name]:.2f} times as long" for other in times if other != name)
    gain = f", {speed:.2f} times as fast as dense attention at {call.density:.0%} of the tiles" if speed else ""
    share = None if speed is None else speed * call.density
    about = {"dtype": str(kind.dtype).removeprefix("torch."), "dim": kind.dim, "features": sorted(kind.features)}
    about |= {"tokens": math.isqrt(problem.num_q * problem.num_k), "density": problem.density}
    why, seconds = f"{name}{gain}{others}", {**times, "dense": dense}
    return {"name": name, "share": share, "why": why, "seconds": seconds, **about}


def _dense(problem: Problem) -> Any:
    q, k, v = problem.q, problem.k, problem.v
    return scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=q.shape[1] != k.shape[1])


def part(problem: Problem) -> Problem:
    """The part of a call that is timed: on a CPU few of its heads, where they share lists; all of them on a GPU."""
    heads, key_heads = problem.q.shape[1], problem.k.shape[1]
    few = math.ceil(SLICE_FLOPS / max(1.0, _dense_flops(problem.q[:1, :1], problem.k, problem.v)))
    if problem.q.device.type != "cpu" or problem.groups > 1 or few >= heads or key_heads != heads:
        return problem
    return replace(slice_of(problem, (slice(0, 1), slice(0, few))), identity_mix=None)


def timed(calls: dict[str, Callable[[], Any]], problem: Problem) -> dict[str, float]:
    """Seconds of each call, the median of three in turn, so that a slow first one does not count; without who fails."""
    device, taken = problem.q.device, {name: [] for name in calls}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(TURNS):
            for name in list(taken):
                try:
                    began = _now(device)
                    calls[name]()
                    taken[name].append(_now(device) - began)
                except Exception as error:  # out of memory too: another way may need less
                    del taken[name]
                    if device.type != "cpu":
                        torch.accelerator.empty_cache()
                    _said[name] = f"{name} lost a race, since it failed: {' '.join(str(error).split())[:200]}"
    return {name: median(seconds) for name, seconds in taken.items()}


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@lru_cache(maxsize=64)
def speed_of_dense_by(device: torch.device, dtype: torch.dtype, dim: int) -> Chosen | None:
    """What computes a model's own dense call fastest, by a race on few tokens; None where nothing is measured."""
    if not measures():
        return None
    random = torch.Generator().manual_seed(0)  # the caller's draws stay as they are
    q, k, v = (torch.randn(1, 2, DENSE_TOKENS, dim, generator=random).to(device, dtype) for _ in range(3))
    lists = TileLists.full(DENSE_TOKENS, DENSE_TOKENS, block_q=SIDE, block_k=SIDE)
    return choose(problem_of(q, k, v, lists.to(device), layout="bhsd"), least=0.0)


def lacks(name: str, kind: Kind) -> str | None:
    """What a kernel needs for calls of a kind and does not find here, as a sentence, or None."""
    candidate, call = CANDIDATES[name], on_device(_sample(kind), kind.device)
    others = None if candidate.takes(call) else f"needs a device of type {' or '.join(candidate.on)}"
    return candidate.refusal(call) or others


def race_of(q: Tensor, k: Tensor, v: Tensor, density: float, *, whole: bool) -> dict[str, Any]:
    """The race of calls like q, k, v [B, H, S, D] over random lists of a density, run now and kept; see `raced`."""
    grid, random = -(-q.shape[2] // SIDE), torch.Generator().manual_seed(0)
    states = 2 * (torch.rand(1, grid, grid, generator=random) < density).byte()
    lists = TileLists.from_states(states, block_q=SIDE, block_k=SIDE, num_q=q.shape[2], num_k=q.shape[2])
    call = problem_of(q, k, v, lists.to(q.device), layout="bhsd")
    kind = kind_of(call)
    kept = measured(q.device)[class_of(call, kind)] = raced(call, kind, whole=whole)
    return kept


def races(device: torch.device) -> list[dict[str, Any]]:
    """The races of a device that are kept, of calls that sparse lists alone distinguish from dense attention."""
    found = [one for one in measured(device).values() if isinstance(one, dict) and one.get("share")]
    return [one for one in found if one.get("features") == [] and one["density"] < 1]
