"""Suites: which arms are compared on which prompts and seeds of a model, read from versioned TOML files.

A suite is held against fewer steps of one solver at the model's own noise shift, unless it names a ladder of rivals,
``rivals = "../results/rivals-wan-tiny.toml"``: at each number of steps the dense run that came nearest on clips kept
for choosing. `eval/studies/best_rival.py` makes them.
"""

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.request import DTYPES, Dtype, read_prompts
from dit_accel_pipelines.generation.solvers import BEST, SOLVERS, check_solver

from dit_accel import ConfigError
from dit_accel.adapters.embedded import assets, embedded_names
from dit_accel.errors import did_you_mean

from ..metrics.registered import check_names
from ..protocol import USES, prompts_in_order
from ..runs.loaded import OwnClips
from ..runs.model import OWN, ModelRun, SuiteModel
from ..runs.results import TUNED, Line
from .arms import Arm, check_kinds, dense_arm, read_arms, read_table

LADDER_VERSION = 1

LADDER_KINDS = {
    "model": str, "first_clip": int, "clips": int, "reference_steps": int, "call": dict, "rung": list,
    "confirmed_on": list,
}  # fmt: skip
"""Key of a ladder of rivals -> what it must be."""

RUNG_KINDS = {
    "num_inference_steps": int, "solver": str, "flow_shift": (int, float), "psnr": float, "tried": dict,
    "confirming": dict,
}  # fmt: skip
"""Key of a rung -> what it must be."""

LOOSE = 0.5  # decibels below the best of those that ran on the confirming clips, beyond which a rung is not confirmed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """The best dense run of so many steps."""

    num_inference_steps: int
    solver: str
    psnr: float
    flow_shift: float | None = None
    tried: Mapping[str, float] = field(default_factory=dict)  # solver and shift in words -> the mean PSNR of each run
    # of the best of these, over clips that did not choose
    confirming: Mapping[str, float] = field(default_factory=dict)

    @property
    def best_elsewhere(self) -> tuple[str, float] | None:
        """What came nearest on the confirming clips, and its mean PSNR there; None: nothing ran there."""
        return max(self.confirming.items(), key=lambda item: item[1]) if self.confirming else None

    @property
    def confirmed(self) -> bool:
        """Whether prompts that did not choose the rung find none that is better by more than `LOOSE`."""
        psnr, best = self.confirming.get(setting_words(self.solver, self.flow_shift)), self.best_elsewhere
        return psnr is not None and best is not None and psnr >= best[1] - LOOSE

    def __str__(self) -> str:
        return f"{self.num_inference_steps} {setting_words(self.solver, self.flow_shift)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """What the arms of a suite are held against: rungs by steps, chosen on so many held-out clips of a model."""

    model: str
    first_clip: int
    clips: int
    rungs: tuple[Rung, ...]
    reference_steps: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    confirmed_on: tuple[int, ...] = ()

    @property
    def loose(self) -> str:
        """Which rungs other prompts do not confirm, in a sentence; "" where they confirm all."""
        steps = [str(rung.num_inference_steps) for rung in self.rungs if not rung.confirmed]
        return f"Not confirmed on prompts that did not choose: the rungs of {', '.join(steps)} steps." if steps else ""

    def arm(self, steps: int) -> Arm:
        """Return the dense run of so many steps, by the rung of the nearest number of them, of two alike the lower."""
        rung = min(self.rungs, key=lambda rung: abs(math.log(rung.num_inference_steps / steps)))
        return Arm(name=f"{TUNED} {steps}", num_inference_steps=steps, solver=rung.solver, flow_shift=rung.flow_shift)

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.rungs))}, chosen on clips {clip_words(self.first_clip, self.clips)}"


def setting_words(solver: str, flow_shift: float | None) -> str:
    """Return a solver and a noise shift in words, None: the model's own."""
    return solver if flow_shift is None else f"{solver} shift {flow_shift:g}"


def clip_words(first: int, count: int) -> str:
    """Return a range of clips in words."""
    return str(first) if count == 1 else f"{first} to {first + count - 1}"


def read_ladder(path: Path) -> Ladder:
    """Read a ladder of rivals."""
    remedy = "no rivals at {}; make them with python eval/studies/best_rival.py, or leave rivals out"
    data = read_table(path, LADDER_VERSION, LADDER_KINDS, remedy)
    missing = [key for key in ("model", "first_clip", "clips", "rung") if data.get(key) in (None, [])]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; make it anew with best_rival.py")
    for rung in data["rung"]:
        check_kinds(rung, RUNG_KINDS, str(path))
        if not {"num_inference_steps", "solver", "psnr"} <= {*rung} or rung["num_inference_steps"] < 1:
            raise ConfigError(f"{path} has a rung {dict(rung)}, which needs steps from 1, solver and psnr; correct it")
        try:
            check_solver(rung["solver"])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    rungs = tuple(Rung(**rung) for rung in data.pop("rung"))
    return Ladder(**{**data, "confirmed_on": tuple(data.get("confirmed_on", ()))}, rungs=rungs)


SUITE_VERSION = 2
MANY = 10  # arms of a suite beyond which it says that their number makes verdicts harder to reach

KINDS = {
    **dict.fromkeys(("name", "model", "prompt_file", "dtype", "judge", "rivals", "reference_solver"), str),
    **dict.fromkeys(("clips", "first_clip", "reference_steps", "warmup", "repeats"), int),
    **dict.fromkeys(("seeds", "metrics", "chosen_on", "compare", "arm"), list),
    **{"call": dict, "timed": bool, "prompts": (list, str)},
}
"""Key of a suite -> what it must be."""

LEAST = {"clips": 1, "first_clip": 0, "reference_steps": 1, "warmup": 0, "repeats": 1}  # of a suite's keys
PAIR_KINDS = {"arm": str, "against": str, "margin": (int, float)}  # key of a pair -> what it must be


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A ``[[compare]]`` of a suite: an arm, what it is held against, and by how many dB it is to be ahead."""

    arm: str
    against: str
    margin: float = 0.0

    def __str__(self) -> str:
        return f"{self.arm} vs {self.against}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A comparison on prompts and seeds of a model."""

    name: str
    model: str
    clips: int
    arms: tuple[Arm, ...]
    call: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    first_clip: int = 0
    judge: str = ""  # Python file, from the suite's folder, that judges clips by themselves; empty: converged runs do
    reference_steps: int | None = None  # of the model's own dense run that is the reference; None: the converged run
    reference_solver: str = BEST
    folder: Path = Path()
    own: OwnClips | None = None
    dtype: Dtype | None = None
    warmup: int = 0
    repeats: int = 1
    timed: bool | None = None  # whether seconds count; None: as the command says, and a processor's on a CPU
    ladder: Ladder | None = None  # dense runs that arms are held against; None: the best solver's, at the model's shift
    chosen_on: tuple[int, int] | None = None  # first and last held-out clip on which the arms' options were chosen
    pairs: tuple[Pair, ...] = ()

    @property
    def embedded(self) -> bool:
        """Whether the model ships with the project."""
        return self.model in embedded_names()

    @property
    def source(self) -> str:
        """Return what diffusers loads of a model: a folder, beside the file if it is there, or a hub id."""
        if self.embedded:
            return str(assets().model_path(self.model))
        beside = self.folder / Path(self.model).expanduser()
        return str(beside) if beside.is_dir() else self.model

    def rival(self, steps: int) -> Arm:
        """Return the dense run of so many steps, which arms are held against."""
        if self.ladder:
            return self.ladder.arm(steps)
        if self.reference_solver == BEST:
            return dense_arm(steps)
        return Arm(name=f"{TUNED} {steps}", num_inference_steps=steps, solver=self.reference_solver)

    @property
    def many(self) -> str | None:
        """What to know of a suite of many arms, None of others."""
        count = sum(not arm.is_dense for arm in self.arms)
        if count <= MANY:
            return None
        why = "each must stand after Holm's correction over all of them"
        return f"{self.name} has {count} arms, more than {MANY}: {why}, so name the few that matter beforehand"


def read_suite(path: Path) -> Suite:
    """Read a suite from a TOML file."""
    remedy = "no suite at {}; name a TOML file such as eval/suites/knee-wan-tiny.toml"
    data = read_table(path, SUITE_VERSION, KINDS, remedy)
    arms = data.pop("arm", [])
    clips = _own_clips(data, path)
    data |= {"clips": len(clips)} if clips is not None else {}
    missing = [key for key in ("name", "model", "clips") if key not in data]
    if missing or not arms:
        or_prompts = ", or prompts = [...] of your own" if missing == ["clips"] else ""
        raise ConfigError(f"{path} lacks {', '.join(missing) or 'an [[arm]]'}{or_prompts}; add what is missing")
    for key, least in LEAST.items():
        if data.get(key, least) < least:
            raise ConfigError(f"{path} has {key} = {data[key]}; ask for {least} or more")
    chosen = data.get("chosen_on", [0, 0])
    if [type(bound) for bound in chosen] != [int, int] or not 0 <= chosen[0] <= chosen[1]:
        raise ConfigError(f"{path} has chosen_on = {data['chosen_on']}; give the first and the last clip, as [0, 15]")
    judge = data.get("judge")
    if judge and not (judge.endswith(".py") and (path.parent / judge).is_file()):
        raise ConfigError(f"{path} has judge {judge!r}, which is no Python file in or from {path.parent}; name one")
    listed, pairs, rivals = read_arms(arms, path), data.pop("compare", []), data.pop("rivals", None)
    solver = data.get("reference_solver", BEST)
    if solver not in (*SOLVERS, OWN):
        raise ConfigError(f"{path} has no reference_solver {solver!r}; {did_you_mean(solver, (*SOLVERS, OWN))}")
    if "reference_solver" in data and "reference_steps" not in data:
        raise ConfigError(f"{path} has reference_solver without reference_steps; the converged run is {BEST}'s")
    try:
        data["metrics"] = check_names([str(name) for name in data.get("metrics", [])])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    data |= {"chosen_on": tuple(chosen)} if "chosen_on" in data else {}
    suite = Suite(
        **data, arms=listed, own=clips, folder=path.parent, pairs=read_pairs(pairs, listed, str(path)) if pairs else (),
        ladder=read_ladder(path.parent / rivals) if rivals else None,
    )  # fmt: skip
    _check_model(suite, path)
    _check_judging(suite, path)
    return suite


def read_pairs(tables: Sequence[Any], arms: Sequence[Arm], where: str) -> tuple[Pair, ...]:
    """Return the pairs of a suite's ``[[compare]]`` tables."""
    names, pairs = [arm.name for arm in arms], list[Pair]()
    for values in tables:
        if not isinstance(values, dict):
            raise ConfigError(f"{where} has compare = {values!r}; write [[compare]] with arm and against below it")
        check_kinds(values, PAIR_KINDS, f"{where}: compare")
        missing = [key for key in ("arm", "against") if key not in values]
        if missing:
            raise ConfigError(f"{where} has a [[compare]] without {' and '.join(missing)}; name two of its arms")
        pair = Pair(**values)
        for name in (pair.arm, pair.against):
            if name not in names:
                raise ConfigError(f"{where} compares {name!r}, which is none of its arms; {did_you_mean(name, names)}")
        if pair.arm == pair.against or str(pair) in map(str, pairs):
            raise ConfigError(f"{where} compares {pair.arm!r} with {pair.against!r}, itself or a second time; drop it")
        pairs.append(pair)
    return tuple(pairs)


def _check_judging(suite: Suite, path: Path) -> None:
    """Refuse clips that both choose and judge, and rivals and pairs that do not go with the suite."""
    judging = range(suite.first_clip, suite.first_clip + suite.clips)
    ladder, (first, last) = suite.ladder, suite.chosen_on or (0, -1)
    choosing = {"its arms (chosen_on)": range(first, last + 1)}
    choosing |= {"its rivals": range(ladder.first_clip, ladder.first_clip + ladder.clips)} if ladder else {}
    for what, clips in choosing.items():
        if suite.own is None and {*clips} & {*judging}:
            ours, others = clip_words(suite.first_clip, suite.clips), clip_words(clips.start, len(clips))
            both = f"judges on clips {ours}, and {what} were chosen on clips {others}"
            raise ConfigError(f"{path} {both}; judge on others, by first_clip")
    if suite.judge and (ladder or suite.pairs or suite.timed or suite.reference_steps):
        beside = f"rivals, [[compare]], timed or reference_steps beside judge = {suite.judge!r}"
        raise ConfigError(f"{path} has {beside}, which holds clips against no reference; leave them out")
    for what in ("model", "reference_steps", "reference_solver", "call") if ladder else ():
        ours, other = getattr(suite, what), getattr(ladder, what, BEST)
        if ours != other:
            remedy = "make rivals for it with best_rival.py"
            raise ConfigError(f"{path} has {what} {ours!r}, and its rivals were chosen with {other!r}; {remedy}")


def _own_clips(data: dict[str, Any], path: Path) -> OwnClips | None:
    """Take the prompts and seeds out of a suite's keys; None where there are none of one's own."""
    file, prompts, seeds = (data.pop(key, None) for key in ("prompt_file", "prompts", "seeds"))
    if file is None and prompts is None:
        if seeds is not None:
            raise ConfigError(f"{path} has seeds but no prompts; add prompts = [...]: held-out clips have their seeds")
        return None
    if file is not None and prompts is not None:
        raise ConfigError(f"{path} has prompts and a prompt_file; give one of them")
    counted = [key for key in ("clips", "first_clip") if key in data]
    if counted:
        raise ConfigError(f"{path} has {' and '.join(counted)} beside prompts, which all run; leave them out")
    try:
        if isinstance(prompts, str):
            if prompts not in USES:
                raise ConfigError(f"the protocol has no prompts {prompts!r}; {did_you_mean(prompts, USES)}")
            prompts = prompts_in_order(prompts)
        listed = tuple(prompts or ()) if file is None else read_prompts(path.parent / file, "prompt_file")
        return OwnClips(prompts=listed, seeds=tuple(seeds or ()))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _check_model(suite: Suite, path: Path) -> None:
    """Refuse what only embedded models have, and what they have not."""
    if suite.dtype is not None and suite.dtype not in DTYPES:
        raise ConfigError(f"{path} has no dtype {suite.dtype!r}; {did_you_mean(suite.dtype, DTYPES)}")
    if suite.embedded and suite.dtype not in (None, "float32"):
        raise ConfigError(f"{path} has dtype {suite.dtype!r}, and {suite.model} runs in float32; leave it out")
    if suite.judge and (suite.own or not suite.embedded):
        raise ConfigError(f"{path} has judge = {suite.judge!r}, which knows held-out prompts alone; leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """How clips are judged by themselves, by functions of these names in a suite's file."""

    measures: Callable[[SuiteModel, int, ModelRun], Line]  # of a clip's number and run; ``score`` is among what it says
    table: Callable[[Suite, Sequence[Line]], str]


def judge_of(suite: Suite) -> Judge:
    """Return the judge of a suite that has one."""
    path = (suite.folder / suite.judge).resolve()
    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:  # whatever a file of one's own raises
        raise ConfigError(f"the judge {path} can't be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    if Path(module.__file__ or "").resolve() != path:
        raise ConfigError(f"the judge {path} has the name of the module {module.__file__}; rename it")
    functions: dict[str, Any] = {name: getattr(module, name, None) for name in Judge.__dataclass_fields__}
    for name, function in functions.items():
        if not callable(function):
            raise ConfigError(f"the judge {path} has no function {name}; see Judge in {__name__}")
    return Judge(**functions)
