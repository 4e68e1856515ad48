"""The denoising state of one attachment: which run, step and branch its transformers are in.

It is updated by `cache_context` and before each forward, both outside what users compile. What a context states is
believed; the rest follows from the pipeline in whose call the forward runs: a run is one walk through the timesteps
that the call has laid out, whichever way these go. In a loop written by hand it follows from the timesteps, which go
one way in a run, and from the scheduler of the pipeline that methods are attached to as long as it lists these.
"""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..adapters.noise import NOISES, Noise, noise_of
from ..errors import AttachError
from ..methods.find import scheduler_of
from ..methods.site import ForwardContext
from ..plan.context import StepContext
from .engine import Engine
from .layers import Branch, RememberedTensors, TransformerState, tensors_in, text_in
from .steps import Course, PipelineRun, Schedule, Timeline, noise_level, schedule_of, timeline_of


class DenoisingState:
    """Which run, step and branch the transformers of one attachment are in.

    ``engine``: what runs begin in (another generation, or a single forward in training), and forgets what methods
    learned where that may belong to another branch.
    """

    def __init__(self, pipe: Any, engine: Engine) -> None:
        self._pipe = _reference(pipe)
        self.engine, self.threads = engine, OneThread()
        self.on_run: list[Callable[[], None]] = []  # called as a run begins, before the last one's counts are dropped
        self._run: PipelineRun | None = None
        self._timesteps = self._taken = _reference(None)  # the list of the last forward's scheduler; of a pipeline's
        self._broken = self._warned = False
        self._forget()

    @property
    def pipe(self) -> Any:
        """The pipeline that methods are attached to; None where there is none, or it is gone."""
        return self._pipe()

    def enter(
        self, state: TransformerState, name: str, stated: Mapping[str, Any], run: PipelineRun | None = None
    ) -> None:
        """Note that a denoising call begins: ``cache_context`` with what it states, in a pipeline's run or in none."""
        stated = {field: value for field, value in stated.items() if value is not None}
        outer, rows = (state.branches[-1].name + "/", state.branches[-1].rows) if state.nested else ("", None)
        state.branches.append(Branch(outer + name, stated, rows=rows))
        step, steps = stated.get("step_index"), stated.get("num_inference_steps")
        if step is None or state.nested:
            return
        if self._begins(run) or self.training or step < self.step_index or steps != self._stated_steps:
            self._start()
            self._stated_steps = steps
            if run is not None:
                self._timeline, self._noise = timeline_of(run.pipe), noise_of(scheduler_of(run.pipe))
        self.training, self._stated = False, True
        self.step_index = self._number = step
        self.num_inference_steps = self._timeline.steps if steps is None else steps
        self.sigma = stated.get("sigma", None if run is None else noise_level(scheduler_of(run.pipe)))

    def leave(self, state: TransformerState) -> None:
        """Note that the denoising call ended, or was aborted."""
        state.branches.pop().reopened.close()

    @contextlib.contextmanager
    def nested(self, state: TransformerState, name: str, rows: Sequence[int] | None = None) -> Iterator[str]:
        """Let what runs inside be a nested branch of some rows (None: all) that advances no step; give its name."""
        outer = state.branches[-1].rows if state.nested else None
        rows = outer if rows is None else tuple(rows if outer is None else (outer[row] for row in rows))
        state.branches.append(Branch(f"{state.branch}/{name}", rows=rows))
        state.nested += 1
        try:
            yield state.branches[-1].name
        finally:
            state.nested -= 1
            state.branches.pop()

    def forward(
        self, state: TransformerState, inputs: Mapping[str, Any], training: bool, run: PipelineRun | None
    ) -> None:
        """Note that a forward begins, in ``training`` of no generation, and infer of its step what no context says."""
        if state.nested:  # a further forward of a method belongs to the step around it
            return
        stated = state.branches[-1].stated if state.branches else {}
        if "step_index" not in stated and training:
            self._start()
            self.training = True
            return
        timestep = inputs.get(state.adapter.timestep)
        if "step_index" not in stated:
            self._infer(state, timestep, stated, run)
            if not state.branches:
                number = state.calls_seen.number(self._number, text_in(state.adapter, inputs), self._timeline.repeats)
                state.calls, lost = number
                if lost:  # what methods keep may be of another prompt
                    self.engine.reset()
        elif run is None and ("num_inference_steps" not in stated or "sigma" not in stated):
            if timestep is not None:
                self._course.move(timestep)
            self._follow_by_hand(timestep, stated)
        if run is None:
            self._look_for_another_begin(state, inputs)

    def stand(self, step_index: int, num_inference_steps: int | None, sigma: float | None) -> None:
        """Take where a flow's denoising stands from a host that knows it, in place of `enter` and `forward`."""
        self.step_index, self.num_inference_steps, self.sigma, self._noise = (
            step_index,
            num_inference_steps,
            sigma,
            "flow",
        )

    def broke_off(self) -> None:
        """Note that the run is over, whatever comes next: a forward raised, or a user said so."""
        self._broken = True

    def context(self, state: TransformerState) -> StepContext:
        """Make the context of one transformer's step."""
        if self._noise not in NOISES and self.sigma is not None:  # a loop states it, and nothing says what it is
            self._noise = "exploding" if self.sigma > 1 else "flow"
        beside, rows = state.beside
        return StepContext(
            transformer=state.name,
            branch=state.branch,
            step_index=self.step_index,
            num_inference_steps=self.num_inference_steps,
            sigma=self.sigma,
            noise=self._noise or "none",
            layout=self.engine.forward.layout,
            batch=self.engine.forward.batch,
            training=self.training,
            tells_step=bool(state.branches) and state.branches[-1].tells_step,
            beside=beside,
            rows=rows,
        )

    def forward_context(self, state: TransformerState, inputs: Mapping[str, Any]) -> ForwardContext:
        """Make the context of one transformer's forward of some inputs."""
        return ForwardContext(inputs=inputs, **self.context(state).values)

    def _infer(
        self, state: TransformerState, timestep: Tensor | None, stated: Mapping[str, Any], run: PipelineRun | None
    ) -> None:
        """Infer the step from the timesteps; equal ones are calls of one step."""
        # without a timestep any forward may be the first one of a run
        begins = self._begins(run) or self.training or self._stated or timestep is None
        moved = 0 if timestep is None or begins else self._course.move(timestep)
        if moved < 0 and run is not None and self._schedule is not None and not self._schedule.is_over(self._number):
            self.engine.reset()  # the pipeline goes back to more noise, as its call has laid it out
        elif moved < 0:
            begins = True
        if begins:
            self._start()
            if timestep is not None:
                self._course.move(timestep)
        elif moved:
            self._number += 1
        self.training = False
        if run is None:
            self._follow_by_hand(timestep, stated)
            self.step_index = self._timeline.step_of(self._number)
            return
        if begins or self._schedule is None:
            self._schedule, self._timeline = schedule_of(run.pipe), timeline_of(run.pipe)
            self._noise = noise_of(scheduler_of(run.pipe))
        self._number = max(self._number, self._schedule.number() or 0)  # steps may pass without a forward
        self.num_inference_steps = stated.get("num_inference_steps", self._timeline.steps)
        self.step_index = self._timeline.step_of(self._number)
        self.sigma = stated.get("sigma", self._schedule.sigma(self._number))

    def _follow_by_hand(self, timestep: Tensor | None, stated: Mapping[str, Any]) -> None:
        """Take what is not stated of a loop written by hand from the attached pipeline's scheduler, if it is followed.

        Its timesteps must be the loop's, one after the other, and not those of a pipeline's own run before.
        """
        scheduler = scheduler_of(self.pipe)
        if self._number == 0 and self._schedule is None:
            fresh = getattr(scheduler, "timesteps", None) is not self._taken()  # not left there by a pipeline's run
            self._schedule = Schedule(scheduler if fresh else None)
        value, dtype, positions = stated.get("timestep"), None, None
        values = self._course.noisiest if timestep is not None else ()
        if value is not None:
            values = (float(value.max() if isinstance(value, Tensor) else value),)
        elif timestep is not None:
            dtype = timestep.dtype
        if values and self._schedule is not None:
            positions = self._schedule.follow(values, dtype, self._number)
        sigma = None
        if positions is None or self._schedule is None:
            self._schedule, self._timeline = Schedule(None), Timeline()
        else:
            self._timeline, sigma = self._schedule.timeline(positions[0]), self._schedule.noise_level(positions[1])
            self._noise = noise_of(scheduler)
        self.num_inference_steps = stated.get("num_inference_steps", self._timeline.steps)
        self.sigma = stated.get("sigma", sigma)

    def _look_for_another_begin(self, state: TransformerState, inputs: Mapping[str, Any]) -> None:
        """Find a loop written by hand that was broken off in its first step and begun again: its call comes twice.

        Where contexts name the calls, each is one call a step. Without, equal prompts may be windows of a picture.
        """
        if self._number > 0:
            self._first.clear()
            return
        latents = tensors_in(inputs[state.adapter.latents])
        name = state.name, state.branch if state.branches else f"text {state.calls_seen.text}"
        first = self._first.setdefault(name, RememberedTensors(latents))
        if first.is_unchanged_memory(latents) or first.has_values(latents):
            return
        if state.branches:
            self._begin_run()
            self._first = {name: RememberedTensors(latents)}
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{state.name} ran twice in the first step of a loop, with one prompt and different latents; methods "
                "take these for windows of one picture. If an earlier loop was broken off in its first step, call "
                "attachment.reset() before the next one",
                UserWarning,
                stacklevel=2,
            )

    def _begins(self, run: PipelineRun | None) -> bool:
        """Tell whether another run began since the last look: another call of a pipeline, or other timesteps."""
        pipe = self.pipe if run is None else run.pipe
        timesteps = getattr(scheduler_of(pipe), "timesteps", None)
        new = timesteps is not None and timesteps is not self._timesteps()
        if new:
            self._timesteps = _reference(timesteps)
        if run is not None:
            self._taken = _reference(timesteps)
        other = run is not self._run if run is None or self._run is None else not run.is_same(self._run)
        self._run = run
        broken, self._broken = self._broken and run is None, False
        return new or other or broken

    def _begin_run(self) -> None:
        for call in self.on_run:
            call()
        self.threads.begin_run()
        self.engine.begin_run()

    def _start(self) -> None:
        self._begin_run()
        self._forget()

    def _forget(self) -> None:
        """Know nothing of the run that begins."""
        self._schedule: Schedule | None = None
        self._timeline = Timeline()
        self._course = Course()
        self.step_index = self._number = 0  # the second: of the run's different timesteps
        self._stated_steps: int | None = None
        self._first: dict[tuple[str, str], RememberedTensors] = {}  # latents of a hand-written loop's first step
        self.num_inference_steps: int | None = None
        self.sigma: float | None = None
        self._noise: Noise | None = None  # what sigma is; None: as it was first
        self.training = self._stated = False  # of the last step


def _reference(value: Any) -> Callable[[], Any]:
    """Refer to a value weakly; to what can't be referred to so, strongly."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


class OneThread:
    """Lets forwards of one attachment run in one thread at a time, and pipelines' runs after one another.

    A run may begin in another thread than the last one, and a loop written by hand may move between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: int | None = None  # the thread in which a forward runs
        self._depth = 0
        self._run: PipelineRun | None = None
        self._threads: set[int] = set()  # in which forwards of this run ran
        self._crossed = False

    def begin_run(self) -> None:
        """Note that a run begins: no forward of it has run yet."""
        self._threads.clear()

    def require(self, state: TransformerState, run: PipelineRun | None) -> None:
        """Raise `AttachError` if a denoising call begins while another thread is in one, or in a pipeline's run."""
        with self._lock:
            self._require(state, run)

    @contextlib.contextmanager
    def forward(self, state: TransformerState, run: PipelineRun | None) -> Iterator[None]:
        """Hold the attachment while a forward runs in this thread; raise `AttachError` if another thread is in one."""
        me = threading.get_ident()
        with self._lock:
            self._require(state, run)
            self._running, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._lock:
                self._threads.add(me)
                self._depth -= 1
                if self._depth == 0:
                    self._running = None
                crossed, self._crossed = self._crossed, False
        if crossed:
            raise AttachError(_refusal(state, "a forward"))

    def _require(self, state: TransformerState, run: PipelineRun | None) -> None:
        me = threading.get_ident()
        if self._running not in (None, me) or any(branch.thread != me for branch in state.branches):
            self._crossed |= self._running is not None and me in self._threads
            raise AttachError(_refusal(state, "a forward"))
        if self._run is not None and self._run.thread != me and self._run.goes_on():
            raise AttachError(_refusal(state, f"a run of {type(self._run.pipe).__name__}"))
        self._run = run


def _refusal(state: TransformerState, what: str) -> str:
    return (
        f"{what} of {state.name} is in progress in another thread, and what is attached to it follows one run at a "
        "time; run one after the other, or give each thread a transformer with an attachment of its own"
    )
