"""How rotary positions are changed in each form that models give them.

- ``theta``: a method asks ``theta`` (`Rope.parts`) for powers, axis by axis: it runs with a stand-in that answers.
- ``theta of all axes``: requested once, one set of frequencies for all axes, laid over coordinates [..., axes, 1].
- ``theta of a function``: a function in the class's module takes ``theta``; the method runs with that global replaced.
- ``tables``: the constructor makes tables from ``theta``: they are made again with a stand-in, and a method reads them.
- ``object of tables``: the same of an object that is not a module; another one takes its place.
- ``tables behind methods``: the same, read by cached methods; text reads the tables themselves, which stay.
- ``angles``: a table [positions, frequencies] of angles for each axis.
- ``frequencies``: a tensor for each axis, or one in which `rope_axes.interleaved` takes turns.
- ``frequencies of all axes``: one tensor that all axes share.
- ``learned``: frequencies [axes, heads, channels / 2] are the method's first argument; angles add up over the axes.

Positions that the forward is given are changed in `dit_accel.adapters.rope_inputs`.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .rope_inputs import change_input
from .rotary import GIVEN, VISUAL_AXES, Axis, Frequencies, Resolve, Rope, RopeChange


def change_rope(rope: Rope, transformer: Any, frequencies: Frequencies) -> RopeChange:
    """Make the change of one transformer by which its positions come from other frequencies.

    Position ids, offsets and scaling stay the model's; text does not move. Nothing is changed on classes and modules.
    `ConfigError` is raised for axes that can't be changed and for another number of frequencies; for those of a
    function when they are first used.
    """
    axes = rope.axes(transformer.config)
    names = [axis.name for axis in axes]
    for name, change in frequencies.items():
        if name not in names:
            raise ConfigError(
                f"{type(transformer).__name__} has positions along {', '.join(names)}, not {name!r}; change one of them"
            )
        if name not in VISUAL_AXES:
            raise ConfigError(
                f"positions along {name!r} place text or tell images apart; change frames, height or width"
            )
        axis = axes[names.index(name)]
        if not callable(change) and axis.theta is not None and np.shape(change) != (axis.channels // 2,):
            raise ConfigError(
                f"{name} has {axis.channels // 2} frequencies in {type(transformer).__name__}, got a shape of "
                f"{tuple(np.shape(change))}; give one for each, or a function of the model's own"
            )
    if not frequencies:
        return RopeChange([], None)
    return _change(rope, transformer, axes, tuple(frequencies.get(name) for name in names))


def _change(rope: Rope, transformer: Any, axes: tuple[Axis, ...], changes: tuple[Any, ...]) -> RopeChange:
    resolve = _resolver(axes, changes, keep=rope.form not in ("learned", "plane"))
    if rope.form in GIVEN:
        return RopeChange([], change_input(rope, transformer, axes, resolve))
    owner = rope.find_owner(transformer)
    if rope.form == "object of tables":
        return RopeChange([(transformer, rope.owner, _with_tables(rope, owner, axes, resolve))], None)
    if rope.form == "tables behind methods":
        return RopeChange(_behind_methods(rope, owner, resolve), None)
    text: list[Any] = []
    run = _keep_text(rope, owner, _RUNS[rope.form](rope, owner, axes, resolve), text)
    method = types.MethodType(run, owner)  # a copied model's is bound to the copy
    return RopeChange([(owner, rope.method, method)], _note_text(rope, text) if rope.text else None)


def input_hook(
    transformer: Any, function: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[()], dict[str, Any]]]:
    """Return `RopeChange.inputs` as a pre-hook for ``register_forward_pre_hook(hook, with_kwargs=True)``."""
    signature = inspect.signature(type(transformer).forward)

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        bound = signature.bind(module, *args, **kwargs).arguments
        return (), function({name: value for name, value in bound.items() if name != "self"})

    return hook


def _resolver(axes: tuple[Axis, ...], changes: tuple[Any, ...], keep: bool) -> Resolve:
    resolved: dict[Any, Tensor] = {}  # where the model's own are always the same: a function may wait for the device

    def resolve(index: int, freqs: Tensor) -> Tensor:
        change = changes[index]
        if change is None:
            return freqs
        key = (index, freqs.dtype, freqs.device)
        if keep and key in resolved:
            return resolved[key]
        wide = freqs.detach().to("cpu", torch.float64)
        new = torch.as_tensor(change(wide) if callable(change) else change, dtype=torch.float64)
        if new.shape != freqs.shape or not bool(new.isfinite().all()):
            raise ConfigError(
                f"{axes[index].name} has frequencies of shape {tuple(freqs.shape)}, got a shape of {tuple(new.shape)} "
                f"with values {new.flatten()[:4].tolist()} ...; give a finite one for each"
            )
        resolved[key] = new.to(freqs)
        return resolved[key]

    return resolve


class _View:
    """Shows an object with other values of some attributes; attributes that are set stay on the view."""

    def __init__(self, seen: Any, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)


class _Quotient:
    """What powers of a stand-in are: 1 / it gives the frequencies, unrounded."""

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies

    def __rtruediv__(self, number: float) -> Tensor:
        return number * self.frequencies


class _Theta:
    """Stands in for a rope's base; each power that is requested is that of the next axis, then those of text."""

    def __init__(self, value: float, asks: Iterator[int], resolve: Resolve) -> None:
        self.value, self.asks, self.resolve = value, asks, resolve

    def __float__(self) -> float:
        return float(self.value)

    def __mul__(self, factor: float) -> "_Theta":
        return _Theta(self.value * factor, self.asks, self.resolve)

    __rmul__ = __mul__

    def __pow__(self, exponents: Tensor) -> Any:
        index, powers = next(self.asks, None), self.value**exponents
        return powers if index is None else _Quotient(self.resolve(index, 1.0 / powers))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.pow and isinstance(args[0], cls):
            return args[0] ** args[1]
        return NotImplemented


class _ThetaOfAll(_Theta):
    """The same where one power serves all axes: [axes, frequencies]."""

    def __pow__(self, exponents: Tensor) -> Tensor:
        powers = self.value**exponents
        return torch.stack([self.resolve(index, powers) for index in self.asks])


def _asks(rope: Rope, axes: tuple[Axis, ...]) -> Iterator[int]:
    return iter(rope.asks or range(len(axes)))


Run = Callable[..., Any]
"""(owner, the method's arguments) -> its result on other frequencies."""


def _theta(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> Run:
    function = getattr(type(owner), rope.method)
    stand_in = _ThetaOfAll if rope.form == "theta of all axes" else _Theta

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        together, seen = _asks(rope, axes), _View(self, dict.fromkeys(rope.caches))
        for index, part in enumerate(rope.parts):
            asks = together if len(rope.parts) == 1 else iter([index])
            above, _, name = part.rpartition(".")
            inner = getattr(self, above) if above else self
            view = _View(inner if above else seen, {name: stand_in(getattr(inner, name), asks, resolve)})
            seen = _View(seen, {above: view}) if above else view
        result = function(seen, *args, **kwargs)
        _require_asked(rope, together if len(rope.parts) == 1 else iter(()), owner)
        return result

    return run


def _require_asked(rope: Rope, left: Iterator[int], owner: Any) -> None:
    if next(left, None) is not None:
        raise ConfigError(
            f"{type(owner).__name__}.{rope.method} did not make every axis from {rope.parts[0]!r}; this version of "
            "diffusers makes its positions in another way than the adapter says: report it to the adapter's author"
        )


def _theta_of_function(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> Run:
    function = inspect.unwrap(getattr(type(owner), rope.method))
    maker = function.__globals__[rope.parts[0]]
    value = inspect.signature(maker).parameters["theta"].default

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        asks = _asks(rope, axes)
        maker_with_stand_in = functools.partial(maker, theta=_Theta(value, asks, resolve))
        scope = {**function.__globals__, rope.parts[0]: maker_with_stand_in}
        copy = types.FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        result = copy(self, *args, **kwargs)
        _require_asked(rope, asks, owner)
        return result

    return run


def _learned(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> Run:
    function = getattr(type(owner), rope.method)

    def run(self: Any, learned: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(
            self, torch.stack([resolve(i, frequencies) for i, frequencies in enumerate(learned)]), *args, **kwargs
        )

    return run


def _attributes(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> Run:
    """Run on the owner seen with new tables or frequencies, on its device and in its dtype."""
    function = getattr(type(owner), rope.method)
    values = _VALUES[rope.form](rope, owner, axes, resolve)
    there: dict[Any, Any] = {}

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = getattr(self, rope.parts[0])
        kind = (held.device, held.dtype) if isinstance(held, Tensor) else None  # lists are moved by the model
        if kind not in there:
            there[kind] = values if kind is None else {part: value.to(*kind) for part, value in values.items()}
        return function(_View(self, there[kind]), *args, **kwargs)

    return run


def _frequencies(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> dict[str, Any]:
    if len(rope.parts) == len(axes):
        return {part: resolve(index, getattr(owner, part)) for index, part in enumerate(rope.parts)}
    new = getattr(owner, rope.parts[0]).clone()
    for index, axis in enumerate(axes):
        places = [round(exponent * len(new)) for exponent in axis.exponents or ()]
        new[places] = resolve(index, new[places])
    return {rope.parts[0]: new}


def _frequencies_of_all(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> dict[str, Any]:
    frequencies = getattr(owner, rope.parts[0])
    return {rope.parts[0]: _OfAll(torch.stack([resolve(index, frequencies) for index in range(len(axes))]))}


def _angles(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> dict[str, Any]:
    values = {}
    for index, part in enumerate(rope.parts):
        table = getattr(owner, part)
        places = torch.arange(len(table), dtype=table.dtype, device=table.device)
        values[part] = torch.outer(places, resolve(index, table[1]))  # position 1's angles are the frequencies
    return values


class _OfAll:
    """Frequencies [axes, n] where a model has one row for all axes and views it as [1, 1, n]."""

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies

    def to(self, device: torch.device, dtype: torch.dtype) -> "_OfAll":
        return _OfAll(self.frequencies.to(device, dtype))

    def view(self, *shape: int) -> Tensor:
        return self.frequencies[None]


def _rebuilt(owner: Any, asks: Iterator[int], resolve: Resolve) -> Any:
    """Return an object of the owner's class made with a stand-in; its constructor's arguments are its attributes."""
    arguments = {}
    for name, parameter in inspect.signature(type(owner)).parameters.items():
        default = None if parameter.default is parameter.empty else parameter.default
        arguments[name] = getattr(owner, name, default)
    return type(owner)(**{**arguments, "theta": _Theta(arguments["theta"], asks, resolve)})


def _tables(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> dict[str, Any]:
    asks = _asks(rope, axes)
    rebuilt = _rebuilt(owner, asks, resolve)
    _require_asked(rope, asks, owner)
    return {part: getattr(rebuilt, part) for part in rope.parts}


def _with_tables(rope: Rope, owner: Any, axes: tuple[Axis, ...], resolve: Resolve) -> Any:
    """Return an object like the owner with other tables; it moves them to the device itself."""
    asks = _asks(rope, axes)
    new = _rebuilt(owner, asks, resolve)
    setattr(new, rope.parts[0], getattr(new, rope.method)(new.axes_dims, new.axes_lens, theta=new.theta))
    new.theta = owner.theta
    _require_asked(rope, asks, owner)
    return new


def _behind_methods(rope: Rope, owner: Any, resolve: Resolve) -> list[tuple[Any, str, Any]]:
    """Return cached methods that read an object with other tables; the caches of the class are not used."""
    asks = iter(rope.asks or ())
    rebuilt, methods = _rebuilt(owner, asks, resolve), []
    _require_asked(rope, asks, owner)
    for name, function in vars(type(owner)).items():
        if hasattr(function, "__wrapped__"):
            fresh = functools.lru_cache(maxsize=128)(types.MethodType(inspect.unwrap(function), rebuilt))
            rebuilt.__dict__[name] = fresh
            methods += [(owner, name, fresh)] if name in rope.parts else []
    return methods


_VALUES: dict[str, Callable[..., dict[str, Any]]] = {
    "tables": _tables, "angles": _angles, "frequencies": _frequencies, "frequencies of all axes": _frequencies_of_all,
}  # fmt: skip

_RUNS: dict[str, Callable[..., Run]] = {
    "theta": _theta, "theta of all axes": _theta, "theta of a function": _theta_of_function, "learned": _learned,
    **dict.fromkeys(_VALUES, _attributes),
}  # fmt: skip


def _keep_text(rope: Rope, owner: Any, run: Run, text: list[Any]) -> Callable[..., Any]:
    """Return the method that takes the text's rows from the model's own frequencies, the others from new ones."""
    function = getattr(type(owner), rope.method)

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        if rope.text is None:
            return result
        if not text:
            raise ConfigError(
                f"{type(owner).__name__} ran before the forward's inputs showed which rows are text; run the whole "
                "transformer, with RopeChange.inputs before each forward"
            )
        plain = function(self, *args, **kwargs)
        if isinstance(result, tuple):
            return tuple(_join(text[0], *pair) for pair in zip(plain, result, strict=True))
        return _join(text[0], plain, result)

    return method


def _join(text: Any, plain: Tensor, new: Tensor) -> Tensor:
    if isinstance(text, Tensor):
        return torch.where(text[..., None], plain, new)
    return torch.cat([plain[..., :text, :], new[..., text:, :]], dim=-2)


def _note_text(rope: Rope, text: list[Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
        assert rope.text is not None
        text[:] = [rope.text(arguments)]
        return dict(arguments)

    return inputs
