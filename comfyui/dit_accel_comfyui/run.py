"""One sampling run with methods attached: their handlers, driven by ComfyUI's forwards and attention calls.

The plan of every call, its kernel, what methods keep from step to step and the counts are dit-accel's own `Execution`;
here is only what ComfyUI says differently: where tokens stand, which step it is and whose prompt a batch holds.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from dit_accel_kernels import BackendUnavailableError
from torch import Tensor

from dit_accel.adapters.adapter import Adapter
from dit_accel.attachment.execution import Execution
from dit_accel.attachment.layers import AttentionLayer, Branch, TransformerState
from dit_accel.errors import ConfigError, DitAccelError
from dit_accel.methods.base import Handler, Model
from dit_accel.methods.caches.engine import StepCacheHandler
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.site import AroundForward, ForwardContext
from dit_accel.plan.context import StepContext
from dit_accel.report.clock import Kind

from .calls import Given, Override, given_call
from .placing import Placing, Steps, latents_of, placing_of, told_layout

LOG = logging.getLogger("dit_accel_comfyui")
SLOT = "optimized_attention_override"
NAME = "model"
BY_OPTIONS = "the methods' options keep the step or layer dense"
FAILURES = (DitAccelError, BackendUnavailableError, NotImplementedError, ValueError)
"""What our kernels and methods raise for a call that they can't take: it goes to the model's own attention."""


class Run:
    """One sampling run of a model with methods attached.

    Args:
        configs: the methods.
        backend: the kernel backend's name.

    Attributes:
        problems: one line for each thing that kept methods from acting.
        declined: (step, branch) -> why attention calls stayed dense -> how many.
        skipped_elsewhere: (step, branch) of forwards that another node's wrapper skipped.
        model_name: class of the diffusion model; empty before its first forward.
    """

    def __init__(self, configs: tuple[MethodConfig, ...], backend: str) -> None:
        self.configs, self.backend = configs, backend
        self.problems: list[str] = []
        self.declined: dict[tuple[int, str], Counter[str]] = {}
        self.skipped_elsewhere: set[tuple[int, str]] = set()
        self.model_name = ""
        self.execution: Execution | None = None
        self._state: TransformerState | None = None
        self._caches: list[AroundForward] = []
        self._steps = Steps()
        self._thread = threading.get_ident()
        self._names: dict[tuple[Any, ...], str] = {}
        self._repeats: tuple[float, Counter[Any]] = (-1.0, Counter())
        self._layers: dict[tuple[Any, ...], AttentionLayer] = {}
        self._counts: dict[str, int] = {}
        self._placing: Placing | str = ""
        self._stopped = False
        self._step: StepContext | None = None
        self._calls: Counter[Any] = Counter()
        self._placed = 0
        self._came = True

    def problem(self, text: str) -> None:
        """Keep a line on what kept methods from acting, once, and log it."""
        if text not in self.problems:
            self.problems.append(text)
            LOG.warning("dit-accel: %s", text)

    def forward(self, model: Any, run: Callable[[], Any], inputs: Mapping[str, Any], options: dict[str, Any]) -> Any:
        """Return what a forward gives with the methods acting on it.

        Args:
            model: the diffusion model.
            run: what lies further in: other wrappers and the forward itself.
            inputs: the forward's, by name.
            options: its ``transformer_options``, the same object that its attention calls get.
        """
        if threading.get_ident() != self._thread:
            self.problem("a forward ran in another thread than the sampler, without the methods")
            return run()
        if self.execution is None:
            self._set_up(model)
        try:
            self._begin(model, inputs, options)
        except ConfigError as error:
            self.problem(str(error))
            return run()
        execution, step, state = self.execution, self._step, self._state
        assert execution is not None and step is not None and state is not None  # noqa: PT018
        recorder, latents = execution.recorder, latents_of(inputs)
        device = torch.device("cpu") if latents is None else latents.device
        begin = recorder.clock.begin(device)
        ran, reduced = recorder.forwards_run, recorder.reduced

        def innermost() -> Any:
            recorder.forwards_run += 1
            recorder.forward(NAME, step.branch, step.step_index, 0)
            with self._in_front(options):
                return run()

        try:
            return self._cached(inputs, innermost)
        finally:
            state.branches.pop()
            kind: Kind = "reduced" if recorder.reduced > reduced else "dense"
            if recorder.forwards_run == ran or not self._came:
                kind = "skipped"
            if not self._came:
                self.skipped_elsewhere.add((step.step_index, step.branch))
            recorder.clock.end((NAME, step.step_index, step.branch), kind, begin, device, self._placed)

    def attend(self, given: Given, dense: Callable[..., Tensor]) -> Tensor | None:
        """Return the output of an attention call as the model wants it, or None: it is for the model's own attention.

        Args:
            given: the call's arguments.
            dense: (q, k, v, mask, scale) as they lie -> output, likewise: the model's own attention.
        """
        execution, step = self.execution, self._step
        if execution is None or step is None or self._stopped or not given.is_self_attention:
            return None
        if threading.get_ident() != self._thread:
            return self._declines("it ran in another thread than the sampler")
        layout = told_layout(given.kwargs.get("transformer_options") or {}, given.tokens)
        if layout is None:
            layout = self._placing if isinstance(self._placing, str) else self._placing.layout(given.tokens)
        if isinstance(layout, str):
            return self._declines(layout)
        call = given_call(given, self.backend)
        if isinstance(call, str):
            return self._declines(call)
        sizes = (layout.frames, layout.height, layout.width, layout.text_before, layout.text_after)
        forward, layer = execution.forward, self._layer(given)
        if forward.noted not in (None, sizes):
            return self._declines(f"other calls of the forward have another number of tokens than {given.tokens}")
        try:
            if forward.noted is None:
                self._lay(sizes, layout, len(call.q))
            handlers = forward.acting.get(layer)
            if handlers is None:
                assert forward.step is not None
                handlers = forward.acting[layer] = execution.acting(forward.step, layer.depth)
            if not handlers:
                return self._declines(BY_OPTIONS)
            layer.dense = dense
            out, _ = execution.attend(layer.index, call, sizes)
        except FAILURES as error:
            self._stopped = True
            self.problem(f"attention stayed dense from step {step.step_index} on: {_one_line(error)}")
            return self._declines("a method could not act on it")
        finally:
            layer.dense = None
        return given.returned(out)

    def end(self) -> None:
        """Free what methods keep from step to step; counts and times stay."""
        if self.execution is None:
            if not self.problems:
                self.problem("the model's code runs no wrapper around its forward, so that no method acted")
            return
        self.execution.recorder.settle()
        self.execution.reset()
        self._caches.clear()
        self._state = self._step = None
        self._layers.clear()

    def _set_up(self, model: Any) -> None:
        """Make the methods' handlers for a model."""
        self.model_name = type(model).__name__
        adapter = Adapter(name=self.model_name, transformers=(), self_attention=(), blocks=(), latents="x")
        handlers = self._handlers(Model(adapter=adapter, family=None, heads=_heads(model), layers=_layers(model)))
        site: Any = SimpleNamespace(name=NAME, transformer=model, adapter=adapter, around_forward=self._caches.append)
        for handler in handlers:
            if isinstance(handler, StepCacheHandler):
                handler.install(site)
        self.execution = Execution(handlers, self.backend)
        self._state = TransformerState(NAME, model, adapter)

    def _handlers(self, model: Model) -> list[Handler]:
        """Return the methods' handlers on a model; one that can't act there, or beside those before it, is left out."""
        kept: list[MethodConfig] = []
        for config in self.configs:
            try:
                make_handlers((*kept, config), model)
            except ConfigError as error:
                self.problem(f"{config.name} is left out: {_one_line(error)}")
            else:
                kept.append(config)
        return make_handlers(kept, model)

    def _begin(self, model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Note where the denoising stands at a forward that begins."""
        execution, state, latents = self.execution, self._state, latents_of(inputs)
        assert execution is not None and state is not None  # noqa: PT018
        if not self._steps.sigmas and (sigmas := options.get("sample_sigmas")) is not None:
            self._steps = Steps(tuple(float(sigma) for sigma in sigmas.tolist()))
        sigma = options.get("sigmas")
        level = None if sigma is None else float(sigma.flatten()[0])
        index = self._steps.index(-1.0 if level is None else level)
        rows = None if latents is None else len(latents)
        branch = self._branch(options, level)
        state.branches.append(Branch(branch))
        self._placing = placing_of(model, inputs)
        self._calls, self._placed, self._came = Counter(), 0, True
        execution.forward.begin(rows)
        self._step = StepContext(
            transformer=NAME, branch=branch, step_index=index, num_inference_steps=self._steps.count, sigma=level,
            layout=None, batch=rows, tells_step=True,
        )  # fmt: skip

    def _branch(self, options: Mapping[str, Any], level: float | None) -> str:
        """Return the name of a forward among those of a step: whose prompts its batch holds, and of which window.

        ComfyUI batches prompts as memory allows; what was kept for one batch says nothing of another.
        """
        window = options.get("context_window")
        part = tuple(getattr(window, "index_list", ()) or ())
        uuids = tuple(str(one) for one in options.get("uuids") or ())
        if self._repeats[0] != level:
            self._repeats = (-1.0 if level is None else level, Counter())
        repeat = self._repeats[1][uuids, part]
        self._repeats[1][uuids, part] += 1
        key = (uuids, part, repeat)
        if key not in self._names:
            kinds = ("cond" if one == 0 else "uncond" for one in options.get("cond_or_uncond") or ())
            base = "_".join(kinds) or "call"
            same = sum(name.split(" ")[0] == base for name in self._names.values())
            self._names[key] = f"{base} {same + 1}" if same else base
        return self._names[key]

    def _lay(self, sizes: tuple[int, int, int, int, int], layout: Any, rows: int) -> None:
        """Let the methods see the layout of the running forward, at its first attention call."""
        execution, step, state = self.execution, self._step, self._state
        assert execution is not None and step is not None and state is not None  # noqa: PT018
        forward = execution.forward
        forward.lay(sizes)
        execution.note_layout(state, layout, rows)
        forward.noted = sizes
        forward.step = StepContext(
            transformer=NAME, branch=step.branch, step_index=step.step_index,
            num_inference_steps=step.num_inference_steps, sigma=step.sigma, layout=layout, batch=rows, tells_step=True,
        )  # fmt: skip

    def _layer(self, given: Given) -> AttentionLayer:
        """Return the layer of a self-attention call: by its block where the model tells it, else by its turn."""
        execution, state = self.execution, self._state
        assert execution is not None and state is not None  # noqa: PT018
        block = given.block
        key = (*block, self._calls[block])
        self._calls[block] += 1
        self._placed += 1
        if key not in self._layers:
            number = len(execution.layers)
            module: Any = SimpleNamespace(heads=given.heads)
            self._layers[key] = AttentionLayer(state, module, number, number)
            execution.layers.append(self._layers[key])
        return self._layers[key]

    def _declines(self, why: str) -> None:
        """Count an attention call that stays dense."""
        assert self._step is not None
        self.declined.setdefault((self._step.step_index, self._step.branch), Counter())[why] += 1

    def _cached(self, inputs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """Return a forward's output, by a cache where one is attached."""
        step = self._step
        assert step is not None
        if not self._caches:
            return run()
        latents = _last_first(inputs["x"])
        if latents_of({"x": latents}) is None:
            self.problem("no step is skipped: the latents are neither a tensor nor a list of tensors")
            return run()
        context = ForwardContext(
            transformer=NAME, branch=step.branch, step_index=step.step_index,
            num_inference_steps=step.num_inference_steps, sigma=step.sigma, layout=None, batch=step.batch,
            tells_step=True, inputs={"x": latents},
        )  # fmt: skip
        given: list[Any] = []

        def once() -> Any:
            given.append(run())
            return _last_first(given[0])

        try:
            return _last_first(self._caches[0](context, once))
        except ConfigError as error:
            self.problem(f"no step was skipped from step {step.step_index} on: {_one_line(error)}")
            self._caches.clear()
            return given[0] if given else run()

    @contextmanager
    def _in_front(self, options: dict[str, Any]) -> Iterator[None]:
        """Let attention calls inside the block come here first; what held the slot gets those that are declined."""
        execution, step = self.execution, self._step
        assert execution is not None and step is not None  # noqa: PT018
        if not execution.attention or self._stopped:
            yield
            return
        previous = options.get(SLOT)
        override = Override(self.attend, previous)
        options[SLOT] = override
        try:
            yield
        finally:
            holder = options.get(SLOT)
            if not override.calls and holder is override:
                self._came = False
            elif not override.calls:
                self.problem(f"{_name_of(holder)} took the attention slot inside the forward and passed no call on")
            if previous is None:
                options.pop(SLOT, None)
            else:
                options[SLOT] = previous
            self._forget_shifted(step.branch)

    def _forget_shifted(self, branch: str) -> None:
        """Forget what methods keep if a branch had another number of layers than before: blocks were left out."""
        execution = self.execution
        assert execution is not None
        if self._placed and self._counts.setdefault(branch, self._placed) != self._placed:
            self._counts[branch] = self._placed
            execution.reset()
            execution.recorder.note(f"{branch}: the number of attention layers changed, so methods began anew")


def _heads(model: Any) -> int:
    found = next((getattr(model, name) for name in ("num_heads", "num_attention_heads") if hasattr(model, name)), 1)
    return found if isinstance(found, int) else 1


def _layers(model: Any) -> int:
    """Return about how many self-attention layers a model has: the blocks of its block lists."""
    lists = ("blocks", "double_blocks", "single_blocks", "transformer_blocks", "layers")
    found = (getattr(model, name, None) for name in lists)
    return sum(len(one) for one in found if isinstance(one, torch.nn.ModuleList))


def _last_first(streams: Any) -> Any:
    """Return a list of streams the other way round, since caches measure the last, and ComfyUI's first is the video."""
    return list(reversed(streams)) if isinstance(streams, (list, tuple)) else streams


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _name_of(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', '?')}.{name}"
