"""What is asked of a whole machine, before any call: which kernels run on it, whether they are right, and how fast."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checks import problem_of
from ..tiles import TileLists
from .candidates import CANDIDATES
from .race import class_of, measured, raced
from .self_check import Kind, kind_of, on_device, sample

SIDE = 128  # of the tiles
_sample = lru_cache(maxsize=4)(sample)  # of all kernels that are asked about a kind


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
