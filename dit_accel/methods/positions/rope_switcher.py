"""How a transformer's rotary frequencies follow the size of what is made, put on through its site alone."""

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...adapters.adapter import Family
from ...adapters.rope_forms import change_rope
from ...adapters.rotary import Rope, RopeChange, changeable_axes, rope_of
from ...errors import ConfigError, MissingOption
from ...plan.layout import TokenLayout
from ..base import Model
from ..site import ForwardContext, Site

KEPT_SIZES = 4
"""Sizes whose tables are kept; the oldest goes."""

Edit = Callable[[np.ndarray, float, float], np.ndarray]
"""(own frequencies, trained tokens, wanted tokens) -> new frequencies, of the same shape."""


def trained_lengths(method: str, options: Mapping[str, int | None], family: Family | None) -> dict[str, int]:
    """Return axis -> tokens that a model was trained on, as given or released; raise `ConfigError` if none is known."""
    known = {**(family.trained if family else {}), **{axis: n for axis, n in options.items() if n is not None}}
    if not known:
        model = family.name if family else "a model with sizes of no released one"
        names = ", ".join(f"{method}.trained_{axis}" for axis in options)
        raise MissingOption(
            f"{method} needs the size that the model was trained on, which is not known of {model}; set one of {names} "
            "to its tokens",
            needs=" or ".join(f"trained_{axis}" for axis in options),
        )
    return known


def require_kind(model: Model, kind: str, requested: Sequence[str] = (), option: str = "") -> None:
    """Raise `ConfigError` for a model whose positions can't be changed, or not by this kind or along these axes.

    Of a model that is not there yet this is checked as far as its family's sizes tell. ``requested``: the axes; empty:
    all that can change. ``option``: what sets another kind.
    """
    name, rope, config = model.adapter.name, model.adapter.rope, model.config
    if isinstance(rope, Rope) and rope.kinds is not None and kind not in rope.kinds:
        kinds = " or ".join(repr(known) for known in rope.kinds if known != "none")
        why = f"rotary frequencies of kind {kind!r} make no sense on {name}: {rope.note}; use {kinds}"
        raise MissingOption(why, needs=f"{option} = {kinds}") if option and kinds else ConfigError(why)
    if config is None and model.family is not None and model.family.config:
        config = model.family.config
    if config is not None or not isinstance(rope, Rope):
        config = config or {}
        changeable_axes(name, rope_of(name, rope, config), config, requested)


class RopeSwitcher:
    """Keeps the rotary frequencies of one transformer as the size of each forward wants them.

    Nothing changes in forwards that are no longer than trained along any axis. Text does not move.

    Args:
        requested: axes that may change; empty: all that can.
        factor: how many times the trained length is wanted, whatever the forward's is; None: the forward's.
    """

    def __init__(
        self,
        site: Site,
        requested: tuple[str, ...],
        trained: Mapping[str, int],
        edit: Edit,
        factor: float | None = None,
    ) -> None:
        adapter = site.adapter
        self._transformer: Any = site.transformer
        self._name, self._config = adapter.name, self._transformer.config
        self._rope = rope_of(adapter.name, adapter.rope, self._config)
        axes = changeable_axes(adapter.name, self._rope, self._config, requested)
        for axis in requested:
            if axis not in trained:
                raise ConfigError(
                    f"the tokens along {axis} that {adapter.name} was trained on are not known; set trained_{axis}"
                )
        self._trained = {axis: trained[axis] for axis in axes if axis in trained}
        if not self._trained:
            raise ConfigError(
                f"{adapter.name} has rotary positions along {', '.join(axes)}, and a trained length is known along "
                f"{', '.join(trained)} alone; set trained_{axes[0]}"
            )
        self._edit, self._factor = edit, factor
        self._made: dict[tuple[int, ...], RopeChange] = {}
        identity = {axis: lambda freqs: freqs for axis in self._trained}
        places = change_rope(self._rope, self._transformer, identity).attributes
        self._switches = [_Switch(*inside_hooks(owner, name)) for owner, name, _ in places]
        if self._rope.form == "object of tables":  # a switch is about to stand in its place
            self._transformer = types.SimpleNamespace(config=self._config, **{self._rope.owner: self._switches[0].own})
        for switch in self._switches:
            site.replace(switch.owner, switch.name, switch)
        site.around_forward(self._around)

    def wanted(self, layout: TokenLayout) -> dict[str, tuple[float, float]]:
        """Return axis -> (trained, wanted) tokens, of the axes that change for a layout."""
        lengths = {}
        for axis, tokens in layout.lengths.items():
            trained = self._trained.get(axis)
            if trained is None:
                continue
            length = tokens if self._factor is None else self._factor * trained
            if length > trained:
                lengths[axis] = (float(trained), float(length))
        return lengths

    def _around(self, context: ForwardContext, run: Callable[..., Any]) -> Any:
        change = self._change(context.layout)
        values = [value for _, _, value in change.attributes] if change else [None] * len(self._switches)
        for switch, value in zip(self._switches, values, strict=True):
            switch.now = switch.own if value is None else value
        try:
            return run(**change.inputs(context.inputs)) if change and change.inputs else run()
        finally:  # a forward that is no step, such as one that fills a cache, has the model's own
            for switch in self._switches:
                switch.now = switch.own

    def _change(self, layout: TokenLayout | None) -> RopeChange | None:
        """Return the changes for a layout; None: there are none."""
        if layout is None:
            raise ConfigError(
                f"{self._name} does not tell how many tokens this forward has along each axis, which its positions are "
                "changed by; make one output per call, or detach"
            )
        wanted = self.wanted(layout)
        if not wanted:
            return None
        key = layout.frames, layout.height, layout.width
        if key not in self._made:
            edits = {axis: self._edited(*lengths) for axis, lengths in wanted.items()}
            if len(self._made) >= KEPT_SIZES:
                self._made.pop(next(iter(self._made)))
            self._made[key] = change_rope(self._rope, self._transformer, edits)
        return self._made[key]

    def _edited(self, trained: float, length: float) -> Callable[[Any], np.ndarray]:
        return lambda freqs: self._edit(freqs.numpy(), trained, length)


def inside_hooks(owner: Any, name: str) -> tuple[Any, str]:
    """Return where a module keeps its own ``forward`` if diffusers' hooks wrap it; else what was given.

    Context parallelism's hooks split what it returns, and must go on to.
    """
    hooks = getattr(getattr(owner, "_diffusers_hook", None), "_fn_refs", ())
    if name != "forward" or not hooks:
        return owner, name
    return hooks[0], "forward" if hooks[0].original_forward is None else "original_forward"


class _Switch:
    """Stands in for a method or object of a model, its own or another; in copies and pickles it is its own again."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.own = self.now = getattr(owner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.now(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["now"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.own, memo)

    def __reduce__(self) -> Any:
        return _itself, (self.own,)


def _itself(value: Any) -> Any:
    return value
