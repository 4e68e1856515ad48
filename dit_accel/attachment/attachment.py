"""Attach methods to a pipeline or a transformer, and take them off again without a trace."""

import contextlib
import fnmatch
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from dit_accel_kernels import BACKENDS, flex_requirement, triton_requirement
from torch import nn

from ..adapters.adapter import NO_STEP, Adapter, Family, Grid
from ..adapters.registry import adapter_for, adapters
from ..errors import AttachError, ConfigError, MissingBackend, UnsupportedModel, did_you_mean
from ..methods import METHODS
from ..methods.base import Handler, Model
from ..methods.config import MethodConfig
from ..report.report import Report, call_reports, measured_errors, step_reports
from .lora import lora_state
from .processor import Slot, unwrap_processor, wrap_processor
from .session import NO_GRID, AttentionLayer, Session, TransformerState

_MARK = "_dit_accel_attachment"


class Attachment:
    """Methods attached to the transformers of one pipeline; made by `attach`, undone by `detach` or as a context."""

    def __init__(self, session: Session, slot: Slot, model: dict[str, str]) -> None:
        self._session = session
        self._slot = slot
        self._model = model
        self._undo: list[Callable[[], None]] = []
        self._attached = True

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *error: object) -> None:
        if self._attached:
            self.detach()

    def detach(self) -> None:
        """Restore processors, hooks and contexts to what they were, bit for bit, and free all state.

        Raises:
            AttachError: if it is detached already.
        """
        if not self._attached:
            raise AttachError("these methods are detached already; call dit_accel.attach again to use them")
        while self._undo:
            self._undo.pop()()
        self._session.reset_handlers()
        self._attached = False

    def reset(self) -> None:
        """Free what the methods carry from step to step, as the next generation does by itself; keep the report."""
        self._session.reset_handlers()

    def report(self) -> Report:
        """Return what ran in the last generation."""
        session = self._session
        session.recorder.settle()
        held = {handler.config.name: handler.state_bytes() for handler in session.handlers}
        return Report(
            methods={handler.config.name: handler.config.to_dict() for handler in session.handlers},
            backend=session.backend_report(),
            model=self._model,
            steps=step_reports(session.recorder),
            notes=tuple(session.recorder.notes),
            calls=call_reports(session.recorder),
            state_bytes={name: size for name, size in held.items() if size},
            measured=measured_errors(session.recorder, lambda at: sum(h.probe_share(at) for h in session.handlers)),
        )


def attach(model: Any, *methods: MethodConfig, backend: str = "auto") -> Attachment:
    """Attach methods to one pipeline or transformer; all of them or, on any error, none.

    Args:
        model: a diffusers pipeline (all its transformers that an adapter covers) or one transformer.
        methods: configs such as ``RadialAttention()``; none is allowed and leaves every call dense.
        backend: the kernel backend of planned attention calls. A named one never falls back.

    Returns:
        The attachment: ``report()``, ``detach()``, or a ``with`` block.

    Raises:
        UnsupportedModel: if no adapter covers the model, or a processor is foreign.
        ConfigError: if a method does not fit the model or the others.
        AttachError: if something is attached already.
        MissingBackend: if the named backend can't run here.
    """
    transformers = find_transformers(model)
    for name, transformer in transformers.items():
        if _MARK in transformer.__dict__:
            raise AttachError(f"methods are attached to {name} already; call detach() on that attachment first")
    _check_backend(backend)
    handlers, described = _make_handlers(transformers, methods)
    _check_votes(backend, handlers)
    session = Session(handlers, backend, getattr(model, "scheduler", None))
    slot = Slot()
    attachment = Attachment(session, slot, described)
    try:
        classes: dict[type, type] = {}
        for name, transformer in transformers.items():
            target = TransformerState(name, adapter_for(type(transformer).__name__))
            session.targets.append(target)
            modules = _install_processors(attachment, transformer, target, classes)
            _install_hooks(attachment, transformer, target, modules)
            _install_context(attachment, transformer, target)
            _install_end(attachment, transformer)
            transformer.__dict__[_MARK] = attachment
            attachment._undo.append(lambda transformer=transformer: transformer.__dict__.pop(_MARK))
    except BaseException:
        attachment.detach()
        raise
    return attachment


def find_transformers(model: Any) -> dict[str, Any]:
    """Return the transformers of a pipeline that an adapter covers, by component name; or the transformer itself.

    Raises:
        UnsupportedModel: if there is none; lists the supported classes.
    """
    supported = {name for adapter in adapters().values() for name in adapter.transformers}
    components = getattr(model, "components", None)
    is_pipeline = isinstance(components, dict)
    if not is_pipeline:
        components = {"transformer": model}
    modules = {name: getattr(part, "_orig_mod", part) for name, part in components.items()}
    found = {name: part for name, part in modules.items() if type(part).__name__ in supported}
    if found:
        return found
    classes = sorted({type(part).__name__ for part in modules.values() if isinstance(part, nn.Module)})
    asked = f"{type(model).__name__} holds {', '.join(classes)}" if is_pipeline else f"got {type(model).__name__}"
    hint = did_you_mean(type(modules.get("transformer", model)).__name__, supported)
    raise UnsupportedModel(f"attach needs a pipeline or transformer that an adapter covers, {asked}; {hint}")


def attention_modules(transformer: nn.Module, adapter: Adapter) -> list[tuple[str, nn.Module, int]]:
    """Return (name, module, depth) of the attention modules that methods may change, in the adapter's order.

    Raises:
        UnsupportedModel: if the adapter's patterns match nothing.
    """
    names = {name: module for name, module in transformer.named_modules() if hasattr(module, "processor")}

    def matching(patterns: tuple[str, ...]) -> list[str]:
        return [name for pattern in patterns for name in sorted(fnmatch.filter(names, pattern), key=_natural)]

    main, side = matching(adapter.self_attention), matching(adapter.side_attention)
    config: Any = transformer.config
    dense = matching(adapter.left_dense(config)) if adapter.left_dense else ()
    main = [name for name in main if name not in dense]
    if not main:
        raise UnsupportedModel(
            f"the adapter {adapter.name!r} looks for {', '.join(adapter.self_attention)} in "
            f"{type(transformer).__name__} and finds no such attention module; update the adapter"
        )
    return [(name, names[name], depth) for part in (main, side) for depth, name in enumerate(part)]


def resolve_model(name: str, transformers: dict[str, Any]) -> tuple[Adapter, Family | None, Model]:
    """Return the adapter, the released family (None if unknown) and what handlers may know of one transformer."""
    transformer = transformers[name]
    adapter = adapter_for(type(transformer).__name__)
    experts = sum(type(other) is type(transformer) for other in transformers.values())
    family = adapter.family(transformer.config, experts)
    modules = attention_modules(transformer, adapter)
    module, names = modules[0][1], ("heads", "num_heads", "num_attention_heads")
    heads = next((getattr(of, name) for of in (module, transformer.config) for name in names if hasattr(of, name)), 0)
    return adapter, family, Model(adapter=adapter, family=family, heads=int(heads), layers=len(modules))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise MissingBackend(f"attach has no kernel backend {backend!r}; {did_you_mean(backend, BACKENDS)}")
    # the model may still wait in main memory: ask the device it will run on
    device, missing = torch.accelerator.current_accelerator() or torch.device("cpu"), None
    if backend == "triton":
        missing = triton_requirement(device)
    elif backend == "flex":
        missing = flex_requirement(device.type)
    if missing:
        raise MissingBackend(f"kernel backend {backend!r} needs {missing}; use 'auto' or 'torch'")


def _check_votes(backend: str, handlers: Sequence[Handler]) -> None:
    voting = [handler.config.name for handler in handlers if handler.votes]
    if backend == "flex" and voting:
        raise MissingBackend(f"kernel backend 'flex' has no votes, which {voting[0]} needs; use 'auto' or 'torch'")


def _make_handlers(
    transformers: dict[str, Any], methods: tuple[MethodConfig, ...]
) -> tuple[list[Handler], dict[str, str]]:
    described: dict[str, str] = {}
    handlers: list[Handler] = []
    for name in transformers:
        adapter, family, model = resolve_model(name, transformers)
        described[name] = f"{adapter.name}, {family.name if family else 'sizes of no released model'}"
    for config in methods:
        if type(config) not in METHODS:
            known = ", ".join(sorted(known.__name__ for known in METHODS))
            raise ConfigError(f"attach takes method configs, got {config!r}; known: {known}")
        if any(type(config) is type(handler.config) for handler in handlers):
            raise ConfigError(f"two {type(config).__name__} configs were given; attach one of each method")
        if config.name in adapter.refused:
            raise ConfigError(f"{config.name} makes no sense on {adapter.name}: {adapter.refused[config.name]}")
        handlers.append(METHODS[type(config)](config, model))
    for handler in handlers:
        handler.check_with([other for other in handlers if other is not handler])
    return sorted(handlers, key=lambda handler: (handler.rank, handler.config.name)), described


def _install_processors(
    attachment: Attachment, transformer: nn.Module, target: TransformerState, classes: dict[type, type]
) -> list[nn.Module]:
    """Put our processors on the attention modules, and return these in the order of the target's places."""
    session, modules = attachment._session, []
    for layer, (_, module, depth) in enumerate(attention_modules(transformer, target.adapter)):
        modules.append(module)
        original = module.processor
        place = AttentionLayer(target, layer, depth)
        place.processor = wrap_processor(original, len(session.places), classes, attachment._slot, session.number)
        session.places.append(place)
        target.places.append(place)
        module.processor = place.processor

        def restore(module: Any = module, ours: Any = place.processor, original: Any = original) -> None:
            if module.processor is ours:  # whatever the user set since then is the user's
                module.processor = unwrap_processor(ours, original)

        attachment._undo.append(restore)
    return modules


def _read_grid(adapter: Adapter, config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Return the grid of a forward, or in words why it has none, as the adapter gives it.

    Raises:
        ConfigError: if it asks for an input that is not there, or gives something else.
    """
    asked = f"the grid of the adapter {adapter.name!r}"
    try:
        grid = adapter.grid(config, inputs)
    except KeyError as error:
        raise ConfigError(
            f"{asked} asks for the input {error}, the forward was given {', '.join(inputs)}; correct the adapter's grid"
        ) from error
    if adapter.latents not in inputs:
        raise ConfigError(
            f"the adapter {adapter.name!r} asks for the input {adapter.latents!r}, the forward was given "
            f"{', '.join(inputs)}; correct the adapter's latents"
        )
    if isinstance(grid, str) or (
        isinstance(grid, tuple) and len(grid) == 5 and all(isinstance(size, int) for size in grid)
    ):
        return grid
    raise ConfigError(
        f"{asked} gave {grid!r}; it must give five whole numbers (frames, height, width, before, after), or a "
        "sentence that says why this forward has none"
    )


def _install_hooks(
    attachment: Attachment, transformer: Any, target: TransformerState, modules: list[nn.Module]
) -> None:
    session, slot = attachment._session, attachment._slot
    config = types.SimpleNamespace(**dict(transformer.config))
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]
    adapter = target.adapter

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        compiling = torch.compiler.is_compiling()
        grid = adapter.grid(config, inputs) if compiling else _read_grid(adapter, config, inputs)
        slot.grid = NO_GRID if isinstance(grid, str) else grid
        slot.outer_masks, slot.text_apart = adapter.outer_masks, adapter.text_apart
        if slot.grid != NO_STEP and not compiling:
            if not target.in_context:
                session.note_weights(target, lora_state(transformer))
            session.observe(target, grid, len(inputs[adapter.latents]), inputs.get(adapter.timestep))
            _leave_perturbed_dense(session, target, modules)
            slot.reached.clear()

    def after_forward(module: nn.Module, args: Any, out: Any) -> None:
        if slot.grid != NO_STEP and not torch.compiler.is_compiling():
            _uncount_skipped(session, target, slot.reached)

    for handle in (
        transformer.register_forward_pre_hook(before_forward, with_kwargs=True),
        transformer.register_forward_hook(after_forward),
    ):
        attachment._undo.append(handle.remove)


def _leave_perturbed_dense(session: Session, target: TransformerState, modules: list[nn.Module]) -> None:
    """Leave to diffusers what its perturbed attention guidance perturbs: it knows but its own attention calls."""
    for place, module in zip(target.places, modules, strict=True):
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if place.processor._dit_accel_sparse and any(
            getattr(h, "skip_attention_scores", False) for h in hooks.values()
        ):
            place.processor._dit_accel_sparse = False
            session.recorder.forward(target.name, target.branch, target.step_index or 0, 1)


def _uncount_skipped(session: Session, target: TransformerState, reached: set[int]) -> None:
    """Take back from the report the dense calls that one of diffusers' caches skipped in the forward that ends.

    A module of a compiled block is never seen to run; it counts as if it had.
    """
    seen = session.recorder.seen
    for layer, place in enumerate(session.places):
        if place.target is target and not place.processor._dit_accel_sparse:
            if layer in reached:
                seen.add(layer)
            elif layer in seen:
                session.recorder.forward(target.name, target.branch, target.step_index or 0, -1)


def _install_context(attachment: Attachment, transformer: Any, target: TransformerState) -> None:
    """Follow the pipeline's denoising calls, where it opens contexts for them."""
    if not hasattr(transformer, "cache_context"):
        return
    session, original = attachment._session, transformer.cache_context

    @contextlib.contextmanager
    def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
        session.note_weights(target, lora_state(transformer))
        session.enter(target, name, kwargs)
        try:
            with original(name, **kwargs):
                yield
        finally:
            session.leave(target)

    _shadow(attachment, transformer, "cache_context", cache_context)


def _install_end(attachment: Attachment, transformer: Any) -> None:
    """Free the methods' state where pipelines tell that a generation is over: they reset diffusers' caches then."""
    if not hasattr(transformer, "_reset_stateful_cache"):
        return
    session, original = attachment._session, transformer._reset_stateful_cache

    def reset_stateful_cache(*args: Any, **kwargs: Any) -> None:
        session.reset_handlers()
        original(*args, **kwargs)

    _shadow(attachment, transformer, "_reset_stateful_cache", reset_stateful_cache)


def _shadow(attachment: Attachment, transformer: Any, name: str, ours: Any) -> None:
    """Let an attribute of this one instance be ours until the attachment ends."""
    own = transformer.__dict__.get(name)

    def restore() -> None:
        transformer.__dict__.pop(name, None)
        if own is not None:
            transformer.__dict__[name] = own

    transformer.__dict__[name] = ours
    attachment._undo.append(restore)
