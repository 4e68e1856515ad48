"""Describe: what could be attached to a pipeline and what its recipes are; touches nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..methods.compose import make_handlers
from ..methods.find import find_transformers, resolve_model
from ..methods.registry import methods


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerDescription:
    """One transformer of a pipeline, seen by the core.

    Attributes:
        name: component name.
        transformer: class name.
        adapter: the adapter's name.
        family: the released model it has the sizes of, or None.
        layers: attention modules that methods may change.
        heads: attention heads.
        methods: method name -> its options on this model, every recipe value filled in.
        refused: method name -> why it can't be attached here.
    """

    name: str
    transformer: str
    adapter: str
    family: str | None
    layers: int
    heads: int
    methods: Mapping[str, Mapping[str, Any]]
    refused: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What `describe` found, one entry per transformer."""

    transformers: Sequence[TransformerDescription]

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain values, for JSON."""
        return {
            "transformers": [
                {name: getattr(part, name) for name in TransformerDescription.__slots__} for part in self.transformers
            ]
        }

    def __str__(self) -> str:
        lines = []
        for part in self.transformers:
            family = part.family or "sizes of no released model"
            lines.append(f"{part.name}: {part.transformer}, adapter {part.adapter}, {family}")
            lines.append(f"  {part.layers} self-attention layers, {part.heads} heads")
            for method, options in part.methods.items():
                lines.append(f"  {method}: {', '.join(f'{key}={value}' for key, value in options.items())}")
            lines += [f"  {method}: refused, {why}" for method, why in part.refused.items()]
        return "\n".join(lines)


def describe(model: Any) -> Description:
    """Tell which methods could be attached to a pipeline or transformer, and with which options.

    Args:
        model: a diffusers pipeline or transformer; it is not changed.

    Raises:
        UnsupportedModel: if no adapter covers it; lists what is supported.
    """
    transformers = find_transformers(model)
    return Description(transformers=tuple(_describe(name, transformers) for name in transformers))


def _describe(name: str, transformers: dict[str, Any]) -> TransformerDescription:
    model = resolve_model(name, transformers)
    possible: dict[str, Mapping[str, Any]] = {}
    refused = dict(model.adapter.refused)
    for method, config_type in methods().items():
        if method in refused:
            continue
        try:
            (handler,) = make_handlers([config_type()], model, alone=False)
            possible[method] = handler.settings.to_dict()
        except ConfigError as error:
            refused[method] = str(error)
    return TransformerDescription(
        name=name,
        transformer=type(transformers[name]).__name__,
        adapter=model.adapter.name,
        family=model.family.name if model.family else None,
        layers=model.layers,
        heads=model.heads,
        methods=possible,
        refused=refused,
    )
