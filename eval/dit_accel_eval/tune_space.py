"""The settings among which `tune pipeline` looks: solvers, steps, caches and sparse attention, alone and together."""

from collections.abc import Iterator

from dit_accel_assets import model_defaults

from dit_accel import EasyCache, FirstBlockCache, SolAttention, StaticCache
from dit_accel.methods.config import MethodConfig

from .solvers import BEST
from .suite import Arm, dense_arm

STEPS = (4, 5, 6, 8, 10, 12, 14, 16, 20, 24)
"""Denoising steps that are tried; a model's own number is added."""

CACHED_FROM = 8
"""Steps from which a cache has some to skip."""

FORECAST = "taylor"


def default_space(model: str) -> tuple[Arm, ...]:
    """Return the settings that are tried on an embedded model where a user names none."""
    own = int(model_defaults(model)["num_inference_steps"])
    return tuple(arm for steps in sorted({*STEPS, own}) for arm in _arms(steps))


def _arms(steps: int) -> Iterator[Arm]:
    yield dense_arm(steps)
    for solver in ("dpm++", "euler"):
        yield Arm(name=f"{solver} {steps}", num_inference_steps=steps, solver=solver)
    sparse = SolAttention(beta=0.46, block_size=16)
    yield _arm("sol 0.46", steps, sparse)
    if steps < CACHED_FROM:
        return
    for threshold in (0.02, 0.05, 0.1):
        yield _arm(f"easycache {threshold}", steps, EasyCache(threshold=threshold, predictor=FORECAST))
    yield _arm("firstblockcache 0.05", steps, FirstBlockCache(threshold=0.05, predictor=FORECAST))
    yield _arm("staticcache every 2", steps, StaticCache(every=2, predictor=FORECAST))
    yield _arm("sol 0.46 + easycache 0.05", steps, sparse, EasyCache(threshold=0.05, predictor=FORECAST))


def _arm(name: str, steps: int, *methods: MethodConfig) -> Arm:
    return Arm(name=f"{name} {steps}", num_inference_steps=steps, solver=BEST, methods=methods)
