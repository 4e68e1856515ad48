"""What a suite costs in denoising steps: said before it runs, foretold in minutes after its first run, and its bar.

How many dense runs an arm is held against, and of how many steps, is known once it ran, and how far the search for a
converged run goes once that was found; before there are bounds, as two numbers, the fewest and the most.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dit_accel.cli.console import TALK

from ..runs.results import Line, latest
from .arms import is_rival
from .comparison import TIMED, WORKS, rival_steps
from .job import Job
from .reference import FIRST, MOST

Bounds = np.ndarray[Any, Any]


def clip_steps(job: Job, lines: Sequence[Line]) -> dict[str, Bounds]:
    """Return the denoising steps that a clip takes, by what they are for, as far as the lines of the clip tell."""
    suite = job.suite
    arms = [arm for arm in suite.arms if job.judge or not (arm.is_dense or arm == suite.rival(arm.num_inference_steps))]
    own = suite.repeats * (1 + job.timed) * sum(arm.num_inference_steps for arm in arms)
    if job.judge:
        return {"arms": np.array([own, own])}
    known = {line["arm"] for line in lines}
    missing = [arm.num_inference_steps for arm in arms if arm.name not in known]
    dense = {arm.name: arm.num_inference_steps for arm in suite.arms if arm not in arms}
    held = set[int]().union(*(rival_steps(line) for line in lines if not is_rival(line)))
    dense |= {suite.rival(one).name: one for one in held}
    dense = {name: steps for name, steps in dense.items() if steps != _again(job)}
    past = {_again(job), *dense.values()}
    possible = [one for one in range(max(missing, default=0) + 1, 0, -1) if one not in past]
    more = possible[: 2 * len(missing) * len({**WORKS, **TIMED})]
    low = suite.repeats * sum(dense.values())
    return {
        "references": _references(job, lines),
        "arms": np.array([own, own]),
        "dense runs of as much work": np.array([low, low + suite.repeats * sum(more)]),
    }


def _again(job: Job) -> int | None:
    """Return the steps of the dense run that is the reference, and is not made twice; None where there is none."""
    return job.suite.reference_steps if job.suite.repeats == 1 and not job.suite.ladder else None


def _references(job: Job, lines: Sequence[Line]) -> Bounds:
    """Return the steps of a clip's reference, those of the search for it among them, and of the warm-up to be timed."""
    own, found = job.suite.reference_steps, next((line["reference_steps"] for line in lines), None)
    ends = (own, own) if own else (2 * end - FIRST for end in (found or 2 * FIRST, found or MOST))
    return np.array([*ends]) + job.timed


def steps_of(job: Job, lines: Sequence[Line]) -> int:
    """Return the denoising steps behind the lines of one clip: its runs, and the search for its reference."""
    searched = int(_references(job, lines)[0]) if lines and not job.judge else 0
    made = [line for line in lines if not (is_rival(line) and line["num_inference_steps"] == _again(job))]
    runs = (len(line.get("repeated", {}).get("seconds", (0,))) * (1 + ("seconds" in line)) for line in made)
    return searched + sum(line["num_inference_steps"] * count for line, count in zip(made, runs, strict=True))


def progress_of(job: Job, clips: Sequence[int], lines: Sequence[Line]) -> tuple[int, tuple[int, int]]:
    """Return the denoising steps that are done, and the fewest and the most that the clips take in all.

    What clips that are whole took is what others are taken to need.
    """
    by_clip = {clip: [line for (_, at), line in latest(lines).items() if at == clip] for clip in clips}
    done = {clip: steps_of(job, own) for clip, own in by_clip.items()}
    ends = {clip: np.sum([*clip_steps(job, own).values()], axis=0) for clip, own in by_clip.items()}
    whole = [low for clip, (low, high) in ends.items() if by_clip[clip] and low == high]
    typical = round(sum(whole) / len(whole)) if whole else None
    needs = [(typical, typical) if typical and one[0] < one[1] else one for one in ends.values()]
    low, high = (sum(max(one[end], made) for one, made in zip(needs, done.values(), strict=True)) for end in (0, 1))
    return sum(done.values()), (int(low), int(high))


def cost_of(job: Job, clips: Sequence[int], lines: Sequence[Line]) -> str:
    """Return in words what is still to be run."""
    suite, (done, needed) = job.suite, progress_of(job, clips, lines)
    warm = suite.warmup * sum(arm.num_inference_steps for arm in suite.arms)
    text = f"{suite.name}: {len(clips)} clip{'s' * (len(clips) != 1)}, "
    text += f"{_span(end + warm - done for end in needed)} denoising steps to run"
    parts = ", ".join(f"{what} {_span(len(clips) * ends)}" for what, ends in clip_steps(job, ()).items())
    return text + (f", {done:,} are done" if done else f" ({parts})")


def _span(ends: Any) -> str:
    return " to ".join(dict.fromkeys(f"{end:,}" for end in ends))


class SuiteProgress:
    """A bar over the clips of a suite; a context manager, and what `compare.run` calls with the lines so far.

    Args:
        workers: how many processes share the clips.
    """

    def __init__(self, job: Job, clips: Sequence[int], *, quiet: bool = False, workers: int = 1) -> None:
        self._job, self._clips, self._quiet, self._workers = job, clips, quiet, workers
        self._before = -1
        self._foretold: bool | None = None
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
        self._task = self._progress.add_task(job.suite.name, total=None)

    def __enter__(self) -> Callable[[Sequence[Line]], None]:
        self._progress.__enter__()
        return self.show

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, lines: Sequence[Line]) -> None:
        """Move the bar to what these lines say, and say what is still to be run: in steps, then in minutes."""
        if self._before < 0:
            self._before = len(lines)
            self._say(cost_of(self._job, self._clips, lines))
        done, (low, high) = progress_of(self._job, self._clips, lines)
        timed = [line for line in lines[self._before :] if "times" in line]
        if timed and done < high and (self._foretold is None or (low == high) > self._foretold):
            self._foretold = low == high  # after the first run, and once more where that left a range
            self._say(_time_left(timed, (low - done, high - done), self._workers))
        text = f"{self._job.suite.name}: {len({*latest(lines)})} runs"
        self._progress.update(self._task, completed=done, total=high, description=text)

    def _say(self, text: str) -> None:
        if not self._quiet:
            TALK.print(text, markup=False, soft_wrap=True)


def _time_left(lines: Sequence[Line], left: tuple[int, int], workers: int) -> str:
    """Return in words how long so many steps take, by the runs so far, each step as long as a dense one."""
    seconds = sum(line["times"][stage] for line in lines for stage in ("text", "denoise", "decode"))
    rate = seconds / sum(line.get("work") or line["num_inference_steps"] for line in lines)
    times = [steps * rate / workers for steps in left]
    unit, name = next((one, name) for one, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
                      if times[1] >= 2 * one or one == 1)  # fmt: skip
    return f"a dense step takes {rate:.2g} s: about {_span(max(1, round(one / unit)) for one in times)} {name} are left"
