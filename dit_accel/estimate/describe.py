"""Describe: what to attach to a pipeline, what else could be, and with which options; touches nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DitAccelError
from ..methods.find import find_transformers, resolve_model, scheduler_of
from ..methods.registry import methods
from ..methods.verdicts import verdict_of
from ..report.html import as_printed, folded, piece, table
from .recommend import Recommendation, recommend


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerDescription:
    """One transformer of a pipeline, seen by the core."""

    name: str  # component name
    transformer: str  # class name
    adapter: str  # the adapter's name
    family: str | None  # the released model it has the sizes of, or None
    layers: int  # attention modules that methods may change
    heads: int  # attention heads
    # method name -> its options on this model, every recipe value filled in; they can be attached so
    methods: Mapping[str, Mapping[str, Any]]
    # method name -> what has no usual value on this model; once it is given, the method can be attached
    needs: Mapping[str, str]
    refused: Mapping[str, str]  # method name -> why it can't be attached here, with the pipeline's scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What `describe` found.

    Attributes:
        transformers: one entry per transformer.
        recommendation: what to attach at the model's default size; None where it is not known.
        not_recommended: why it can't, empty where it can.
    """

    transformers: Sequence[TransformerDescription]
    recommendation: Recommendation | None = None
    not_recommended: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain values, for JSON."""
        return {
            "recommendation": self.recommendation and self.recommendation.to_dict(),
            "transformers": [
                {name: getattr(part, name) for name in TransformerDescription.__slots__} for part in self.transformers
            ],
        }

    def _repr_html_(self) -> str:
        parts = [as_printed(str(self.recommendation or f"no recommendation: {self.not_recommended}"))]
        for part in self.transformers:
            rows = [
                (name, ", ".join(f"{key}={value}" for key, value in options.items()))
                for name, options in part.methods.items()
            ]
            rows += [(name, f"needs {what}") for name, what in part.needs.items()]
            rows += [(name, f"refused, {why}") for name, why in part.refused.items()]
            parts.append(folded(f"{part.name}: {len(part.methods)} methods", table(("method", "options"), rows)))
        return piece("; ".join(map(_header, self.transformers)), *parts)

    def __str__(self) -> str:
        lines = [_header(part) for part in self.transformers]
        lines += ["", str(self.recommendation or f"no recommendation: {self.not_recommended}"), ""]
        for part in self.transformers:
            lines.append(f"{part.name} takes {', '.join(part.methods) or 'no method'}")
            needs = ", ".join(f"{name} ({what})" for name, what in part.needs.items())
            lines += [f"{part.name} takes once it is given, {needs}"] if needs else []
            lines += [f"{part.name} refuses {', '.join(part.refused)}"] if part.refused else []
        return "\n".join(
            [*lines, "Their options, and why some are refused: `dit-accel describe --options`, or options()."]
        )

    def options(self) -> str:
        """Return every method with its options on this model, and why others are refused, as text."""
        lines: list[str] = []
        for part in self.transformers:
            lines += [_header(part), f"  {part.layers} self-attention layers, {part.heads} heads"]
            for method, options in part.methods.items():
                lines.append(f"  {method}: {', '.join(f'{key}={value}' for key, value in options.items())}")
            lines += [f"  {method}: needs {what}" for method, what in part.needs.items()]
            lines += [f"  {method}: refused, {why}" for method, why in part.refused.items()]
        return "\n".join(lines)


def _header(part: TransformerDescription) -> str:
    return f"{part.name}: {part.transformer}, adapter {part.adapter}, {part.family or 'sizes of no released model'}"


def describe(model: Any) -> Description:
    """Tell what to attach to a pipeline or transformer at its default size, and which methods it takes.

    `recommend` does the first for any size, and without the model.

    Raises:
        UnsupportedModel: if no adapter covers it; lists what is supported.
    """
    transformers = find_transformers(model)
    described = tuple(_describe(name, transformers, scheduler_of(model)) for name in transformers)
    try:
        return Description(transformers=described, recommendation=recommend(model))
    except DitAccelError as error:  # such as a config that does not tell the sizes
        return Description(transformers=described, not_recommended=str(error))


def _describe(name: str, transformers: dict[str, Any], scheduler: Any) -> TransformerDescription:
    model = resolve_model(name, transformers, scheduler)
    verdicts = {method: verdict_of(config_type(), model) for method, config_type in methods().items()}
    return TransformerDescription(
        name=name,
        transformer=type(transformers[name]).__name__,
        adapter=model.adapter.name,
        family=model.family.name if model.family else None,
        layers=model.layers,
        heads=model.heads,
        methods={of: verdict.handler.settings.to_dict() for of, verdict in verdicts.items() if verdict.handler},
        needs={of: verdict.needs for of, verdict in verdicts.items() if verdict.word == "needs"},
        refused={of: verdict.why for of, verdict in verdicts.items() if verdict.word == "refused"},
    )
