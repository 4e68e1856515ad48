"""How far a suite is, in denoising steps, and how long it takes still: a bar on a terminal."""

from collections.abc import Callable, Mapping, Sequence

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dit_accel.cli.console import TALK

from ..runs.results import Line, latest
from .arms import dense_arm
from .comparison import rival_steps
from .reference import FIRST
from .suite import Suite

USUAL = 64
"""Steps of a converged run, where none is known yet."""


def steps_of(lines: Sequence[Line]) -> int:
    """Return the denoising steps behind the lines of one clip: its runs, and the search for its converged run."""
    searched = max((2 * line["reference_steps"] - FIRST for line in lines if "reference_steps" in line), default=0)
    return searched + sum(
        line["num_inference_steps"] * len(line.get("repeated", {}).get("seconds", (0,))) for line in lines
    )


def clip_steps(suite: Suite, lines: Sequence[Line]) -> int:
    """Return the steps that a clip takes in all, as far as its lines tell: arms that lack are as listed."""
    known = {line["arm"]: line for line in lines}
    arms = {arm.name: arm.num_inference_steps for arm in suite.arms}
    if suite.judge:
        return suite.repeats * sum(arms.values())
    reference = next((line["reference_steps"] for line in lines), USUAL)
    rivals: set[int] = set().union(*(rival_steps(line) for line in known.values()))
    if not lines:  # an arm is held against two dense runs, of half its steps or more
        rivals = {steps for count in arms.values() for steps in (count, count - 1) if steps > 0}
    missing = {dense_arm(steps).name: steps for steps in rivals}
    ran = {name: line["num_inference_steps"] for name, line in known.items()}
    return 2 * reference - FIRST + suite.repeats * sum({**arms, **missing, **ran}.values())


def cost_of(suite: Suite, clips: Sequence[int], lines: Sequence[Line]) -> str:
    """Return in words what is still to be run, beside the budget where the suite has one."""
    done, total = progress_of(suite, clips, lines)
    warm = suite.warmup * sum(arm.num_inference_steps for arm in suite.arms)
    text = f"{suite.name}: {len(clips)} clips, about {total + warm - done} denoising steps to run"
    text += f", {done} are done" if done else ""
    return text + (f"; this call may take {suite.budget}" if suite.budget else "")


class SuiteProgress:
    """A bar over the clips of a suite; a context manager, and what `compare.run` calls with the lines so far."""

    def __init__(self, suite: Suite, clips: Sequence[int], *, quiet: bool = False) -> None:
        self._suite, self._clips, self._quiet = suite, clips, quiet
        self._told = False
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
        """Move the bar to what these lines say; the first time, tell what is still to be run."""
        if not self._told and not self._quiet:
            TALK.print(cost_of(self._suite, self._clips, lines), markup=False, soft_wrap=True)
        self._told = True
        done, total = progress_of(self._suite, self._clips, lines)
        text = f"{self._suite.name}: {len({*latest(lines)})} runs"
        self._progress.update(self._task, completed=done, total=total, description=text)


def progress_of(suite: Suite, clips: Sequence[int], lines: Sequence[Line]) -> tuple[int, int]:
    """Return the denoising steps that are done, and those that the clips take in all, as far as is known."""
    by_clip: Mapping[int, list[Line]] = {clip: [] for clip in clips}
    for (_, clip), line in latest(lines).items():
        if clip in by_clip:
            by_clip[clip].append(line)
    done = {clip: steps_of(own) for clip, own in by_clip.items()}
    return sum(done.values()), sum(max(done[clip], clip_steps(suite, own)) for clip, own in by_clip.items())
