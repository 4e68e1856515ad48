"""Rotary positions of a model family as data, and what to set on one transformer to change their frequencies.

No model code is copied. A model's own code runs again on other frequencies: where it asks its base for powers, a
stand-in answers (`dit_accel.adapters.rope_forms`); where it keeps tables or frequencies, these are replaced.

Adapters are loaded for a help text too, so torch is not imported here before a model is changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VISUAL_AXES = ("frames", "height", "width")
"""Axes whose frequencies may be changed. Others place text or tell images apart; they stay as they are."""

FORMS = (
    "theta", "theta of all axes", "theta of a function", "tables", "object of tables", "tables behind methods",
    "angles", "frequencies", "frequencies of all axes", "learned", "pairs", "tables of axes", "plane",
)  # fmt: skip
"""How a model makes its positions; what each is stands in `dit_accel.adapters.rope_forms` and `.rope_inputs`."""

GIVEN = ("pairs", "tables of axes", "plane")
"""Forms of positions that the pipeline makes and the forward is given."""

Frequencies = Mapping[str, "Callable[[Tensor], Any] | Tensor | np.ndarray"]
"""Axis -> frequencies in radians per position, float64 [channels / 2], or a function of the model's own, float64."""

Resolve = Callable[[int, "Tensor"], "Tensor"]
"""(axis, its own frequencies) -> its frequencies from now on, of the same shape, dtype and device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of positions.

    Attributes:
        name: one of `VISUAL_AXES`, or another word: such an axis can't be changed.
        channels: channels of a head that it rotates, two per frequency; of all heads, where positions are laid over
            them together.
        theta: frequency j is theta^(-exponent j), in radians per position; None: the frequencies are learned.
        exponents: None: 2 j / channels.
    """

    name: str
    channels: int
    theta: float | None
    exponents: tuple[float, ...] | None = None

    def frequencies(self) -> "np.ndarray":
        """Return the model's frequencies by their formula, float64 [channels / 2]; `ConfigError` for learned ones."""
        if self.theta is None:
            raise ConfigError(
                f"the frequencies along {self.name} are learned, different in each head; give functions of them"
            )
        from ..rules.rotary_frequencies import frequencies as spectrum  # numpy, which a help text does without

        return spectrum(self.channels, self.theta, self.exponents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Where and how a transformer makes its rotary positions.

    Attributes:
        owner: dotted name, from the transformer, of what makes them; empty: the transformer itself.
        method: the owner's method that makes them, or reads the tables.
        input: the forward's input that holds them, for the forms in `GIVEN`.
        form: one of `FORMS`.
        values: what comes out: ``cos sin`` (two tensors), ``complex``, ``matrix`` [..., 2, 2], ``angles``, or
            ``halves`` (cos and sin in one tensor, joined along the dimension 1).
        parts: attributes of the owner that hold base, tables or frequencies: one for all axes, or one for each.
        caches: attributes of the owner that keep what it made, for bases.
        asks: for bases: the axes in the order in which they are requested, by index; None: each once.
        axes: transformer config -> the axes in the model's order.
        text: forward inputs by name -> which rows of the positions are text: how many of the first ones, or bool
            [..., rows]. None: text has no positions along the visual axes.
        max_positions: transformer config -> axis -> tokens that the model's tables hold; axes without a limit are left
            out. It takes configs that lack entries too, for the class's defaults. None: no limits.
        absent: transformer config -> why this model has no rotary positions, or None.
        kinds: kinds of `dit_accel.rules.rotary_frequencies` that make sense here; None: all. ``note`` says why not
            the others.
        fitted: axes along which the model scales every size to the trained one, so that none is too long.
        note: what a change does not do here.

    Raises:
        ConfigError: for an unknown form.
    """

    owner: str = ""
    method: str = "forward"
    input: str = ""
    form: str = "theta"
    values: str = "cos sin"
    parts: tuple[str, ...] = ("theta",)
    caches: tuple[str, ...] = ()
    asks: tuple[int, ...] | None = None
    axes: Callable[[Mapping[str, Any]], tuple[Axis, ...]]
    text: "Callable[[Mapping[str, Any]], int | Tensor] | None" = None
    max_positions: Callable[[Mapping[str, Any]], Mapping[str, int]] | None = None
    absent: Callable[[Mapping[str, Any]], str | None] | None = None
    kinds: tuple[str, ...] | None = None
    fitted: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"rotary positions have no form {self.form!r}; {did_you_mean(self.form, FORMS)}")
        if (self.form in GIVEN) != bool(self.input):
            raise ConfigError(
                f"form={self.form!r} with input={self.input!r}: name the forward's input for {', '.join(GIVEN)}, and "
                "for no other form"
            )

    def find_owner(self, transformer: Any) -> Any:
        """Find the part of a transformer that makes its positions; `ConfigError` if it is not there."""
        owner = transformer
        for name in self.owner.split(".") if self.owner else ():
            owner = getattr(owner, name, None)
        if owner is None:
            raise ConfigError(
                f"the adapter makes positions in {self.owner!r}, which {type(transformer).__name__} does not have; "
                "correct the adapter's rope.owner"
            )
        return owner


class RopeChange(NamedTuple):
    """What to set on one transformer.

    Attributes:
        attributes: (owner, attribute name, new value). All but the one of ``object of tables`` are methods of a class:
            the owner's instance does not hold them itself, and they are deleted to undo it. No tensor is replaced, so
            that the model may move to another device meanwhile.
        inputs: a function to run on each forward's inputs by name; it returns the inputs to go on with. None: there is
            none. `rope_forms.input_hook` makes it a forward pre-hook.
    """

    attributes: list[tuple[Any, str, Any]]
    inputs: Callable[[Mapping[str, Any]], dict[str, Any]] | None


def rope_of(name: str, rope: "Rope | str | None", config: Mapping[str, Any]) -> Rope:
    """Return a model's rotary positions, of its `Adapter.rope` and config; the adapter's name is for the error."""
    why = rope if isinstance(rope, str) else "its adapter describes none" if rope is None else None
    if isinstance(rope, Rope):
        why = rope.absent(config) if rope.absent else None
        if why is None:
            return rope
    raise ConfigError(f"{name} has no rotary positions that could be changed: {why}; leave this method out")


def changeable_axes(name: str, rope: Rope, config: Mapping[str, Any], requested: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the axes whose frequencies may be changed: those requested, or all where none is."""
    has = [axis.name for axis in rope.axes(config) if axis.name in VISUAL_AXES]
    for axis in requested:
        if axis not in has:
            raise ConfigError(f"{name} has rotary positions along {', '.join(has)}, not {axis!r}; name one of them")
        if axis in rope.fitted:
            raise ConfigError(
                f"{name} scales its positions along {axis} to the trained size, so that none is too long; leave "
                f"{axis!r} out"
            )
    left = tuple(axis for axis in has if axis not in rope.fitted and (not requested or axis in requested))
    if not left:
        raise ConfigError(
            f"{name} scales its positions along {', '.join(has)} to the trained size, so that none is too long; leave "
            "this method out"
        )
    return left


def check_lengths(name: str, rope: "Rope | str | None", config: Mapping[str, Any], lengths: Mapping[str, int]) -> None:
    """Raise `ConfigError` for a grid of more tokens along an axis than the model's tables of positions hold."""
    if not isinstance(rope, Rope) or rope.max_positions is None:
        return
    for axis, most in rope.max_positions(config).items():
        if lengths.get(axis, 0) > most:
            raise ConfigError(
                f"{name} has rotary positions for {most} tokens along {axis}, got {lengths[axis]}; make the output "
                "smaller along it"
            )
