"""Check step and block caches on a model: what never skips changes nothing; a skipped step runs what the cache says."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attachment.attachment import attach
from ..attachment.site import find_blocks
from ..methods.caches.cache_config import MeasuredCacheConfig
from ..methods.caches.db import FirstBlockCache
from ..methods.caches.easy import EasyCache
from ..methods.caches.mag import MagCache
from ..methods.caches.sea import SeaCache
from ..methods.caches.static import StaticCache
from ..methods.caches.tea import TeaCache
from ..methods.find import attention_modules
from .method_cases import MethodCase, configs_of
from .recording import counted, require, require_same
from .tiny_models import STEPS, Case, wide_inputs

ALWAYS = 1e9
"""A threshold below which everything lies."""

BRANCHES = ("cond", "uncond")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCase(MethodCase):
    """One cache on a tiny model: ``active`` skips every step that it can, after ``warm`` computed ones.

    Attributes:
        warm: steps that it must compute before the first it skips.
        runs_first: blocks at the front that a skipped step still runs.
        counted: it needs the number of steps or the noise level, which a context states.
    """

    warm: int = 1
    runs_first: int = 0
    counted: bool = False


_ALL: dict[str, Any] = {"warmup_steps": 0, "last_steps": 0}


def _measured(config: type[MeasuredCacheConfig], **options: Any) -> dict[str, Any]:
    """Return the settings of a cache with a threshold, below which all lies or nothing."""
    return {part: config(threshold=at, **options, **_ALL) for part, at in (("neutral", 0.0), ("active", ALWAYS))}


CACHE_CASES: dict[str, CacheCase] = {
    "staticcache": CacheCase(neutral=StaticCache(every=1, **_ALL), active=StaticCache(every=2, **_ALL)),
    "easycache": CacheCase(**_measured(EasyCache), warm=2),
    "teacache": CacheCase(**_measured(TeaCache, polynomial=(1.0, 0.0), polynomial_2=(1.0, 0.0))),
    "magcache": CacheCase(**_measured(MagCache, ratios=(1.0,) * STEPS), counted=True),
    "seacache": CacheCase(**_measured(SeaCache), counted=True),
    "firstblockcache": CacheCase(**_measured(FirstBlockCache), runs_first=1),
}
"""Method name -> how it is tried; open to every package."""


def caches_for(case: Case) -> dict[str, CacheCase]:
    """Return the caches that a model can take."""
    adapter, possible = case.adapter, {}
    for name, tried in CACHE_CASES.items():
        lacking = (
            name in adapter.refused
            or (tried.runs_first and adapter.blocks == ())
            or (isinstance(tried.active, TeaCache) and adapter.signal is None)
            or (tried.counted and not hasattr(case.model.transformer, "cache_context"))
        )
        if not lacking:
            possible[name] = tried
    return possible


def check_caches(case: Case) -> None:
    """Each cache computes all with a threshold of 0, and where it skips, what it must and nothing else.

    Computed steps before the first skipped one are the plain ones, bit for bit; a second generation is the first one;
    branches and what is detached keep nothing of it.
    """
    for name, tried in caches_for(case).items():
        check_cache(case, name, tried)
    _check_held(case, case.inputs(1))
    _check_rows(case)


def check_cache(case: Case, name: str, tried: CacheCase) -> None:
    """Raise `AssertionError` unless one cache does what `check_caches` says of each."""
    inputs = case.inputs(1)
    plain = [case.run(_at(case, inputs, step), step) for step in range(tried.warm + 1)]
    places = [name for name, _, _ in attention_modules(case.transformer, case.adapter)]
    with counted(case.transformer, places) as ran, attach(case.transformer, *configs_of(tried.neutral), preset="none"):
        for step in range(tried.warm + 1):
            out = case.run(_at(case, inputs, step), step)
            require(torch.equal(out, plain[step]), f"{name} that skips nothing changed step {step}")
        require(len(ran) == (tried.warm + 1) * len(places), f"{name} that skips nothing skipped attention calls")
    with counted(case.transformer, places) as ran, attach(case.transformer, *configs_of(tried.active), preset="none"):
        first = _generation(case, inputs, tried, plain, name)
        expected = tried.warm * len(places) + _still_run(case, places, tried)
        require(len(ran) == expected, f"{name}: {len(ran)} attention calls ran, the cache says {expected}")
        again = _generation(case, inputs, tried, plain, name)
        require(torch.equal(first, again), f"{name}: a second generation differs from the first")
    require(torch.equal(case.run(inputs), plain[0]), f"{name} left the output changed")


def _at(case: Case, inputs: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the inputs of a step: latents move from step to step, or nothing would tell how fast."""
    name, scale = case.adapter.latents, 1 - 0.05 * step
    latents = inputs[name]
    return {**inputs, name: latents * scale if isinstance(latents, Tensor) else [one * scale for one in latents]}


def _generation(case: Case, inputs: dict[str, Any], tried: CacheCase, plain: list[Tensor], name: str) -> Tensor:
    """Run a generation whose last step is skipped, and return what that one gave."""
    for step in range(tried.warm):
        out = case.run(_at(case, inputs, step), step)
        require(torch.equal(out, plain[step]), f"{name} changed step {step}, before it skipped any")
    out = case.run(_at(case, inputs, tried.warm), tried.warm)
    require(bool(out.isfinite().all()), f"{name} forecasts values that are not finite")
    require(not torch.equal(out, plain[tried.warm]), f"{name} did not skip step {tried.warm}")
    return out


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


def _check_rows(case: Case) -> None:
    """What a skipped step gives each row of a batched call is what the row gets by itself."""
    if case.model.max_batch < 2:
        return
    wide, both = case.wide(), wide_inputs(case.inputs(2))
    with attach(wide, StaticCache(every=2, warmup_steps=0, last_steps=0)):
        batched = case.run_after(1, both, branch="cond_uncond", transformer=wide)
        for row, branch in enumerate(("uncond", "cond")):
            alone = case.run_after(1, case.row(both, row), branch=branch, transformer=wide)
            require_same(batched[row : row + 1], alone, f"row {row} of a batch's forecast differs from its own")


def _still_run(case: Case, places: list[str], tried: CacheCase) -> int:
    """Return how many attention modules a skipped step runs: of the first blocks, and of those beside the main ones."""
    if not tried.runs_first:
        return 0
    names = [block.name for block in find_blocks(case.adapter, case.transformer)]
    skipped = names[tried.runs_first :]
    return sum(not any(place.startswith(f"{name}.") for name in skipped) for place in places)
