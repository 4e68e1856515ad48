"""What backends that hand exact tiles to another library have in common: what they refuse, and what they look for."""

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..problem import Problem

DTYPES = (torch.bfloat16, torch.float16)


def check_call(name: str, problem: Problem, only: str | None = None) -> Callable[[str | None], None]:
    """Refuse calls that have more than exact tiles, or this one alone; return what raises for what is missing."""
    unsupported = {
        "pooled tiles": problem.may_pool,
        "masks inside tiles": problem.mask_ids is not None,
        "frame decay": problem.decay is not None,
        "votes": problem.votes,
        "hidden keys": any(x is not None for x in (problem.key_length, problem.key_mask, problem.key_valid)),
    }
    reasons = [reason for reason, applies in unsupported.items() if applies and only in (None, reason)]
    if reasons:
        raise BackendUnavailableError(f"backend {name!r} has no {' and no '.join(reasons)}: use 'triton' or 'auto'")

    def missing(text: str | None) -> None:
        if text:
            raise BackendUnavailableError(f"backend {name!r} needs {text}: use 'triton' or 'auto'")

    if problem.q.dtype not in DTYPES:
        missing(f"bfloat16 or float16 (found {problem.q.dtype})")
    return missing


@lru_cache(maxsize=8)
def missing_package(module: str, package: str, function: str, option: str = "") -> str | None:
    """What is wrong with a library on this machine, or None; it is imported once. `option` is one for pip install."""
    try:
        getattr(importlib.import_module(module), function)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            return f"the {package} package (found none: pip install {option}{package})"
        return f"a {package} with {function} that can be imported (found {version_of(package)}, and {error})"
    return None


def version_of(package: str) -> str:
    """The version of an installed package, or "" of what is not: a copy of ours under another name is no package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def tile_sizes(tokens: int, side: int, device: torch.device) -> Tensor:
    """Tokens of every tile, int32 [N]; the last one's are fewer where they don't fill it."""
    sizes = torch.full((-(-tokens // side),), side, dtype=torch.int32, device=device)
    sizes[-1] -= -tokens % side
    return sizes


def scaled_queries(problem: Problem) -> Tensor:
    """The queries with the scales of their heads, which such a library has no argument for."""
    if problem.head_scale is None:
        return problem.q
    return (problem.q * problem.head_scale[:, :, None, None]).to(problem.q.dtype)
