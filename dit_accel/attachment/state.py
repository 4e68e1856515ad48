"""The denoising state of one attachment: which run, step and branch its transformers are in.

It is updated by `cache_context` and before each forward, both outside what users compile. Pipelines that tell the step
are believed; elsewhere it is inferred from the timesteps.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..plan.context import StepContext
from .layers import Branch, TransformerState
from .steps import Pipeline, Timeline, noise_level, noisiest


class DenoisingState:
    """Which run, step and branch the transformers of one attachment are in.

    Args:
        pipe: the pipeline, or None where methods are attached to a transformer alone.
        begin_run: called when a run begins: another generation, or a single forward in training.
    """

    def __init__(self, pipe: Any, begin_run: Callable[[], None]) -> None:
        self.pipeline = None if pipe is None else Pipeline(pipe)
        self._begin_run = begin_run
        self._timeline = Timeline()
        self._timestep = -math.inf
        self._number = 0
        self.step_index = 0
        self.num_inference_steps: int | None = None
        self.sigma: float | None = None
        self.training = False

    def enter(self, state: TransformerState, name: str, told: Mapping[str, Any]) -> None:
        """Note that the pipeline begins a denoising call: ``cache_context`` with what it tells."""
        step = told.get("step_index")
        outer = state.branches[-1].name + "/" if state.nested else ""
        state.branches.append(Branch(outer + name, told=step is not None))
        if step is None or state.nested:
            return
        steps = told.get("num_inference_steps")
        if self._run_begins() or self.training or step < self.step_index or steps != self.num_inference_steps:
            self._start(steps)
        self.training = False
        self.step_index, self.sigma = step, told.get("sigma")

    def leave(self, state: TransformerState) -> None:
        """Note that the denoising call ended, or was aborted."""
        state.branches.pop().reopened.close()

    @contextlib.contextmanager
    def nested(self, state: TransformerState, name: str) -> Iterator[str]:
        """Let what runs inside be a branch of its own within the running one, that advances no step; give its name."""
        outer, batch, layout = state.branch, state.batch, state.layout
        calls = [layer.calls for layer in state.layers]
        state.branches.append(Branch(f"{outer}/{name}"))
        state.nested += 1
        try:
            yield state.branches[-1].name
        finally:
            state.nested -= 1
            state.branches.pop()
            state.batch, state.layout = batch, layout
            for layer, count in zip(state.layers, calls, strict=True):
                layer.calls = count

    def forward(self, state: TransformerState, timestep: Tensor | None, training: bool) -> None:
        """Note that a forward begins, and infer its step where no context told it."""
        if state.nested or (state.branches and state.branches[-1].told):
            return
        if training:
            self._start(None)
            self.training, self.sigma, state.calls = True, None, 0
            return
        value = noisiest(timestep, state.adapter.rising_timesteps)
        begins = self._run_begins()
        if begins or self.training or timestep is None or value > self._timestep:
            self._start(None)
            self._timeline = self.pipeline.timeline() if self.pipeline else Timeline()
            self.num_inference_steps = self._timeline.steps
            state.timestep = math.nan  # a call at the last run's timestep is the first of this one all the same
        elif value < self._timestep:
            self._number += 1
        self.training = False
        self._timestep = value if timestep is not None else -math.inf
        self.step_index = self._timeline.step_of(self._number)
        self._count_call(state, value)
        self.sigma = noise_level(self.pipeline.scheduler) if self.pipeline else None

    def context(self, state: TransformerState) -> StepContext:
        """Return where the denoising of one transformer stands."""
        return StepContext(
            transformer=state.name,
            branch=state.branch,
            step_index=self.step_index,
            num_inference_steps=self.num_inference_steps,
            sigma=self.sigma,
            layout=state.layout,
            batch=state.batch,
            training=self.training,
            told=bool(state.branches) and state.branches[-1].told,
        )

    def _count_call(self, state: TransformerState, timestep: float) -> None:
        """Count a transformer's forwards at one timestep: without contexts, that tells the branches apart.

        Where the scheduler evaluates twice at a timestep, the first timestep of the run tells how many there are.
        """
        if timestep != state.timestep:
            if self._number == 1 and self._timeline.repeats:
                state.branches_a_step = state.calls + 1
            elif self._number == 0:
                state.branches_a_step = None
            state.calls, state.timestep = 0, timestep
        else:
            state.calls += 1
            if state.branches_a_step is not None:
                state.calls %= state.branches_a_step

    def _run_begins(self) -> bool:
        return self.pipeline is not None and self.pipeline.begins_run()

    def _start(self, steps: int | None) -> None:
        self._begin_run()
        self.step_index = self._number = 0
        self._timestep = -math.inf
        self._timeline = Timeline()
        self.num_inference_steps, self.training = steps, False
