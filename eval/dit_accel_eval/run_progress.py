"""How far a suite is, in denoising steps, and how long it takes still: a bar on a terminal."""

from collections.abc import Callable, Mapping, Sequence

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dit_accel.cli.console import TALK

from .comparison import rival_steps
from .reference import FIRST
from .results import Line, latest
from .suite import Suite, dense_arm

USUAL = 64
"""Steps of a converged run, where none is known yet."""


def steps_of(lines: Sequence[Line]) -> int:
    """Return the denoising steps behind the lines of one clip: its runs, and the search for its converged run."""
    searched = max((2 * line["reference_steps"] - FIRST for line in lines if "reference_steps" in line), default=0)
    return searched + sum(line["num_inference_steps"] for line in lines)


def clip_steps(suite: Suite, lines: Sequence[Line]) -> int:
    """Return the steps that a clip takes in all, as far as its lines tell: arms that lack are as listed."""
    known = {line["arm"]: line for line in lines}
    arms = {arm.name: arm.num_inference_steps for arm in suite.arms}
    if suite.judge:
        return sum(arms.values())
    reference = next((line["reference_steps"] for line in lines), USUAL)
    rivals: set[int] = set().union(*(rival_steps(line) for line in known.values()))
    if not lines:  # an arm is held against two dense runs, of half its steps or more
        rivals = {steps for count in arms.values() for steps in (count, count - 1) if steps > 0}
    missing = {dense_arm(steps).name: steps for steps in rivals}
    ran = {name: line["num_inference_steps"] for name, line in known.items()}
    return 2 * reference - FIRST + sum({**arms, **missing, **ran}.values())


class SuiteProgress:
    """A bar over the clips of a suite; a context manager, and what `compare.run` calls with the lines so far."""

    def __init__(self, suite: Suite, clips: Sequence[int], *, quiet: bool = False) -> None:
        self._suite, self._clips = suite, clips
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=TALK,
            disable=quiet or not TALK.is_terminal,
        )
        self._task = self._progress.add_task(suite.name, total=None)

    def __enter__(self) -> Callable[[Sequence[Line]], None]:
        self._progress.__enter__()
        return self.show

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, lines: Sequence[Line]) -> None:
        """Move the bar to what these lines say."""
        done, total = progress_of(self._suite, self._clips, lines)
        told = f"{self._suite.name}: {len({*latest(lines)})} runs"
        self._progress.update(self._task, completed=done, total=total, description=told)


def progress_of(suite: Suite, clips: Sequence[int], lines: Sequence[Line]) -> tuple[int, int]:
    """Return the denoising steps that are done, and those that the clips take in all, as far as is known."""
    by_clip: Mapping[int, list[Line]] = {clip: [] for clip in clips}
    for (_, clip), line in latest(lines).items():
        if clip in by_clip:
            by_clip[clip].append(line)
    done = {clip: steps_of(own) for clip, own in by_clip.items()}
    return sum(done.values()), sum(max(done[clip], clip_steps(suite, own)) for clip, own in by_clip.items())
