"""The settings among which `tune pipeline` looks, `space.toml`: those that a model takes, by numbers of steps."""

import dataclasses
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.solvers import is_flow, shift_of

from dit_accel import MagCache, TeaCache
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.embedded import assets
from dit_accel.adapters.model_files import read_model_files
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.verdicts import refused_by

from ..runs.model import shipped_scheduler
from ..suites.arms import Arm, dense_arm, read_arms

SPACE = Path(__file__).with_name("space.toml")

STEPS = (4, 5, 6, 8, 10, 12, 14, 16, 20)  # denoising steps that are tried; a model's own number is added
LARGER = (0.5, 0.6, 0.8)  # shares of a model's own number that are tried too, where that is far beyond `STEPS`
CALIBRATED = (TeaCache, MagCache)  # caches that are tried where their numbers are known for the model
EMBEDDED_TILES = 16  # tokens of a tile on embedded models; others have what the methods choose by themselves


def _tables() -> list[dict[str, Any]]:
    return tomllib.loads(SPACE.read_text(encoding="utf-8"))["arm"]


BY_HAND = frozenset(f"{table['name']} {steps}" for table in _tables() for steps in table.get("by_hand", ()))
"""Names of the settings that the search always runs."""


def default_space(model: str) -> tuple[Arm, ...]:
    """Return the settings that are tried on an embedded model where a user names none."""
    source, own = str(assets().model_path(model)), int(assets().model_defaults(model)["num_inference_steps"])
    return space_of(own, *read_model_files(source).identify(), scheduler=shipped_scheduler(source), tile=EMBEDDED_TILES)


def space_of(
    own: int, adapter: Adapter, family: Family, *, scheduler: Any = None, tile: int | None = None
) -> tuple[Arm, ...]:
    """Return the settings that are tried on a model: what it takes, without `ProfilingCache`, which takes a profile."""
    further = [round(share * own) for share in LARGER] if own > max(STEPS) else []
    usual = {*STEPS, *further, own}
    refused = refused_by(adapter)
    shifts = scheduler is not None and is_flow(scheduler.config)

    def taken(arm: Arm) -> bool:
        if arm.flow_shift is not None and not (shifts and arm.flow_shift != shift_of(scheduler)):
            return False
        known = (config.name in family.recipes or not isinstance(config, CALIBRATED) for config in arm.methods)
        return all(known) and not any(config.name in refused for config in arm.methods)

    arms = [dense_arm(steps) for steps in usual]
    arms += [dataclasses.replace(arm, methods=tuple(_tiled(arm.methods, tile))) for arm in _arms(usual) if taken(arm)]
    return tuple(sorted(arms, key=lambda arm: arm.num_inference_steps))


def _arms(usual: set[int]) -> tuple[Arm, ...]:
    """Return all settings, each with the usual numbers of steps from its first on, and those of README.md."""
    tables = _tables()
    for table in tables:
        first = table.pop("from", 0)
        steps = {*table.pop("by_hand", ()), *(count for count in usual if count >= first)}
        table["num_inference_steps"] = sorted(steps)
    return read_arms(tables, SPACE)


def _tiled(methods: tuple[MethodConfig, ...], tile: int | None) -> Iterator[MethodConfig]:
    for method in methods:
        sized = tile is not None and isinstance(method, SparseConfig)
        yield dataclasses.replace(method, block_size=tile) if sized else method
