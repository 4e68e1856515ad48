"""Attaches one mode's methods to every transformer that a foreign test builds, and gathers what is wrong with it."""

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers
import torch
from dit_accel_kernels import unpack_bits
from torch import Tensor, nn

from dit_accel import LiteAttention, SolAttention, attach
from dit_accel.adapters.installed import adapters
from dit_accel.attachment.layers import PlannedCall
from dit_accel.methods.config import MethodConfig

METHODS: Mapping[str, tuple[MethodConfig, ...]] = {
    "neutral": (),
    "keep-all": (LiteAttention(threshold=-1e30, dense_steps=0, block_size=16),),
    "active": (SolAttention(dense_steps=0, dense_layers=0, block_size=16),),
}
"""Mode -> what is attached: nothing; all that plans every call and drops nothing; what changes every call."""

ROUNDING = 1e-5
"""By how much of its own size a forward in float32 may move when every call is planned and no tile dropped."""


def covered_classes() -> list[type[nn.Module]]:
    """Return the transformer classes that adapters cover and the installed diffusers has."""
    names = sorted({name for adapter in adapters().values() for name in adapter.transformers})
    return [getattr(diffusers, name) for name in names if hasattr(diffusers, name)]


class Watch:
    """Attaches a mode's methods to each model that is built; one for a test session."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.counts: Counter[str] = Counter(models=0, forwards=0, compared=0, planned=0)
        self.built: set[str] = set()  # names of the classes of which a model was built
        self._classes: list[type[nn.Module]] = []
        self._models: dict[int, tuple[nn.Module, contextlib.ExitStack]] = {}
        self._findings: list[str] = []

    def follow(self, cls: type[nn.Module]) -> None:
        """Attach to each model of this class itself, not of classes that derive from it, when it has been built."""
        build = cls.__init__

        @functools.wraps(build)  # diffusers reads a model's options off the signature
        def __init__(model: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            build(model, *args, **kwargs)
            if type(model) is cls:
                self._attach(model)

        cls.__init__ = __init__  # type: ignore[method-assign]
        self._classes.append(cls)

    def begin(self, compiles: bool) -> None:
        """Note that a test begins; forwards of one that compiles models are left alone."""
        for cls in self._classes:
            if compiles and "__call__" in vars(cls):
                del cls.__call__
            elif not compiles and "__call__" not in vars(cls):
                cls.__call__ = _compared(self, cls.__call__)

    def end(self) -> list[str]:
        """Detach from every model that the test built; return what was wrong in it."""
        for model, stack in self._models.values():
            name = type(model).__name__
            try:
                stack.close()
            except Exception as error:
                self._findings.append(f"{name}: detach raised {error!r}")
            self._findings += [f"{name}: {place} is left after detach" for place in leftovers(model)]
        found = list(dict.fromkeys(self._findings))
        self._models.clear()
        self._findings.clear()
        return [f"{self.mode}: {text}" for text in found]

    def _attach(self, model: nn.Module) -> None:
        methods, before = METHODS[self.mode], footprint(model)
        attach(model, *methods, preset="none").detach()
        after = footprint(model)
        changed = sorted(place for place in {*before, *after} if before.get(place) != after.get(place))
        self._findings += [f"{type(model).__name__}: attach and detach changed {place}" for place in changed]
        attachment, stack = attach(model, *methods, preset="none"), contextlib.ExitStack()
        stack.callback(attachment.detach)
        stack.enter_context(attachment.observe(self._note_call))
        self._models[id(model)] = model, stack
        self.counts["models"] += 1
        self.built.add(type(model).__name__)

    def _note_call(self, call: PlannedCall) -> None:
        self.counts["planned"] += 1
        if self.mode != "keep-all" or call.exact is None:
            return
        assert call.plan.tiles is not None
        key_tiles = -(-call.plan.tiles.num_k // call.plan.tiles.block_k)
        if not bool(unpack_bits(call.exact, key_tiles).all()):
            self._findings.append(f"{call.context.transformer}: layer {call.context.layer} dropped tiles")

    def run(self, model: Any, call: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        """Return what an attached forward gives, after a plain one to compare it with."""
        if id(model) not in self._models or torch.compiler.is_compiling():
            return call()
        self.counts["forwards"] += 1
        if self.mode == "active" or _carries_state(model):
            return call()
        rng = torch.get_rng_state()
        with untouched(model):
            try:
                expected = plain()
            except Exception as error:
                expected = error
        torch.set_rng_state(rng)
        try:
            found = call()
        except Exception as error:
            if type(error) is not type(expected):
                self._findings.append(f"{type(model).__name__}: the attached forward alone raised {error!r}")
            raise
        self.counts["compared"] += 1
        if problem := self._difference(found, expected):
            self._findings.append(f"{type(model).__name__}: {problem}")
        return found

    def _difference(self, found: Any, expected: Any) -> str | None:
        """Tell what is wrong with the outputs of an attached forward, given a plain one's; or None."""
        if isinstance(expected, Exception):
            return f"the plain forward alone raised {expected!r}"
        ours, theirs = tensors_of(found), tensors_of(expected)
        if [(x.shape, x.dtype) for x in ours] != [(x.shape, x.dtype) for x in theirs]:
            return "the attached forward gives other shapes or dtypes than the plain one"
        if not theirs:
            return f"{type(expected).__name__} holds no tensor to compare; let tensors_of look into it"
        for x, y in zip(ours, theirs, strict=True):
            if self.mode == "neutral" and not same_bits(x, y):
                return "the attached forward differs from the plain one in its bits"
            if self.mode == "keep-all" and x.dtype == torch.float32:
                error = float((x - y).detach().double().norm() / y.detach().double().norm().clamp_min(1e-30))
                if not error <= ROUNDING and not bool(y.isnan().any()):
                    return f"the attached forward differs from the plain one by {error:.2g} of its size"
        return None


def _compared(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(model: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        # _call_impl is what runs where nothing stands before a module's call
        return watch.run(model, lambda: original(model, *args, **kwargs), lambda: model._call_impl(*args, **kwargs))

    return __call__


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the model's own processors in place of ours: what a copy of ours is."""
    holders = (module for module in model.modules() if is_ours(getattr(module, "processor", None)))
    held: list[tuple[Any, Any]] = [(module, module.processor) for module in holders]
    for module, processor in held:
        module.processor = copy.copy(processor)
    try:
        yield
    finally:
        for module, processor in held:
            module.processor = processor


def is_ours(value: Any) -> bool:
    """Tell whether an object is of dit-accel's making: an instance or function of its modules, or a processor."""
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value)
    home = getattr(value, "__module__", None) if callable(value) and not isinstance(value, nn.Module) else None
    homes = (home or "", type(value).__module__)
    return any(name.split(".")[0].startswith("dit_accel") for name in homes) or hasattr(value, "_dit_accel_dense")


def leftovers(model: nn.Module) -> list[str]:
    """Return where in a model something of ours is: attributes, entries of dicts such as hooks, processors."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            entries = value.values() if isinstance(value, dict) else (value,)
            marked = [key for key in vars(value) if "dit_accel" in key] if _is_plain(value) else []
            if "dit_accel" in name or marked or any(map(is_ours, entries)):
                found.append(f"{path or type(module).__name__}.{name}")
    return found


def footprint(model: nn.Module) -> dict[str, Any]:
    """Return every attribute of a model's modules and their processors by identity, entries of dicts each."""
    marks: dict[str, Any] = {}
    for path, module in model.named_modules():
        place = path or type(model).__name__
        holders = {place: module, f"{place}.processor": getattr(module, "processor", None)}
        for holder, owner in holders.items():
            for name, value in getattr(owner, "__dict__", {}).items():
                inner = {key: id(one) for key, one in value.items()} if isinstance(value, dict) else None
                marks[f"{holder}.{name}"] = id(value), inner
    return marks


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, however deep they lie."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif hasattr(output, "__dataclass_fields__"):
        output = list(vars(output).values())
    return [tensor for part in output for tensor in tensors_of(part)] if isinstance(output, (list, tuple)) else []


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors of one shape and dtype are equal in every bit."""
    first, second = (one.detach().contiguous().flatten().view(torch.uint8) for one in (x, y))
    return torch.equal(first, second)


def _is_plain(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type))


def _carries_state(model: nn.Module) -> bool:
    """Tell whether hooks of diffusers (a cache, say) remember forwards, so that a further one would change the next."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = (hook for registry in registries for hook in getattr(registry, "hooks", {}).values())
    return any(getattr(hook, "_is_stateful", False) for hook in hooks)
