"""Suites: which arms are compared on which prompts and seeds of a model, read from versioned TOML files."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel_assets import model_names
from dit_accel_pipelines.generation.request import DTYPES, Dtype, read_prompts
from dit_accel_pipelines.generation.solvers import BEST, SOLVERS

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from ..metrics.registered import check_names
from ..runs.conditions import OwnClips
from ..runs.model import OWN
from .arms import TUNED, Arm, check_kinds, dense_arm, read_arms
from .ladder import Ladder, clip_words, read_ladder
from .pairs import Pair, read_pairs

SUITE_VERSION = 2

MANY = 10
"""Arms of a suite beyond which it says that their number makes verdicts harder to reach."""

KINDS = {
    "name": str,
    "model": str,
    "clips": int,
    "first_clip": int,
    "reference_steps": int,
    "reference_solver": str,
    "prompts": list,
    "prompt_file": str,
    "seeds": list,
    "dtype": str,
    "call": dict,
    "metrics": list,
    "judge": str,
    "warmup": int,
    "repeats": int,
    "timed": bool,
    "rivals": str,
    "chosen_on": list,
    "compare": list,
}
"""Key of a suite -> what it must be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A comparison on prompts and seeds of a model.

    Attributes:
        model: name of an embedded model, or as the file names it a folder or hub id of a diffusers pipeline.
        clips: how many; a held-out clip's number is its seed.
        call: arguments of the pipeline's call that differ from the model's defaults.
        metrics: what is measured besides PSNR, SSIM and the judge's score; ``psnr`` and ``ssim`` among them are kept
            by frame.
        judge: Python file, from the suite's folder, by which clips are judged by themselves (`judges`); empty: they are
            held against converged runs.
        reference_steps: the reference is the model's own dense run of so many steps; None: the converged run.
        reference_solver: of that run and of the dense ones of fewer steps: a name of `SOLVERS`, or `OWN`.
        folder: of the file, where a model's folder and a file of prompts are looked for first.
        own: prompts of one's own with their seeds; None: the embedded model's held-out ones.
        dtype: number format of the weights; None: float32, on an accelerator bfloat16; embedded models know but the
            former.
        warmup: runs of every arm in each process that are not counted, before its first.
        repeats: times that each sample is made, whose seconds are given as median and quartiles.
        timed: whether each arm is timed beside the dense run of as many steps, as with ``--time``.
        ladder: the dense runs that arms are held against; None: the best solver's, at the model's own noise shift.
        chosen_on: the first and the last held-out clip on which the arms' options were chosen; None: not said.
        pairs: arms that are held against each other.
    """

    name: str
    model: str
    clips: int
    arms: tuple[Arm, ...]
    call: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    first_clip: int = 0
    judge: str = ""
    reference_steps: int | None = None
    reference_solver: str = BEST
    folder: Path = Path()
    own: OwnClips | None = None
    dtype: Dtype | None = None
    warmup: int = 0
    repeats: int = 1
    timed: bool = False
    ladder: Ladder | None = None
    chosen_on: tuple[int, int] | None = None
    pairs: tuple[Pair, ...] = ()

    @property
    def embedded(self) -> bool:
        """Whether the model ships with the project."""
        return self.model in model_names()

    @property
    def source(self) -> str:
        """Return what diffusers loads of a model that is not embedded: a folder, beside the file if it is there."""
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
        return (
            f"{self.name} has {count} arms, more than {MANY}: each must stand after Holm's correction over all of them,"
            " so write down the few that matter before the run"
        )


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
    check_kinds(data, KINDS, str(path))
    own = _own_clips(data, path)
    if own is not None:
        data["clips"] = len(own)
    missing = [key for key in ("name", "model", "clips") if key not in data]
    if missing or not arms:
        or_prompts = ", or prompts = [...] of your own" if missing == ["clips"] else ""
        raise ConfigError(f"{path} lacks {', '.join(missing) or 'an [[arm]]'}{or_prompts}; add what is missing")
    for key, least in (("clips", 1), ("repeats", 1), ("warmup", 0), ("reference_steps", 1)):
        if data.get(key, least) < least:
            raise ConfigError(f"{path} has {key} = {data[key]}; ask for {least} or more")
    if data.get("first_clip", 0) < 0:
        raise ConfigError(f"{path} has first_clip = {data['first_clip']}; clips are counted from 0")
    judge = data.get("judge")
    if judge and not (judge.endswith(".py") and (path.parent / judge).is_file()):
        raise ConfigError(f"{path} has judge {judge!r}, which is no Python file in or from {path.parent}; name one")
    if data.get("judge") and "reference_steps" in data:
        raise ConfigError(
            f"{path} has reference_steps beside judge = {data['judge']!r}, which takes no reference; leave it out"
        )
    solver = data.get("reference_solver", BEST)
    if solver not in (*SOLVERS, OWN):
        raise ConfigError(f"{path} has no reference_solver {solver!r}; {did_you_mean(solver, (*SOLVERS, OWN))}")
    if "reference_solver" in data and "reference_steps" not in data:
        raise ConfigError(f"{path} has reference_solver without reference_steps; the converged run is {BEST}'s")
    try:
        metrics = check_names([str(name) for name in data.pop("metrics", [])])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    pairs, listed = data.pop("compare", []), read_arms(arms, path)
    rivals, chosen_on = data.pop("rivals", None), data.pop("chosen_on", None)
    suite = Suite(
        **data, metrics=metrics, arms=listed, own=own, folder=path.parent,
        pairs=read_pairs(pairs, listed, str(path)) if pairs else (),
        ladder=read_ladder(path.parent / rivals) if rivals else None,
        chosen_on=_range(chosen_on, path),
    )  # fmt: skip
    _check_model(suite, path)
    _check_judging(suite, path)
    return suite


def _range(values: list[Any] | None, path: Path) -> tuple[int, int] | None:
    """Return the first and the last clip of a key ``chosen_on``."""
    if values is None:
        return None
    first, last = values if len(values) == 2 and all(type(one) is int for one in values) else (0, -1)
    if not 0 <= first <= last:
        raise ConfigError(f"{path} has chosen_on = {values}; give the first and the last clip, such as [0, 15]")
    return first, last


def _check_judging(suite: Suite, path: Path) -> None:
    """Refuse clips that both choose and judge, and rivals and pairs that do not go with the suite."""
    judging = range(suite.first_clip, suite.first_clip + suite.clips)
    ladder, choosing = suite.ladder, dict[str, range]()
    if suite.chosen_on:
        choosing["its arms (chosen_on)"] = range(suite.chosen_on[0], suite.chosen_on[1] + 1)
    if ladder:
        choosing["its rivals"] = range(ladder.first_clip, ladder.first_clip + ladder.clips)
    for what, clips in choosing.items() if suite.own is None else ():
        if {*clips} & {*judging}:
            raise ConfigError(
                f"{path} judges on clips {clip_words(suite.first_clip, suite.clips)}, and {what} were chosen on clips "
                f"{clip_words(clips.start, len(clips))}; judge on others, by first_clip"
            )
    if suite.judge and (ladder or suite.pairs or suite.timed):
        raise ConfigError(
            f"{path} has rivals, [[compare]] or timed beside judge = {suite.judge!r}, which holds clips against no "
            "reference; leave them out"
        )
    if ladder:
        for what, own, other in (
            ("model", suite.model, ladder.model),
            ("reference_steps", suite.reference_steps, ladder.reference_steps),
            ("reference_solver", suite.reference_solver, BEST),
            ("call", dict(suite.call), dict(ladder.call)),
        ):
            if own != other:
                raise ConfigError(
                    f"{path} has {what} {own!r}, and its rivals were chosen with {other!r}; make rivals for it with "
                    "best_rival.py"
                )


def _own_clips(data: dict[str, Any], path: Path) -> OwnClips | None:
    """Take the prompts and seeds out of a suite's keys; None where there are none of one's own."""
    file, prompts, seeds = data.pop("prompt_file", None), data.pop("prompts", None), data.pop("seeds", None)
    if file is None and prompts is None:
        if seeds is not None:
            raise ConfigError(f"{path} has seeds but no prompts; add prompts = [...], or leave them out for held-out "
                              "clips, whose number is their seed")  # fmt: skip
        return None
    if file is not None and prompts is not None:
        raise ConfigError(f"{path} has prompts and a prompt_file; give one of them")
    counted = [key for key in ("clips", "first_clip") if key in data]
    if counted:
        raise ConfigError(
            f"{path} has {' and '.join(counted)}, which count held-out clips, beside prompts of its own; leave them "
            "out: every prompt is run"
        )
    try:
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
        raise ConfigError(
            f"{path} has judge = {suite.judge!r}, which knows held-out clips of embedded models alone; leave it out"
        )
