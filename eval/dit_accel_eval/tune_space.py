"""The settings among which `tune pipeline` looks: solvers, steps, caches and sparse attention, alone and together."""

from collections.abc import Iterator

from dit_accel_assets import model_defaults
from dit_accel_pipelines.solvers import BEST

from dit_accel import EasyCache, FirstBlockCache, LiteAttention, MagCache, SolAttention, StaticCache
from dit_accel.adapters.registry import family
from dit_accel.methods.config import MethodConfig

from .arms import Arm, dense_arm

STEPS = (4, 5, 6, 8, 10, 12, 14, 16, 20)
"""Denoising steps that are tried; a model's own number is added."""

CACHED_FROM = 12
"""Steps from which a cache has some to skip: with fewer, embedded models change too much from one to the next."""

FORECAST = "taylor"
SOL = SolAttention(beta=0.46, block_size=16)
LITE = LiteAttention(threshold=-6.0, block_size=16, rest="pooled")


def default_space(model: str) -> tuple[Arm, ...]:
    """Return the settings that are tried on an embedded model where a user names none."""
    own = int(model_defaults(model)["num_inference_steps"])
    measured = "magcache" in family(model).recipes
    return tuple(arm for steps in sorted({*STEPS, own}) for arm in _arms(steps, measured=measured))


def _arms(steps: int, *, measured: bool) -> Iterator[Arm]:
    yield dense_arm(steps)
    for solver in ("dpm++", "euler"):
        yield Arm(name=f"{solver} {steps}", num_inference_steps=steps, solver=solver)
    yield _arm("sol 0.46", steps, SOL)
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
    for name, sparse in (("sol 0.46", SOL), ("lite pooled", LITE)):
        yield _arm(f"{name} + easycache 0.1", steps, sparse, EasyCache(threshold=0.1, predictor=FORECAST))


def _arm(name: str, steps: int, *methods: MethodConfig) -> Arm:
    return Arm(name=f"{name} {steps}", num_inference_steps=steps, solver=BEST, methods=methods)
