"""Attach methods to a pipeline or a transformer, and take them off again without a trace."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from dit_accel_kernels import decisions
from torch import nn

from ..adapters.installed import adapter_for
from ..errors import AttachError, ConfigError
from ..estimate.prediction import predict_attached
from ..methods.compose import make_handlers
from ..methods.config import MethodConfig
from ..methods.few_steps import FEW, adds_noise, check_preset, few_steps_sign
from ..methods.find import (
    LayerFilter,
    attention_modules,
    chosen_layers,
    components_of,
    find_transformers,
    model_of,
    resolve_model,
    scheduler_of,
)
from ..methods.presets import LEAST_STEPS, Level, PresetMethods, preset_methods
from ..report.report import PredictedSpeedup, Report, call_reports, step_reports
from . import backends
from .backends import Backend, Dense, ReplacedTransformer
from .check import Check, check
from .engine import Engine
from .forward import ForwardWrapper
from .layers import AttentionLayer, Observer, TransformerState
from .parallel import context_parallel, require_parallel
from .pipeline_call import called, watch_call
from .processor import dense_attention_of, retire_processor, unwrap_processor, wrap_processor
from .seam import owner_of, shadow, wrap_call
from .site import TransformerSite
from .state import DenoisingState
from .steps import current_run


class Attachment:
    """Methods attached to the transformers of one pipeline; made by `attach`, undone by `detach` or as a context.

    What is detached already raises `AttachError`.
    """

    def __init__(
        self, denoising: DenoisingState, model: dict[str, str], put_on: Callable[["Attachment"], None]
    ) -> None:
        self._model = model
        self._put_on = put_on
        self._undo: list[Callable[[], None]] = []
        self._preset: PresetMethods | None = None
        self._begin(denoising)

    def _begin(self, denoising: DenoisingState) -> None:
        """Let an engine run from now on that nothing has run in."""
        self.denoising, self.engine, self._attached = denoising, denoising.engine, True
        self._warned = self._warned_of_replaced = False
        denoising.on_run.append(self._end_run)

    def __enter__(self) -> "Attachment":
        self._require_attached()
        return self

    def __exit__(self, *error: object) -> None:
        if self._attached:
            self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AttachError(
            "an attachment can't be copied or pickled; copy the pipeline, whose copy has none, and attach to that"
        )

    def __repr__(self) -> str:
        methods = ", ".join(handler.name for handler in self.engine.handlers) or "no method"
        where = ", ".join(f"{name} ({what})" for name, what in self._model.items())
        return f"<Attachment: {methods} on {where}{'' if self._attached else '; detached'}>"

    @property
    def preset(self) -> str:
        """What the preset attached, and what it left out and why, in one line; empty without a preset."""
        return self._preset.words() if self._preset else ""

    def detach(self) -> None:
        """Restore processors, calls, contexts and attributes to what they were, bit for bit, and free all state."""
        self._require_attached()
        self._warn_if_replaced()
        while self._undo:
            self._undo.pop()()
        self.engine.reset()
        self._attached = False

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Take the methods off inside the block, and put them on again behind it, as if attached anew."""
        self._require_attached()
        observers = self.engine.observers
        self.detach()
        try:
            yield
        finally:
            self._put_on(self)
            self.engine.observers.extend(observers)

    def call(self, prompt: Any = None, **call: Any) -> Any:
        """Call the pipeline, after a small picture where `UltraImage` wants one first, and return what it returns.

        Raises:
            AttachError: if there is no pipeline to call, or the methods are detached already.
            ConfigError: if a small picture is wanted of a pipeline for which that is not described.
        """
        self._require_attached()
        arguments = call if prompt is None else {"prompt": prompt, **call}
        return called(self.denoising.pipe, self.engine.handlers, arguments)

    def check(self, prompt: Any = None, seed: int = 0, **call: Any) -> Check:
        """Generate with one seed dense and with the methods, twice each if that is short, and compare the results.

        Args:
            prompt: what to generate; None: ``call`` has its embeddings, such as ``prompt_embeds``.
            seed: of the noise.
            call: further arguments of the pipeline's call, such as ``num_inference_steps`` and ``height``.

        Raises:
            AttachError: if there is no pipeline to call, or the methods are detached already.
            ConfigError: if the pipeline's result holds no frames or picture.
        """
        arguments = call if prompt is None else {"prompt": prompt, **call}
        return check(self.denoising.pipe, self.suspended, self.call, seed, arguments, self.report)

    def reset(self) -> None:
        """Free what the methods carry from step to step, as the next generation does by itself; keep the report.

        In a loop written by hand the next forward begins another generation. Its first timestep tells that too, unless
        the loop before was broken off in its first step.
        """
        self.engine.reset()
        self.denoising.broke_off()

    @contextlib.contextmanager
    def observe(self, callback: Observer) -> Iterator[None]:
        """Call ``callback`` with a `PlannedCall` of every planned attention call inside the block.

        What the callback raises ends the forward.
        """
        observers = self.engine.observers
        observers.append(callback)
        try:
            yield
        finally:
            observers.remove(callback)

    def report(self) -> Report:
        """Return what ran in the last generation."""
        engine, denoising, recorder = self.engine, self.denoising, self.engine.recorder
        recorder.settle()
        held = {handler.name: handler.state_bytes() for handler in engine.handlers}
        problem = backends.problem_of(denoising) if self._attached else ""
        preset = self._preset.words(denoising.num_inference_steps) if self._preset else ""
        chosen = decisions() if engine.backend == "auto" else []
        notes = [*filter(None, [preset]), *recorder.dense_notes(), *recorder.notes, *chosen, *[problem] * bool(problem)]
        return Report(
            methods={handler.name: handler.settings.to_dict() for handler in engine.handlers},
            backend=recorder.spell_backend(engine.backend),
            model=self._model,
            steps=step_reports(recorder),
            notes=tuple(notes),
            problem=problem,
            calls=call_reports(recorder),
            state_bytes={name: size for name, size in held.items() if size},
            timing=recorder.clock.timing(),
            predicted=self._predicted(),
            sections=tuple(section for handler in engine.handlers if (section := handler.report()) is not None),
        )

    def _predicted(self) -> PredictedSpeedup | None:
        """Predict the last generation; None before its size and steps are known."""
        engine, steps = self.engine, self.denoising.num_inference_steps
        state = next((state for state in engine.transformers.values() if state.layouts), None)
        if state is None or not steps:
            return None
        layout, _ = next(iter(state.layouts.values()))
        return predict_attached(engine.handlers, layout, steps, self._preset, state.transformer)

    def _require_attached(self) -> None:
        if not self._attached:
            raise AttachError("these methods are detached already; call dit_accel.attach again to use them")

    def _end_run(self) -> None:
        """Say once if the run that ends planned nothing, or another transformer of the pipeline was replaced."""
        self._warn_if_replaced()
        if not self._warned:
            self._warned = backends.warn_if_unplanned(self.denoising)

    def _warn_if_replaced(self) -> None:
        """Say once that a transformer was replaced since attach."""
        if not self._warned_of_replaced and (why := backends.replaced_transformers(self.denoising)):
            self._warned_of_replaced = True
            warnings.warn(why, ReplacedTransformer, stacklevel=3)


def attach(
    model: Any,
    *methods: MethodConfig,
    preset: Level | Literal["none"] | None = None,
    backend: Backend = "auto",
    dense: Dense | None = None,
    layers: LayerFilter | None = None,
) -> Attachment:
    """Attach methods to one pipeline or transformer; all of them or, on any error, none.

    Args:
        model: a diffusers pipeline (all its transformers that an adapter covers) or one transformer.
        methods: configs such as ``RadialAttention()``.
        preset: methods that are chosen for the model, beside those that are named, which win: ``careful``,
            ``balanced``, ``fast``, ``few-steps`` (`dit_accel.methods.presets`), or ``none``. Unset, with none named:
            ``few-steps`` if a LoRA's name or the scheduler tells of them, else ``balanced``; `Attachment.preset` says.
        backend: the kernel backend of planned attention calls. A named one never falls back; with ``auto`` calls whose
            tile lists only save time stay dense on a CPU that is known to gain none by them, and the report says so.
        dense: what computes dense calls, steps and layers: ``user``, the attention set in diffusers, or ``auto``, on a
            CPU our compiled loop where a short test has it faster: outputs are within rounding, the report says so.
            Unset: ``auto`` with a preset, else ``user``, under which a method that changes nothing changes no bit.
        layers: the attention layers that methods may change; the others stay as they are. Indices in each transformer,
            such as ``"3-20"`` or ``"0, 3-20"``, or a function of a module's name and the module. None: all.

    Returns:
        The attachment: ``report()``, ``detach()``, or a ``with`` block.

    Raises:
        UnsupportedModel: if no adapter covers the model, or a processor is foreign.
        ConfigError: if a method does not fit the model or the others, or the layers are not there.
        AttachError: if something is attached already.
        MissingBackend: if the named backend can't run here.
    """
    scheduler = scheduler_of(model)
    sign = few_steps_sign(find_transformers(model).values(), scheduler)
    level = preset or ("none" if methods else FEW if sign else "balanced")
    if level == "none":
        return _attach(model, methods, backend, layers, dense or "user")

    def put_on(configs: Sequence[MethodConfig]) -> Attachment:
        return _attach(model, tuple(configs), backend, layers, dense or "auto")

    check_preset(level, sign, None, LEAST_STEPS)
    choose = partial(preset_methods, level, model_of(model), methods, noisy=adds_noise(scheduler))
    chosen = choose()
    try:
        attachment = put_on((*methods, *chosen.configs))
    except ConfigError:  # such as positions of a transformer that is compiled whole: find the method that is refused
        chosen = choose(try_out=lambda configs: put_on(configs).detach())
        attachment = put_on((*methods, *chosen.configs))
    attachment._preset = chosen
    return attachment


def _attach(
    model: Any, methods: tuple[MethodConfig, ...], backend: Backend, layers: LayerFilter | None, dense: Dense
) -> Attachment:
    transformers = find_transformers(model)
    parts = components_of(model)
    for name, transformer in transformers.items():
        if owner_of(transformer) is not None or owner_of(parts[name]) is not None:
            raise AttachError(
                f"methods are attached to {name} already; call detach() on that attachment first "
                "(dit_accel.attachment_of gives it)"
            )
    handlers = make_handlers(methods, model_of(model))
    backends.check_backend(backend, dense, handlers)
    pipe = model if parts.get("transformer") is not model else None

    def put_on(attachment: Attachment) -> None:
        again = Engine(make_handlers(methods, model_of(model)), backend, dense)
        attachment._begin(DenoisingState(pipe, again))
        _install(attachment, transformers, parts, layers)

    denoising = DenoisingState(pipe, Engine(handlers, backend, dense))
    attachment = Attachment(denoising, _described(transformers), put_on)
    _install(attachment, transformers, parts, layers)
    return attachment


def _install(
    attachment: Attachment, transformers: dict[str, Any], parts: dict[str, Any], layers: LayerFilter | None
) -> None:
    """Install an attachment's methods on its transformers; on any error none."""
    try:
        classes: dict[type, type] = {}
        for name, transformer in transformers.items():
            adapter = adapter_for(type(transformer).__name__)
            state = attachment.engine.add_transformer(name, transformer, adapter)
            state.part = parts[name]
            _install_processors(attachment, state, layers, classes)
            if (parallel := context_parallel(transformer)) is not None:
                require_parallel(attachment.engine, state, parallel)
            _install_calls(attachment, state)
        attachment._undo += watch_call(attachment.denoising, next(iter(transformers.values())))
    except BaseException:
        attachment.detach()
        raise


def attachment_of(model: Any) -> Attachment | None:
    """Find the attachment of a pipeline or a transformer, or None; for a handle that was lost."""
    for part in components_of(model).values():
        for module in (part, getattr(part, "_orig_mod", None)):
            if isinstance(module, nn.Module) and isinstance(owner := owner_of(module), Attachment):
                return owner
    return None


def _described(transformers: dict[str, Any]) -> dict[str, str]:
    models = {name: resolve_model(name, transformers) for name in transformers}
    return {
        name: f"{model.adapter.name}, {model.family.name if model.family else 'sizes of no released model'}"
        for name, model in models.items()
    }


def _install_processors(
    attachment: Attachment, state: TransformerState, layers: LayerFilter | None, classes: dict[type, type]
) -> None:
    engine = attachment.engine
    modules = chosen_layers(attention_modules(state.transformer, state.adapter), layers)
    for index, (_, module, depth) in modules.items():
        original: Any = module.processor
        layer = AttentionLayer(state, module, index, depth)
        layer.processor = wrap_processor(original, len(engine.layers), classes, engine)
        layer.dense, _ = dense_attention_of(layer.processor)
        engine.layers.append(layer)
        state.layers.append(layer)
        layer.module.processor = layer.processor

        def restore(module: Any = module, ours: Any = layer.processor, original: Any = original) -> None:
            if module.processor is ours:  # whatever the user set since then is the user's
                module.processor = unwrap_processor(ours, original)
            retire_processor(ours)  # diffusers keeps processors that fused ones replace, and puts them back

        attachment._undo.append(restore)


def _install_calls(attachment: Attachment, state: TransformerState) -> None:
    """Follow a transformer's forwards and the pipeline's denoising calls, and let the methods install themselves."""
    denoising, undo, transformer = attachment.denoising, attachment._undo, state.transformer
    engine = attachment.engine
    original = getattr(transformer, "cache_context", None)
    site = TransformerSite(denoising, state, undo, original, compiled_whole=state.part is not transformer)
    for handler in engine.handlers:
        handler.install(site)
    site.install_blocks()
    forward = ForwardWrapper(denoising, state, site.forwards, on_modules=site.on_modules)
    undo.append(wrap_call(state.part, forward, attachment))
    followed = _followed_context(denoising, state, forward, original)
    undo.append(shadow(transformer, "cache_context", followed))  # diffusers' own or not, a loop may say where it stands
    if hasattr(transformer, "_reset_stateful_cache"):
        reset = transformer._reset_stateful_cache

        def end_of_run(*args: Any, **kwargs: Any) -> None:
            """Free the methods' state where pipelines tell that a run is over: they reset diffusers' caches then."""
            attachment._end_run()
            engine.reset()
            reset(*args, **kwargs)

        undo.append(shadow(transformer, "_reset_stateful_cache", end_of_run))


def _followed_context(
    denoising: DenoisingState, state: TransformerState, forward: ForwardWrapper, original: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Return a ``cache_context`` that notes the pipeline's denoising calls, around diffusers' own if there is one."""
    engine = denoising.engine

    @contextlib.contextmanager
    def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
        run = current_run(state.transformer)
        denoising.threads.require(state, run)
        forward.note_weights()
        denoising.enter(state, name, kwargs, run)
        if forward.traceable and state.branches[-1].tells_step and not state.nested:
            engine.expect_forward(denoising.context(state), state.begin_unseen)
        try:
            with contextlib.nullcontext() if original is None else original(name, **kwargs):
                yield
            state.begin_unseen = engine.forward.expected
            if engine.forward.expected:
                engine.count_dense(denoising.context(state))
        finally:
            engine.forward.expected = False
            denoising.leave(state)

    return cache_context
