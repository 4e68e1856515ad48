"""Check `Adapter.rope`: a tiny model's rotary positions from its own frequencies, from halved ones and from none."""

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.adapter import Grid
from ..adapters.rope_forms import change_rope, input_hook
from ..adapters.rotary import GIVEN, VISUAL_AXES, Axis, Frequencies, Rope, RopeChange, rope_of
from ..errors import ConfigError
from .recording import require
from .tiny_models import Case, spread

ROUNDING = 1e-5
"""Allowed difference of products of cos and sin in float32; Mochi adds up angles of some hundred radians."""

FORMULA = 1e-5
"""Allowed relative difference between the frequencies that a model computes, often in float32, and their formula."""


def check_rope(case: Case) -> str | None:
    """Check that rotary positions are where the adapter says, and move as it says.

    - From its own frequencies a model makes the same positions, bit for bit, and the same output.
    - With one axis's frequencies halved, each token's angle along that axis is halved and no other; angles along an
      axis differ from token to token along it and along no other. Text does not move.
    - Undone, everything is as before, bit for bit. Classes and modules stay untouched.
    """
    adapter, transformer = case.adapter, case.transformer
    if adapter.rope is None:
        return "the adapter describes no rotary positions"
    try:
        rope = rope_of(adapter.name, adapter.rope, transformer.config)
    except ConfigError as error:
        return str(error)
    samples = _Samples(case, rope)
    untouched = _snapshot(transformer, rope)
    plain, output = samples.take(), case.run(samples.inputs)
    moved: dict[str, Tensor] = {}
    visual = [axis for axis in samples.axes if axis.name in VISUAL_AXES]
    require(bool(visual), f"none of the axes {[axis.name for axis in samples.axes]} is one of {VISUAL_AXES}")
    for axis in visual:
        moved[axis.name] = _check_axis(case, samples, axis, plain)
    if rope.form != "learned":  # whose axes share all channels
        shared = sum(channels.int() for channels in moved.values())
        require(bool((torch.as_tensor(shared) <= 1).all()), "two axes move the same channels")
    names = [axis.name for axis in visual]
    with samples.changed(dict.fromkeys(names, lambda freqs: freqs)):
        require(torch.equal(case.run(samples.inputs), output), "the model's own frequencies change its output")
    with samples.changed(dict.fromkeys(names, lambda freqs: freqs / 2)):
        other = case.run(samples.inputs)
        require(bool(other.isfinite().all()) and not torch.equal(other, output), "other frequencies change no output")
        require(_snapshot(transformer, rope) == untouched, "a class or a module was changed")
    require(torch.equal(case.run(samples.inputs), output), "after undoing, the output differs")
    require(all(map(torch.equal, samples.take(), plain)), "after undoing, the positions differ")
    return None


def _check_axis(case: Case, samples: "_Samples", axis: Axis, plain: list[Tensor]) -> Tensor:
    """Check one axis; return which channels it moves, bool [channels]."""
    seen: list[Tensor] = []

    def same(freqs: Tensor) -> Tensor:
        seen.append(freqs)
        return freqs

    with samples.changed({axis.name: same}):
        for now, before in zip(samples.take(), plain, strict=True):
            require(torch.equal(now, before), f"{axis.name}: its own frequencies give other positions")
    require(bool(seen), f"{axis.name}: nothing read its frequencies")
    if axis.theta is not None:
        formula = axis.frequencies()
        require(
            seen[0].shape == formula.shape and np.allclose(seen[0].numpy(), formula, rtol=FORMULA, atol=0),
            f"{axis.name}: the model has the frequencies {seen[0][:4].tolist()} ..., the adapter's axis says "
            f"{formula[:4].tolist()} ...",
        )
    with samples.changed({axis.name: lambda freqs: freqs / 2}):
        half = samples.take()
    with samples.changed({axis.name: lambda freqs: freqs * 0}):
        none = samples.take()
    moved, visual = None, 0
    for z, z_half, z_none in zip(plain, half, none, strict=True):
        still = z_none == z
        require(torch.equal(z_half[still], z[still]), f"{axis.name}: halved, other positions move too")
        turn, turn_half = z * z_none.conj(), z_half * z_none.conj()
        error = float((turn_half * turn_half - turn).abs().max())
        require(error <= ROUNDING, f"{axis.name}: halved, its angles are not half of what they were, by {error:.2g}")
        if places := samples.visual_rows(z):
            visual += 1
            where, moved = _require_along(samples, axis, turn, places)
            _require_text_still(samples, still, where)
    require(visual > 0, f"no positions of {samples.grid} tokens were made; rows: {[len(z) for z in plain]}")
    assert moved is not None
    return moved


def _require_along(samples: "_Samples", axis: Axis, turn: Tensor, places: list[slice]) -> tuple[slice, Tensor]:
    """Angles along an axis differ along this axis of the grid only; return where the grid is and which channels move.

    With as many tokens before the grid as behind it, it may stand in two places.
    """
    wrong = ""
    for where in places:
        wrong = _wrong_along(turn[where].unflatten(0, samples.grid[:3]), axis)
        if not wrong:
            return where, ((turn[where] - 1).abs() > ROUNDING).any(0)
    raise AssertionError(wrong)


def _wrong_along(grid: Tensor, axis: Axis) -> str:
    steps = {name: grid.diff(dim=dim).abs() for dim, name in enumerate(VISUAL_AXES) if grid.shape[dim] > 1}
    for name, step in steps.items():
        if name != axis.name and float(step.max()) > ROUNDING:
            return f"{axis.name}: its positions differ along {name}"
    if axis.name in steps and float(steps[axis.name].amax(-1).min()) <= ROUNDING:
        return f"{axis.name}: two neighbours along it have the same position"
    return ""


def _require_text_still(samples: "_Samples", still: Tensor, visual: slice) -> None:
    """Text's rows do not move: those that the adapter tells, and those that stand first or last beside the grid."""
    rows = torch.zeros(len(still), dtype=torch.bool)
    if samples.rope.text is not None:
        text = samples.rope.text(samples.inputs)
        rows = text.reshape(-1).clone() if isinstance(text, Tensor) else torch.arange(len(still)) < text
        require(not bool(rows[visual].any()), "the adapter takes tokens of the grid for text")
    text = samples.inputs.get("encoder_hidden_states")
    tokens = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
    if samples.grid[3] == tokens:
        rows[: min(tokens, visual.start)] = True
    elif samples.grid[4] == tokens <= len(still) - visual.stop:
        rows[len(still) - tokens :] = True
    require(bool(still[rows].all()), "text moves")


class _Samples:
    """A model's rotary positions in one forward, as cos + i sin [rows, channels], and what they are made from."""

    def __init__(self, case: Case, rope: Rope) -> None:
        self.rope, self.transformer = rope, case.transformer
        self.axes = rope.axes(self.transformer.config)
        self.inputs = case.inputs(1)
        grid = case.adapter.grid(self.transformer.config, self.inputs)
        if isinstance(grid, str):
            raise AssertionError(f"the tiny model's inputs have no grid: {grid}")
        self.grid: Grid = grid
        self._hook: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
        if rope.form in GIVEN:
            self._calls: list[Callable[[], Any]] = [self._given_value]
        else:
            self._calls = _recorded(case, rope, self.inputs)
            require(bool(self._calls), f"{rope.owner or type(self.transformer).__name__} made no positions")

    def _given_value(self) -> Any:
        return (self._hook(self.inputs) if self._hook else self.inputs)[self.rope.input]

    @contextlib.contextmanager
    def changed(self, frequencies: Frequencies) -> Iterator[None]:
        """The model with other frequencies."""
        change = change_rope(self.rope, self.transformer, frequencies)
        with replaced(self.transformer, change):
            self._hook = change.inputs
            if change.inputs and self.rope.form not in GIVEN:
                change.inputs(self.inputs)
            try:
                yield
            finally:
                self._hook = None

    def take(self) -> list[Tensor]:
        """Make all positions of the forward again."""
        with torch.no_grad():
            return [z for call in self._calls for z in self._points(call())]

    def visual_rows(self, z: Tensor) -> list[slice]:
        """Where the grid's tokens may stand in positions of one call; nowhere, if it made others."""
        frames, height, width, before, after = self.grid
        count = frames * height * width
        padded = -(-count // 32) * 32  # Z-Image's
        starts = (
            {before + count + after: before, before + count: before},
            dict.fromkeys((count, count + after, padded), 0),
        )
        return [slice(start[len(z)], start[len(z)] + count) for start in starts if len(z) in start]

    def _points(self, value: Any) -> list[Tensor]:
        rope = self.rope
        if rope.form == "plane":
            value = value[: self.grid[1], : self.grid[2]].flatten(0, 1)
        elif rope.form == "tables of axes":
            tables = {axis.name: torch.complex(*table) for axis, table in zip(self.axes, value[0], strict=True)}
            return [spread(tables, self.grid)]
        return [self._rows(x) for x in _POINTS.get(rope.values, _complex)(_leaves(value))]

    def _rows(self, z: Tensor) -> Tensor:
        channels = z.shape[-1]
        z = z.reshape(*(size for size in z.shape[:-1] if size > 1), channels)
        if self.rope.form == "learned":
            return z.flatten(1)
        if self.rope.form == "theta of all axes" and z.ndim == 3:  # [heads, rows, channels]
            return z.transpose(0, 1).flatten(1)
        return z.flatten(0, -2) if z.ndim > 1 else z[None]


def _complex(parts: list[Tensor]) -> list[Tensor]:
    return [x for x in parts if x.is_complex()]


_POINTS: Mapping[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "cos sin": lambda parts: [torch.complex(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)],
    "halves": lambda parts: [torch.complex(*x.chunk(2, dim=1)).movedim(1, -1) for x in parts],
    "matrix": lambda parts: [torch.complex(x[..., 0, 0], x[..., 1, 0]) for x in parts],
    "angles": lambda parts: [torch.polar(torch.ones_like(x), x) for x in parts],
}
"""How a model writes its positions down (`Rope.values`) -> their cos + i sin."""


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [leaf for item in inner for leaf in _leaves(item)]


def _recorded(case: Case, rope: Rope, inputs: Mapping[str, Any]) -> list[Callable[[], Any]]:
    """Run the model; return its calls for positions, each to be made again."""
    transformer, owner, calls = case.transformer, rope.find_owner(case.transformer), []

    def note(target: Callable[[], Any], args: Any, kwargs: Any) -> None:
        calls.append(lambda: target()(*args, **kwargs))

    if rope.owner and isinstance(owner, nn.Module):
        hook = owner.register_forward_pre_hook(lambda m, args, kwargs: note(lambda: m, args, kwargs), with_kwargs=True)
        case.run(inputs)
        hook.remove()
        return calls
    name = rope.owner or rope.method  # an object that is called, or a method of the transformer
    original = getattr(transformer, name)

    class Recorder:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            note(lambda: getattr(transformer, name), args, kwargs)
            return original(*args, **kwargs)

    with replaced(transformer, RopeChange([(transformer, name, Recorder())], None)):
        case.run(inputs)
    return calls


@contextlib.contextmanager
def replaced(transformer: Any, change: RopeChange) -> Iterator[None]:
    """Set what a change says on one transformer, and set it back at the end."""
    hook, undo = None, []
    try:
        if change.inputs is not None:
            hook = transformer.register_forward_pre_hook(input_hook(transformer, change.inputs), with_kwargs=True)
        for owner, name, value in change.attributes:
            held = name in vars(owner) or name in vars(owner).get("_buffers", {})
            undo.append((owner, name, held, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        if hook is not None:
            hook.remove()
        for owner, name, held, value in reversed(undo):
            if held:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


def _snapshot(transformer: Any, rope: Rope) -> dict[str, dict[str, int]]:
    """Identities of all that the classes of the transformer and of its positions hold, and the modules around them."""
    identities = {}
    for cls in (type(transformer), type(rope.find_owner(transformer))):
        identities[cls.__name__] = {name: id(value) for name, value in vars(cls).items()}
        for value in vars(cls).values():
            if isinstance(value, types.FunctionType):
                identities[value.__module__] = {name: id(item) for name, item in value.__globals__.items()}
    return identities
