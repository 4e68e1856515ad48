"""Suites: which arms are compared on which held-out clips of an embedded model, read from versioned TOML files."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel_pipelines.solvers import BEST, SOLVERS

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.caches.native_limits import CONFIGS
from dit_accel.methods.config import MethodConfig, from_dict
from dit_accel.methods.registry import method

from .metrics.registry import check_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUITE_VERSION = 2

NATIVE = "diffusers"
"""Key of an arm under which diffusers' own caches stand, which have no method's table."""

JUDGES = ("longer", "larger", "guidance")
"""How clips may be judged by themselves; see `judges`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One setting under test.

    Attributes:
        name: unique in the suite; the row's name.
        num_inference_steps: denoising steps.
        solver: a name of `SOLVERS`.
        flow_shift: noise shift; None: the model's own.
        methods: what is attached.
        call: arguments of the pipeline's call that differ from the suite's; only where clips are judged by themselves.
    """

    name: str
    num_inference_steps: int
    solver: str = BEST
    flow_shift: float | None = None
    methods: tuple[MethodConfig, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether this is a plain run of the best solver, of which the references are made too."""
        return not self.methods and self.solver == BEST and self.flow_shift is None and not self.call

    def to_dict(self) -> dict[str, Any]:
        """Return what the arm runs, without its name, as JSON knows it."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "solver": self.solver,
            "flow_shift": self.flow_shift,
            "methods": {one.name: one.to_dict() for one in self.methods},
            **({"call": dict(self.call)} if self.call else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A comparison on held-out prompts of an embedded model.

    Attributes:
        name: the suite's name.
        model: name of the embedded model.
        clips: how many held-out clips; a clip's number is its seed.
        arms: what is compared.
        call: arguments of the pipeline's call that differ from the model's defaults.
        metrics: what is measured besides PSNR, SSIM and the judge's score; ``psnr`` and ``ssim`` among them are kept
            by frame.
        first_clip: number of the first.
        judge: one of `JUDGES`, by which clips are judged by themselves; empty: they are held against converged runs.
    """

    name: str
    model: str
    clips: int
    arms: tuple[Arm, ...]
    call: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    first_clip: int = 0
    judge: str = ""

    def plain(self, arm: Arm) -> Arm | None:
        """Return the arm that differs from another only in having no methods."""
        without = {**arm.to_dict(), "methods": {}}
        return next((other for other in self.arms if other is not arm and other.to_dict() == without), None)


def dense_arm(steps: int) -> Arm:
    """Return the dense run of the best solver with so many steps, which others are held against."""
    return Arm(name=f"{BEST} {steps}", num_inference_steps=steps)


def read_suite(path: Path) -> Suite:
    """Read a suite from a TOML file.

    Raises:
        ConfigError: for a missing file, another version, or an unknown or ill-typed key.
    """
    if not path.is_file():
        raise ConfigError(f"no suite at {path}; name a TOML file such as eval/suites/knee-wan-tiny.toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if data.pop("version", None) != SUITE_VERSION:
        raise ConfigError(f"{path} is not of version {SUITE_VERSION}, which this release reads; rewrite it for that")
    arms = data.pop("arm", [])
    kinds = {"name": str, "model": str, "clips": int, "call": dict, "metrics": list, "judge": str, "first_clip": int}
    _check(data, kinds, str(path))
    missing = [key for key in ("name", "model", "clips") if key not in data]
    if missing or not arms:
        raise ConfigError(f"{path} lacks {', '.join(missing) or 'an [[arm]]'}; add what is missing")
    if data["clips"] < 1:
        raise ConfigError(f"{path} has clips = {data['clips']}; ask for 1 or more")
    if data.get("first_clip", 0) < 0:
        raise ConfigError(f"{path} has first_clip = {data['first_clip']}; clips are counted from 0")
    if data.get("judge", "") not in ("", *JUDGES):
        raise ConfigError(f"{path} has no judge {data['judge']!r}; {did_you_mean(data['judge'], JUDGES)}")
    made = tuple(arm for values in arms for arm in _arms(values, path))
    names = [arm.name for arm in made]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path} has two arms called {name!r}; rename one")
    return Suite(**{**data, "metrics": _metrics(data.get("metrics", []), path)}, arms=made)


def _metrics(names: list[Any], path: Path) -> tuple[str, ...]:
    """Return a suite's metrics, by name."""
    try:
        return check_names([str(name) for name in names])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _arms(values: dict[str, Any], path: Path) -> list[Arm]:
    """Return the arms of one table: one, or with a list of steps one for each, with the steps behind the name."""
    if "name" not in values:
        raise ConfigError(f"{path} has an arm without a name: {values}; give it one")
    where = f"{path}: arm {values['name']!r}"
    tables = {key: value for key, value in values.items() if isinstance(value, dict) and key != "call"}
    plain = {key: value for key, value in values.items() if key not in tables}
    kinds = {"name": str, "num_inference_steps": (int, list), "solver": str, "flow_shift": (int, float), "call": dict}
    _check(plain, kinds, where)
    steps = plain.pop("num_inference_steps", None)
    several = steps if isinstance(steps, list) else [steps]
    if not several or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in several):
        raise ConfigError(f"{where} has num_inference_steps = {steps}; give one or several whole numbers from 1")
    if plain.get("solver", BEST) not in SOLVERS:
        raise ConfigError(f"{where} has no solver {plain['solver']!r}; {did_you_mean(plain['solver'], SOLVERS)}")
    try:
        methods = tuple(
            one for key, value in tables.items()
            for one in (_natives(value) if key == NATIVE else [from_dict(method(key), value)])
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    name = plain.pop("name")
    arms = []
    for count in several:
        full = f"{name} {count}" if isinstance(steps, list) else name
        arm = Arm(name=full, num_inference_steps=count, methods=methods, **plain)
        if arm.is_dense != _is_dense_name(full) or (arm.is_dense and full != dense_arm(count).name):
            raise ConfigError(
                f"{where} is called {full!r}, but dense runs of {BEST}, and they alone, are called '{BEST} STEPS'; "
                "rename it"
            )
        arms.append(arm)
    return arms


def _natives(tables: Mapping[str, Any]) -> list[MethodConfig]:
    """Return diffusers' own caches, given as ``diffusers = { FirstBlockCacheConfig = { threshold = 0.05 } }``."""
    import diffusers

    made = []
    for name, options in tables.items():
        if name not in CONFIGS:
            raise ConfigError(f"diffusers has no cache {name!r}; {did_you_mean(name, CONFIGS)}")
        if not isinstance(options, dict):
            raise ConfigError(f"{name} = {options!r} is no table; write {name} = {{}} or options in the braces")
        known = [one.name for one in dataclasses.fields(getattr(diffusers, name))]
        for option in options:
            if option not in known:
                raise ConfigError(f"{name} has no option {option!r}; {did_you_mean(option, known)}")
        made.append(DiffusersCache(config=getattr(diffusers, name)(**options)))
    return made


def _is_dense_name(name: str) -> bool:
    solver, _, steps = name.rpartition(" ")
    return solver == BEST and steps.isdigit()


def _check(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Refuse keys that are not known, and values of another kind."""
    for key, value in values.items():
        if key not in kinds:
            raise ConfigError(f"{where} has an unknown key {key!r}; {did_you_mean(key, kinds)}")
        if isinstance(value, bool) or not isinstance(value, kinds[key]):
            raise ConfigError(f"{where} has {key} = {value!r}, which is of the wrong kind")
