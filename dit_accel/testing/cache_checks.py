"""Check caches on a model: what never skips changes nothing; what is skipped is what the cache says, and no other."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..attachment.attachment import attach
from ..attachment.site import find_blocks
from ..errors import ConfigError
from ..methods.caches.cache_config import StepCacheConfig
from ..methods.caches.db import DBCache
from ..methods.caches.profiling import ProfilingCache
from ..methods.caches.prune import DBPrune
from ..methods.caches.static import StaticCache
from .method_cases import CACHE_CASES, caches_for
from .promises import check_batch, check_neutral, check_skips
from .recording import counted, require
from .runs import BRANCHES
from .tiny_models import Case

FROM_STEP_1: dict[str, Any] = {"every": 100, "warmup_steps": 0}
"""The schedule of a `ProfilingCache` that computes step 0 alone."""
ALWAYS: dict[str, Any] = {"threshold": 1e9, "warmup_steps": 0, "last_steps": 0, "first_blocks": 0}
"""The options of a `DBPrune` that computes step 0 alone."""
STEPS_OFF = 4
"""What a forecast may be off by where the time goes on, over the change of the step."""
ROUNDING = 1e-3
"""What a forecast of an unchanged input may be off by, over the largest value: a few last places a block."""


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
        computed = [case.run(values, 0, branch) for branch, values in zip(BRANCHES, (inputs, other), strict=True)]
        skipped = [case.run(values, 1, branch) for branch, values in zip(BRANCHES, (inputs, other), strict=True)]
    for branch, output, held in zip(BRANCHES, computed, skipped, strict=True):
        allowed = torch.finfo(output.dtype).eps * (case.latents(inputs).abs().max() + output.abs().max())
        require(bool((held - output).abs().max() <= allowed), f"the {branch} branch's held output is not its last")


def check_block_caches(case: Case) -> str | None:
    """Raise `AssertionError` unless caches of blocks do on the model what they say.

    Where nothing may be skipped no bit changes and every block runs; a run of blocks from the first one on, one in the
    middle, all of them and all but the first and last are skipped alone, and give on an unchanged input what they gave,
    but for rounding; the step that is computed and the run that follows keep every bit.
    """
    if case.adapter.blocks == ():
        return "the adapter describes no blocks"
    names = [block.name for block in find_blocks(case.adapter, case.transformer)]
    inputs, count = case.inputs(2), len(names)
    plain = [case.run(inputs, step) for step in range(2)]
    for config in (
        ProfilingCache(blocks=(*range(count),), every=1, warmup_steps=0),
        DBPrune(**{**ALWAYS, "threshold": 0.0}),
    ):
        with attach(case.transformer, config), counted(case.transformer, names) as ran:
            require(
                all(torch.equal(case.run(inputs, step), plain[step]) for step in range(2)), f"{config} changed bits"
            )
        require(ran == names * 2, f"{config} ran {ran}")
    everything = tuple(range(count))
    for cached in {everything[:-1], everything[1:2], everything}:
        config = ProfilingCache(blocks=cached, **FROM_STEP_1)
        left = [name for at, name in enumerate(names) if at not in cached]
        _require_skipped(case, config, inputs, plain, names, left)
    _require_skipped(case, DBPrune(**ALWAYS), inputs, plain, names, [])
    if count > 2:
        ends = DBCache(**{**ALWAYS, "first_blocks": 1, "last_blocks": 1})
        _require_skipped(case, ends, inputs, plain, names, [names[0], names[-1]])
    return None


def _require_skipped(
    case: Case, config: StepCacheConfig, inputs: dict[str, Any], plain: list[Tensor], names: list[str], left: list[str]
) -> None:
    """Run two steps and again the first, on inputs that differ by the time alone."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(attach(case.transformer, config))
        except ConfigError as error:
            if "besides its streams" in " ".join(str(error).split()):  # late blocks that take what early ones gave
                return
            raise
        require(torch.equal(case.run(inputs), plain[0]), f"{config} changed the step that is computed")
        with counted(case.transformer, names) as ran:
            reused = case.run(inputs, 1)
        require(ran == left, f"{config} ran {ran} in a step that is reused, not {left}")
        # where the time alone tells the steps apart, the two differ; what is reused may be off by some such steps
        allowed = STEPS_OFF * (plain[0] - plain[1]).abs().max() + ROUNDING * plain[1].abs().max()
        require(bool((reused - plain[1]).abs().max() <= allowed), f"{config} is off by more than {STEPS_OFF} steps")
        require(torch.equal(case.run(inputs), plain[0]), f"a run differs from the first under {config}")
