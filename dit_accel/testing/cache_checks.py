"""Check step caches on a model: what never skips changes nothing; a skipped step runs what the cache says."""

from typing import Any

import torch

from ..attachment.attachment import attach
from ..methods.caches.static import StaticCache
from .method_cases import CACHE_CASES, caches_for
from .promises import check_batch, check_neutral, check_skips
from .recording import require
from .runs import BRANCHES
from .tiny_models import Case


def check_caches(case: Case) -> None:
    """Each cache that skips nothing changes no bit, and one that skips runs what it must and nothing else."""
    for tried in caches_for(case).values():
        check_neutral(case, tried)
        check_skips(case, tried)
    _check_held(case, case.inputs(1))
    check_batch(case, CACHE_CASES["staticcache"])


def _check_held(case: Case, inputs: dict[str, Any]) -> None:
    """With the same latents, a skipped step that holds the residual gives its own branch's last output.

    But for the rounding of the residual and of the sum: half a unit in the last place of what the latents and output
    come to together, each.
    """
    other = case.with_latents(inputs, case.latents(inputs) * 0.5)
    with attach(case.transformer, StaticCache(every=2, warmup_steps=0, last_steps=0)):
        computed = [case.run(given, 0, branch) for branch, given in zip(BRANCHES, (inputs, other), strict=True)]
        skipped = [case.run(given, 1, branch) for branch, given in zip(BRANCHES, (inputs, other), strict=True)]
    for branch, one, two in zip(BRANCHES, computed, skipped, strict=True):
        allowed = torch.finfo(one.dtype).eps * (case.latents(inputs).abs().max() + one.abs().max())
        require(bool((two - one).abs().max() <= allowed), f"the {branch} branch's held output is not its last")
