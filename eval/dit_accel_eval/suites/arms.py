"""The arms of a suite: what is attached, how many steps of which solver or scheduler, and which guider."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.solvers import BEST, SOLVERS

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean
from dit_accel.estimate.sizes import check_steps
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.caches.native_limits import CONFIGS
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.registry import method

from ..runs.model import OWN, check_options, check_scheduler
from ..runs.results import TUNED
from ..runs.rivals import SERVERS, check_rival
from ..runs.servers import KINDS, Server

NATIVE = "diffusers"  # key of an arm under which diffusers' own caches stand, which have no method's table
TABLES = ("call", "scheduler", "guider", "rival")  # keys of an arm that hold a table and no method


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One setting under test; an empty table leaves things as they are, others are a class's or rival's options."""

    name: str
    num_inference_steps: int
    solver: str = BEST  # a name of `SOLVERS`; `OWN`, the model's scheduler; or a class of diffusers'
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    flow_shift: float | None = None
    guider: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    methods: tuple[MethodConfig, ...] = ()
    rival: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether this is a plain run of the best solver, of which the references are made too."""
        changed = self.methods or self.guider or self.rival or self.call or self.flow_shift is not None
        return not changed and self.solver == BEST

    @property
    def is_served(self) -> bool:
        """Whether a server makes the arm's clips."""
        return not {*self.rival}.isdisjoint(SERVERS)

    def to_dict(self) -> dict[str, Any]:
        """Return what the arm runs, without its name, as JSON knows it."""
        names = ("num_inference_steps", "solver", "flow_shift")
        methods = {config.name: config.to_dict() for config in self.methods}
        return {**{name: getattr(self, name) for name in names}, "methods": methods, **self._tables()}

    def run_options(self) -> dict[str, Any]:
        """Return the arguments with which a model runs this arm; what is as usual is left out."""
        options = {"steps": self.num_inference_steps, "solver": self.solver, "flow_shift": self.flow_shift}
        return {**options, **self._tables(), "methods": self.methods}

    def _tables(self) -> dict[str, Any]:
        return {key: dict(value) for key in TABLES if (value := getattr(self, key))}


def dense_arm(steps: int) -> Arm:
    """Return the dense run of the best solver with so many steps, which others are held against."""
    return Arm(name=f"{BEST} {steps}", num_inference_steps=steps)


def read_arms(tables: Iterable[Mapping[str, Any]], path: Path) -> tuple[Arm, ...]:
    """Return the arms of a suite's ``[[arm]]`` tables, all of different names."""
    arms = {}
    for arm in (arm for values in tables for arm in _arms(values, path)):
        if arm.name in arms:
            raise ConfigError(f"{path} has two arms called {arm.name!r}; rename one")
        arms[arm.name] = arm
    return tuple(arms.values())


def read_table(path: Path, version: int, kinds: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """Return the keys of a TOML file of a version, which it says first."""
    if not path.is_file():
        raise ConfigError(remedy.format(path))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if data.pop("version", None) != version:
        raise ConfigError(f"{path} is not of version {version}, which this release reads; make it anew for that")
    check_kinds(data, kinds, str(path))
    return data


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Refuse keys that are not known, and values of another kind."""
    for key, value in values.items():
        if key not in kinds:
            raise ConfigError(f"{where} has an unknown key {key!r}; {did_you_mean(key, kinds)}")
        if isinstance(value, bool) != (kinds[key] is bool) or not isinstance(value, kinds[key]):
            raise ConfigError(f"{where} has {key} = {value!r}, which is of the wrong kind")


def _arms(values: Mapping[str, Any], path: Path) -> list[Arm]:
    """Return the arms of one table: one, or with a list of steps one for each, with the steps behind the name."""
    if "name" not in values:
        raise ConfigError(f"{path} has an arm without a name: {values}; give it one")
    where = f"{path}: arm {values['name']!r}"
    tables = {key: value for key, value in values.items() if isinstance(value, dict) and key not in TABLES}
    plain = {key: value for key, value in values.items() if key not in tables}
    kinds = {"name": str, "num_inference_steps": (int, list), "solver": str, "flow_shift": (int, float)}
    check_kinds(plain, {**kinds, **dict.fromkeys(TABLES, dict)}, where)
    steps = plain.pop("num_inference_steps", None)
    several = steps if isinstance(steps, list) else [steps]
    if not several or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in several):
        raise ConfigError(f"{where} has num_inference_steps = {steps}; give one or several whole numbers from 1")
    try:
        check_steps(max(several))
        methods = tuple(
            config for key, value in tables.items()
            for config in (_natives(value) if key == NATIVE else [method(key)(**value)])
        )  # fmt: skip
        plain |= _solver(plain)
        _check_tables(plain, methods)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    name, arms = plain.pop("name"), list[Arm]()
    for count in several:
        full = f"{name} {count}" if isinstance(steps, list) else name
        arms.append(Arm(name=full, num_inference_steps=count, methods=methods, **plain))
        _check_name(arms[-1], where)
    return arms


def _check_name(arm: Arm, where: str) -> None:
    """Refuse a dense run of the best solver that has a name of its own, and another arm that has such a run's name."""
    dense = dense_arm(arm.num_inference_steps).name
    if arm.is_dense and arm.name != dense:
        plain = f"has no method, and {BEST} (the default) as its solver: a plain run, which others are compared with"
        raise ConfigError(f"{where} {plain}; call it {dense!r}, or leave it out: those that are needed are made")
    solver, _, steps = arm.name.rpartition(" ")
    if not arm.is_dense and solver in (BEST, TUNED) and steps.isdigit():
        taken = f"a name of runs of {BEST} without a method, or of a ladder of rivals"
        raise ConfigError(f"{where} is called {arm.name!r}, {taken}; give it another name")


def _solver(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return an arm's solver, and the options where one of diffusers' classes was named."""
    if "scheduler" not in plain:
        solver = plain.get("solver", BEST if {*plain.get("rival", {})}.isdisjoint(SERVERS) else OWN)
        if solver not in (*SOLVERS, OWN):
            raise ConfigError(f"there is no solver {solver!r}; {did_you_mean(solver, (*SOLVERS, OWN))}")
        return {"solver": solver}
    beside = [key for key in ("solver", "flow_shift") if key in plain]
    if beside:
        raise ConfigError(f"scheduler stands beside {' and '.join(beside)}; put a scheduler's options in its braces")
    name, options = _one_class(plain["scheduler"], "scheduler", "UniPCMultistepScheduler")
    check_scheduler(name, options)
    return {"solver": name, "scheduler": options}


def _one_class(table: Mapping[str, Any], key: str, example: str) -> tuple[str, dict[str, Any]]:
    """Return the class that a table names, and its options."""
    if len(table) != 1 or not all(isinstance(options, dict) for options in table.values()):
        raise ConfigError(f"{key} = {table!r} does not name one class; write {key} = {{ {example} = {{}} }}")
    return next(iter(table.items()))


def _check_tables(plain: Mapping[str, Any], methods: tuple[MethodConfig, ...]) -> None:
    """Refuse what is none of diffusers' guiders or no rival, an option that it has not, and methods beside a rival."""
    if plain.get("guider"):
        import diffusers

        known = [entry for entry in dir(diffusers) if entry.endswith("Guidance") and entry != "BaseGuidance"]
        check_options("guider", *_one_class(plain["guider"], "guider", "ClassifierFreeGuidance"), known)
    if plain.get("rival"):
        name, options = _one_class(plain["rival"], "rival", "cache-dit")
        beside = [method.name for method in methods]
        if name in SERVERS:
            check_kinds(options, KINDS, f"rival = {name}")
            Server.of(plain["rival"])
            beside += [key for key in ("solver", "flow_shift", "guider") if plain.get(key, OWN) != OWN]
        else:
            check_rival(name, options)
        if beside:
            raise ConfigError(f"rival = {name} stands beside {beside[0]}; give each an arm of its own")


def _natives(tables: Mapping[str, Any]) -> list[MethodConfig]:
    """Return diffusers' own caches, given as ``diffusers = { FirstBlockCacheConfig = { threshold = 0.05 } }``."""
    import diffusers

    for name, options in tables.items():
        if not isinstance(options, dict):
            raise ConfigError(f"{name} = {options!r} is no table; write {name} = {{}} or options in the braces")
        check_options("cache", name, options, CONFIGS)
    return [DiffusersCache(config=getattr(diffusers, name)(**options)) for name, options in tables.items()]
