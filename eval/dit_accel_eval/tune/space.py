"""The settings among which `tune pipeline` looks: solvers, steps, caches and sparse attention, alone and together."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dit_accel_assets import model_defaults, model_path
from dit_accel_pipelines.generation.solvers import BEST

from dit_accel import (
    DFA,
    DBCache,
    DBPrune,
    EasyCache,
    FirstBlockCache,
    LiteAttention,
    MagCache,
    RadialAttention,
    SolAttention,
    SparseD,
    StaticCache,
    TeaCache,
)
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.model_files import read_model_files
from dit_accel.methods.config import MethodConfig

from ..suites.arms import Arm, dense_arm

STEPS = (4, 5, 6, 8, 10, 12, 14, 16, 20)
"""Denoising steps that are tried; a model's own number is added."""

LARGER = (0.5, 0.6, 0.8)
"""Shares of a model's own number that are tried too, for models whose own is far beyond `STEPS`."""

CACHED_FROM = 12
"""Steps from which a cache has some to skip: with fewer, embedded models change too much from one to the next."""

FORECAST = "taylor"
ALONE: Mapping[str, MethodConfig] = {
    "sol 0.46": SolAttention(beta=0.46),
    "sparsed 0.5 pooled": SparseD(density=0.5, rest="pooled"),
    "radial pooled": RadialAttention(rest="pooled"),
    "lite pooled": LiteAttention(threshold=-6.0, rest="pooled"),
}
"""Sparse attention that is tried by itself; what a name says is what is set, the rest is the model's own."""

CACHED: Mapping[str, MethodConfig] = {name: ALONE[name] for name in ("sol 0.46", "lite pooled", "sparsed 0.5 pooled")}
"""Sparse attention that is tried with a cache."""

CACHES: Mapping[str, MethodConfig] = {
    **{f"easycache {at}": EasyCache(threshold=at, predictor=FORECAST) for at in (0.05, 0.08, 0.1, 0.15)},
    **{f"easycache hold {at}": EasyCache(threshold=at, predictor="hold") for at in (0.08, 0.1)},
    **{f"teacache {at}": TeaCache(threshold=at, predictor=FORECAST) for at in (0.1, 0.2)},
    **{f"magcache {at}": MagCache(threshold=at, predictor=FORECAST) for at in (0.06, 0.12)},
    **{f"firstblockcache {at}": FirstBlockCache(threshold=at, predictor=FORECAST) for at in (0.1, 0.2)},
    "dbcache 2 blocks 0.1": DBCache(threshold=0.1, first_blocks=2, predictor=FORECAST),
    "dbprune 0.1": DBPrune(threshold=0.1, predictor=FORECAST),
    "staticcache every 2": StaticCache(every=2, predictor=FORECAST),
    "dfa every 2": DFA(every=2),
}
"""Caches that are tried by themselves, DFA among them, whose background keeps its attention output."""

BY_HAND = (
    "easycache 0.05 30", "easycache 0.1 30", "easycache hold 0.1 14", "easycache hold 0.08 12", "easycache 0.08 16",
    "lite pooled + easycache 0.1 16", "magcache 0.12 14", "firstblockcache 0.2 14", "lite pooled 12",
)  # fmt: skip
"""The settings of README.md, which the search always runs: what it chooses is no worse than the best of them."""

CALIBRATED = (TeaCache, MagCache)
"""Caches that are tried where their numbers are known for the model."""

EMBEDDED_TILES = 16
"""Tokens of a tile on embedded models; others have what the methods choose by themselves."""


def default_space(model: str) -> tuple[Arm, ...]:
    """Return the settings that are tried on an embedded model where a user names none."""
    adapter, family = read_model_files(str(model_path(model))).identify()
    own = int(model_defaults(model)["num_inference_steps"])
    return space_of(own, adapter, family, block_size=EMBEDDED_TILES)


def space_of(own: int, adapter: Adapter, family: Family, *, block_size: int | None = None) -> tuple[Arm, ...]:
    """Return the settings that are tried on a model.

    Left out is what the model does not take, and `ProfilingCache`, which takes the blocks that `tune profile` finds.
    Methods beyond the trained size make nothing faster.

    Args:
        own: the model's own number of steps.
        adapter: of its transformer.
        family: its recipes.
        block_size: tokens of a sparse method's tile; None: what that chooses.
    """
    further = [round(share * own) for share in LARGER] if own > max(STEPS) else []

    def taken(method: MethodConfig) -> bool:
        known = method.name in family.recipes or not isinstance(method, CALIBRATED)
        return known and adapter.verdict(method.name)[0] == "supported"

    tiles = {} if block_size is None else {"block_size": block_size}
    usual = {*STEPS, *further, own}
    every = (
        arm
        for steps in sorted(usual | {int(name.rpartition(" ")[2]) for name in BY_HAND})
        for arm in _arms(steps, tiles)
        if steps in usual or arm.name in BY_HAND
    )
    return tuple(arm for arm in every if all(map(taken, arm.methods)))


def guided_space(arms: Iterable[Arm], calls: Mapping[str, Mapping[str, Any]]) -> tuple[Arm, ...]:
    """Return arms, and each with other guidance, by words behind its name -> the arguments of the call."""
    listed = tuple(arms)
    return listed + tuple(
        dataclasses.replace(arm, name=f"{arm.name}, {words}", call=call)
        for words, call in calls.items()
        for arm in listed
    )


def _arms(steps: int, tiles: Mapping[str, int]) -> Iterator[Arm]:
    yield dense_arm(steps)
    for solver in ("dpm++", "euler"):
        yield Arm(name=f"{solver} {steps}", num_inference_steps=steps, solver=solver)
    for name, sparse in ALONE.items():
        yield _arm(name, steps, dataclasses.replace(sparse, **tiles))
    if steps < CACHED_FROM:
        return
    for name, cache in CACHES.items():
        yield _arm(name, steps, cache)
    for name, sparse in CACHED.items():
        both = dataclasses.replace(sparse, **tiles), EasyCache(threshold=0.1, predictor=FORECAST)
        yield _arm(f"{name} + easycache 0.1", steps, *both)


def _arm(name: str, steps: int, *methods: MethodConfig) -> Arm:
    return Arm(name=f"{name} {steps}", num_inference_steps=steps, solver=BEST, methods=methods)
