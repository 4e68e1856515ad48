"""The settings among which `tune pipeline` looks: solvers, steps, caches and sparse attention, alone and together."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dit_accel_assets import model_defaults
from dit_accel_pipelines.solvers import BEST

from dit_accel import EasyCache, FirstBlockCache, LiteAttention, MagCache, SolAttention, StaticCache
from dit_accel.adapters.registry import family
from dit_accel.methods.config import MethodConfig

from .arms import Arm, dense_arm

STEPS = (4, 5, 6, 8, 10, 12, 14, 16, 20)
"""Denoising steps that are tried; a model's own number is added."""

LARGER = (0.5, 0.6, 0.8)
"""Shares of a model's own number that are tried too, for models whose own is far beyond `STEPS`."""

CACHED_FROM = 12
"""Steps from which a cache has some to skip: with fewer, embedded models change too much from one to the next."""

FORECAST = "taylor"
SOL = SolAttention(beta=0.46)
LITE = LiteAttention(threshold=-6.0, rest="pooled")

EMBEDDED_TILES = 16
"""Tokens of a tile on embedded models; others have what the methods choose by themselves."""


def default_space(model: str) -> tuple[Arm, ...]:
    """Return the settings that are tried on an embedded model where a user names none."""
    own = int(model_defaults(model)["num_inference_steps"])
    return space_of(own, measured="magcache" in family(model).recipes, block_size=EMBEDDED_TILES)


def space_of(own: int, *, measured: bool, block_size: int | None = None) -> tuple[Arm, ...]:
    """Return the settings that are tried on a model.

    Args:
        own: the model's own number of steps.
        measured: whether MagCache's ratios are known for it.
        block_size: tokens of a sparse method's tile; None: what that chooses.
    """
    tiles = {} if block_size is None else {"block_size": block_size}
    sparse = dataclasses.replace(SOL, **tiles), dataclasses.replace(LITE, **tiles)
    further = [round(share * own) for share in LARGER] if own > max(STEPS) else []
    return tuple(arm for steps in sorted({*STEPS, *further, own}) for arm in _arms(steps, *sparse, measured=measured))


def guided_space(arms: Iterable[Arm], calls: Mapping[str, Mapping[str, Any]]) -> tuple[Arm, ...]:
    """Return arms, and each of them with other guidance.

    Args:
        arms: settings with the run's own guidance.
        calls: words behind an arm's name -> the arguments of the call that guide so.
    """
    listed = tuple(arms)
    return listed + tuple(
        dataclasses.replace(arm, name=f"{arm.name}, {words}", call=call)
        for words, call in calls.items()
        for arm in listed
    )


def _arms(steps: int, sol: SolAttention, lite: LiteAttention, *, measured: bool) -> Iterator[Arm]:
    yield dense_arm(steps)
    for solver in ("dpm++", "euler"):
        yield Arm(name=f"{solver} {steps}", num_inference_steps=steps, solver=solver)
    yield _arm("sol 0.46", steps, sol)
    if steps < CACHED_FROM:
        return
    for threshold in (0.05, 0.08, 0.1, 0.15):
        yield _arm(f"easycache {threshold}", steps, EasyCache(threshold=threshold, predictor=FORECAST))
    yield _arm("easycache hold 0.08", steps, EasyCache(threshold=0.08, predictor="hold"))
    for threshold in (0.06, 0.12) if measured else ():
        yield _arm(f"magcache {threshold}", steps, MagCache(threshold=threshold, predictor=FORECAST))
    for threshold in (0.1, 0.2):
        yield _arm(f"firstblockcache {threshold}", steps, FirstBlockCache(threshold=threshold, predictor=FORECAST))
    yield _arm("staticcache every 2", steps, StaticCache(every=2, predictor=FORECAST))
    for name, sparse in (("sol 0.46", sol), ("lite pooled", lite)):
        yield _arm(f"{name} + easycache 0.1", steps, sparse, EasyCache(threshold=0.1, predictor=FORECAST))


def _arm(name: str, steps: int, *methods: MethodConfig) -> Arm:
    return Arm(name=f"{name} {steps}", num_inference_steps=steps, solver=BEST, methods=methods)
