"""A suite to be run: where its lines go, what each of them must say, and what can be refused before anything runs."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.media import BYTES
from dit_accel_pipelines.generation.pipeline_call import pipeline_class
from dit_accel_pipelines.generation.request import check_words
from dit_accel_pipelines.generation.solvers import BEST

from dit_accel import ConfigError
from dit_accel.adapters.adapter import Family
from dit_accel.adapters.model_files import read_model_files
from dit_accel.files import check_room, check_writable, held, make_folder
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers

from ..runs.loaded import Machine, OwnClips, check_given, embedded_call, embedded_weights, given_weights, model_call
from ..runs.model import arm_scheduler, check_guided, shipped_scheduler, with_timestep
from ..runs.results import AGREE, Line, ResultLine, result_lines, write_lines
from ..runs.rivals import require_rivals
from ..runs.servers import Server
from .arms import Arm
from .suite import Judge, Suite, judge_of

LINE = 1 << 13  # bytes that a result line takes, about
SCALES = ("guidance_scale", "true_cfg_scale")  # what an arm's call may change beside one converged run


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to run the clips of a suite, checked once by `checked`."""

    suite: Suite
    out: Path
    cache: Path
    timed: bool
    threads: int | None
    frames: Path | None = None
    talk: bool = True
    machine: Machine = field(default_factory=Machine)

    @property
    def judge(self) -> Judge | None:
        """How clips are judged by themselves; None: they are held against converged runs."""
        return judge_of(self.suite) if self.suite.judge else None

    @functools.cached_property
    def setting(self) -> Line:
        """What every line must say: the model, and where there is one, the call of the converged run."""
        suite = self.suite
        if suite.embedded:
            model = {"model": suite.model, "weights": embedded_weights(suite.model)}
        else:
            dtype = self.machine.dtype(suite.dtype)
            model = {"model": suite.model, "weights": given_weights(suite.source), "dtype": dtype}
        if suite.judge:
            return model
        words = f"{suite.reference_solver}, {suite.reference_steps} steps of its own"
        reference = words if suite.reference_steps else f"{BEST}, agreeing to {AGREE:g} dB"
        return {**model, "call": suite_call(suite, suite.call), "reference": reference}

    def arm_setting(self, arm: Arm) -> Line:
        """Return what an arm's lines must say besides; where clips are judged by themselves, each has its own call."""
        setting = arm.to_dict()
        if self.judge:
            return {**setting, "call": suite_call(self.suite, {**self.suite.call, **arm.call})}
        return setting | ({"arm_call": setting.pop("call")} if arm.call else {})

    def settings(self, lines: Sequence[ResultLine]) -> dict[str, Line]:
        """Return arm -> what its lines must say, of the suite's arms and the rivals among lines."""
        steps = {line.num_inference_steps for line in lines if line.is_rival}
        arms = [*self.suite.arms, *map(self.suite.rival, steps)]
        return {arm.name: self.arm_setting(arm) for arm in arms}


def clips_of(suite: Suite, most: int | None) -> Sequence[int]:
    """Return the clips to run: a suite's first ``most``, None: all."""
    count = suite.clips if most is None else min(most, suite.clips)
    return range(suite.first_clip, suite.first_clip + count)


def suite_call(suite: Suite, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the call of a suite's model: its defaults, changed by what was given."""
    if suite.embedded:
        return embedded_call(suite.model, arguments)
    return model_call(check_given(suite.source)[0], arguments)


@contextlib.contextmanager
def checked(job: Job, clips: Sequence[int]) -> Iterator[None]:
    """Check what can be checked beforehand, and hold the file, without a last line that was cut off, for the block."""
    family = _check_model(job.suite)
    _check_kind(job)
    _check_fits(job, clips, result_lines(job.out) if job.out.is_file() else [], family)
    for folder, what in ((job.out.parent, "results"), (job.frames, "frames")):
        if folder is not None:
            make_folder(folder, f"the folder of {what}")
    check_writable(job.out, "results")
    with held(job.out, "the results file"):
        known = result_lines(job.out)
        raw = [line.raw for line in known]
        check_lines(job.out, raw, job.setting, job.settings(known))
        check_clips(job.out, raw, job.suite.own)
        write_lines(job.out, raw)
        yield


def _check_fits(job: Job, clips: Sequence[int], known: Sequence[ResultLine], family: Family) -> None:
    """Refuse runs of a rival that is not installed, and a disk without room for what clips lack."""
    keys = {line.key for line in known}
    lacking = [arm for arm in job.suite.arms for clip in clips if (arm.name, clip) not in keys]
    if not lacking:
        return
    require_rivals(name for arm in lacking for name in arm.rival if not arm.is_served)
    for arm in {arm.name: arm for arm in lacking if arm.is_served}.values():
        Server.of(arm.rival).check(suite_call(job.suite, {**job.suite.call, **arm.call}))
    missing = len(lacking)
    call = suite_call(job.suite, job.suite.call)
    frames, height, width = (call.get(name) or getattr(family, name) for name in ("num_frames", "height", "width"))
    pixels, runs = (frames or 1) * height * width, "1 run" if missing == 1 else f"{missing} runs"
    check_room(job.out.parent, LINE * missing, f"the results of {runs} take")
    if job.frames is not None:
        check_room(job.frames, round(BYTES[".png"] * pixels * missing), f"the frames of {runs} take")
    if not job.judge:
        check_room(job.cache, 6 * pixels, "a dense run, which is kept in 16 bits, takes")


def _check_model(suite: Suite) -> Family:
    """Refuse a model that suites can't run, and what it does not take of a suite; returns the model's sizes."""
    if suite.embedded:
        files = read_model_files(suite.source)
        for prompt in suite.own.prompts if suite.own else ():
            check_words(prompt, suite.model)
    else:
        files, _ = check_given(suite.source)
        if suite.own is None:
            remedy = f"add prompts = [...] or a prompt_file for {suite.model}"
            raise ConfigError(f"{suite.name} has no prompts, and only embedded models have held-out ones; {remedy}")
    shipped = shipped_scheduler(suite.source)
    adapter, family = files.identify()
    heads, layers = family.heads, family.layers
    taken = Model(adapter=adapter, family=family, heads=heads, layers=layers, config=files.transformer)
    ladder = suite.ladder
    rungs = [ladder.arm(rung.num_inference_steps) for rung in ladder.rungs] if ladder else []
    for arm in (*suite.arms, *rungs):
        try:
            arm_scheduler(shipped, arm.solver, arm.scheduler, arm.flow_shift)
            if arm.guider:
                check_guided(pipeline_class(files))
            make_handlers([with_timestep(method) for method in arm.methods], taken)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from None
    return family


def _check_kind(job: Job) -> None:
    """Refuse what clips without a reference can't have, and what those with one can't."""
    suite = job.suite
    if not suite.judge:
        for arm in suite.arms:
            if arm.is_served and not job.timed:
                raise ConfigError(f"arm {arm.name!r} is a server's, whose work can't be counted; set timed = true")
            if {*arm.call} - {*SCALES}:
                may = f"beside one converged run it may only set {' and '.join(SCALES)}"
                remedy = 'leave it out, or judge clips by themselves: judge = "FILE.py"'
                raise ConfigError(f"arm {arm.name!r} has a call of its own, {dict(arm.call)}; {may}: {remedy}")
            suite_call(suite, {**suite.call, **arm.call})
        return
    options = {"--time": job.timed, "--frames": job.frames, "metrics": suite.metrics}
    requested = [name for name, value in options.items() if value]
    if requested:
        alone = f"{suite.name} judges clips by themselves ({suite.judge}), without a dense run beside them"
        raise ConfigError(f"{alone}; leave out {' and '.join(requested)}")


def check_lines(path: Path, lines: Sequence[Mapping[str, Any]], expected: Line, arms: Mapping[str, Line]) -> None:
    """Refuse lines of another model, call, reference or arm than the suite's, by name."""
    for line in lines:
        of_arm = f"arm {line['arm']!r} with ", arms.get(line["arm"], {}), "rename the arm, or delete its lines"
        for of, settled, remedy in (("", expected, "delete it and run again"), of_arm):
            for name, value in settled.items():
                entry = line.get(name)
                if (_known_options(entry, value) if name == "methods" and entry else entry) != value:
                    text = f"holds results of {of}{name} {entry!r}, this suite has {value!r}"
                    raise ConfigError(f"{path} {text}; {remedy}")


def _known_options(methods: Mapping[str, Any], settled: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line's methods without options of earlier releases, which are now what their default was."""
    known = {}
    for method, options in methods.items():
        spelt = options | ({"predictor": "corrected"} if options.get("corrected") else {})  # an option of its own then
        known[method] = {key: value for key, value in spelt.items() if key in settled.get(method, spelt)}
    return known


def check_clips(path: Path, lines: Sequence[Mapping[str, Any]], clips: OwnClips | None) -> None:
    """Refuse lines of another prompt or seed than their clip has in the suite."""
    for line in lines:
        clip = line["clip"]
        here = (clips.prompt(clip), clips.seed(clip)) if clips is not None and clip < len(clips) else None
        if (clips is None and "seed" not in line) or (line.get("prompt"), line.get("seed")) == here:
            continue
        text = "a held-out prompt" if clips is None else f"{here[0]!r} and seed {here[1]}" if here else "no such clip"
        there = f"clip {clip} of prompt {line.get('prompt')!r} and seed {line.get('seed')}"
        raise ConfigError(f"{path} holds {there}, this suite has {text}; write its results to another file")
