"""What runs in place of a transformer's forward: step and layout are read, layers switched, methods run around it."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..adapters.adapter import NO_STEP, Adapter, Grid
from ..adapters.joined_text import JoinedText
from ..adapters.noise import noise_of
from ..adapters.rotary import check_lengths
from ..errors import ConfigError
from ..methods.base import Place
from ..methods.find import scheduler_of
from ..methods.noise import require_noise
from ..methods.site import AroundForward, target_sample
from ..plan.context import StepContext
from ..report.recorder import Recorder
from .engine import Engine
from .forward_state import NO_GRID, as_tensors, fewest_keys
from .layers import TransformerState, lora_state
from .offloaded import timed_fetches
from .parallel import context_parallel, naming_lost, require_agreement, require_parallel
from .seam import is_inside_compiled
from .shards import SequenceShards, shards_of
from .state import DenoisingState
from .steps import PipelineRun, current_run

INSIDE_COMPILED = (
    "a method that runs around the forward or its blocks can't run inside torch.compile(transformer); for "
    "one around the forward compile before attaching or use transformer.compile(), for one around blocks "
    "use compile_repeated_blocks()"
)
"""Why code that compiled the transformer after attach and such methods exclude each other."""

STEP_UNSEEN = (
    "the steps of a denoising loop that tells none to its cache_context can't be followed inside "
    "torch.compile(transformer); compile before attaching, or use transformer.compile()"
)
"""Why code that compiled the transformer after attach is not followed in most pipelines."""


class ForwardWrapper:
    """What runs in place of one transformer's forward.

    ``functions``: what methods run around the forward, the innermost first.
    """

    def __init__(
        self, denoising: DenoisingState, state: TransformerState, functions: Sequence[AroundForward], on_modules: bool
    ) -> None:
        self._denoising, self._engine = denoising, denoising.engine
        self._state = state
        self._functions = tuple(functions)
        self.traceable = not functions and not on_modules
        state.made.wanted = any(
            handler.places & {Place.FORWARD, Place.BLOCKS} and "cache" not in handler.exclusive
            for handler in denoising.engine.handlers
        )
        self._config = types.SimpleNamespace(**dict(state.transformer.config))
        self._parallel: Any = None
        self._begun: Recorder | None = None  # of the run whose scheduler was looked at
        self._shards: tuple[Any, SequenceShards | None] = None, None  # what they were made for, and they
        self._agreed: set[Any] = set()  # the run, and the shapes in training, in which processes were compared
        self._names = list(inspect.signature(type(state.transformer).forward).parameters)[1:]

    def __call__(self, run_model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the forward of a call."""
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling():
            return self._traced(run_model, args, kwargs, inputs)
        denoising, state = self._denoising, self._state
        if is_inside_compiled():
            self._require_traceable()
        run, outer = current_run(state.transformer), state.running
        with denoising.threads.forward(state, run):
            state.running = None if run is None else run.pipe
            try:
                return self._run(run_model, args, kwargs, inputs, run)
            except BaseException:
                if not state.nested:
                    denoising.broke_off()
                raise
            finally:
                state.running = outer
                if not state.nested:
                    state.ran.clear()
                    self._engine.end_forward()

    def _run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: Mapping[str, Any],
        of: PipelineRun | None,
    ) -> Any:
        """Run the forward of a call outside graphs, in the run of a pipeline or None."""
        denoising, state = self._denoising, self._state
        parallel = context_parallel(state.transformer)
        if parallel is not None and parallel is not self._parallel:
            require_parallel(self._engine, state, parallel)
        self._parallel = parallel
        grid = self._look(inputs)
        if grid == NO_STEP:
            return run(*args, **kwargs)
        if not state.branches:
            self.note_weights()
        training = torch.is_grad_enabled() and state.transformer.training
        denoising.forward(state, inputs, training, of)
        self._require_noise(of)
        if parallel is not None:
            self._require_agreement(parallel, target_sample(inputs[state.adapter.latents]))

        def innermost(*, whole: Mapping[str, Any] | None = None, **changed: Any) -> Any:
            if not changed:
                fresh = {name: _own_list(value) for name, value in kwargs.items()}
                return self._observed(run, tuple(map(_own_list, args)), fresh, grid, inputs)
            arguments = {name: _own_list(value) for name, value in {**inputs, **changed}.items()}
            return self._observed(run, (), arguments, self._look(whole or arguments), arguments)

        around = innermost
        for function in self._functions:
            around = self._wrapped(function, inputs, around)
        return around() if training or state.nested else self._timed(around, inputs)

    def _require_noise(self, run: PipelineRun | None) -> None:
        """Raise `ConfigError` if the scheduler that a run begins with tells no noise level that a method needs."""
        engine = self._engine
        if run is not None and engine.recorder is not self._begun:
            scheduler = scheduler_of(run.pipe)
            noise = noise_of(scheduler)
            require_noise(engine.handlers, () if noise is None else (noise,), type(scheduler).__name__)
            self._begun = engine.recorder

    def _timed(self, run: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """Run a whole forward, methods around it included, and keep how long it took and what it was."""
        recorder, state = self._engine.recorder, self._state
        device = target_sample(inputs[state.adapter.latents]).device
        with (
            recorder.timed(self._denoising.context(state), device, lambda: len(state.layers)),
            # whether parts are timed is decided as the clock begins
            nullcontext() if recorder.clock.parts is None else timed_fetches(state.transformer, recorder.clock, device),
        ):
            return run()

    def _require_agreement(self, parallel: Any, latents: torch.Tensor) -> None:
        """Have the processes compare what they run: once a run; in training, of one forward each, once a shape."""
        denoising, state = self._denoising, self._state
        key = latents.shape if denoising.training else self._engine.recorder
        if key not in self._agreed:
            self._agreed = {entry for entry in self._agreed if isinstance(entry, torch.Size)} | {key}
            with naming_lost(state, parallel):
                require_agreement(denoising, state, parallel, latents)

    def _wrapped(
        self, function: AroundForward, inputs: Mapping[str, Any], run: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return ``function`` around ``run``; it sees the inputs and branch as functions further out changed them."""
        denoising, state = self._denoising, self._state

        def around(**changed: Any) -> Any:
            # only now: a function further out may have opened a nested branch
            context = denoising.forward_context(state, {**inputs, **changed})
            out = function(context, (lambda **further: run(**{**changed, **further})) if changed else run)
            state.note_ran()
            return out

        return around

    def note_weights(self) -> None:
        """Have the methods forget what they learned if something else acts on the transformer's weights now."""
        state, weights = self._state, lora_state(self._state.transformer)
        if state.weights is not None and weights != state.weights:
            self._engine.reset()
        state.weights = weights

    def _look(self, inputs: Mapping[str, Any]) -> Grid | str:
        """Read the grid of a forward, and leave it where attention calls find it."""
        forward, state = self._engine.forward, self._state
        grid = _read_grid(state.adapter, self._config, inputs)
        sizes = NO_GRID if isinstance(grid, str) else grid
        forward.not_a_step = sizes == NO_STEP
        if forward.not_a_step:
            return grid
        forward.lay(sizes)
        if forward.layout is not None and any(handler.extends for handler in self._engine.handlers):
            # outputs beyond the tables of positions
            check_lengths(state.adapter.name, state.adapter.rope, state.transformer.config, forward.layout.lengths)
        forward.min_keys = fewest_keys(state.adapter, sizes)
        forward.shards = None
        if self._parallel is not None and sizes != NO_GRID:
            forward.shards = self._shards_of(sizes, inputs)
            forward.min_keys = min(forward.min_keys, forward.shards.local)
        forward.batch = len(inputs[state.adapter.latents])
        return grid

    def _shards_of(self, grid: Grid, inputs: Mapping[str, Any]) -> SequenceShards:
        """Return the processes' shares of the forward; the same object as long as nothing changes."""
        adapter, config = self._state.adapter, self._parallel
        joined, device = adapter.joined_text, target_sample(inputs[adapter.latents]).device
        prompt = inputs.get(joined.text) if isinstance(joined, JoinedText) else None
        text = prompt.shape[1] if isinstance(prompt, torch.Tensor) else None
        key, shards = self._shards
        if shards is None or key != (grid, text, device, config):
            shards = shards_of(config, adapter, grid, text, device)
            self._shards = (grid, text, device, config), shards
        return shards

    def _observed(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        grid: Grid | str,
        inputs: Mapping[str, Any],
    ) -> Any:
        """Run the model's own forward, its layers switched, and count what ran."""
        engine, forward, state = self._engine, self._engine.forward, self._state
        batch, layout = len(inputs[state.adapter.latents]), None if isinstance(grid, str) else forward.layout
        step = self._denoising.context(state)
        engine.begin_forward(step, layout, batch)
        state.begin_unseen = False
        if isinstance(grid, str) and any(forward.acting.values()):
            raise ConfigError(f"{state.name} ({state.adapter.name}) can't be thinned out in this call: {grid}")
        _leave_perturbed_dense(engine, state, step)
        with naming_lost(state, self._parallel):
            out = run(*args, **kwargs)
        state.note_ran()
        _uncount_skipped(engine, state, step)
        return out

    def _require_traceable(self) -> None:
        """Raise `ConfigError` where methods can't act, or don't know when to, inside compiled code."""
        if not self.traceable:
            raise ConfigError(INSIDE_COMPILED)
        branches = self._state.branches
        if self._engine.attention and not (branches and branches[-1].tells_step):
            raise ConfigError(STEP_UNSEEN)

    def _traced(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> Any:
        """Run inside a graph of the whole transformer, where only the grid can be passed on."""
        forward, adapter = self._engine.forward, self._state.adapter
        self._require_traceable()
        forward.shards = None
        grid = adapter.grid(self._config, inputs)
        sizes = NO_GRID if isinstance(grid, str) else grid
        forward.grid, forward.sizes = as_tensors(sizes), NO_GRID  # whose numbers stay in the graph
        forward.not_a_step = sizes == NO_STEP
        forward.min_keys = fewest_keys(adapter, sizes)
        return run(*args, **kwargs)


def _own_list(value: Any) -> Any:
    """Return a copy of a list: models may take its entries out, and a method may run them again."""
    return list(value) if type(value) is list else value


def _read_grid(adapter: Adapter, config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Return the grid of a forward, or in words why it has none, as the adapter gives it."""
    what = f"the grid of the adapter {adapter.name!r}"
    try:
        grid = adapter.grid(config, inputs)
    except KeyError as error:
        raise ConfigError(
            f"{what} asks for the input {error}, but the forward was given {', '.join(inputs)}; correct the adapter's "
            "grid"
        ) from error
    if adapter.latents not in inputs:
        raise ConfigError(
            f"the adapter {adapter.name!r} asks for the input {adapter.latents!r}, but the forward was given "
            f"{', '.join(inputs)}; correct the adapter's latents"
        )
    if isinstance(grid, str) or (
        isinstance(grid, tuple) and len(grid) == 5 and all(isinstance(size, int) for size in grid)
    ):
        return grid
    raise ConfigError(
        f"{what} gave {grid!r}; it must give five whole numbers (frames, height, width, before, after), or a "
        "sentence that says why this forward has none"
    )


def _leave_perturbed_dense(engine: Engine, state: TransformerState, step: StepContext) -> None:
    """Leave to diffusers what its perturbed attention guidance perturbs: it knows only its own attention calls."""
    for layer in state.layers:
        hooks = getattr(getattr(layer.module, "_diffusers_hook", None), "hooks", {})
        perturbed = any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())
        if perturbed and engine.forward.acting[layer]:
            engine.forward.acting[layer] = ()
            engine.recorder.forward(state.name, step.branch, step.step_index, 1)
    engine.forward.switch()


def _uncount_skipped(engine: Engine, state: TransformerState, step: StepContext) -> None:
    """Take back from the report the dense calls that one of diffusers' caches skipped in the forward that ends.

    A module of a compiled block is never seen to run; it counts as if it had.
    """
    forward, recorder = engine.forward, engine.recorder
    for number, layer in enumerate(engine.layers):
        if layer.state is state and not layer.processor._dit_accel_sparse:
            if number in forward.reached:
                recorder.seen.add(number)
            elif number in recorder.seen:
                recorder.reduced += 1
                recorder.forward(state.name, step.branch, step.step_index, -1)
