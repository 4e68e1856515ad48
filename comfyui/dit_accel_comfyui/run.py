"""One sampling run with methods attached: a host of dit-accel's engine, driven by ComfyUI's forwards and calls.

The plan of every call, its kernel, what methods keep from step to step and the counts are the engine's; here is only
what ComfyUI says differently: where tokens stand, which step it is and whose prompt a batch holds.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from dit_accel_kernels import BackendUnavailableError
from torch import Tensor

from dit_accel.adapters.adapter import Adapter
from dit_accel.attachment.engine import Engine
from dit_accel.attachment.host import HostedModel
from dit_accel.errors import ConfigError, DitAccelError
from dit_accel.methods.base import Handler, Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.config import MethodConfig
from dit_accel.plan.context import StepContext
from dit_accel.plan.layout import TokenLayout

from .calls import AttentionArguments, Override, call_from
from .placing import Steps, TokenPlacement, latents_of, layout_from_options, placement_of

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
        self.host: HostedModel | None = None
        self._steps = Steps()
        self._thread = threading.get_ident()
        self._names: dict[tuple[Any, ...], str] = {}
        self._repeats: tuple[float, Counter[Any]] = (-1.0, Counter())
        self._layers: dict[tuple[Any, ...], Any] = {}
        self._counts: dict[str, int] = {}  # branch -> attention calls of a forward
        self._placement: TokenPlacement | str = ""
        self._stopped = False
        self._step: StepContext | None = None
        self._layout: TokenLayout | None = None  # of the running forward, once a call tells it
        self._calls: Counter[Any] = Counter()  # of the running forward, by the model's block

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
        host = self.host = self.host or self._set_up(model)
        try:
            place = self._begin(model, inputs, options)
        except ConfigError as error:
            self.problem(str(error))
            return run()
        with host.denoising(**place) as step:
            self._step = step
            return self._timed(host, step, run, inputs, options)

    def _timed(
        self, host: HostedModel, step: StepContext, run: Callable[[], Any], inputs: Mapping[str, Any],
        options: dict[str, Any],
    ) -> Any:  # fmt: skip
        """Return what a forward gives, and keep how long it took, caches included."""
        engine = host.engine

        def innermost() -> Any:
            came = True
            engine.begin_forward(step, None, step.batch)
            try:
                with self._in_front(engine, step, options) as came_in:
                    out = run()
                came = came_in()
            finally:
                engine.end_forward(ran=came)
            if not came:
                self.skipped_elsewhere.add((step.step_index, step.branch))
            return out

        latents = latents_of(inputs)
        device = torch.device("cpu") if latents is None else latents.device
        with engine.recorder.timed(step, device, self._calls.total):
            return self._cached(host, step, inputs, innermost)

    def attend(self, arguments: AttentionArguments, dense: Callable[..., Tensor]) -> Tensor | None:
        """Return the output of an attention call as the model wants it, or None: it is for the model's own attention.

        Args:
            arguments: the call's.
            dense: (q, k, v, mask, scale) as they lie -> output, likewise: the model's own attention.
        """
        engine, step = self.engine, self._step
        if engine is None or step is None or self._stopped or not arguments.is_self_attention:
            return None
        if threading.get_ident() != self._thread:
            return self._declines(step, "it ran in another thread than the sampler")
        tokens = arguments.tokens
        layout = layout_from_options(arguments.kwargs.get("transformer_options") or {}, tokens)
        if layout is None:
            layout = self._placement if isinstance(self._placement, str) else self._placement.layout(tokens)
        if isinstance(layout, str):
            return self._declines(step, layout)
        call = call_from(arguments, self.backend)
        if isinstance(call, str):
            return self._declines(step, call)
        layer = self._layer(engine, arguments)
        if self._layout not in (None, layout):
            return self._declines(step, f"other calls of the forward have another number of tokens than {tokens}")
        self._layout = layout
        try:
            if not engine.acts(layer, layout.grid, len(call.q)):
                return self._declines(step, BY_OPTIONS)
            layer.dense = dense
            out, _ = engine.attend(layer, call, layout.grid)
        except FAILURES as error:
            self._stopped = True
            self.problem(f"attention stayed dense from step {step.step_index} on: {_one_line(error)}")
            return self._declines(step, "a method could not act on it")
        finally:
            layer.dense = None
        return arguments.returned(out)

    def end(self) -> None:
        """Free what methods keep from step to step; counts and times stay."""
        if self.host is None:
            if not self.problems:
                self.problem("the model's code runs no wrapper around its forward, so that no method acted")
            return
        self.host.engine.end_run()
        self.host.caches.clear()
        self._step = None
        self._layers.clear()

    @property
    def engine(self) -> Engine | None:
        """What plans and runs the attention calls; None before the first forward."""
        return None if self.host is None else self.host.engine

    def _set_up(self, model: Any) -> HostedModel:
        """Return a model with the methods' handlers on it."""
        self.model_name = type(model).__name__
        adapter = Adapter(name=self.model_name, transformers=(), self_attention=(), blocks=(), latents="x")
        handlers = self._handlers(Model(adapter=adapter, family=None, heads=_heads(model), layers=_layers(model)))
        return HostedModel(NAME, model, adapter, handlers, self.backend)

    def _handlers(self, model: Model) -> list[Handler]:
        """Return the methods' handlers on a model; one that can't act there, or beside those before it, is left out."""
        configs: list[MethodConfig] = []
        for config in self.configs:
            try:
                make_handlers((*configs, config), model)
            except ConfigError as error:
                self.problem(f"{config.name} is left out: {_one_line(error)}")
            else:
                configs.append(config)
        return make_handlers(configs, model)

    def _begin(self, model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return where the denoising stands at a forward that begins, as `HostedModel.denoising` takes it."""
        latents = latents_of(inputs)
        if not self._steps.sigmas and (sigmas := options.get("sample_sigmas")) is not None:
            self._steps = Steps(tuple(float(sigma) for sigma in sigmas.tolist()))
        sigma = options.get("sigmas")
        level = None if sigma is None else float(sigma.flatten()[0])
        index = self._steps.index(-1.0 if level is None else level)
        self._placement, self._layout = placement_of(model, inputs), None
        self._calls.clear()
        return {
            "branch": self._branch(options, level), "batch": None if latents is None else len(latents),
            "step_index": index, "num_inference_steps": self._steps.count, "sigma": level,
        }  # fmt: skip

    def _branch(self, options: Mapping[str, Any], level: float | None) -> str:
        """Return the name of a forward among those of a step: whose prompts its batch holds, and of which window.

        ComfyUI batches prompts as memory allows; what was kept for one batch says nothing of another.
        """
        window = options.get("context_window")
        part = tuple(getattr(window, "index_list", ()) or ())
        uuids = tuple(str(uuid) for uuid in options.get("uuids") or ())
        if self._repeats[0] != level:
            self._repeats = (-1.0 if level is None else level, Counter())
        repeat = self._repeats[1][uuids, part]
        self._repeats[1][uuids, part] += 1
        key = (uuids, part, repeat)
        if key not in self._names:
            kinds = ("cond" if entry == 0 else "uncond" for entry in options.get("cond_or_uncond") or ())
            base = "_".join(kinds) or "call"
            same = sum(name.split(" ")[0] == base for name in self._names.values())
            self._names[key] = f"{base} {same + 1}" if same else base
        return self._names[key]

    def _layer(self, engine: Engine, arguments: AttentionArguments) -> Any:
        """Return the layer of a self-attention call: by its block where the model tells it, else by its turn."""
        block = arguments.block
        key = (*block, self._calls[block])
        self._calls[block] += 1
        if key not in self._layers:
            self._layers[key] = engine.add_layer(NAME, arguments.heads)
        return self._layers[key]

    def _declines(self, step: StepContext, why: str) -> None:
        """Count an attention call that stays dense."""
        self.declined.setdefault((step.step_index, step.branch), Counter())[why] += 1

    def _cached(self, host: HostedModel, step: StepContext, inputs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """Return a forward's output, by a cache where one is attached."""
        if not host.caches:
            return run()
        latents = _last_first(inputs["x"])
        if latents_of({"x": latents}) is None:
            self.problem("no step is skipped: the latents are neither a tensor nor a list of tensors")
            return run()
        computed: list[Any] = []

        def once() -> Any:
            computed.append(run())
            return _last_first(computed[0])

        try:
            return _last_first(host.around({"x": latents}, once))
        except ConfigError as error:
            self.problem(f"no step was skipped from step {step.step_index} on: {_one_line(error)}")
            host.caches.clear()
            return computed[0] if computed else run()

    @contextmanager
    def _in_front(self, engine: Engine, step: StepContext, options: dict[str, Any]) -> Iterator[Callable[[], bool]]:
        """Let attention calls inside the block come here first; what held the slot gets those that are declined.

        Give what tells, after the block, whether the model ran, or another node's wrapper skipped it.
        """
        if not engine.attention or self._stopped:
            yield lambda: True
            return
        previous = options.get(SLOT)
        override, came = Override(self.attend, previous), True
        options[SLOT] = override
        try:
            yield lambda: came
        finally:
            holder = options.get(SLOT)
            if not override.calls and holder is override:
                came = False
            elif not override.calls:
                self.problem(f"{_name_of(holder)} took the attention slot inside the forward and passed no call on")
            if previous is None:
                options.pop(SLOT, None)
            else:
                options[SLOT] = previous
            self._forget_shifted(engine, step.branch)

    def _forget_shifted(self, engine: Engine, branch: str) -> None:
        """Forget what methods keep if a branch had another number of layers than before: blocks were left out."""
        count = self._calls.total()
        if count and self._counts.setdefault(branch, count) != count:
            self._counts[branch] = count
            engine.reset()
            engine.recorder.note(f"{branch}: the number of attention layers changed, so methods began anew")


def _heads(model: Any) -> int:
    heads = next((getattr(model, name) for name in ("num_heads", "num_attention_heads") if hasattr(model, name)), 1)
    return heads if isinstance(heads, int) else 1


def _layers(model: Any) -> int:
    """Return about how many self-attention layers a model has: the blocks of its block lists."""
    lists = ("blocks", "double_blocks", "single_blocks", "transformer_blocks", "layers")
    blocks = (getattr(model, name, None) for name in lists)
    return sum(len(entry) for entry in blocks if isinstance(entry, torch.nn.ModuleList))


def _last_first(streams: Any) -> Any:
    """Return a list of streams the other way round, since caches measure the last, and ComfyUI's first is the video."""
    return list(reversed(streams)) if isinstance(streams, (list, tuple)) else streams


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _name_of(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', '?')}.{name}"
