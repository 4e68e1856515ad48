"""A suite to be run: where its lines go, what each of them must say, and what can be refused before anything runs."""

from dataclasses import dataclass
from pathlib import Path

from dit_accel_pipelines.solvers import BEST

from dit_accel import ConfigError
from dit_accel.files import check_writable

from .embedded import check_name, settled_call, weights_hash
from .reference import AGREE
from .results import Line, check_lines, read_lines, write_lines
from .suite import Arm, Suite


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process needs to run the clips of a suite.

    Attributes:
        suite: what runs.
        out: the result lines' file.
        cache: folder of dense runs.
        timed: whether each arm is timed beside the dense run of as many steps.
        threads: of torch.
        frames: folder in which the frames of every run are kept; None: nowhere.
        talk: whether each run is told on stderr.
    """

    suite: Suite
    out: Path
    cache: Path
    timed: bool
    threads: int
    frames: Path | None = None
    talk: bool = True


def check_timing(timed: bool, workers: int) -> None:
    """Refuse timed runs beside each other.

    Raises:
        ConfigError: for several workers.
    """
    if timed and workers > 1:
        raise ConfigError(f"timed runs need the machine to themselves, got --workers {workers}")


def default_out(path: Path, suite: Suite) -> Path:
    """Return where a suite's result lines go if no file is named: ``results/`` beside the suite's folder."""
    return path.parent.parent / "results" / f"{suite.name}.jsonl"


def clips_of(suite: Suite, most: int | None) -> range:
    """Return the clips to run: a suite's first ``most``, None: all."""
    return range(suite.first_clip, suite.first_clip + (suite.clips if most is None else min(most, suite.clips)))


def setting_of(suite: Suite) -> Line:
    """Return what every line of a suite's results must say: the model, and where there is one, the reference's call."""
    model = {"model": suite.model, "weights": weights_hash(suite.model)}
    if suite.judge:
        return model
    call = settled_call(suite.model, suite.call)
    return {**model, "call": call, "reference": f"{BEST}, agreeing to {AGREE:g} dB"}


def arm_setting(suite: Suite, arm: Arm) -> Line:
    """Return what an arm's lines must say; where clips are judged by themselves, each arm has a call of its own."""
    if not suite.judge:
        return arm.to_dict()
    return {**arm.to_dict(), "call": settled_call(suite.model, {**suite.call, **arm.call})}


def prepare(job: Job) -> None:
    """Check what can be checked beforehand, and leave the file without a last line that was cut off.

    Raises:
        ConfigError: for a suite that can't run so, or a file that can't be written or holds results of another.
    """
    check_name(job.suite.model)
    _check_kind(job)
    for folder, what in ((job.out.parent, "results"), (job.frames, "frames")):
        if folder is not None:
            _make_folder(folder, what)
    check_writable(job.out, "results")
    known = read_lines(job.out)
    arms = {arm.name: arm_setting(job.suite, arm) for arm in job.suite.arms}
    check_lines(job.out, known, setting_of(job.suite), arms)
    write_lines(job.out, known)


def _check_kind(job: Job) -> None:
    """Refuse what clips without a reference can't have, and what those with one can't."""
    suite = job.suite
    if not suite.judge:
        for arm in suite.arms:
            if arm.call:
                raise ConfigError(
                    f"arm {arm.name!r} has a call of its own, {dict(arm.call)}, and all are held against one converged "
                    'run; leave it out, or judge clips by themselves: judge = "longer"'
                )
        return
    asked = [name for name, given in (("--time", job.timed), ("--frames", job.frames), ("metrics", suite.metrics))
             if given]  # fmt: skip
    if asked:
        raise ConfigError(
            f"{suite.name} judges clips by themselves ({suite.judge}), without a dense run beside them; leave out "
            f"{' and '.join(asked)}"
        )


def _make_folder(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{what} can't be written to {folder}: {error.strerror}; choose another folder") from None
